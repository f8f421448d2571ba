//! How many calls are left of how many requests, as the vendor counts them.

use anyhow::{Context, Result};
use rdkafka::{
    Message as _,
    producer::{BaseRecord, Producer as _},
};
use weir::simulate;

use crate::{
    Options,
    log::{self, Follower},
    process::{Bench, OwnTopics, Process, Simulator},
    table::{Figure, Goal, Table},
    zipf::Zipf,
};

const SIMULATOR: &str =
    "--no-limit --latency 50ms --absent 0 --off-shelf 0 --throttled 0 --failing 0 --broken 0 --hopeless 0";

/// Requests of one key at once.
const AT_ONCE: usize = 10_000;

fn cached(options: &Options, own: &str) -> String {
    let redis = &options.redis;
    format!(
        "unlimited = true\n[source.cache]\npreset = \"1688\"\n[redis]\nurl = {redis:?}\n[cache]\nmemory = \"256MiB\"\n\
         prefix = \"bench-{own}-{}\"\n",
        std::process::id()
    )
}

/// Asks, each on any partition: no producer does the cache a favour.
fn ask(bench: &Bench, topic: &str, items: impl Iterator<Item = u64>) -> Result<()> {
    let producer = log::producer(&bench.kafka.brokers)?;
    for (number, item) in items.enumerate() {
        let (key, item) = (number.to_string(), item.to_string());
        log::send(&producer, BaseRecord::to(topic).key(key.as_bytes()).payload(item.as_bytes()))?;
    }
    producer.flush(log::PATIENCE).context("writing the requests")
}

/// Outcomes by the way that they came.
#[derive(Default)]
struct Ends {
    called: usize,
    cached: usize,
    failed: usize,
}

fn read(outcomes: &Follower, count: usize, fleet: &mut [Process]) -> Result<Ends> {
    let mut ends = Ends::default();
    outcomes.read(
        count,
        || fleet.iter_mut().try_for_each(Process::check),
        |message| {
            let value = message.payload().unwrap_or_default();
            let has = |text: &str| value.windows(text.len()).any(|window| window == text.as_bytes());
            match (has("\"via\":\"call\""), has("\"via\":\"cache\"")) {
                (true, _) => ends.called += 1,
                (_, true) => ends.cached += 1,
                _ => ends.failed += 1,
            }
        },
    )?;
    Ok(ends)
}

/// Runs `workers` before the requests come, and reads all outcomes; the calls that the vendor has counted.
async fn run(
    bench: &Bench,
    own: &OwnTopics,
    (simulator, config): (&Simulator, &str),
    workers: usize,
    items: impl Iterator<Item = u64>,
    count: usize,
) -> Result<(u64, Ends)> {
    let outcomes = Follower::of(&bench.kafka, &[own.topics.results(), own.topics.failures()]).await?;
    let names: Vec<String> = (0..workers).map(|worker| format!("bench-{worker}")).collect();
    let fleet = names.iter().map(|name| bench.fetch_as(name, simulator, own, config));
    let mut fleet = fleet.collect::<Result<Vec<_>>>()?;
    for worker in &mut fleet {
        worker.says("connected to Redis for the cache").await?;
        worker.says("fetching").await?;
    }
    ask(bench, &own.topics.requests(&bench.source), items)?;
    let ends = read(&outcomes, count, &mut fleet)?;
    Ok((simulator.stats(&bench.http).await?.served, ends))
}

/// Many requests for few items, over two processes.
pub async fn popular(bench: &Bench, options: &Options, table: &mut Table) -> Result<()> {
    let (count, items) = (options.scaled(options.requests), options.scaled(options.items));
    println!("Hits: {count} requests for {items} items, Zipf 1.0, 2 processes, any partition");
    let own = bench.topics("popular").await?;
    let simulator = bench.simulator(SIMULATOR)?;
    let (ids, zipf): (Vec<u64>, _) = (simulate::sample(3).take(items).collect(), Zipf::new(items, 3));
    let asked = (0..count).map(|_| ids[zipf.next()]);
    let config = cached(options, "popular");
    let (calls, ends) = run(bench, &own, (&simulator, &config), 2, asked, count).await?;
    let hits = (count as f64 - calls as f64) * 100.0 / count as f64;
    let (what, goal) = ("requests without a call, Zipf 1.0", Goal::AtLeast(95.0));
    table.add(Figure { what, unit: "%", goal, value: Some(hits), floor: None });
    let what = "  calls for them; the floor: one an item";
    table.add(Figure { what, unit: "", goal: Goal::None, value: Some(calls as f64), floor: Some(items as f64) });
    let (what, goal) = ("  failures", Goal::AtMost(0.0));
    table.add(Figure { what, unit: "", goal, value: Some(ends.failed as f64), floor: None });
    own.delete().await
}

/// Many requests for one item at once.
pub async fn one_key(bench: &Bench, options: &Options, workers: usize, table: &mut Table) -> Result<()> {
    println!("Single flight: {AT_ONCE} requests for one item, {workers} processes, any partition");
    let own = bench.topics(&format!("one-{workers}")).await?;
    let simulator = bench.simulator(SIMULATOR)?;
    let item = simulate::sample(4).next().context("an item")?;
    let config = cached(options, &format!("one-{workers}"));
    let asked = std::iter::repeat_n(item, AT_ONCE);
    let (calls, _) = run(bench, &own, (&simulator, &config), workers, asked, AT_ONCE).await?;
    let (what, most) = if workers == 1 {
        ("calls for one item, 10,000 requests, 1 process", 1.0)
    } else {
        ("  the same with 4 processes", 2.0)
    };
    table.add(Figure { what, unit: "", goal: Goal::AtMost(most), value: Some(calls as f64), floor: Some(1.0) });
    own.delete().await
}
