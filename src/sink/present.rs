//! Which records of a topic have a row, by their offsets: what `verify` proves and `replay` fills up.

use std::ops::Range;

use tokio::time::timeout;

use super::{connection::Trouble, insert::Store, row};
use crate::{
    kafka::{Partition, page::Page},
    message::envelope::Kind,
    runtime::clock::Timestamp,
};

/// Where the rows of a kind of record are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The table of the kind.
    pub table: String,
}

impl Place {
    /// The tables that the sink writes.
    #[must_use]
    pub fn of(kind: Kind) -> Self {
        Self { table: row::table(kind).to_owned() }
    }
}

impl Store {
    /// The offsets of a partition that have a row, those of `range` on the page of its start.
    ///
    /// # Errors
    /// [`Trouble`]
    pub async fn present(&self, place: &Place, partition: &Partition, range: &Range<i64>) -> Result<Page, Trouble> {
        let mut page = Page::of(range.start);
        let first = page.range().start;
        let table = identifier(&place.table);
        let sql = format!(
            "SELECT toUInt32(offset - {first}) AS place FROM {table} WHERE topic = {{topic: String}} \
             AND partition = {} AND offset >= {} AND offset < {}",
            partition.number,
            range.start,
            range.end.min(page.range().end),
        );
        let query = self.client.query_raw(&sql).param("topic", partition.topic.as_ref());
        let mut rows = query.fetch::<u32>()?;
        loop {
            let row = timeout(self.timeout, rows.next()).await.map_err(|_| Trouble::timed_out(self.timeout))??;
            match row {
                Some(place) => page.add(first + i64::from(place)),
                None => return Ok(page),
            }
        }
    }
}

impl Store {
    /// The places of rows of a topic that stand at or beyond these, by partition, or in a partition that is not named; the
    /// farthest first, at most `limit`. A place stands there as often as it has rows.
    ///
    /// # Errors
    /// [`Trouble`]
    pub async fn beyond(
        &self,
        place: &Place,
        topic: &str,
        ends: &[(i32, i64)],
        limit: u32,
    ) -> Result<Vec<(i32, i64)>, Trouble> {
        let (table, list) = (identifier(&place.table), |numbers: Vec<String>| numbers.join(", "));
        let numbers = list(ends.iter().map(|(number, _)| number.to_string()).collect());
        let offsets = list(ends.iter().map(|(_, end)| end.to_string()).collect());
        let sql = format!(
            "SELECT partition, offset FROM {table} WHERE topic = {{topic: String}} AND offset >= \
             transform(partition, [{numbers}]::Array(Int32), [{offsets}]::Array(Int64), 0::Int64) \
             ORDER BY offset DESC LIMIT {limit}",
        );
        let query = self.client.query_raw(&sql).param("topic", topic);
        let rows = timeout(self.timeout, query.fetch_all::<(i32, i64)>()).await;
        Ok(rows.map_err(|_| Trouble::timed_out(self.timeout))??)
    }

    /// How requests ended whose results or dead letters stand before an offset, as their rows say: id, status (`dead` of a
    /// dead letter) and time of the record. Only those recorded since a time.
    ///
    /// # Errors
    /// [`Trouble`]
    pub async fn ends_before(
        &self,
        kind: Kind,
        (partition, offset): (&Partition, i64),
        since: Timestamp,
        mut take: impl FnMut(&str, &str, Timestamp),
    ) -> Result<(), Trouble> {
        let table = identifier(&Place::of(kind).table);
        let status = if kind == Kind::DeadLetter { "'dead'" } else { "status::String" };
        let sql = format!(
            "SELECT request_id, {status} AS status, toUnixTimestamp64Milli(recorded_at) AS at FROM {table} \
             WHERE topic = {{topic: String}} AND partition = {} AND offset < {offset} \
             AND recorded_at >= fromUnixTimestamp64Milli({}) LIMIT 1 BY offset",
            partition.number,
            since.as_millis(),
        );
        let query = self.client.query_raw(&sql).param("topic", partition.topic.as_ref());
        let mut rows = query.fetch::<(String, String, i64)>()?;
        loop {
            let row = timeout(self.timeout, rows.next()).await.map_err(|_| Trouble::timed_out(self.timeout))??;
            let Some((id, status, at)) = row else { return Ok(()) };
            take(&id, &status, Timestamp::from_millis(at));
        }
    }

    /// The topics that rows of a table name beside these, and how many rows each.
    ///
    /// # Errors
    /// [`Trouble`]
    pub async fn topics_but(&self, place: &Place, known: &[&str]) -> Result<Vec<(String, u64)>, Trouble> {
        let table = identifier(&place.table);
        let sql = format!(
            "SELECT topic::String AS topic, count() AS rows FROM {table} \
             WHERE topic NOT IN {{known: Array(String)}} GROUP BY topic ORDER BY topic"
        );
        let query = self.client.query_raw(&sql).param("known", known);
        let rows = timeout(self.timeout, query.fetch_all::<(String, u64)>()).await;
        Ok(rows.map_err(|_| Trouble::timed_out(self.timeout))??)
    }
}

/// A table's name as SQL takes it, whatever is in it.
pub(super) fn identifier(name: &str) -> String {
    format!("`{}`", name.replace('\\', "\\\\").replace('`', "\\`"))
}
