//! The arithmetic against vendors that judge by arrival, in virtual time; and what holds at each step.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    time::Duration,
};

use super::*;
use crate::{
    quota::{
        Counting, Limit, Pacing,
        limit::micros,
        plan::{AccountLimits, Limits},
    },
    runtime::clock::Dice,
    simulate::limiter::{Limiter, Quota},
};

const MILLI: Micros = 1_000;
const SECOND: Micros = 1_000_000;
const START: Micros = 1_700_000_000 * SECOND;
const HORIZON: Micros = 100 * MILLI;

fn bucket(calls: u32, burst: u32) -> Limit {
    Limit::new(calls, Duration::from_secs(1), burst).unwrap()
}

fn window(calls: u32, per_s: u64) -> Limit {
    Limit::window(calls, Duration::from_secs(per_s), Counting::Sliding).unwrap()
}

fn accounts(limits: &[Limit], count: usize) -> Vec<AccountLimits> {
    vec![AccountLimits { limits: limits.to_vec(), ..AccountLimits::default() }; count]
}

/// The vendor's own limiter for a limit.
fn vendor(limit: &Limit, phase: Duration) -> Limiter {
    let quota = match limit.kind {
        Counting::Bucket => {
            Quota::Bucket { rate: f64::from(limit.calls) / limit.per.as_secs_f64(), burst: limit.burst }
        }
        Counting::Fixed => Quota::Fixed { calls: limit.calls, window: *limit.per },
        Counting::Sliding => Quota::Sliding { calls: limit.calls, window: *limit.per },
    };
    Limiter::new(quota, phase)
}

/// What a fleet of workers does with a quota, and what the vendor says to it.
struct Fleet {
    limits: Limits,
    pacing: Pacing,
    workers: usize,
    /// By how much the way to the vendor varies.
    jitter: Duration,
    /// Each worker stands still for 200 ms, every 10 s on average.
    stalls: bool,
    /// A call takes from 200 to 500 ms, of which the way there is the first.
    is_slow: bool,
    /// How many calls a worker has to make in a second; `None` = any number.
    demand: fn(usize) -> Option<f64>,
    span: Micros,
    seed: u64,
}

#[derive(Debug, Default)]
struct Outcome {
    sent: usize,
    dropped: usize,
    refused: usize,
    leases: usize,
}

/// One worker.
#[derive(Default)]
struct Worker {
    slots: VecDeque<(usize, Micros)>,
    wakes_at: Micros,
    stalls_at: Micros,
    next_job: Micros,
    jobs: usize,
}

impl Fleet {
    fn new(limits: Limits, workers: usize) -> Self {
        let jitter = Duration::from_millis(50);
        let pacing = Pacing { jitter, ..Pacing::default() };
        Self {
            limits,
            pacing,
            workers,
            jitter,
            stalls: false,
            is_slow: false,
            demand: |_| None,
            span: 200 * SECOND,
            seed: 7,
        }
    }

    /// The share of the quota that no refusal allows at most, by `engine.md` 5.
    fn ceiling(&self, limit: &Limit) -> f64 {
        let (jitter, per) = (self.jitter.as_secs_f64(), limit.per.as_secs_f64());
        match limit.kind {
            Counting::Bucket => (f64::from(limit.burst) / (1.0 + f64::from(limit.calls) / per * jitter)).min(1.0),
            Counting::Fixed | Counting::Sliding => per / (per + jitter),
        }
    }

    /// The calls of each account by the time that they leave, and what became of the other slots.
    fn run(&self) -> (Vec<(usize, Micros)>, Outcome) {
        let plan = Plan::new(&self.limits, &self.pacing);
        let (mut table, dice) = (Timetable::new(&plan, START), Dice::seeded(self.seed));
        let (mut sent, mut outcome) = (Vec::new(), Outcome::default());
        let mut workers: Vec<Worker> = (0..self.workers).map(|_| Worker::default()).collect();
        let mut ends: BinaryHeap<Reverse<(Micros, usize)>> = BinaryHeap::new();
        let mut now = START;
        for worker in &mut workers {
            worker.wakes_at = START + fraction(&dice, 10 * MILLI);
            worker.stalls_at = START + fraction(&dice, 20 * SECOND);
            worker.next_job = START;
        }
        while now < START + self.span {
            let (index, worker) = workers.iter_mut().enumerate().min_by_key(|(_, worker)| worker.wakes_at).unwrap();
            now = worker.wakes_at;
            if self.stalls && now >= worker.stalls_at {
                worker.wakes_at = now + 200 * MILLI;
                worker.stalls_at = worker.wakes_at + fraction(&dice, 20 * SECOND);
                continue;
            }
            while let Some(Reverse((_, account))) = ends.peek().copied().filter(|end| end.0.0 <= now) {
                ends.pop();
                table.ended(account);
            }
            worker.work((self.demand)(index), now, &dice);
            while let Some(&(account, at)) = worker.slots.front().filter(|(_, at)| *at <= now) {
                worker.slots.pop_front();
                if now > at + micros(plan.accounts[account].lateness) || worker.jobs == 0 {
                    outcome.dropped += 1;
                    table.ended(account);
                    continue;
                }
                worker.jobs -= 1;
                let latency = if self.is_slow { 200 * MILLI + fraction(&dice, 300 * MILLI) } else { 0 };
                ends.push(Reverse((now + latency, account)));
                // Anything that the slot allows, whatever the virtual clock shows.
                sent.push((
                    account,
                    now.max(at + fraction(&dice, 5 * MILLI).min(micros(plan.accounts[account].lateness))),
                ));
            }
            // A prefetch: what the backlog asks for, while the last few slots are still to come.
            let wanted = worker.jobs.min(10).saturating_sub(worker.slots.len());
            let mut asks_at = Micros::MAX;
            if wanted > 0 && worker.slots.len() < 5 {
                outcome.leases += 1;
                match table.lease(wanted, now, now + HORIZON) {
                    Granted::Slots(slots) => worker.slots.extend(slots),
                    Granted::NotBefore(at) => asks_at = at.saturating_sub(HORIZON).max(now + 5 * MILLI),
                    Granted::Nobody => panic!("nobody is disabled"),
                }
            }
            let next_slot = worker.slots.front().map_or(Micros::MAX, |(_, at)| *at);
            let next_job = if worker.jobs == 0 { worker.next_job } else { Micros::MAX };
            worker.wakes_at = next_slot.min(asks_at).min(next_job).max(now + 100);
        }
        (sent, outcome)
    }

    /// Lets every limit of the vendor's judge, each with calls delayed anew.
    fn judged(&self) -> Outcome {
        let (sent, mut outcome) = self.run();
        outcome.sent = sent.len();
        let of = |account: usize| sent.iter().filter(move |call| call.0 == account);
        for (index, account) in self.limits.accounts.iter().enumerate() {
            outcome.refused += self.refused(&account.limits, of(index).copied());
        }
        outcome.refused += self.refused(&self.limits.source, sent.iter().copied());
        for address in self.limits.accounts.iter().map(|account| account.address).collect::<BTreeSet<_>>() {
            let from_here = |call: &(usize, Micros)| self.limits.accounts[call.0].address == address;
            outcome.refused += self.refused(&self.limits.address, sent.iter().copied().filter(from_here));
        }
        outcome
    }

    fn refused(&self, limits: &[Limit], calls: impl Iterator<Item = (usize, Micros)>) -> usize {
        if limits.is_empty() {
            return 0;
        }
        let dice = Dice::seeded(self.seed + 1);
        let delayed =
            |(_, at): (usize, Micros)| Duration::from_micros(at - START) + self.jitter.mul_f64(dice.fraction());
        let mut arrivals: Vec<Duration> = calls.map(delayed).collect();
        arrivals.sort_unstable();
        let refused = |limit: &Limit| {
            let mut vendor = vendor(limit, limit.per.mul_f64(dice.fraction()));
            arrivals.iter().filter(|arrival| !vendor.admit(**arrival)).count()
        };
        limits.iter().map(refused).sum()
    }
}

impl Worker {
    /// Lets the backlog grow.
    fn work(&mut self, demand: Option<f64>, now: Micros, dice: &Dice) {
        let Some(per_second) = demand else {
            self.jobs = usize::MAX;
            return;
        };
        while self.next_job <= now {
            self.jobs += 1;
            let gap = -(1.0 - dice.fraction()).ln() / per_second;
            self.next_job += micros(Duration::from_secs_f64(gap)) + 1;
        }
    }
}

#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small")]
fn fraction(dice: &Dice, of: Micros) -> Micros {
    (of as f64 * dice.fraction()) as Micros
}

/// The five vendors of the design's simulation, at 100/s.
fn five() -> [Limit; 5] {
    let fixed = Limit { kind: Counting::Fixed, ..window(100, 1) };
    [bucket(100, 1), bucket(100, 5), bucket(100, 100), fixed, window(100, 1)]
}

/// The share of the ceiling that a fleet reaches, which never is refused a call.
fn share(fleet: &Fleet, limit: &Limit) -> f64 {
    let outcome = fleet.judged();
    let name = format!("{} workers, {limit:?}: {outcome:?}", fleet.workers);
    assert_eq!(outcome.refused, 0, "{name}");
    let possible = f64::from(limit.calls) / limit.per.as_secs_f64()
        * Duration::from_micros(fleet.span).as_secs_f64()
        * fleet.ceiling(limit);
    #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
    let share = outcome.sent as f64 / possible;
    println!("{share:.4} of the ceiling {:.3}, {name}", fleet.ceiling(limit));
    share
}

/// The calls of all models together.
fn models(stalls: bool, span: Micros, least: f64) -> f64 {
    let mut calls = 0.0;
    for limit in five() {
        for workers in [1, 4, 16] {
            let limits = Limits { accounts: accounts(std::slice::from_ref(&limit), 1), ..Limits::default() };
            let fleet = Fleet { stalls, span, seed: workers as u64, ..Fleet::new(limits, workers) };
            let share = share(&fleet, &limit);
            assert!(share >= least, "{workers} workers, stalls: {stalls}, {limit:?}");
            let seconds = Duration::from_micros(span).as_secs_f64();
            calls += share * fleet.ceiling(&limit) * f64::from(limit.calls) * seconds;
        }
    }
    calls
}

#[test]
fn a_fleet_uses_96_percent_of_what_no_refusal_allows_and_is_not_refused_one_of_a_million_calls() {
    let calls = models(false, 900 * SECOND, 0.96);
    assert!(calls >= 1e6, "{calls}");
}

#[test]
fn with_stalls_of_200_ms_every_10_s_it_is_94_percent() {
    models(true, 400 * SECOND, 0.94);
}

#[test]
fn with_all_the_backlog_on_one_of_16_workers_the_quota_is_used() {
    for limit in five() {
        let limits = Limits { accounts: accounts(std::slice::from_ref(&limit), 1), ..Limits::default() };
        let demand = |index| (index > 0).then_some(1.0);
        let fleet = Fleet { demand, ..Fleet::new(limits, 16) };
        // As much as with a backlog everywhere. The quiet ones alone ask for 15/s, hardly less than what a burst of 1
        // leaves.
        assert!(share(&fleet, &limit) >= 0.96, "{limit:?}");
    }
}

#[test]
fn with_the_jitter_of_a_region_nearly_all_of_the_quota_is_used_by_1_4_and_16_workers_though_calls_are_slow() {
    let limit = bucket(100, 5);
    let mut accounts = accounts(std::slice::from_ref(&limit), 1);
    // 50 calls are under way at most, if all take half a second.
    accounts[0].in_flight = Some(64);
    let limits = Limits { accounts, ..Limits::default() };
    let jitter = Duration::from_millis(10);
    let default = |workers| Fleet {
        jitter,
        pacing: Pacing::default(),
        is_slow: true,
        span: 600 * SECOND,
        ..Fleet::new(limits.clone(), workers)
    };
    for (workers, least) in [(1, 0.995), (4, 0.99), (16, 0.98)] {
        assert!(share(&default(workers), &limit) >= least, "{workers} workers");
    }
    let skewed = Fleet { demand: |index| (index > 0).then_some(1.0), ..default(16) };
    assert!(share(&skewed, &limit) >= 0.98, "all the backlog on one of 16 workers");
}

#[test]
fn a_pace_for_less_jitter_than_there_is_is_refused_so_these_tests_can_fail() {
    for limit in five() {
        if limit.burst == 100 {
            continue;
        }
        let limits = Limits { accounts: accounts(std::slice::from_ref(&limit), 1), ..Limits::default() };
        let mut fleet = Fleet::new(limits, 4);
        fleet.pacing = Pacing { jitter: Duration::from_millis(20), ..fleet.pacing };
        assert!(fleet.judged().refused > 0, "{limit:?}");
    }
}

#[test]
fn a_hundred_accounts_under_a_shared_limit_reach_it_since_a_lease_is_per_source() {
    for shared in [bucket(1_000, 100), window(1_000, 1)] {
        for workers in [1, 4, 16] {
            let limits =
                Limits { accounts: accounts(&[bucket(10, 5)], 100), source: vec![shared.clone()], ..Limits::default() };
            let fleet = Fleet { span: 30 * SECOND, ..Fleet::new(limits, workers) };
            assert!(share(&fleet, &shared) >= 0.96, "{workers} workers: {shared:?}");
        }
    }
}

#[test]
fn a_thousand_calls_a_second_over_a_hundred_accounts() {
    let limits = Limits { accounts: accounts(&[bucket(10, 5)], 100), ..Limits::default() };
    let outcome = Fleet { span: 60 * SECOND, ..Fleet::new(limits, 4) }.judged();
    assert_eq!(outcome.refused, 0, "{outcome:?}");
    assert!(outcome.sent >= 59_400, "99 % of 60,000: {outcome:?}");
    assert!(outcome.leases * 4 <= outcome.sent, "{outcome:?}");
}

#[test]
fn limits_per_second_minute_and_day_hold_together() {
    let day = window(3_000, 86_400);
    let limits = [bucket(10, 5), window(8, 1), window(300, 60), day];
    let limits = Limits { accounts: accounts(&limits, 3), ..Limits::default() };
    let outcome = Fleet { span: 1_200 * SECOND, ..Fleet::new(limits, 4) }.judged();
    assert_eq!(outcome.refused, 0, "{outcome:?}");
    // The first minute is learned; then 300 a minute until the day's 3,000 are spent.
    assert_eq!(outcome.sent, 9_000, "{outcome:?}");
}

#[test]
fn each_address_has_a_limit_of_its_own() {
    let mut accounts = accounts(&[bucket(100, 5)], 8);
    accounts.iter_mut().enumerate().for_each(|(index, account)| account.address = index % 2 * 7);
    let address = vec![bucket(100, 20)];
    let limits = Limits { accounts, address, ..Limits::default() };
    let outcome = Fleet { span: 60 * SECOND, ..Fleet::new(limits, 4) }.judged();
    assert_eq!(outcome.refused, 0, "{outcome:?}");
    assert!(outcome.sent >= 12_000 * 98 / 100, "two addresses, 100/s each: {outcome:?}");
}

#[test]
fn of_an_account_with_a_cap_no_more_calls_are_under_way() {
    let mut accounts = accounts(&[bucket(100, 10)], 2);
    accounts[0].in_flight = Some(3);
    let plan = Plan::new(&Limits { accounts, ..Limits::default() }, &Pacing::default());
    let mut table = Timetable::new(&plan, START);
    let now = START + 10 * SECOND;
    let lease = |table: &mut Timetable, now| match table.lease(100, now, now + SECOND) {
        Granted::Slots(slots) => slots,
        other @ (Granted::NotBefore(_) | Granted::Nobody) => panic!("{other:?}"),
    };
    let slots = lease(&mut table, now);
    let capped: Vec<_> = slots.iter().filter(|slot| slot.0 == 0).copied().collect();
    assert_eq!((capped.len(), slots.len()), (3, 100));
    // One call ends, one slot comes back unused: two more.
    table.ended(0);
    table.give_back([capped[2]]);
    let again = lease(&mut table, capped[2].1 + 1);
    assert_eq!(again.iter().filter(|slot| slot.0 == 0).count(), 2, "{again:?}");
}

#[test]
fn an_unused_slot_of_a_budget_is_spent_by_somebody_else() {
    let limits = Limits { accounts: accounts(&[window(5, 86_400)], 1), ..Limits::default() };
    let mut table = Timetable::new(&Plan::new(&limits, &Pacing::default()), START);
    let now = START + SECOND;
    let Granted::Slots(slots) = table.lease(9, now, now + HORIZON) else { panic!("the day is young") };
    assert_eq!(slots.len(), 5);
    assert!(matches!(table.lease(9, now, now + HORIZON), Granted::NotBefore(at) if at > now + 86_000 * SECOND));
    // Given back too late to be used as it is: the budget is whole again all the same.
    table.give_back(slots[3..].iter().copied());
    let later = now + 5 * SECOND;
    let Granted::Slots(slots) = table.lease(9, later, later + HORIZON) else { panic!("two are left") };
    assert_eq!(slots.len(), 2);
}

/// Two accounts, each at an address of its own with 10/s.
fn at_two_addresses(fallbacks: bool) -> Timetable {
    let account = |address: usize| AccountLimits {
        limits: vec![bucket(100, 5)],
        address,
        fallbacks: if fallbacks { vec![1 - address] } else { vec![] },
        is_guess: false,
        in_flight: None,
    };
    let limits = Limits { accounts: vec![account(0), account(1)], address: vec![window(10, 1)], ..Limits::default() };
    Timetable::new(&Plan::new(&limits, &Pacing::default()), START)
}

fn leased(table: &mut Timetable, from: Micros, span: Micros) -> Vec<(usize, Micros)> {
    match table.lease(1_000, from, from + span) {
        Granted::Slots(slots) => slots,
        other @ (Granted::NotBefore(_) | Granted::Nobody) => panic!("{other:?}"),
    }
}

#[test]
fn nobody_calls_from_an_address_that_is_held_and_the_other_one_goes_on() {
    let mut table = at_two_addresses(false);
    let (now, until) = (START + 2 * SECOND, START + 5 * SECOND);
    let before = leased(&mut table, now, SECOND);
    assert!(before.iter().any(|slot| slot.0 == 0) && before.iter().any(|slot| slot.0 == 1));
    table.hold_address(0, until, now);
    assert!(table.is_held(0, until - 1) && !table.is_held(0, until) && !table.is_held(1, now));
    let after = leased(&mut table, now + SECOND, 3 * SECOND);
    assert!(after.iter().all(|(account, at)| *account == 1 || *at >= until), "{after:?}");
    assert!(after.iter().filter(|slot| slot.0 == 0).count() > 5);
}

#[test]
fn who_goes_elsewhere_shares_the_limit_there_and_comes_home() {
    let mut table = at_two_addresses(true);
    let (now, until) = (START + 2 * SECOND, START + 6 * SECOND);
    let stale = leased(&mut table, now, 100 * MILLI).into_iter().find(|slot| slot.0 == 0).unwrap();
    table.hold_address(0, until, now);
    assert_eq!((table.address_of(0), table.address_of(1)), (1, 1));
    assert!(table.is_held_at(0, stale.1, 0), "a slot from before the hold is for the address that is held");
    table.give_up(0, stale.1, 0);
    let away = leased(&mut table, now + SECOND, SECOND);
    let of = |account: usize| away.iter().filter(|slot| slot.0 == account).count();
    assert!(of(0) >= 4 && of(1) >= 4 && away.len() <= 10, "both within 10/s: {away:?}");
    // Wherever its own time stands: it is home as soon as somebody asks after the end of the hold.
    let home = leased(&mut table, until, SECOND);
    assert_eq!((table.address_of(0), table.address_of(1)), (0, 1));
    assert!(home.len() > 15, "each has 10/s again: {home:?}");
    table.hold_address(0, Micros::MAX, until);
    table.hold_address(1, until + SECOND, until);
    assert_eq!((table.address_of(0), table.address_of(1)), (0, 1), "with nowhere to go everybody stays");
}
