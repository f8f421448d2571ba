//! Follows topics from their end on, without a consumer group: committed records written after the opening.

use rdkafka::{
    Message as _, Offset, TopicPartitionList,
    consumer::{Consumer, StreamConsumer},
    error::KafkaError,
};
use tracing::warn;

use super::{Partition, ReadError, Record, client::Config, log_names::Names, logs, native, scan};

/// After an error that may pass.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(500);

/// A `read_committed` reader of what comes.
pub struct Tail {
    consumer: StreamConsumer,
    topics: String,
    names: Names,
}

impl Tail {
    /// Begins at the end of each partition, as it is now: whatever is written later is seen.
    ///
    /// # Errors
    /// [`ReadError::Failed`]: a topic is not there, or no broker answers.
    pub async fn open(config: &Config, topics: &[String]) -> Result<Self, ReadError> {
        let failed = |reason: String| ReadError::alone(&topics.join(", "), reason);
        let names = logs::names(config, topics).await.map_err(|error| failed(error.to_string()))?;
        let bounds = scan::bounds(config, topics).await.map_err(|error| failed(error.to_string()))?;
        let consumer: StreamConsumer = config
            .base()
            // librdkafka wants a name; without a subscription and commits no group comes of it.
            .set("group.id", "weir.tail")
            .set("isolation.level", "read_committed")
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "latest")
            .set("queued.max.messages.kbytes", "8192")
            .set("fetch.wait.max.ms", "20")
            .create()
            .map_err(|error| failed(error.to_string()))?;
        let mut list = TopicPartitionList::new();
        for scan::Bounds { partition, end, .. } in &bounds {
            list.add_partition_offset(&partition.topic, partition.number, Offset::Offset(*end))
                .map_err(|error| failed(error.to_string()))?;
        }
        consumer.assign(&list).map_err(|error| failed(error.to_string()))?;
        Ok(Self { consumer, topics: topics.join(", "), names })
    }

    /// The next record. While the brokers are away it waits for them.
    ///
    /// # Cancellation
    /// Safe: no record is lost.
    ///
    /// # Errors
    /// [`ReadError::Failed`]: waiting cannot help.
    pub async fn next(&mut self) -> Result<(Partition, Record), ReadError> {
        loop {
            match self.consumer.recv().await {
                Ok(message) => {
                    let partition = Partition { topic: message.topic().into(), number: message.partition() };
                    let record = native::record(&message);
                    let log = self.names.of(message.topic()).cloned();
                    return Ok((partition, Record { log, ..record }));
                }
                Err(error @ KafkaError::MessageConsumptionFatal(_)) => {
                    return Err(ReadError::alone(&self.topics, error.to_string()));
                }
                Err(error) => {
                    warn!(topics = self.topics, %error, "cannot read; trying again");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}
