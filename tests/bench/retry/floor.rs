//! The floors: a bare consumer and a bare transactional producer that do the same work.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rdkafka::{
    Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    producer::{BaseProducer, BaseRecord, Producer},
};
use weir::{kafka::admin, message::envelope::Kind, topics::Topic};

use crate::{
    log::{self, Copied, PATIENCE},
    process::{Bench, OwnTopics},
};

/// As retry: a transaction no more often than that, of so many records at most.
const EVERY: Duration = Duration::from_millis(50);
const RECORDS: usize = 10_000;

/// What the copy took.
pub struct Copy {
    pub copied: Duration,
}

async fn topic(bench: &Bench, own: &OwnTopics, name: &str, partitions: i32) -> Result<String> {
    let name = format!("{}.{name}", own.prefix());
    let keep = Duration::from_secs(3_600);
    let topic = Topic { name: name.clone(), kind: Kind::Request, source: None, partitions, keep, delay: None };
    admin::apply(&bench.kafka, &[topic], 1).await?;
    Ok(name)
}

fn transactional(bench: &Bench, own: &OwnTopics) -> Result<BaseProducer> {
    let mut config = log::client(&bench.kafka.brokers);
    config.set("transactional.id", format!("{}.floor", own.prefix())).set("compression.type", "lz4");
    config.set("partitioner", "murmur2_random").set("retry.backoff.ms", "10").set("linger.ms", "0");
    let producer: BaseProducer = config.create().context("making a transactional producer")?;
    producer.init_transactions(PATIENCE)?;
    Ok(producer)
}

/// Copies `count` records like `like` from a topic with a delay topic's partitions to one like that of requests.
pub async fn copy(bench: &Bench, own: &OwnTopics, count: usize, like: &Copied) -> Result<Copy> {
    let (from, to) = (topic(bench, own, "floor.from", 4).await?, topic(bench, own, "floor.to", 8).await?);
    let producer = log::producer(&bench.kafka.brokers)?;
    for number in 0..count {
        let key = format!("burst-{number:09}");
        let record = BaseRecord::to(&from).key(key.as_bytes()).payload(like.value.as_slice());
        log::send(&producer, record.headers(like.headers.clone()))?;
        producer.poll(Duration::ZERO);
    }
    producer.flush(PATIENCE)?;
    let mut config = log::client(&bench.kafka.brokers);
    config.set("group.id", format!("{}.floor", own.prefix())).set("isolation.level", "read_committed");
    config.set("enable.auto.commit", "false").set("auto.offset.reset", "earliest");
    let consumer: BaseConsumer = config.create().context("making a consumer")?;
    consumer.subscribe(&[&from])?;
    let producer = transactional(bench, own)?;
    let (mut copied, mut since, mut last) = (0, None, Instant::now());
    while copied < count {
        let done = pass_on(&consumer, &producer, &to)?;
        if done > 0 {
            // From the first record on: joining the group is no part of it.
            since.get_or_insert(last);
        } else {
            ensure!(last.elapsed() < PATIENCE || since.is_some(), "the group of the floor does not begin");
        }
        last = Instant::now();
        copied += done;
    }
    Ok(Copy { copied: since.map_or(Duration::ZERO, |since: Instant| since.elapsed()) })
}

/// One transaction: what comes within [`EVERY`].
fn pass_on(consumer: &BaseConsumer, producer: &BaseProducer, to: &str) -> Result<usize> {
    let deadline = Instant::now() + EVERY;
    let (mut count, mut offsets) = (0, TopicPartitionList::new());
    let mut next = std::collections::HashMap::new();
    while count < RECORDS {
        let Some(message) = consumer.poll(deadline.saturating_duration_since(Instant::now())) else { break };
        let message = message?;
        if count == 0 {
            producer.begin_transaction()?;
        }
        let copied = Copied::of(&message);
        let record = BaseRecord::to(to).key(copied.key.as_slice()).payload(copied.value.as_slice());
        log::send(producer, record.headers(copied.headers))?;
        next.insert((message.topic().to_owned(), message.partition()), message.offset() + 1);
        count += 1;
    }
    if count == 0 {
        return Ok(0);
    }
    while producer.in_flight_count() > 0 {
        producer.poll(Duration::from_millis(1));
    }
    for ((topic, partition), offset) in next {
        offsets.add_partition_offset(&topic, partition, Offset::Offset(offset))?;
    }
    let group = consumer.group_metadata().context("the consumer is in no group")?;
    producer.send_offsets_to_transaction(&offsets, &group, PATIENCE)?;
    producer.commit_transaction(PATIENCE)?;
    Ok(count)
}

/// How long records of a bare transaction take to be seen, in milliseconds, ascending.
pub async fn lateness(bench: &Bench, own: &OwnTopics) -> Result<Vec<i64>> {
    let to = topic(bench, own, "floor.late", 1).await?;
    let follower = log::Follower::of(&bench.kafka, std::slice::from_ref(&to)).await?;
    let producer = transactional(bench, own)?;
    let mut late = vec![];
    for _ in 0..200 {
        let since = Instant::now();
        producer.begin_transaction()?;
        log::send(&producer, BaseRecord::to(&to).key(b"1".as_slice()).payload(b"{}".as_slice()))?;
        while producer.in_flight_count() > 0 {
            producer.poll(Duration::from_millis(1));
        }
        producer.commit_transaction(PATIENCE)?;
        follower.read(1, || Ok(()), |_| ())?;
        late.push(i64::try_from(since.elapsed().as_millis())?);
    }
    late.sort_unstable();
    Ok(late)
}
