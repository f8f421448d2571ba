//! The quota of a fleet on a real Redis that is restarted, flushed and stopped: no call is ever refused.

#![allow(clippy::print_stdout, reason = "the numbers are part of what the test is for")]

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;
use weir::{
    message::Spent,
    quota::{
        Cause, Counting, Hold, Lease, Limit, PaceBy, Past, Quota, Scope, Share,
        past::PastOf,
        plan::{AccountLimits, Limits},
        redis::Redis,
    },
    runtime::clock::{Clock, Timestamp},
};

use crate::{
    stack::{address, eventually},
    workers::{Fleet, Server},
};

async fn share(workers: usize) {
    /// A machine that is busy with other things misses slots, and then there are more leases for the same calls: one of
    /// so many stretches has to be free of that.
    const STRETCHES: usize = 12;
    let fleet = Fleet::start(&address("WEIR_TEST_REDIS"), Fleet::limits(), workers);
    fleet.flows(20).await;
    let operations = |fleet: &Fleet| fleet.quotas.iter().map(|quota| quota.counts().operations).sum::<u64>();
    let mut seen = Vec::new();
    for _ in 0..STRETCHES {
        let (made, asked) = (fleet.made(), operations(&fleet));
        tokio::time::sleep(Duration::from_secs(5)).await;
        let (made, asked) = (fleet.made() - made, operations(&fleet) - asked);
        seen.push((made, asked));
        if made >= 100 && asked * 10 <= made as u64 {
            break;
        }
    }
    println!("100/s, {workers} workers: calls and operations in 5 s: {seen:?}");
    assert!(seen.last().is_some_and(|(made, asked)| asked * 10 <= *made as u64), "calls and operations: {seen:?}");
    fleet.judge(&format!("{workers} workers")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn four_workers_share_a_quota_and_ask_redis_once_for_ten_calls() {
    share(4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sixteen_workers_share_a_quota_and_ask_redis_once_for_ten_calls() {
    share(16).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_is_killed_and_started_again_costs_no_violation() {
    let mut server = Server::start();
    let fleet = Fleet::start(&server.url(), Fleet::limits(), 4);
    fleet.flows(20).await;
    for _ in 0..2 {
        server.restart().await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        fleet.flows(20).await;
    }
    fleet.judge("restarted").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flushed_redis_costs_no_violation_of_a_second_or_a_day() {
    let server = Server::start();
    let mut limits = Fleet::limits();
    limits.accounts[0].limits.push(Limit::window(30, Duration::from_secs(86_400), Counting::Sliding).unwrap());
    limits.accounts[1].limits.push(Limit::window(300, Duration::from_secs(86_400), Counting::Sliding).unwrap());
    let fleet = Fleet::start(&server.url(), limits, 4);
    fleet.flows(20).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    server.flush().await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = fleet.calls_of(1);
    fleet.flows(20).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(fleet.calls_of(1) > before, "what was left of the day's budget is remembered");
    fleet.judge("flushed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_has_never_called_does_not_make_the_fleet_forget_what_is_spent() {
    let server = Server::start();
    let mut limits = Fleet::limits();
    limits.accounts.truncate(1);
    limits.accounts[0].limits.push(Limit::window(60, Duration::from_secs(86_400), Counting::Sliding).unwrap());
    let mut fleet = Fleet::start(&server.url(), limits, 0);
    let (idle, caller) = (fleet.idle().await, fleet.join());
    fleet.flows(20).await;
    // Once more, so that it is told of as it was told of.
    eventually("the caller remembers what is spent", async || {
        let spent = fleet.quotas[1].snapshot(0..1, Timestamp::from_millis(0)).accounts.remove(0).spent;
        (spent.iter().flat_map(|spent| &spent.calls).sum::<u64>() >= 50).then_some(())
    })
    .await;
    caller.abort();
    server.flush().await;
    // The first to be heard of is the one that knows of no call.
    fleet.work(idle);
    tokio::time::sleep(Duration::from_secs(12)).await;
    fleet.judge("an idle worker").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slots_in_which_no_call_left_give_back_their_budget_however_late_that_is_known() {
    let mut limits = Fleet::limits();
    limits.accounts.truncate(1);
    limits.source = vec![Limit::window(10, Duration::from_secs(86_400), Counting::Sliding).unwrap()];
    let quota = Fleet::start(&address("WEIR_TEST_REDIS"), limits, 0).idle().await;
    let lease_all = async || {
        let mut slots = Vec::new();
        eventually("the day's budget is leased", async || {
            if let Lease::Slots(more) = quota.lease(10).await {
                slots.extend(more);
            }
            (slots.len() >= 10).then_some(())
        })
        .await;
        slots
    };
    let mut slots = lease_all().await;
    // Longer than a call in its own time would have been known for: a proxy that does not answer.
    tokio::time::sleep_until(slots[9].at + Duration::from_secs(6)).await;
    assert!(matches!(quota.lease(10).await, Lease::NotBefore(_)), "it is spent");
    quota.give_back(slots.split_off(4)).await;
    let mut again = Vec::new();
    eventually("six are there again", async || {
        if let Lease::Slots(more) = quota.lease(10).await {
            again.extend(more);
        }
        (again.len() >= 6).then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(matches!(quota.lease(10).await, Lease::NotBefore(_)), "and no more: {again:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_days_budget_of_all_accounts_lacks_after_a_kill_what_they_can_have_called_together_and_no_more() {
    let day = Limit::window(100_000, Duration::from_secs(86_400), Counting::Sliding).unwrap();
    let limits = Limits { source: vec![day], ..Fleet::limits() };
    let now = Clock::System.now();
    let width = 864_000_000;
    let bucket = u64::try_from(now.as_millis()).unwrap() * 1_000 / width;
    let spent = vec![Spent { width, shift: 0, span: 102, calendar: None, first: bucket, calls: vec![986] }];
    let whole = PastOf { spent, counted_at: now, doubt_until: now.after(Duration::from_secs(3)), held: None };
    let past = Past { is_read: true, is_known: true, whole, ..Past::default() };
    // A Redis that knows nothing, as one that came back empty.
    let quota = Fleet::start(&address("WEIR_TEST_REDIS"), limits, 0).quota_after(&past);
    eventually("calls go on", async || matches!(quota.lease(1).await, Lease::Slots(_)).then_some(())).await;
    let spent = eventually("what is spent is told", async || {
        let spent = quota.snapshot(0..0, Clock::System.now()).whole.spent;
        let spent = spent.iter().flat_map(|spent| &spent.calls).sum::<u64>();
        (spent > 986).then_some(spent)
    })
    .await;
    // Ten accounts of 20/s for some seconds: the outage, and what is leased ahead.
    println!("986 calls are known, {spent} taken for made");
    assert!((986 + 600..986 + 3_000).contains(&spent), "{spent}");
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_counts_the_windows_of_a_calendar_as_we_do() {
    let starts_at = "2026-01-31T06:30:00-08:00[America/Los_Angeles]";
    let limit = |calls: u32, per: &str| -> Limit {
        let limit = serde_json::json!({"calls": calls, "per": per, "kind": "fixed", "starts_at": starts_at});
        serde_json::from_value(limit).unwrap()
    };
    let mut limits = Fleet::limits();
    limits.accounts.truncate(1);
    limits.accounts[0].limits.extend([limit(8, "1month"), limit(20, "1week")]);
    limits.source = vec![limit(9, "1day")];
    let quota = Fleet::start(&address("WEIR_TEST_REDIS"), limits.clone(), 0).quota();
    let mut calls = 0;
    eventually("the month's calls are made", async || {
        if let Lease::Slots(slots) = quota.lease(10).await {
            calls += slots.len();
        }
        (calls >= 8).then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(matches!(quota.lease(10).await, Lease::NotBefore(_)), "{calls} of 8");
    let now = u64::try_from(Clock::System.now().as_millis()).unwrap() * 1_000;
    let spent = eventually("what is spent is told", async || {
        let snapshot = quota.snapshot(0..1, Clock::System.now());
        let spent: Vec<Spent> =
            snapshot.whole.spent.into_iter().chain(snapshot.accounts.into_iter().flat_map(|of| of.spent)).collect();
        spent.iter().all(|spent| spent.calls.iter().sum::<u64>() >= 8).then_some(spent)
    })
    .await;
    let of = |limit: &Limit| {
        let calendar = limit.calendar().unwrap();
        (calendar.number(now), calendar.name().to_owned())
    };
    let limits = [&limits.source[0], &limits.accounts[0].limits[1], &limits.accounts[0].limits[2]];
    for (limit, spent) in limits.into_iter().zip(spent) {
        let (number, name) = of(limit);
        assert_eq!((spent.first, &spent.calls[..], spent.calendar), (number, &[8][..], Some(name)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_stands_still_for_two_seconds_costs_no_violation() {
    let server = Server::start();
    let fleet = Fleet::start(&server.url(), Fleet::limits(), 4);
    fleet.flows(20).await;
    for _ in 0..2 {
        server.signal("-STOP");
        tokio::time::sleep(Duration::from_secs(2)).await;
        server.signal("-CONT");
        fleet.flows(20).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    fleet.judge("stopped").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_that_are_killed_and_join_cost_no_violation() {
    let server = Server::start();
    let mut fleet = Fleet::start(&server.url(), Fleet::limits(), 3);
    for _ in 0..3 {
        let worker = fleet.join();
        fleet.flows(20).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        worker.abort();
        // Without its driver too, as if the process were gone.
        fleet.quotas.pop();
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    fleet.judge("killed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_an_account_with_a_cap_no_more_calls_are_under_way_in_the_whole_fleet() {
    let server = Server::start();
    let mut limits = Fleet::limits();
    limits.accounts.truncate(2);
    limits.accounts[0].in_flight = Some(3);
    let fleet = Fleet::start(&server.url(), limits, 0);
    let quotas = [fleet.quota(), fleet.quota()];
    let mut leased = Vec::new();
    for _ in 0..100 {
        for (worker, quota) in quotas.iter().enumerate() {
            if let Lease::Slots(slots) = quota.lease(8).await {
                leased.extend(slots.into_iter().filter(|slot| slot.account == 0).map(|slot| (worker, slot)));
            }
        }
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
    // Slots that are kept ahead and missed come back, so that only those handed out count.
    assert!((1..=3).contains(&leased.len()), "{leased:?}");
    let before = leased.len();
    for (worker, _) in &leased {
        quotas[*worker].ended(0);
    }
    for _ in 0..50 {
        for quota in &quotas {
            if let Lease::Slots(slots) = quota.lease(8).await {
                leased.extend(slots.into_iter().filter(|slot| slot.account == 0).map(|slot| (9, slot)));
            }
        }
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
    assert!((before + 1..=before + 3).contains(&leased.len()), "{leased:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn slots_of_an_account_that_one_worker_does_not_know_go_to_those_that_do() {
    let server = Server::start();
    let mut limits = Fleet::limits();
    limits.accounts.truncate(2);
    limits.accounts[1].in_flight = Some(8);
    let mut old = limits.clone();
    old.accounts.truncate(1);
    let mut fleet = Fleet::start(&server.url(), limits, 0);
    // As in a rolling upgrade: the one that knows more begins later, and what it knows counts from then on.
    let before = fleet.quota_of_others(&old).await;
    let after = fleet.idle().await;
    fleet.work(before);
    fleet.flows(20).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut taken = 0;
    let until = tokio::time::Instant::now() + Duration::from_secs(5);
    while tokio::time::Instant::now() < until {
        match after.lease(8).await {
            Lease::Slots(slots) => {
                for slot in slots {
                    tokio::time::sleep_until(slot.at).await;
                    taken += usize::from(slot.account == 1);
                    after.ended(slot.account);
                }
            }
            Lease::NotBefore(at) => tokio::time::sleep_until(at).await,
            Lease::Nobody => panic!("nobody is disabled"),
        }
    }
    // 20/s for 5 s, on a busy machine; of slots that are dropped, or behind those of the other account, some 15 come.
    assert!(taken >= 50, "{taken} calls of the account that only one of the two knows");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_whose_clock_had_leapt_ahead_costs_seconds_and_no_violation() {
    // What a day ahead leaves behind: every time of the state.
    const LEAP: &str = "
        local day, key = 86400000000, KEYS[1]
        local meta = cmsgpack.unpack(redis.call('GET', key .. ':meta'))
        meta.last, meta.next_start, meta.source.next = meta.last + day, meta.next_start + day, meta.source.next + day
        redis.call('SET', key .. ':meta', cmsgpack.pack(meta))
        local list = redis.call('HGETALL', key .. ':account')
        for i = 1, #list, 2 do
          local state = cmsgpack.unpack(list[i + 1])
          state.gate.next = state.gate.next + day
          redis.call('HSET', key .. ':account', list[i], cmsgpack.pack(state))
          redis.call('ZINCRBY', key .. ':queue:1', day, list[i])
        end";
    let server = Server::start();
    let fleet = Fleet::start(&server.url(), Fleet::limits(), 2);
    fleet.flows(20).await;
    let client = redis::Client::open(server.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    redis::Script::new(LEAP).key(fleet.key()).invoke_async::<()>(&mut connection).await.unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    fleet.flows(20).await;
    fleet.judge("leapt").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_lost_costs_an_account_with_a_cap_no_longer_than_its_calls_can_take() {
    let server = Server::start();
    let mut limits = Fleet::limits();
    limits.accounts.truncate(1);
    limits.accounts[0].in_flight = Some(3);
    limits.longest_call = Some(Duration::from_secs(1));
    let quota = Fleet::start(&server.url(), limits, 0).quota();
    let mut under_way = 0;
    eventually("its calls leave", async || {
        if let Lease::Slots(slots) = quota.lease(8).await {
            under_way += slots.len();
        }
        (under_way == 3).then_some(())
    })
    .await;
    let client = redis::Client::open(server.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    redis::cmd("CLIENT").arg("KILL").arg("SKIPME").arg("yes").exec_async(&mut connection).await.unwrap();
    (0..3).for_each(|_| quota.ended(0));
    eventually("it is called again", async || matches!(quota.lease(8).await, Lease::Slots(_)).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hold_reaches_all_workers_at_once() {
    let server = Server::start();
    let fleet = Fleet::start(&server.url(), Fleet::limits(), 4);
    fleet.flows(20).await;
    let held_at = Instant::now();
    let until = held_at + Duration::from_secs(4);
    fleet.quotas[0].hold(Scope::Source, Hold::Until(until), &cause()).await;
    fleet.quotas[1].hold(Scope::Account(3), Hold::Disabled, &cause()).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let calls = Arc::clone(&fleet.calls);
    let made = fleet.made();
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert_eq!(fleet.made(), made, "everybody holds");
    let last = calls.lock().unwrap().iter().map(|call| call.1).max().unwrap();
    println!("the last call arrived {:?} after the hold", last.saturating_duration_since(held_at));
    fleet.flows(20).await;
    let after: Vec<_> = calls.lock().unwrap()[made..].to_vec();
    assert!(after.iter().all(|(account, at)| *account != 3 && *at >= until), "{after:?}");
    fleet.judge("held").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_account_stays_so_in_a_flushed_redis_and_calls_again_when_it_is_released() {
    let server = Server::start();
    let fleet = Fleet::start(&server.url(), Fleet::limits(), 3);
    fleet.flows(20).await;
    let long = Instant::now() + Duration::from_secs(3_600);
    fleet.quotas[0].hold(Scope::Account(3), Hold::Disabled, &cause()).await;
    fleet.quotas[0].hold(Scope::Account(4), Hold::Until(long), &cause()).await;
    let knows = |worker: &Arc<Redis>, account: usize| {
        let state = worker.snapshot(account..account + 1, Timestamp::from_millis(2)).accounts.remove(0);
        state.held.is_some_and(|held| &*held.cause.reason == "test" && held.until.is_none() == (account == 3))
    };
    let all = |held: bool| {
        let both = |worker: &Arc<Redis>| knows(worker, 3) == held && knows(worker, 4) == held;
        fleet.quotas.iter().all(both).then_some(())
    };
    eventually("everybody knows of both holds", async || all(true)).await;
    server.flush().await;
    fleet.flows(20).await;
    let made = [fleet.calls_of(3), fleet.calls_of(4)];
    fleet.flows(20).await;
    fleet.flows(20).await;
    assert_eq!([fleet.calls_of(3), fleet.calls_of(4)], made, "held in the new state too");
    eventually("nobody has forgotten", async || all(true)).await;

    // An old release changes nothing, whoever tells of it; a new one ends both.
    for as_of in [0, 2] {
        for worker in &fleet.quotas {
            worker.release(Scope::Account(3), Timestamp::from_millis(as_of)).await;
            worker.release(Scope::Account(4), Timestamp::from_millis(as_of)).await;
        }
        if as_of == 0 {
            fleet.flows(20).await;
            assert_eq!([fleet.calls_of(3), fleet.calls_of(4)], made);
        }
    }
    eventually("both call again", async || (fleet.calls_of(3) > made[0] && fleet.calls_of(4) > made[1]).then_some(()))
        .await;
    assert_eq!(all(false), Some(()));
    // What is told of too late was released already.
    fleet.quotas[1].hold(Scope::Account(3), Hold::Disabled, &cause()).await;
    fleet.flows(20).await;
    assert!(!knows(&fleet.quotas[1], 3));
    fleet.judge("released").await;
}

fn cause() -> Cause {
    Cause::new("test", Timestamp::from_millis(1))
}

/// How many calls the fleet makes in so many seconds.
async fn made_in(fleet: &Fleet, seconds: u64) -> usize {
    let before = fleet.made();
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    fleet.made() - before
}

#[tokio::test(flavor = "multi_thread")]
async fn a_share_of_the_pace_counts_for_all_workers_and_once_however_many_ask() {
    let server = Server::start();
    let fleet = Fleet::start(&server.url(), Fleet::limits(), 4);
    fleet.flows(20).await;
    // What was leased before may still leave: up to four seconds.
    let ahead = || tokio::time::sleep(Duration::from_millis(4_500));
    ahead().await;
    let whole = made_in(&fleet, 5).await;
    for quota in &fleet.quotas {
        quota.set_pace(Scope::Source, PaceBy::Calendar, Share::new(0.5).unwrap()).await;
    }
    ahead().await;
    let half = made_in(&fleet, 5).await;
    fleet.quotas[2].set_pace(Scope::Source, PaceBy::Operator, Share::new(0.5).unwrap()).await;
    ahead().await;
    let quarter = made_in(&fleet, 5).await;
    for by in [PaceBy::Operator, PaceBy::Calendar] {
        fleet.quotas[1].set_pace(Scope::Source, by, Share::WHOLE).await;
    }
    ahead().await;
    let again = made_in(&fleet, 5).await;
    println!("in 5 s: {whole} calls, at half {half}, at a quarter {quarter}, then {again}");
    assert!(half * 100 <= whole * 55 && half * 100 >= whole * 40, "{whole} {half}");
    assert!(quarter * 100 <= whole * 30 && quarter > 0, "{whole} {quarter}");
    assert!(again * 100 >= whole * 90, "{whole} {again}");
    fleet.judge("shares").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn late_calls_of_a_worker_slow_the_fleet_whatever_others_say_and_no_longer_than_it_lives() {
    let server = Server::start();
    let fleet = Fleet::start(&server.url(), Fleet::limits(), 4);
    fleet.flows(20).await;
    tokio::time::sleep(Duration::from_millis(4_500)).await;
    let whole = made_in(&fleet, 5).await;
    let says = async |worker: usize, share: f64| {
        fleet.quotas[worker].set_pace(Scope::Source, PaceBy::Delays, Share::new(share).unwrap()).await;
    };
    // It is said again every two seconds; what was leased before may leave for four.
    let mut half = 0;
    for round in 0..5 {
        says(0, 0.5).await;
        heard(&fleet, Scope::Source, 0, 0.5).await;
        says(1, 0.8).await;
        says(2, 1.0).await;
        let made = made_in(&fleet, 2).await;
        half += if round >= 3 { made } else { 0 };
        heard(&fleet, Scope::Source, 0, 0.5).await;
    }
    println!("{whole} calls in 5 s, {half} in 4 s at half the pace");
    assert!(half * 100 <= whole * 55 * 4 / 5 && half > 0, "{whole} in 5 s, {half} in 4 s");
    // The latest is in order again; the other one has died.
    let died_at = Instant::now();
    says(1, 0.8).await;
    says(0, 1.0).await;
    heard(&fleet, Scope::Source, 0, 0.8).await;
    heard(&fleet, Scope::Source, 0, 1.0).await;
    let lasted = died_at.elapsed();
    assert!((4_500..7_000).contains(&lasted.as_millis()), "a dead worker's share lasted {lasted:?}");
    fleet.judge("late").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_of_refusals_slows_the_account_by_one_step_for_the_whole_fleet() {
    let server = Server::start();
    let fleet = Fleet::start(&server.url(), Fleet::limits(), 4);
    fleet.flows(20).await;
    let scope = Scope::Account(3);
    // The same burst, seen by all workers: what left before the first step is no further one.
    let left_at = Instant::now();
    for quota in &fleet.quotas {
        quota.refused(scope, left_at).await;
        let expected = quota.pace(scope).share;
        assert!((expected - 1.0 / 1.05).abs() < 0.05, "known before Redis has answered: {expected}");
    }
    heard(&fleet, scope, 4, 1.0 / 1.05).await;
    // Each further round is another.
    for round in 2..=3 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        fleet.quotas[round].refused(scope, Instant::now()).await;
        heard(&fleet, scope, 3 + round as u64, 1.05_f64.powi(-i32::try_from(round).unwrap())).await;
    }
    assert_eq!(fleet.quotas[0].pace(Scope::Account(2)).refused, 0, "the other accounts go on");
    fleet.judge("refused").await;
}

/// How many of these get slots within `span`.
async fn served(quotas: &[Arc<Redis>], span: Duration) -> usize {
    let (mut served, until) = (vec![false; quotas.len()], Instant::now() + span);
    while Instant::now() < until {
        for (quota, served) in quotas.iter().zip(&mut served) {
            *served |= matches!(quota.lease(1).await, Lease::Slots(_));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    served.into_iter().filter(|served| *served).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn without_redis_calls_stop_and_a_ban_that_was_learnt_meanwhile_is_heeded_by_the_others_when_it_is_back() {
    let server = Server::start();
    let fleet = Fleet::start(&server.url(), Fleet::limits(), 0);
    let quotas = [fleet.quota(), fleet.quota()];
    eventually("both are served by Redis", async || {
        (served(&quotas, Duration::from_millis(500)).await == 2).then_some(())
    })
    .await;
    let held = |worker: &Arc<Redis>| {
        let state = worker.snapshot(3..4, Timestamp::from_millis(2)).accounts.remove(0);
        state.held.map(|held| (held.cause.reason.to_string(), held.until.is_none()))
    };
    let away = |worker: &Arc<Redis>| worker.snapshot(0..0, Timestamp::from_millis(2)).cut_off;
    assert!(quotas.iter().all(|quota| away(quota).is_none()));
    server.signal("-STOP");
    // Longer than anything that a worker has leased, and than it takes to see that Redis is away.
    tokio::time::sleep(Duration::from_millis(6_500)).await;
    assert_eq!(served(&quotas, Duration::from_secs(2)).await, 0);
    assert!(quotas.iter().all(|quota| away(quota).is_some_and(|away| away.stopped && away.reason().is_some())));
    let cause = Cause::new("banned", Timestamp::from_millis(1));
    quotas[0].hold(Scope::Account(3), Hold::Disabled, &cause).await;
    // It keeps to it itself; the other cannot know.
    assert_eq!((held(&quotas[0]), held(&quotas[1])), (Some(("banned".to_owned(), true)), None));
    server.signal("-CONT");
    eventually("the other knows of the ban", async || held(&quotas[1]).filter(|(why, _)| why == "banned")).await;
    // A worker that begins now is told by Redis.
    let late = fleet.quota();
    eventually("a later one too", async || held(&late)).await;
    let mut leased = 0;
    eventually("others are called for", async || {
        if let Lease::Slots(slots) = quotas[1].lease(16).await {
            assert!(slots.iter().all(|slot| slot.account != 3), "{slots:?}");
            leased += slots.len();
        }
        (leased > 50).then_some(())
    })
    .await;
    assert!(away(&quotas[0]).is_none());
}

/// Waits for one call as whoever has an express request does; how many calls the others make meanwhile.
async fn overtaken(fleet: &Fleet, quota: &Redis, hurries: bool) -> usize {
    let (before, deadline) = (fleet.made(), Instant::now() + Duration::from_secs(20));
    loop {
        assert!(Instant::now() < deadline, "no slot for an express request");
        if hurries {
            quota.hurry(1, 0.5);
        }
        if let Lease::Slots(slots) = quota.lease(1).await {
            tokio::time::sleep_until(slots[0].at).await;
            if !slots[0].is_late(Instant::now()) && !quota.is_held(&slots[0]) {
                fleet.calls.lock().unwrap().push((slots[0].account, Instant::now()));
                break;
            }
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    quota.rest();
    fleet.made() - before
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_an_express_request_gets_the_next_slot_of_a_fleet_that_has_leased_seconds_ahead() {
    const REQUESTS: usize = 40;
    let mut fleet = Fleet::start(&address("WEIR_TEST_REDIS"), Fleet::limits(), 12);
    let quota = fleet.idle().await;
    fleet.flows(20).await;
    // Until everybody has leased ahead what there is.
    tokio::time::sleep(Duration::from_secs(4)).await;
    let operations = |fleet: &Fleet| fleet.quotas.iter().map(|quota| quota.counts().operations).sum::<u64>();
    let (mut medians, mut asked) = (Vec::new(), Vec::new());
    for hurries in [false, true] {
        let (mut seen, before) = (Vec::new(), (operations(&fleet), fleet.made()));
        for _ in 0..if hurries { REQUESTS } else { 4 } {
            seen.push(overtaken(&fleet, &quota, hurries).await);
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
        asked.push((operations(&fleet) - before.0, fleet.made() - before.1));
        seen.sort_unstable();
        println!("hurries: {hurries}: calls of others meanwhile: {seen:?}");
        medians.push(seen[seen.len() / 2]);
    }
    println!("operations and calls: {asked:?}");
    // What 12 workers have leased ahead is 288 slots.
    assert!(medians[0] > 100 && medians[1] < 20, "{medians:?}");
    fleet.judge("express").await;
}

/// Waits until every worker knows that so many calls were refused, and at which share that leaves the pace.
async fn heard(fleet: &Fleet, scope: Scope, refused: u64, share: f64) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let paces = || fleet.quotas.iter().map(|quota| quota.pace(scope)).collect::<Vec<_>>();
    // A few calls without a refusal make up for a little of it.
    while !paces().iter().all(|pace| pace.refused == refused && (pace.share - share).abs() < 0.001) {
        assert!(Instant::now() < deadline, "expected {refused} refusals and {share}: {:?}", paces());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// So many accounts, each with a pace of its own and a budget of the day.
fn many(accounts: usize, source: Limit) -> Limits {
    let day = Limit::window(5_000, Duration::from_secs(86_400), Counting::Sliding).unwrap();
    let limits = vec![Limit::new(1, Duration::from_secs(1), 1).unwrap(), day];
    let account = AccountLimits { limits, ..AccountLimits::default() };
    Limits { accounts: vec![account; accounts], source: vec![source], ..Limits::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_all_accounts_have_spent_and_what_holds_them_is_asked_and_written_in_pieces() {
    const ACCOUNTS: usize = 130;
    let server = Server::start();
    let limits = many(ACCOUNTS, Limit::new(100, Duration::from_secs(1), 5).unwrap());
    let mut fleet = Fleet::start(&server.url(), limits, 2);
    fleet.flows(20).await;
    for account in [3, 125] {
        fleet.quotas[0].hold(Scope::Account(account), Hold::Disabled, &cause()).await;
    }
    let holds = |quota: &Redis| {
        let accounts = quota.snapshot(0..ACCOUNTS, Timestamp::from_millis(2)).accounts;
        let held = accounts.iter().enumerate().filter(|(_, account)| account.held.is_some());
        held.map(|(index, _)| index).collect::<Vec<_>>()
    };
    let spent = |quota: &Redis| {
        let accounts = quota.snapshot(0..ACCOUNTS, Timestamp::from_millis(2)).accounts;
        let calls = |account: &weir::quota::State| account.spent.iter().flat_map(|spent| &spent.calls).sum::<u64>();
        accounts.iter().map(calls).collect::<Vec<_>>()
    };
    let known = eventually("all that is spent is known", async || {
        let spent = spent(&fleet.quotas[0]);
        (spent.iter().filter(|calls| **calls > 0).count() >= ACCOUNTS - 2).then_some(spent)
    })
    .await;
    // One that has heard no announcement.
    fleet.join();
    eventually("it has asked what is held", async || (holds(&fleet.quotas[2]) == [3, 125]).then_some(())).await;
    server.flush().await;
    fleet.flows(20).await;
    eventually("what was spent is spent in the new state", async || {
        let now = spent(&fleet.quotas[2]);
        now.iter().zip(&known).all(|(now, known)| now >= known).then_some(())
    })
    .await;
    fleet.join();
    eventually("the holds are in the new state", async || (holds(&fleet.quotas[3]) == [3, 125]).then_some(())).await;
    fleet.judge("pieces").await;
}

/// Of SLOWLOG: number, seconds since 1970, microseconds, arguments, client, its name.
type Entry = (u64, u64, u64, Vec<Vec<u8>>, String, String);

/// How long Redis was in each script call so far, in microseconds.
async fn script_calls(connection: &mut redis::aio::MultiplexedConnection) -> Vec<u64> {
    let log: Vec<Entry> = redis::cmd("SLOWLOG").arg("GET").arg(-1).query_async(connection).await.unwrap();
    let scripts = log.into_iter().filter(|entry| entry.3[0].eq_ignore_ascii_case(b"EVALSHA"));
    let mut calls: Vec<u64> = scripts.map(|entry| entry.2).collect();
    calls.sort_unstable();
    calls
}

async fn log_all(server: &Server) -> redis::aio::MultiplexedConnection {
    let client = redis::Client::open(server.url()).unwrap();
    // The whole log is one reply, of thousands of entries.
    let config = redis::AsyncConnectionConfig::new().set_response_timeout(None);
    let connect = async || client.get_multiplexed_async_connection_with_config(&config).await.ok();
    let mut connection = eventually("it answers", connect).await;
    for (key, value) in [("slowlog-log-slower-than", 0), ("slowlog-max-len", 100_000)] {
        redis::cmd("CONFIG").arg("SET").arg(key).arg(value).exec_async(&mut connection).await.unwrap();
    }
    connection
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_accounts_keep_redis_from_others_for_no_longer_than_a_few_do() {
    const ACCOUNTS: usize = 10_000;
    let mut server = Server::start();
    let mut connection = log_all(&server).await;
    let mut fleet = Fleet::start(&server.url(), many(ACCOUNTS, Limit::new(100, Duration::from_secs(1), 5).unwrap()), 1);
    fleet.flows(60).await;
    fleet.join();
    fleet.quotas[0].hold(Scope::Account(9_999), Hold::Disabled, &cause()).await;
    eventually("a worker that joins knows what is held", async || {
        fleet.quotas[1].snapshot(9_999..10_000, Timestamp::from_millis(2)).accounts[0].held.clone()
    })
    .await;
    let asked = fleet.quotas[1].counts().operations;
    let mut calls = script_calls(&mut connection).await;
    server.restart().await;
    let mut connection = log_all(&server).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    fleet.flows(60).await;
    calls.extend(script_calls(&mut connection).await);
    calls.sort_unstable();
    let slow = calls.iter().filter(|call| **call > 20_000).count();
    println!(
        "{} script calls, {asked} of one that joined: median {} µs, 99 % within {} µs, all within {:?} µs",
        calls.len(),
        calls[calls.len() / 2],
        calls[calls.len() * 99 / 100],
        calls.last()
    );
    // A plan and a doubt of 10,000 accounts are many calls; on a busy machine a few of them are interrupted.
    assert!(calls.len() > ACCOUNTS / 50 && slow * 100 <= calls.len(), "{slow} of {}", calls.len());
    fleet.judge("ten thousand").await;
}
