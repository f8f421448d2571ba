//! Reads a small topic from its beginning and follows it, without a consumer group: every process reads all of it.

use std::{collections::BTreeSet, time::Duration};

use rdkafka::{
    Message as _, Offset, TopicPartitionList,
    consumer::{Consumer, StreamConsumer},
    error::KafkaError,
};
use tracing::{debug, warn};

use super::{ReadError, Record, admin, client::Config, native};

/// After an error that may pass.
const PAUSE: Duration = Duration::from_millis(500);

/// What a follower sees.
#[derive(Debug)]
pub enum Seen {
    /// The next record.
    Record(Record),
    /// All that was there has been read. Comes once.
    CaughtUp,
}

/// A reader of all partitions of one topic.
pub struct Follower {
    consumer: StreamConsumer,
    topic: String,
    /// Partitions whose end has not been seen yet.
    behind: BTreeSet<i32>,
    caught_up: bool,
}

impl Follower {
    /// Begins at the first record of each partition.
    ///
    /// # Errors
    /// [`ReadError::Failed`]: the topic is not there, or no broker answers within ten seconds.
    pub async fn open(config: &Config, topic: &str) -> Result<Self, ReadError> {
        let failed = |reason: String| ReadError::alone(topic, reason);
        let partitions = admin::partitions(config, topic).await.map_err(|error| failed(error.to_string()))?;
        let Some(partitions) = partitions else {
            return Err(failed("there is no such topic: run `weir topics apply`".to_owned()));
        };
        let consumer: StreamConsumer = config
            .base()
            // librdkafka wants a name; without a subscription and commits no group comes of it.
            .set("group.id", "weir.follow")
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "earliest")
            .set("enable.partition.eof", "true")
            .set("queued.max.messages.kbytes", "8192")
            .set("fetch.wait.max.ms", "100")
            .create()
            .map_err(|error| failed(error.to_string()))?;
        let mut list = TopicPartitionList::new();
        for partition in 0..partitions {
            list.add_partition_offset(topic, partition, Offset::Beginning).map_err(|e| failed(e.to_string()))?;
        }
        consumer.assign(&list).map_err(|error| failed(error.to_string()))?;
        Ok(Self { consumer, topic: topic.to_owned(), behind: (0..partitions).collect(), caught_up: false })
    }

    /// The next record, or that there is no more for now. While the brokers are away it waits for them.
    ///
    /// # Cancellation
    /// Safe: no record is lost.
    ///
    /// # Errors
    /// [`ReadError::Failed`]: waiting cannot help.
    pub async fn next(&mut self) -> Result<Seen, ReadError> {
        loop {
            if self.behind.is_empty() && !self.caught_up {
                self.caught_up = true;
                return Ok(Seen::CaughtUp);
            }
            match self.consumer.recv().await {
                Ok(message) => {
                    debug!(topic = self.topic, offset = message.offset(), "read a record");
                    return Ok(Seen::Record(native::record(&message)));
                }
                Err(KafkaError::PartitionEOF(partition)) => {
                    self.behind.remove(&partition);
                }
                Err(error) if is_final(&error) => return Err(ReadError::alone(&self.topic, error.to_string())),
                Err(error) => {
                    warn!(topic = self.topic, %error, "cannot read; trying again");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

fn is_final(error: &KafkaError) -> bool {
    use rdkafka::types::RDKafkaErrorCode as Code;
    matches!(error, KafkaError::MessageConsumptionFatal(_))
        || error.rdkafka_error_code().is_some_and(|code| {
            matches!(code, Code::UnknownTopicOrPartition | Code::UnknownTopic | Code::TopicAuthorizationFailed)
        })
}
