//! How many calls are left where one takes 40 requests: deploy/local/bench merge starts the servers and this.

#![allow(missing_docs, reason = "a benchmark, nobody's library")]
#![allow(dead_code, reason = "it shares files with other benchmarks, and needs less of them")]
#![allow(clippy::print_stdout, reason = "its table is for people")]
#![allow(clippy::disallowed_methods, reason = "it measures real time, and its servers come from the environment")]
#![allow(clippy::cast_precision_loss, reason = "counts as figures")]

#[path = "../log.rs"]
mod log;
#[path = "../machine.rs"]
mod machine;
#[path = "../process.rs"]
mod process;
#[path = "../table.rs"]
mod table;
#[path = "../zipf.rs"]
mod zipf;

use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use weir::simulate;

use self::{
    log::Follower,
    process::{Bench, Process},
    table::{Figure, Goal, Table},
    zipf::Zipf,
};

/// The most items of a call of the simulated reseller.
const BATCH: f64 = 40.0;

/// How many requests come at once, and how long nothing comes then.
const BURST: usize = 5_000;
const PAUSE: Duration = Duration::from_millis(250);

/// Measures how many calls a vendor that takes 40 items a call gets.
#[derive(Parser)]
#[command(name = "deploy/local/bench merge")]
struct Options {
    /// A twentieth of everything: to see that it works, not for figures.
    #[arg(long)]
    quick: bool,
    /// Whatever cargo says to a benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

/// One measurement.
struct Run {
    what: &'static str,
    /// TOML of the source.
    config: &'static str,
    /// The items that are asked for, in order.
    items: Vec<u64>,
    /// Whether they come in bursts, or all wait before the first call.
    bursts: bool,
}

/// Calls and failed requests.
async fn run(bench: &Bench, Run { what, config, items, bursts }: Run) -> Result<(f64, usize)> {
    println!("{what}: {} requests", items.len());
    let own = bench.topics(what).await?;
    let keys = bench.folder.path().join("keys.toml");
    let simulator = bench.simulator(&format!(
        "--no-limit --reseller-keys 10 --write-reseller-keys {} --latency 50ms --absent 0.05 --off-shelf 0 --throttled 0 \
         --failing 0 --broken 0 --hopeless 0",
        keys.display()
    ))?;
    let source = format!(
        "[[source]]\nname = \"ali1688\"\nkind = \"taobao_reseller\"\nurl = \"{}/ibrad/taobao/item_get/\"\n\
         accounts_file = \"keys.toml\"\n{config}\n",
        simulator.url
    );
    let outcomes = Follower::of(&bench.kafka, &[own.topics.results(), own.topics.failures()]).await?;
    let (brokers, topic) = (&bench.kafka.brokers, own.topics.requests(&bench.source));
    let start = || bench.fetch_from(&own, &source);
    let mut fetch: Process;
    if bursts {
        fetch = start()?;
        fetch.says("fetching").await?;
        for burst in items.chunks(BURST) {
            log::produce_ids(brokers, &topic, burst.iter().copied())?;
            tokio::time::sleep(PAUSE).await;
        }
    } else {
        log::produce_ids(brokers, &topic, items.iter().copied())?;
        fetch = start()?;
    }
    let mut failed = 0;
    outcomes.read(
        items.len(),
        || fetch.check(),
        |message| {
            use rdkafka::Message as _;
            failed += usize::from(message.topic() == own.topics.failures());
        },
    )?;
    let stats = simulator.stats(&bench.http).await?;
    let gateway = stats.gateways.get("reseller").context("nobody called the reseller")?;
    own.delete().await?;
    Ok((gateway.item_calls as f64, failed))
}

async fn measure(options: &Options, table: &mut Table) -> Result<()> {
    let bench = Bench::new()?;
    let scaled = |full: usize| if options.quick { full / 20 } else { full };
    let sample = |count: usize| simulate::sample(5).take(count).collect::<Vec<u64>>();
    let (count, mut failures) = (scaled(100_000), 0);

    let unlimited = "unlimited = true";
    let (calls, failed) =
        run(&bench, Run { what: "bursts", config: unlimited, items: sample(count), bursts: true }).await?;
    failures += failed;
    let (what, goal) = ("fewer calls than requests, bursts of 5,000", Goal::AtLeast(95.0));
    let (saved, most) = (100.0 * (1.0 - calls / count as f64), 100.0 * (1.0 - 1.0 / BATCH));
    table.add(Figure { what, unit: "%", goal, value: Some(saved), floor: Some(most) });

    let limited = "limit = { calls = 8, per = \"1s\", burst = 1 }";
    let (calls, failed) =
        run(&bench, Run { what: "load", config: limited, items: sample(count), bursts: false }).await?;
    failures += failed;
    let (what, goal) = ("how full calls are, all waiting, 80 calls/s", Goal::AtLeast(95.0));
    let fill = 100.0 * count as f64 / (calls * BATCH);
    table.add(Figure { what, unit: "%", goal, value: Some(fill), floor: Some(100.0) });

    let (count, items) = (scaled(1_000_000), scaled(20_000));
    let (ids, zipf) = (sample(items), Zipf::new(items, 5));
    let asked = (0..count).map(|_| ids[zipf.next()]).collect();
    let cached = "unlimited = true\n[source.cache]\npreset = \"1688\"";
    let (calls, failed) = run(&bench, Run { what: "popular", config: cached, items: asked, bursts: false }).await?;
    failures += failed;
    let (what, goal) = ("fewer calls than requests, with the cache, Zipf 1.0", Goal::AtLeast(99.0));
    let (saved, most) = (100.0 * (1.0 - calls / count as f64), 100.0 * (1.0 - items as f64 / BATCH / count as f64));
    table.add(Figure { what, unit: "%", goal, value: Some(saved), floor: Some(most) });

    let (what, goal) = ("  failures", Goal::AtMost(0.0));
    table.add(Figure { what, unit: "", goal, value: Some(failures as f64), floor: None });
    Ok(())
}

fn main() -> Result<()> {
    let options = Options::parse();
    table::measured(async |table| measure(&options, table).await)
}
