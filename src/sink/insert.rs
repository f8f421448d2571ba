//! One block → one insert: by column, LZ4, synchronous, under a token; and the count that tells whether it is there.

use std::{
    collections::{BTreeSet, HashSet},
    fmt::Write as _,
    ops::Range,
    time::Duration,
};

use bytes::BytesMut;
use clickhouse::{Client, Row, error::Error, insert_formatted::InsertFormatted, query::Query};
use serde::Deserialize;
use tokio::time::timeout;

use super::{
    block::Block,
    columns::Columns,
    connection::{ClickHouseConfig, ConnectionError, Trouble},
    present::identifier,
    row, schema,
    sealed::Sealed,
};
use crate::{kafka::Partition, message::envelope::Kind, runtime::metrics::METRICS};

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

    /// Feeds the block's rows to the tables of the views once more: an insert that was broken off, perhaps by a view that
    /// would not take them (`refused_by`), may have stored the rows and not come to the views. A view of somebody else's
    /// that takes none, or must not get them twice, is named with the statement that fills it.
    ///
    /// # Errors
    /// [`Trouble`] with a view of weir's own, or with the question which views there are.
    fn refill(&self, sealed: &Sealed, refused_by: Option<&Trouble>)
    -> impl Future<Output = Result<(), Trouble>> + Send;

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

    /// Feeds the views with the rows of a kind for which `range` holds. A view that is not weir's own and lacks them now is
    /// told with `block` and the statement that fills it.
    async fn refill_views(
        &self,
        kind: Kind,
        range: &str,
        block: &str,
        refused_by: Option<&Trouble>,
    ) -> Result<(), Trouble> {
        let table = row::table(kind);
        let query = self.client.query_raw(VIEWS).param("table", table).param("view", "");
        for view in self.within(query.fetch_all::<View>()).await? {
            let fill = view.fill(self.client.database().unwrap_or_default(), table, Some(range));
            let is_own = view.is_current > 0 && schema::is_view(&view.name);
            let refused = refused_by.filter(|trouble| trouble.view.as_deref() == Some(&view.full_name()));
            let why = match (refused, view.bears_it > 0) {
                (Some(trouble), false) => trouble.message.clone(),
                (None, false) => match refused_by.and_then(|trouble| trouble.view.as_ref()) {
                    Some(other) => format!("the insert was broken off by view {other}; it may have come here before"),
                    None => "it is not known how far the insert came; it may have come here".to_owned(),
                },
                // Without deduplication: a token could be known for rows that are not there.
                (_, true) => match self.within(self.client.query_raw(&fill).execute()).await {
                    Ok(()) => continue,
                    Err(trouble) if is_own => return Err(trouble),
                    Err(trouble) => trouble.message,
                },
            };
            METRICS.view_lacks(&view.full_name());
            tracing::warn!(
                view = view.full_name(),
                block,
                why,
                "a view of your own may lack the rows of this block; weir's tables have them. When the view takes them, run: {fill}"
            );
        }
        Ok(())
    }

    /// Feeds the tables of these views of our own with all rows there are: what they have already they replace.
    pub(super) async fn feed(&self, names: &BTreeSet<&str>) -> Result<(), Trouble> {
        for name in names {
            let query = self.client.query_raw(VIEWS).param("table", "").param("view", name);
            for view in self.within(query.fetch_all::<View>()).await? {
                let fill = view.fill(self.client.database().unwrap_or_default(), "", None);
                // All rows take longer than a statement may: it ends when ClickHouse does.
                self.client.query_raw(&fill).execute().await?;
            }
        }
        Ok(())
    }
}

/// The materialized views that read a table of ours, in whatever database, or the one of ours with this name; and whether
/// the tables that they feed bear the same row twice: those that replace it, and those that only keep the least and the
/// greatest. A view without a named table feeds one of its own, which is written to by the view's name.
const VIEWS: &str = r"
SELECT toUInt8(database = currentDatabase()) AS is_current, database, name, select, target, columns,
    toUInt8(engine LIKE '%Replacing%'
        OR (engine LIKE '%AggregatingMergeTree' AND target NOT IN
            (SELECT concat(database, '.', table) FROM system.columns WHERE type LIKE '%AggregateFunction(%'
                AND NOT match(type, '^SimpleAggregateFunction\((min|max),')))) AS bears_it
FROM
(
    SELECT database, name, as_select AS select,
        extract(create_table_query, '^[^(]*? TO ([^ (]+)') AS named,
        if(named = '', concat('`', database, '`.`', name, '`'), named) AS target,
        extract(create_table_query, ' ENGINE = (\\w+)') AS own_engine
    FROM system.tables
    WHERE engine = 'MaterializedView' AND (
        (database, name) IN
            (SELECT arrayJoin(arrayZip(dependencies_database, dependencies_table)) FROM system.tables
                WHERE database = currentDatabase() AND name = {table: String})
        OR (database = currentDatabase() AND name = {view: String}))
) AS views
INNER JOIN
(
    SELECT database, table AS name, arrayStringConcat(groupArray(concat('`', column, '`')), ', ') AS columns
    FROM (SELECT database, table, name AS column FROM system.columns ORDER BY position) GROUP BY database, table
) AS columns USING (database, name)
LEFT JOIN (SELECT concat(database, '.', name) AS target, engine AS target_engine FROM system.tables) AS tables USING (target)
ARRAY JOIN [if(named = '', own_engine, target_engine)] AS engine
ORDER BY database, name";

#[derive(Row, Deserialize)]
struct View {
    is_current: u8,
    database: String,
    name: String,
    select: String,
    target: String,
    columns: String,
    bears_it: u8,
}

impl View {
    /// As ClickHouse names it in errors.
    fn full_name(&self) -> String {
        format!("{}.{}", self.database, self.name)
    }

    /// The statement that feeds it with the rows of `database.table` for which `range` holds, or with all rows.
    fn fill(&self, database: &str, table: &str, range: Option<&str>) -> String {
        let Self { target, columns, select, .. } = self;
        let filter =
            range.map(|range| format!(", additional_table_filters = {{'{database}.{table}': {}}}", quoted(range)));
        let filter = filter.unwrap_or_default();
        format!("INSERT INTO {target} ({columns}) {select} SETTINGS insert_deduplicate = 0, async_insert = 0{filter}")
    }
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

    async fn refill(&self, sealed: &Sealed, refused_by: Option<&Trouble>) -> Result<(), Trouble> {
        let block = sealed.intent.token(&sealed.partition, 1);
        self.refill_views(sealed.kind, &range_of(sealed), &block, refused_by).await
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
            let token =
                format!("{}:{}:{}-{}", block.partition.topic, block.partition.number, block.first(), block.next() - 1);
            self.refill_views(kind, &range, &token, None).await?;
        }
        Ok(found)
    }
}

/// The rows of a block, as a condition: without those at the places of its records that make none, since what stands
/// there is not of this block, and of their times, since other records had the same places before a topic was made anew.
pub(super) fn range_of(sealed: &Sealed) -> String {
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
pub(super) fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}
