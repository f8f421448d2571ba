//! A topic full of results into tables: by the sink, by replay, and by the bare libraries.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rdkafka::producer::Producer as _;
use weir::{
    message::Observation,
    runtime::clock::{Clock, Timestamp},
};

use crate::{
    bare,
    log::{self, PATIENCE},
    machine::{Cost, Meter, cpu_of_all, memory_of},
    process::{Bench, Process},
    records,
    table::{Figure, Goal, Table},
    tables::Tables,
};

/// How often the rows are counted: the server answers from its metadata.
const LOOK: Duration = Duration::from_millis(50);

/// How a process has filled a table.
struct Poured {
    /// Rows a second between the first that were seen and the last.
    per_second: f64,
    wall: Duration,
    cpu: Duration,
    of_all: Duration,
    /// Rows of an insert.
    block: usize,
    peak_mb: f64,
}

/// Measures; how many rows a second this machine can produce and store at the same time, for the loads of other
/// measurements.
pub async fn measure(bench: &Bench, count: usize, table: &mut Table) -> Result<f64> {
    println!("Full speed: {count} results of about 1 kB on 8 partitions");
    let own = bench.topics("pour").await?;
    let now = Clock::System.now();
    // Kept until the end: rows that borrow from them are sent to tasks.
    let seen: &'static [Observation] = Vec::leak(make(count, now)?);
    let meter = Meter::start()?;
    let bytes = fill(bench, &own.topics.results(), seen)?;
    let filled = meter.end()?;
    table.add(Figure { what: "bytes of a record", unit: "B", goal: Goal::None, value: Some(bytes), floor: None });

    println!("  weir sink …");
    let into_sink = Tables::new("sink").await?;
    let config = bench.configure("sink", &own, &into_sink.config.database)?;
    let mut sink = bench.start("sink", &config, &["sink"])?;
    let poured = watch(&mut sink, &into_sink, count, false).await?;
    sink.stop().await?;
    println!("  weir replay …");
    let into_replay = Tables::new("replay").await?;
    let target = into_replay.config.database.clone();
    let mut replay = bench.start("replay", &config, &["replay", "--topic", "results", "--into", &target, "--yes"])?;
    let replayed = watch(&mut replay, &into_replay, count, true).await?;
    println!("  bare clickhouse crate, bare rdkafka …");
    let into_bare = Tables::new("bare").await?;
    let inserted = bare::insert(&into_bare.client, seen, poured.block, now).await?;
    ensure!(into_bare.count().await? == count as u64, "the bare insert has not stored all rows");
    println!("  bare rdkafka, serde_json and clickhouse, together …");
    let into_both = Tables::new("both").await?;
    let together = bare::pour(bench, &own.topics.results(), &into_both.client, count, poured.block).await?;
    ensure!(into_both.count().await? == count as u64, "the bare pipeline has not stored all rows");
    let consumed = bare::consume(bench, &own.topics.results(), count).await?;

    let parsed = bare::parse(seen)?;
    report(table, count, &poured, [inserted, consumed, parsed]);
    report_together(table, count, &poured, together);
    report_machine(table, count, [poured.of_all, replayed.of_all, together.0.of_all, inserted.of_all]);
    report_replay(table, count, &replayed, inserted, consumed);
    report_disk(table, &into_sink).await?;
    for tables in [into_sink, into_replay, into_bare, into_both] {
        tables.drop().await?;
    }
    own.delete().await?;
    Ok(sustained(count, &poured, filled))
}

/// The producer takes its part of the same cores: with it they are busy at fewer rows a second than the sink alone
/// can store.
fn sustained(count: usize, poured: &Poured, filled: Cost) -> f64 {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let each = (poured.of_all + filled.of_all).as_secs_f64() / mean(count, 1);
    poured.per_second.min(mean(cores, 1) / each.max(1e-9))
}

fn make(count: usize, now: Timestamp) -> Result<Vec<Observation>> {
    (0..count as u64).map(|number| records::observation(number, now)).collect()
}

/// Writes the results to the topic; the mean size of a record's value.
fn fill(bench: &Bench, topic: &str, seen: &[Observation]) -> Result<f64> {
    let producer = log::producer(&bench.kafka.brokers)?;
    let mut bytes = 0;
    for seen in seen {
        let encoded = records::encode(seen);
        bytes += encoded.value.len();
        log::send(&producer, records::record(topic, seen, &encoded))?;
        producer.poll(Duration::ZERO);
    }
    producer.flush(PATIENCE)?;
    Ok(mean(bytes, seen.len()))
}

#[allow(clippy::cast_precision_loss, reason = "counts of a benchmark")]
fn mean(sum: usize, count: usize) -> f64 {
    sum as f64 / count.max(1) as f64
}

/// Waits until the table has `count` rows, or, if it `ends`, until the process has ended.
async fn watch(process: &mut Process, tables: &Tables, count: usize, ends: bool) -> Result<Poured> {
    let (since, before, all_before) = (Instant::now(), tables.inserts().await?, cpu_of_all()?);
    let (mut first, mut last, mut moved) = (None, (Instant::now(), 0), Instant::now());
    let (mut cpu, mut peak_mb) = (Duration::ZERO, 0_f64);
    loop {
        // One that has just ended has no memory any more.
        if let Ok(memory) = memory_of(process.pid()) {
            cpu = process.cpu()?;
            peak_mb = peak_mb.max(memory.peak);
        }
        let rows = tables.count().await?;
        if rows > last.1 {
            moved = Instant::now();
            last = (moved, rows);
            first.get_or_insert(last);
        }
        if rows == count as u64 && (!ends || process.has_ended()?) {
            break;
        }
        ensure!(rows <= count as u64, "{rows} rows of {count} records");
        if !ends {
            process.check()?;
        }
        ensure!(moved.elapsed() < PATIENCE, "{rows} of {count} rows, and no more for {PATIENCE:?}");
        tokio::time::sleep(LOOK).await;
    }
    let (first_at, first_rows) = first.unwrap_or(last);
    let inserts = tables.inserts().await?.saturating_sub(before).max(1);
    Ok(Poured {
        per_second: mean(count - usize::try_from(first_rows)?, 1) / (last.0 - first_at).as_secs_f64().max(1e-9),
        wall: since.elapsed(),
        cpu,
        of_all: cpu_of_all()?.saturating_sub(all_before),
        block: count.div_ceil(usize::try_from(inserts)?),
        peak_mb,
    })
}

fn rate(count: usize, wall: Duration) -> f64 {
    mean(count, 1) / wall.as_secs_f64().max(1e-9)
}

fn report(table: &mut Table, count: usize, poured: &Poured, [bare, consumed, parsed]: [Cost; 3]) {
    let each = |cpu: Duration| cpu.as_secs_f64() * 1e6 / mean(count, 1);
    let floor = rate(count, bare.wall);
    let figure = |what, unit, goal, value, floor| Figure { what, unit, goal, value: Some(value), floor };
    table.add(figure("sink, from Kafka", "/s", Goal::AtLeast(0.9 * floor), poured.per_second, Some(floor)));
    let (ours, theirs) = (each(poured.cpu), each(bare.cpu));
    table.add(figure("  client CPU per row", "µs", Goal::AtMost(1.5 * theirs), ours, Some(theirs)));
    let whole = each(bare.cpu + consumed.cpu + parsed.cpu);
    table.add(figure("  beside insert, consume and parse", "µs", Goal::None, ours, Some(whole)));
    table.explain("  of the floor: bare consume", "µs", each(consumed.cpu));
    table.explain("  of the floor: bare serde_json", "µs", each(parsed.cpu));
    table.add(figure("  resident at most", "MB", Goal::None, poured.peak_mb, None));
    table.add(figure("  rows of an insert", "", Goal::None, mean(poured.block, 1), Some(mean(poured.block, 1))));
}

/// Beside the same work without exactly once: the ceiling where the servers share the machine.
fn report_together(table: &mut Table, count: usize, poured: &Poured, (cost, rate): (Cost, f64)) {
    let each = |cpu: Duration| cpu.as_secs_f64() * 1e6 / mean(count, 1);
    let figure = |what, unit, goal, value, floor| Figure { what, unit, goal, value: Some(value), floor: Some(floor) };
    let what = "sink beside consume + parse + insert";
    table.add(figure(what, "/s", Goal::AtLeast(0.9 * rate), poured.per_second, rate));
    table.add(figure("  client CPU per row", "µs", Goal::None, each(poured.cpu), each(cost.cpu)));
}

/// Why the rates are what they are: with both cores busy, rows a second are two seconds by the CPU of a row. Means
/// something only where nothing else runs.
fn report_machine(table: &mut Table, count: usize, [sink, replay, together, insert]: [Duration; 4]) {
    let each = |cpu: Duration| cpu.as_secs_f64() * 1e6 / mean(count, 1);
    table.explain("CPU of all processes per row: sink", "µs", each(sink));
    table.explain("  replay", "µs", each(replay));
    table.explain("  bare consume + parse + insert", "µs", each(together));
    table.explain("  bare insert", "µs", each(insert));
}

fn report_replay(table: &mut Table, count: usize, replayed: &Poured, inserted: Cost, consumed: Cost) {
    let floor = rate(count, inserted.wall.max(consumed.wall));
    let figure = |what, unit, goal, value, floor| Figure { what, unit, goal, value: Some(value), floor };
    let whole = rate(count, replayed.wall);
    table.add(figure("replay, from start to end", "/s", Goal::AtLeast(0.9 * floor), whole, Some(floor)));
    table.add(figure("  between its first and last row", "/s", Goal::None, replayed.per_second, Some(floor)));
    table.explain("  of the floor: bare insert", "/s", rate(count, inserted.wall));
    table.explain("  of the floor: bare consume", "/s", rate(count, consumed.wall));
    let cpu = replayed.cpu.as_secs_f64() * 1e6 / mean(count, 1);
    table.add(figure("  client CPU per row", "µs", Goal::None, cpu, None));
    table.add(figure("  resident at most", "MB", Goal::AtMost(150.0), replayed.peak_mb, None));
    table.add(figure("  rows of an insert", "", Goal::None, mean(replayed.block, 1), None));
}

/// What the rows take on disk as they lie there now: merging goes on, and saves a little more.
async fn report_disk(table: &mut Table, tables: &Tables) -> Result<()> {
    let figure = |what, value| Figure { what, unit: "B", goal: Goal::None, value: Some(value), floor: None };
    let (whole, raw) = tables.bytes_of_row("observations").await?;
    table.add(figure("on disk, a row of observations", whole));
    table.add(figure("  its raw JSON", raw));
    table.add(figure("  a row of items_latest", tables.bytes_of_row("items_latest").await?.0));
    Ok(())
}
