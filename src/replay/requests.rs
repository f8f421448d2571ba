//! Sends records back to requests, each exactly once: one transaction commits the requests and the run's progress.

use std::collections::BTreeMap;

use super::{
    ReplayError,
    ask::{Asked, Redriven, Skip, WRITER, again},
    filter::Filter,
    plan::Mark,
};
use crate::{
    kafka::{
        Epoch, Instead, Job, Outgoing, Scan,
        outbox::Position,
        scan::{Piece, Span},
    },
    message::codec::Raw,
    runtime::clock::{Clock, Dice},
    store::{
        Route,
        row::{Parsed, parse},
    },
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
    /// Of these, the dead letters by the reason that they died of.
    pub reasons: BTreeMap<&'static str, u64>,
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

impl Tally {
    /// Adds what another topic's run has come to.
    pub fn add(&mut self, other: &Self) {
        self.offsets += other.offsets;
        self.sent += other.sent;
        for (reason, count) in &other.reasons {
            *self.reasons.entry(reason).or_default() += count;
        }
        for (skip, count) in &other.skipped {
            *self.skipped.entry(*skip).or_default() += count;
        }
    }
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
                    if let Some(request) = self.ask(&raw, asked, &mut tally) {
                        bytes += request.size();
                        let partition = span.partition.clone();
                        outgoing.push((request, Position { partition, epoch: Epoch(0), offset: record.offset }));
                    }
                    if outgoing.len() >= RECORDS || bytes >= BYTES {
                        self.send(std::mem::take(&mut outgoing), span, record.offset + 1, &mut tally).await?;
                        bytes = 0;
                    }
                    tally.offsets = done + u64::try_from(record.offset + 1 - span.range.start).unwrap_or(0);
                }
                progress(&tally);
            }
            self.send(outgoing, span, span.range.end, &mut tally).await?;
            done += span.length();
        }
        tally.offsets = done;
        progress(&tally);
        Ok(tally)
    }

    /// What is to be sent for a record, if anything.
    fn ask(&self, raw: &Raw<'_>, asked: &mut Asked, tally: &mut Tally) -> Option<Outgoing> {
        let parsed = Some(parse(raw, self.route)).filter(|parsed| self.filter.keeps(parsed))?;
        let reason = if let Parsed::DeadLetter(dead) = &parsed { Some(dead.reason.as_str()) } else { None };
        let now = self.clock.now();
        let skip = match again(parsed, self.filter.reason, self.redriven, now) {
            Ok(again) if asked.is_first(&again) => {
                tally.sent += 1;
                if let Some(reason) = reason {
                    *tally.reasons.entry(reason).or_default() += 1;
                }
                let run = self.job.as_ref().map_or("", |(_, run)| run);
                return Some(again.record(raw, self.topics, run, now, &self.dice));
            }
            Ok(_) => Skip::SameChain,
            Err(skip) => skip,
        };
        *tally.skipped.entry(skip).or_default() += 1;
        None
    }

    async fn send(
        &self,
        records: Vec<(Outgoing, Position)>,
        span: &Span,
        next: i64,
        tally: &mut Tally,
    ) -> Result<(), ReplayError> {
        let Some((job, run)) = &self.job else { return Ok(()) };
        let progress = vec![(span.partition.clone(), Mark { run: run.clone(), to: span.range.end }.at(next))];
        let instead = Instead::new(self.topics.dead(), WRITER);
        let too_large = job.insist_or_set_aside(records, progress, &instead, self.clock.now()).await?.len() as u64;
        if too_large > 0 {
            tally.sent = tally.sent.saturating_sub(too_large);
            *tally.skipped.entry(Skip::TooLarge).or_default() += too_large;
        }
        Ok(())
    }
}
