//! Workers that go on without Redis at a share of the quota that it never grants: no call is refused meanwhile either.

#![allow(clippy::print_stdout, reason = "the numbers are part of what the test is for")]

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;
use weir::{
    quota::{
        Cause, Counting, Hold, Lease, Limit, Past, Quota, Scope,
        division::Division,
        plan::{AccountLimits, Limits},
        redis::{Redis, Sharing},
    },
    runtime::clock::Timestamp,
};

use crate::{
    stack::eventually,
    workers::{Fleet, Server},
};

/// Longer than anything that a worker has leased, and than it takes to see that Redis is away.
const LEASE: Duration = Duration::from_millis(6_500);

fn sharing(workers: u32) -> Sharing {
    Sharing { division: Division { reserve: 0.2, workers }, lasts: Duration::from_secs(60) }
}

/// 10 accounts of 20/s, and 100/s for all; a day's budget for one of them.
fn limits() -> Limits {
    let second = Duration::from_secs(1);
    let account = AccountLimits { limits: vec![Limit::new(20, second, 8).unwrap()], ..AccountLimits::default() };
    let source = vec![Limit::new(100, second, 8).unwrap()];
    let mut limits = Limits { accounts: vec![account; 10], source, ..Limits::default() };
    let day = Limit::window(200, second * 86_400, Counting::Sliding).unwrap();
    limits.accounts[1].limits.push(day);
    limits
}

/// Calls in so many seconds, and how many of them are of the account with the day's budget.
async fn made_in(fleet: &Fleet, seconds: u64) -> (usize, usize) {
    let before = (fleet.made(), fleet.calls_of(1));
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    (fleet.made() - before.0, fleet.calls_of(1) - before.1)
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_go_on_at_the_share_while_redis_stands_still_or_is_killed_and_none_is_refused() {
    let mut server = Server::start();
    let fleet = Fleet::sharing(&server.url(), limits(), 4, Some(sharing(4)));
    fleet.flows(20).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let (whole, _) = made_in(&fleet, 5).await;
    server.signal("-STOP");
    tokio::time::sleep(LEASE).await;
    let (alone, of_budget) = made_in(&fleet, 5).await;
    server.signal("-CONT");
    fleet.flows(20).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let (again, _) = made_in(&fleet, 5).await;
    println!("in 5 s: {whole} calls with Redis, {alone} without it, {again} after");
    // A fifth of 100/s is kept back: 100 calls in 5 s, of which the account with the budget has none.
    assert!((70..=105).contains(&alone), "{alone} calls without Redis");
    assert_eq!(of_budget, 0, "nobody knows what is left of the day's budget");
    assert!(whole >= 350 && again >= 350, "{whole} and {again} calls with Redis");
    server.kill_for(Duration::from_secs(8)).await;
    fleet.flows(20).await;
    fleet.judge("alone").await;
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
async fn no_more_workers_than_it_is_divided_among_go_on_without_redis() {
    let mut server = Server::start();
    let fleet = Fleet::sharing(&server.url(), limits(), 0, Some(sharing(2)));
    let quotas: Vec<_> = (0..3).map(|_| fleet.quota()).collect();
    eventually("everybody is served by Redis", async || {
        (served(&quotas, Duration::from_millis(500)).await == 3).then_some(())
    })
    .await;
    server.signal("-STOP");
    tokio::time::sleep(LEASE).await;
    // Who begins now has never been seen by Redis.
    let late = fleet.quota_after(&Past::default());
    let quotas = [quotas, vec![late]].concat();
    assert_eq!(served(&quotas, Duration::from_secs(3)).await, 2);
    // In a new state they are still known, since they say so; the others wait until everybody else must have stopped.
    server.signal("-CONT");
    server.flush().await;
    eventually("everybody is served by Redis again", async || {
        (served(&quotas, Duration::from_millis(500)).await == 4).then_some(())
    })
    .await;
    server.kill_for(LEASE).await;
    server.signal("-STOP");
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert_eq!(served(&quotas, Duration::from_secs(3)).await, 2);
    server.signal("-CONT");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ban_that_was_learnt_without_redis_is_heeded_by_the_others_when_it_is_back() {
    let server = Server::start();
    let fleet = Fleet::sharing(&server.url(), limits(), 0, Some(sharing(2)));
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
    tokio::time::sleep(LEASE).await;
    assert_eq!(served(&quotas, Duration::from_secs(2)).await, 2);
    assert!(quotas.iter().all(|quota| away(quota).is_some_and(|away| away.slots > 0)));
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
