//! A record that asks for an item.

use std::{collections::BTreeMap, fmt, time::Duration};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

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
    /// When it was first asked for; without it the time of the Kafka message, which is when the broker took it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requested_at: Option<Timestamp>,
    /// Not called any more after this time: the request ends as a dead letter with reason `expired`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    /// Not answered from a cache that is older than this: a duration (`"10m"`), or a number of seconds; 0: by a call.
    /// Without it the source's own limits hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_age: Option<MaxAge>,
    /// `true`: by a call, as with a `max_age` of 0. What is said of a change has to be seen anew.
    #[serde(default, skip_serializing_if = "is_false")]
    pub no_cache: bool,
    /// The source that it was asked of first, and that did not answer: this one stands in for it. Written by weir.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instead_of: Option<SourceName>,
    /// When it was first called for since it was last asked for: from then on its age counts. Written by weir.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub called_at: Option<Timestamp>,
    /// How many calls there have been for it. Written by weir.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub calls: u32,
    /// What earlier calls for this request came to, oldest first. Written by weir.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<Attempt>,
    /// How often it has been sent again after it had ended as a dead letter: its attempts begin anew then. Written by
    /// weir.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub redriven: u32,
    /// What calls came to before it was last sent again, oldest first; the oldest are left out where there is no
    /// room. Written by weir.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier: Vec<Attempt>,
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
            max_age: None,
            no_cache: false,
            instead_of: None,
            called_at: None,
            calls: 0,
            history: Vec::new(),
            redriven: 0,
            earlier: Vec::new(),
        }
    }

    /// Whether it begins a chain: it is not sent again after a failure. Each such record has one end.
    #[must_use]
    pub fn begins_a_chain(&self) -> bool {
        self.history.is_empty()
    }

    /// How old its answer may be; zero: it has to be called for; `None`: the source's own limits hold.
    #[must_use]
    pub fn oldest_answer(&self) -> Option<Duration> {
        if self.no_cache { Some(Duration::ZERO) } else { self.max_age.map(|age| age.0) }
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

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
const fn is_false(is: &bool) -> bool {
    !*is
}

/// How old an answer may be; to the millisecond, as text or as a number of seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MaxAge(pub Duration);

impl Serialize for MaxAge {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_duration(self.0))
    }
}

impl<'de> Deserialize<'de> for MaxAge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = MaxAge;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a duration like \"10m\", or a number of seconds from 0")
            }
            fn visit_u64<E: de::Error>(self, seconds: u64) -> Result<MaxAge, E> {
                Ok(MaxAge(Duration::from_secs(seconds)))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<MaxAge, E> {
                humantime::parse_duration(text).map(MaxAge).map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for MaxAge {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "MaxAge".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": ["string", "integer"], "minimum": 0})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_age_is_a_duration_or_a_number_of_seconds() {
        let read = |text: &str| serde_json::from_str::<Request>(&format!(r#"{{"item":"1","max_age":{text}}}"#));
        for (text, seconds) in [("0", 0), ("600", 600), ("\"10m\"", 600), ("\"0s\"", 0), ("\"1h 30m\"", 5_400)] {
            assert_eq!(read(text).unwrap().max_age, Some(MaxAge(Duration::from_secs(seconds))), "{text}");
        }
        for text in ["-1", "\"soon\"", "[]"] {
            assert!(read(text).is_err(), "{text}");
        }
        let insists = serde_json::from_str::<Request>(r#"{"item":"1","no_cache":true,"max_age":600}"#).unwrap();
        assert_eq!(insists.oldest_answer(), Some(Duration::ZERO));
        assert_eq!(read("90").unwrap().oldest_answer(), Some(Duration::from_secs(90)));
        let request = read("90").unwrap();
        let text = serde_json::to_string(&request).unwrap();
        assert!(text.contains(r#""max_age":"1m 30s""#), "{text}");
        assert_eq!(serde_json::from_str::<Request>(&text).unwrap(), request);
    }
}
