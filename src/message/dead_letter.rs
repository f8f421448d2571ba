//! A request that will not be tried again by itself.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Request, RequestId, SourceName};
use crate::runtime::clock::Timestamp;

/// Why a request ended without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// All attempts were spent.
    Exhausted,
    /// The vendor says that the request itself is wrong.
    Permanent,
    /// Longer ago first called for than the age limit, or past its `expires_at`.
    Expired,
    /// The money for its batch is spent.
    Budget,
    /// Its batch was cancelled before it was called for.
    Cancelled,
    /// The record could not be read as a request (or failure) at all.
    Invalid,
}

impl Reason {
    /// The word in records and rows.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Exhausted => "exhausted",
            Self::Permanent => "permanent",
            Self::Expired => "expired",
            Self::Budget => "budget",
            Self::Cancelled => "cancelled",
            Self::Invalid => "invalid",
        }
    }
}

/// Where a record stood when it was given up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Origin {
    /// The topic.
    pub topic: String,
    /// The partition.
    pub partition: i32,
    /// The offset.
    pub offset: i64,
}

/// A request's end without an answer: the reason, and everything that was tried.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "weir dead letter v1")]
pub struct DeadLetter {
    /// Which request; for a record that could not be read, where it stood (`topic/partition/offset`).
    pub request_id: RequestId,
    /// Which source.
    pub source: SourceName,
    /// Why.
    pub reason: Reason,
    /// The same for people: what was wrong with what.
    pub message: String,
    /// When it was given up.
    pub died_at: Timestamp,
    /// The record that was given up.
    pub origin: Origin,
    /// The request with its whole history, if it could be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<Request>,
    /// The record's bytes as they came, in base64 and cut at 64 KiB, if it could not be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_base64: Option<String>,
}

impl DeadLetter {
    /// How many bytes of an unreadable record are kept.
    pub const ORIGINAL_LIMIT: usize = 64 * 1024;
}
