//! Blocking librdkafka queries to the brokers, by a client without a consumer group.

use std::{ops::Range, time::Duration};

use rdkafka::{
    Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::{KafkaError, KafkaResult},
    types::RDKafkaErrorCode,
};
use tokio::time::Instant;
use tracing::debug;

use super::{Partition, Record, admin::AdminError, client::Config, native::record};

/// How long one question to the brokers may take.
pub(super) const ASK: Duration = Duration::from_secs(10);
/// How long a poll waits for the first record.
const POLL: Duration = Duration::from_millis(100);
/// Records that are handed over together, at most, and their bytes.
const GATHER: usize = 500;
const GATHER_BYTES: usize = 1024 * 1024;

/// A client that reads what it is assigned by hand, and is a member of no group.
pub(super) fn consumer(config: &Config, read_committed: bool) -> KafkaResult<BaseConsumer> {
    let mut client = config.base();
    // librdkafka wants a group's name to assign partitions by hand; nothing is ever committed under this one.
    let group = config.properties.get("group.id").cloned().unwrap_or(format!("{}.scan", config.group_prefix));
    client
        .set("group.id", group)
        .set("isolation.level", if read_committed { "read_committed" } else { "read_uncommitted" })
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("enable.partition.eof", "true")
        .set("auto.offset.reset", "error")
        .set("queued.max.messages.kbytes", "8192")
        // By default the client rests for a second whenever that much waits here: a third of the speed.
        .set("fetch.queue.backoff.ms", "5")
        .set("fetch.wait.max.ms", "10");
    client.create()
}

/// The partitions of these topics, in order.
pub(super) fn partitions(consumer: &BaseConsumer, topics: &[String]) -> KafkaResult<Vec<Partition>> {
    let metadata = consumer.fetch_metadata(None, ASK)?;
    let mut found = Vec::new();
    for name in topics {
        let topic = metadata.topics().iter().find(|topic| topic.name() == name);
        let topic = topic.ok_or(KafkaError::MetadataFetch(RDKafkaErrorCode::UnknownTopicOrPartition))?;
        let mut numbers: Vec<i32> = topic.partitions().iter().map(rdkafka::metadata::MetadataPartition::id).collect();
        numbers.sort_unstable();
        found.extend(numbers.into_iter().map(|number| Partition { topic: name.as_str().into(), number }));
    }
    Ok(found)
}

/// Runs questions that librdkafka answers by blocking, away from the async threads.
pub(super) async fn blocking<T: Send + 'static>(
    config: &Config,
    attempt: &str,
    ask: impl FnOnce() -> KafkaResult<T> + Send + 'static,
) -> Result<T, AdminError> {
    let refused = |reason: String| AdminError::Refused { attempt: attempt.to_owned(), reason };
    match tokio::task::spawn_blocking(ask).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) if error.rdkafka_error_code().is_some_and(is_away) => {
            Err(AdminError::Unreachable { brokers: config.brokers.clone(), reason: error.to_string() })
        }
        Ok(Err(error)) => Err(refused(error.to_string())),
        Err(panic) => Err(refused(panic.to_string())),
    }
}

fn is_away(code: RDKafkaErrorCode) -> bool {
    use RDKafkaErrorCode as Code;
    matches!(code, Code::BrokerTransportFailure | Code::AllBrokersDown | Code::OperationTimedOut | Code::Resolve)
}

/// Hands over all that a small topic holds. Blocks.
///
/// # Errors
/// [`KafkaError`]: the topic is not there, or the brokers bring nothing.
pub(super) fn read_whole(consumer: &BaseConsumer, topic: &str, mut take: impl FnMut(Record)) -> KafkaResult<()> {
    for partition in partitions(consumer, &[topic.to_owned()])? {
        let (low, end) = consumer.fetch_watermarks(&partition.topic, partition.number, ASK)?;
        let (range, mut next, mut moved) = (low..end, low, Instant::now());
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(&partition.topic, partition.number, Offset::Offset(low))?;
        consumer.assign(&list)?;
        while next < range.end {
            let (records, end) = gather(consumer, &range, next);
            if let Some(last) = records.last() {
                (next, moved) = (last.offset + 1, Instant::now());
            }
            records.into_iter().for_each(&mut take);
            match end {
                End::Reached => break,
                End::Gone => return Err(KafkaError::MessageConsumption(RDKafkaErrorCode::OffsetOutOfRange)),
                End::Trouble(error @ KafkaError::MessageConsumption(RDKafkaErrorCode::TopicAuthorizationFailed)) => {
                    return Err(error);
                }
                End::Open | End::Trouble(_) if moved.elapsed() > ASK => {
                    return Err(KafkaError::MessageConsumption(RDKafkaErrorCode::OperationTimedOut));
                }
                End::Open | End::Trouble(_) => {}
            }
        }
    }
    Ok(())
}

/// Why no more records came.
pub(super) enum End {
    Open,
    Reached,
    Gone,
    Trouble(KafkaError),
}

/// Polls a while: the records of the range that have come, and whether it has ended. Its last offsets may be
/// transaction markers, which nobody is shown: then the end is a record beyond it, or the end of the partition.
#[allow(clippy::wildcard_enum_match_arm, reason = "librdkafka's errors are many, and most of them mean: wait")]
pub(super) fn gather(consumer: &BaseConsumer, range: &Range<i64>, next: i64) -> (Vec<Record>, End) {
    let (mut records, mut bytes, mut wait) = (Vec::new(), 0, POLL);
    while records.len() < GATHER && bytes < GATHER_BYTES {
        match consumer.poll(wait) {
            None => break,
            Some(Ok(message)) if message.offset() >= range.end => return (records, End::Reached),
            Some(Ok(message)) if message.offset() < next => {}
            Some(Ok(message)) => {
                bytes += message.payload_len() + message.key_len();
                records.push(record(&message));
            }
            Some(Err(KafkaError::PartitionEOF(_))) => return (records, End::Reached),
            Some(Err(KafkaError::MessageConsumption(RDKafkaErrorCode::AutoOffsetReset))) => {
                return (records, End::Gone);
            }
            Some(Err(error)) => {
                debug!(%error, "Kafka");
                return (records, End::Trouble(error));
            }
        }
        wait = Duration::ZERO;
    }
    (records, End::Open)
}
