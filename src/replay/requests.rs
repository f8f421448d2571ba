//! Records once more to requests, each exactly once: a transaction holds the requests and how far the run has come.

use std::collections::BTreeMap;

use super::{
    ReplayError,
    ask::{Asked, Redriven, Skip, again},
    filter::Filter,
    plan::Mark,
};
use crate::{
    kafka::{
        Job, Outgoing, Scan,
        scan::{Piece, Span},
    },
    message::codec::Raw,
    runtime::clock::{Clock, Dice},
    sink::{Route, row::parse},
    topics::Topics,
};

/// Requests of one transaction, and their bytes.
const RECORDS: usize = 1_000;
const BYTES: usize = 4 * 1024 * 1024;

/// What a run has seen and done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Offsets that have been read.
    pub offsets: u64,
    /// Requests that were sent, or would be.
    pub sent: u64,
    /// Records that are meant, but not sent, and why.
    pub skipped: BTreeMap<Skip, u64>,
}

/// A run to requests.
pub struct Asking<'a> {
    /// What is on the topic.
    pub route: &'a Route,
    /// Which records are meant.
    pub filter: &'a Filter,
    /// What has been redriven before.
    pub redriven: &'a Redriven,
    /// The topics' names.
    pub topics: &'a Topics,
    /// Sends and keeps the progress; `None` counts only.
    pub job: Option<(&'a Job, String)>,
    /// The time.
    pub clock: Clock,
    /// For trace ids.
    pub dice: Dice,
}

impl Asking<'_> {
    /// Reads the spans and sends what is meant and not among `asked`.
    ///
    /// # Errors
    /// [`ReplayError`]; the same run goes on where this one stopped.
    pub async fn run(
        &self,
        mut scan: Scan,
        spans: &[Span],
        asked: &mut Asked,
        mut progress: impl FnMut(&Tally),
    ) -> Result<Tally, ReplayError> {
        let mut tally = Tally::default();
        let mut done = 0;
        for span in spans {
            let (mut outgoing, mut bytes) = (Vec::new(), 0);
            while let Some(Piece::Records { records, .. }) = scan.next().await? {
                for record in &records {
                    let raw = record.raw(&span.partition);
                    match self.ask(&raw, asked) {
                        Some(Ok(request)) => {
                            tally.sent += 1;
                            bytes += request.size();
                            outgoing.push(request);
                        }
                        Some(Err(skip)) => *tally.skipped.entry(skip).or_default() += 1,
                        None => {}
                    }
                    if outgoing.len() >= RECORDS || bytes >= BYTES {
                        self.send(std::mem::take(&mut outgoing), span, record.offset + 1).await?;
                        bytes = 0;
                    }
                    tally.offsets = done + u64::try_from(record.offset + 1 - span.range.start).unwrap_or(0);
                }
                progress(&tally);
            }
            self.send(outgoing, span, span.range.end).await?;
            done += span.length();
        }
        tally.offsets = done;
        progress(&tally);
        Ok(tally)
    }

    /// What is to be sent for a record, or why nothing; `None` if it is not meant.
    fn ask(&self, raw: &Raw<'_>, asked: &mut Asked) -> Option<Result<Outgoing, Skip>> {
        let parsed = Some(parse(raw, self.route)).filter(|parsed| self.filter.keeps(parsed))?;
        let now = self.clock.now();
        let again = match again(parsed, self.redriven, now) {
            Ok(again) if asked.is_first(&again) => again,
            Ok(_) => return Some(Err(Skip::SameChain)),
            Err(skip) => return Some(Err(skip)),
        };
        let run = self.job.as_ref().map_or("", |(_, run)| run);
        Some(Ok(again.record(raw, self.topics, run, now, &self.dice)))
    }

    async fn send(&self, records: Vec<Outgoing>, span: &Span, next: i64) -> Result<(), ReplayError> {
        let Some((job, run)) = &self.job else { return Ok(()) };
        let progress = Mark { run: run.clone(), to: span.range.end }.at(next);
        Ok(job.insist(records, vec![(span.partition.clone(), progress)]).await?)
    }
}
