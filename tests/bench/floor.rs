//! The floors: what the same work costs with nothing but the libraries.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use rdkafka::producer::{BaseRecord, Producer};
use tokio::task::JoinSet;
use weir::{
    message::{ItemId, Request},
    platform::{Account, Exchange, SourceConfig, config::Source},
    runtime::clock::Clock,
};

use crate::{
    log::{self, Copied, Follower, PATIENCE},
    machine::{Cost, Meter},
    process::{Bench, Simulator},
};

/// The calls for these IDs, signed beforehand.
fn exchanges(bench: &Bench, simulator: &Simulator, ids: &[u64]) -> Result<Vec<Exchange>> {
    let config = serde_json::json!({
        "name": "ali1688", "kind": "ali1688", "url": simulator.url, "accounts_file": bench.accounts_file(),
    });
    let config: SourceConfig = serde_json::from_value(config)?;
    let source = Source::open(&config, bench.folder.path(), &|_| None)?;
    let now = Clock::System.now();
    let accounts: &[Account] = &source.accounts;
    let sign = |(id, account): (&u64, &Account)| {
        Ok(source.vendor.prepare(account, &[&Request::new(ItemId::new(id.to_string())?)], now))
    };
    ids.iter().zip(accounts.iter().cycle()).map(sign).collect()
}

/// A bare reqwest loop: the same calls to the same simulator, as many at once, each body read to its end.
pub async fn http(bench: &Bench, simulator: &Simulator, ids: &[u64], at_once: usize) -> Result<Cost> {
    let exchanges = Arc::new(exchanges(bench, simulator, ids)?);
    let client = reqwest::Client::builder()
        .timeout(Duration::from_secs(10))
        .connect_timeout(Duration::from_secs(2))
        .tcp_nodelay(true)
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .build()?;
    let meter = Meter::start()?;
    let mut loops = JoinSet::new();
    for first in 0..at_once.min(exchanges.len()) {
        let (client, exchanges) = (client.clone(), Arc::clone(&exchanges));
        loops.spawn(async move {
            for exchange in exchanges.iter().skip(first).step_by(at_once) {
                let reply = client.post(&exchange.url).form(exchange.form()).send().await?;
                ensure!(reply.status().is_success(), "the simulator said {}", reply.status());
                std::hint::black_box(reply.bytes().await?);
            }
            Ok(())
        });
    }
    while let Some(ended) = loops.join_next().await {
        ended??;
    }
    meter.end()
}

/// Bare rdkafka: reads all requests, and writes as many records like weir's own results.
pub async fn kafka(bench: &Bench, requests: &str, scratch: &str, count: usize, like: &[Copied]) -> Result<Cost> {
    ensure!(!like.is_empty(), "there is no result to copy");
    let follower = Follower::of(&bench.kafka, &[requests.to_owned()]).await?;
    let producer = log::producer(&bench.kafka.brokers)?;
    let meter = Meter::start()?;
    follower.read(count, || Ok(()), |message| drop(std::hint::black_box(Copied::of(message))))?;
    for result in like.iter().cycle().take(count) {
        let record = BaseRecord::to(scratch).key(result.key.as_slice()).payload(result.value.as_slice());
        log::send(&producer, record.headers(result.headers.clone()))?;
        producer.poll(Duration::ZERO);
    }
    producer.flush(PATIENCE).context("writing records like results")?;
    meter.end()
}
