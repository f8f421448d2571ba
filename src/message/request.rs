//! A record that asks for an item.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Attempt, BatchId, ItemId, SourceName};
use crate::runtime::clock::Timestamp;

/// Asks for one item of one source.
///
/// A producer needs to send no more than `{"item": "584051070147"}`, or the bare id without JSON: the source
/// is the topic's, the id of the request is its `ce_id` header, else `topic/partition/offset`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "weir request v1")]
pub struct Request {
    /// The vendor's product id, as text.
    pub item: ItemId,
    /// The source; if given it must be the topic's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<SourceName>,
    /// The IDs that were submitted together with this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch: Option<BatchId>,
    /// Parameters of the vendor's API that change the reply (ZIP code, fields, …).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub params: BTreeMap<String, String>,
    /// When it was first asked for; without it the time of the Kafka message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requested_at: Option<Timestamp>,
    /// Not called any more after this time: the request ends as a dead letter with reason `expired`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    /// How many calls there have been for it. Written by weir.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub calls: u32,
    /// What earlier calls for this request came to, oldest first. Written by weir.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<Attempt>,
}

impl Request {
    /// A request for `item` that says nothing else.
    #[must_use]
    pub fn new(item: ItemId) -> Self {
        Self {
            item,
            source: None,
            batch: None,
            params: BTreeMap::new(),
            requested_at: None,
            expires_at: None,
            calls: 0,
            history: Vec::new(),
        }
    }

    /// How many attempts have been spent; a throttle and a refused account spend none.
    #[must_use]
    pub fn attempts_spent(&self) -> u32 {
        let spent = self.history.iter().filter(|attempt| attempt.is_spent()).count();
        u32::try_from(spent).unwrap_or(u32::MAX)
    }
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
const fn is_zero(calls: &u32) -> bool {
    *calls == 0
}
