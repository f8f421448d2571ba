//! The progress of a batch, from ClickHouse, until each request has its end.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::{
    exit::Exit,
    terminal::{Progress, Rate, grouped, per_second, say, spoken},
};
use crate::{
    config::Config,
    message::BatchId,
    sink::{Store, Trouble, TroubleKind, query::Progress as Counts},
};

/// How often ClickHouse is asked; less often when its answer takes long.
const POLL: Duration = Duration::from_millis(300);

/// After how long without a change the user is told where to look.
const PATIENCE: Duration = Duration::from_secs(30);

const ADVICE: &str = "Is `weir run` running, with fetch, retry and sink? `weir status` shows where records wait, \
    `weir check` tests the connections.";

/// Shows the progress until `expected` requests have come to their end, or `stop`.
///
/// # Errors
/// ClickHouse does not let us in or lacks the tables; while it is away it is waited for.
pub(super) async fn run(
    config: &Config,
    batch: &BatchId,
    expected: u64,
    stop: &CancellationToken,
) -> anyhow::Result<Exit> {
    let store = Store::connect(&config.clickhouse)?;
    let mut watch = Watch::new(expected);
    loop {
        let asked = Instant::now();
        let answer = tokio::select! {
            answer = store.batch_progress(batch) => answer,
            () = stop.cancelled() => break,
        };
        match answer {
            Ok(counts) if watch.see(counts, Instant::now()) => {
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
    say(&format!("{}. It goes on without this command; watch it with: weir status", watch.words()))?;
    Ok(Exit::Interrupted)
}

fn may_pass(trouble: &Trouble) -> bool {
    match trouble.kind {
        TroubleKind::Away | TroubleKind::Unable => true,
        TroubleKind::Schema | TroubleKind::Login | TroubleKind::Refused => false,
    }
}

struct Watch {
    expected: u64,
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
        Self { expected, counts, progress, rate, per_second: 0.0, started: now, moved: now }
    }

    /// Takes a poll's answer; true when all have come to their end.
    #[allow(clippy::cast_precision_loss, reason = "a share for people")]
    fn see(&mut self, counts: Counts, now: Instant) -> bool {
        if counts != self.counts {
            self.moved = now;
        }
        self.counts = counts;
        // The batch may have been there before: then it has more requests than this command sent.
        self.expected = self.expected.max(counts.requested);
        self.per_second = self.rate.add(now, counts.ended());
        if now - self.moved >= PATIENCE {
            self.moved = now;
            self.progress.note(&format!("Nothing has moved for {}. {ADVICE}", spoken(PATIENCE)));
        }
        let share = counts.ended() as f64 / self.expected.max(1) as f64;
        let text = self.words();
        self.progress.show(Some(share), || text);
        counts.ended() >= self.expected
    }

    fn words(&self) -> String {
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
                "\nWhy the dead ones died: weir query \"SELECT item, reason, message FROM dead_letters WHERE batch = '{batch}'\""
            ),
        };
        let rate = per_second(rate);
        format!("All {} have their end after {} ({rate}): {}{dead}", grouped(all), spoken(took), self.tally())
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
        assert!(!watch.see(counts(0, 0), Instant::now()));
        assert!(!watch.see(counts(10, 9), Instant::now()));
        assert!(watch.see(Counts { dead: 1, ..counts(10, 9) }, Instant::now()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_that_was_there_before_is_watched_to_its_end_too() {
        let mut watch = Watch::new(10);
        assert!(!watch.see(counts(25, 10), Instant::now()));
        assert!(watch.see(counts(25, 25), Instant::now()));
    }
}
