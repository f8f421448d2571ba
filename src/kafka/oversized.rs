//! Records that are too large for their topic: the dead letter that is written instead of each, so that it blocks
//! no other record. Pure.

use std::{fmt, sync::Arc};

use bytes::Bytes;

use super::{Outgoing, TransactError, outbox::Position};
use crate::{
    message::{
        DeadLetter, Reason, Request, RequestId, SourceName,
        codec::{self, Encoded, Raw},
        envelope::{Envelope, Kind, header},
    },
    runtime::clock::Timestamp,
};

/// A record that its topic does not take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TooLarge {
    /// Which of the transaction's records.
    pub index: usize,
    /// Its topic.
    pub topic: Arc<str>,
    /// [`Outgoing::size`], before compression.
    pub size: usize,
    /// What it was too large for.
    pub limit: Limit,
}

/// What bounds a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// `kafka.record_limit`, in bytes.
    Own(usize),
    /// The smaller of the topic's `max.message.bytes` and `segment.bytes`; `None`: the broker has refused the record, and did not say how many that is.
    Topic(Option<usize>),
}

impl fmt::Display for TooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the record for {} has {} bytes; ", self.topic, self.size)?;
        match self.limit {
            Limit::Own(limit) => write!(f, "kafka.record_limit is {limit}"),
            Limit::Topic(Some(limit)) => {
                write!(f, "the topic takes at most {limit} (max.message.bytes, or segment.bytes if that is smaller)")
            }
            Limit::Topic(None) => write!(f, "that is more than the topic's max.message.bytes or segment.bytes"),
        }
    }
}

/// The first of them, and how many more there are.
pub(super) fn words(all: &[TooLarge]) -> String {
    match all {
        [] => "a record is too large".to_owned(),
        [one] => one.to_string(),
        [first, more @ ..] => format!("{first}; and {} more records are too large", more.len()),
    }
}

/// A dead letter of at most so many bytes fits into every topic that weir can work with.
const SMALL: usize = 16 * 1024;

/// Makes the dead letters.
#[derive(Clone, Debug)]
pub struct Instead {
    dead: Arc<str>,
    /// `ce_source` of what is written.
    writer: Arc<str>,
}

impl Instead {
    /// Dead letters for the topic `dead`, written by `writer`.
    pub fn new(dead: impl Into<Arc<str>>, writer: impl Into<Arc<str>>) -> Self {
        Self { dead: dead.into(), writer: writer.into() }
    }

    /// The end of a record that is too large: a dead letter that names the limit and what was found. `origin` is the
    /// record that it was made of.
    ///
    /// # Errors
    /// [`TransactError::Rebuild`] if nothing smaller can be made of it.
    pub fn of(
        &self,
        record: &Outgoing,
        origin: &Position,
        why: &TooLarge,
        now: Timestamp,
    ) -> Result<Outgoing, TransactError> {
        let letter = self.letter(record, origin, why, now);
        let is_smaller = record.topic != self.dead || letter.size() < record.size();
        is_smaller.then_some(letter).ok_or_else(|| TransactError::Rebuild(format!("{why}, and it cannot be shortened")))
    }

    /// Puts a dead letter in the place of each record that is too large; `origins` are the records that they were made of,
    /// one for each.
    ///
    /// # Errors
    /// As [`Self::of`].
    pub fn replace(
        &self,
        records: &mut [Outgoing],
        origins: &[Position],
        all: &[TooLarge],
        now: Timestamp,
    ) -> Result<(), TransactError> {
        for why in all {
            if let (Some(record), Some(origin)) = (records.get_mut(why.index), origins.get(why.index)) {
                *record = self.of(record, origin, why, now)?;
            }
        }
        Ok(())
    }

    fn letter(&self, record: &Outgoing, origin: &Position, why: &TooLarge, now: Timestamp) -> Outgoing {
        let raw = Raw {
            topic: &origin.partition.topic,
            partition: origin.partition.number,
            offset: origin.offset,
            time: now,
            headers: &record.headers,
            value: Some(&record.value),
        };
        let dead = Self::small(dead_letter(&raw, why, now));
        let envelope = Envelope {
            kind: Kind::DeadLetter,
            id: dead.request_id.as_str(),
            writer: &self.writer,
            time: now,
            traceparent: raw.traceparent(),
        };
        let Encoded { headers, value } = codec::encode(&envelope, &dead);
        let key = dead.request.as_ref().map(|request| Bytes::copy_from_slice(request.item.as_str().as_bytes()));
        Outgoing { topic: Arc::clone(&self.dead), key, value, headers }
    }

    /// The same without what makes it large, first what is missed least.
    fn small(mut dead: DeadLetter) -> DeadLetter {
        let is_small = |dead: &DeadLetter| codec::json_of(dead).len() <= SMALL;
        if !is_small(&dead) {
            dead.original_base64 = None;
        }
        if !is_small(&dead)
            && let Some(request) = &mut dead.request
        {
            request.earlier.clear();
            let old = request.history.len().saturating_sub(1);
            request.history.drain(..old);
        }
        if !is_small(&dead) {
            dead.request = None;
        }
        dead
    }
}

/// What is known of a record, as a dead letter.
fn dead_letter(raw: &Raw<'_>, why: &TooLarge, now: Timestamp) -> DeadLetter {
    let message = codec::shorten(&format!("too large for Kafka: {why}"), 1_000).into_owned();
    let of = |request_id: RequestId, source: SourceName, request: Option<Request>| DeadLetter {
        request_id,
        source,
        // Whoever asks again gets the same.
        reason: Reason::Permanent,
        message: message.clone(),
        died_at: now,
        origin: raw.origin(),
        request,
        original_base64: None,
    };
    let unknown = || of(raw.position_id(), SourceName::unknown(), None);
    match header(raw.headers, "ce_type").and_then(Kind::of_type) {
        Some(Kind::Result) => codec::read_observation(raw).map_or_else(
            |_| unknown(),
            |result| {
                let request = Request {
                    source: Some(result.source.clone()),
                    batch: result.batch,
                    requested_at: Some(result.requested_at),
                    instead_of: result.instead_of,
                    calls: result.calls,
                    ..Request::new(result.item)
                };
                of(result.request_id, result.source, Some(request))
            },
        ),
        Some(Kind::Failure) => codec::read_failure(raw).map_or_else(
            |_| unknown(),
            |failure| {
                let mut request = failure.request;
                request.history.push(failure.attempt);
                of(failure.request_id, failure.source, Some(request))
            },
        ),
        Some(Kind::Request) => serde_json::from_slice::<Request>(raw.value.unwrap_or_default()).map_or_else(
            |_| unknown(),
            |request| {
                let id = header(raw.headers, "ce_id").and_then(|id| RequestId::new(id).ok());
                let source = request.source.clone().unwrap_or_else(SourceName::unknown);
                of(id.unwrap_or_else(|| raw.position_id()), source, Some(request))
            },
        ),
        // It stays what it was, with a word of why it says less.
        Some(Kind::DeadLetter) => codec::read_dead_letter(raw).map_or_else(
            |_| unknown(),
            |dead| {
                let message = codec::shorten(&format!("{} (shortened: {why})", dead.message), 2_000).into_owned();
                DeadLetter { message, ..dead }
            },
        ),
        // The request has its result: this is the end of the change alone, and so not under the request's id.
        Some(Kind::Change) => codec::read_change(raw).map_or_else(
            |_| unknown(),
            |change| {
                let what = format!("the change of {} of item {}: {message}", change.field.as_str(), change.item);
                DeadLetter { message: what, ..of(raw.position_id(), change.source, None) }
            },
        ),
        Some(Kind::Cancellation | Kind::BatchEnd | Kind::QuotaReport | Kind::QuotaSetting) | None => unknown(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::kafka::{Epoch, Partition};

    const NOW: Timestamp = Timestamp::from_millis(1_700_000_000_000);

    fn origin() -> Position {
        Position { partition: Partition { topic: "weir.requests.s".into(), number: 2 }, epoch: Epoch(1), offset: 7 }
    }

    fn record(kind: Kind, value: &serde_json::Value) -> Outgoing {
        let envelope = Envelope { kind, id: "r1", writer: "test", time: NOW, traceparent: None };
        let Encoded { headers, value } = codec::encode(&envelope, value);
        Outgoing { topic: "t".into(), key: None, value, headers }
    }

    fn refused(record: &Outgoing) -> DeadLetter {
        let why = TooLarge {
            index: 0,
            topic: Arc::clone(&record.topic),
            size: record.size(),
            limit: Limit::Topic(Some(1_000_012)),
        };
        let letter = Instead::new("weir.dead", "weir/test").of(record, &origin(), &why, NOW).unwrap();
        assert!(*letter.topic == *"weir.dead" && letter.size() < SMALL + 2_000, "{}", letter.size());
        let dead: DeadLetter = serde_json::from_slice(&letter.value).unwrap();
        let size = record.size().to_string();
        assert!(dead.message.contains(&size) && dead.message.contains("1000012"), "{}", dead.message);
        dead
    }

    fn request() -> serde_json::Value {
        json!({"item": "5", "source": "s", "batch": "b", "params": {"zip": "1"}})
    }

    fn attempt(length: usize) -> serde_json::Value {
        json!({"at": NOW, "class": "outage", "code": "c", "message": "m".repeat(length), "latency_ms": 1})
    }

    #[test]
    fn a_result_too_large_ends_its_request_with_a_word_of_its_size_and_the_limit() {
        let result = json!({
            "request_id": "r1", "source": "s", "item": "5", "batch": "b", "status": "found", "via": "call", "calls": 3,
            "requested_at": NOW, "fetched_at": NOW, "latency_ms": 1, "fingerprint": "0000000000000000",
            "raw": "x".repeat(2_000_000),
        });
        let dead = refused(&record(Kind::Result, &result));
        assert_eq!((dead.request_id.as_str(), dead.source.as_str(), dead.reason), ("r1", "s", Reason::Permanent));
        let request = dead.request.unwrap();
        assert_eq!((request.item.as_str(), request.calls, request.batch.unwrap().as_str()), ("5", 3, "b"));
        assert_eq!((dead.origin.topic.as_str(), dead.origin.offset), ("weir.requests.s", 7));
    }

    #[test]
    fn a_failure_or_a_request_too_large_keeps_what_there_is_room_for() {
        let failure =
            |length| json!({"request_id": "r1", "source": "s", "request": request(), "attempt": attempt(length)});
        let dead = refused(&record(Kind::Failure, &failure(10)));
        assert_eq!(dead.request.unwrap().history.len(), 1);
        let dead = refused(&record(Kind::Failure, &failure(100_000)));
        assert_eq!((dead.request_id.as_str(), dead.request), ("r1", None));

        let mut asked = request();
        asked["history"] = (0..50).map(|_| attempt(1_000)).collect();
        let dead = refused(&record(Kind::Request, &asked));
        let request = dead.request.unwrap();
        assert_eq!((dead.request_id.as_str(), request.history.len(), request.params.len()), ("r1", 1, 1));
    }

    #[test]
    fn a_dead_letter_too_large_stays_one_of_its_reason_and_a_change_is_not_its_requests_end() {
        let dead = json!({
            "request_id": "r1", "source": "s", "reason": "invalid", "message": "why", "died_at": NOW,
            "origin": {"topic": "o", "partition": 1, "offset": 1}, "original_base64": "A".repeat(90_000),
        });
        let dead = refused(&record(Kind::DeadLetter, &dead));
        assert_eq!((dead.reason, dead.original_base64, dead.origin.topic.as_str()), (Reason::Invalid, None, "o"));
        assert!(dead.message.starts_with("why (shortened"));

        let change = json!({
            "request_id": "r1", "source": "s", "item": "5", "field": "title", "old": "a", "new": "b".repeat(90_000),
            "old_at": NOW, "new_at": NOW,
        });
        let dead = refused(&record(Kind::Change, &change));
        assert_eq!(dead.request_id.as_str(), "weir.requests.s/2/7");
        assert!(dead.message.contains("title") && dead.message.contains("item 5"), "{}", dead.message);
    }

    #[test]
    fn what_cannot_become_smaller_is_said_and_not_tried_for_ever() {
        let mut record = record(Kind::Request, &json!({}));
        record.topic = "weir.dead".into();
        let why = TooLarge { index: 0, topic: "weir.dead".into(), size: record.size(), limit: Limit::Topic(Some(10)) };
        let refused = Instead::new("weir.dead", "w").of(&record, &origin(), &why, NOW);
        assert!(refused.unwrap_err().to_string().contains("at most 10 (max.message.bytes"));
    }
}
