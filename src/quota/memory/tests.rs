//! The quota of one process against vendors that judge by arrival, in virtual time.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;
use crate::{quota::model::Bucket, runtime::clock::Dice};

const SECOND: Duration = Duration::from_secs(1);

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn limit(calls: u32, burst: u32) -> Limit {
    Limit::new(calls, SECOND, burst).unwrap()
}

fn memory(limits: &[Option<Limit>]) -> Memory {
    Memory::new(limits.to_vec(), Pacing::default())
}

/// One account per limit, past its first wait, all idle.
async fn rested(limits: &[Option<Limit>]) -> Memory {
    let memory = memory(limits);
    tokio::time::sleep(10 * SECOND).await;
    memory
}

async fn slots(memory: &Memory, wanted: usize) -> Vec<Slot> {
    match memory.lease(wanted).await {
        Lease::Slots(slots) => slots,
        other @ (Lease::NotBefore(_) | Lease::Nobody) => panic!("expected slots, got {other:?}"),
    }
}

/// Leases everything within the horizon.
async fn drain(memory: &Memory) -> Vec<Slot> {
    let mut all = Vec::new();
    while let Lease::Slots(slots) = memory.lease(64).await {
        all.extend(slots);
    }
    all
}

/// A fetch process with an endless backlog, and the vendor at the far end of a jittery line.
struct Trial<'a> {
    memory: &'a Memory,
    vendor: Vec<Limit>,
    jitter: Duration,
    /// The process stands still for so long, so often.
    stall: Option<(Duration, Duration)>,
}

#[derive(Debug, Default)]
struct Outcome {
    sent: usize,
    dropped: usize,
    refused: usize,
}

impl Trial<'_> {
    async fn run(self, span: Duration) -> Outcome {
        let (dice, start) = (Dice::seeded(7), Instant::now());
        let (mut queue, mut ask_at, mut stall_at) = (VecDeque::new(), start, start + SECOND);
        let mut arrivals = vec![Vec::new(); self.vendor.len()];
        let mut outcome = Outcome::default();
        while start.elapsed() < span {
            if queue.len() < 32 && Instant::now() >= ask_at {
                match self.memory.lease(64 - queue.len()).await {
                    Lease::Slots(slots) => queue.extend(slots),
                    Lease::NotBefore(at) => ask_at = at,
                    Lease::Nobody => break,
                }
                continue;
            }
            let wake = queue.front().map_or(ask_at, |slot: &Slot| slot.at);
            tokio::time::sleep_until(wake).await;
            if let Some((length, every)) = self.stall.filter(|_| Instant::now() >= stall_at) {
                tokio::time::sleep(length).await;
                stall_at += every;
            }
            let Some(slot) = queue.pop_front() else { continue };
            if slot.is_late(Instant::now()) {
                outcome.dropped += 1;
                continue;
            }
            outcome.sent += 1;
            // Not the time that the virtual clock shows, but anything that the guard would let pass.
            let left = slot.at + (slot.latest - slot.at).min(Slot::GUARD).mul_f64(dice.fraction());
            arrivals[slot.account].push(left + self.jitter.mul_f64(dice.fraction()) - start);
        }
        outcome.refused = judge(&self.vendor, arrivals);
        outcome
    }
}

fn judge(vendor: &[Limit], arrivals: Vec<Vec<Duration>>) -> usize {
    let refused = |(limit, mut arrivals): (&Limit, Vec<Duration>)| {
        arrivals.sort_unstable();
        Bucket::new(limit).refused(arrivals)
    };
    vendor.iter().zip(arrivals).map(refused).sum()
}

#[tokio::test(start_paused = true)]
async fn a_hundred_accounts_make_a_thousand_calls_a_second_and_no_call_is_refused() {
    let limits = vec![limit(10, 5); 100];
    let memory = memory(&limits.iter().cloned().map(Some).collect::<Vec<_>>());
    let outcome = Trial { memory: &memory, vendor: limits, jitter: ms(10), stall: None }.run(60 * SECOND).await;
    assert!(outcome.sent >= 59_400, "at least 99 % of 60,000: {outcome:?}");
    assert_eq!((outcome.refused, outcome.dropped), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_vendor_that_allows_no_burst_refuses_nothing_either() {
    let limits = vec![limit(10, 1); 10];
    let memory = memory(&limits.iter().cloned().map(Some).collect::<Vec<_>>());
    let outcome = Trial { memory: &memory, vendor: limits, jitter: ms(10), stall: None }.run(60 * SECOND).await;
    // The ceiling with 15 ms of jitter, guard included, is 1 / 1.15 of 6,000 at the least.
    assert!(outcome.sent >= 5_217 * 99 / 100, "{outcome:?}");
    assert_eq!((outcome.refused, outcome.dropped), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_single_fast_account_is_used_to_the_full() {
    let limits = vec![limit(100, 5)];
    let memory = memory(&[Some(limits[0].clone())]);
    let outcome = Trial { memory: &memory, vendor: limits, jitter: ms(10), stall: None }.run(60 * SECOND).await;
    assert!(outcome.sent >= 5_970, "at least 99.5 % of 6,000: {outcome:?}");
    assert_eq!((outcome.refused, outcome.dropped), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_short_stall_is_half_covered_by_the_burst() {
    let limits = vec![limit(10, 5); 20];
    let memory = memory(&limits.iter().cloned().map(Some).collect::<Vec<_>>());
    let stall = Some((ms(200), 10 * SECOND));
    let outcome = Trial { memory: &memory, vendor: limits, jitter: ms(10), stall }.run(60 * SECOND).await;
    assert_eq!(outcome.refused, 0);
    // Of the 1.2 s that six stalls last, the burst covers about half.
    assert!(outcome.sent >= 12_000 * 97 / 100, "{outcome:?}");
}

#[tokio::test(start_paused = true)]
async fn a_long_stall_loses_its_slots_and_nothing_is_caught_up() {
    for (burst, stall) in [(1, ms(200)), (5, SECOND)] {
        let limits = vec![limit(10, burst); 20];
        let memory = memory(&limits.iter().cloned().map(Some).collect::<Vec<_>>());
        let trial = Trial { memory: &memory, vendor: limits, jitter: ms(10), stall: Some((stall, 10 * SECOND)) };
        let outcome = trial.run(60 * SECOND).await;
        assert_eq!(outcome.refused, 0, "burst {burst}");
        assert!(outcome.dropped > 0, "burst {burst}: {outcome:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_pace_five_per_cent_too_fast_is_refused_so_these_tests_can_fail() {
    let vendor = vec![limit(100, 5); 10];
    let told = Limit::new(105, SECOND, 5).unwrap();
    let memory = memory(&vec![Some(told); 10]);
    let outcome = Trial { memory: &memory, vendor, jitter: ms(10), stall: None }.run(10 * SECOND).await;
    assert!(outcome.refused > 100, "{outcome:?}");
}

#[tokio::test(start_paused = true)]
async fn more_jitter_than_declared_is_refused_so_these_tests_can_fail() {
    let vendor = vec![limit(10, 1); 10];
    let memory = memory(&vec![Some(limit(10, 1)); 10]);
    let outcome = Trial { memory: &memory, vendor, jitter: ms(80), stall: None }.run(10 * SECOND).await;
    assert!(outcome.refused > 10, "{outcome:?}");
}

#[tokio::test(start_paused = true)]
async fn the_accounts_of_a_source_start_evenly_out_of_phase() {
    let memory = memory(&vec![Some(limit(10, 5)); 100]);
    let start = Instant::now();
    let Lease::NotBefore(ask_at) = memory.lease(1).await else { panic!("nobody calls at once") };
    tokio::time::sleep_until(ask_at).await;
    let mut first = drain(&memory).await;
    tokio::time::sleep(ms(100)).await;
    first.extend(drain(&memory).await);
    for (previous, next) in first.iter().zip(&first[1..]) {
        let gap = next.at - previous.at;
        assert!(gap <= ms(2) && (gap >= Duration::from_micros(900)), "{gap:?} between calls at 1,000/s");
    }
    assert!(first[0].at >= start + ms(100), "a process before us may have used the last token: {:?}", first[0].at);
}

#[tokio::test(start_paused = true)]
async fn after_a_lull_the_first_call_leaves_at_once_and_the_others_follow_evenly() {
    let memory = rested(&vec![Some(limit(10, 5)); 100]).await;
    let slots = slots(&memory, 50).await;
    assert_eq!(slots[0].at, Instant::now());
    let span = slots[49].at - slots[0].at;
    assert!((ms(48)..ms(51)).contains(&span), "50 calls at 1,000/s took {span:?}");
}

#[tokio::test(start_paused = true)]
async fn unused_time_is_not_caught_up() {
    let memory = rested(&[Some(limit(10, 5))]).await;
    let slots = drain(&memory).await;
    assert_eq!(slots.len(), 1, "the next one is 100 ms away, beyond the horizon: {slots:?}");
}

#[tokio::test(start_paused = true)]
async fn slots_beyond_the_horizon_are_not_handed_out_and_the_answer_says_when_to_ask() {
    let memory = rested(&[Some(Limit::new(60, 60 * SECOND, 5).unwrap())]).await;
    let first = slots(&memory, 5).await;
    assert_eq!(first.len(), 1);
    let Lease::NotBefore(ask_at) = memory.lease(5).await else { panic!("the next slot is a second away") };
    tokio::time::sleep_until(ask_at).await;
    let next = slots(&memory, 5).await;
    assert!(next[0].at - first[0].at >= SECOND && next[0].at >= Instant::now() + ms(98), "{next:?}");
}

#[tokio::test(start_paused = true)]
async fn accounts_without_a_limit_are_used_in_turn_and_at_once() {
    let memory = rested(&[None, None, None]).await;
    let slots = slots(&memory, 7).await;
    assert_eq!(slots.iter().map(|slot| slot.account).collect::<Vec<_>>(), [0, 1, 2, 0, 1, 2, 0]);
    assert!(slots.iter().all(|slot| slot.at == Instant::now()));
}

#[tokio::test(start_paused = true)]
async fn a_fast_account_serves_more_than_a_slow_one() {
    let memory = rested(&[Some(limit(10, 5)), Some(limit(90, 5))]).await;
    let mut served = [0, 0];
    for _ in 0..1_000 {
        drain(&memory).await.iter().for_each(|slot| served[slot.account] += 1);
        tokio::time::sleep(ms(10)).await;
    }
    assert!(served[0] >= 98 && served[1] >= 885, "10 s at 10/s and 90/s: {served:?}");
}

#[tokio::test(start_paused = true)]
async fn a_held_account_is_passed_over_until_its_time_and_the_others_go_on() {
    let memory = rested(&vec![Some(limit(10, 5)); 3]).await;
    let leased = drain(&memory).await;
    let until = Instant::now() + 5 * SECOND;
    memory.hold(Scope::Account(1), Hold::Until(until), &cause()).await;
    for slot in &leased {
        assert_eq!(memory.is_held(slot), slot.account == 1, "{slot:?}");
    }
    // A shorter hold that comes later does not shorten it.
    memory.hold(Scope::Account(1), Hold::Until(Instant::now()), &cause()).await;
    let mut accounts = Vec::new();
    while Instant::now() < until + SECOND {
        for slot in drain(&memory).await {
            assert!(slot.account != 1 || slot.at >= until, "{slot:?}");
            assert!(!memory.is_held(&slot));
            accounts.push(slot.account);
        }
        tokio::time::sleep(ms(50)).await;
    }
    assert!(accounts.iter().filter(|account| **account == 0).count() >= 58, "others go on");
    assert!(accounts.iter().filter(|account| **account == 1).count() >= 9, "it comes back");
}

#[tokio::test(start_paused = true)]
async fn a_hold_of_the_source_moves_everyone_and_they_come_back_evenly() {
    let memory = rested(&vec![Some(limit(10, 5)); 100]).await;
    let leased = slots(&memory, 20).await;
    let until = Instant::now() + 30 * SECOND;
    memory.hold(Scope::Source, Hold::Until(until), &cause()).await;
    assert!(leased.iter().all(|slot| memory.is_held(slot)));
    let Lease::NotBefore(ask_at) = memory.lease(10).await else { panic!("everyone is held") };
    assert_eq!(ask_at, until - HORIZON);
    tokio::time::sleep_until(ask_at + ms(50)).await;
    let slots = slots(&memory, 10).await;
    assert_eq!(slots[0].at, until);
    assert!(slots[9].at - until >= ms(8), "no stampede at the end of a hold: {slots:?}");
}

#[tokio::test(start_paused = true)]
async fn disabled_accounts_stay_out_and_without_any_account_nobody_calls() {
    let memory = rested(&vec![Some(limit(10, 5)); 2]).await;
    let leased = slots(&memory, 2).await;
    memory.hold(Scope::Account(0), Hold::Disabled, &cause()).await;
    memory.hold(Scope::Account(0), Hold::Until(Instant::now()), &cause()).await;
    assert!(leased.iter().all(|slot| memory.is_held(slot) == (slot.account == 0)));
    tokio::time::sleep(SECOND).await;
    assert!(drain(&memory).await.iter().all(|slot| slot.account == 1));
    memory.hold(Scope::Account(1), Hold::Disabled, &cause()).await;
    memory.give_back(leased).await;
    assert_eq!(memory.lease(1).await, Lease::Nobody);
    assert_eq!(Memory::new(Vec::new(), Pacing::default()).lease(1).await, Lease::Nobody);

    let memory = rested(&[None]).await;
    memory.hold(Scope::Source, Hold::Disabled, &cause()).await;
    assert_eq!(memory.lease(1).await, Lease::Nobody);
}

#[tokio::test(start_paused = true)]
async fn a_returned_tail_is_handed_out_again() {
    let memory = rested(&[Some(limit(100, 5))]).await;
    let leased = drain(&memory).await;
    memory.give_back(leased[3..].to_vec()).await;
    assert_eq!(drain(&memory).await, leased[3..]);
    // Not the last, and the one after it is used: it is still the same slot.
    memory.give_back(vec![leased[2].clone()]).await;
    assert_eq!(drain(&memory).await, leased[2..3]);
    memory.give_back(vec![leased[2].clone()]).await;
    tokio::time::sleep(ms(50)).await;
    assert!(drain(&memory).await.iter().all(|slot| slot.at > leased[9].at), "its time has passed");
}

#[tokio::test(start_paused = true)]
async fn a_slot_given_back_under_a_hold_waits_for_its_end() {
    let memory = rested(&[Some(limit(10, 5))]).await;
    let leased = slots(&memory, 1).await;
    let until = Instant::now() + 5 * SECOND;
    memory.hold(Scope::Account(0), Hold::Until(until), &cause()).await;
    memory.give_back(leased).await;
    assert_eq!(memory.lease(1).await, Lease::NotBefore(until - HORIZON));
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_accounts_are_all_served() {
    let memory = rested(&vec![Some(limit(10, 5)); 10_000]).await;
    let mut served = vec![false; 10_000];
    for _ in 0..11 {
        drain(&memory).await.iter().for_each(|slot| served[slot.account] = true);
        tokio::time::sleep(ms(10)).await;
    }
    assert!(served.iter().all(|served| *served));
}

/// What may happen to a quota.
#[derive(Clone, Debug)]
enum Step {
    Lease(usize),
    GiveBack(usize),
    Sleep(u64),
    HoldAccount(usize, u64),
    HoldSource(u64),
    Disable(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        12 => (1usize..40).prop_map(Step::Lease),
        3 => (0usize..20).prop_map(Step::GiveBack),
        8 => (0u64..60).prop_map(Step::Sleep),
        1 => (100u64..5_000).prop_map(Step::Sleep),
        1 => (0usize..6, 0u64..1_000).prop_map(|(account, for_ms)| Step::HoldAccount(account, for_ms)),
        1 => (0u64..500).prop_map(Step::HoldSource),
        1 => (0usize..40).prop_map(Step::Disable),
    ];
    prop::collection::vec(step, 1..200)
}

/// Runs the steps; whatever is leased and not given back is sent. Checks each lease on the way.
async fn play(limits: Vec<Limit>, jitter: Duration, steps: Vec<Step>, seed: u64) -> usize {
    let pacing = Pacing { jitter, ..Pacing::default() };
    let memory = Memory::new(limits.iter().cloned().map(Some).collect(), pacing);
    let (start, mut sent, mut held, mut source_held) = (Instant::now(), Vec::<Slot>::new(), [None; 6], None);
    for step in steps {
        let now = Instant::now();
        match step {
            Step::Lease(wanted) => {
                let Lease::Slots(slots) = memory.lease(wanted).await else { continue };
                assert!(!slots.is_empty() && slots.len() <= wanted);
                assert!(slots.is_sorted_by_key(|slot| slot.at) && slots[0].at >= now);
                for slot in &slots {
                    assert!(slot.at <= now + HORIZON && !memory.is_held(slot));
                    assert!(held[slot.account].max(source_held).is_none_or(|until| slot.at >= until));
                }
                sent.extend(slots);
            }
            // A process gives back what it has not sent yet: the future, from the end.
            Step::GiveBack(count) => {
                let kept = sent.len().saturating_sub(count);
                let back: Vec<Slot> = sent.split_off(kept).into_iter().collect();
                let (back, gone): (Vec<_>, Vec<_>) = back.into_iter().partition(|slot| slot.at > now);
                sent.extend(gone);
                memory.give_back(back).await;
            }
            Step::Sleep(for_ms) => tokio::time::sleep(ms(for_ms)).await,
            Step::HoldAccount(account, for_ms) => {
                held[account] = held[account].max(Some(now + ms(for_ms)));
                memory.hold(Scope::Account(account), Hold::Until(now + ms(for_ms)), &cause()).await;
            }
            Step::HoldSource(for_ms) => {
                source_held = source_held.max(Some(now + ms(for_ms)));
                memory.hold(Scope::Source, Hold::Until(now + ms(for_ms)), &cause()).await;
            }
            Step::Disable(account) => memory.hold(Scope::Account(account), Hold::Disabled, &cause()).await,
        }
    }
    let (dice, mut arrivals) = (Dice::seeded(seed), vec![Vec::new(); limits.len()]);
    for slot in sent {
        let delay = (jitter + (slot.latest - slot.at)).mul_f64(dice.fraction().mul_add(1.5, -0.25).clamp(0.0, 1.0));
        arrivals[slot.account].push(slot.at + delay - start);
    }
    judge(&limits, arrivals)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn whatever_is_leased_given_back_and_held_the_vendor_refuses_nothing(
        limits in prop::collection::vec((1u32..200, 1u32..6), 1..6),
        jitter_ms in 0u64..40,
        steps in steps(),
        seed in any::<u64>(),
    ) {
        let limits: Vec<Limit> = limits.into_iter().map(|(calls, burst)| limit(calls, burst)).collect();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let refused = runtime.block_on(play(limits, ms(jitter_ms), steps, seed));
        prop_assert_eq!(refused, 0);
    }
}

fn cause() -> Cause {
    Cause::new("test", Timestamp::from_millis(0))
}

/// Two calls per day from midnight, 10/s; it is half a minute before midnight.
fn near_midnight(clock: &Clock) -> Memory {
    let day = Limit {
        starts_at: Some(Timestamp::from_millis(0).into()),
        ..Limit::window(2, Duration::from_secs(86_400), crate::quota::Counting::Fixed).unwrap()
    };
    let limits = vec![Limit::new(10, Duration::from_secs(1), 1).unwrap(), day];
    let account = crate::quota::plan::AccountLimits { limits, ..Default::default() };
    let limits = Limits { accounts: vec![account], ..Limits::default() };
    Memory::with_limits(&limits, &Pacing { margin: 0.0, jitter: Duration::ZERO }, clock)
}

/// How many calls leave within this time.
async fn made_within(memory: &Memory, time: Duration) -> usize {
    let (until, mut made) = (Instant::now() + time, 0);
    while Instant::now() < until {
        match memory.lease(1).await {
            Lease::Slots(slots) => {
                tokio::time::sleep_until(slots[0].at).await;
                made += 1;
            }
            Lease::NotBefore(at) => tokio::time::sleep_until(at.min(Instant::now() + Duration::from_millis(500))).await,
            Lease::Nobody => panic!("nobody is disabled"),
        }
    }
    made
}

const DAY_MS: i64 = 86_400_000;

#[tokio::test(start_paused = true)]
async fn a_clock_that_is_set_moves_the_day_and_not_the_pace() {
    let by = std::sync::Arc::new(std::sync::atomic::AtomicI64::new(0));
    let set = |millis: i64| by.store(millis, std::sync::atomic::Ordering::Relaxed);
    let start = Clock::simulated(Timestamp::from_millis(20_000 * DAY_MS - 30_000));
    let memory = near_midnight(&Clock::Set(Box::new(start), std::sync::Arc::clone(&by)));
    assert_eq!(made_within(&memory, Duration::from_secs(5)).await, 2, "the day's allowance");
    // An hour ahead: the vendor's day has begun long ago, ours by the clock that was wrong has not.
    set(3_600_000);
    assert_eq!(made_within(&memory, Duration::from_secs(5)).await, 2);
    // Back again: the day before is spent, and so is the new one when it comes.
    set(0);
    assert_eq!(made_within(&memory, Duration::from_secs(5)).await, 0);
    assert_eq!(made_within(&memory, Duration::from_secs(60)).await, 0);
    // Nobody waits for an hour that a clock was set back by, if nothing begins at a time of day.
    let set_back = Clock::Set(Box::new(Clock::simulated(Timestamp::from_millis(DAY_MS))), std::sync::Arc::clone(&by));
    let limits = Limits::of_accounts([Limit::new(10, Duration::from_secs(1), 1).ok()]);
    let paced = Memory::with_limits(&limits, &Pacing { margin: 0.0, jitter: Duration::ZERO }, &set_back);
    assert!(made_within(&paced, Duration::from_secs(2)).await >= 18);
    set(-3_600_000);
    assert!(made_within(&paced, Duration::from_secs(2)).await >= 18);
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_was_suspended_begins_the_day_with_the_others() {
    let by = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let start = Clock::simulated(Timestamp::from_millis(20_000 * DAY_MS - 30_000));
    let memory = near_midnight(&Clock::Suspended(Box::new(start), std::sync::Arc::clone(&by)));
    assert_eq!(made_within(&memory, Duration::from_secs(5)).await, 2);
    let held = Instant::now() + Duration::from_secs(3_600);
    memory.hold(Scope::Account(0), Hold::Until(held), &Cause::new("a ban of an hour", Timestamp::from_millis(1))).await;
    by.store(8 * 3_600_000, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(made_within(&memory, Duration::from_secs(5)).await, 2, "the ban is over, and it is another day");
}
