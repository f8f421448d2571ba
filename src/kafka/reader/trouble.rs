//! Error handling of a reader: log, skip deleted offsets, or stop.

use std::time::Duration;

use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::KafkaError,
    topic_partition_list::TopicPartitionListElem,
    types::RDKafkaErrorCode,
};
use tokio::time::Instant;
use tracing::{debug, warn};

use super::{ASK, Context, Event, Partition, ReadError};

/// How often trouble with the brokers is told, at most.
const TELL_AGAIN: Duration = Duration::from_secs(30);

impl Context {
    /// Says what is wrong with the brokers, but not twenty times a second: librdkafka goes on trying by itself.
    pub(super) fn tell(&self, error: &KafkaError, reason: &str) {
        let mut shared = self.shared();
        if shared.told_at.is_some_and(|told_at| told_at.elapsed() < TELL_AGAIN) {
            return debug!(group = self.group.group, %error, reason, "Kafka client error");
        }
        shared.told_at = Some(Instant::now());
        warn!(group = self.group.group, %error, reason, "Kafka error; trying again");
    }

    #[allow(clippy::wildcard_enum_match_arm, reason = "librdkafka's errors are many, and most of them mean: wait")]
    pub(super) fn trouble(&self, consumer: &BaseConsumer<Self>, error: &KafkaError) -> Result<(), ReadError> {
        match error {
            KafkaError::MessageConsumptionFatal(RDKafkaErrorCode::FencedInstanceId) => {
                Err(ReadError::Fenced { name: self.group.instance.clone(), reason: error.to_string() })
            }
            KafkaError::MessageConsumptionFatal(_) => Err(self.failed(error.to_string())),
            KafkaError::MessageConsumption(RDKafkaErrorCode::AutoOffsetReset) => self.skip_the_lost(consumer),
            KafkaError::MessageConsumption(RDKafkaErrorCode::UnknownTopicOrPartition) => {
                self.tell(error, "a topic does not exist (yet): run `weir topics apply`");
                Ok(())
            }
            error => {
                self.tell(error, "while reading");
                Ok(())
            }
        }
    }

    /// Retention has overtaken us: goes on at the first record that is left, and says which are gone.
    fn skip_the_lost(&self, consumer: &BaseConsumer<Self>) -> Result<(), ReadError> {
        let positions = self.insist("reading positions", || consumer.position())?;
        let mut is_explained = false;
        let of_ours = |element: TopicPartitionListElem<'_>| {
            let partition = Partition { topic: element.topic().into(), number: element.partition() };
            let epoch = self.membership.epoch(&partition)?;
            Some((partition, epoch, element.offset()))
        };
        for (partition, epoch, position) in positions.elements().into_iter().filter_map(of_ours).collect::<Vec<_>>() {
            // Begun anew since, together with another partition of its topic: its position was of the former log.
            if self.membership.epoch(&partition) != Some(epoch) {
                continue;
            }
            // Before the first record there is no position yet, but a place to begin.
            let position = if let Offset::Offset(position) = position {
                Some(position)
            } else {
                self.shared().begun_at.get(&partition).copied()
            };
            let ask = || consumer.fetch_watermarks(&partition.topic, partition.number, ASK);
            let (low, end) = self.insist("reading the first offset", ask)?;
            match position {
                Some(position) if position > end => {
                    if self.is_begun_anew(consumer, &partition.topic)? {
                        is_explained = true;
                        continue;
                    }
                    let reason = format!(
                        "the group's committed offset is {position}, but the log ends at {end}: the topic was \
                         re-created, or has lost records; delete the group's offsets for it to start at its first \
                         record"
                    );
                    return Err(ReadError::Ledger { partition, reason });
                }
                Some(position) if position >= low => continue,
                Some(position) => {
                    self.push(Ok(Event::Gone { partition: partition.clone(), epoch, range: position..low }));
                }
                None => {}
            }
            self.begin_again(consumer, &partition, low)?;
            is_explained = true;
        }
        if is_explained { Ok(()) } else { Err(self.failed("the offset to read from is out of range".to_owned())) }
    }

    /// Reads a partition from another offset on. It has stopped by an error, and then a seek is refused.
    fn begin_again(&self, consumer: &BaseConsumer<Self>, partition: &Partition, offset: i64) -> Result<(), ReadError> {
        let mut start = TopicPartitionList::new();
        start
            .add_partition_offset(&partition.topic, partition.number, Offset::Offset(offset))
            .and_then(|()| consumer.incremental_unassign(&start))
            .and_then(|()| consumer.incremental_assign(&start))
            .map_err(|error| self.failed(format!("seeking to offset {offset} of {partition}: {error}")))
    }
}
