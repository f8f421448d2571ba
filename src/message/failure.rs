//! A call that brought no answer for an item: data for the retry stage, not an error of weir's.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{AccountAlias, Lane, Request, RequestId, SourceName};
use crate::runtime::clock::Timestamp;

/// Why a call brought no answer. Absent and off-shelf items are answers, not failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// The vendor says "too fast". Tried again when it allows; spends no attempt.
    Throttled,
    /// The vendor, or the way to it, is broken: transport errors, 5xx, its own backend's errors.
    Outage,
    /// The account was refused (token, key, permission). Another account may serve; spends no attempt.
    Denied,
    /// A reply that nobody can make sense of: not the JSON that the vendor documents, another item's data.
    Malformed,
    /// The vendor says that our request is wrong; trying again cannot help.
    Bug,
}

impl Class {
    /// All of them, in the order of declaration.
    pub const ALL: [Self; 5] = [Self::Throttled, Self::Outage, Self::Denied, Self::Malformed, Self::Bug];

    /// Whether a failure of this class uses up one of the request's attempts.
    #[must_use]
    pub const fn spends_an_attempt(self) -> bool {
        match self {
            Self::Throttled | Self::Denied => false,
            Self::Outage | Self::Malformed | Self::Bug => true,
        }
    }

    /// The word in records and rows.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Throttled => "throttled",
            Self::Outage => "outage",
            Self::Denied => "denied",
            Self::Malformed => "malformed",
            Self::Bug => "bug",
        }
    }
}

/// One call for one request that brought no answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Attempt {
    /// When its end was known.
    pub at: Timestamp,
    /// The account that called.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<AccountAlias>,
    /// Why it brought no answer.
    pub class: Class,
    /// The vendor's own code (`gw.QosAppFrequencyLimit`), or ours for transport (`timeout`, `connect`).
    pub code: String,
    /// The vendor's own words, shortened, without secrets.
    pub message: String,
    /// The HTTP status, if there was a reply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http_status: Option<u16>,
    /// From sending to the end of the reply, in milliseconds.
    pub latency_ms: u32,
    /// Not to be tried again before this time, if the vendor or its protocol says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_before: Option<Timestamp>,
}

impl Attempt {
    /// What the code begins with if weir itself held the request back (breaker open, account paused, quota out of
    /// reach): there was no call.
    pub const HELD_BACK: &str = "weir.held.";

    /// Whether the request was held back before there was a call.
    #[must_use]
    pub fn is_held_back(&self) -> bool {
        self.code.starts_with(Self::HELD_BACK)
    }

    /// Whether it uses up one of the request's attempts.
    #[must_use]
    pub fn is_spent(&self) -> bool {
        self.class.spends_an_attempt() && !self.is_held_back()
    }
}

/// A failed attempt together with the request that it was for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "weir failure v1")]
pub struct Failure {
    /// Which request.
    pub request_id: RequestId,
    /// Which source.
    pub source: SourceName,
    /// The request as it was, so that it can be sent again. Its history does not yet hold `attempt`.
    pub request: Request,
    /// What happened.
    pub attempt: Attempt,
    /// Which of the source's topics it came by, and goes back to.
    #[serde(default, skip_serializing_if = "Lane::is_bulk")]
    pub lane: Lane,
}
