//! Queries: SQL of `weir query`, the sample queries, and the progress of a batch.

use std::time::Duration;

use clickhouse::Row;
use serde::Deserialize;
use tokio::{
    io::{AsyncWrite, AsyncWriteExt},
    time::timeout,
};

use super::{
    connection::{ClickHouseConfig, ConnectionError, Store},
    migrations,
    trouble::Trouble,
};
use crate::message::BatchId;

/// How long a query may go without a byte of its answer.
const SILENCE: Duration = Duration::from_secs(600);

/// How long ClickHouse may take to read SQL without answering it.
const READING: Duration = Duration::from_secs(10);

/// How an answer is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Format {
    /// A table for people.
    Table {
        /// With escape sequences for a terminal.
        colour: bool,
    },
    /// One of ClickHouse's formats: `CSV`, `TSV`, `JSONEachRow`, …
    Named(String),
}

impl Format {
    fn name(&self) -> &str {
        match self {
            Self::Table { .. } => "PrettyCompactMonoBlock",
            Self::Named(name) => name,
        }
    }
}

/// Why there is no (complete) answer.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// Wrong settings.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// ClickHouse's answer.
    #[error(transparent)]
    Trouble(#[from] Trouble),
    /// The reader of the result has gone.
    #[error("writing the answer: {0}")]
    Output(std::io::Error),
}

impl QueryError {
    /// The same, of SQL that a person wrote: a name that is not there is a slip of the pen then, unless it is one of
    /// weir's own tables.
    #[must_use]
    pub fn in_sql_by_hand(self, database: &str) -> Self {
        match self {
            Self::Trouble(trouble) => Self::Trouble(trouble.in_sql_by_hand(|table| migrations::lacks(database, table))),
            Self::Connection(_) | Self::Output(_) => self,
        }
    }
}

/// Runs any SQL and writes the answer to `out` as it comes, in constant memory. A `FORMAT` in the SQL wins.
///
/// # Errors
/// [`QueryError`]; what came before it has been written.
pub async fn query(
    config: &ClickHouseConfig,
    sql: &str,
    format: &Format,
    out: &mut (impl AsyncWrite + Unpin),
) -> Result<(), QueryError> {
    let settings: &[_] = match format {
        Format::Table { colour: true } => &[("output_format_pretty_color", "1"), ROWS_WITHOUT_NUMBERS],
        Format::Table { colour: false } => &[("output_format_pretty_color", "0"), ROWS_WITHOUT_NUMBERS],
        Format::Named(_) => &[],
    };
    insist(config, sql, format, settings, out).await
}

/// The name in the FORMAT clause of SQL, as ClickHouse reads it. Nothing if there is no such clause; nor if ClickHouse cannot
/// read the SQL or does not answer within 10 s: whoever then asks for the answer hears why.
pub async fn format_of(config: &ClickHouseConfig, sql: &str) -> Option<String> {
    let ask = config.client().ok()?.query_raw("SELECT formatQuerySingleLine({sql: String})").param("sql", sql);
    let sql: String = timeout(READING, ask.fetch_one()).await.ok()?.ok()?;
    format_at_end(&sql).map(ToOwned::to_owned)
}

/// Of a query as ClickHouse writes it: in one line, without comments, keywords in capitals. The FORMAT of an INSERT is that
/// of its data.
fn format_at_end(sql: &str) -> Option<&str> {
    let (_, clause) = sql.rsplit_once(" FORMAT ").filter(|_| !sql.starts_with("INSERT "))?;
    let (name, rest) = clause.split_once(' ').unwrap_or((clause, ""));
    let is_name = name.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_');
    (is_name && (rest.is_empty() || rest.starts_with("SETTINGS "))).then_some(name)
}

/// As [`query`], for SQL that has to have an answer: what would write is refused.
///
/// # Errors
/// [`QueryError`]
pub async fn read(
    config: &ClickHouseConfig,
    sql: &str,
    format: &Format,
    out: &mut (impl AsyncWrite + Unpin),
) -> Result<(), QueryError> {
    // 1 would refuse SETTINGS in the SQL as well.
    insist(config, sql, format, &[("readonly", "2")], out).await
}

const ROWS_WITHOUT_NUMBERS: (&str, &str) = ("output_format_pretty_row_numbers", "0");

/// Asks with these settings, or without them as a user who may only read and therefore set nothing.
async fn insist(
    config: &ClickHouseConfig,
    sql: &str,
    format: &Format,
    settings: &[(&str, &str)],
    out: &mut (impl AsyncWrite + Unpin),
) -> Result<(), QueryError> {
    match ask(config, sql, format, settings, out).await {
        Err(QueryError::Trouble(trouble)) if trouble.is_bound_to_settings() && !settings.is_empty() => {
            ask(config, sql, format, &[], out).await
        }
        answered => answered,
    }
}

async fn ask(
    config: &ClickHouseConfig,
    sql: &str,
    format: &Format,
    settings: &[(&str, &str)],
    out: &mut (impl AsyncWrite + Unpin),
) -> Result<(), QueryError> {
    let mut query = config.client()?.query_raw(sql.trim().trim_end_matches(';'));
    for (name, value) in settings {
        query = query.with_setting(*name, *value);
    }
    let mut answer = query.fetch_bytes(format.name()).map_err(Trouble::from)?;
    loop {
        let bytes = timeout(SILENCE, answer.next()).await.map_err(|_| Trouble::timed_out(SILENCE))?;
        match bytes.map_err(Trouble::from)? {
            Some(bytes) => out.write_all(&bytes).await.map_err(QueryError::Output)?,
            None => return out.flush().await.map_err(QueryError::Output),
        }
    }
}

/// A query that shows what can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// What it answers: the comment in its first line.
    pub title: &'static str,
    /// The SQL.
    pub sql: &'static str,
}

/// The files of `schemas/clickhouse/queries/`, in the order of their names.
pub fn samples() -> impl Iterator<Item = Sample> {
    const FILES: [&str; 12] = [
        include_str!("../../schemas/clickhouse/queries/01_outcomes.sql"),
        include_str!("../../schemas/clickhouse/queries/02_prices.sql"),
        include_str!("../../schemas/clickhouse/queries/03_latency.sql"),
        include_str!("../../schemas/clickhouse/queries/04_failures.sql"),
        include_str!("../../schemas/clickhouse/queries/05_accounts.sql"),
        include_str!("../../schemas/clickhouse/queries/06_freshness.sql"),
        include_str!("../../schemas/clickhouse/queries/07_price_history.sql"),
        include_str!("../../schemas/clickhouse/queries/08_drops.sql"),
        include_str!("../../schemas/clickhouse/queries/09_new_and_vanished.sql"),
        include_str!("../../schemas/clickhouse/queries/10_sellers.sql"),
        include_str!("../../schemas/clickhouse/queries/11_success.sql"),
        include_str!("../../schemas/clickhouse/queries/12_volatile.sql"),
    ];
    FILES.into_iter().map(|file| {
        let (title, sql) = file.split_once('\n').unwrap_or(("", file));
        Sample { title: title.trim_start_matches("--").trim(), sql: sql.trim() }
    })
}

/// How far a batch is, counted in requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Row, Deserialize)]
pub struct Progress {
    /// Asked for.
    pub requested: u64,
    /// Answered: here are its data. A request that was asked for again is counted nowhere until it has ended again.
    pub found: u64,
    /// Answered: there is no such item.
    pub absent: u64,
    /// Answered: not for sale now.
    pub off_shelf: u64,
    /// Given up.
    pub dead: u64,
    /// Failed calls: each but a last one is tried again.
    pub failed: u64,
    /// Requests that were tried again at least once.
    pub retried: u64,
}

impl Progress {
    /// Requests that have come to their end.
    #[must_use]
    pub const fn ended(&self) -> u64 {
        self.found + self.absent + self.off_shelf + self.dead
    }
}

impl Store {
    /// How many requests of a batch stand in these ranges of its topic, by partition the first and the last offset.
    ///
    /// # Errors
    /// [`Trouble`]
    pub async fn recorded(&self, batch: &BatchId, topic: &str, ranges: &[(i32, i64, i64)]) -> Result<u64, Trouble> {
        let range = |(partition, first, last): &(i32, i64, i64)| {
            format!("(partition = {partition} AND offset BETWEEN {first} AND {last})")
        };
        let ranges: Vec<String> = ranges.iter().map(range).collect();
        let sql = format!(
            "SELECT uniqExact(partition, offset) FROM requests WHERE batch = {{batch: String}} \
             AND topic = {{topic: String}} AND ({})",
            if ranges.is_empty() { "0".to_owned() } else { ranges.join(" OR ") }
        );
        let query = self.client.query_raw(&sql).param("batch", batch.as_str()).param("topic", topic);
        let answer = timeout(self.timeout, query.fetch_one::<u64>()).await;
        Ok(answer.map_err(|_| Trouble::timed_out(self.timeout))??)
    }

    /// How far a batch is: all zero while the sink has not seen any of it. With a million requests a poll costs
    /// about 0.2 s, with ten thousand 10 ms.
    ///
    /// # Errors
    /// [`Trouble`]
    pub async fn batch_progress(&self, batch: &BatchId) -> Result<Progress, Trouble> {
        let query = self
            .client
            .query_raw(
                "SELECT requested, found, absent, off_shelf, dead, failed, retried FROM batches \
                 WHERE batch = {batch: String}",
            )
            .param("batch", batch.as_str());
        let answer = timeout(self.timeout, query.fetch_optional::<Progress>()).await;
        Ok(answer.map_err(|_| Trouble::timed_out(self.timeout))??.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sample_has_a_title_and_every_file_is_a_sample() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/schemas/clickhouse/queries");
        assert_eq!(std::fs::read_dir(folder).unwrap().count(), samples().count());
        for sample in samples() {
            assert!(sample.title.contains(": ") && sample.sql.starts_with("SELECT"), "{sample:?}");
        }
    }
}
