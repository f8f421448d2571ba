//! A request that waits for its time, as it stands on a delay topic: the request as it will be sent, its due time
//! and where it comes from in headers.

use std::sync::Arc;

use bytes::Bytes;
use serde::Deserialize;

use super::wheel::Weight;
use crate::{
    kafka::{Outgoing, Partition, Record, outbox::Position},
    message::{
        BatchId, Lane, Request, RequestId, SourceName,
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
/// What nobody needs to go on, but who looks at a topic wants to know; carried along as it came. Calls so far, the class of
/// the last failure, when the first one was (in milliseconds since 1970), and the record that the request waits because of.
pub const REMARKS: [&str; 4] = ["x-attempt", "x-error-class", "x-first-failed-at", "x-origin"];

/// When a record of a delay topic is due.
#[must_use]
pub fn due_at(raw: &Raw<'_>) -> Option<Timestamp> {
    millis(raw, DUE_AT)
}

fn millis(raw: &Raw<'_>, name: &str) -> Option<Timestamp> {
    header(raw.headers, name)?.parse().ok().map(Timestamp::from_millis)
}

/// A request that begins to wait.
#[derive(Debug)]
pub struct Entry<'a> {
    /// Who lets it wait, as `ce_source` names it.
    pub writer: &'static str,
    /// The request's id.
    pub id: &'a RequestId,
    /// Its source.
    pub source: &'a SourceName,
    /// Which of the source's topics it goes to.
    pub lane: Lane,
    /// What is sent when it is due.
    pub request: &'a Request,
    /// The trace that it continues.
    pub traceparent: String,
    /// In the order of [`REMARKS`].
    pub remarks: [Option<String>; REMARKS.len()],
}

/// A request that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    writer: &'static str,
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
    /// This request waits until `due_at`.
    #[must_use]
    pub fn new(entry: Entry<'_>, due_at: Timestamp) -> Self {
        let Entry { writer, id, source, lane, request, traceparent, remarks } = entry;
        Self {
            writer,
            id: id.to_string(),
            source: source.clone(),
            lane,
            due_at,
            unknown_since: None,
            traceparent: Some(traceparent),
            remarks,
            key: Some(Bytes::copy_from_slice(request.item.as_str().as_bytes())),
            value: codec::json_of(request),
        }
    }

    /// Reads a record of a delay topic; `writer` is who moves it on.
    ///
    /// # Errors
    /// [`Unreadable`] if nobody knows when it is due or what it is, or if a newer weir wrote it.
    pub fn read(record: &Record, raw: &Raw<'_>, writer: &'static str) -> Result<Self, Unreadable> {
        codec::expect_type(raw, Kind::Request)?;
        let text = |name| header(raw.headers, name).map(str::to_owned);
        let missing = |name, expected| {
            let found = header(raw.headers, name).unwrap_or_default().chars().take(100).collect();
            Unreadable::Header { name, found, expected }
        };
        let source = text(SOURCE).and_then(|name| SourceName::new(&name).ok());
        Ok(Self {
            writer,
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
        Envelope { kind: Kind::Request, id: &self.id, writer: self.writer, time: self.due_at, traceparent }.headers()
    }
}

impl Weight for Waiting {
    fn bytes(&self) -> usize {
        let remarks: usize = self.remarks.iter().flatten().map(String::len).sum();
        let texts = self.id.len() + self.source.as_str().len() + self.traceparent.as_ref().map_or(0, String::len);
        // Each of these is an allocation of its own, with a head of 16 bytes; the rest is the map's.
        size_of::<Self>() + 16 * 9 + 64 + remarks + texts + self.value.len() + self.key.as_ref().map_or(0, Bytes::len)
    }
}
