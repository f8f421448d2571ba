//! How long an express request waits until its call leaves, with nothing and with a long backlog before it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rdkafka::{
    Message as _,
    consumer::BaseConsumer,
    producer::{BaseProducer, BaseRecord, Producer as _},
};
use weir::{
    message::Observation,
    runtime::clock::{Clock, Dice},
    simulate::{self, Report},
};

use crate::{
    Options,
    log::{self, Follower},
    process::{Bench, OwnTopics, Process, Simulator},
    table::{Figure, Goal, Table},
};

/// 20 accounts of 10/s: a slot every 5 ms, and two of them and a call of 50 ms.
const GOAL_MS: f64 = 60.0;

/// For so long the calls of the backlog alone are counted.
const QUIET: Duration = Duration::from_secs(5);

const SIMULATOR: &str = "--accounts 20 --latency 50ms --absent 0 --off-shelf 0 --throttled 0 --failing 0 --broken 0 \
    --hopeless 0";
const LIMIT: &str = "limit = { calls = 10, per = \"1s\", burst = 1 }";

/// How many express requests are made, one after the other.
const SAMPLES: usize = 400;

/// Asks, and reads what comes.
struct Asker {
    topic: String,
    producer: BaseProducer,
    outcomes: BaseConsumer,
    dice: Dice,
    asked: u64,
}

impl Asker {
    async fn new(bench: &Bench, own: &OwnTopics) -> Result<Self> {
        Ok(Self {
            topic: own.topics.express(&bench.source),
            // Nothing is gathered: each leaves at once.
            producer: log::settings(&bench.kafka.brokers).set("linger.ms", "0").create()?,
            outcomes: Follower::of(&bench.kafka, &[own.topics.results()]).await?.into_inner(),
            dice: Dice::seeded(9),
            asked: 0,
        })
    }

    /// Makes one request at a time, at odd moments; of each, the milliseconds until its call left, the way over Kafka
    /// included.
    fn ask(&mut self, count: usize, fleet: &mut [Process]) -> Result<Vec<f64>> {
        (0..count).map(|_| self.ask_once(fleet)).collect()
    }

    fn ask_once(&mut self, fleet: &mut [Process]) -> Result<f64> {
        // What else is there is read meanwhile.
        self.read_until(Duration::from_millis(20).mul_f64(1.0 + 5.0 * self.dice.fraction()), |_| false)?;
        self.asked += 1;
        let id = simulate::sample(1_000 + self.asked).next().context("an item")?.to_string();
        let at = Clock::System.now().as_millis();
        let request = format!("{{\"item\":\"{id}\",\"requested_at\":{at}}}");
        log::send(&self.producer, BaseRecord::to(&self.topic).key(id.as_bytes()).payload(request.as_bytes()))?;
        self.producer.flush(log::PATIENCE)?;
        let since = Instant::now();
        loop {
            let found = self.read_until(Duration::from_secs(1), |seen| seen.item.as_str() == id)?;
            if let Some(seen) = found {
                return Ok((seen.fetched_at.as_millis() - i64::from(seen.latency_ms) - at) as f64);
            }
            fleet.iter_mut().try_for_each(Process::check)?;
            ensure!(since.elapsed() < log::PATIENCE, "an express request has no result");
        }
    }

    /// Reads for so long, or until a result is the one.
    fn read_until(&self, within: Duration, mut is: impl FnMut(&Observation) -> bool) -> Result<Option<Observation>> {
        let since = Instant::now();
        while let Some(left) = within.checked_sub(since.elapsed()) {
            let Some(message) = self.outcomes.poll(left) else { return Ok(None) };
            let seen = serde_json::from_slice(message?.payload().unwrap_or_default())?;
            if is(&seen) {
                return Ok(Some(seen));
            }
        }
        Ok(None)
    }
}

/// What the vendor has counted after this, and its calls a second meanwhile.
async fn rate(bench: &Bench, vendor: &Simulator, during: impl AsyncFnOnce() -> Result<()>) -> Result<(Report, f64)> {
    let (before, since) = (vendor.stats(&bench.http).await?.served, Instant::now());
    during().await?;
    let after = vendor.stats(&bench.http).await?;
    let served = after.served - before;
    Ok((after, served as f64 / since.elapsed().as_secs_f64()))
}

/// What so many of a hundred are not above.
fn quantile(waits: &mut [f64], percent: usize) -> f64 {
    waits.sort_by(f64::total_cmp);
    let index = (waits.len() * percent).div_ceil(100).saturating_sub(1);
    waits.get(index).copied().unwrap_or_default()
}

pub async fn measure(bench: &Bench, options: &Options, workers: usize, table: &mut Table) -> Result<()> {
    println!("Express: {} IDs wait, {workers} workers, 200 calls/s", options.backlog);
    let own = bench.topics_of(&format!("express-{workers}"), std::slice::from_ref(&bench.source), 16).await?;
    let simulator = bench.simulator(SIMULATOR)?;
    let config = format!(
        "{LIMIT}\n[redis]\nurl = {:?}\n[quota]\nstore = \"redis\"\nprefix = \"{}-{workers}\"\n",
        options.redis,
        own.prefix()
    );
    let config = if workers == 1 { LIMIT } else { &config };
    let names: Vec<String> = (0..workers).map(|worker| format!("express-{worker}")).collect();
    let fleet = names.iter().map(|name| bench.fetch_as(name, &simulator, &own, config));
    let mut fleet = fleet.collect::<Result<Vec<_>>>()?;
    for worker in &mut fleet {
        worker.says("fetching").await?;
    }
    let mut asker = Asker::new(bench, &own).await?;
    // The first ones wait until all partitions are assigned.
    asker.ask(20, &mut fleet)?;
    let mut alone = asker.ask(options.scaled(SAMPLES), &mut fleet)?;
    let bulk = own.topics.requests(&bench.source);
    log::produce_ids(&bench.kafka.brokers, &bulk, simulate::sample(8).take(options.backlog))?;
    // All buffers on the way are full by then.
    asker.read_until(Duration::from_secs(5), |_| false)?;
    let (before, quiet) = rate(bench, &simulator, async || asker.read_until(QUIET, |_| false).map(drop)).await?;
    let mut waits = Vec::new();
    let ask = async || {
        waits = asker.ask(options.scaled(SAMPLES), &mut fleet)?;
        Ok(())
    };
    let (after, busy) = rate(bench, &simulator, ask).await?;
    ensure!(after.served < options.backlog as u64, "the backlog is done before the measurement: give it more IDs");
    ensure!(after.served - before.served > waits.len() as u64, "nothing of the backlog was called for");

    let what = if workers == 1 { "express waits, p99, one worker" } else { "express waits, p99, workers that share" };
    for (what, percent, goal) in [(what, 99, Goal::AtMost(GOAL_MS)), ("  p50", 50, Goal::None)] {
        let (value, floor) = (Some(quantile(&mut waits, percent)), Some(quantile(&mut alone, percent)));
        table.add(Figure { what, unit: "ms", goal, value, floor });
    }
    let what = "  calls a second meanwhile; the floor: without";
    table.add(Figure { what, unit: "/s", goal: Goal::AtLeast(0.97 * quiet), value: Some(busy), floor: Some(quiet) });
    let what = "  refused by the vendor";
    let refused = Some(after.violations as f64);
    table.add(Figure { what, unit: "", goal: Goal::AtMost(0.0), value: refused, floor: None });
    own.delete().await
}
