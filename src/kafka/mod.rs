//! The log between the stages, and the only place that knows rdkafka.
//!
//! Stages see [`Reader`] and [`Writer`]; no rdkafka type crosses them. One thread owns the membership in the
//! consumer group ([`KafkaReader`]), another the transactions ([`KafkaWriter`]); the traits are the bounded channels to
//! and from them. What has been completed out of order is kept in a pure [`ledger`] per partition, and
//! [`outbox`] gathers completed records into transactions.

pub mod admin;
mod ask;
pub mod client;
mod commit_mark;
pub mod follow;
pub mod intake;
pub mod job;
pub mod kept;
pub mod leadership;
pub mod ledger;
pub mod log_names;
pub mod logs;
mod membership;
mod native;
pub mod outbox;
pub mod oversized;
pub mod page;
pub mod producer;
mod reader;
pub mod scan;
#[cfg(test)]
pub(crate) mod scripted;
#[cfg(test)]
pub(crate) mod simulated;
pub mod tail;
pub mod topic_ids;
mod writer;

use std::{fmt, ops::Range, sync::Arc};

use bytes::Bytes;
use tokio::sync::oneshot;

pub use job::Job;
pub use membership::Membership;
pub use oversized::{Instead, TooLarge};
pub use producer::Producer;
pub use reader::{GroupConfig, KafkaReader};
pub use scan::{Scan, ScanError};
pub use writer::{KafkaWriter, Reach};

use crate::{
    message::{
        codec,
        envelope::{Header, Headers},
    },
    runtime::clock::Timestamp,
};

/// A partition of a topic.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Partition {
    /// The topic.
    pub topic: Arc<str>,
    /// Its number, from 0.
    pub number: i32,
}

impl fmt::Display for Partition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.topic, self.number)
    }
}

impl fmt::Debug for Partition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Numbers the assignments of this process: each time that a partition is handed to it, it gets a new one.
/// What was begun under an old epoch must not be committed under a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Epoch(pub u64);

/// What a group has committed for a partition: one value, written and read together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Everything before this offset is done.
    pub offset: i64,
    /// What is done beyond it, see [`ledger`]; at most [`ledger::METADATA_LIMIT`] bytes.
    pub metadata: String,
}

/// A message as it was read.
#[derive(Clone, Debug)]
pub struct Record {
    /// Its offset.
    pub offset: i64,
    /// The producer's time, or the broker's, as the topic is set.
    pub time: Timestamp,
    /// The key.
    pub key: Option<Bytes>,
    /// The value.
    pub value: Option<Bytes>,
    /// The headers.
    pub headers: Headers,
    /// What its log is called, if not by its topic's name, see [`logs`].
    pub log: Option<Arc<str>>,
}

impl Record {
    /// About how many bytes it takes in memory: a header's value is an allocation beside its place in the list.
    #[must_use]
    pub fn footprint(&self) -> usize {
        const HEADER: usize = size_of::<Header>() + 16;
        let headers: usize = self.headers.iter().map(|(name, value)| HEADER + name.len() + value.len()).sum();
        let parts = [&self.key, &self.value].into_iter().flatten();
        size_of::<Self>() + headers + parts.map(|part| 16 + part.len()).sum::<usize>()
    }

    /// The record as [`codec`] reads it; its topic is the name of the log.
    #[must_use]
    pub fn raw<'a>(&'a self, partition: &'a Partition) -> codec::Raw<'a> {
        codec::Raw {
            topic: self.log.as_ref().unwrap_or(&partition.topic),
            partition: partition.number,
            offset: self.offset,
            time: self.time,
            headers: &self.headers,
            value: self.value.as_deref(),
        }
    }
}

/// The largest [`Outgoing::size`] that any topic made by `weir topics apply` takes, frame included. What a topic or
/// `kafka.record_limit` takes less of is found out by writing, see [`TransactError::TooLarge`].
pub const RECORD_LIMIT: usize = client::MESSAGE_LIMIT - 64 * 1024;

/// A message to be written. Its partition follows from the key as in Java's client (murmur2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// The topic.
    pub topic: Arc<str>,
    /// The key; without one any partition.
    pub key: Option<Bytes>,
    /// The value.
    pub value: Bytes,
    /// The headers.
    pub headers: Headers,
}

impl Outgoing {
    /// About how many bytes it takes in memory and on the wire.
    #[must_use]
    pub fn size(&self) -> usize {
        let headers: usize = self.headers.iter().map(|(key, value)| key.len() + value.len()).sum();
        self.value.len() + self.key.as_ref().map_or(0, Bytes::len) + headers
    }
}

/// A partition that has just been handed to this process.
#[derive(Clone, Debug)]
pub struct Assignment {
    /// Which.
    pub partition: Partition,
    /// Under which epoch.
    pub epoch: Epoch,
    /// The group's committed offset; `None` if it never committed, or committed for a former topic of this name:
    /// reading starts at the earliest record.
    pub committed: Option<Committed>,
    /// What its log is called, if not by its topic's name, see [`logs`].
    pub log: Option<Arc<str>>,
}

/// An event of a consumer, for its stage.
#[derive(Debug)]
pub enum Event {
    /// These partitions were assigned to this process, under new epochs.
    Assigned(Vec<Assignment>),
    /// Records of one partition, by offset.
    Records {
        /// The partition.
        partition: Partition,
        /// The epoch under which they were read.
        epoch: Epoch,
        /// At least one.
        records: Vec<Record>,
    },
    /// Records that the group had not done yet have been deleted by the topic's retention.
    Gone {
        /// The partition.
        partition: Partition,
        /// The epoch.
        epoch: Epoch,
        /// The lost offsets.
        range: Range<i64>,
    },
    /// These partitions are being revoked. The reader waits for the answer (within its deadline), so that work in
    /// flight can still be committed.
    Revoked(Vec<Partition>, Handover),
    /// These partitions were lost: they belong to another member, and nothing of them may be committed any more.
    Lost(Vec<Partition>),
}

impl Event {
    /// About how many bytes its records take in memory; 0 if it brings none.
    fn footprint(&self) -> usize {
        match self {
            Self::Records { records, .. } => records.iter().map(Record::footprint).sum(),
            Self::Assigned(_) | Self::Gone { .. } | Self::Revoked(..) | Self::Lost(_) => 0,
        }
    }
}

/// The answer to [`Event::Revoked`]: dropping it lets the partitions go.
#[derive(Debug)]
pub struct Handover(pub(crate) Option<oneshot::Sender<()>>);

impl Drop for Handover {
    fn drop(&mut self) {
        if let Some(answer) = self.0.take() {
            // The reader may have given up waiting; then there is nobody to tell.
            let _ = answer.send(());
        }
    }
}

/// Commits of several partitions, each with the epoch that it was made under.
pub type Offsets = Vec<(Partition, Epoch, Committed)>;

/// Why reading ended. The role stops, and its supervisor starts it again from the last commit.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Another process has taken this instance's name.
    #[error("another process runs as {name:?}: {reason}. Give each process its own [instance] name")]
    Fenced {
        /// `group.instance.id`.
        name: String,
        /// What Kafka said.
        reason: String,
    },
    /// A commit in the group was written by a newer weir: ignoring it would do work twice.
    #[error("cannot continue at {partition}: {reason}")]
    Ledger {
        /// The partition.
        partition: Partition,
        /// What is wrong with the metadata.
        reason: String,
    },
    /// Anything else that cannot be repaired by waiting.
    #[error("reading {topics} as group {group:?}: {reason}")]
    Failed {
        /// What was read.
        topics: String,
        /// The consumer group.
        group: String,
        /// What Kafka said.
        reason: String,
    },
}

impl ReadError {
    /// Of a reader that is in no group.
    fn alone(topics: &str, reason: String) -> Self {
        Self::Failed { topics: topics.to_owned(), group: "none".to_owned(), reason }
    }
}

/// Why a transaction did not commit.
#[derive(Debug, thiserror::Error)]
pub enum TransactError {
    /// Aborted; nothing of it is visible. Send the same records again for partitions that are still assigned.
    #[error("transaction aborted: {0}")]
    Aborted(String),
    /// The brokers take no more of this producer: another process has taken its transactional id, or a
    /// transaction was open for longer than they allow.
    #[error("the brokers have fenced the producer {name:?}: {reason}")]
    Fenced {
        /// `transactional.id`.
        name: String,
        /// What Kafka said.
        reason: String,
    },
    /// Rolled back, since their topics do not take these records, and never will: at least one, in their order. Send the
    /// others again with something smaller in their places ([`oversized::Instead::replace`]). There may be more like them.
    #[error("transaction aborted: {}", oversized::words(.0))]
    TooLarge(Vec<TooLarge>),
    /// Its outcome is unknown or the producer failed: restart from the last commit.
    #[error("transaction failed fatally: {0}")]
    Rebuild(String),
}

/// Why a plain write or commit failed.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The log did not take it in time.
    #[error("writing to {topic}: {reason}")]
    Refused {
        /// The topic.
        topic: String,
        /// What Kafka said.
        reason: String,
    },
    /// The commit was refused, usually since a rebalance has taken the partitions away.
    #[error("committing offsets as group {group:?}: {reason}")]
    Commit {
        /// The consumer group.
        group: String,
        /// What Kafka said.
        reason: String,
    },
}

/// Reads topics as a member of a consumer group.
pub trait Reader: Send + 'static {
    /// The next event.
    ///
    /// # Cancellation
    /// Safe: an event is never lost by dropping the future.
    ///
    /// # Errors
    /// [`ReadError`]; then the reader is of no more use.
    fn next(&mut self) -> impl Future<Output = Result<Event, ReadError>> + Send;

    /// Pauses a partition. Takes effect soon; records already fetched still arrive.
    fn pause(&self, partition: &Partition);

    /// Resumes a paused partition.
    fn resume(&self, partition: &Partition);

    /// This process' membership in the group, for [`Writer::transact`].
    fn membership(&self) -> Membership;

    /// Commits without a transaction (the sink: its writes are not on Kafka). Partitions whose epoch is over
    /// are left out: their new owner reads from the commit before. Answers with those that were committed.
    ///
    /// # Errors
    /// [`WriteError::Commit`].
    fn commit(&self, offsets: Offsets) -> impl Future<Output = Result<Vec<Partition>, WriteError>> + Send;
}

/// Writes records, each acknowledged by all in-sync replicas.
pub trait Writer: Send + Sync + 'static {
    /// Writes all records and, with them or not at all, the offsets that they are the outcome of.
    ///
    /// # Cancellation
    /// The transaction runs on the producer's own thread to its end: dropping the future loses the answer, not
    /// the order.
    ///
    /// # Errors
    /// [`TransactError`]; `Aborted` also when one of the epochs is over.
    fn transact(
        &self,
        records: Vec<Outgoing>,
        membership: Membership,
        offsets: Offsets,
    ) -> impl Future<Output = Result<(), TransactError>> + Send;
}
