//! The floors: the same rows inserted from memory by the bare `clickhouse` crate, and the same topic read by bare rdkafka.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use clickhouse::Client;
use tokio::task::JoinSet;
use weir::{
    message::{Observation, codec::Raw},
    runtime::clock::Timestamp,
    sink::row::ObservationRow,
};

use crate::{
    log::{Copied, Follower},
    machine::{Cost, Meter},
    process::Bench,
    records,
};

/// Inserts at once, as many as the sink's.
const AT_ONCE: usize = 4;

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
                let mut insert = client.insert::<ObservationRow<'_>>("observations").await?;
                // One block of the server for each, as the sink's are, and an answer when it is stored.
                for (name, value) in [
                    ("async_insert", "0"),
                    ("max_insert_block_size", "1000000"),
                    ("min_insert_block_size_rows", "1000000"),
                ] {
                    insert = insert.with_setting(name, value);
                }
                insert = insert.with_setting("min_insert_block_size_bytes", "0");
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
    let (mut cpu, mut wall) = (Duration::ZERO, Duration::ZERO);
    for chunk in seen.chunks(10_000) {
        let values: Vec<_> = chunk.iter().map(|seen| records::encode(seen).value).collect();
        let meter = Meter::start()?;
        for value in &values {
            drop(std::hint::black_box(serde_json::from_slice::<Observation>(value)?));
        }
        let cost = meter.end()?;
        (cpu, wall) = (cpu + cost.cpu, wall + cost.wall);
    }
    Ok(Cost { wall, cpu })
}
