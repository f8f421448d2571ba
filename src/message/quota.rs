//! What a fleet remembers of its quotas: each worker's report, and what an operator has set.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{AccountAlias, BatchId, SourceName};
use crate::runtime::clock::Timestamp;

/// What one worker knows of some of a source's accounts, every second in which something changed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "weir quota report v1")]
pub struct QuotaReport {
    /// Which source.
    pub source: SourceName,
    /// Which worker: its `[instance]` name.
    pub instance: String,
    /// Which part of the accounts this is, from 0.
    pub chunk: u32,
    /// Of how many parts.
    pub chunks: u32,
    /// When it was written.
    pub reported_at: Timestamp,
    /// When what is spent was counted; with Redis a little earlier.
    pub counted_at: Timestamp,
    /// Midnight UTC of the day whose calls are counted.
    pub day_at: Timestamp,
    /// The worker has ended in good order: it has made no call since.
    #[serde(default)]
    pub closed: bool,
    /// What is known of the source as a whole; in the first part only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub whole: Option<WholeReport>,
    /// The accounts of this part.
    pub accounts: Vec<AccountReport>,
}

/// What all accounts of a source have in common.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct WholeReport {
    /// Why nobody of the source calls, and until when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<HoldReport>,
    /// A budget that all accounts share is spent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_up: Option<UsedUpReport>,
    /// What is spent of the budgets that all accounts share.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spent: Vec<Spent>,
    /// The addresses that calls leave from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<AddressReport>,
    /// What is spent of the budgets of batches, as far as this worker knows: of those that were called for last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub batches: Vec<BatchReport>,
    /// This worker is cut off from Redis.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut_off: Option<CutOffReport>,
    /// Calls of today whose answers this worker lost before they were committed: they were made again.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub calls_again: u64,
    /// How often today this worker's process ended without a last report, by kill -9 for example: calls that it had not
    /// committed were made again, and are in no count.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub silent_ends: u64,
    /// Calls of this worker are delayed, so that the pace is widened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delays: Option<DelayReport>,
}

/// By how much a worker's calls were delayed in the last seconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DelayReport {
    /// So many milliseconds after their slots calls left, at most.
    pub late_ms: u64,
    /// So many milliseconds later than usual came replies of calls that had left one after the other.
    pub bunched_ms: u64,
    /// The share of its pace that the source is called at for it.
    pub pace: f64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's form")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// Of a worker that is cut off from Redis.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CutOffReport {
    /// Since when.
    pub since_at: Timestamp,
    /// Its lease is used up: it makes no call until Redis is back.
    #[serde(default)]
    pub stopped: bool,
}

/// What is spent of the budget of one batch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BatchReport {
    /// Which batch.
    pub batch: BatchId,
    /// How many calls its budget pays for.
    pub allowed: u64,
    /// What each process holds and has spent of it.
    pub parts: Vec<BatchPart>,
}

/// What one process holds and has spent of a batch's budget.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BatchPart {
    /// Which process: a name that it has as long as it lives.
    pub holder: String,
    /// How many calls it may make in all: of a process that has died they count as made.
    pub granted: u64,
    /// How many it has made.
    pub calls: u64,
    /// The number of its last word: of two the higher one counts.
    pub seq: u64,
}

/// What a worker knows of an address that calls leave from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AddressReport {
    /// What the configuration calls it.
    pub name: String,
    /// Why no call leaves from it, and until when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<HoldReport>,
    /// A budget of it is spent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_up: Option<UsedUpReport>,
    /// What is spent of its budgets.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spent: Vec<Spent>,
}

/// What a worker knows of one account.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AccountReport {
    /// Which account.
    pub alias: AccountAlias,
    /// What the vendor allows it, for people.
    #[serde(default)]
    pub allowed: String,
    /// Calls that this worker made today.
    #[serde(default)]
    pub calls: u64,
    /// Calls that this worker made in the last minute.
    #[serde(default)]
    pub calls_last_minute: u64,
    /// Calls of today that the vendor refused.
    #[serde(default)]
    pub refused: u64,
    /// Slots of today that were missed, and dropped.
    #[serde(default)]
    pub late: u64,
    /// Slots of today that were handed back unused.
    #[serde(default)]
    pub returned: u64,
    /// Why it does not call, and until when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<HoldReport>,
    /// A budget of it is spent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_up: Option<UsedUpReport>,
    /// The address that its calls leave from; missing if there is only one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// When it may call next, if that is not at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_at: Option<Timestamp>,
    /// What is spent of its budgets, by the whole fleet if Redis counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spent: Vec<Spent>,
}

/// Why somebody does not call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HoldReport {
    /// Until when; missing: disabled until an operator resumes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until_at: Option<Timestamp>,
    /// The vendor's code, or the operator's words.
    pub reason: String,
    /// Since when.
    pub since_at: Timestamp,
}

/// A budget, such as a day's, is spent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct UsedUpReport {
    /// Which one and how much it was, for people.
    pub reason: String,
    /// When calls go on.
    pub until_at: Timestamp,
}

/// What is spent of one budget: calls in buckets of time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Spent {
    /// The length of a bucket, in microseconds.
    pub width: u64,
    /// The first bucket begins so many microseconds before 1970.
    #[serde(default)]
    pub shift: u64,
    /// How many buckets in a row count together.
    pub span: u64,
    /// Of windows that follow a calendar: which ones; the numbers are theirs, and the last one ends as width and shift say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calendar: Option<String>,
    /// The number of the first bucket here.
    pub first: u64,
    /// The calls in it and in those that follow.
    pub calls: Vec<u64>,
}

/// What an operator wants of a source, or of one of its accounts or addresses. The newest record of a key counts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "weir quota setting v1")]
pub struct QuotaSetting {
    /// Which source.
    pub source: SourceName,
    /// Which account; missing: the source as a whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<AccountAlias>,
    /// Which address that calls leave from, by its name in the configuration; such a one can only be resumed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// When it was set.
    pub set_at: Timestamp,
    /// It does not call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused: Option<Pause>,
    /// The share of its pace that it goes at, above 0 and at most 1; missing: all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub pace: Option<f64>,
    /// Whatever held or disabled it before is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed_at: Option<Timestamp>,
}

/// An operator's pause.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Pause {
    /// Since when.
    pub since_at: Timestamp,
    /// Until when; missing: until it is resumed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until_at: Option<Timestamp>,
    /// The operator's words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

impl QuotaSetting {
    /// Nothing is set.
    #[must_use]
    pub const fn none(source: SourceName, account: Option<AccountAlias>, set_at: Timestamp) -> Self {
        Self { source, account, address: None, set_at, paused: None, pace: None, resumed_at: None }
    }

    /// Nothing is set of an address.
    #[must_use]
    pub fn of_address(source: SourceName, address: String, set_at: Timestamp) -> Self {
        Self { address: Some(address), ..Self::none(source, None, set_at) }
    }

    /// The pause, unless it is over.
    #[must_use]
    pub fn paused_at(&self, now: Timestamp) -> Option<&Pause> {
        self.paused.as_ref().filter(|pause| pause.until_at.is_none_or(|until| until > now))
    }
}
