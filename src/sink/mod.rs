//! sink: every topic → ClickHouse, one block of contiguous offsets at a time, each record exactly one row.
//!
//! ```text
//!  Reader ──► Blocks ──► read ──► intent in the commit ──► insert under a token ──► the next commit
//!             rows, bytes or age    waits for the ack       counted if in doubt       last + 1, next intents
//! ```
//!
//! [`block`] cuts a partition's records into offset ranges, [`sealed`] reads them into rows and these at once into the
//! bytes that ClickHouse is sent ([`crate::store`] has both), [`intent`] is what the commit says of them, [`insert`] stores
//! them, [`doubt`] decides what an answer means and `settle` asks, `lane` is one partition's state, and `stage` holds
//! them together. While ClickHouse takes nothing, blocks wait, partitions pause, and what waits stays within
//! `sink.memory`.
//!
//! Killed at any moment, the next owner of a partition finds in its commit the blocks that may be in the table, makes
//! exactly those again, and counts before it inserts. Where somebody else has set the group's offset, [`guard`] keeps
//! what is stored from being stored again. What cannot be read becomes a dead letter, written in one
//! transaction with the intent of its block.

pub mod block;
pub mod doubt;
pub mod guard;
pub mod insert;
pub mod intent;
mod lane;
mod patience;
pub mod sealed;
mod settle;
mod stage;

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

pub use insert::Insert;

use crate::{
    kafka::{ReadError, Reader, TransactError, Writer},
    runtime::{clock::Clock, health::RoleHealth},
    store::{Route, write::ROWS_MAX},
    topics::Topic,
};

/// `[sink]`: when a block is full, and how much may wait.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Records that make a block; if more wait by then it takes up to eight times as many, never over a million.
    pub rows: usize,
    /// Bytes of a block in memory, at most.
    pub bytes: ByteSize,
    /// Age of a block's first record. If the block is not full by then it still gives way for a quarter of that to each
    /// insert under way, and grows meanwhile.
    #[serde(with = "humantime_serde")]
    pub age: Duration,
    /// Bytes that wait in all partitions together, about: beyond it the fullest partitions pause.
    pub memory: ByteSize,
}

impl Default for Config {
    fn default() -> Self {
        Self { rows: 10_000, bytes: ByteSize::mib(16), age: Duration::from_secs(1), memory: ByteSize::mib(128) }
    }
}

impl Config {
    fn limits(&self) -> block::Limits {
        let bytes = usize::try_from(self.bytes.as_u64()).unwrap_or(usize::MAX);
        block::Limits { rows: self.rows.clamp(1, ROWS_MAX), bytes: bytes.max(1), age: self.age }
    }

    fn memory(&self) -> usize {
        usize::try_from(self.memory.as_u64()).unwrap_or(usize::MAX)
    }
}

/// Why the sink ended.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// Kafka.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The transactions of dead letters.
    #[error(transparent)]
    Transact(#[from] TransactError),
    /// A stop that could not wait any longer for Kafka.
    #[error("stopped while Kafka did not answer: a commit was in flight, and the next start checks its outcome")]
    Stopped,
    /// A record of a topic that the sink was not told about.
    #[error("the sink was assigned topic {topic:?}, but does not know its records")]
    Topic {
        /// Its name.
        topic: Arc<str>,
    },
    /// A bug.
    #[error("an insert task ended abnormally: {0}")]
    Insert(#[from] tokio::task::JoinError),
}

/// What the sink works with.
#[derive(Debug)]
pub struct Parts<R, W, I> {
    /// Where records come from, and commits go.
    pub reader: R,
    /// Writes dead letters.
    pub writer: W,
    /// ClickHouse.
    pub store: I,
    /// What is read.
    pub topics: Vec<Topic>,
    /// The topic of dead letters.
    pub dead_topic: Arc<str>,
    /// The time.
    pub clock: Clock,
    /// Where the sink says how it is.
    pub health: RoleHealth,
}

/// Stores every record that the reader brings, until `stop`: then what has been read is still stored, as far as
/// ClickHouse takes it at once, and committed.
///
/// # Errors
/// [`SinkError`]. Nothing is lost: what was not committed is read again.
pub async fn run<R: Reader, W: Writer, I: Insert>(
    parts: Parts<R, W, I>,
    config: Config,
    stop: CancellationToken,
) -> Result<(), SinkError> {
    let route = |topic: &Topic| (topic.name.as_str().into(), Arc::new(Route::from(topic)));
    let routes: HashMap<Arc<str>, Arc<Route>> = parts.topics.iter().map(route).collect();
    stage::Stage::new(parts, routes, (config.limits(), config.memory()), stop).run().await
}
