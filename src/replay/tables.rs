//! Re-inserts records into tables: existing rows stay, missing ones are inserted.
//!
//! A row is known by its topic, partition and offset, so a run may be repeated, interrupted and resumed. A chunk is
//! inserted under a token that a resumed run makes again. After every insert whose end is not known the rows are
//! counted: the token alone is not to be trusted when ClickHouse has been killed.

use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
    pin::pin,
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, stream};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};
use tokio_util::task::AbortOnDropHandle;

use super::{ReplayError, filter::Filter, plan::Mark};
use crate::{
    kafka::{
        Committed, Job, Partition, Record, Scan,
        log_names::Names,
        page::Page,
        scan::{Piece, Span},
    },
    store::{Route, Rows, Store, TroubleKind, present::Place, row::parse},
};

/// Inserts at once: the server works on some while another is on its way.
const INSERTS: usize = 3;

/// Pieces that are read from JSON at once.
const READINGS: usize = 2;

/// So many records are read before other tasks of the thread get their turn.
const TURN: usize = 32;

/// The rows and bytes of one insert, about. Those under way, the one that waits and the one that is gathered take a few
/// times this.
const ROWS: usize = 10_000;
const BYTES: usize = 14 * 1024 * 1024;

/// Ends of inserts that may wait for the commit of those before them.
const ENDS: usize = 16;

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
    /// Adds what another piece or another topic has come to.
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
pub struct Target {
    /// The database.
    pub store: Store,
    /// The table.
    pub place: Place,
    /// What its rows call the logs of the topics.
    pub names: Names,
}

/// A run into tables.
pub struct Pouring<'a> {
    /// Where to.
    pub target: Target,
    /// What is on the topic.
    pub route: Arc<Route>,
    /// Which records are meant.
    pub filter: Arc<Filter>,
    /// Keeps the progress; `None` counts only.
    pub job: Option<(&'a Job, String)>,
}

/// Missing rows of one partition, and how far a span is done with them.
struct Chunk {
    partition: Partition,
    rows: Rows,
    next: i64,
    to: i64,
}

impl Chunk {
    fn new(span: &Span) -> Self {
        let (partition, to) = (span.partition.clone(), span.range.end);
        Self { partition, rows: Rows::expecting(ROWS), next: span.range.start, to }
    }
}

/// What has been read of a piece.
struct Reading {
    rows: Rows,
    tally: Tally,
    /// The offset after its last record.
    next: i64,
}

impl Pouring<'_> {
    /// Reads the spans and inserts what is missing. Fetching, reading and inserting overlap, on all cores.
    ///
    /// # Errors
    /// [`ReplayError`]; the same run goes on where this one stopped.
    pub async fn run(&self, scan: Scan, spans: &[Span], progress: impl FnMut(&Tally)) -> Result<Tally, ReplayError> {
        let ((sender, inbox), (ends, ended)) = (mpsc::channel(1), mpsc::channel(ENDS));
        let gathered = self.gather(scan, spans, sender, progress);
        let (tally, poured, kept) = tokio::join!(gathered, self.pour_all(inbox, ends), self.keep(ended));
        kept?;
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
        let (mut tally, mut done) = (Tally::default(), 0);
        for span in spans {
            let (mut chunk, mut page, mut readings) = (Chunk::new(span), None, VecDeque::new());
            let mut is_over = false;
            while !(is_over && readings.is_empty()) {
                if !is_over && readings.len() < READINGS {
                    match scan.next().await? {
                        Some(Piece::Records { records, .. }) => {
                            let records = self.look(records, span, &mut page).await?;
                            readings.push_back(self.start_reading(records, &span.partition));
                        }
                        Some(Piece::End(_)) | None => is_over = true,
                    }
                    continue;
                }
                let Some(reading) = readings.pop_front() else { continue };
                let Reading { mut rows, tally: of_piece, next } = reading.await?;
                tally.add(&of_piece);
                while chunk.rows.fill_up(&mut rows, (ROWS, BYTES)) {
                    chunk.next = rows.ends().map_or(next, |(first, _)| first);
                    let full = std::mem::replace(&mut chunk, Chunk::new(span));
                    if sender.send(full).await.is_err() {
                        // Another part has failed, and says why.
                        return Ok(tally);
                    }
                }
                tally.offsets = done + u64::try_from(next - span.range.start).unwrap_or(0);
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

    /// Which of these records have their row.
    async fn look(
        &self,
        records: Vec<Record>,
        span: &Span,
        page: &mut Option<Page>,
    ) -> Result<Vec<(Record, bool)>, ReplayError> {
        let Target { store, place, .. } = &self.target;
        let partition = self.target.names.partition(&span.partition);
        let mut looked = Vec::with_capacity(records.len());
        for record in records {
            let known = page_of(store, place, &partition, record.offset..span.range.end, page).await?;
            let is_there = known.has(record.offset);
            looked.push((record, is_there));
        }
        Ok(looked)
    }

    fn start_reading(&self, records: Vec<(Record, bool)>, partition: &Partition) -> AbortOnDropHandle<Reading> {
        let (partition, is_kept) = (partition.clone(), self.job.is_some());
        let (route, filter) = (Arc::clone(&self.route), Arc::clone(&self.filter));
        owned(read(records, partition, route, filter, is_kept))
    }

    /// Inserts chunks, a few at once; `ends` hears of them in their order.
    async fn pour_all(
        &self,
        inbox: mpsc::Receiver<Chunk>,
        ends: mpsc::Sender<(Partition, Committed)>,
    ) -> Result<(), ReplayError> {
        let chunks = stream::unfold(inbox, async |mut inbox| inbox.recv().await.map(|chunk| (chunk, inbox)));
        let Some((_, run)) = &self.job else {
            chunks.for_each(async |_| {}).await;
            return Ok(());
        };
        let start = |chunk: Chunk| owned(pour_one(self.target.clone(), chunk, run.clone()));
        let mut poured = pin!(chunks.map(start).buffered(INSERTS));
        while let Some(end) = poured.next().await {
            if ends.send(end??).await.is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Keeps the progress: after a kill the next run looks again at what comes after it. What has ended during a commit
    /// goes into the next one.
    async fn keep(&self, mut ended: mpsc::Receiver<(Partition, Committed)>) -> Result<(), ReplayError> {
        let Some((job, _)) = &self.job else { return Ok(()) };
        let mut some = Vec::new();
        while ended.recv_many(&mut some, ENDS).await > 0 {
            let last: HashMap<Partition, Committed> = some.drain(..).collect();
            job.insist(Vec::new(), last.into_iter().collect()).await?;
        }
        Ok(())
    }
}

/// A task that is aborted when its handle is dropped.
#[allow(clippy::disallowed_methods, reason = "it is owned by its handle")]
fn owned<T: Send + 'static>(task: impl Future<Output = T> + Send + 'static) -> AbortOnDropHandle<T> {
    AbortOnDropHandle::new(tokio::spawn(task))
}

/// Makes rows of those records that are meant and have none.
async fn read(
    records: Vec<(Record, bool)>,
    partition: Partition,
    route: Arc<Route>,
    filter: Arc<Filter>,
    is_kept: bool,
) -> Reading {
    let next = records.last().map_or(0, |(record, _)| record.offset + 1);
    let mut reading = Reading { rows: Rows::expecting(records.len()), tally: Tally::default(), next };
    let Reading { rows, tally, .. } = &mut reading;
    for (count, (record, is_there)) in records.into_iter().enumerate() {
        if count % TURN == TURN - 1 {
            tokio::task::yield_now().await;
        }
        if is_there && filter.is_open() {
            tally.meant += 1;
            tally.there += 1;
            continue;
        }
        let raw = record.raw(&partition);
        let parsed = parse(&raw, &route);
        if !filter.keeps(&parsed) {
            continue;
        }
        if !parsed.has_row() {
            tally.rowless += 1;
            continue;
        }
        tally.meant += 1;
        if is_there {
            tally.there += 1;
            continue;
        }
        tally.inserted += 1;
        if is_kept {
            rows.add(&raw, &parsed);
        }
    }
    reading
}

/// Inserts a chunk; how far its partition is done with it.
async fn pour_one(target: Target, chunk: Chunk, run: String) -> Result<(Partition, Committed), ReplayError> {
    let Chunk { partition, rows, next, to } = chunk;
    pour(&target, &target.names.partition(&partition), rows, &run, true).await?;
    Ok((partition, Mark { run, to }.at(next)))
}

/// Inserts rows until all of them are known to be there. `is_sure`: that none of them is now, nor on its way.
pub(super) async fn pour(
    Target { store, place, .. }: &Target,
    partition: &Partition,
    mut rows: Rows,
    run: &str,
    mut is_sure: bool,
) -> Result<(), ReplayError> {
    let (mut times, mut pause, since) = (1, PAUSE_FIRST, Instant::now());
    while let Some((first, last)) = rows.ends() {
        let token = format!("replay:{run}:{partition}:{first}-{last}:{}#{times}", rows.len());
        match store.insert_missing(place, &rows, &token).await {
            Ok(()) if is_sure => break,
            Ok(()) => {
                let missing = missing(store, place, partition, &rows).await?;
                rows.retain(&missing);
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

/// Which of these rows are not in the table.
async fn missing(store: &Store, place: &Place, partition: &Partition, rows: &Rows) -> Result<Vec<bool>, ReplayError> {
    let end = rows.ends().map_or(0, |(_, last)| last + 1);
    let (mut page, mut missing) = (None, Vec::with_capacity(rows.len()));
    for offset in rows.offsets() {
        missing.push(!page_of(store, place, partition, offset..end, &mut page).await?.has(offset));
    }
    Ok(missing)
}

/// The page that the start of `range` is on: the one that is known, else what the table says of the range.
async fn page_of<'a>(
    store: &Store,
    place: &Place,
    partition: &Partition,
    range: Range<i64>,
    known: &'a mut Option<Page>,
) -> Result<&'a Page, ReplayError> {
    let page = match known.take() {
        Some(page) if page.range().contains(&range.start) => page,
        _ => store.present(place, partition, &range).await?,
    };
    Ok(known.insert(page))
}
