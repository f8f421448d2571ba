//! sink: every topic → ClickHouse, one block of contiguous offsets at a time.
//!
//! ```text
//!  Reader ──► Blocks per partition ──► Store::insert ──► commit last + 1
//!             rows, bytes or age       LZ4, one token     only then
//! ```
//!
//! [`block`] cuts a partition's records into offset ranges, [`row`] says which row each record becomes,
//! [`insert`] stores a range under a token that ClickHouse recognises, `stage` holds them together. While
//! ClickHouse takes nothing, blocks wait, partitions pause, and memory stays within `sink.memory`.
//!
//! Killed between insert and commit, the sink reads the records again. Cut into the same ranges they are
//! recognised by their tokens; cut otherwise (by age) they are stored twice, so everything that counts, counts
//! distinct requests.

pub mod block;
pub mod connection;
pub mod insert;
mod patience;
pub mod present;
pub mod query;
mod refill;
pub mod row;
pub mod schema;
mod stage;
pub mod stored;
mod watched;

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

pub use connection::{ClickHouseConfig, ConnectionError, Trouble, TroubleKind};
pub use insert::{Insert, Store, Tally};
pub use row::Route;

use crate::{
    kafka::{ReadError, Reader},
    topics::Topic,
};

/// `[sink]`: when a block is full, and how much may wait.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Rows of a block, at most; never more than a million.
    pub rows: usize,
    /// Bytes of a block in memory, at most.
    pub bytes: ByteSize,
    /// Age of a block's first record, at most.
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
        block::Limits { rows: self.rows.clamp(1, insert::ROWS_MAX), bytes: bytes.max(1), age: self.age }
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
    /// A record of a topic that the sink was not told about.
    #[error("the sink was handed topic {topic:?}, but does not know what is on it")]
    Topic {
        /// Its name.
        topic: Arc<str>,
    },
    /// A bug.
    #[error("an insert ended by itself: {0}")]
    Insert(#[from] tokio::task::JoinError),
}

/// Stores every record of `topics` that `reader` brings, until `stop`: then what has been read is still stored, as
/// far as ClickHouse takes it at once, and committed.
///
/// # Errors
/// [`SinkError`]. Nothing is lost: what was not committed is read again.
pub async fn run<R: Reader, I: Insert>(
    reader: R,
    store: I,
    topics: &[Topic],
    config: Config,
    stop: CancellationToken,
) -> Result<(), SinkError> {
    let routes: HashMap<Arc<str>, Arc<Route>> =
        topics.iter().map(|topic| (topic.name.as_str().into(), Arc::new(Route::from(topic)))).collect();
    stage::Stage::new(reader, store, routes, config.limits(), config.memory()).run(stop).await
}
