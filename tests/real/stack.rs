//! The servers under test, and names that no other test has.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    message::{BorrowedMessage, Headers},
};
use weir::{
    kafka::{Outgoing, Producer, admin, client},
    message::{SourceName, envelope::Kind},
    topics::{self, Topic, Topics},
};

/// How long anything may take before a test gives up waiting for it.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// An address from the environment that `deploy/local/test` sets.
pub fn address(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run deploy/local/test, which starts the servers"))
}

/// A name that nothing else on these servers has.
pub fn unique(what: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{what}-{}-{}-{count}", std::process::id(), since_1970.as_millis() % 100_000_000)
}

/// Waits until `condition` gives something, looking again every 20 ms.
pub async fn eventually<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let since = Instant::now();
    loop {
        if let Some(found) = condition().await {
            return found;
        }
        assert!(since.elapsed() < DEADLINE, "waited {DEADLINE:?} in vain: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub fn kafka() -> client::Config {
    client::Config { brokers: address("WEIR_TEST_KAFKA"), ..client::Config::default() }
}

/// One topic of `partitions`, named uniquely.
pub async fn topic(what: &str, partitions: i32) -> String {
    let name = unique(what);
    let keep = Duration::from_secs(3_600);
    let topic = Topic { name: name.clone(), kind: Kind::Request, source: None, partitions, keep, delay: None };
    admin::apply(&kafka(), &[topic], 1).await.unwrap();
    name
}

/// All of weir's topics for one source under a prefix of their own.
pub async fn topics(what: &str, source: &SourceName, partitions: i32) -> Topics {
    let config = topics::Config {
        prefix: unique(what),
        request_partitions: partitions,
        outcome_partitions: 2,
        delay_partitions: 2,
        ..topics::Config::default()
    };
    let topics = Topics::new(config);
    let all = [topics.all(std::slice::from_ref(source)), topics.delays()].concat();
    admin::apply(&kafka(), &all, 1).await.unwrap();
    topics
}

pub fn outgoing(topic: &str, key: &str, value: &str) -> Outgoing {
    let key = Some(Bytes::copy_from_slice(key.as_bytes()));
    Outgoing { topic: topic.into(), key, value: Bytes::copy_from_slice(value.as_bytes()), headers: vec![] }
}

pub async fn produce(topic: &str, values: impl IntoIterator<Item = String>) {
    let records = values.into_iter().map(|value| outgoing(topic, &value, &value)).collect();
    Producer::new(&kafka()).unwrap().send(records).await.unwrap();
}

/// A record as a `read_committed` reader sees it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub value: Vec<u8>,
    pub headers: HashMap<String, String>,
    /// The record's time, in milliseconds since 1970.
    pub at: i64,
}

impl Seen {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.value).unwrap()
    }

    fn of(message: &BorrowedMessage<'_>) -> Self {
        let text = |value: Option<&[u8]>| String::from_utf8_lossy(value.unwrap_or_default()).into_owned();
        let headers = message.headers().map_or_else(HashMap::new, |headers| {
            headers.iter().map(|header| (header.key.to_owned(), text(header.value))).collect()
        });
        let at = message.timestamp().to_millis().unwrap_or(0);
        Self { value: message.payload().unwrap_or_default().to_vec(), headers, at }
    }
}

/// Follows topics from their beginning, and shows what is committed.
pub struct Follower {
    consumer: BaseConsumer,
    pub seen: Vec<Seen>,
}

impl Follower {
    pub async fn of(topics: &[String]) -> Self {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", address("WEIR_TEST_KAFKA"))
            .set("group.id", unique("follower"))
            .set("isolation.level", "read_committed")
            .set("enable.auto.commit", "false")
            .create()
            .unwrap();
        // A topic that has just been made is not in the metadata at once.
        let present = eventually("the topics are known", async || {
            let present = admin::describe(&kafka()).await.unwrap();
            topics.iter().all(|topic| present.contains_key(topic)).then_some(present)
        })
        .await;
        let mut list = TopicPartitionList::new();
        for topic in topics {
            for partition in 0..present[topic] {
                list.add_partition_offset(topic, partition, Offset::Beginning).unwrap();
            }
        }
        consumer.assign(&list).unwrap();
        Self { consumer, seen: vec![] }
    }

    /// Takes in what is there now.
    pub fn read(&mut self) -> &[Seen] {
        while let Some(message) = self.consumer.poll(Duration::from_millis(20)) {
            self.seen.push(Seen::of(&message.unwrap()));
        }
        &self.seen
    }

    /// The same while brokers come and go: what they do not answer for now is read later.
    #[allow(dead_code, reason = "for deploy/local/torture")]
    pub fn read_in_trouble(&mut self) -> &[Seen] {
        while let Some(message) = self.consumer.poll(Duration::from_millis(20)) {
            self.seen.extend(message.ok().as_ref().map(Seen::of));
        }
        &self.seen
    }

    /// Reads on until at least `count` records have been seen.
    pub async fn read_until(&mut self, count: usize) -> &[Seen] {
        let since = Instant::now();
        while self.seen.len() < count {
            assert!(since.elapsed() < DEADLINE, "{} of {count} records after {DEADLINE:?}", self.seen.len());
            self.read();
            tokio::task::yield_now().await;
        }
        &self.seen
    }
}
