//! 10,000 accounts in one process: memory, and time per slot, without any calls.

use std::{
    sync::Arc,
    time::{Duration, Instant as WallClock},
};

use tokio::runtime::Builder;
use weir::{
    message::{AccountAlias, SourceName},
    quota::{
        Lease, Limit, Pacing, Past, Quota,
        memory::Memory,
        plan::{Limits, Plan},
        redis::Redis,
        timetable::{Granted, Timetable},
    },
    runtime::clock::Clock,
};

use crate::process;

const ACCOUNTS: usize = 10_000;

/// How many slots the arithmetic alone is timed for.
const SLOTS: u64 = 1_000_000;
/// 2023-11-14T22:13:20Z, in microseconds.
const START: u64 = 1_700_000_000_000_000;

/// Times the arithmetic alone, as a backlog without an end asks for slots, and prints it.
pub fn bare() {
    for count in [1, 100, ACCOUNTS] {
        let limits = Limits::of_accounts(vec![Some(Limit::new(10, Duration::from_secs(1), 5).unwrap()); count]);
        let mut table = Timetable::new(&Plan::new(&limits, &Pacing::default()), START);
        let (mut now, mut slots, since) = (START, 0, WallClock::now());
        while slots < SLOTS {
            match table.lease(64, now, now + 100_000) {
                Granted::Slots(granted) => slots += granted.len() as u64,
                Granted::NotBefore(at) => now = at,
                Granted::Nobody => panic!("no account is disabled"),
            }
        }
        let each = since.elapsed().as_secs_f64() * 1e6 / slots as f64;
        let verdict = if each < 1.0 { "" } else { "  MISSED: under 1 µs" };
        println!("quota arithmetic, {count:>6} accounts: {each:.3} µs a slot{verdict}");
    }
}

/// Leases all slots that 10,000 accounts of 10/s have for `span`, from memory and from Redis, and prints it.
pub fn run(redis: &str, span: Duration) {
    let limit = Limit::new(10, Duration::from_secs(1), 5).unwrap();
    let limits = Limits::of_accounts(vec![Some(limit); ACCOUNTS]);
    let aliases: Arc<[AccountAlias]> =
        (0..ACCOUNTS).map(|index| AccountAlias::new(format!("a{index}")).unwrap()).collect();
    let runtime = Builder::new_multi_thread().worker_threads(1).thread_name("worker").enable_all().build().unwrap();
    let before = process::memory_kib();
    let memory = Memory::with_limits(&limits, &Pacing::default(), &Clock::System);
    let kib = process::memory_kib().saturating_sub(before);
    print("memory", kib, &runtime.block_on(lease(&memory, span)));
    drop(memory);
    let source = SourceName::new("ali1688").unwrap();
    let prefix = format!("bench-{}", uuid::Uuid::now_v7());
    let before = process::memory_kib();
    runtime.block_on(async {
        let past = Past { is_read: true, ..Past::default() };
        let plan = Plan::new(&limits, &Pacing::default());
        let quota = Redis::new(redis, &prefix, &source, &aliases, plan, &past).unwrap();
        let leased = lease(&quota, span).await;
        print("Redis", process::memory_kib().saturating_sub(before), &leased);
    });
}

struct Leased {
    slots: u64,
    asked: u64,
    /// In `lease` alone.
    busy: Duration,
    cpu: Duration,
    span: Duration,
}

async fn lease(quota: &dyn Quota, span: Duration) -> Leased {
    // Until the first slots come: Redis has to be told of 10,000 accounts.
    while !matches!(quota.lease(1).await, Lease::Slots(_)) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (since, cpu) = (WallClock::now(), process::cpu("vendor"));
    let mut leased = Leased { slots: 0, asked: 0, busy: Duration::ZERO, cpu: Duration::ZERO, span };
    while since.elapsed() < span {
        let asked = WallClock::now();
        let lease = quota.lease(64).await;
        leased.busy += asked.elapsed();
        leased.asked += 1;
        match lease {
            Lease::Slots(slots) => leased.slots += slots.len() as u64,
            Lease::NotBefore(at) => {
                let now = tokio::time::Instant::now();
                tokio::time::sleep_until(at.clamp(now + Duration::from_millis(1), now + span)).await;
            }
            Lease::Nobody => panic!("no account is disabled"),
        }
    }
    leased.cpu = process::cpu("vendor").saturating_sub(cpu);
    leased.span = since.elapsed();
    leased
}

fn print(store: &str, kib: u64, leased: &Leased) {
    let slots = (leased.slots as f64).max(1.0);
    println!(
        "10,000 accounts of 10/s, slots alone, {store:<6}: {:>9.0} slots/s, {:.2} µs in lease and {:.2} µs CPU a slot, \
         {:.1} MiB",
        leased.slots as f64 / leased.span.as_secs_f64(),
        leased.busy.as_secs_f64() * 1e6 / slots,
        leased.cpu.as_secs_f64() * 1e6 / slots,
        kib as f64 / 1024.0,
    );
    assert!(leased.asked > 0, "nothing was measured");
}
