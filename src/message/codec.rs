//! Bytes on a topic ⇄ records; what cannot be read gets a reason that a person can act on.

use std::borrow::Cow;

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use serde::{
    Serialize,
    de::{self, DeserializeOwned},
};

use super::{
    BatchEnd, Cancellation, Change, DeadLetter, Failure, InvalidId, ItemId, Observation, Origin, QuotaReport,
    QuotaSetting, Reason, Request, RequestId, SourceName,
    envelope::{Envelope, Header, Headers, Kind, header},
};
use crate::runtime::clock::Timestamp;

/// The longest value that is read as a request, in bytes.
pub const REQUEST_LIMIT: usize = 64 * 1024;

/// Room for a result with a vendor's usual reply, in bytes: growing there from nothing would copy it five times.
const ROOM: usize = 4 * 1024;

/// Why a record cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// A message without a value, or with nothing but white space in it.
    #[error("the message is empty")]
    Empty,
    /// Far longer than any request.
    #[error("the value has {found} bytes, at most {REQUEST_LIMIT} are read")]
    TooLong {
        /// Its length.
        found: usize,
    },
    /// Bytes that are no text.
    #[error("the value is not UTF-8 (bad byte at {at})")]
    NotUtf8 {
        /// Position of the first bad byte.
        at: usize,
    },
    /// It begins like JSON, but is not, or lacks what the record needs.
    #[error("the value is not a valid {expected}: {error}")]
    Json {
        /// The CloudEvents type that was expected.
        expected: &'static str,
        /// What `serde_json` says, with line and column.
        error: serde_json::Error,
    },
    /// Not JSON, and not a bare id either.
    #[error("the value is neither JSON nor a bare id: {0}")]
    Id(InvalidId),
    /// Written by something newer or foreign.
    #[error("ce_type is {found:?}, this version of weir reads {expected:?}")]
    Version {
        /// What the record says it is.
        found: String,
        /// What the topic should hold.
        expected: &'static str,
    },
    /// A header that the record cannot do without.
    #[error("the header {name} is {found:?}, it should be {expected}")]
    Header {
        /// Its name.
        name: &'static str,
        /// Its value, shortened; empty if it is missing.
        found: String,
        /// What it should be.
        expected: &'static str,
    },
    /// A request for another source than its topic's.
    #[error("the request is for source {found:?}, but the topic belongs to {expected:?}")]
    WrongSource {
        /// What the request says.
        found: SourceName,
        /// The topic's source.
        expected: SourceName,
    },
}

/// One message of a topic, borrowed from the log.
#[derive(Clone, Copy, Debug)]
pub struct Raw<'a> {
    /// The topic.
    pub topic: &'a str,
    /// The partition.
    pub partition: i32,
    /// The offset.
    pub offset: i64,
    /// The broker's or producer's time.
    pub time: Timestamp,
    /// The headers.
    pub headers: &'a [Header],
    /// The value.
    pub value: Option<&'a [u8]>,
}

impl Raw<'_> {
    /// Where it stands, as an id: `topic/partition/offset`.
    #[must_use]
    pub fn position_id(&self) -> RequestId {
        let text = format!("{}/{}/{}", self.topic, self.partition, self.offset);
        // Kafka's topic names are at most 249 bytes of [a-zA-Z0-9._-]; so only a very long name needs the short form.
        RequestId::new(&text).unwrap_or_else(|_| short_id(self.partition, self.offset))
    }

    /// Where it stands.
    #[must_use]
    pub fn origin(&self) -> Origin {
        Origin { topic: self.topic.to_owned(), partition: self.partition, offset: self.offset }
    }

    /// The trace it belongs to.
    #[must_use]
    pub fn traceparent(&self) -> Option<&str> {
        header(self.headers, "traceparent")
    }
}

#[allow(clippy::expect_used, reason = "digits and a slash are always a valid id")]
fn short_id(partition: i32, offset: i64) -> RequestId {
    RequestId::new(format!("{partition}/{offset}")).expect("digits and a slash are a valid id")
}

/// A request with everything that its message leaves unsaid filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct Received {
    /// `ce_id`, else where it stands.
    pub id: RequestId,
    /// The request; `source` and `requested_at` are set.
    pub request: Request,
}

/// Reads a request for `source`: JSON, or a bare id.
///
/// # Errors
/// [`Unreadable`]; [`dead_letter`] makes the record's end out of it.
pub fn read_request(raw: &Raw<'_>, source: &SourceName) -> Result<Received, Unreadable> {
    let value = raw.value.unwrap_or_default();
    if value.len() > REQUEST_LIMIT {
        return Err(Unreadable::TooLong { found: value.len() });
    }
    expect_type(raw, Kind::Request)?;
    let text = std::str::from_utf8(value).map_err(|e| Unreadable::NotUtf8 { at: e.valid_up_to() })?;
    // Windows' files begin with a byte order mark and end lines with \r.
    let text = text.trim_start_matches('\u{feff}').trim();
    if text.is_empty() {
        return Err(Unreadable::Empty);
    }
    let mut request = match text.as_bytes() {
        [b'{', ..] => json(text.as_bytes(), Kind::Request)?,
        // A JSON text, as serializers send a plain id.
        [b'"', ..] => Request::new(json(text.as_bytes(), Kind::Request)?),
        // serde would read a list as a struct's fields in order: nobody means that.
        [b'[', ..] => {
            return Err(Unreadable::Json {
                expected: Kind::Request.ce_type(),
                error: de::Error::custom("a list; send one message per id"),
            });
        }
        _ => Request::new(ItemId::new(text).map_err(Unreadable::Id)?),
    };
    if let Some(found) = request.source.as_ref().filter(|found| *found != source) {
        return Err(Unreadable::WrongSource { found: found.clone(), expected: source.clone() });
    }
    request.source = Some(source.clone());
    request.requested_at = request.requested_at.or(Some(raw.time));
    let id = header(raw.headers, "ce_id").and_then(|id| RequestId::new(id).ok());
    Ok(Received { id: id.unwrap_or_else(|| raw.position_id()), request })
}

/// Reads a result.
///
/// # Errors
/// [`Unreadable`] if it is not a result of a version that this weir knows.
pub fn read_observation(raw: &Raw<'_>) -> Result<Observation, Unreadable> {
    read(raw, Kind::Result)
}

/// Reads a failure.
///
/// # Errors
/// [`Unreadable`] if it is not a failure of a version that this weir knows.
pub fn read_failure(raw: &Raw<'_>) -> Result<Failure, Unreadable> {
    read(raw, Kind::Failure)
}

/// Reads a dead letter.
///
/// # Errors
/// [`Unreadable`] if it is not a dead letter of a version that this weir knows.
pub fn read_dead_letter(raw: &Raw<'_>) -> Result<DeadLetter, Unreadable> {
    read(raw, Kind::DeadLetter)
}

/// Reads a change.
///
/// # Errors
/// [`Unreadable`] if it is not a change of a version that this weir knows.
pub fn read_change(raw: &Raw<'_>) -> Result<Change, Unreadable> {
    read(raw, Kind::Change)
}

/// Reads a cancellation.
///
/// # Errors
/// [`Unreadable`] if it is not a cancellation of a version that this weir knows.
pub fn read_cancellation(raw: &Raw<'_>) -> Result<Cancellation, Unreadable> {
    read(raw, Kind::Cancellation)
}

/// Reads the end of a batch.
///
/// # Errors
/// [`Unreadable`] if it is not the end of a batch of a version that this weir knows.
pub fn read_batch_end(raw: &Raw<'_>) -> Result<BatchEnd, Unreadable> {
    read(raw, Kind::BatchEnd)
}

/// Reads a worker's report of its quotas.
///
/// # Errors
/// [`Unreadable`] if it is not a report of a version that this weir knows.
pub fn read_quota_report(raw: &Raw<'_>) -> Result<QuotaReport, Unreadable> {
    read(raw, Kind::QuotaReport)
}

/// Reads what an operator has set.
///
/// # Errors
/// [`Unreadable`] if it is not a setting of a version that this weir knows.
pub fn read_quota_setting(raw: &Raw<'_>) -> Result<QuotaSetting, Unreadable> {
    read(raw, Kind::QuotaSetting)
}

fn read<T: DeserializeOwned>(raw: &Raw<'_>, kind: Kind) -> Result<T, Unreadable> {
    expect_type(raw, kind)?;
    match raw.value {
        None | Some([]) => Err(Unreadable::Empty),
        Some(value) => json(value, kind),
    }
}

/// Whether a record is what its topic should hold, as far as it says so.
///
/// # Errors
/// [`Unreadable::Version`].
pub fn expect_type(raw: &Raw<'_>, kind: Kind) -> Result<(), Unreadable> {
    match header(raw.headers, "ce_type") {
        Some(found) if found != kind.ce_type() => {
            Err(Unreadable::Version { found: found.chars().take(100).collect(), expected: kind.ce_type() })
        }
        _ => Ok(()),
    }
}

fn json<T: DeserializeOwned>(value: &[u8], kind: Kind) -> Result<T, Unreadable> {
    super::json::from_slice(value).map_err(|error| Unreadable::Json { expected: kind.ce_type(), error })
}

/// The end of a record that could not be read: a dead letter with reason `invalid` and the original bytes.
#[must_use]
pub fn dead_letter(raw: &Raw<'_>, source: &SourceName, why: &Unreadable, now: Timestamp) -> DeadLetter {
    let original = raw.value.unwrap_or_default();
    let kept = original.get(..DeadLetter::ORIGINAL_LIMIT).unwrap_or(original);
    DeadLetter {
        // Not its ce_id: a broken record may carry any, even the id of a good request.
        request_id: raw.position_id(),
        source: source.clone(),
        reason: Reason::Invalid,
        message: quotable(&why.to_string()).into_owned(),
        died_at: now,
        origin: raw.origin(),
        request: None,
        original_base64: (!kept.is_empty()).then(|| BASE64.encode(kept)),
    }
}

/// A record ready for a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// The headers.
    pub headers: Headers,
    /// The JSON.
    pub value: Bytes,
}

/// Writes a record with its envelope.
#[must_use]
pub fn encode<T: Serialize>(envelope: &Envelope<'_>, record: &T) -> Encoded {
    Encoded { headers: envelope.headers(), value: json_of(record) }
}

/// A record as JSON.
#[must_use]
pub fn json_of<T: Serialize>(record: &T) -> Bytes {
    // serde_json refuses maps with keys that are no text, and failing `Serialize`s: the records have neither.
    let mut value = Vec::with_capacity(ROOM);
    let Ok(()) = serde_json::to_writer(&mut value, record) else { unreachable!("records are plain JSON") };
    // Cut to its length: outcomes wait in memory for their transaction, by the thousand.
    value.into_boxed_slice().into()
}

/// A text that somebody else wrote, with a space for each control character: they would break lines, colour terminals
/// or end texts wherever it is shown. Tabs and line ends count as such too.
#[must_use]
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.chars().any(char::is_control) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect())
}

/// Whether a character would do something to the line that it is quoted in: a control character, or a mark that turns
/// the direction of what follows, so that a line says something else than is read.
#[must_use]
pub fn is_unquotable(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// The text without what [`is_unquotable`]: for a vendor's words in messages and logs. A product's title stays as it is.
#[must_use]
pub fn quotable(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_unquotable) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.chars().map(|c| if is_unquotable(c) { ' ' } else { c }).collect())
}

/// At most `limit` bytes of a text that somebody else wrote, cut between characters.
#[must_use]
pub fn shorten(text: &str, limit: usize) -> Cow<'_, str> {
    if text.len() <= limit {
        return Cow::Borrowed(text);
    }
    let end = (0..=limit).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    Cow::Owned(format!("{}…", &text[..end]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw<'a>(headers: &'a Headers, value: &'a [u8]) -> Raw<'a> {
        let time = Timestamp::from_millis(1_700_000_000_000);
        Raw { topic: "weir.requests.ali1688", partition: 3, offset: 42, time, headers, value: Some(value) }
    }

    #[test]
    fn a_quoted_text_neither_moves_the_cursor_nor_turns_the_line() {
        let marks =
            "\u{202a}\u{202b}\u{202c}\u{202d}\u{202e}\u{2066}\u{2067}\u{2068}\u{2069}\u{200e}\u{200f}\u{7}\u{9b}";
        for mark in marks.chars() {
            assert_eq!(quotable(&format!("系统{mark}gnp.exe")), "系统 gnp.exe", "{mark:?}");
        }
        assert!(matches!(quotable("a\u{200d}b ü 系统"), Cow::Borrowed(_)));
    }

    fn ali() -> SourceName {
        SourceName::new("ali1688").unwrap()
    }

    fn read(value: &[u8]) -> Result<Received, Unreadable> {
        read_request(&raw(&Headers::new(), value), &ali())
    }

    #[test]
    fn a_bare_id_is_a_request_named_by_its_position() {
        for value in ["584051070147", "584051070147\r\n", "\u{feff}584051070147", "\"584051070147\""] {
            let received = read(value.as_bytes()).unwrap();
            assert_eq!(received.id.as_str(), "weir.requests.ali1688/3/42");
            assert_eq!(received.request.item.as_str(), "584051070147");
            assert_eq!(received.request.requested_at, Some(Timestamp::from_millis(1_700_000_000_000)));
        }
    }

    #[test]
    fn a_json_request_keeps_its_ce_id_and_unknown_fields_are_ignored() {
        let headers = vec![("ce_id".into(), Bytes::from_static(b"mine-1"))];
        let value = br#"{"item":"B0DYTF8L2W","batch":"monday","params":{"zipcode":"10041"},"colour":"red"}"#;
        let received = read_request(&raw(&headers, value), &ali()).unwrap();
        assert_eq!(received.id.as_str(), "mine-1");
        assert_eq!(received.request.params["zipcode"], "10041");
    }

    #[test]
    fn of_doubled_names_the_last_counts_in_every_record_at_every_depth() {
        let received =
            read(br#"{"item":"1","item":"2","calls":3,"history":[],"calls":0,"batch":"a","batch":null}"#).unwrap();
        assert_eq!((received.request.item.as_str(), received.request.batch), ("2", None));

        let json = r#"{"request_id":"r0","request_id":"r1","source":"ali1688","request":{"item":"1","item":"2","history":
            [{"at":"2026-11-21T09:00:00Z","class":"bug","class":"outage","code":"a","code":"b","message":"","latency_ms":1}]},
            "attempt":{"at":"2026-11-21T09:00:00Z","class":"outage","code":"a","message":"x","message":"y","latency_ms":1}}"#;
        let failure = read_failure(&raw(&Headers::new(), json.as_bytes())).unwrap();
        assert_eq!((failure.request_id.as_str(), failure.request.item.as_str()), ("r1", "2"));
        assert_eq!((failure.request.history[0].code.as_str(), failure.attempt.message.as_str()), ("b", "y"));

        let json = r#"{"request_id":"r1","source":"ali1688","item":"1","status":"absent","status":"found","via":"cache",
            "via":"call","calls":1,"requested_at":"2026-11-21T09:00:00Z","fetched_at":"2026-11-21T09:00:01Z",
            "latency_ms":12,"columns":{"price":"9","price":"10.00"},"raw":1,"raw":{ "price" : 9, "price" : 10.00 }}"#;
        let observation = read_observation(&raw(&Headers::new(), json.as_bytes())).unwrap();
        assert_eq!(observation.columns.price.as_deref(), Some("10.00"));
        assert_eq!(observation.raw.unwrap().get(), r#"{ "price" : 9, "price" : 10.00 }"#);
        assert!(read(br#"{"item":"1","item":7}"#).is_err(), "what counts has to be right");
    }

    #[test]
    fn bad_input_gets_a_reason_that_says_what_is_wrong() {
        let long = "x".repeat(5_000);
        let table: &[(&[u8], &str)] = &[
            (b"", "empty"),
            (b"  \n", "empty"),
            (long.as_bytes(), "5000 bytes, at most 256"),
            (br#"{"item":"1""#, "line 1 column 11"),
            (br#"{"id":"1"}"#, "missing field `item`"),
            (br#"{"item":""}"#, "empty"),
            (b"12 34", "character ' '"),
            (b"\xff\xfe12", "not UTF-8"),
            (br#"{"item":"1","source":"taobao"}"#, "\"taobao\""),
            (br#"["1","2"]"#, "one message per id"),
        ];
        for (value, expected) in table {
            let message = read(value).unwrap_err().to_string();
            assert!(message.contains(expected), "{message:?} should say {expected:?}");
        }
    }

    #[test]
    fn an_unknown_version_is_refused_by_name() {
        let headers = vec![("ce_type".into(), Bytes::from_static(b"weir.request.v9"))];
        let error = read_request(&raw(&headers, b"1"), &ali()).unwrap_err();
        assert!(error.to_string().contains("weir.request.v9"), "{error}");
    }

    #[test]
    fn a_dead_letter_of_a_broken_record_keeps_its_bytes() {
        let headers = Headers::new();
        let raw = raw(&headers, b"\xff\xfe");
        let why = read_request(&raw, &ali()).unwrap_err();
        let dead = dead_letter(&raw, &ali(), &why, Timestamp::from_millis(5));
        assert_eq!(dead.original_base64.as_deref(), Some("//4="));
        assert_eq!(dead.request_id.as_str(), "weir.requests.ali1688/3/42");
    }

    #[test]
    fn what_is_written_is_read_back_with_the_raw_reply_byte_for_byte() {
        let json = r#"{"request_id":"r1","source":"ali1688","item":"1","status":"found","via":"call","calls":1,
            "requested_at":"2026-11-21T09:00:00.000Z","fetched_at":"2026-11-21T09:00:01.000Z","latency_ms":12,
            "columns":{"price":"10.00"},"fingerprint":"ab","raw":{ "price" : 10.00, "big":58218860983545941 }}"#;
        let observation: Observation = serde_json::from_str(json).unwrap();
        let envelope = Envelope {
            kind: Kind::Result,
            id: "r1#1",
            writer: "weir/fetch",
            time: Timestamp::default(),
            traceparent: None,
        };
        let encoded = encode(&envelope, &observation);
        let back = read_observation(&raw(&encoded.headers, &encoded.value)).unwrap();
        assert_eq!(back.raw.unwrap().get(), r#"{ "price" : 10.00, "big":58218860983545941 }"#);
        assert_eq!(back.columns.price.as_deref(), Some("10.00"));
    }

    #[test]
    fn foreign_text_is_cut_between_characters() {
        assert_eq!(shorten("玻璃杯", 4), "玻…");
        assert_eq!(shorten("abc", 3), "abc");
    }
}
