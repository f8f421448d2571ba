//! Memory with a long backlog under a small quota, and how well that quota is kept and used.

use std::time::{Duration, Instant};

use anyhow::Result;
use weir::simulate;

use crate::{
    log,
    machine::memory_of,
    process::Bench,
    table::{Figure, Goal, Table},
};

/// The real limit of 100 accounts, on both sides.
const SIMULATOR: &str = "--accounts 100 --rate 10 --burst 5 --latency 20ms \
    --absent 0 --off-shelf 0 --throttled 0 --failing 0 --broken 0 --hopeless 0";
const LIMIT: &str = "limit = { calls = 10, per = \"1s\", burst = 5 }";
const ALLOWED_PER_SECOND: f64 = 1_000.0;

/// How long fetch is watched.
const WATCH: Duration = Duration::from_secs(30);

pub async fn measure(bench: &Bench, count: usize, table: &mut Table) -> Result<()> {
    println!("Memory: {count} IDs wait, 100 accounts of 10 calls/s, {WATCH:?}");
    let own = bench.topics("memory").await?;
    let simulator = bench.simulator(SIMULATOR)?;

    // The floor is the same process before anybody asks it for anything.
    let mut fetch = bench.fetch(&simulator, &own, LIMIT)?;
    tokio::time::sleep(Duration::from_secs(8)).await;
    fetch.check()?;
    let idle = memory_of(fetch.pid())?;
    log::produce_ids(&bench.kafka.brokers, &own.topics.requests(&bench.source), simulate::sample(2).take(count))?;

    let (since, before) = (Instant::now(), simulator.stats(&bench.http).await?);
    tokio::time::sleep(WATCH).await;
    let (elapsed, after) = (since.elapsed(), simulator.stats(&bench.http).await?);
    fetch.check()?;
    let memory = memory_of(fetch.pid())?;
    drop(fetch);

    #[allow(clippy::cast_precision_loss, reason = "a count of calls")]
    let (served, violations) = ((after.served - before.served) as f64, after.violations as f64);
    let used = served / (ALLOWED_PER_SECOND * elapsed.as_secs_f64());
    let megabytes =
        |what, value, floor| Figure { what, unit: "MB", goal: Goal::AtMost(100.0), value: Some(value), floor };
    table.add(megabytes("resident, IDs waiting", memory.now, Some(idle.now)));
    table.add(megabytes("resident at most (peak)", memory.peak, Some(idle.peak)));
    table.add(Figure {
        what: "calls over the quota",
        unit: "",
        goal: Goal::AtMost(0.0),
        value: Some(violations),
        floor: None,
    });
    let used =
        Figure { what: "share of the quota used", unit: "%", goal: Goal::None, value: Some(used * 100.0), floor: None };
    table.add(used);
    own.delete().await
}
