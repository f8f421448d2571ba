//! What is told when each request of a batch has its end.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::BatchId;
use crate::runtime::clock::Timestamp;

/// Each request of this batch has its end. Told at least once; and once more when requests were added to the batch
/// under the same name and have ended, then with the counts of all of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "weir batch end v1")]
pub struct BatchEnd {
    /// Which batch.
    pub batch: BatchId,
    /// How many requests it has: the sum of the next four.
    pub requested: u64,
    /// Of these, answered with data.
    pub found: u64,
    /// Answered: there is no such item.
    pub absent: u64,
    /// Answered: not for sale now.
    pub off_shelf: u64,
    /// Given up: each has its dead letter.
    pub dead: u64,
    /// When the last of its records was written.
    pub finished_at: Timestamp,
}

impl BatchEnd {
    /// The key of its record: a newer end of the same batch replaces it.
    #[must_use]
    pub fn key(&self) -> &str {
        self.batch.as_str()
    }

    /// What tells this end from a later one of the same batch: its `ce_id`.
    #[must_use]
    pub fn id(&self) -> String {
        format!("{}#{}", self.batch, self.finished_at.as_millis())
    }
}
