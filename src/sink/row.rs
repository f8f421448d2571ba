//! Records → rows: what each column holds, and what becomes of a record that cannot be read.

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use clickhouse::Row;
use rust_decimal::Decimal;
use serde::{Serialize, Serializer};

use crate::{
    message::{
        BatchId, Change, DeadLetter, Failure, Field, Observation, Reason, Request, SourceName,
        codec::{self, Raw, Received, Unreadable},
        envelope::{Kind, header},
    },
    runtime::clock::Timestamp,
    topics::Topic,
};

/// The last millisecond that a `DateTime64(3)` can hold: the end of the year 2299.
const LAST_MILLIS: i64 = 10_413_791_999_999;

/// What is on a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// What its records are.
    pub kind: Kind,
    /// Whose requests they are; `None` for topics that all sources share.
    pub source: Option<SourceName>,
}

impl From<&Topic> for Route {
    fn from(topic: &Topic) -> Self {
        Self { kind: topic.kind, source: topic.source.clone() }
    }
}

/// A record as far as it could be read.
#[derive(Debug)]
pub enum Parsed {
    /// For table `requests`.
    Request(Box<Received>),
    /// For table `observations`.
    Result(Box<Observation>),
    /// For table `failures`.
    Failure(Box<Failure>),
    /// For table `dead_letters`.
    DeadLetter(Box<DeadLetter>),
    /// For table `item_changes`.
    Change(Box<Change>),
    /// An unreadable dead letter: its bytes are stored in `dead_letters`. Sent round again it would come back.
    Raw(Unreadable),
    /// An unreadable result or change: it gets a dead letter, and no row of its own.
    Poison(Unreadable),
    /// An unreadable request or failure: not ours to store, since fetch or retry writes its dead letter.
    Skipped(Unreadable),
}

impl Parsed {
    /// Whether the record becomes a row.
    #[must_use]
    pub const fn has_row(&self) -> bool {
        !matches!(self, Self::Poison(_) | Self::Skipped(_))
    }
}

/// Reads a record of a topic.
#[must_use]
pub fn parse(raw: &Raw<'_>, route: &Route) -> Parsed {
    match (route.kind, &route.source) {
        (Kind::Request, Some(source)) => match codec::read_request(raw, source) {
            Ok(received) => Parsed::Request(Box::new(received)),
            Err(why) => Parsed::Skipped(why),
        },
        // The sink does not read the others: see Topics::rows.
        (Kind::Request | Kind::Cancellation | Kind::QuotaReport | Kind::QuotaSetting, _) => {
            Parsed::Skipped(Unreadable::Empty)
        }
        (Kind::Result, _) => read(codec::read_observation(raw), Parsed::Result, Parsed::Poison),
        (Kind::Failure, _) => read(codec::read_failure(raw), Parsed::Failure, Parsed::Skipped),
        (Kind::DeadLetter, _) => read(codec::read_dead_letter(raw), Parsed::DeadLetter, Parsed::Raw),
        (Kind::Change, _) => read(codec::read_change(raw), Parsed::Change, Parsed::Poison),
    }
}

fn read<T>(
    record: Result<T, Unreadable>,
    parsed: fn(Box<T>) -> Parsed,
    unreadable: fn(Unreadable) -> Parsed,
) -> Parsed {
    match record {
        Ok(record) => parsed(Box::new(record)),
        Err(why) => unreadable(why),
    }
}

/// The table for records of a kind.
#[must_use]
pub const fn table(kind: Kind) -> &'static str {
    match kind {
        Kind::Request => "requests",
        Kind::Result => "observations",
        Kind::Failure => "failures",
        Kind::Change => "item_changes",
        Kind::DeadLetter => "dead_letters",
        // There is none: the sink does not read those topics.
        Kind::Cancellation | Kind::QuotaReport | Kind::QuotaSetting => "none",
    }
}

/// What every table begins and ends with: the record that a row is of, and its trace.
struct Place<'a> {
    topic: &'a str,
    partition: i32,
    offset: i64,
    recorded_at: i64,
    traceparent: &'a str,
}

impl<'a> Place<'a> {
    fn of(raw: &Raw<'a>) -> Self {
        let Raw { topic, partition, offset, time, headers, .. } = *raw;
        let traceparent = header(headers, "traceparent").unwrap_or_default();
        Self { topic, partition, offset, recorded_at: storable(time), traceparent }
    }
}

/// Milliseconds since 1970 as `DateTime64(3, 'UTC')` stores them: a time before 1970 or after 2299 becomes the
/// nearest one. (A Kafka message without a time has -1.)
#[must_use]
pub fn storable(time: Timestamp) -> i64 {
    time.as_millis().clamp(0, LAST_MILLIS)
}

/// The value of a `Decimal(18, 4)` in ten-thousandths, if the text is one exactly.
#[must_use]
pub fn decimal(text: &str) -> Option<i64> {
    const SCALE: u32 = 4;
    const LIMIT: i64 = 1_000_000_000_000_000_000;
    // rust_decimal would also read 1_000.
    if !text.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b'.' | b'-' | b'+')) {
        return None;
    }
    let number = Decimal::from_str_exact(text).ok()?.normalize();
    let missing = SCALE.checked_sub(number.scale())?;
    let value = number.mantissa().checked_mul(10_i128.pow(missing))?;
    i64::try_from(value).ok().filter(|value| value.abs() < LIMIT)
}

/// Bytes for a `String` column, which need not be UTF-8.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Blob(pub Vec<u8>);

impl Serialize for Blob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

/// A row of `requests`.
#[derive(Debug, Row, Serialize)]
pub struct RequestRow<'a> {
    topic: &'a str,
    partition: i32,
    offset: i64,
    recorded_at: i64,
    request_id: &'a str,
    source: &'a str,
    item: &'a str,
    batch: &'a str,
    requested_at: i64,
    expires_at: Option<i64>,
    calls: u32,
    params: String,
    traceparent: &'a str,
}

impl<'a> RequestRow<'a> {
    /// The row of a request.
    #[must_use]
    pub fn new(raw: &Raw<'a>, received: &'a Received) -> Self {
        let request = &received.request;
        let Place { topic, partition, offset, recorded_at, traceparent } = Place::of(raw);
        Self {
            topic,
            partition,
            offset,
            recorded_at,
            request_id: received.id.as_str(),
            source: request.source.as_ref().map_or("", SourceName::as_str),
            item: request.item.as_str(),
            batch: batch(request.batch.as_ref()),
            requested_at: storable(request.requested_at.unwrap_or(raw.time)),
            expires_at: request.expires_at.map(storable),
            calls: calls(request),
            params: if request.params.is_empty() { String::new() } else { json(&request.params) },
            traceparent,
        }
    }
}

/// A row of `observations`.
#[derive(Debug, Row, Serialize)]
pub struct ObservationRow<'a> {
    topic: &'a str,
    partition: i32,
    offset: i64,
    recorded_at: i64,
    request_id: &'a str,
    source: &'a str,
    instead_of: &'a str,
    item: &'a str,
    batch: &'a str,
    requested_at: i64,
    fetched_at: i64,
    status: &'a str,
    via: &'a str,
    calls: u32,
    account: &'a str,
    latency_ms: u32,
    title: &'a str,
    price: Option<i64>,
    price_text: &'a str,
    currency: &'a str,
    stock: Option<i64>,
    sku_info: &'a str,
    category_id: &'a str,
    seller_nick: &'a str,
    rating: Option<i64>,
    reviews: Option<i64>,
    vendor_status: &'a str,
    vendor_updated: &'a str,
    fingerprint: &'a str,
    raw: &'a str,
    traceparent: &'a str,
}

impl<'a> ObservationRow<'a> {
    /// The row of a result. A price that is no `Decimal(18, 4)` is kept as text; any other number that does not
    /// fit its column is NULL there and still stands in `raw`.
    #[must_use]
    pub fn new(raw: &Raw<'a>, seen: &'a Observation) -> Self {
        let columns = &seen.columns;
        let price = text(columns.price.as_ref()).trim();
        let exact = decimal(price);
        let Place { topic, partition, offset, recorded_at, traceparent } = Place::of(raw);
        Self {
            topic,
            partition,
            offset,
            recorded_at,
            request_id: seen.request_id.as_str(),
            source: seen.source.as_str(),
            instead_of: seen.instead_of.as_ref().map_or("", SourceName::as_str),
            item: seen.item.as_str(),
            batch: batch(seen.batch.as_ref()),
            requested_at: storable(seen.requested_at),
            fetched_at: storable(seen.fetched_at),
            status: seen.status.as_str(),
            via: seen.via.as_str(),
            calls: seen.calls,
            account: seen.account.as_ref().map_or("", |account| account.as_str()),
            latency_ms: seen.latency_ms,
            title: text(columns.title.as_ref()),
            price: exact,
            price_text: if exact.is_some() { "" } else { price },
            currency: text(columns.currency.as_ref()),
            stock: decimal(text(columns.stock.as_ref()).trim()),
            sku_info: text(columns.sku_info.as_ref()),
            category_id: text(columns.category_id.as_ref()),
            seller_nick: text(columns.seller_nick.as_ref()),
            rating: decimal(text(columns.rating.as_ref()).trim()),
            reviews: text(columns.reviews.as_ref()).trim().parse().ok(),
            vendor_status: text(columns.vendor_status.as_ref()),
            vendor_updated: text(columns.vendor_updated.as_ref()),
            fingerprint: &seen.fingerprint,
            raw: seen.raw.as_ref().map_or("", |raw| raw.get()),
            traceparent,
        }
    }
}

/// A row of `failures`.
#[derive(Debug, Row, Serialize)]
pub struct FailureRow<'a> {
    topic: &'a str,
    partition: i32,
    offset: i64,
    recorded_at: i64,
    request_id: &'a str,
    source: &'a str,
    item: &'a str,
    batch: &'a str,
    requested_at: i64,
    failed_at: i64,
    calls: u32,
    account: &'a str,
    class: &'a str,
    code: &'a str,
    message: &'a str,
    http_status: Option<u16>,
    latency_ms: u32,
    not_before: Option<i64>,
    traceparent: &'a str,
}

impl<'a> FailureRow<'a> {
    /// The row of a failure.
    #[must_use]
    pub fn new(raw: &Raw<'a>, failure: &'a Failure) -> Self {
        let (request, attempt) = (&failure.request, &failure.attempt);
        let Place { topic, partition, offset, recorded_at, traceparent } = Place::of(raw);
        Self {
            topic,
            partition,
            offset,
            recorded_at,
            request_id: failure.request_id.as_str(),
            source: failure.source.as_str(),
            item: request.item.as_str(),
            batch: batch(request.batch.as_ref()),
            requested_at: storable(request.requested_at.unwrap_or(raw.time)),
            failed_at: storable(attempt.at),
            calls: calls(request).saturating_add(1),
            account: attempt.account.as_ref().map_or("", |account| account.as_str()),
            class: attempt.class.as_str(),
            code: &attempt.code,
            message: &attempt.message,
            http_status: attempt.http_status,
            latency_ms: attempt.latency_ms,
            not_before: attempt.not_before.map(storable),
            traceparent,
        }
    }
}

/// A row of `dead_letters`. Owns its texts: the row of an unreadable record outlives the reading of it.
#[derive(Debug, Row, Serialize)]
pub struct DeadLetterRow {
    topic: String,
    partition: i32,
    offset: i64,
    recorded_at: i64,
    request_id: String,
    source: String,
    item: String,
    batch: String,
    requested_at: Option<i64>,
    died_at: i64,
    reason: &'static str,
    message: String,
    calls: u32,
    last_class: &'static str,
    last_code: String,
    origin_topic: String,
    origin_partition: i32,
    origin_offset: i64,
    request: String,
    original: Blob,
    traceparent: String,
}

impl DeadLetterRow {
    /// The row of a dead letter.
    #[must_use]
    pub fn new(raw: &Raw<'_>, dead: &DeadLetter) -> Self {
        let request = dead.request.as_ref();
        let last = request.and_then(|request| request.history.last());
        // What is no base64 is stored as it stands: somebody else wrote it, and it is all that there is.
        let original = dead.original_base64.as_deref().map(|text| BASE64.decode(text).unwrap_or_else(|_| text.into()));
        let Place { topic, partition, offset, recorded_at, traceparent } = Place::of(raw);
        Self {
            topic: topic.to_owned(),
            partition,
            offset,
            recorded_at,
            request_id: dead.request_id.to_string(),
            source: dead.source.to_string(),
            item: request.map_or("", |request| request.item.as_str()).to_owned(),
            batch: batch(request.and_then(|request| request.batch.as_ref())).to_owned(),
            requested_at: request.and_then(|request| request.requested_at).map(storable),
            died_at: storable(dead.died_at),
            reason: dead.reason.as_str(),
            message: dead.message.clone(),
            calls: request.map_or(0, calls),
            last_class: last.map_or("", |attempt| attempt.class.as_str()),
            last_code: last.map(|attempt| attempt.code.clone()).unwrap_or_default(),
            origin_topic: dead.origin.topic.clone(),
            origin_partition: dead.origin.partition,
            origin_offset: dead.origin.offset,
            request: request.map(json).unwrap_or_default(),
            original: Blob(original.unwrap_or_default()),
            traceparent: traceparent.to_owned(),
        }
    }

    /// The row of a record that could not be read, with all of its bytes. Its times are the record's, so that
    /// reading it again makes the same row.
    #[must_use]
    pub fn unreadable(raw: &Raw<'_>, why: &Unreadable) -> Self {
        let Place { topic, partition, offset, recorded_at, traceparent } = Place::of(raw);
        Self {
            topic: topic.to_owned(),
            partition,
            offset,
            recorded_at,
            request_id: raw.position_id().to_string(),
            source: String::new(),
            item: String::new(),
            batch: String::new(),
            requested_at: None,
            died_at: recorded_at,
            reason: Reason::Invalid.as_str(),
            message: why.to_string(),
            calls: 0,
            last_class: "",
            last_code: String::new(),
            origin_topic: topic.to_owned(),
            origin_partition: partition,
            origin_offset: offset,
            request: String::new(),
            original: Blob(raw.value.unwrap_or_default().to_owned()),
            traceparent: traceparent.to_owned(),
        }
    }
}

/// A row of `item_changes`.
#[derive(Debug, Row, Serialize)]
pub struct ChangeRow<'a> {
    topic: &'a str,
    partition: i32,
    offset: i64,
    recorded_at: i64,
    source: &'a str,
    item: &'a str,
    field: &'a str,
    old: &'a str,
    new: &'a str,
    old_number: Option<i64>,
    new_number: Option<i64>,
    currency: &'a str,
    old_at: i64,
    new_at: i64,
    batch: &'a str,
    request_id: &'a str,
    traceparent: &'a str,
}

impl<'a> ChangeRow<'a> {
    /// The row of a change. A title is never a number, whatever it looks like.
    #[must_use]
    pub fn new(raw: &Raw<'a>, change: &'a Change) -> Self {
        let (old, new) = (text(change.old.as_ref()), text(change.new.as_ref()));
        let is_number = matches!(change.field, Field::Price | Field::Stock | Field::Rating);
        let number = |text: &str| decimal(text.trim()).filter(|_| is_number);
        let Place { topic, partition, offset, recorded_at, traceparent } = Place::of(raw);
        Self {
            topic,
            partition,
            offset,
            recorded_at,
            source: change.source.as_str(),
            item: change.item.as_str(),
            field: change.field.as_str(),
            old,
            new,
            old_number: number(old),
            new_number: number(new),
            currency: text(change.currency.as_ref()),
            old_at: storable(change.old_at),
            new_at: storable(change.new_at),
            batch: batch(change.batch.as_ref()),
            request_id: change.request_id.as_str(),
            traceparent,
        }
    }
}

fn batch(batch: Option<&BatchId>) -> &str {
    batch.map_or("", BatchId::as_str)
}

fn text(column: Option<&String>) -> &str {
    column.map(String::as_str).unwrap_or_default()
}

fn calls(request: &Request) -> u32 {
    u32::try_from(request.history.len()).unwrap_or(u32::MAX)
}

/// A record that was read from JSON can be written as JSON.
fn json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

#[cfg(test)]
mod tests;
