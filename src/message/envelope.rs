//! The headers of a record: CloudEvents 1.0 in Kafka's binary mode, and W3C trace context.
//!
//! <https://github.com/cloudevents/spec/blob/main/cloudevents/bindings/kafka-protocol-binding.md>

use std::borrow::Cow;

use bytes::Bytes;

use crate::runtime::clock::Timestamp;

/// A header's name and its value. The names that weir writes take no memory of their own: every record has seven.
pub type Header = (Cow<'static, str>, Bytes);

/// Headers of a Kafka message, in order.
pub type Headers = Vec<Header>;

/// The names of the headers that weir writes.
const NAMES: [&str; 8] =
    ["content-type", "ce_specversion", "ce_id", "ce_type", "ce_source", "ce_time", "ce_dataschema", "traceparent"];

/// The name of a header that was read.
#[must_use]
pub fn name(read: &str) -> Cow<'static, str> {
    NAMES.iter().find(|name| **name == read).map_or_else(|| Cow::Owned(read.to_owned()), |name| Cow::Borrowed(*name))
}

/// What a record is. The version stands in `ce_type`: `weir.<kind>.v1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// [`super::Request`]
    Request,
    /// [`super::Observation`]
    Result,
    /// [`super::Failure`]
    Failure,
    /// [`super::DeadLetter`]
    DeadLetter,
    /// [`super::Change`]
    Change,
    /// [`super::Cancellation`]
    Cancellation,
    /// [`super::BatchEnd`]
    BatchEnd,
    /// [`super::QuotaReport`]
    QuotaReport,
    /// [`super::QuotaSetting`]
    QuotaSetting,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Request,
        Self::Result,
        Self::Failure,
        Self::DeadLetter,
        Self::Change,
        Self::Cancellation,
        Self::BatchEnd,
        Self::QuotaReport,
        Self::QuotaSetting,
    ];

    /// What a record of this CloudEvents type is; `None` for types that this weir does not know.
    #[must_use]
    pub fn of_type(ce_type: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.ce_type() == ce_type)
    }

    /// The CloudEvents type, version included.
    #[must_use]
    pub const fn ce_type(self) -> &'static str {
        match self {
            Self::Request => "weir.request.v1",
            Self::Result => "weir.result.v1",
            Self::Failure => "weir.failure.v1",
            Self::DeadLetter => "weir.dead_letter.v1",
            Self::Change => "weir.change.v1",
            Self::Cancellation => "weir.cancellation.v1",
            Self::BatchEnd => "weir.batch_end.v1",
            Self::QuotaReport => "weir.quota_report.v1",
            Self::QuotaSetting => "weir.quota_setting.v1",
        }
    }

    /// What identifies the schema of the value: its `$id`, and `ce_dataschema`, which has to be an absolute URI.
    #[must_use]
    pub const fn schema_uri(self) -> &'static str {
        match self {
            Self::Request => "urn:weir:schema:request:v1",
            Self::Result => "urn:weir:schema:result:v1",
            Self::Failure => "urn:weir:schema:failure:v1",
            Self::DeadLetter => "urn:weir:schema:dead_letter:v1",
            Self::Change => "urn:weir:schema:change:v1",
            Self::Cancellation => "urn:weir:schema:cancellation:v1",
            Self::BatchEnd => "urn:weir:schema:batch_end:v1",
            Self::QuotaReport => "urn:weir:schema:quota_report:v1",
            Self::QuotaSetting => "urn:weir:schema:quota_setting:v1",
        }
    }

    /// Where the schema of the value is, a path in this repository.
    #[must_use]
    pub const fn schema(self) -> &'static str {
        match self {
            Self::Request => "schemas/request.v1.schema.json",
            Self::Result => "schemas/result.v1.schema.json",
            Self::Failure => "schemas/failure.v1.schema.json",
            Self::DeadLetter => "schemas/dead_letter.v1.schema.json",
            Self::Change => "schemas/change.v1.schema.json",
            Self::Cancellation => "schemas/cancellation.v1.schema.json",
            Self::BatchEnd => "schemas/batch_end.v1.schema.json",
            Self::QuotaReport => "schemas/quota_report.v1.schema.json",
            Self::QuotaSetting => "schemas/quota_setting.v1.schema.json",
        }
    }
}

/// The attributes of one record.
#[derive(Clone, Debug)]
pub struct Envelope<'a> {
    /// What the value is.
    pub kind: Kind,
    /// `ce_id`. Requests keep theirs through retries; a result or failure has `<request id>#<calls>`.
    pub id: &'a str,
    /// `ce_source`: who wrote it, `weir/<role>/<source>`.
    pub writer: &'a str,
    /// `ce_time`.
    pub time: Timestamp,
    /// The trace that the request belongs to.
    pub traceparent: Option<&'a str>,
}

impl Envelope<'_> {
    /// The headers that carry these attributes.
    #[must_use]
    pub fn headers(&self) -> Headers {
        let text = |value: &str| Bytes::copy_from_slice(value.as_bytes());
        let mut headers = vec![
            ("content-type".into(), Bytes::from_static(b"application/json")),
            ("ce_specversion".into(), Bytes::from_static(b"1.0")),
            ("ce_id".into(), text(self.id)),
            ("ce_type".into(), Bytes::from_static(self.kind.ce_type().as_bytes())),
            ("ce_source".into(), text(self.writer)),
            ("ce_time".into(), text(&self.time.to_string())),
            ("ce_dataschema".into(), Bytes::from_static(self.kind.schema_uri().as_bytes())),
        ];
        if let Some(traceparent) = self.traceparent {
            headers.push(("traceparent".into(), text(traceparent)));
        }
        headers
    }
}

/// The last value of a header as text; `None` if it is missing, empty or not UTF-8.
#[must_use]
pub fn header<'a>(headers: &'a [Header], name: &str) -> Option<&'a str> {
    let (_, value) = headers.iter().rev().find(|(key, _)| key.eq_ignore_ascii_case(name))?;
    std::str::from_utf8(value).ok().filter(|text| !text.is_empty())
}
