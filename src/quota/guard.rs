//! The last door before a vendor: knows the vendor's own limits, not our pace, and never has to close if our pace
//! is right.
//!
//! A bucket is judged as a bucket and a window as a window: one that was spent late is whole again in the next. No call
//! waits here beyond its slot, since another slot is made for whatever waits.

use std::{
    collections::VecDeque,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use governor::{
    RateLimiter,
    clock::Clock as _,
    middleware::NoOpMiddleware,
    state::{InMemoryState, NotKeyed},
};
use tokio::time::Instant;
use tracing::warn;

use super::{
    Counting, Limit, Pacing, Slot,
    budget::Rule,
    limit::{Micros, micros_since_1970},
    plan::Limits,
};
use crate::runtime::clock::Clock;

/// An independent check of every call: per account, per address that calls leave from, and for the source.
///
/// It waits and never refuses, but no longer than the slot lasts; that it waited at all means that the pace is wrong, or
/// that somebody else shares the account.
#[derive(Debug)]
pub struct Guard {
    buckets: Gates<Bucket>,
    windows: Mutex<Gates<Window>>,
    clock: Clock,
    held: AtomicU64,
}

/// A call that was let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pass {
    /// When, by both clocks.
    at: Instant,
    time: Micros,
}

/// Something for each limit.
#[derive(Debug)]
struct Gates<T> {
    accounts: Vec<Vec<T>>,
    addresses: Vec<Vec<T>>,
    source: Vec<T>,
}

impl<T> Gates<T> {
    fn of(limits: &Limits, make: impl Fn(&Limit) -> Option<T>) -> Self {
        let all = |limits: &[Limit]| limits.iter().filter_map(&make).collect::<Vec<_>>();
        Self {
            accounts: limits.accounts.iter().map(|account| all(&account.limits)).collect(),
            addresses: (0..limits.address_count()).map(|index| all(limits.of_address(index))).collect(),
            source: all(&limits.source),
        }
    }

    /// Those that a call in this slot has to pass.
    fn of_slot(&self, slot: &Slot) -> impl Iterator<Item = &T> {
        let (account, address) = (self.accounts.get(slot.account), self.addresses.get(slot.address));
        self.source.iter().chain(address.into_iter().flatten()).chain(account.into_iter().flatten())
    }

    fn of_slot_mut(&mut self, slot: &Slot) -> impl Iterator<Item = &mut T> {
        let (account, address) = (self.accounts.get_mut(slot.account), self.addresses.get_mut(slot.address));
        self.source.iter_mut().chain(address.into_iter().flatten()).chain(account.into_iter().flatten())
    }
}

type Bucket = RateLimiter<NotKeyed, InMemoryState, TokioClock, NoOpMiddleware<std::time::Instant>>;

/// Tokio's clock, which tests can pause.
#[derive(Clone, Debug)]
struct TokioClock;

impl governor::clock::Clock for TokioClock {
    type Instant = std::time::Instant;

    fn now(&self) -> Self::Instant {
        Instant::now().into_std()
    }
}

impl Guard {
    /// A guard with the vendor's limits per account, by index, and for the outgoing address.
    #[must_use]
    pub fn new(accounts: &[Option<Limit>], address: Option<&Limit>, clock: &Clock) -> Self {
        let mut limits = Limits::of_accounts(accounts.iter().cloned());
        limits.address.extend(address.cloned());
        Self::of(&limits, clock)
    }

    /// A guard with everything that the vendor allows. `clock` tells where windows of known phase begin.
    #[must_use]
    pub fn of(limits: &Limits, clock: &Clock) -> Self {
        Self {
            buckets: Gates::of(limits, bucket),
            windows: Mutex::new(Gates::of(limits, Window::of)),
            clock: clock.clone(),
            held: AtomicU64::new(0),
        }
    }

    /// Lets the call of a slot through as soon as the vendor's limits allow it. `None`: they do not before the slot is
    /// missed, and the call must not leave.
    ///
    /// # Cancellation
    /// Safe: a call that was let through and does not leave only costs speed, until it is given back.
    pub async fn pass(&self, slot: &Slot) -> Option<Pass> {
        /// A slot is missed after `latest`, not then.
        const AFTER: Duration = Duration::from_millis(1);
        let arrived = Instant::now();
        let mut has_waited = false;
        let pass = loop {
            let now = Instant::now();
            if slot.is_late(now) {
                break None;
            }
            match self.ask(slot, now) {
                Ok(pass) => break Some(pass),
                Err(wait) => {
                    has_waited = true;
                    let until = now.checked_add(wait).unwrap_or(slot.latest);
                    tokio::time::sleep_until(until.min(slot.latest + AFTER)).await;
                }
            }
        };
        if has_waited {
            self.count(slot.account, arrived.elapsed());
        }
        pass
    }

    /// A call that was let through in this slot did not leave: windows have it back. A bucket has not, which only costs
    /// speed.
    pub fn give_back(&self, slot: &Slot, pass: Pass) {
        self.windows().of_slot_mut(slot).for_each(|window| window.give_back(pass));
    }

    /// How many calls had to wait so far.
    #[must_use]
    pub fn held_total(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    fn windows(&self) -> MutexGuard<'_, Gates<Window>> {
        // Every step leaves each window whole.
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks all limits at one instant: a token taken before a wait would say nothing about the time after it. So a bucket
    /// may be charged again for a call that another one held; windows, which are allowances, are charged once, at last.
    fn ask(&self, slot: &Slot, now: Instant) -> Result<Pass, Duration> {
        let pass = Pass { at: now, time: micros_since_1970(self.clock.now()) };
        let mut windows = self.windows();
        if let Some(wait) = windows.of_slot_mut(slot).filter_map(|window| window.wait(pass)).max() {
            return Err(wait);
        }
        self.buckets.of_slot(slot).try_for_each(|bucket| {
            bucket.check().map_err(|refusal| refusal.wait_time_from(TokioClock.now()).max(Duration::from_nanos(1)))
        })?;
        windows.of_slot_mut(slot).for_each(|window| window.charge(pass));
        Ok(pass)
    }

    fn count(&self, account: usize, held: Duration) {
        let total = self.held.fetch_add(1, Ordering::Relaxed) + 1;
        // A wrong pace holds every call: say so at once, then ever more rarely.
        if total.is_power_of_two() {
            let held_ms = held.as_millis();
            warn!(account, held_ms, total, "the guard held a call: the pace is above the vendor's limit");
        }
    }
}

/// `None` for a window, and for a limit that [`Limit::validate`] refuses.
fn bucket(limit: &Limit) -> Option<Bucket> {
    match limit.kind {
        Counting::Bucket => {
            let quota = governor::Quota::with_period(limit.interval())?.allow_burst(limit.burst.try_into().ok()?);
            Some(RateLimiter::direct_with_clock(quota, TokioClock))
        }
        Counting::Fixed | Counting::Sliding => None,
    }
}

/// A vendor's window, and the calls in it.
#[derive(Debug)]
struct Window {
    calls: u64,
    span: Span,
    /// Calls by the number of their window, or by the first of a few moments, the oldest first.
    spent: VecDeque<(Pass, u64)>,
    used: u64,
}

/// Which calls count together.
#[derive(Debug)]
enum Span {
    /// Those between two known times.
    Known(Rule),
    /// Those of the last so long, whatever the phase.
    Any(Duration),
}

impl Window {
    /// So many moments are told apart; more calls than that are known to a part of the span, and forgotten by so much too
    /// early. It is the budgets that are exact.
    const MOMENTS: u32 = 256;

    /// `None` for a bucket.
    fn of(limit: &Limit) -> Option<Self> {
        if limit.kind == Counting::Bucket {
            return None;
        }
        // A paced one is kept to wherever it begins.
        let known = Rule::of(limit, &Pacing::default()).filter(|rule| rule.span == 1);
        let span = known.map_or(Span::Any(*limit.per), Span::Known);
        Some(Self { calls: limit.calls.into(), span, spent: VecDeque::new(), used: 0 })
    }

    /// How long a call has to wait; `None` = it need not.
    fn wait(&mut self, now: Pass) -> Option<Duration> {
        self.forget(now);
        if self.used < self.calls {
            return None;
        }
        let wait = match &self.span {
            Span::Known(rule) => {
                let ends = rule.begin(rule.index(now.time) + 1);
                Duration::from_micros(ends.saturating_sub(now.time))
            }
            Span::Any(per) => {
                self.spent.front().map_or(*per, |(first, _)| (first.at + *per).saturating_duration_since(now.at))
            }
        };
        Some(wait.max(Duration::from_nanos(1)))
    }

    /// Drops what does not count together with a call that leaves now.
    fn forget(&mut self, now: Pass) {
        let span = &self.span;
        let counts = |pass: &Pass| match span {
            // Of a clock that was set back too: a window that has not begun is not this one.
            Span::Known(rule) => rule.index(pass.time) == rule.index(now.time),
            Span::Any(per) => now.at < pass.at + *per,
        };
        while let Some((_, calls)) = self.spent.front().filter(|(pass, _)| !counts(pass)) {
            self.used -= calls;
            self.spent.pop_front();
        }
    }

    fn charge(&mut self, now: Pass) {
        self.used += 1;
        let is_one = |last: &Pass, moments: usize| match &self.span {
            Span::Known(_) => true,
            Span::Any(per) => moments >= Self::MOMENTS as usize && now.at < last.at + *per / Self::MOMENTS,
        };
        let moments = self.spent.len();
        match self.spent.back_mut() {
            Some((last, calls)) if is_one(last, moments) => *calls += 1,
            Some(_) | None => self.spent.push_back((now, 1)),
        }
    }

    fn give_back(&mut self, pass: Pass) {
        let counts = |other: &Pass| match &self.span {
            Span::Known(rule) => rule.index(other.time) == rule.index(pass.time),
            Span::Any(_) => other.at <= pass.at,
        };
        let place = self.spent.iter().rposition(|(other, calls)| *calls > 0 && counts(other));
        if let Some((_, calls)) = place.and_then(|place| self.spent.get_mut(place)) {
            *calls -= 1;
            self.used -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        quota::{Lease, Quota as _, Slot, memory::Memory, pace::Pacing, plan::AccountLimits},
        runtime::clock::{Clock, Dice, Timestamp},
    };

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn limit(calls: u32, burst: u32) -> Limit {
        Limit::new(calls, Duration::from_secs(1), burst).unwrap()
    }

    /// A slot of the account that may be used for as long as anybody waits.
    fn slot(account: usize) -> Slot {
        let at = Instant::now();
        Slot { account, address: 0, at, latest: at + Duration::from_secs(1_000_000) }
    }

    /// How long a call of the account waits.
    async fn wait(guard: &Guard, account: usize) -> Duration {
        let arrived = Instant::now();
        guard.pass(&slot(account)).await.unwrap();
        arrived.elapsed()
    }

    fn guard(accounts: &[Option<Limit>], address: Option<&Limit>) -> Guard {
        Guard::new(accounts, address, &Clock::simulated(Timestamp::from_millis(1_700_000_000_000)))
    }

    fn window(calls: u32, per: Duration, kind: Counting) -> Limit {
        Limit::window(calls, per, kind).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_passes_and_the_next_call_is_held_and_counted() {
        let guard = guard(&[Some(limit(10, 3)), Some(limit(10, 3))], None);
        for _ in 0..3 {
            assert_eq!(wait(&guard, 0).await, Duration::ZERO);
        }
        let held = wait(&guard, 0).await;
        assert!((ms(100)..=ms(102)).contains(&held), "{held:?}");
        assert_eq!(wait(&guard, 1).await, Duration::ZERO, "accounts do not share a limit");
        assert_eq!(guard.held_total(), 1);
    }

    #[tokio::test]
    async fn a_call_that_need_not_wait_is_not_counted_by_a_clock_that_runs() {
        let guard = guard(&[Some(limit(10, 3))], None);
        assert!(guard.pass(&slot(0)).await.is_some());
        assert_eq!(guard.held_total(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn all_accounts_share_the_limit_of_the_address() {
        let guard = guard(&[None, Some(limit(10, 5))], Some(&limit(10, 1)));
        assert_eq!(wait(&guard, 0).await, Duration::ZERO);
        assert!(wait(&guard, 1).await >= ms(100));
        assert!(wait(&guard, 7).await >= ms(100), "an account that it does not know");
        assert_eq!(guard.held_total(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn calls_that_come_at_once_leave_at_the_vendors_rate() {
        let guard = guard(&[Some(limit(10, 1))], None);
        let start = Instant::now();
        futures::future::join_all((0..11).map(|_| wait(&guard, 0))).await;
        assert!(start.elapsed() >= ms(1_000), "11 calls at 10/s took {:?}", start.elapsed());
        assert_eq!(guard.held_total(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_waits_no_longer_than_its_slot_lasts_and_what_it_did_not_use_is_left_for_others() {
        let hour = Duration::from_secs(3_600);
        let guard = guard(&[Some(limit(10, 1)), Some(window(2, hour, Counting::Sliding))], None);
        let late = |account| Slot { latest: Instant::now() + ms(50), ..slot(account) };
        assert!(guard.pass(&late(0)).await.is_some());
        let arrived = Instant::now();
        assert_eq!(guard.pass(&late(0)).await, None);
        assert!((ms(50)..=ms(52)).contains(&arrived.elapsed()), "{:?}", arrived.elapsed());
        let pass = guard.pass(&late(1)).await.unwrap();
        assert!(guard.pass(&late(1)).await.is_some());
        assert_eq!(guard.pass(&late(1)).await, None);
        guard.give_back(&late(1), pass);
        assert!(guard.pass(&late(1)).await.is_some(), "a call that did not leave is none");
        assert_eq!(guard.pass(&late(1)).await, None);
        assert_eq!(guard.held_total(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_one_limit_holds_takes_nothing_of_a_window_of_another() {
        let hour = Duration::from_secs(3_600);
        let account = AccountLimits { limits: vec![limit(1, 1)], ..AccountLimits::default() };
        let limits = Limits {
            accounts: vec![account; 2],
            source: vec![window(3, hour, Counting::Sliding)],
            ..Limits::default()
        };
        let guard = Guard::of(&limits, &Clock::simulated(Timestamp::from_millis(1_700_000_000_000)));
        for _ in 0..10 {
            let _ = guard.pass(&Slot { latest: Instant::now() + ms(5), ..slot(0) }).await;
        }
        assert!(guard.pass(&slot(1)).await.is_some());
        let at = Slot { latest: Instant::now() + ms(2_000), ..slot(1) };
        assert!(guard.pass(&at).await.is_some(), "one call of each account has left so far");
    }

    #[tokio::test(start_paused = true)]
    async fn a_sliding_window_counts_every_stretch_and_one_of_known_phase_from_its_beginning() {
        let (minute, start) = (Duration::from_secs(60), Timestamp::from_millis(1_700_000_040_000));
        let known = Limit { starts_at: Some(start.into()), ..window(2, minute, Counting::Fixed) };
        let limits = [Some(window(2, minute, Counting::Sliding)), Some(known)];
        let guard = Guard::new(&limits, None, &Clock::simulated(start.after(Duration::from_secs(50))));
        for account in [0, 1] {
            assert_eq!((wait(&guard, account).await, wait(&guard, account).await), (Duration::ZERO, Duration::ZERO));
        }
        let (sliding, fixed) = tokio::join!(wait(&guard, 0), wait(&guard, 1));
        assert!((minute..minute + ms(2)).contains(&sliding), "{sliding:?}");
        assert!((minute / 6..minute / 6 + ms(2)).contains(&fixed), "{fixed:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn our_pace_never_makes_it_wait_even_if_calls_leave_late() {
        let second = Duration::from_secs(1);
        let start = Timestamp::from_millis(1_700_000_000_000);
        let minute = window(400, second * 60, Counting::Fixed);
        let table = [
            vec![limit(10, 1)],
            vec![limit(10, 5)],
            vec![window(10, second, Counting::Sliding)],
            vec![limit(10, 5), window(300, second * 60, Counting::Sliding)],
            vec![window(10, second, Counting::Fixed), Limit { starts_at: Some(start.into()), ..minute.clone() }],
            vec![limit(10, 5), minute, window(2_000, second * 3_600, Counting::Sliding)],
        ];
        for (number, limits) in (0..).zip(table) {
            let clock = Clock::simulated(start);
            let account = AccountLimits { limits: limits.clone(), ..AccountLimits::default() };
            let limits = Limits { accounts: vec![account; 4], address: vec![limit(200, 20)], ..Limits::default() };
            let guard = Guard::of(&limits, &clock);
            let memory = Memory::with_limits(&limits, &Pacing { margin: 0.0, jitter: Duration::ZERO }, &clock);
            let dice = Dice::seeded(number);
            let mut left = Instant::now();
            for _ in 0..5_000 {
                let slot = match memory.lease(1).await {
                    Lease::Slots(slots) => slots[0].clone(),
                    Lease::NotBefore(at) => {
                        tokio::time::sleep_until(at).await;
                        continue;
                    }
                    Lease::Nobody => panic!("nobody is disabled"),
                };
                left = left.max(slot.at + (slot.latest - slot.at).min(ms(2)).mul_f64(dice.fraction()));
                tokio::time::sleep_until(left).await;
                let passed = guard.pass(&slot).await.is_some();
                assert!(passed || slot.is_late(left), "{slot:?} of {number}");
            }
            assert_eq!(guard.held_total(), 0, "{number}");
        }
    }

    /// A vendor's window, and who wants to call when.
    struct Trial {
        limits: Limits,
        /// The vendor's window that is looked at, and one of its beginnings.
        window: (Duration, Timestamp),
        /// How many requests come, and how long after the start.
        requests: Vec<(usize, Duration)>,
        span: Duration,
    }

    /// Calls by the number of the vendor's window, if slots are used as fetch does: the real timetable with its budgets
    /// and the real guard, in virtual time.
    async fn collect(trial: &Trial, clock: &Clock) -> BTreeMap<i64, u32> {
        let (memory, guard) =
            (Memory::with_limits(&trial.limits, &Pacing::default(), clock), Guard::of(&trial.limits, clock));
        let (guard, start) = (std::sync::Arc::new(guard), Instant::now());
        let (mut calls, mut waiting, mut left) = (tokio::task::JoinSet::new(), 0, BTreeMap::new());
        let mut requests = trial.requests.iter().peekable();
        while start.elapsed() < trial.span {
            while let Some((count, _)) = requests.next_if(|(_, after)| start.elapsed() >= *after) {
                waiting += count;
            }
            while let Some(ended) = calls.try_join_next() {
                let (slot, has_left): (Slot, Option<i64>) = ended.unwrap();
                if let Some(number) = has_left {
                    memory.ended(slot.account);
                    *left.entry(number).or_default() += 1;
                } else {
                    memory.give_back(vec![slot]).await;
                    waiting += 1;
                }
            }
            let mut wake = Instant::now() + ms(100);
            if waiting > 0 {
                match memory.lease(waiting.min(64)).await {
                    Lease::Slots(slots) => {
                        for slot in slots {
                            waiting -= 1;
                            let (guard, clock, window) = (std::sync::Arc::clone(&guard), clock.clone(), trial.window);
                            calls.spawn(async move {
                                tokio::time::sleep_until(slot.at).await;
                                let passed = guard.pass(&slot).await;
                                let since = clock.now().as_millis() - window.1.as_millis();
                                let number = since.div_euclid(i64::try_from(window.0.as_millis()).unwrap());
                                (slot, passed.map(|_| number))
                            });
                        }
                        continue;
                    }
                    Lease::NotBefore(at) => wake = at.min(wake + ms(2_000)),
                    Lease::Nobody => panic!("nobody is disabled"),
                }
            }
            tokio::time::sleep_until(wake.max(Instant::now() + ms(1))).await;
        }
        left
    }

    #[tokio::test(start_paused = true)]
    async fn a_window_that_was_spent_late_leaves_all_later_ones_whole() {
        let minute = Timestamp::from_millis(1_700_000_040_000);
        let clock = Clock::simulated(minute);
        let per = Duration::from_secs(60);
        let fixed = Limit { starts_at: Some(minute.into()), ..Limit::window(300, per, Counting::Fixed).unwrap() };
        let account = AccountLimits { limits: vec![limit(100, 5), fixed], ..AccountLimits::default() };
        let trial = Trial {
            limits: Limits { accounts: vec![account], ..Limits::default() },
            window: (per, minute),
            // The first minute may have been spent by a predecessor.
            requests: vec![(300, Duration::from_secs(110)), (5_000, Duration::from_secs(117))],
            span: Duration::from_secs(11 * 60),
        };
        let calls = collect(&trial, &clock).await;
        assert_eq!(calls[&1], 300);
        let later: Vec<u32> = calls.range(2..11).map(|(_, calls)| *calls).collect();
        assert_eq!(later.len(), 9, "{calls:?}");
        assert!(later.iter().all(|calls| (299..=300).contains(calls)), "{calls:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_days_money_spent_from_the_evening_on_is_all_there_on_the_next_day() {
        let midnight = Timestamp::from_millis(1_700_006_400_000);
        let (hour, day) = (Duration::from_secs(3_600), Duration::from_secs(86_400));
        let clock = Clock::simulated(midnight.after(hour * 18));
        let source = Limit { starts_at: Some(midnight.into()), ..window(2_500, day, Counting::Fixed) };
        let account = AccountLimits { limits: vec![limit(2, 5)], ..AccountLimits::default() };
        let trial = Trial {
            limits: Limits { accounts: vec![account], source: vec![source], ..Limits::default() },
            window: (day, midnight),
            requests: vec![(10_000, Duration::ZERO)],
            span: hour * 30,
        };
        let calls = collect(&trial, &clock).await;
        assert_eq!(calls, BTreeMap::from([(0, 2_500), (1, 2_500)]));
    }
}
