//! The progress of a batch, from ClickHouse, until each request has its end.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::{
    exit::Exit,
    terminal::{Progress, Rate, agree, counted, grouped, per_second, say, spoken},
};
use crate::{
    config::Config,
    message::BatchId,
    store::{Store, Trouble, TroubleKind, query::Progress as Counts},
};

/// How often ClickHouse is asked; less often when its answer takes long.
const POLL: Duration = Duration::from_millis(300);

/// After how long without a change the user is told where to look.
const PATIENCE: Duration = Duration::from_secs(30);

const ADVICE: &str = "Is `weir run` running, with fetch, retry and sink? `weir status` shows where records wait, \
    `weir check` tests the connections.";

/// Where the requests of a command stand.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sent {
    /// By partition the first and the last offset.
    ranges: BTreeMap<i32, (i64, i64)>,
    count: u64,
}

impl Sent {
    pub(super) fn add(&mut self, places: &[(i32, i64)]) {
        self.count += places.len() as u64;
        for (partition, offset) in places {
            let (first, last) = self.ranges.entry(*partition).or_insert((*offset, *offset));
            (*first, *last) = ((*first).min(*offset), (*last).max(*offset));
        }
    }

    pub(super) const fn count(&self) -> u64 {
        self.count
    }
}

/// The requests that have to be known before a batch can be said to have ended: it may have been there before, and
/// the sink may not have come to them yet.
#[derive(Clone, Debug, Default)]
pub(super) struct Expected {
    pub(super) topic: String,
    pub(super) sent: Sent,
}

impl Expected {
    /// How many of them are not known yet.
    async fn unknown(&self, store: &Store, batch: &BatchId) -> Result<u64, Trouble> {
        let ranges: Vec<_> =
            self.sent.ranges.iter().map(|(partition, (first, last))| (*partition, *first, *last)).collect();
        Ok(self.sent.count.saturating_sub(store.recorded(batch, &self.topic, &ranges).await?))
    }
}

/// Shows the progress until all requests of the batch have come to their end, and all that are expected are among
/// them; or `stop`.
///
/// # Errors
/// ClickHouse does not let us in or lacks the tables; while it is away it is waited for.
pub(super) async fn run(
    config: &Config,
    batch: &BatchId,
    mut expected: Option<Expected>,
    stop: &CancellationToken,
) -> anyhow::Result<Exit> {
    let store = Store::connect(&config.clickhouse)?;
    let mut watch = Watch::new(expected.as_ref().map_or(0, |expected| expected.sent.count));
    loop {
        let asked = Instant::now();
        let answer = tokio::select! {
            answer = look(&store, batch, &mut expected) => answer,
            () = stop.cancelled() => break,
        };
        match answer {
            Ok((counts, unknown)) if watch.see(counts, unknown, Instant::now()) => {
                watch.progress.clear();
                say(&watch.last_words(batch))?;
                return Ok(Exit::Done);
            }
            Ok(_) => {}
            Err(trouble) if may_pass(&trouble) => watch.progress.note(&format!("{trouble}. Trying again")),
            Err(trouble) => return Err(trouble.into()),
        }
        let pause = POLL.max(asked.elapsed() * 5);
        tokio::select! {
            () = sleep(pause) => {}
            () = stop.cancelled() => break,
        }
    }
    watch.progress.clear();
    say(&format!("{}. The batch continues; watch it with: weir batch {batch} --follow", watch.words()))?;
    Ok(Exit::Interrupted)
}

/// How far the batch is, and how many of the expected requests are not known yet. These are asked for first, so that
/// the counts know of them.
async fn look(store: &Store, batch: &BatchId, expected: &mut Option<Expected>) -> Result<(Counts, u64), Trouble> {
    let unknown = match expected {
        Some(some) => some.unknown(store, batch).await?,
        None => 0,
    };
    if unknown == 0 {
        *expected = None;
    }
    Ok((store.batch_progress(batch).await?, unknown))
}

fn may_pass(trouble: &Trouble) -> bool {
    match trouble.kind {
        TroubleKind::Away | TroubleKind::Unable => true,
        TroubleKind::Schema | TroubleKind::Login | TroubleKind::Refused => false,
    }
}

struct Watch {
    expected: u64,
    unknown: u64,
    counts: Counts,
    progress: Progress,
    rate: Rate,
    per_second: f64,
    started: Instant,
    moved: Instant,
}

impl Watch {
    fn new(expected: u64) -> Self {
        let now = Instant::now();
        let (counts, progress, rate) = (Counts::default(), Progress::new(), Rate::default());
        Self { expected, unknown: 0, counts, progress, rate, per_second: 0.0, started: now, moved: now }
    }

    /// Takes a poll's answer; true when all are known and have come to their end.
    #[allow(clippy::cast_precision_loss, reason = "a share for people")]
    fn see(&mut self, counts: Counts, unknown: u64, now: Instant) -> bool {
        if counts != self.counts {
            self.moved = now;
        }
        (self.counts, self.unknown) = (counts, unknown);
        // The batch may have been there before: then it has more requests than this command sent.
        self.expected = self.expected.max(counts.requested);
        self.per_second = self.rate.add(now, counts.ended());
        if now - self.moved >= PATIENCE {
            self.moved = now;
            self.progress.note(&format!("No progress for {}. {ADVICE}", spoken(PATIENCE)));
        }
        let share = counts.ended() as f64 / self.expected.max(1) as f64;
        let text = self.words();
        self.progress.show(Some(share), || text);
        unknown == 0 && counts.requested > 0 && counts.ended() >= counts.requested
    }

    fn words(&self) -> String {
        if self.unknown > 0 {
            let are = agree(self.unknown, "is", "are");
            return format!("{} {are} not stored yet: {}", counted(self.unknown, "request"), self.tally());
        }
        let left = self.expected.saturating_sub(self.counts.ended());
        let (done, all) = (grouped(self.counts.ended()), grouped(self.expected));
        format!("{done} of {all}{}: {}", Rate::words(self.per_second, Some(left)), self.tally())
    }

    fn tally(&self) -> String {
        let Counts { found, absent, off_shelf, dead, retried, .. } = self.counts;
        let [found, absent, off_shelf, dead, retried] = [found, absent, off_shelf, dead, retried].map(grouped);
        format!("{found} found, {absent} absent, {off_shelf} off-shelf, {dead} dead, {retried} retried")
    }

    #[allow(clippy::cast_precision_loss, reason = "a rate for people")]
    fn last_words(&self, batch: &BatchId) -> String {
        let took = self.started.elapsed();
        let all = self.counts.ended();
        let rate = all as f64 / took.as_secs_f64().max(0.001);
        let dead = match self.counts.dead {
            0 => String::new(),
            _ => format!(
                "\nReasons of the dead letters: weir query \"SELECT item, reason, message FROM dead_letters WHERE \
                 batch = '{batch}'\""
            ),
        };
        let rate = per_second(rate);
        let ended = match all {
            1 => "It finished".to_owned(),
            _ => format!("All {} finished", grouped(all)),
        };
        format!("{ended} after {} ({rate}): {}{dead}", spoken(took), self.tally())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(requested: u64, found: u64) -> Counts {
        Counts { requested, found, ..Counts::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn it_ends_when_each_request_has_its_end_and_not_before() {
        let mut watch = Watch::new(10);
        assert!(!watch.see(counts(0, 0), 10, Instant::now()));
        assert!(!watch.see(counts(10, 9), 0, Instant::now()));
        assert!(watch.see(Counts { dead: 1, ..counts(10, 9) }, 0, Instant::now()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_that_was_there_before_is_watched_until_the_new_requests_are_known_and_ended() {
        let mut watch = Watch::new(10);
        assert!(!watch.see(counts(1_000, 1_000), 10, Instant::now()), "the sink has not come to the new ones");
        assert!(!watch.see(counts(1_005, 1_005), 5, Instant::now()));
        assert!(!watch.see(counts(1_010, 1_009), 0, Instant::now()));
        assert!(watch.see(counts(1_010, 1_010), 0, Instant::now()));
    }

    #[test]
    fn what_was_sent_is_kept_as_ranges() {
        let mut sent = Sent::default();
        sent.add(&[(0, 7), (1, 3)]);
        sent.add(&[(0, 5), (0, 9)]);
        assert_eq!(sent.count(), 4);
        assert_eq!(sent.ranges, BTreeMap::from([(0, (5, 9)), (1, (3, 3))]));
    }
}
