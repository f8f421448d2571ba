//! Aborts a transaction of an earlier producer that was left open and blocks the group's commits.
//!
//! A transaction ends by a marker in each of its partitions. A broker that was killed and starts again decides about
//! the transactions that it finds, and can drop the markers for partitions that have no leader at that moment as if
//! they were deleted (seen with Kafka 4.4.0, one broker: "likely deleted already and hence can be skipped"; it fits
//! KAFKA-20734). If the marker of the group's offsets is among them, these stay pending: nobody can read the group's
//! commits any more, and its members wait for ever.
//!
//! So a producer looks whether they are, and if so makes a transaction that touches every partition that its
//! predecessor can have touched, and rolls it back: the markers of that close what was open. It is right also for a
//! transaction that the brokers had decided to commit, since its offsets are rolled back with it: the reader, which
//! starts after this, finds the work not done. Nothing is lost; where a marker of that transaction was written, an
//! outcome can be there twice.
//!
//! What is *not* repaired: if only the markers of records were dropped, the next commit of the same producer brings
//! them to light. To roll those back too could lose what was meant to be committed, and a doubled outcome beats a
//! lost one.

use std::time::Duration;

use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::KafkaError,
    producer::{BaseRecord, Producer as _},
};
use tokio::time::Instant;
use tracing::{debug, warn};

use super::{Offer, REPORTS, Reach, STEP, Transactions};
use crate::kafka::{
    TransactError,
    client::{BROKER_PAUSES, Config},
    ledger::BROKERS_LIMIT,
};

/// How long offsets may be pending without anything being wrong: as long as a transaction may be open, and until the
/// broker has noticed that its producer has gone.
const PENDING: Duration = Duration::from_secs(20);

/// How long the group's coordinator may take to answer, a cluster's very first one included.
const ANSWER: Duration = Duration::from_secs(30);

/// The value of this transaction's records, for readers of uncommitted records.
const NOTE: &[u8] = b"aborted: ends a transaction that an outage left open";

impl Transactions {
    /// Looks whether the group's commits can be read; if not, rolls back whatever is open of this producer's name.
    pub(super) fn close_open_ends(&self, config: &Config, reach: &Reach) -> Result<(), TransactError> {
        let reads = self.partitions(&reach.reads)?;
        if is_stable(config, reach, &reads)? {
            return Ok(());
        }
        let writes = self.partitions(&reach.writes)?;
        let stranger = asker(config, reach, "read_uncommitted")?;
        answer_of(&stranger, reach, &reads)?;
        let membership = stranger.group_metadata().ok_or_else(|| for_good("the group has no metadata"))?;
        warn!(
            name = self.name,
            group = reach.group,
            "Kafka transaction left open by an outage, so the group's commits cannot be read; aborting it"
        );
        self.producer.begin_transaction().map_err(|error| self.classify(&error))?;
        for (topic, partition) in &writes {
            let note = BaseRecord::<(), [u8]>::to(topic).partition(*partition).payload(NOTE);
            self.offer(note).map_err(|error| match error {
                Offer::TooLarge => for_good(format!("{topic} takes no record of {} bytes", NOTE.len())),
                Offer::Failed(error) => error,
            })?;
        }
        while self.producer.in_flight_count() > 0 {
            self.producer.poll(REPORTS);
        }
        // Refused, always. Only that the group's partition takes part in the transaction matters.
        let offsets = refused(&reads).map_err(for_good)?;
        match self.insist(None, |producer| producer.send_offsets_to_transaction(&offsets, &membership, STEP)) {
            Ok(()) | Err(TransactError::Aborted(_)) => {}
            Err(worse) => return Err(worse),
        }
        self.insist(None, |producer| producer.abort_transaction(STEP)).map_err(for_good)?;
        debug!(name = self.name, partitions = writes.len(), "aborted transactions that were left open");
        Ok(())
    }

    /// All partitions of these topics.
    fn partitions(&self, topics: &[String]) -> Result<Vec<(String, i32)>, TransactError> {
        let mut found = Vec::new();
        for topic in topics {
            let unknown = |reason: String| TransactError::Rebuild(format!("looking up topic {topic}: {reason}"));
            let metadata = self.producer.client().fetch_metadata(Some(topic), STEP);
            let metadata = metadata.map_err(|error| unknown(error.to_string()))?;
            for known in metadata.topics() {
                if let Some(error) = known.error() {
                    return Err(unknown(KafkaError::MetadataFetch(error.into()).to_string()));
                }
                found.extend(known.partitions().iter().map(|partition| (topic.clone(), partition.id())));
            }
        }
        Ok(found)
    }
}

/// Whether the group's commits can be read, as its members read them: none of them pending.
fn is_stable(config: &Config, reach: &Reach, reads: &[(String, i32)]) -> Result<bool, TransactError> {
    let consumer = asker(config, reach, "read_committed")?;
    let wanted = list(reads);
    let (deadline, mut pauses) = (Instant::now() + PENDING, BROKER_PAUSES);
    while Instant::now() < deadline {
        match consumer.committed_offsets(wanted.clone(), STEP) {
            Ok(_) => return Ok(true),
            Err(error) => debug!(group = reach.group, %error, "the group's commits cannot be read yet"),
        }
        consumer.poll(pauses.failed());
    }
    Ok(false)
}

/// Waits until the group's coordinator answers: a producer of librdkafka 2.12 that asks for a coordinator before there
/// is one can wait for ever.
fn answer_of(consumer: &BaseConsumer, reach: &Reach, reads: &[(String, i32)]) -> Result<(), TransactError> {
    let (deadline, mut pauses) = (Instant::now() + ANSWER, BROKER_PAUSES);
    while let Err(error) = consumer.committed_offsets(list(reads), STEP) {
        if Instant::now() > deadline {
            return Err(TransactError::Rebuild(format!("asking about group {:?}: {error}", reach.group)));
        }
        // A coordinator that is just starting refuses at once.
        consumer.poll(pauses.failed());
    }
    Ok(())
}

/// A consumer that queries the group without joining it.
fn asker(config: &Config, reach: &Reach, isolation: &str) -> Result<BaseConsumer, TransactError> {
    let mut settings = config.base();
    settings.set("group.id", &reach.group).set("isolation.level", isolation);
    settings.create().map_err(|error| TransactError::Rebuild(format!("asking about group {:?}: {error}", reach.group)))
}

fn list(partitions: &[(String, i32)]) -> TopicPartitionList {
    let mut list = TopicPartitionList::new();
    for (topic, partition) in partitions {
        list.add_partition(topic, *partition);
    }
    list
}

/// A commit that no broker stores: its metadata is longer than they take, and a group with members takes none from
/// a stranger. If one did store it, it would be rolled back, and a ledger would refuse to read it.
fn refused(reads: &[(String, i32)]) -> Result<TopicPartitionList, KafkaError> {
    let mut offsets = list(&reads[..reads.len().min(1)]);
    for (topic, partition) in reads.iter().take(1) {
        offsets.set_partition_offset(topic, *partition, Offset::Offset(0))?;
        if let Some(mut element) = offsets.find_partition(topic, *partition) {
            element.set_metadata("-".repeat(BROKERS_LIMIT + 1));
        }
    }
    Ok(offsets)
}

/// Until this is done nothing else may be written under this name.
fn for_good(reason: impl std::fmt::Display) -> TransactError {
    TransactError::Rebuild(format!("aborting a transaction that was left open: {reason}"))
}
