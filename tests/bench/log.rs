//! Kafka from outside of weir: bare clients that fill topics, follow them, and remove them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer},
    message::{BorrowedHeaders, BorrowedMessage, OwnedHeaders},
    producer::{BaseProducer, BaseRecord, Producer, ProducerContext},
};
use weir::kafka::{admin, client};

/// How long nothing may come before a measurement gives up.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The settings of librdkafka that weir's own clients have, as far as they cost or save CPU.
pub fn client(brokers: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers).set("socket.nagle.disable", "true");
    config
}

/// An idempotent producer like weir's.
pub fn producer(brokers: &str) -> Result<BaseProducer> {
    settings(brokers).create().context("making a producer")
}

/// Its settings.
pub fn settings(brokers: &str) -> ClientConfig {
    let mut config = client(brokers);
    config.set("enable.idempotence", "true").set("acks", "all").set("compression.type", "lz4").set("linger.ms", "5");
    config.set("partitioner", "murmur2_random").set("queue.buffering.max.messages", "200000");
    config
}

/// Hands a record over, waiting for room.
pub fn send<C: ProducerContext<DeliveryOpaque = ()>>(
    producer: &BaseProducer<C>,
    mut record: BaseRecord<'_, [u8], [u8]>,
) -> Result<()> {
    use rdkafka::{error::KafkaError::MessageProduction, types::RDKafkaErrorCode::QueueFull};
    loop {
        match producer.send(record) {
            Ok(()) => return Ok(()),
            Err((MessageProduction(QueueFull), again)) => {
                producer.poll(Duration::from_millis(10));
                record = again;
            }
            Err((error, _)) => return Err(error.into()),
        }
    }
}

/// Writes bare IDs, as any producer would.
pub fn produce_ids(brokers: &str, topic: &str, ids: impl Iterator<Item = u64>) -> Result<()> {
    let producer = producer(brokers)?;
    for id in ids {
        let id = id.to_string();
        send(&producer, BaseRecord::to(topic).key(id.as_bytes()).payload(id.as_bytes()))?;
    }
    producer.flush(PATIENCE).context("writing the IDs")
}

/// Reads whole topics from their beginning, as far as they are committed.
pub struct Follower(BaseConsumer);

impl Follower {
    pub async fn of(kafka: &client::Config, topics: &[String]) -> Result<Self> {
        let mut config = client(&kafka.brokers);
        config.set("group.id", "bench").set("isolation.level", "read_committed").set("enable.auto.commit", "false");
        config.set("queued.min.messages", "2000").set("fetch.wait.max.ms", "100").set("fetch.queue.backoff.ms", "20");
        let consumer: BaseConsumer = config.create().context("making a consumer")?;
        let present = admin::describe(kafka).await?;
        let mut list = TopicPartitionList::new();
        for topic in topics {
            for partition in 0..present.get(topic).copied().unwrap_or(0) {
                list.add_partition_offset(topic, partition, Offset::Beginning)?;
            }
        }
        consumer.assign(&list)?;
        Ok(Self(consumer))
    }

    /// The client itself, to be polled elsewhere.
    pub fn into_inner(self) -> BaseConsumer {
        self.0
    }

    /// Reads what comes for so long.
    pub fn read_for(&self, within: Duration, mut see: impl FnMut(&BorrowedMessage<'_>)) -> Result<()> {
        let since = Instant::now();
        while let Some(left) = within.checked_sub(since.elapsed()) {
            if let Some(message) = self.0.poll(left) {
                see(&message?);
            }
        }
        Ok(())
    }

    /// Reads `count` records, or fails when none comes any more.
    pub fn read(
        &self,
        count: usize,
        mut still_well: impl FnMut() -> Result<()>,
        mut see: impl FnMut(&BorrowedMessage<'_>),
    ) -> Result<()> {
        let (mut seen, mut last) = (0, Instant::now());
        while seen < count {
            if let Some(message) = self.0.poll(Duration::from_millis(100)) {
                see(&message?);
                seen += 1;
                last = Instant::now();
            } else {
                still_well()?;
                ensure!(last.elapsed() < PATIENCE, "{seen} of {count} records, and no more for {PATIENCE:?}");
            }
        }
        Ok(())
    }
}

/// A record's parts, copied.
pub struct Copied {
    pub key: Vec<u8>,
    pub value: Vec<u8>,
    pub headers: OwnedHeaders,
}

impl Copied {
    pub fn of(message: &BorrowedMessage<'_>) -> Self {
        let bytes = |bytes: Option<&[u8]>| bytes.unwrap_or_default().to_vec();
        let headers = message.headers().map_or_else(OwnedHeaders::new, BorrowedHeaders::detach);
        Self { key: bytes(message.key()), value: bytes(message.payload()), headers }
    }
}

pub async fn delete_topics(brokers: &str, topics: &[&str]) -> Result<()> {
    let admin: AdminClient<DefaultClientContext> = client(brokers).create()?;
    admin.delete_topics(topics, &AdminOptions::new()).await.context("deleting the topics")?;
    Ok(())
}
