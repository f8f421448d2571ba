//! Records once more into tables: what is there stays, what is missing is inserted.
//!
//! A row is known by its topic, partition and offset, so a run may be repeated, interrupted and resumed. A chunk is
//! inserted under a token that a resumed run makes again. After every insert whose end is not known the rows are
//! counted: the token alone is not to be trusted when ClickHouse has been killed.

use std::{pin::pin, time::Duration};

use futures::{StreamExt as _, stream};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};

use super::{ReplayError, filter::Filter, plan::Mark};
use crate::{
    kafka::{
        Committed, Job, Partition, Record, Scan,
        page::Page,
        scan::{Piece, Span},
    },
    sink::{
        Route, Store, TroubleKind,
        present::Place,
        row::{Parsed, parse},
    },
};

/// Inserts at once: the server works on one while the other is on its way.
const INSERTS: usize = 2;

/// The rows and bytes of one insert, about. Those under way, the one that waits and the one that is gathered take a few
/// times this.
const ROWS: usize = 10_000;
const BYTES: usize = 10 * 1024 * 1024;

/// For how long one chunk is offered to a ClickHouse that takes nothing.
const PATIENCE: Duration = Duration::from_secs(600);
const PAUSE_FIRST: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(15);

/// What a run has seen and done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Offsets that have been read.
    pub offsets: u64,
    /// Records that are meant, as far as they were looked at: with no filter those that are there are not.
    pub meant: u64,
    /// Of these, that had their row.
    pub there: u64,
    /// Of these, that were inserted, or would be.
    pub inserted: u64,
    /// Records that make no row in this table.
    pub rowless: u64,
}

impl Tally {
    /// Adds what another topic's run has come to.
    pub fn add(&mut self, other: &Self) {
        self.offsets += other.offsets;
        self.meant += other.meant;
        self.there += other.there;
        self.inserted += other.inserted;
        self.rowless += other.rowless;
    }
}

/// Where the rows go.
#[derive(Clone, Debug)]
pub struct Target<'a> {
    /// The database.
    pub store: &'a Store,
    /// The table.
    pub place: Place,
}

/// A run into tables.
pub struct Pouring<'a> {
    /// Where to.
    pub target: Target<'a>,
    /// What is on the topic.
    pub route: &'a Route,
    /// Which records are meant.
    pub filter: &'a Filter,
    /// Keeps the progress; `None` counts only.
    pub job: Option<(&'a Job, String)>,
}

/// Missing rows of one partition, and how far a span is done with them.
struct Chunk {
    partition: Partition,
    rows: Vec<(Record, Parsed)>,
    bytes: usize,
    next: i64,
    to: i64,
}

impl Chunk {
    fn new(span: &Span) -> Self {
        let (partition, to) = (span.partition.clone(), span.range.end);
        Self { partition, rows: Vec::new(), bytes: 0, next: span.range.start, to }
    }

    fn is_full(&self) -> bool {
        self.rows.len() >= ROWS || self.bytes >= BYTES
    }

    /// Keeps of a record what its row is made of.
    fn add(&mut self, mut record: Record, parsed: Parsed) {
        self.bytes += record.value.as_ref().map_or(0, bytes::Bytes::len) + 512;
        record.headers.retain(|(name, _)| name.eq_ignore_ascii_case("traceparent"));
        record.key = None;
        if !matches!(parsed, Parsed::Raw(_)) {
            record.value = None;
        }
        self.rows.push((record, parsed));
    }
}

impl Pouring<'_> {
    /// Reads the spans and inserts what is missing. Reading and inserting overlap.
    ///
    /// # Errors
    /// [`ReplayError`]; the same run goes on where this one stopped.
    pub async fn run(&self, scan: Scan, spans: &[Span], progress: impl FnMut(&Tally)) -> Result<Tally, ReplayError> {
        let (sender, inbox) = mpsc::channel(1);
        let (tally, poured) = tokio::join!(self.gather(scan, spans, sender, progress), self.pour_all(inbox));
        poured?;
        tally
    }

    async fn gather(
        &self,
        mut scan: Scan,
        spans: &[Span],
        sender: mpsc::Sender<Chunk>,
        mut progress: impl FnMut(&Tally),
    ) -> Result<Tally, ReplayError> {
        let mut tally = Tally::default();
        let mut done = 0;
        for span in spans {
            let mut chunk = Chunk::new(span);
            let mut page = None;
            while let Some(Piece::Records { records, .. }) = scan.next().await? {
                for record in records {
                    let offset = record.offset;
                    self.look(record, span, &mut page, &mut chunk, &mut tally).await?;
                    if chunk.is_full() {
                        chunk.next = offset + 1;
                        let full = std::mem::replace(&mut chunk, Chunk::new(span));
                        if sender.send(full).await.is_err() {
                            // The other half has failed, and says why.
                            return Ok(tally);
                        }
                    }
                    tally.offsets = done + u64::try_from(offset + 1 - span.range.start).unwrap_or(0);
                }
                progress(&tally);
            }
            done += span.length();
            chunk.next = span.range.end;
            if sender.send(chunk).await.is_err() {
                return Ok(tally);
            }
        }
        tally.offsets = done;
        progress(&tally);
        Ok(tally)
    }

    /// Puts a record into the chunk if it is meant and has no row.
    async fn look(
        &self,
        record: Record,
        span: &Span,
        page: &mut Option<Page>,
        chunk: &mut Chunk,
        tally: &mut Tally,
    ) -> Result<(), ReplayError> {
        let Target { store, place } = &self.target;
        let known = match page {
            Some(page) if page.range().contains(&record.offset) => page,
            _ => page.insert(store.present(place, &span.partition, &(record.offset..span.range.end)).await?),
        };
        let is_there = known.has(record.offset);
        if is_there && self.filter.is_open() {
            tally.meant += 1;
            tally.there += 1;
            return Ok(());
        }
        let raw = record.raw(&span.partition);
        let parsed = parse(&raw, self.route);
        if !self.filter.keeps(&parsed) {
            return Ok(());
        }
        let has_row = parsed.has_row();
        match (is_there, has_row) {
            (_, false) => tally.rowless += 1,
            (true, true) => {
                tally.meant += 1;
                tally.there += 1;
            }
            (false, true) => {
                tally.meant += 1;
                tally.inserted += 1;
                if self.job.is_some() {
                    chunk.add(record, parsed);
                }
            }
        }
        Ok(())
    }

    /// Inserts chunks, a few at once, and keeps the progress in their order: after a kill the next run looks again at
    /// what comes after it.
    async fn pour_all(&self, inbox: mpsc::Receiver<Chunk>) -> Result<(), ReplayError> {
        let chunks = stream::unfold(inbox, async |mut inbox| inbox.recv().await.map(|chunk| (chunk, inbox)));
        let Some((job, run)) = &self.job else {
            chunks.for_each(async |_| {}).await;
            return Ok(());
        };
        let mut poured = pin!(chunks.map(|chunk| self.pour_one(chunk, run)).buffered(INSERTS));
        while let Some(progress) = poured.next().await {
            job.insist(Vec::new(), vec![progress?]).await?;
        }
        Ok(())
    }

    /// Inserts a chunk; how far its partition is done with it.
    async fn pour_one(&self, chunk: Chunk, run: &str) -> Result<(Partition, Committed), ReplayError> {
        let mark = Mark { run: run.to_owned(), to: chunk.to };
        pour(&self.target, &chunk.partition, chunk.rows, run, true).await?;
        Ok((chunk.partition, mark.at(chunk.next)))
    }
}

/// Inserts rows until all of them are known to be there. `is_sure`: that none of them is now, nor on its way.
pub(super) async fn pour(
    Target { store, place }: &Target<'_>,
    partition: &Partition,
    mut rows: Vec<(Record, Parsed)>,
    run: &str,
    mut is_sure: bool,
) -> Result<(), ReplayError> {
    let (mut times, mut pause, since) = (1, PAUSE_FIRST, Instant::now());
    while let (Some((first, _)), Some((last, _))) = (rows.first(), rows.last()) {
        let (first, last) = (first.offset, last.offset);
        let token = format!("replay:{run}:{partition}:{first}-{last}:{}#{times}", rows.len());
        match store.insert_missing(place, partition, &rows, &token).await {
            Ok(()) if is_sure => break,
            Ok(()) => {
                rows = still_missing(store, place, partition, rows).await?;
                times += 1;
            }
            Err(trouble) => {
                let may_pass = matches!(trouble.kind, TroubleKind::Away | TroubleKind::Unable);
                if !may_pass || since.elapsed() > PATIENCE {
                    return Err(trouble.into());
                }
                tracing::warn!("{trouble}. Trying again");
                is_sure = false;
                sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
    }
    Ok(())
}

/// What of these rows is not in the table.
async fn still_missing(
    store: &Store,
    place: &Place,
    partition: &Partition,
    rows: Vec<(Record, Parsed)>,
) -> Result<Vec<(Record, Parsed)>, ReplayError> {
    let end = rows.last().map_or(0, |(record, _)| record.offset + 1);
    let mut page: Option<Page> = None;
    let mut missing = Vec::new();
    for (record, parsed) in rows {
        let known = match &mut page {
            Some(page) if page.range().contains(&record.offset) => page,
            other => other.insert(store.present(place, partition, &(record.offset..end)).await?),
        };
        if !known.has(record.offset) {
            missing.push((record, parsed));
        }
    }
    Ok(missing)
}
