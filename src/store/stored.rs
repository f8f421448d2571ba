//! Reads observations back as the records that they were.

use std::{collections::BTreeMap, ops::Range};

use clickhouse::{Row, query::RowCursor};
use rust_decimal::Decimal;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::value::RawValue;
use tokio::time::timeout;

use super::{
    connection::Store,
    quoting::identifier,
    trouble::{Trouble, TroubleKind},
};
use crate::{
    kafka::{Partition, Record},
    message::{BatchId, Columns, ItemId, Observation, SourceName, price},
    runtime::clock::Timestamp,
};

/// Which rows are meant.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Only of this source.
    pub source: Option<SourceName>,
    /// Only of this batch.
    pub batch: Option<BatchId>,
    /// Of these items; empty: of all.
    pub items: Vec<ItemId>,
    /// Recorded from this time on.
    pub from: Option<Timestamp>,
    /// And before this one.
    pub to: Option<Timestamp>,
}

impl Wanted {
    /// As a condition. Names are passed as parameters, never as SQL.
    fn sql(&self) -> String {
        let mut sql = "1".to_owned();
        let mut add = |is: bool, condition: String| {
            if is {
                sql = format!("{sql} AND {condition}");
            }
        };
        add(self.source.is_some(), "source = {source: String}".to_owned());
        add(self.batch.is_some(), "batch = {batch: String}".to_owned());
        add(!self.items.is_empty(), "has({items: Array(String)}, item)".to_owned());
        let at = |edge: Option<Timestamp>| edge.unwrap_or_default().as_millis();
        add(self.from.is_some(), format!("recorded_at >= fromUnixTimestamp64Milli({})", at(self.from)));
        add(self.to.is_some(), format!("recorded_at < fromUnixTimestamp64Milli({})", at(self.to)));
        sql
    }
}

/// How far the rows of a partition reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reach {
    /// Which partition.
    pub partition: Partition,
    /// From the first to after the last offset.
    pub range: Range<i64>,
    /// How many rows there are.
    pub rows: u64,
}

/// A row of `observations`.
#[derive(Debug, Row, Deserialize)]
struct Stored {
    offset: i64,
    recorded_at: i64,
    request_id: String,
    source: String,
    instead_of: String,
    item: String,
    batch: String,
    requested_at: i64,
    fetched_at: i64,
    status: String,
    via: String,
    calls: u32,
    account: String,
    latency_ms: u32,
    title: String,
    price: Option<i64>,
    price_text: String,
    currency: String,
    stock: Option<i64>,
    sku_info: String,
    category_id: String,
    seller_nick: String,
    rating: Option<i64>,
    reviews: Option<i64>,
    vendor_status: String,
    vendor_updated: String,
    further: BTreeMap<String, String>,
    fingerprint: String,
    raw: String,
    traceparent: String,
}

const COLUMNS: &str = "offset, recorded_at, request_id, source, instead_of, item, batch, requested_at, fetched_at, status, \
    via, calls, account, latency_ms, title, price, price_text, currency, stock, sku_info, category_id, seller_nick, rating, \
    reviews, vendor_status, vendor_updated, further, fingerprint, raw, traceparent";

impl Store {
    /// The partitions that rows of `observations` are of.
    ///
    /// # Errors
    /// [`Trouble`]
    pub async fn reach(&self, wanted: &Wanted) -> Result<Vec<Reach>, Trouble> {
        let sql = format!(
            "SELECT topic, partition, min(offset), max(offset) + 1, count() FROM observations WHERE {} \
             GROUP BY topic, partition ORDER BY topic, partition",
            wanted.sql()
        );
        let rows = timeout(self.timeout, self.wanted(&sql, wanted).fetch_all::<(String, i32, i64, i64, u64)>()).await;
        let rows = rows.map_err(|_| Trouble::timed_out(self.timeout))??;
        let reach = |(topic, number, first, end, rows): (String, i32, i64, i64, u64)| Reach {
            partition: Partition { topic: topic.into(), number },
            range: first..end,
            rows,
        };
        Ok(rows.into_iter().map(reach).collect())
    }

    /// The rows of a range of offsets, by offset.
    ///
    /// # Errors
    /// [`Trouble`]
    pub fn observations(
        &self,
        partition: &Partition,
        range: &Range<i64>,
        wanted: &Wanted,
    ) -> Result<Observations, Trouble> {
        let sql = format!(
            "SELECT {COLUMNS} FROM observations WHERE topic = {} AND partition = {} AND offset >= {} \
             AND offset < {} AND {} ORDER BY offset",
            "{topic: String}",
            partition.number,
            range.start,
            range.end,
            wanted.sql()
        );
        let rows = self.wanted(&sql, wanted).param("topic", partition.topic.as_ref()).fetch::<Stored>()?;
        Ok(Observations { rows, limit: self.timeout })
    }

    fn wanted(&self, sql: &str, wanted: &Wanted) -> clickhouse::query::Query {
        let mut query = self.client.query_raw(sql);
        if let Some(source) = &wanted.source {
            query = query.param("source", source.as_str());
        }
        if let Some(batch) = &wanted.batch {
            query = query.param("batch", batch.as_str());
        }
        if !wanted.items.is_empty() {
            query = query.param("items", wanted.items.iter().map(ItemId::as_str).collect::<Vec<_>>());
        }
        query
    }

    /// Whether a table of this name is there.
    ///
    /// # Errors
    /// [`Trouble`]
    pub async fn has_table(&self, name: &str) -> Result<bool, Trouble> {
        let query = self.client.query_raw(&format!("EXISTS TABLE {}", identifier(name)));
        let answer = timeout(self.timeout, query.fetch_one::<u8>()).await;
        Ok(answer.map_err(|_| Trouble::timed_out(self.timeout))?? == 1)
    }
}

/// Rows as they come.
pub struct Observations {
    rows: RowCursor<Stored>,
    limit: std::time::Duration,
}

impl Observations {
    /// The next row as the record that it was, without its value: what that said is in the observation.
    ///
    /// # Errors
    /// [`Trouble`]; also for a row that no weir has written.
    pub async fn next(&mut self) -> Result<Option<(Record, Observation)>, Trouble> {
        let row = timeout(self.limit, self.rows.next()).await.map_err(|_| Trouble::timed_out(self.limit))??;
        row.map(|row| {
            let offset = row.offset;
            record(row).map_err(|what| Trouble {
                kind: TroubleKind::Refused,
                code: None,
                view: None,
                message: format!("the row of offset {offset} is no observation of weir: {what}"),
            })
        })
        .transpose()
    }
}

fn record(mut row: Stored) -> Result<(Record, Observation), String> {
    let mut headers = Vec::new();
    if !row.traceparent.is_empty() {
        headers.push(("traceparent".into(), row.traceparent.clone().into()));
    }
    let time = Timestamp::from_millis(row.recorded_at);
    let record = Record { offset: row.offset, time, key: None, value: None, headers, log: None };
    let columns = Columns { further: std::mem::take(&mut row.further), ..columns(&row) };
    let raw = match row.raw.as_str() {
        "" => None,
        _ => Some(RawValue::from_string(row.raw).map_err(|error| format!("raw: {error}"))?),
    };
    let observation = Observation {
        request_id: id(row.request_id)?,
        source: id(row.source)?,
        instead_of: some(row.instead_of).map(id).transpose()?,
        item: id(row.item)?,
        batch: some(row.batch).map(id).transpose()?,
        status: word(row.status)?,
        via: word(row.via)?,
        calls: row.calls,
        account: some(row.account).map(id).transpose()?,
        requested_at: Timestamp::from_millis(row.requested_at),
        fetched_at: Timestamp::from_millis(row.fetched_at),
        latency_ms: row.latency_ms,
        columns,
        fingerprint: row.fingerprint,
        raw,
    };
    Ok((record, observation))
}

fn columns(row: &Stored) -> Columns {
    let decimal = |value: Option<i64>| value.map(|value| Decimal::new(value, 4).normalize().to_string());
    let text = |text: &String| some(text.clone());
    // Rows of earlier versions have words alone where there was a number in them.
    let price::Stated { number, words } = price::stated(&row.price_text);
    Columns {
        title: text(&row.title),
        price: decimal(row.price).or(number),
        price_text: words,
        currency: text(&row.currency),
        stock: decimal(row.stock),
        sku_info: text(&row.sku_info),
        category_id: text(&row.category_id),
        seller_nick: text(&row.seller_nick),
        rating: decimal(row.rating),
        reviews: row.reviews.map(|reviews| reviews.to_string()),
        vendor_status: text(&row.vendor_status),
        vendor_updated: text(&row.vendor_updated),
        further: BTreeMap::new(),
    }
}

fn some(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

fn id<T: TryFrom<String, Error: std::fmt::Display>>(text: String) -> Result<T, String> {
    T::try_from(text).map_err(|error| error.to_string())
}

fn word<T: DeserializeOwned>(text: String) -> Result<T, String> {
    serde_json::from_value(text.into()).map_err(|error| error.to_string())
}
