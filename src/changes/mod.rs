//! changes: results → one record for each watched column of an item that differs from its last result.
//!
//! ```text
//!  weir.results ──► round ──► recall ──► compare ──► weir.changes + offsets ──► remember
//!                 rows or age  Memory     pure        one transaction            Memory
//! ```
//!
//! Each result is compared with what is remembered of its item ([`Watched`]), outside Kafka: a million items would
//! not fit into memory, and all of the history need not be read for each. Memory and transaction cannot end
//! together, so the commit says how far changes have been published (`C1:<next>`) while its offset stays at the
//! round's first record: after a crash the round is read again, and only remembered.
//!
//! Results of one item are on one partition, in order. What is older than what is known is no news.

mod stage;

use std::{collections::HashMap, fmt, time::Duration};

use serde::{Deserialize, Serialize};
pub(crate) use stage::WRITER;
pub use stage::{Changes, ChangesParts};

use crate::message::{ItemId, SourceName, Watched};

/// `[changes]`: how many results are compared at once.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Results of a round, at most; twice as many are held.
    pub rows: usize,
    /// How long the first result of a round waits for others.
    #[serde(with = "humantime_serde")]
    pub age: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self { rows: 10_000, age: Duration::from_millis(500) }
    }
}

/// What names an item.
pub type Key = (SourceName, ItemId);

/// Remembers what was last seen of each item.
pub trait Memory: Send + Sync + 'static {
    /// Why it cannot now.
    type Error: fmt::Display + Send;

    /// What is remembered of these items; those never seen are missing.
    ///
    /// # Errors
    /// Nothing was learned: ask again.
    fn recall(&self, items: &[Key]) -> impl Future<Output = Result<HashMap<Key, Watched>, Self::Error>> + Send;

    /// Remembers these. The same again, or something older than what is known, is no harm.
    ///
    /// # Errors
    /// Perhaps remembered, perhaps not: say it again.
    fn remember(&self, items: &HashMap<Key, Watched>) -> impl Future<Output = Result<(), Self::Error>> + Send;
}

#[cfg(test)]
mod tests;
