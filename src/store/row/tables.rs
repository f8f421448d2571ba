//! The columns of each table and how a record fills them.

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde::Serialize;

use super::{decimal, storable};
use crate::{
    message::{
        BatchId, Change, DeadLetter, Failure, Field, Observation, Reason, Request, SourceName,
        codec::{Raw, Received, Unreadable},
        envelope::header,
        price,
    },
    runtime::clock::Timestamp,
    store::columns::{Blob, Exact, Map, Time, table_row},
};

/// What every table begins and ends with: the record that a row is of, and its trace.
struct Place<'a> {
    topic: &'a str,
    partition: i32,
    offset: i64,
    recorded_at: Time,
    traceparent: &'a str,
}

impl<'a> Place<'a> {
    fn of(raw: &Raw<'a>) -> Self {
        let Raw { topic, partition, offset, time, headers, .. } = *raw;
        let traceparent = header(headers, "traceparent").unwrap_or_default();
        Self { topic, partition, offset, recorded_at: stored(time), traceparent }
    }
}

fn stored(time: Timestamp) -> Time {
    Time(storable(time))
}

table_row! {
    /// A row of `requests`.
    pub struct RequestRow<'a> {
        topic: &'a str,
        partition: i32,
        offset: i64,
        recorded_at: Time,
        request_id: &'a str,
        source: &'a str,
        item: &'a str,
        batch: &'a str,
        requested_at: Time,
        expires_at: Option<Time>,
        calls: u32,
        params: String,
        traceparent: &'a str,
    }
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
            requested_at: stored(request.requested_at.unwrap_or(raw.time)),
            expires_at: request.expires_at.map(stored),
            calls: calls(request),
            params: if request.params.is_empty() { String::new() } else { json(&request.params) },
            traceparent,
        }
    }
}

table_row! {
    /// A row of `observations`.
    pub struct ObservationRow<'a> {
        topic: &'a str,
        partition: i32,
        offset: i64,
        recorded_at: Time,
        request_id: &'a str,
        source: &'a str,
        instead_of: &'a str,
        item: &'a str,
        batch: &'a str,
        requested_at: Time,
        fetched_at: Time,
        status: &'a str,
        via: &'a str,
        calls: u32,
        account: &'a str,
        latency_ms: u32,
        title: &'a str,
        price: Option<Exact>,
        price_text: &'a str,
        currency: &'a str,
        stock: Option<Exact>,
        sku_info: &'a str,
        category_id: &'a str,
        seller_nick: &'a str,
        rating: Option<Exact>,
        reviews: Option<i64>,
        vendor_status: &'a str,
        vendor_updated: &'a str,
        further: Map<'a>,
        fingerprint: &'a str,
        raw: &'a str,
        traceparent: &'a str,
    }
}

impl<'a> ObservationRow<'a> {
    /// The row of a result. A price that is no `Decimal(18, 4)` is kept as text, as are the words that say more
    /// than the number; any other number that does not
    /// fit its column is NULL there and still stands in `raw`.
    #[must_use]
    pub fn new(raw: &Raw<'a>, seen: &'a Observation) -> Self {
        let columns = &seen.columns;
        let (price, words) = (text(columns.price.as_ref()).trim(), text(columns.price_text.as_ref()));
        // Other writers may have put words where the number belongs.
        let exact = price::read(price).and_then(|price| decimal(&price.text));
        let is_all = exact.is_some() && decimal(price).is_some();
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
            requested_at: stored(seen.requested_at),
            fetched_at: stored(seen.fetched_at),
            status: seen.status.as_str(),
            via: seen.via.as_str(),
            calls: seen.calls,
            account: seen.account.as_ref().map_or("", |account| account.as_str()),
            latency_ms: seen.latency_ms,
            title: text(columns.title.as_ref()),
            price: exact,
            price_text: if words.is_empty() && !is_all { price } else { words },
            currency: text(columns.currency.as_ref()),
            stock: decimal(text(columns.stock.as_ref()).trim()),
            sku_info: text(columns.sku_info.as_ref()),
            category_id: text(columns.category_id.as_ref()),
            seller_nick: text(columns.seller_nick.as_ref()),
            rating: decimal(text(columns.rating.as_ref()).trim()),
            reviews: text(columns.reviews.as_ref()).trim().parse().ok(),
            vendor_status: text(columns.vendor_status.as_ref()),
            vendor_updated: text(columns.vendor_updated.as_ref()),
            further: Map(&columns.further),
            fingerprint: &seen.fingerprint,
            raw: seen.raw.as_ref().map_or("", |raw| raw.get()),
            traceparent,
        }
    }
}

table_row! {
    /// A row of `failures`.
    pub struct FailureRow<'a> {
        topic: &'a str,
        partition: i32,
        offset: i64,
        recorded_at: Time,
        request_id: &'a str,
        source: &'a str,
        item: &'a str,
        batch: &'a str,
        requested_at: Time,
        failed_at: Time,
        calls: u32,
        account: &'a str,
        class: &'a str,
        code: &'a str,
        message: &'a str,
        http_status: Option<u16>,
        latency_ms: u32,
        not_before: Option<Time>,
        traceparent: &'a str,
    }
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
            requested_at: stored(request.requested_at.unwrap_or(raw.time)),
            failed_at: stored(attempt.at),
            calls: calls(request).saturating_add(1),
            account: attempt.account.as_ref().map_or("", |account| account.as_str()),
            class: attempt.class.as_str(),
            code: &attempt.code,
            message: &attempt.message,
            http_status: attempt.http_status,
            latency_ms: attempt.latency_ms,
            not_before: attempt.not_before.map(stored),
            traceparent,
        }
    }
}

table_row! {
    /// A row of `dead_letters`. Owns its texts: the row of an unreadable record outlives the reading of it.
    pub struct DeadLetterRow {
        topic: String,
        partition: i32,
        offset: i64,
        recorded_at: Time,
        request_id: String,
        source: String,
        item: String,
        batch: String,
        requested_at: Option<Time>,
        died_at: Time,
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
            requested_at: request.and_then(|request| request.requested_at).map(stored),
            died_at: stored(dead.died_at),
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

table_row! {
    /// A row of `item_changes`.
    pub struct ChangeRow<'a> {
        topic: &'a str,
        partition: i32,
        offset: i64,
        recorded_at: Time,
        source: &'a str,
        item: &'a str,
        field: &'a str,
        old: &'a str,
        new: &'a str,
        old_number: Option<Exact>,
        new_number: Option<Exact>,
        currency: &'a str,
        old_at: Time,
        new_at: Time,
        batch: &'a str,
        request_id: &'a str,
        traceparent: &'a str,
    }
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
            old_at: stored(change.old_at),
            new_at: stored(change.new_at),
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
