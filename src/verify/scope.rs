//! The scope of a verification, where its data is, and the errors that prevent it.

use crate::{
    kafka::{Partition, ScanError, admin::AdminError, client, ledger::LedgerError},
    message::{BatchId, SourceName},
    runtime::clock::Timestamp,
    store::{Store, Trouble},
    topics::{Groups, Topics},
};

/// How much earlier than the requests their outcomes may be stamped: the clocks of two machines differ.
pub(super) const SKEW_MS: i64 = 10 * 60 * 1_000;

/// Why nothing can be said.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// Kafka.
    #[error("{0}")]
    Admin(#[from] AdminError),
    /// Kafka, in the middle of reading.
    #[error("{0}")]
    Scan(#[from] ScanError),
    /// ClickHouse.
    #[error("{0}")]
    Trouble(#[from] Trouble),
    /// What a stage has done cannot be told.
    #[error("cannot read how far group {group:?} has processed {partition}: {error}")]
    Ledger {
        /// The stage's group.
        group: String,
        /// The partition.
        partition: Partition,
        /// Why.
        error: LedgerError,
    },
}

/// What is to be proved.
#[derive(Clone, Debug, Default)]
pub struct Scope {
    /// Only the requests of this batch; rows are compared all the same.
    pub batch: Option<BatchId>,
    /// Only requests that were sent from this time on.
    pub since: Option<Timestamp>,
    /// How many of the faults of each kind are named.
    pub named: usize,
}

/// Where everything is.
#[derive(Clone, Copy)]
pub struct Places<'a> {
    /// The brokers.
    pub kafka: &'a client::Config,
    /// The topics' names.
    pub topics: &'a Topics,
    /// The groups' names.
    pub groups: &'a Groups,
    /// The sources.
    pub sources: &'a [SourceName],
    /// The tables.
    pub store: &'a Store,
}
