//! Last known values of each item's watched columns, in table `item_watched`.

use std::collections::{BTreeMap, HashMap};

use clickhouse::Row;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::{connection::Store, row::storable, trouble::Trouble};
use crate::{
    message::{ItemId, SourceName, Status, Watched},
    runtime::clock::Timestamp,
};

/// So many items are asked for at once: 30 kB of SQL, where ClickHouse reads 256 kB at most.
const ITEMS_MAX: usize = 1_000;

/// A row of `item_watched`. Empty: the vendor gave none.
#[derive(Debug, Row, Serialize, Deserialize)]
struct WatchedRow {
    source: String,
    item: String,
    fetched_at: i64,
    found_at: Option<i64>,
    status: String,
    fingerprint: String,
    price: String,
    title: String,
    stock: String,
    rating: String,
}

impl Store {
    /// What is remembered of these items; those never seen are missing. A thousand of a million take about 50 ms.
    ///
    /// # Errors
    /// [`Trouble`]
    pub async fn watched(
        &self,
        items: &[(SourceName, ItemId)],
    ) -> Result<HashMap<(SourceName, ItemId), Watched>, Trouble> {
        let mut by_source: BTreeMap<&SourceName, Vec<&str>> = BTreeMap::new();
        for (source, item) in items {
            by_source.entry(source).or_default().push(item.as_str());
        }
        let mut known = HashMap::with_capacity(items.len());
        for (source, items) in by_source {
            for items in items.chunks(ITEMS_MAX) {
                let query = self
                    .client
                    .query("SELECT ?fields FROM item_watched FINAL WHERE source = ? AND item IN ?")
                    .bind(source.as_str())
                    .bind(items);
                let rows = timeout(self.timeout, query.fetch_all::<WatchedRow>()).await;
                let rows = rows.map_err(|_| Trouble::timed_out(self.timeout))??;
                known.extend(rows.into_iter().filter_map(read));
            }
        }
        Ok(known)
    }

    /// Remembers these items. Something older than what is known, or the same again, changes nothing.
    ///
    /// # Errors
    /// [`Trouble`]: perhaps done, perhaps not.
    pub async fn remember(&self, items: &HashMap<(SourceName, ItemId), Watched>) -> Result<(), Trouble> {
        if items.is_empty() {
            return Ok(());
        }
        let write = async {
            let client = self.client.clone().with_setting("async_insert", "0");
            let mut insert = client.insert::<WatchedRow>("item_watched").await?;
            for ((source, item), watched) in items {
                insert.write(&row(source, item, watched)).await?;
            }
            insert.end().await
        };
        Ok(timeout(self.timeout, write).await.map_err(|_| Trouble::timed_out(self.timeout))??)
    }
}

fn row(source: &SourceName, item: &ItemId, watched: &Watched) -> WatchedRow {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    WatchedRow {
        source: source.as_str().to_owned(),
        item: item.as_str().to_owned(),
        fetched_at: storable(watched.fetched_at),
        found_at: watched.found_at.map(storable),
        status: watched.status.as_str().to_owned(),
        fingerprint: watched.fingerprint.clone(),
        price: text(&watched.price),
        title: text(&watched.title),
        stock: text(&watched.stock),
        rating: text(&watched.rating),
    }
}

/// `None`: not written by weir; then the item counts as never seen.
fn read(row: WatchedRow) -> Option<((SourceName, ItemId), Watched)> {
    let text = |value: String| Some(value).filter(|value| !value.is_empty());
    let status = [Status::Found, Status::Absent, Status::OffShelf];
    let watched = Watched {
        fetched_at: Timestamp::from_millis(row.fetched_at),
        status: status.into_iter().find(|status| status.as_str() == row.status)?,
        fingerprint: row.fingerprint,
        found_at: row.found_at.map(Timestamp::from_millis),
        price: text(row.price),
        title: text(row.title),
        stock: text(row.stock),
        rating: text(row.rating),
    };
    Some(((SourceName::new(row.source).ok()?, ItemId::new(row.item).ok()?), watched))
}
