//! Whether the sink has stored everything written before a given time: until then a batch may only look finished.

use std::collections::HashMap;

use crate::{
    kafka::{
        Partition, Scan, ScanError,
        admin::AdminError,
        client::Config,
        scan::{self, Piece, Span},
    },
    runtime::clock::Timestamp,
};

/// Why that is not known.
#[derive(Debug, thiserror::Error)]
pub enum BehindError {
    /// Kafka.
    #[error("{0}")]
    Admin(#[from] AdminError),
    /// Kafka, in the middle of reading.
    #[error("{0}")]
    Scan(#[from] ScanError),
}

/// What the tables follow from.
#[derive(Clone, Debug)]
pub struct Followed {
    /// The brokers.
    pub kafka: Config,
    /// The sink's group.
    pub group: String,
    /// What it stores.
    pub topics: Vec<String>,
}

impl Followed {
    /// Whether a record that was written before this moment is not stored, as far as the sink's commits tell.
    ///
    /// # Errors
    /// `BehindError`
    pub async fn is_behind(&self, before: Timestamp) -> Result<bool, BehindError> {
        let Self { kafka, group, topics } = self;
        let due: HashMap<Partition, i64> = scan::at_time(kafka, topics, before).await?.into_iter().collect();
        let stored: HashMap<Partition, _> = scan::committed(kafka, group, topics).await?.into_iter().collect();
        let mut spans = Vec::new();
        for bounds in scan::bounds(kafka, topics).await? {
            let done = stored.get(&bounds.partition).and_then(Option::as_ref).map_or(0, |committed| committed.offset);
            let due = due.get(&bounds.partition).copied().unwrap_or(bounds.end).min(bounds.end);
            let range = done.max(bounds.low)..due;
            if !range.is_empty() {
                spans.push(Span { partition: bounds.partition, range });
            }
        }
        if spans.is_empty() {
            return Ok(false);
        }
        // What is left may be transaction markers only, behind which nothing is ever committed.
        let mut scan = Scan::open(kafka, spans)?;
        while let Some(piece) = scan.next().await? {
            if matches!(piece, Piece::Records { .. }) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
