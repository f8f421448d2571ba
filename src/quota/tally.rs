//! What became of the slots of each account: today, and in the last minute.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use prometheus_client::metrics::counter::Counter;

use crate::runtime::{
    clock::{Clock, Timestamp},
    metrics::Slots,
};

/// Counts for the accounts of one source, by index.
#[derive(Debug)]
pub struct Tally {
    clock: Clock,
    accounts: Mutex<Vec<Counts>>,
    again: Mutex<Again>,
    /// The same for Prometheus, if it is told.
    metrics: Vec<Slots>,
    delayed: Mutex<Option<Delayed>>,
}

/// By how much calls were delayed lately, and what that comes to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Delayed {
    /// So late did calls leave.
    pub late: Duration,
    /// So much later than usual came replies of calls that had left one after the other.
    pub bunched: Duration,
    /// The share of its pace that the source is called at for it.
    pub share: f64,
}

/// Calls of a day that were made again, of a source as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Again {
    /// Midnight UTC of the day that is counted.
    pub day_at: Timestamp,
    /// Calls whose answer was lost before it was committed.
    pub calls: u64,
    /// How often this worker's process ended without a word: what it had called for and not committed is in no count.
    pub silent_ends: u64,
    is_resumed: bool,
}

/// What became of one account's slots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Midnight UTC of the day that is counted.
    pub day_at: Timestamp,
    /// Calls made.
    pub calls: u64,
    /// Calls refused by the vendor.
    pub refused: u64,
    /// Slots missed, and dropped.
    pub late: u64,
    /// Slots handed back unused.
    pub returned: u64,
    /// Calls by tens of seconds, the newest in the place of its number modulo their count.
    lately: [(i64, u32); Self::TENS],
}

/// The day of a time.
#[must_use]
pub fn midnight(at: Timestamp) -> Timestamp {
    const DAY: i64 = 24 * 60 * 60 * 1_000;
    Timestamp::from_millis(at.as_millis().div_euclid(DAY) * DAY)
}

impl Again {
    fn begin_day(&mut self, today: Timestamp) {
        if today > self.day_at {
            *self = Self { day_at: today, is_resumed: self.is_resumed, ..Self::default() };
        }
    }

    /// As a report has it.
    #[must_use]
    pub fn of_day(day_at: Timestamp, calls: u64, silent_ends: u64) -> Self {
        Self { day_at, calls, silent_ends, is_resumed: false }
    }
}

impl Counts {
    /// How many tens of seconds are the last minute.
    const TENS: usize = 6;
    const MINUTE: i64 = 6;

    /// Counts of a day: calls, refused, late, returned.
    #[must_use]
    pub fn of_day(day_at: Timestamp, [calls, refused, late, returned]: [u64; 4]) -> Self {
        Self { day_at, calls, refused, late, returned, ..Self::default() }
    }

    fn ten(at: Timestamp) -> (usize, i64) {
        let number = at.as_millis().div_euclid(10_000);
        (usize::try_from(number.rem_euclid(Self::MINUTE)).unwrap_or_default(), number)
    }

    fn begin_day(&mut self, now: Timestamp) {
        let today = midnight(now);
        if today > self.day_at {
            *self = Self { day_at: today, lately: self.lately, ..Self::default() };
        }
    }

    fn call(&mut self, now: Timestamp) {
        self.calls += 1;
        let (place, number) = Self::ten(now);
        if self.lately[place].0 != number {
            self.lately[place] = (number, 0);
        }
        self.lately[place].1 += 1;
    }

    /// Calls made in the last minute, to within ten seconds.
    #[must_use]
    pub fn last_minute(&self, now: Timestamp) -> u64 {
        let (_, number) = Self::ten(now);
        let recent = self.lately.iter().filter(|(ten, _)| number - ten < Self::MINUTE);
        recent.map(|(_, calls)| u64::from(*calls)).sum()
    }
}

impl Tally {
    /// Nothing has been counted yet.
    #[must_use]
    pub fn new(accounts: usize, clock: Clock) -> Self {
        let day_at = midnight(clock.now());
        Self {
            clock,
            accounts: Mutex::new(vec![Counts { day_at, ..Counts::default() }; accounts]),
            again: Mutex::new(Again { day_at, ..Again::default() }),
            metrics: Vec::new(),
            delayed: Mutex::default(),
        }
    }

    /// Calls are delayed, or not any more.
    pub fn set_delayed(&self, delayed: Option<Delayed>) {
        *self.delayed.lock().unwrap_or_else(PoisonError::into_inner) = delayed;
    }

    /// By how much calls are delayed, if the pace is widened for it.
    #[must_use]
    pub fn delayed(&self) -> Option<Delayed> {
        *self.delayed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same, which tells what it counts.
    #[must_use]
    pub fn telling(self, metrics: Vec<Slots>) -> Self {
        Self { metrics, ..self }
    }

    /// Goes on where a process of this name ended today. What this one has counted itself since, while no report was
    /// taken, stands.
    pub fn resume(&self, account: usize, counts: &Counts) {
        if let Some(own) = self.accounts().get_mut(account).filter(|own| own.day_at == counts.day_at) {
            own.calls = own.calls.max(counts.calls);
            own.refused = own.refused.max(counts.refused);
            own.late = own.late.max(counts.late);
            own.returned = own.returned.max(counts.returned);
        }
    }

    /// The same for what was made again. `in_order`: the last report said that there would be no other. A process that
    /// resumes for the second time, after its role has failed, knows that itself.
    pub fn resume_again(&self, before: Again, in_order: bool) {
        let mut own = self.lock_again();
        own.begin_day(midnight(self.clock.now()));
        if std::mem::replace(&mut own.is_resumed, true) {
            return;
        }
        if before.day_at == own.day_at {
            own.calls += before.calls;
            own.silent_ends += before.silent_ends;
        }
        own.silent_ends += u64::from(!in_order);
    }

    /// So many calls have to be made again.
    pub fn lost(&self, calls: u64) {
        let mut again = self.lock_again();
        again.begin_day(midnight(self.clock.now()));
        again.calls += calls;
    }

    /// What was made again today.
    #[must_use]
    pub fn again(&self) -> Again {
        let mut again = self.lock_again();
        again.begin_day(midnight(self.clock.now()));
        *again
    }

    fn lock_again(&self) -> MutexGuard<'_, Again> {
        self.again.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A call was made, and perhaps refused.
    pub fn called(&self, account: usize, refused: bool) {
        self.tell(account, |slots| &slots.used);
        self.count(account, |counts, now| {
            counts.call(now);
            counts.refused += u64::from(refused);
        });
    }

    /// A slot was missed.
    pub fn missed(&self, account: usize) {
        self.tell(account, |slots| &slots.missed);
        self.count(account, |counts, _| counts.late += 1);
    }

    /// A slot was handed back unused.
    pub fn returned(&self, account: usize) {
        self.tell(account, |slots| &slots.returned);
        self.count(account, |counts, _| counts.returned += 1);
    }

    /// The counts of one account as of now.
    #[must_use]
    pub fn of(&self, account: usize) -> Counts {
        self.count(account, |_, _| {});
        self.accounts().get(account).cloned().unwrap_or_default()
    }

    fn tell(&self, account: usize, which: impl Fn(&Slots) -> &Counter) {
        if let Some(slots) = self.metrics.get(account) {
            which(slots).inc();
        }
    }

    fn count(&self, account: usize, change: impl FnOnce(&mut Counts, Timestamp)) {
        let now = self.clock.now();
        if let Some(counts) = self.accounts().get_mut(account) {
            counts.begin_day(now);
            change(counts, now);
        }
    }

    fn accounts(&self) -> MutexGuard<'_, Vec<Counts>> {
        // Counting leaves nothing half done, so a panic elsewhere under the lock has broken nothing.
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A day.
pub const DAY: Duration = Duration::from_secs(24 * 60 * 60);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn calls_are_counted_by_day_and_for_the_last_minute() {
        let start = Timestamp::from_millis(1_700_000_000_000);
        let clock = Clock::simulated(start);
        let tally = Tally::new(1, clock.clone());
        for second in 0..120 {
            tally.called(0, second % 10 == 0);
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        tally.missed(0);
        tally.returned(0);
        tally.called(9, false);
        let counts = tally.of(0);
        assert_eq!((counts.calls, counts.refused, counts.late, counts.returned), (120, 12, 1, 1));
        let lately = counts.last_minute(clock.now());
        assert!((50..=60).contains(&lately), "{lately}");
        tokio::time::advance(DAY).await;
        let counts = tally.of(0);
        assert_eq!((counts.calls, counts.refused, counts.last_minute(clock.now())), (0, 0, 0));
        assert_eq!(counts.day_at, midnight(start.after(DAY)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_goes_on_with_todays_counts_but_not_with_yesterdays() {
        let clock = Clock::simulated(Timestamp::from_millis(1_700_000_000_000));
        let tally = Tally::new(2, clock.clone());
        let today = midnight(clock.now());
        tally.resume(0, &Counts { day_at: today, calls: 7, ..Counts::default() });
        tally.resume(
            1,
            &Counts { day_at: Timestamp::from_millis(today.as_millis() - 1), calls: 7, ..Counts::default() },
        );
        tally.called(0, false);
        tally.called(1, false);
        assert_eq!((tally.of(0).calls, tally.of(1).calls), (8, 1));
        // The role begins anew in the same process: its last report was not taken.
        tally.resume(0, &Counts { day_at: today, calls: 7, refused: 2, ..Counts::default() });
        assert_eq!((tally.of(0).calls, tally.of(0).refused), (8, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_made_again_is_counted_by_day_and_a_silent_end_by_the_process_that_follows() {
        let clock = Clock::simulated(Timestamp::from_millis(1_700_000_000_000));
        let tally = Tally::new(1, clock.clone());
        let today = midnight(clock.now());
        tally.resume_again(Again::of_day(today, 5, 1), false);
        tally.lost(3);
        // A role that begins anew in the same process: its reports were not taken, and it has not ended.
        tally.resume_again(Again::of_day(today, 5, 1), false);
        assert_eq!((tally.again().calls, tally.again().silent_ends), (8, 2));
        tokio::time::advance(DAY).await;
        assert_eq!((tally.again().calls, tally.again().silent_ends), (0, 0));
        let tally = Tally::new(1, clock.clone());
        tally.resume_again(Again::of_day(today, 5, 1), true);
        assert_eq!((tally.again().calls, tally.again().silent_ends), (0, 0), "yesterday's");
    }
}
