//! What ends the requests of a batch that have not been called for.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::BatchId;
use crate::runtime::clock::Timestamp;

/// Requests of this batch that were asked for up to then are called for no more: each ends as a dead letter of reason
/// `cancelled`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "weir cancellation v1")]
pub struct Cancellation {
    /// Which batch.
    pub batch: BatchId,
    /// Until when; what is enqueued later under the same name is called for.
    pub cancelled_at: Timestamp,
}

impl Cancellation {
    /// The key of its record: a newer one of the same batch replaces it.
    #[must_use]
    pub fn key(&self) -> String {
        format!("cancel/{}", self.batch)
    }
}
