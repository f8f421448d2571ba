//! One block → one insert: by column, LZ4, synchronous, under a token; and the count that tells whether it is there.

use std::{collections::HashSet, fmt::Write as _, ops::Range, time::Duration};

use bytes::BytesMut;
use clickhouse::{Client, Row, error::Error, insert_formatted::InsertFormatted, query::Query};
use serde::Deserialize;
use tokio::time::timeout;

use super::{
    block::Block,
    columns::Columns,
    connection::{ClickHouseConfig, ConnectionError, Trouble},
    present::identifier,
    row,
    sealed::Sealed,
};
use crate::{kafka::Partition, message::envelope::Kind};

/// The most rows that ClickHouse takes as one block, and so recognises under one token. Its default is a little more.
pub const ROWS_MAX: usize = 1_000_000;

/// How long the answer to a ping may take.
const PING: Duration = Duration::from_secs(5);

/// So many bytes are compressed and sent at once, about a millisecond's work.
const PIECE: usize = 256 * 1024;

/// Takes blocks.
pub trait Insert: Send + Sync + 'static {
    /// Stores the rows of a block under a token. Under the same token again it is no harm.
    ///
    /// # Cancellation
    /// Whether the rows are stored is then unknown.
    ///
    /// # Errors
    /// [`Trouble`]: perhaps stored, perhaps not.
    fn insert(&self, sealed: &Sealed, token: &str) -> impl Future<Output = Result<(), Trouble>> + Send;

    /// How many rows of the block's range are in its table.
    ///
    /// # Errors
    /// [`Trouble`]
    fn count(&self, sealed: &Sealed) -> impl Future<Output = Result<u64, Trouble>> + Send;

    /// Feeds the block's rows to the tables of the views once more: an insert that was broken off may have stored the
    /// rows and not come to the views.
    ///
    /// # Errors
    /// [`Trouble`]
    fn refill(&self, sealed: &Sealed) -> impl Future<Output = Result<(), Trouble>> + Send;

    /// The offset after the last record of a partition that has been dealt with: that has a row, or a dead letter of
    /// the sink. 0 if none has.
    ///
    /// # Errors
    /// [`Trouble`]
    fn reaches(&self, kind: Kind, partition: &Partition) -> impl Future<Output = Result<i64, Trouble>> + Send;

    /// The offsets of a block's records that have a row. Those rows are fed to the tables of the views once more: the
    /// insert that nobody knows of any longer may have been broken off before.
    ///
    /// # Errors
    /// [`Trouble`]
    fn stored(&self, kind: Kind, block: &Block) -> impl Future<Output = Result<HashSet<i64>, Trouble>> + Send;
}

/// The database.
#[derive(Clone, Debug)]
pub struct Store {
    pub(super) client: Client,
    pub(super) timeout: Duration,
}

impl Store {
    /// The database of `config`. Nothing is sent yet, so it need not be there.
    ///
    /// # Errors
    /// [`ConnectionError`]: the configuration is wrong.
    pub fn connect(config: &ClickHouseConfig) -> Result<Self, ConnectionError> {
        Ok(Self { client: config.client()?, timeout: config.timeout })
    }

    /// ClickHouse's version: it is there, lets us in, and has our database.
    ///
    /// # Errors
    /// [`Trouble`] says what is missing.
    pub async fn ping(&self) -> Result<String, Trouble> {
        let limit = PING.min(self.timeout);
        let answer = timeout(limit, self.client.query_raw("SELECT version()").fetch_one::<String>()).await;
        Ok(answer.map_err(|_| Trouble::timed_out(limit))??)
    }

    /// Inserts rows as one block of ClickHouse, answered when they are stored, and recognised by the token.
    pub(super) async fn write(&self, table: &str, columns: &Columns, token: &str) -> Result<(), Error> {
        // An insert without rows is one too many.
        if columns.rows() == 0 {
            return Ok(());
        }
        let mut insert = self.open(table, &columns.names(), token);
        let mut piece = BytesMut::new();
        for part in columns.parts() {
            let mut rest = part.as_ref();
            while !rest.is_empty() {
                piece.reserve(PIECE);
                let (now, later) = rest.split_at(rest.len().min(PIECE - piece.len()));
                piece.extend_from_slice(now);
                rest = later;
                if piece.len() == PIECE {
                    insert.send(piece.split().freeze()).await?;
                    tokio::task::yield_now().await;
                }
            }
        }
        insert.send(piece.freeze()).await?;
        insert.end().await
    }

    fn open(&self, table: &str, columns: &str, token: &str) -> InsertFormatted {
        let sql = format!("INSERT INTO {} ({columns}) FORMAT Native", identifier(table));
        self.client
            .insert_formatted_with(sql)
            .with_timeouts(Some(self.timeout), Some(self.timeout))
            // An answer before the rows are stored would be a promise that nobody keeps; newer servers default to 1.
            .with_setting("async_insert", "0")
            .with_setting("wait_end_of_query", "1")
            // What nobody waits for any longer need not be finished.
            .with_setting("max_execution_time", self.timeout.as_secs().max(1).to_string())
            .with_setting("insert_deduplicate", "1")
            .with_setting("insert_deduplication_token", token)
            // The views' tables would otherwise take a repeated block again; and an error of a view is an error.
            .with_setting("deduplicate_blocks_in_dependent_materialized_views", "1")
            .with_setting("materialized_views_ignore_errors", "0")
            // Split into several blocks, the parts would have tokens of their own.
            .with_setting("max_insert_block_size", ROWS_MAX.to_string())
            .with_setting("min_insert_block_size_rows", ROWS_MAX.to_string())
            .with_setting("min_insert_block_size_bytes", "0")
    }

    pub(super) async fn within<T>(&self, answer: impl Future<Output = Result<T, Error>>) -> Result<T, Trouble> {
        match timeout(self.timeout, answer).await {
            Ok(outcome) => outcome.map_err(Trouble::from),
            Err(_) => Err(Trouble::timed_out(self.timeout)),
        }
    }

    /// `range`: which rows, as a condition.
    async fn refill_views(&self, kind: Kind, range: &str) -> Result<(), Error> {
        let table = row::table(kind);
        let views: Vec<View> = self.client.query_raw(VIEWS).param("table", table).fetch_all().await?;
        for View { name, select, target, columns, bears_it } in views {
            if bears_it == 0 {
                tracing::warn!(
                    view = name,
                    target,
                    "after a broken insert rows may be missing there: it is no table that the same row can be added to twice"
                );
                continue;
            }
            let (range, database) = (quoted(range), self.client.database().unwrap_or_default());
            // Without deduplication: a token could be known for rows that are not there.
            let sql = format!(
                "INSERT INTO {target} ({columns}) {select} SETTINGS insert_deduplicate = 0, async_insert = 0, \
                 additional_table_filters = {{'{database}.{table}': {range}}}"
            );
            self.client.query_raw(&sql).execute().await?;
        }
        Ok(())
    }
}

/// The materialized views that read a table, and whether the tables that they feed bear the same row twice: those that
/// replace it, and those that only keep the least and the greatest.
const VIEWS: &str = r"
SELECT view AS name, select, target, columns, toUInt8(engine LIKE '%Replacing%'
    OR (engine LIKE '%AggregatingMergeTree' AND target NOT IN
        (SELECT concat(database, '.', table) FROM system.columns WHERE type LIKE '%AggregateFunction(%'
            AND NOT match(type, '^SimpleAggregateFunction\((min|max),')))) AS bears_it
FROM
(
    SELECT name AS view, as_select AS select, extract(create_table_query, ' TO ([^ (]+)') AS target
    FROM system.tables
    WHERE database = currentDatabase() AND engine = 'MaterializedView' AND name IN
        (SELECT arrayJoin(dependencies_table) FROM system.tables WHERE database = currentDatabase() AND name = {table: String})
) AS views
INNER JOIN
(
    SELECT table AS view, arrayStringConcat(groupArray(concat('`', name, '`')), ', ') AS columns
    FROM (SELECT table, name FROM system.columns WHERE database = currentDatabase() ORDER BY position) GROUP BY table
) AS columns USING (view)
LEFT JOIN (SELECT concat(database, '.', name) AS target, engine FROM system.tables) AS tables USING (target)";

#[derive(Row, Deserialize)]
struct View {
    name: String,
    select: String,
    target: String,
    columns: String,
    bears_it: u8,
}

impl Insert for Store {
    async fn insert(&self, sealed: &Sealed, token: &str) -> Result<(), Trouble> {
        self.within(self.write(row::table(sealed.kind), &sealed.columns, token)).await
    }

    async fn count(&self, sealed: &Sealed) -> Result<u64, Trouble> {
        let sql = format!("SELECT count() FROM {} WHERE {}", row::table(sealed.kind), range_of(sealed));
        let query: Query = self.client.query_raw(&sql).with_setting("use_query_cache", "0");
        self.within(query.fetch_one::<u64>()).await
    }

    async fn refill(&self, sealed: &Sealed) -> Result<(), Trouble> {
        self.within(self.refill_views(sealed.kind, &range_of(sealed))).await
    }

    async fn reaches(&self, kind: Kind, partition: &Partition) -> Result<i64, Trouble> {
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

    async fn stored(&self, kind: Kind, block: &Block) -> Result<HashSet<i64>, Trouble> {
        let times = block.records.iter().map(|record| row::storable(record.time));
        let range = range(&block.partition, block.first()..block.next(), times);
        let sql = format!("SELECT offset FROM {} WHERE {range}", row::table(kind));
        let query = self.client.query_raw(&sql).with_setting("use_query_cache", "0");
        let found: HashSet<i64> = self.within(query.fetch_all()).await?.into_iter().collect();
        if !found.is_empty() {
            self.within(self.refill_views(kind, &range)).await?;
        }
        Ok(found)
    }
}

/// The rows of a block, as a condition: without those at the places of its records that make none, since what stands
/// there is not of this block.
fn range_of(sealed: &Sealed) -> String {
    let intent = &sealed.intent;
    let times = sealed.rows.iter().map(|row| row.recorded_at);
    let mut condition = range(&sealed.partition, intent.first..intent.next, times);
    for (first, last) in &intent.runs {
        // Writing into a String cannot fail.
        let _ = write!(condition, " AND offset NOT BETWEEN {first} AND {last}");
    }
    condition
}

/// The rows of a range of offsets. The times let ClickHouse skip all parts but those of that moment: the tables are
/// not sorted by offset.
fn range(partition: &Partition, offsets: Range<i64>, times: impl Iterator<Item = i64> + Clone) -> String {
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

/// A text of SQL.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}
