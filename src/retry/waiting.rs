//! A request that waits for its time, as it stands on a delay topic: the request as it will be sent, its due time
//! and where it comes from in headers.

use std::sync::Arc;

use bytes::Bytes;
use serde::Deserialize;

use super::WRITER;
use crate::{
    kafka::{Outgoing, Partition, Record, outbox::Position},
    message::{
        BatchId, Failure, Lane, Request, SourceName,
        codec::{self, Raw, Unreadable},
        envelope::{Envelope, Headers, Kind, header},
    },
    runtime::clock::Timestamp,
};

/// When the request is due, in milliseconds since 1970.
const DUE_AT: &str = "x-due-at";
/// When it was put on this topic by the clock of who did it, in milliseconds since 1970.
const HOPPED_AT: &str = "x-hopped-at";
/// The source, whose topic it goes to.
const SOURCE: &str = "x-source";
/// Which of its topics, if that is not the one of the backlog.
const LANE: &str = "x-lane";
/// Since when it would be due, but for a source that nobody knows who has read it, in milliseconds since 1970.
const UNKNOWN_SINCE: &str = "x-unknown-since";
/// What nobody needs to go on, but who looks at a topic wants to know; carried along as it came.
const REMARKS: [&str; 4] = ["x-attempt", "x-error-class", "x-first-failed-at", "x-origin"];

/// When a record of a delay topic is due.
#[must_use]
pub fn due_at(raw: &Raw<'_>) -> Option<Timestamp> {
    millis(raw, DUE_AT)
}

fn millis(raw: &Raw<'_>, name: &str) -> Option<Timestamp> {
    header(raw.headers, name)?.parse().ok().map(Timestamp::from_millis)
}

/// A request that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// The request's id.
    id: String,
    /// Its source.
    pub source: SourceName,
    /// Which of its topics it came from, and goes back to.
    pub lane: Lane,
    /// When it is due.
    pub due_at: Timestamp,
    /// Since when it only waits for a process that knows its source.
    pub unknown_since: Option<Timestamp>,
    traceparent: Option<String>,
    remarks: [Option<String>; REMARKS.len()],
    key: Option<Bytes>,
    /// The request as JSON.
    value: Bytes,
}

impl Waiting {
    /// `request`, which is `failure`'s with its history extended, waits until `due_at`. `raw` is the failure's record.
    #[must_use]
    pub fn new(failure: &Failure, request: &Request, due_at: Timestamp, raw: &Raw<'_>, traceparent: String) -> Self {
        let first = request.history.first().unwrap_or(&failure.attempt);
        let remarks = [
            request.calls.to_string(),
            failure.attempt.class.as_str().to_owned(),
            first.at.as_millis().to_string(),
            raw.position_id().to_string(),
        ];
        Self {
            id: failure.request_id.to_string(),
            source: failure.source.clone(),
            lane: failure.lane,
            due_at,
            unknown_since: None,
            traceparent: Some(traceparent),
            remarks: remarks.map(Some),
            key: Some(Bytes::copy_from_slice(request.item.as_str().as_bytes())),
            value: codec::json_of(request),
        }
    }

    /// Reads a record of a delay topic.
    ///
    /// # Errors
    /// [`Unreadable`] if nobody knows when it is due or what it is, or if a newer weir wrote it.
    pub fn read(record: &Record, raw: &Raw<'_>) -> Result<Self, Unreadable> {
        codec::expect_type(raw, Kind::Request)?;
        let text = |name| header(raw.headers, name).map(str::to_owned);
        let missing = |name, expected| {
            let found = header(raw.headers, name).unwrap_or_default().chars().take(100).collect();
            Unreadable::Header { name, found, expected }
        };
        let source = text(SOURCE).and_then(|name| SourceName::new(&name).ok());
        Ok(Self {
            id: text("ce_id").ok_or_else(|| missing("ce_id", "the request's id"))?,
            source: source.ok_or_else(|| missing(SOURCE, "the name of a source"))?,
            // One that a newer weir knows waits with the others.
            lane: text(LANE).and_then(|word| Lane::of(&word)).unwrap_or_default(),
            due_at: due_at(raw).ok_or_else(|| missing(DUE_AT, "a number of milliseconds since 1970"))?,
            unknown_since: millis(raw, UNKNOWN_SINCE),
            traceparent: text("traceparent"),
            remarks: REMARKS.map(text),
            key: record.key.clone(),
            value: record.value.clone().filter(|value| !value.is_empty()).ok_or(Unreadable::Empty)?,
        })
    }

    /// When it was put on its topic, if its record says so.
    #[must_use]
    pub fn hopped_at(raw: &Raw<'_>) -> Option<Timestamp> {
        millis(raw, HOPPED_AT)
    }

    /// About how many bytes it takes in memory.
    #[must_use]
    pub fn size(&self) -> usize {
        let remarks: usize = self.remarks.iter().flatten().map(String::len).sum();
        let texts = self.id.len() + self.source.as_str().len() + self.traceparent.as_ref().map_or(0, String::len);
        // Each of these is an allocation of its own, with a head of 16 bytes; the rest is the map's.
        size_of::<Self>() + 16 * 9 + 64 + remarks + texts + self.value.len() + self.key.as_ref().map_or(0, Bytes::len)
    }

    /// The record for its source's topic, now that it is due.
    #[must_use]
    pub fn into_request(self, topic: Arc<str>) -> Outgoing {
        let headers = self.envelope();
        Outgoing { topic, key: self.key, value: self.value, headers }
    }

    /// The record for another delay topic.
    #[must_use]
    pub fn into_hop(self, topic: Arc<str>, now: Timestamp) -> Outgoing {
        let mut headers = self.envelope();
        let mut add = |name: &'static str, text: String| headers.push((name.into(), text.into()));
        add(DUE_AT, self.due_at.as_millis().to_string());
        add(HOPPED_AT, now.as_millis().to_string());
        add(SOURCE, self.source.to_string());
        if let Some(since) = self.unknown_since {
            add(UNKNOWN_SINCE, since.as_millis().to_string());
        }
        if !self.lane.is_bulk() {
            add(LANE, self.lane.as_str().to_owned());
        }
        for (name, text) in REMARKS.into_iter().zip(self.remarks) {
            if let Some(text) = text {
                add(name, text);
            }
        }
        Outgoing { topic, key: self.key, value: self.value, headers }
    }

    /// Its batch, and when it was asked for.
    #[must_use]
    pub fn asked(&self) -> (Option<BatchId>, Option<Timestamp>) {
        #[derive(Deserialize)]
        struct Asked {
            batch: Option<BatchId>,
            requested_at: Option<Timestamp>,
        }
        // What cannot be read is judged where it is read: by fetch, or at its end.
        let asked = serde_json::from_slice(&self.value).unwrap_or(Asked { batch: None, requested_at: None });
        (asked.batch, asked.requested_at)
    }

    /// The same as a record at `position`, as far as its end is told from it.
    pub fn with_raw<T>(&self, position: &Position, tell: impl FnOnce(&Raw<'_>) -> T) -> T {
        let (Partition { topic, number }, headers) = (&position.partition, self.envelope());
        let (offset, value) = (position.offset, Some(self.value.as_ref()));
        tell(&Raw { topic, partition: *number, offset, time: self.due_at, headers: &headers, value })
    }

    /// The headers of the request; its time is when it is due, so that a reader can tell how late it came.
    fn envelope(&self) -> Headers {
        let traceparent = self.traceparent.as_deref();
        Envelope { kind: Kind::Request, id: &self.id, writer: WRITER, time: self.due_at, traceparent }.headers()
    }
}
