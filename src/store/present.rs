//! Which offsets of a topic have a row, for `verify` and `replay`.

use std::{collections::HashSet, ops::Range};

use tokio::time::timeout;

use super::{
    connection::Store,
    quoting::{identifier, quoted},
    row,
    trouble::Trouble,
};
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
    /// How many rows of a kind there are for which `range` holds.
    ///
    /// # Errors
    /// [`Trouble`]
    pub async fn count_where(&self, kind: Kind, range: &str) -> Result<u64, Trouble> {
        let sql = format!("SELECT count() FROM {} WHERE {range}", row::table(kind));
        let query = self.client.query_raw(&sql).with_setting("use_query_cache", "0");
        self.within(query.fetch_one::<u64>()).await
    }

    /// The offsets of the rows of a kind for which `range` holds.
    ///
    /// # Errors
    /// [`Trouble`]
    pub async fn offsets_where(&self, kind: Kind, range: &str) -> Result<HashSet<i64>, Trouble> {
        let sql = format!("SELECT offset FROM {} WHERE {range}", row::table(kind));
        let query = self.client.query_raw(&sql).with_setting("use_query_cache", "0");
        Ok(self.within(query.fetch_all()).await?.into_iter().collect())
    }

    /// The offset after the last record of a partition that has a row, or a dead letter since it could not be read. 0 if
    /// none has.
    ///
    /// # Errors
    /// [`Trouble`]
    pub async fn dealt_with_until(&self, kind: Kind, partition: &Partition) -> Result<i64, Trouble> {
        let sql = format!(
            "SELECT max(next) FROM (SELECT ifNull(maxOrNull(offset) + 1, 0) AS next FROM {} \
             WHERE topic = {{topic: String}} AND partition = {} \
             UNION ALL SELECT ifNull(maxOrNull(origin_offset) + 1, 0) FROM dead_letters \
             WHERE origin_topic = {{topic: String}} AND origin_partition = {} AND reason = 'invalid')",
            row::table(kind),
            partition.number,
            partition.number,
        );
        let query = self.client.query_raw(&sql).param("topic", partition.topic.as_ref());
        self.within(query.with_setting("use_query_cache", "0").fetch_one::<i64>()).await
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
        take: impl FnMut(&str, &str, Timestamp),
    ) -> Result<(), Trouble> {
        let place = format!("topic = {{topic: String}} AND partition = {} AND offset < {offset}", partition.number);
        self.ends(kind, (&place, &partition.topic), since, take).await
    }

    /// The same of all rows whose log is a former one of this topic's name.
    ///
    /// # Errors
    /// [`Trouble`]
    pub async fn ends_of_former_logs(
        &self,
        kind: Kind,
        (topic, log): (&str, &str),
        since: Timestamp,
        take: impl FnMut(&str, &str, Timestamp),
    ) -> Result<(), Trouble> {
        let is_former = format!(
            "(topic = {{topic: String}} OR startsWith(topic, concat({{topic: String}}, '@'))) AND topic != {}",
            quoted(log)
        );
        self.ends(kind, (&is_former, topic), since, take).await
    }

    /// `place`: which rows, by the parameter `topic`.
    async fn ends(
        &self,
        kind: Kind,
        (place, topic): (&str, &str),
        since: Timestamp,
        mut take: impl FnMut(&str, &str, Timestamp),
    ) -> Result<(), Trouble> {
        let table = identifier(&Place::of(kind).table);
        let status = if kind == Kind::DeadLetter { "'dead'" } else { "status::String" };
        let sql = format!(
            "SELECT request_id, {status} AS status, toUnixTimestamp64Milli(recorded_at) AS at FROM {table} \
             WHERE {place} AND recorded_at >= fromUnixTimestamp64Milli({}) LIMIT 1 BY topic, partition, offset",
            since.as_millis(),
        );
        let query = self.client.query_raw(&sql).param("topic", topic);
        let mut rows = query.fetch::<(String, String, i64)>()?;
        loop {
            let row = timeout(self.timeout, rows.next()).await.map_err(|_| Trouble::timed_out(self.timeout))??;
            let Some((id, status, at)) = row else { return Ok(()) };
            take(&id, &status, Timestamp::from_millis(at));
        }
    }

    /// Which of these places have rows that are not of the same record: they differ in their request or in its time.
    ///
    /// # Errors
    /// [`Trouble`]
    pub async fn differing(
        &self,
        place: &Place,
        log: &str,
        places: impl IntoIterator<Item = (i32, i64)>,
    ) -> Result<Vec<(i32, i64)>, Trouble> {
        self.places_with("uniqExact(request_id, recorded_at) > 1", place, log, places).await
    }

    /// Which of these places have only rows that are of no request.
    ///
    /// # Errors
    /// [`Trouble`]
    pub async fn without_request(
        &self,
        place: &Place,
        log: &str,
        places: impl IntoIterator<Item = (i32, i64)>,
    ) -> Result<Vec<(i32, i64)>, Trouble> {
        self.places_with("max(request_id) = ''", place, log, places).await
    }

    /// Whether a request or failure whose record is still on its topic has had its end since. `lows`: the first offset that
    /// is left of each partition. The oldest of them are looked at.
    ///
    /// # Errors
    /// [`Trouble`]
    pub async fn knows_ends(&self, place: &Place, log: &str, lows: &[(i32, i64)]) -> Result<bool, Trouble> {
        let list = |numbers: Vec<String>| numbers.join(", ");
        let numbers = list(lows.iter().map(|(number, _)| number.to_string()).collect());
        let offsets = list(lows.iter().map(|(_, low)| low.to_string()).collect());
        let sql = format!(
            "WITH oldest AS (SELECT request_id, recorded_at FROM {} WHERE topic = {{topic: String}} AND offset >= \
             transform(partition, [{numbers}]::Array(Int32), [{offsets}]::Array(Int64), 0::Int64) \
             ORDER BY recorded_at LIMIT 10000) \
             SELECT count() FROM (SELECT request_id, recorded_at FROM observations \
             WHERE request_id IN (SELECT request_id FROM oldest) \
             AND recorded_at >= (SELECT min(recorded_at) FROM oldest) \
             UNION ALL SELECT request_id, recorded_at FROM dead_letters \
             WHERE request_id IN (SELECT request_id FROM oldest) \
             AND recorded_at >= (SELECT min(recorded_at) FROM oldest)) AS ends \
             INNER JOIN oldest USING (request_id) WHERE ends.recorded_at >= oldest.recorded_at",
            identifier(&place.table),
        );
        let query = self.client.query_raw(&sql).param("topic", log);
        let found = timeout(self.timeout, query.fetch_one::<u64>()).await;
        Ok(found.map_err(|_| Trouble::timed_out(self.timeout))?? > 0)
    }

    /// Those of these places whose rows together meet a condition.
    async fn places_with(
        &self,
        condition: &str,
        place: &Place,
        log: &str,
        places: impl IntoIterator<Item = (i32, i64)>,
    ) -> Result<Vec<(i32, i64)>, Trouble> {
        let places: Vec<_> = places.into_iter().map(|(number, offset)| format!("({number}, {offset})")).collect();
        if places.is_empty() {
            return Ok(Vec::new());
        }
        let sql = format!(
            "SELECT partition, offset FROM {} WHERE topic = {{topic: String}} AND (partition, offset) IN ({}) \
             GROUP BY partition, offset HAVING {condition} ORDER BY partition, offset",
            identifier(&place.table),
            places.join(", "),
        );
        let query = self.client.query_raw(&sql).param("topic", log);
        let rows = timeout(self.timeout, query.fetch_all::<(i32, i64)>()).await;
        Ok(rows.map_err(|_| Trouble::timed_out(self.timeout))??)
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

/// The rows of a range of offsets, as a condition of SQL. `times` are those of their records: they let ClickHouse skip all parts but those of that moment: the tables are
/// not sorted by offset.
#[must_use]
pub fn range(partition: &Partition, offsets: Range<i64>, times: impl Iterator<Item = i64> + Clone) -> String {
    let range = format!(
        "topic = {} AND partition = {} AND offset >= {} AND offset < {}",
        quoted(&partition.topic),
        partition.number,
        offsets.start,
        offsets.end
    );
    match times.clone().min().zip(times.max()) {
        Some((from, to)) => {
            let time = |millis: i64| format!("fromUnixTimestamp64Milli({millis}, 'UTC')");
            format!("{range} AND recorded_at >= {} AND recorded_at <= {}", time(from), time(to))
        }
        None => range,
    }
}
