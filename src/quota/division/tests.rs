//! Streams that know nothing of each other against vendors that judge by arrival, bare and as a fleet of which some have
//! lost Redis, in virtual time.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;
use crate::{
    quota::{
        limit::Micros,
        plan::AccountLimits,
        timetable::{Granted, Timetable},
    },
    runtime::clock::{Dice, Timestamp},
    simulate::limiter::{self, Limiter},
};

const SECOND: Micros = 1_000_000;
const START: Micros = 1_700_000_000 * SECOND;

fn bucket(calls: u32, burst: u32) -> Limit {
    Limit::new(calls, Duration::from_secs(1), burst).unwrap()
}

fn window(calls: u32, secs: u64, kind: Counting) -> Limit {
    Limit::window(calls, Duration::from_secs(secs), kind).unwrap()
}

fn division(reserve: f64, workers: u32) -> Division {
    Division { reserve, workers }
}

fn vendor(limit: &Limit, phase: Duration) -> Limiter {
    let quota = match limit.kind {
        Counting::Bucket => {
            limiter::Quota::Bucket { rate: f64::from(limit.calls) / limit.per.as_secs_f64(), burst: limit.burst }
        }
        Counting::Fixed => limiter::Quota::Fixed { calls: limit.calls, window: *limit.per },
        Counting::Sliding => limiter::Quota::Sliding { calls: limit.calls, window: *limit.per },
    };
    Limiter::new(quota, phase)
}

fn refused(limit: &Limit, phase: Duration, mut arrivals: Vec<Duration>) -> usize {
    arrivals.sort_unstable();
    let mut vendor = vendor(limit, phase);
    arrivals.into_iter().filter(|at| !vendor.admit(*at)).count()
}

/// The worst that streams can do together: of each the calls of up to `delay` before `at` are held up and arrive with the
/// one that is due `at`; nothing else is delayed.
fn bunched(spacings: &[Duration], at: Duration, delay: Duration, spans: u32) -> Vec<Duration> {
    let mut arrivals = Vec::new();
    for spacing in spacings {
        let before = delay.as_nanos() / spacing.as_nanos();
        arrivals.extend((0..=before).map(|_| at));
        let first = at.saturating_sub(delay);
        arrivals.extend((1..spans).map(|n| first + *spacing * (u32::try_from(before).unwrap() + n)));
        arrivals.extend((1..spans).map_while(|n| first.checked_sub(*spacing * n)));
    }
    arrivals
}

/// The spacings of Redis' stream and of each worker's, and how much their calls are delayed.
fn streams(limit: &Limit, division: Division, pacing: &Pacing) -> (Vec<Duration>, Duration) {
    let limits = Limits::of_accounts([Some(limit.clone())]);
    let Divided { granted, alone } = division.divide(&limits, pacing).unwrap();
    let spacing = |plan: &Plan| Duration::from_micros(plan.accounts[0].rules.spacing);
    let mut spacings = vec![spacing(&granted)];
    spacings.extend((0..division.workers).map(|_| spacing(&alone)));
    (spacings, pacing.jitter + granted.accounts[0].lateness.max(alone.accounts[0].lateness))
}

fn any_limit() -> impl Strategy<Value = (Limit, Division)> {
    let of_workers = |workers: u32| {
        let bucket = (1u32..200, workers + 1..workers + 12).prop_map(|(calls, burst)| bucket(calls, burst));
        let window = (workers + 1..300, 1u64..10, prop::bool::ANY).prop_map(|(calls, secs, is_fixed)| {
            window(calls, secs, if is_fixed { Counting::Fixed } else { Counting::Sliding })
        });
        (prop_oneof![bucket, window], 0.02f64..=0.5, Just(workers))
    };
    (1u32..9).prop_flat_map(of_workers).prop_map(|(limit, reserve, workers)| (limit, division(reserve, workers)))
}

proptest! {
    #[test]
    fn streams_that_know_nothing_of_each_other_are_never_refused(
        (limit, division) in any_limit(), jitter_ms in 0u64..100, seed: u64, phase_ms in 0u64..10_000,
    ) {
        let pacing = Pacing { margin: 0.0, jitter: Duration::from_millis(jitter_ms) };
        let (spacings, delay) = streams(&limit, division, &pacing);
        let (dice, phase) = (Dice::seeded(seed), Duration::from_millis(phase_ms));
        let span = (*limit.per * 4).max(spacings[0] * 200).min(spacings[0] * 2_000);
        // At random, then at the extremes, then all at once.
        for extreme in [false, true] {
            let mut arrivals = Vec::new();
            for spacing in &spacings {
                let mut due = spacing.mul_f64(dice.fraction());
                while due < span {
                    let share = dice.fraction();
                    let share = if extreme { share.round() } else { share };
                    arrivals.push(due + delay.mul_f64(share));
                    due += *spacing;
                }
            }
            prop_assert_eq!(refused(&limit, phase, arrivals), 0, "{:?}", spacings);
        }
        let at = span * 2;
        prop_assert_eq!(refused(&limit, phase, bunched(&spacings, at, delay, 200)), 0, "{:?} {:?}", spacings, delay);
    }

    #[test]
    fn what_is_granted_and_what_is_kept_back_is_never_more_than_there_is(
        calls in 1u32..100_000, reserve in 0.01f64..=0.5, workers in 1u32..20,
    ) {
        let limits = Limits::of_accounts([Some(window(calls, 86_400, Counting::Sliding))]);
        let all = |plan: &Plan| plan.accounts[0].rules.budgets[0].calls;
        match division(reserve, workers).divide(&limits, &Pacing::default()) {
            Ok(Divided { granted, alone }) => {
                prop_assert_eq!(all(&granted) + u64::from(workers) * all(&alone), u64::from(calls));
                prop_assert!(all(&alone) > 0 && alone.accounts[0].rules.budgets[0].learns);
            }
            Err(error) => {
                let is_little = f64::from(calls) * reserve < f64::from(workers);
                prop_assert!(is_little && matches!(error, Indivisible::Budget { .. }), "{error}");
            }
        }
    }
}

#[test]
fn a_spacing_that_is_a_little_shorter_is_caught_by_the_vendor() {
    // A test of the tests, at the limit of what can be divided: the burst is used up by the streams' first calls.
    let (limit, pacing) = (bucket(10, 5), Pacing { margin: 0.0, jitter: Duration::from_millis(40) });
    let (spacings, delay) = streams(&limit, division(0.2, 4), &pacing);
    let worst = |by: f64| {
        let spacings: Vec<_> = spacings.iter().map(|spacing| spacing.mul_f64(by)).collect();
        refused(&limit, Duration::ZERO, bunched(&spacings, Duration::from_secs(100), delay, 400))
    };
    assert_eq!(worst(1.0), 0);
    assert!(worst(0.75) > 0);
}

#[test]
fn what_it_costs_is_the_reserve_and_little_more_where_the_burst_is_ample() {
    let rate = |limit: &Limit, reserve: f64, workers: u32| {
        let (spacings, _) = streams(limit, division(reserve, workers), &Pacing::default());
        1.0 / spacings[0].as_secs_f64()
    };
    let table = [
        (bucket(100, 8), 0.1, 4, 89.8),
        (bucket(10, 5), 0.1, 2, 8.98),
        // Five streams, five tokens: nothing is left for the jitter.
        (bucket(10, 5), 0.1, 4, 7.9),
        (window(100, 1, Counting::Sliding), 0.1, 4, 84.9),
    ];
    for (limit, reserve, workers, expected) in table {
        let found = rate(&limit, reserve, workers);
        assert!((expected..expected * 1.03).contains(&found), "{limit:?}: {found}/s, not {expected}");
    }
}

#[test]
fn what_cannot_be_divided_is_refused_with_what_to_do() {
    let of = |limit: Limit| Limits::of_accounts([Some(limit)]);
    let mut capped = of(bucket(10, 9));
    capped.accounts[0].in_flight = Some(3);
    let guessed = Limits::of_accounts([None]).or_unknown(&bucket(1, 1));
    let shared = Limits { source: vec![bucket(100, 1)], ..of(bucket(10, 9)) };
    let table = [
        (of(bucket(10, 4)), "a limit of 10/1s burst 4: 4 workers"),
        (shared, "a limit of 100/1s: 4 workers"),
        (of(window(4, 1, Counting::Fixed)), "must allow more than 4"),
        (of(window(30, 86_400, Counting::Fixed)), "0.1 of 30/1day is less than one call"),
        (capped, "in_flight = 3"),
        (guessed, "some account has none"),
    ];
    for (limits, expected) in table {
        let message = division(0.1, 4).divide(&limits, &Pacing::default()).unwrap_err().to_string();
        assert!(message.contains(expected) && message.contains("\"stop\""), "{message:?} should say {expected:?}");
    }
    assert!(division(0.1, 4).divide(&of(bucket(10, 5)), &Pacing::default()).is_ok());
}

/// A worker of a fleet: what it has leased from Redis, and its own part.
struct Worker {
    leased: VecDeque<(usize, Micros)>,
    alone: Timetable,
    /// When it loses or finds Redis next.
    turns_at: Micros,
    has_redis: bool,
    /// Not worth asking before.
    ask_at: Micros,
}

/// What became of it all.
#[derive(Default)]
struct Outcome {
    /// Account and arrival.
    arrivals: Vec<(usize, Micros)>,
    /// Calls of those without Redis.
    alone: usize,
}

/// Workers that lose Redis for seconds at a time, some of them or all; their calls leave as late as they may.
fn partitioned(limits: &Limits, division: Division, pacing: &Pacing, secs: u64) -> Outcome {
    let Divided { granted, alone } = division.divide(limits, pacing).unwrap();
    let (dice, mut outcome) = (Dice::seeded(11), Outcome::default());
    let micros =
        |most: f64| -> Micros { Duration::from_secs_f64(most * dice.fraction()).as_micros().try_into().unwrap() };
    let mut redis = Timetable::new(&granted, START);
    let worker = |_| Worker {
        leased: VecDeque::new(),
        alone: Timetable::new(&alone, START),
        turns_at: START + micros(20.0),
        has_redis: true,
        ask_at: START,
    };
    let mut workers: Vec<Worker> = (0..division.workers).map(worker).collect();
    let latest = |account: usize| (granted.accounts[account].lateness + pacing.jitter).as_secs_f64();
    for now in (START..START + secs * SECOND).step_by(1_000) {
        for worker in &mut workers {
            if now >= worker.turns_at {
                worker.has_redis = !worker.has_redis;
                (worker.turns_at, worker.ask_at) = (now + SECOND / 2 + micros(15.0), now);
            }
            if worker.leased.is_empty() && now >= worker.ask_at {
                let (table, ahead) =
                    if worker.has_redis { (&mut redis, 4 * SECOND) } else { (&mut worker.alone, SECOND / 10) };
                match table.lease(12, now, now + ahead) {
                    Granted::Slots(slots) => {
                        outcome.alone += if worker.has_redis { 0 } else { slots.len() };
                        worker.leased.extend(slots);
                    }
                    Granted::NotBefore(at) => worker.ask_at = at.min(worker.turns_at),
                    Granted::Nobody => panic!("no account is disabled"),
                }
            }
            while worker.leased.front().is_some_and(|slot| slot.1 <= now) {
                let Some((account, at)) = worker.leased.pop_front() else { break };
                outcome.arrivals.push((account, at + micros(latest(account))));
            }
        }
    }
    outcome
}

fn judge(limits: &Limits, outcome: &Outcome) -> usize {
    let judge = |limit: &Limit, account: Option<usize>| {
        let of_account = outcome.arrivals.iter().filter(|call| account.is_none_or(|account| call.0 == account));
        let arrivals = of_account.map(|call| Duration::from_micros(call.1 - START)).collect();
        refused(limit, Duration::from_millis(337), arrivals)
    };
    let accounts = limits.accounts.iter().enumerate();
    let accounts = accounts.flat_map(|(index, account)| account.limits.iter().map(move |limit| (limit, Some(index))));
    let shared = limits.source.iter().map(|limit| (limit, None));
    accounts.chain(shared).map(|(limit, account)| judge(limit, account)).sum()
}

#[test]
fn a_fleet_of_which_some_have_redis_and_some_have_not_is_never_refused_by_any_kind_of_limiter() {
    let starts_at = Timestamp::from_millis(1_700_000_000_000);
    let minute = Limit { starts_at: Some(starts_at.into()), ..window(900, 60, Counting::Fixed) };
    let table = [
        ("burst 5", bucket(100, 5), 4),
        ("burst 5, two workers", bucket(100, 5), 2),
        ("burst 100", bucket(100, 100), 4),
        ("fixed window", window(100, 1, Counting::Fixed), 4),
        ("sliding window", window(100, 1, Counting::Sliding), 4),
        ("sixteen workers", bucket(100, 20), 16),
        ("a minute", minute, 4),
        ("a sliding minute", window(900, 60, Counting::Sliding), 4),
    ];
    for (name, limit, workers) in table {
        let mut limits = Limits::of_accounts([Some(limit)]);
        if limits.accounts[0].limits[0].per.as_secs() > Limit::PACED_MAX.as_secs() {
            limits.accounts[0].limits.push(bucket(100, 8));
        }
        for jitter_ms in [10, 50] {
            let pacing = Pacing { jitter: Duration::from_millis(jitter_ms), ..Pacing::default() };
            let outcome = partitioned(&limits, division(0.2, workers), &pacing, 300);
            assert_eq!(judge(&limits, &outcome), 0, "{name}, {jitter_ms} ms");
            let is_used = outcome.alone > 200 && outcome.arrivals.len() > outcome.alone * 3;
            assert!(is_used, "{name}: {} of {} alone", outcome.alone, outcome.arrivals.len());
        }
    }
}

#[test]
fn limits_that_accounts_share_hold_too_while_some_have_lost_redis() {
    let account = AccountLimits { limits: vec![bucket(20, 8)], ..AccountLimits::default() };
    let limits = Limits { accounts: vec![account; 10], source: vec![bucket(100, 8)], ..Limits::default() };
    let outcome = partitioned(&limits, division(0.2, 4), &Pacing::default(), 300);
    assert_eq!(judge(&limits, &outcome), 0);
    assert!(outcome.alone > 1_000, "{}", outcome.alone);
}

#[test]
fn a_fleet_that_adds_a_static_share_to_what_redis_grants_is_caught() {
    // A test of the tests: nothing is kept back, as when the share was first described.
    let limits = Limits::of_accounts([Some(bucket(100, 8))]);
    let whole = Plan::new(&limits, &Pacing::default());
    let quarter = Limits::of_accounts([Some(bucket(25, 8))]);
    let quarter = Plan::new(&quarter, &Pacing::default());
    let (mut redis, mut alone) = (Timetable::new(&whole, START), Timetable::new(&quarter, START));
    let mut arrivals = Vec::new();
    for now in (START..START + 60 * SECOND).step_by(1_000) {
        for table in [&mut redis, &mut alone] {
            if let Granted::Slots(slots) = table.lease(1, now, now) {
                arrivals.extend(slots.iter().map(|slot| Duration::from_micros(slot.1 - START)));
            }
        }
    }
    assert!(refused(&bucket(100, 8), Duration::ZERO, arrivals) > 100);
}
