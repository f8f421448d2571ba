//! Limits and holds of addresses on a real Redis, for a fleet.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{task::JoinSet, time::Instant};
use weir::{
    message::{AccountAlias, SourceName},
    quota::{
        Aliases, Cause, Counting, Hold, Lease, Limit, Pacing, Past, Quota, Scope, Slot,
        plan::{AccountLimits, AddressLimits, Limits, Plan},
        redis::Redis,
    },
    runtime::clock::Timestamp,
    simulate::limiter::{self, Limiter},
};

use crate::stack::{address, eventually, unique};

const ADDRESSES: usize = 3;

/// 9 accounts of 20/s over three addresses of 30/s, of which the last one has 10/s of its own.
fn limits(failover: bool) -> Limits {
    let account = |index: usize| AccountLimits {
        limits: vec![Limit::new(20, Duration::from_secs(1), 5).unwrap()],
        address: index % ADDRESSES,
        fallbacks: if failover { (1..ADDRESSES).map(|by| (index + by) % ADDRESSES).collect() } else { vec![] },
        ..AccountLimits::default()
    };
    let window = |calls| vec![Limit::window(calls, Duration::from_secs(1), Counting::Sliding).unwrap()];
    let named = |index: usize| AddressLimits {
        name: format!("proxy-{index}"),
        own: (index == ADDRESSES - 1).then(|| window(10)),
    };
    Limits {
        accounts: (0..9).map(account).collect(),
        address: window(30),
        addresses: (0..ADDRESSES).map(named).collect(),
        ..Limits::default()
    }
}

type Calls = Arc<Mutex<Vec<(Slot, Instant)>>>;

/// Workers with an endless backlog.
struct Fleet {
    quotas: Vec<Arc<Redis>>,
    calls: Calls,
    workers: JoinSet<()>,
    limits: Limits,
    started: Instant,
}

impl Fleet {
    fn start(workers: usize, failover: bool) -> Self {
        let (prefix, limits) = (unique("addresses"), limits(failover));
        let calls = Calls::default();
        let mut fleet = JoinSet::new();
        let aliases: Aliases = (0..9).map(|index| AccountAlias::new(format!("a{index}")).unwrap()).collect();
        let source = SourceName::new("ali1688").unwrap();
        // The vendor here judges the moment at which a call leaves; a busy machine delays even that.
        let pacing = Pacing { jitter: Duration::from_millis(50), ..Pacing::default() };
        let past = Past { is_read: true, ..Past::default() };
        let url = address("WEIR_TEST_REDIS");
        let quota = || Redis::new(&url, &prefix, &source, &aliases, Plan::new(&limits, &pacing), &past).unwrap();
        let quotas: Vec<_> = (0..workers).map(|_| Arc::new(quota())).collect();
        for quota in &quotas {
            fleet.spawn(work(Arc::clone(quota), Arc::clone(&calls)));
        }
        Self { quotas, calls, workers: fleet, limits, started: Instant::now() }
    }

    fn calls_from(&self, address: usize) -> usize {
        self.calls.lock().unwrap().iter().filter(|(slot, _)| slot.address == address).count()
    }

    /// Waits until as many more calls have left from an address.
    async fn flows_from(&self, address: usize, calls: usize) {
        let before = self.calls_from(address);
        eventually("calls leave", async || (self.calls_from(address) >= before + calls).then_some(())).await;
    }

    async fn judge(mut self) {
        self.workers.shutdown().await;
        let mut calls = std::mem::take(&mut *self.calls.lock().unwrap());
        calls.sort_by_key(|call| call.1);
        for address in 0..ADDRESSES {
            for limit in self.limits.of_address(address) {
                let quota = limiter::Quota::Sliding { calls: limit.calls, window: *limit.per };
                let mut vendor = Limiter::new(quota, Duration::ZERO);
                let of_address = calls.iter().filter(|(slot, _)| slot.address == address);
                let refused = of_address.filter(|(_, at)| !vendor.admit(*at - self.started)).count();
                assert_eq!(refused, 0, "address {address}");
            }
        }
    }
}

fn cause() -> Cause {
    Cause::new("test", Timestamp::from_millis(1))
}

async fn work(quota: Arc<Redis>, calls: Calls) {
    loop {
        let slots = match quota.lease(16).await {
            Lease::Slots(slots) => slots,
            Lease::NotBefore(at) => {
                tokio::time::sleep_until(at).await;
                continue;
            }
            Lease::Nobody => panic!("nobody is disabled"),
        };
        for slot in slots {
            tokio::time::sleep_until(slot.at).await;
            let now = Instant::now();
            if slot.is_late(now) || quota.is_held(&slot) {
                quota.give_back(vec![slot]).await;
            } else {
                calls.lock().unwrap().push((slot, now));
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_address_keeps_its_limit_and_a_hold_of_one_reaches_the_fleet() {
    let fleet = Fleet::start(3, false);
    for address in 0..ADDRESSES {
        fleet.flows_from(address, 30).await;
    }
    let until = Instant::now() + Duration::from_secs(3);
    fleet.quotas[0].hold(Scope::Address(1), Hold::Until(until), &cause()).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (held, others) = (fleet.calls_from(1), fleet.calls_from(0));
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(fleet.calls_from(1), held, "nobody calls from there");
    for quota in &fleet.quotas {
        let state = quota.snapshot(0..3, Timestamp::from_millis(2));
        let reasons = state.addresses.iter().map(|address| address.held.as_ref().map(|held| &*held.cause.reason));
        assert_eq!(reasons.collect::<Vec<_>>(), [None, Some("test"), None], "all know why");
        assert_eq!(state.accounts.iter().map(|account| account.address).collect::<Vec<_>>(), [0, 1, 2]);
    }
    assert!(fleet.calls_from(0) > others + 20, "the others go on");
    fleet.flows_from(1, 30).await;
    let homes = fleet.calls.lock().unwrap().iter().all(|(slot, _)| slot.address == slot.account % ADDRESSES);
    assert!(homes, "nobody hops");
    fleet.judge().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_one_worker_releases_is_called_from_again_by_all_at_once() {
    let fleet = Fleet::start(3, false);
    fleet.flows_from(1, 30).await;
    let until = Instant::now() + Duration::from_secs(600);
    fleet.quotas[0].hold(Scope::Address(1), Hold::Until(until), &cause()).await;
    let all = |held: bool| {
        let is = |quota: &Arc<Redis>| quota.snapshot(0..0, Timestamp::from_millis(2)).addresses[1].held.is_some();
        fleet.quotas.iter().all(|quota| is(quota) == held).then_some(())
    };
    eventually("all know of the hold", async || all(true)).await;
    fleet.quotas[2].release(Scope::Address(1), Timestamp::from_millis(0)).await;
    fleet.flows_from(0, 60).await;
    assert_eq!(all(true), Some(()), "that release is older than the hold");
    fleet.quotas[1].release(Scope::Address(1), Timestamp::from_millis(1)).await;
    eventually("all know of the release", async || all(false)).await;
    fleet.flows_from(1, 30).await;
    fleet.judge().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_failover_the_accounts_of_a_held_address_call_from_another_and_come_home() {
    let fleet = Fleet::start(3, true);
    fleet.flows_from(1, 30).await;
    let until = Instant::now() + Duration::from_secs(3);
    fleet.quotas[0].hold(Scope::Address(1), Hold::Until(until), &cause()).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let before = fleet.calls.lock().unwrap().len();
    eventually("its accounts call from the next one", async || {
        let calls = fleet.calls.lock().unwrap();
        calls[before..].iter().any(|(slot, _)| slot.account % ADDRESSES == 1 && slot.address == 2).then_some(())
    })
    .await;
    assert!(fleet.calls.lock().unwrap()[before..].iter().all(|(slot, at)| slot.address != 1 || *at >= until));
    fleet.flows_from(1, 30).await;
    let calls = fleet.calls.lock().unwrap().clone();
    let last = calls.iter().rev().filter(|(slot, _)| slot.account % ADDRESSES == 1).take(20);
    assert!(last.into_iter().all(|(slot, _)| slot.address == 1), "they are home");
    fleet.judge().await;
}
