//! Outcomes per second and CPU per ID, without a quota, and what the libraries alone need for the same.

use std::time::{Duration, Instant};

use anyhow::Result;
use rdkafka::Message as _;
use weir::{fetch, simulate};

use crate::{
    floor,
    log::{self, Copied, Follower},
    machine::Cost,
    process::Bench,
    table::{Figure, Goal, Table},
};

const SIMULATOR: &str =
    "--no-limit --latency 20ms --absent 0 --off-shelf 0 --throttled 0 --failing 0 --broken 0 --hopeless 0";

/// How many results the Kafka floor repeats: enough that they do not compress like one.
const SAMPLE: usize = 1_000;

/// A run of `weir fetch` as a reader of its outcomes sees it.
struct Run {
    /// From the first outcome to the last.
    wall: Duration,
    /// Outcomes that are no results: a machine that is too busy lets calls time out.
    failures: u32,
    cpu: Duration,
    simulator_cpu: Duration,
    sample: Vec<Copied>,
}

pub async fn measure(bench: &Bench, count: usize, table: &mut Table) -> Result<()> {
    println!("Throughput: {count} IDs, 8 partitions, the vendor answers after 20 ms, no quota");
    let own = bench.topics("throughput").await?;
    let (requests, scratch) = (own.topics.requests(&bench.source), own.topics.dead());
    let ids: Vec<u64> = simulate::sample(1).take(count).collect();
    log::produce_ids(&bench.kafka.brokers, &requests, ids.iter().copied())?;
    let simulator = bench.simulator(SIMULATOR)?;

    println!("  weir fetch …");
    let outcomes = Follower::of(&bench.kafka, &[own.topics.results(), own.topics.failures()]).await?;
    let mut fetch = bench.fetch(&simulator, &own, "")?;
    let before = simulator.process.cpu()?;
    let (mut first, mut sample, mut failures) = (None, Vec::new(), 0_u32);
    let failed = own.topics.failures();
    outcomes.read(
        count,
        || fetch.check(),
        |message| {
            first.get_or_insert_with(Instant::now);
            failures += u32::from(message.topic() == failed);
            if sample.len() < SAMPLE {
                sample.push(Copied::of(message));
            }
        },
    )?;
    let wall = first.map_or(Duration::ZERO, |first| first.elapsed());
    let run = Run {
        failures,
        wall,
        cpu: fetch.cpu()?,
        simulator_cpu: simulator.process.cpu()?.saturating_sub(before),
        sample,
    };
    drop((fetch, outcomes));

    println!("  the floor: bare reqwest, bare rdkafka …");
    let http = floor::http(bench, &simulator, &ids, fetch::Config::default().calls_in_flight).await?;
    let kafka = floor::kafka(bench, &requests, &scratch, count, &run.sample).await?;
    report(table, count, &run, http, kafka);
    own.delete().await
}

fn report(table: &mut Table, count: usize, run: &Run, http: Cost, kafka: Cost) {
    #[allow(clippy::cast_precision_loss, reason = "a count of IDs")]
    let count = count as f64;
    let rate = |wall: Duration| count / wall.as_secs_f64().max(1e-9);
    let each = |cpu: Duration| cpu.as_secs_f64() * 1e6 / count;
    table.add(Figure {
        what: "outcomes, read_committed",
        unit: "/s",
        goal: Goal::AtLeast(6_000.0),
        value: Some(rate(run.wall)),
        floor: Some(rate(http.wall + kafka.wall)),
    });
    table.add(Figure {
        what: "  failures among them",
        unit: "",
        goal: Goal::AtMost(0.0),
        value: Some(f64::from(run.failures)),
        floor: None,
    });
    table.add(Figure {
        what: "CPU of fetch per ID",
        unit: "µs",
        goal: Goal::AtMost(130.0),
        value: Some(each(run.cpu)),
        floor: Some(each(http.cpu + kafka.cpu)),
    });
    table.explain("  of the floor: bare reqwest", "µs", each(http.cpu));
    table.explain("  of the floor: bare rdkafka", "µs", each(kafka.cpu));
    table.add(Figure {
        what: "CPU of the simulator per ID",
        unit: "µs",
        goal: Goal::None,
        value: Some(each(run.simulator_cpu)),
        floor: None,
    });
}
