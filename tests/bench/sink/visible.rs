//! How soon a record is a row: from Kafka's acknowledgement to a query that finds it, under several loads.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rdkafka::{
    ClientContext, Message as _,
    producer::{BaseProducer, DeliveryResult, Producer, ProducerContext},
};
use tokio_util::sync::CancellationToken;
use weir::{
    message::{Observation, codec::Encoded},
    runtime::clock::Clock,
};

use crate::{
    log::{self, PATIENCE},
    process::Bench,
    records,
    table::{Figure, Goal, Table},
    tables::Tables,
};

/// The loads, in records a second. The slow one is as good as one a minute: each record is alone in its block.
const TRICKLE: f64 = 0.5;
const STEADY: f64 = 3_000.0;
/// Of the rate at which this machine can produce and store: faster, and the records would wait for each other without end.
const HALF: f64 = 0.5;
const FULL: f64 = 0.8;

/// The goal for 99 of 100 rows.
const GOAL_SECONDS: f64 = 2.0;

/// How often a query looks for rows. So much too late it may find them.
const LOOK: Duration = Duration::from_millis(20);

/// The part of one core that looking may take, as a share of the time.
const LOOKS_FOR: u32 = 3;

/// Between two looks at most so long, however long a look takes on a busy machine: it would count as the row's.
const LOOK_MAX: Duration = Duration::from_millis(100);

/// Seconds of each load that are not measured.
const WARM_UP: u64 = 8;

/// A record has its time from its producer, so much before Kafka's acknowledgement at most.
const BEFORE: Duration = Duration::from_secs(3);

/// So many results are made before the clock starts, and sent again and again: making them costs more than sending.
const MADE: u64 = 20_000;

/// Offsets of one partition that Kafka has acknowledged, and when.
type Acknowledged = VecDeque<(i64, Instant)>;

/// What Kafka has acknowledged and no query has found yet, by partition.
#[derive(Clone, Default)]
struct Waiting(Arc<Mutex<Vec<Acknowledged>>>);

impl Waiting {
    fn add(&self, partition: i32, offset: i64) {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let index = usize::try_from(partition).unwrap_or(0);
        if waiting.len() <= index {
            waiting.resize_with(index + 1, VecDeque::new);
        }
        waiting[index].push_back((offset, Instant::now()));
    }

    /// How long a record waits that waits longest.
    fn longest(&self, now: Instant) -> Duration {
        let waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let oldest = waiting.iter().filter_map(|queue| queue.front()).map(|(_, since)| *since).min();
        oldest.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    /// Takes out what is visible up to this offset.
    fn found(&self, partition: i32, last: i64, at: Instant, took: &mut Vec<Duration>) {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(queue) = usize::try_from(partition).ok().and_then(|index| waiting.get_mut(index)) else { return };
        while queue.front().is_some_and(|(offset, _)| *offset <= last) {
            took.extend(queue.pop_front().map(|(_, since)| at.saturating_duration_since(since)));
        }
    }
}

impl ClientContext for Waiting {}

impl ProducerContext for Waiting {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Ok(message) = result {
            self.add(message.partition(), message.offset());
        }
    }
}

pub async fn measure(bench: &Bench, seconds: u64, full_speed: Option<f64>, table: &mut Table) -> Result<()> {
    let own = bench.topics("visible").await?;
    let tables = Tables::new("visible").await?;
    let config = bench.configure("visible", &own, &tables.config.database)?;
    let mut sink = bench.start("sink-visible", &config, &["sink"])?;
    let topic = own.topics.results();
    let now = Clock::System.now();
    let result = |number| records::observation(number, now).map(|seen| (records::encode(&seen), seen));
    let made = Arc::new((0..MADE).map(result).collect::<Result<Vec<_>>>()?);
    // The first block finds the tables unknown, and the group is still being formed.
    run(bench, &tables, &topic, (100.0, 1), &made).await?;
    let of_full =
        full_speed.map(|rate| [("at 50 % of full speed", rate * HALF), ("at 80 % of full speed", rate * FULL)]);
    let loads = [("at one record every 2 s", TRICKLE), ("at 3,000 records/s", STEADY)];
    for (what, rate) in loads.into_iter().chain(of_full.into_iter().flatten()) {
        // A broker that has just started compiles itself for the first seconds of a new load, on the same cores.
        run(bench, &tables, &topic, (rate, WARM_UP), &made).await?;
        println!("Record to row: {rate:.1} records/s for {seconds} s");
        let took = run(bench, &tables, &topic, (rate, seconds), &made).await?;
        sink.check()?;
        report(table, what, &took);
        println!("  {} active parts", tables.parts().await?);
    }
    sink.stop().await?;
    tables.drop().await?;
    own.delete().await
}

/// Produces at this rate for so many seconds, and asks for the rows meanwhile; how long each took, in order.
async fn run(
    bench: &Bench,
    tables: &Tables,
    topic: &str,
    (rate, seconds): (f64, u64),
    made: &Arc<Vec<(Encoded, Observation)>>,
) -> Result<Vec<Duration>> {
    let waiting = Waiting::default();
    let producer: BaseProducer<Waiting> =
        log::settings(&bench.kafka.brokers).create_with_context(waiting.clone()).context("making a producer")?;
    let (stopped, topic, made) = (CancellationToken::new(), topic.to_owned(), Arc::clone(made));
    let done = stopped.clone();
    let sender = tokio::task::spawn_blocking(move || {
        let sent = send(&producer, &topic, rate, Duration::from_secs(seconds), &made);
        done.cancel();
        sent
    });
    let (mut took, mut last_found) = (Vec::new(), Instant::now());
    loop {
        let is_over = stopped.is_cancelled();
        // Only as far back as somebody waits: looking at more rows takes from the cores that are measured.
        let asked = Instant::now();
        let since = (waiting.longest(asked) + BEFORE).as_millis();
        let sql = format!(
            "SELECT partition, max(offset) FROM observations \
             WHERE recorded_at > now64(3) - INTERVAL {since} MILLISECOND GROUP BY partition"
        );
        let found: Vec<(i32, i64)> = tables.client.query(&sql).fetch_all().await?;
        let (at, before) = (Instant::now(), took.len());
        for (partition, last) in found {
            waiting.found(partition, last, at, &mut took);
        }
        if took.len() > before {
            last_found = at;
        }
        if is_over && waiting.0.lock().unwrap_or_else(PoisonError::into_inner).iter().all(VecDeque::is_empty) {
            break;
        }
        ensure!(last_found.elapsed() < PATIENCE, "no row was found for {PATIENCE:?}");
        tokio::time::sleep(((at - asked) * (LOOKS_FOR - 1)).clamp(LOOK, LOOK_MAX)).await;
    }
    sender.await??;
    took.sort_unstable();
    Ok(took)
}

/// Sends evenly.
fn send(
    producer: &BaseProducer<Waiting>,
    topic: &str,
    rate: f64,
    span: Duration,
    made: &[(Encoded, Observation)],
) -> Result<()> {
    let (since, mut sent, mut next) = (Instant::now(), 0_u64, made.iter().cycle());
    while since.elapsed() < span {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count of records")]
        let due = (since.elapsed().as_secs_f64() * rate) as u64 + 1;
        while sent < due {
            let (encoded, seen) = next.next().context("nothing to send")?;
            log::send(producer, records::record(topic, seen, encoded))?;
            sent += 1;
        }
        producer.poll(Duration::from_millis(5));
    }
    Ok(producer.flush(PATIENCE)?)
}

fn report(table: &mut Table, what: &'static str, took: &[Duration]) {
    let at = |per_mille: usize| took.get((took.len() * per_mille / 1_000).min(took.len().saturating_sub(1)));
    let seconds = |per_mille| at(per_mille).map(Duration::as_secs_f64);
    let figure = |what, goal, value| Figure { what, unit: "s", goal, value, floor: None };
    table.add(Figure { what, unit: "", goal: Goal::None, value: None, floor: None });
    table.add(figure("  record to row, median", Goal::None, seconds(500)));
    table.add(figure("  record to row, p99", Goal::AtMost(GOAL_SECONDS), seconds(990)));
    table.add(figure("  record to row, the last", Goal::None, seconds(1_000)));
}
