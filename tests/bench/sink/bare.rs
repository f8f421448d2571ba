//! The floors: the same rows inserted from memory by the bare `clickhouse` crate, and the same topic read by bare rdkafka.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Result;
use clickhouse::{Client, insert::Insert};
use rdkafka::Message as _;
use tokio::{sync::mpsc, task::JoinSet};
use weir::{
    message::{Observation, codec::Raw},
    runtime::clock::Timestamp,
    store::row::ObservationRow,
};

use crate::{
    log::{Copied, Follower},
    machine::{Cost, Meter},
    process::Bench,
    records,
};

/// Inserts at once, as many as the sink's.
const AT_ONCE: usize = 4;

/// One block of the server for each, as the sink's are, and an answer when it is stored.
async fn open(client: &Client) -> Result<Insert<ObservationRow<'static>>> {
    let mut insert = client.insert::<ObservationRow<'_>>("observations").await?;
    for (name, value) in [
        ("async_insert", "0"),
        ("max_insert_block_size", "1000000"),
        ("min_insert_block_size_rows", "1000000"),
        ("min_insert_block_size_bytes", "0"),
    ] {
        insert = insert.with_setting(name, value);
    }
    Ok(insert)
}

/// Inserts the rows of these results, `block` at a time; the rows are made before the clock starts.
pub async fn insert(client: &Client, seen: &'static [Observation], block: usize, now: Timestamp) -> Result<Cost> {
    let row = |(number, seen)| {
        let offset = i64::try_from(number).unwrap_or(0);
        let partition = i32::try_from(number / block % 8).unwrap_or(0);
        let raw = Raw { topic: "bare", partition, offset, time: now, value: None, headers: &[] };
        ObservationRow::new(&raw, seen)
    };
    let rows: Arc<Vec<ObservationRow<'static>>> = Arc::new(seen.iter().enumerate().map(row).collect());
    let next = Arc::new(AtomicUsize::new(0));
    let meter = Meter::start()?;
    let mut inserts = JoinSet::new();
    for _ in 0..AT_ONCE {
        let (client, rows, next) = (client.clone(), Arc::clone(&rows), Arc::clone(&next));
        inserts.spawn(async move {
            loop {
                let from = next.fetch_add(1, Ordering::Relaxed) * block;
                let Some(rest) = rows.get(from..).filter(|rest| !rest.is_empty()) else {
                    return Ok::<(), anyhow::Error>(());
                };
                let mut insert = open(&client).await?;
                for row in &rest[..block.min(rest.len())] {
                    insert.write(row).await?;
                }
                insert.end().await?;
            }
        });
    }
    while let Some(ended) = inserts.join_next().await {
        ended??;
    }
    meter.end()
}

/// Reads the whole topic.
pub async fn consume(bench: &Bench, topic: &str, count: usize) -> Result<Cost> {
    let follower = Follower::of(&bench.kafka, &[topic.to_owned()]).await?;
    let meter = Meter::start()?;
    follower.read(count, || Ok(()), |message| drop(std::hint::black_box(Copied::of(message))))?;
    meter.end()
}

/// Reads the JSON of these results with bare `serde_json`, into the struct that the sink makes of it.
pub fn parse(seen: &[Observation]) -> Result<Cost> {
    let mut sum = Cost { wall: Duration::ZERO, cpu: Duration::ZERO, of_all: Duration::ZERO };
    for chunk in seen.chunks(10_000) {
        let values: Vec<_> = chunk.iter().map(|seen| records::encode(seen).value).collect();
        let meter = Meter::start()?;
        for value in &values {
            drop(std::hint::black_box(serde_json::from_slice::<Observation>(value)?));
        }
        let cost = meter.end()?;
        sum = Cost { wall: sum.wall + cost.wall, cpu: sum.cpu + cost.cpu, of_all: sum.of_all + cost.of_all };
    }
    Ok(sum)
}

/// Offset and JSON of the records of one partition.
type Block = (i32, Vec<(i64, Vec<u8>)>);

/// What the sink does without what makes it exactly once: the topic is read, its JSON parsed and the rows inserted,
/// `block` at a time and a few at once, all of it at the same time and in this process. The cost, and rows a second
/// between the end of the first insert and of the last.
pub async fn pour(bench: &Bench, topic: &str, client: &Client, count: usize, block: usize) -> Result<(Cost, f64)> {
    let follower = Follower::of(&bench.kafka, &[topic.to_owned()]).await?;
    let meter = Meter::start()?;
    let (sender, blocks) = mpsc::channel::<Block>(AT_ONCE);
    let reading = tokio::task::spawn_blocking(move || read(&follower, count, block, &sender));
    let blocks = Arc::new(tokio::sync::Mutex::new(blocks));
    let mut inserts = JoinSet::new();
    for _ in 0..AT_ONCE {
        let (client, blocks) = (client.clone(), Arc::clone(&blocks));
        inserts.spawn(async move {
            let mut ended = Vec::new();
            loop {
                let next = blocks.lock().await.recv().await;
                let Some((partition, records)) = next else { return Ok::<_, anyhow::Error>(ended) };
                store(&client, partition, &records).await?;
                ended.push((Instant::now(), records.len()));
            }
        });
    }
    let mut ended = Vec::new();
    while let Some(some) = inserts.join_next().await {
        ended.extend(some??);
    }
    reading.await??;
    let cost = meter.end()?;
    ended.sort_unstable();
    let (first, last) = (ended.first().copied(), ended.last().copied());
    let (Some((first_at, first_rows)), Some((last_at, _))) = (first, last) else { anyhow::bail!("no rows") };
    #[allow(clippy::cast_precision_loss, reason = "counts of a benchmark")]
    let rate = (count - first_rows) as f64 / (last_at - first_at).as_secs_f64().max(1e-9);
    Ok((cost, rate))
}

/// Gathers the records of each partition into blocks.
fn read(follower: &Follower, count: usize, block: usize, sender: &mpsc::Sender<Block>) -> Result<()> {
    let mut gathered: BTreeMap<i32, Vec<(i64, Vec<u8>)>> = BTreeMap::new();
    follower.read(
        count,
        || Ok(()),
        |message| {
            let records = gathered.entry(message.partition()).or_default();
            records.push((message.offset(), message.payload().unwrap_or_default().to_vec()));
            if records.len() >= block {
                // Nobody takes it only if an insert has failed, which is what is told then.
                let _ = sender.blocking_send((message.partition(), std::mem::take(records)));
            }
        },
    )?;
    for rest in gathered.into_iter().filter(|(_, records)| !records.is_empty()) {
        let _ = sender.blocking_send(rest);
    }
    Ok(())
}

async fn store(client: &Client, partition: i32, records: &[(i64, Vec<u8>)]) -> Result<()> {
    let mut insert = open(client).await?;
    for (offset, value) in records {
        let seen: Observation = serde_json::from_slice(value)?;
        let raw = Raw { topic: "bare", partition, offset: *offset, time: seen.fetched_at, value: None, headers: &[] };
        insert.write(&ObservationRow::new(&raw, &seen)).await?;
    }
    Ok(insert.end().await?)
}
