//! replay: re-inserts a range of a topic into tables, or sends it back to requests; a job that ends.
//!
//! [`when`] and [`filter`] say which piece, [`plan`] which offsets that is; [`tables`] inserts what is missing,
//! [`requests`] sends what [`ask`] makes of each record, and [`rebuild`] takes stored rows instead of records. How far a
//! run has come is kept as the committed offsets of a consumer group without members, `<prefix>.replay.<name>`, so the
//! next run with the same arguments goes on where this one was interrupted, from any machine.

pub mod ask;
pub mod filter;
pub mod into;
pub mod plan;
pub mod rebuild;
pub mod requests;
pub mod tables;
pub mod when;

use crate::{
    kafka::{ScanError, TransactError, admin::AdminError},
    store::Trouble,
};

/// Why a run stopped. It can be run again: it goes on where it stopped.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// Kafka.
    #[error("{0}")]
    Admin(#[from] AdminError),
    /// Kafka, in the middle of reading.
    #[error("{0}")]
    Scan(#[from] ScanError),
    /// Kafka, in the middle of writing.
    #[error("{0}")]
    Transact(#[from] TransactError),
    /// ClickHouse.
    #[error("{0}")]
    Trouble(#[from] Trouble),
    /// A task of this process was broken off, or has a defect.
    #[error("replay: {0}")]
    Task(#[from] tokio::task::JoinError),
}
