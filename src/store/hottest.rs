//! The most requested items with their newest answers, for warming the cache.

use std::time::Duration;

use clickhouse::{Row, query::RowCursor};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::timeout;

use super::{
    connection::Store,
    trouble::{Trouble, TroubleKind},
};
use crate::{
    message::{Columns, ItemId, SourceName, Status},
    runtime::clock::Timestamp,
};

/// An item's newest answer.
#[derive(Debug)]
pub struct Hot {
    /// Which item.
    pub item: ItemId,
    /// When the vendor answered.
    pub fetched_at: Timestamp,
    /// What it said.
    pub status: Status,
    /// What was understood of it, as far as it is known.
    pub columns: Columns,
    /// Its JSON.
    pub raw: Option<Box<RawValue>>,
}

#[derive(Debug, Row, Deserialize)]
struct HotRow {
    item: String,
    at: i64,
    status: String,
    raw: String,
}

/// Items as they come, the most asked for first.
pub struct Hottest {
    rows: RowCursor<HotRow>,
    limit: Duration,
}

impl Store {
    /// The newest answer of each of the `most` items that were asked for most often within `since`, as far as it is not
    /// older than `oldest`. Answers to requests with parameters are left out.
    ///
    /// # Errors
    /// [`Trouble`]
    pub fn hottest(
        &self,
        source: &SourceName,
        (now, since, oldest): (Timestamp, Duration, Duration),
        most: u64,
    ) -> Result<Hottest, Trouble> {
        let before = |by: Duration| now.as_millis().saturating_sub(i64::try_from(by.as_millis()).unwrap_or(i64::MAX));
        let sql = format!(
            "SELECT item, toInt64(toUnixTimestamp64Milli(max(fetched_at))) AS at, \
             toString(argMax(status, fetched_at)) AS status, argMax(raw, fetched_at) AS raw \
             FROM observations WHERE source = {{source: String}} \
             AND recorded_at >= fromUnixTimestamp64Milli({}) \
             AND request_key NOT IN (SELECT request_key FROM requests WHERE source = {{source: String}} \
             AND params NOT IN ('', '{{}}')) \
             GROUP BY item HAVING max(fetched_at) >= fromUnixTimestamp64Milli({}) \
             ORDER BY count() DESC, item LIMIT {most}",
            before(since),
            before(oldest),
        );
        let rows = self.client.query_raw(&sql).param("source", source.as_str()).fetch::<HotRow>()?;
        Ok(Hottest { rows, limit: self.timeout })
    }
}

impl Hottest {
    /// The next item.
    ///
    /// # Errors
    /// [`Trouble`]; also for a row that no weir has written.
    pub async fn next(&mut self) -> Result<Option<Hot>, Trouble> {
        let row = timeout(self.limit, self.rows.next()).await.map_err(|_| Trouble::timed_out(self.limit))??;
        row.map(|row| {
            let item = row.item.clone();
            hot(row).map_err(|what| Trouble {
                kind: TroubleKind::Refused,
                code: None,
                view: None,
                message: format!("the row of item {item} is no observation of weir: {what}"),
            })
        })
        .transpose()
    }
}

fn hot(row: HotRow) -> Result<Hot, String> {
    let raw = (!row.raw.is_empty()).then(|| RawValue::from_string(row.raw)).transpose();
    Ok(Hot {
        item: ItemId::new(row.item).map_err(|error| error.to_string())?,
        fetched_at: Timestamp::from_millis(row.at),
        status: serde_json::from_value(row.status.into()).map_err(|error| error.to_string())?,
        columns: Columns::default(),
        raw: raw.map_err(|error| format!("raw: {error}"))?,
    })
}
