//! Workers that call as fast as their slots allow, and what was seen of it.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    runtime::Builder,
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};
use weir::{
    message::{AccountAlias, ItemId, Request},
    platform::Source,
    quota::{Lease, Limit, Pacing, Past, Quota, Slot, memory::Memory, plan::Plan, redis::Redis},
    runtime::clock::Clock,
};

use crate::{
    floor::{Floor, Pings},
    process,
    vendor::{THREADS, Vendor},
};

/// Before the measurement: lost state is learned, connections are open.
const WARM_UP: Duration = Duration::from_secs(8);
/// How long the last calls may take to end.
const DRAIN: Duration = Duration::from_secs(2);
/// Calls under way per worker, at most.
const IN_FLIGHT: usize = 2_000;

/// Who says when to call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slots {
    /// Nobody: an even loop at the vendor's rate less the margin, with a bare HTTP client.
    EvenLoop,
    Memory,
    Redis,
}

/// Who has something to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Demand {
    /// Everybody, without an end.
    Endless,
    /// The first one without an end, each of the others one call a second.
    OneOfAll,
}

#[derive(Clone, Debug)]
pub struct Row {
    pub name: &'static str,
    pub workers: usize,
    pub slots: Slots,
    pub accounts: u32,
    /// Of each account.
    pub limit: Limit,
    pub demand: Demand,
    /// The share of the quota that is to be used at least, in percent; `None` = it is there to be compared with.
    pub goal: Option<f64>,
}

/// What was seen from the end of the warm-up on.
pub struct Measured {
    pub span: Duration,
    /// Calls that left.
    pub calls: u64,
    /// Calls that arrived within the quota, as the vendor saw them.
    pub admitted: u64,
    /// By the vendor, as over the quota.
    pub refused: u64,
    /// Slots that were too late to be used.
    pub missed: u64,
    /// Asked of Redis, and by the first worker alone.
    pub operations: u64,
    pub operations_first: u64,
    /// Calls of the first worker alone.
    pub calls_first: u64,
    /// How long leases took, in order.
    reserves: Vec<Duration>,
    pub cpu: Duration,
    /// With Redis: what a lease cannot be quicker than.
    pub floor: Option<Floor>,
}

impl Measured {
    pub fn reserve(&self, share: f64) -> Option<Duration> {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index within the list")]
        let at = (self.reserves.len() as f64 * share) as usize;
        self.reserves.get(at.min(self.reserves.len().saturating_sub(1))).copied()
    }
}

#[derive(Default)]
struct Counters {
    calls: AtomicU64,
    /// Of the first worker.
    calls_first: AtomicU64,
    missed: AtomicU64,
    stop: AtomicBool,
}

/// A worker's side.
struct Worker {
    source: Source,
    bare: reqwest::Client,
    counters: Arc<Counters>,
    number: usize,
}

pub fn run(row: &Row, redis: &str, span: Duration) -> Measured {
    let vendor = Vendor::start(row.accounts, &row.limit);
    let runtime = Builder::new_multi_thread().worker_threads(2).thread_name("worker").enable_all().build().unwrap();
    let measured = runtime.block_on(measure(row, redis, span, &vendor));
    runtime.shutdown_background();
    vendor.stop();
    measured
}

async fn measure(row: &Row, redis: &str, span: Duration, vendor: &Vendor) -> Measured {
    let counters = Arc::new(Counters::default());
    let prefix = format!("bench-{}", uuid::Uuid::now_v7());
    let (mut workers, mut fleet, mut reserves) = (JoinSet::new(), Vec::new(), JoinSet::new());
    for number in 0..row.workers {
        let source = vendor.source(&row.limit);
        let (counters, bare) = (Arc::clone(&counters), reqwest::Client::builder().no_proxy().build().unwrap());
        match row.slots {
            Slots::EvenLoop => {
                let worker = Worker { source, bare, counters, number };
                workers.spawn(worker.even(row.clone()));
            }
            Slots::Memory => {
                let quota = Arc::new(Memory::with_limits(&source.quota(), &Pacing::default(), &Clock::System));
                let worker = Worker { source, bare, counters, number };
                reserves.spawn(worker.call(quota, row.demand));
            }
            Slots::Redis => {
                let aliases: Arc<[AccountAlias]> = source.accounts.iter().map(|one| one.alias.clone()).collect();
                let plan = Plan::new(&source.quota(), &Pacing::default());
                let past = Past { is_read: true, ..Past::default() };
                let quota = Redis::new(redis, &prefix, &source.name, &aliases, plan, &past).unwrap();
                let quota = Arc::new(quota);
                fleet.push(Arc::clone(&quota));
                let worker = Worker { source, bare, counters, number };
                reserves.spawn(worker.call(quota, row.demand));
            }
        }
    }
    sleep(WARM_UP).await;
    let operations = |workers: usize| fleet.iter().take(workers).map(|quota| quota.counts().operations).sum::<u64>();
    let seen = || {
        let Counters { calls, calls_first, missed, .. } = &*counters;
        [calls.load(Relaxed), calls_first.load(Relaxed), missed.load(Relaxed), operations(usize::MAX), operations(1)]
    };
    let pings = if row.slots == Slots::Redis { Some(Pings::connect(redis).await) } else { None };
    vendor.simulator.reset();
    let (since, before, cpu) = (Instant::now(), seen(), process::cpu(THREADS));
    let floor = match pings {
        Some(pings) => Some(pings.measure(span).await),
        None => None,
    };
    sleep_until(since + span).await;
    let (span, after, cpu) = (since.elapsed(), seen(), process::cpu(THREADS).saturating_sub(cpu));
    let admitted = vendor.admitted();
    let [calls, calls_first, missed, operations, operations_first] =
        std::array::from_fn(|index| after[index] - before[index]);
    counters.stop.store(true, Relaxed);
    let mut times = Vec::new();
    while let Some(ended) = reserves.join_next().await {
        times.extend(ended.unwrap());
    }
    workers.join_all().await;
    sleep(DRAIN).await;
    if row.slots == Slots::Redis {
        times = fleet.iter().flat_map(|quota| quota.counts().leases).collect();
    }
    times.sort_unstable();
    Measured {
        span,
        calls,
        admitted,
        refused: vendor.simulator.stats().violations,
        missed,
        operations,
        operations_first,
        calls_first,
        reserves: times,
        cpu,
        floor,
    }
}

impl Worker {
    /// Calls at the times of the quota; how long each lease took.
    async fn call(self, quota: Arc<dyn Quota>, demand: Demand) -> Vec<Duration> {
        let (mut times, mut calls, mut slots) = (VecDeque::new(), JoinSet::new(), VecDeque::<Slot>::new());
        let is_quiet = demand == Demand::OneOfAll && self.number > 0;
        let worker = Arc::new(self);
        let mut item = u64::try_from(worker.number).unwrap_or_default();
        while !worker.counters.stop.load(Relaxed) {
            while calls.try_join_next().is_some() {}
            if calls.len() >= IN_FLIGHT {
                calls.join_next().await;
            }
            let Some(slot) = slots.pop_front() else {
                let asked = Instant::now();
                let lease = quota.lease(if is_quiet { 1 } else { 64 }).await;
                if times.len() == 100_000 {
                    times.pop_front();
                }
                times.push_back(asked.elapsed());
                match lease {
                    Lease::Slots(leased) => slots.extend(leased),
                    Lease::NotBefore(at) => sleep_until(at.min(asked + Duration::from_secs(1))).await,
                    Lease::Nobody => panic!("no account is disabled"),
                }
                continue;
            };
            sleep_until(slot.at).await;
            if slot.is_late(Instant::now()) || quota.is_held(&slot) {
                worker.counters.missed.fetch_add(1, Relaxed);
                quota.give_back(vec![slot]).await;
                continue;
            }
            item += 16;
            worker.counters.calls.fetch_add(1, Relaxed);
            worker.counters.calls_first.fetch_add(u64::from(worker.number == 0), Relaxed);
            calls.spawn(Arc::clone(&worker).exchange(slot.account, item));
            if is_quiet {
                sleep(Duration::from_secs(1)).await;
            }
        }
        calls.shutdown().await;
        times.into()
    }

    /// Calls evenly, one account after the other.
    async fn even(self, row: Row) {
        let accounts = f64::from(row.accounts);
        let rate = f64::from(row.limit.calls) / row.limit.per.as_secs_f64() * accounts;
        let spacing = Duration::from_secs_f64(1.001 / rate);
        let worker = Arc::new(self);
        let (mut calls, mut at, mut item) = (JoinSet::new(), Instant::now(), 0_u64);
        while !worker.counters.stop.load(Relaxed) {
            while calls.try_join_next().is_some() {}
            if calls.len() >= IN_FLIGHT {
                calls.join_next().await;
            }
            at += spacing;
            sleep_until(at).await;
            item += 1;
            worker.counters.calls.fetch_add(1, Relaxed);
            let account = usize::try_from(item % u64::from(row.accounts)).unwrap_or_default();
            calls.spawn(Arc::clone(&worker).bare(account, item));
        }
        calls.shutdown().await;
    }

    async fn exchange(self: Arc<Self>, account: usize, item: u64) {
        let request = Request::new(ItemId::new((610_000_000_000 + item).to_string()).unwrap());
        let account = &self.source.accounts[account];
        let exchange = self.source.vendor.prepare(account, &[&request], Clock::System.now());
        let reply = self.source.client.exchange(&exchange).await.unwrap();
        let read = self.source.vendor.interpret(&[&request], &reply);
        drop(read);
    }

    async fn bare(self: Arc<Self>, account: usize, item: u64) {
        let request = Request::new(ItemId::new((610_000_000_000 + item).to_string()).unwrap());
        let account = &self.source.accounts[account];
        let exchange = self.source.vendor.prepare(account, &[&request], Clock::System.now());
        let reply = self.bare.post(&exchange.url).form(exchange.form()).send().await.unwrap();
        reply.bytes().await.unwrap();
    }
}
