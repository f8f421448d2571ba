//! One block → one insert: LZ4, synchronous, under the block's token.

use std::time::Duration;

use clickhouse::{Client, Row, RowWrite, error::Error};
use tokio::time::timeout;

use super::{
    block::Block,
    connection::{ClickHouseConfig, ConnectionError, Trouble, TroubleKind},
    row::{self, ChangeRow, DeadLetterRow, FailureRow, ObservationRow, Parsed, RequestRow, Route},
};
use crate::message::codec::Raw;

/// The most rows that ClickHouse takes as one block, and so recognises under one token. Its default is a little more.
pub const ROWS_MAX: usize = 1_000_000;

/// How long the answer to a ping may take.
const PING: Duration = Duration::from_secs(5);

/// So many records are parsed before other tasks of the thread get their turn.
const TURN: usize = 32;

/// What became of a block's records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Rows in the table of their kind.
    pub rows: usize,
    /// Unreadable records, now in `dead_letters`.
    pub invalid: usize,
    /// Unreadable requests, which fetch makes dead letters of.
    pub skipped: usize,
}

/// Takes blocks.
pub trait Insert: Send + Sync + 'static {
    /// Stores a block. The same block again is no harm: its token is known.
    ///
    /// # Cancellation
    /// Whether the rows are stored is then unknown.
    ///
    /// # Errors
    /// [`Trouble`]: perhaps stored, perhaps not. Try the same block again.
    fn insert(&self, block: &Block, route: &Route) -> impl Future<Output = Result<Tally, Trouble>> + Send;
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

    async fn write(&self, block: &Block, route: &Route) -> Result<Tally, Error> {
        let mut tables = Tables::new(self, block.token());
        for (count, record) in block.records.iter().enumerate() {
            let raw = record.raw(&block.partition);
            tables.add(&raw, &row::parse(&raw, route)).await?;
            if count % TURN == TURN - 1 {
                tokio::task::yield_now().await;
            }
        }
        tables.end().await
    }

    async fn open<T: Row>(&self, table: &str, token: &str) -> Result<clickhouse::insert::Insert<T>, Error> {
        let insert = self.client.insert::<T>(table).await?;
        Ok(insert
            .with_timeouts(Some(self.timeout), Some(self.timeout))
            // An answer before the rows are stored would be a promise that nobody keeps; newer servers default to 1.
            .with_setting("async_insert", "0")
            .with_setting("wait_end_of_query", "1")
            .with_setting("insert_deduplicate", "1")
            .with_setting("insert_deduplication_token", token)
            // The views' tables would otherwise take a repeated block again.
            .with_setting("deduplicate_blocks_in_dependent_materialized_views", "1")
            // Split into several blocks, the parts would have tokens of their own.
            .with_setting("max_insert_block_size", ROWS_MAX.to_string())
            .with_setting("min_insert_block_size_rows", ROWS_MAX.to_string())
            .with_setting("min_insert_block_size_bytes", "0"))
    }
}

impl Insert for Store {
    async fn insert(&self, block: &Block, route: &Route) -> Result<Tally, Trouble> {
        let outcome = match timeout(self.timeout, self.write(block, route)).await {
            Ok(outcome) => outcome.map_err(Trouble::from),
            Err(_) => Err(Trouble::timed_out(self.timeout)),
        };
        if outcome.as_ref().is_err_and(|trouble| trouble.kind == TroubleKind::Schema) {
            // The client remembers what the tables were like; `schema apply` may mend them while we wait.
            self.client.clear_cached_metadata().await;
        }
        outcome
    }
}

/// The inserts of one block: into the table of its kind, and into `dead_letters` for what cannot be read.
struct Tables<'a> {
    store: &'a Store,
    token: String,
    requests: Table<RequestRow<'static>>,
    observations: Table<ObservationRow<'static>>,
    failures: Table<FailureRow<'static>>,
    dead_letters: Table<DeadLetterRow>,
    changes: Table<ChangeRow<'static>>,
    tally: Tally,
}

impl<'a> Tables<'a> {
    fn new(store: &'a Store, token: String) -> Self {
        Self {
            store,
            token,
            requests: Table::new("requests"),
            observations: Table::new("observations"),
            failures: Table::new("failures"),
            dead_letters: Table::new("dead_letters"),
            changes: Table::new("item_changes"),
            tally: Tally::default(),
        }
    }

    async fn add(&mut self, raw: &Raw<'_>, parsed: &Parsed) -> Result<(), Error> {
        let (store, token, tally) = (self.store, self.token.as_str(), &mut self.tally);
        match parsed {
            Parsed::Skipped(_) => {
                tally.skipped += 1;
                return Ok(());
            }
            Parsed::Invalid(_) => tally.invalid += 1,
            Parsed::Request(_) | Parsed::Result(_) | Parsed::Failure(_) | Parsed::DeadLetter(_) | Parsed::Change(_) => {
                tally.rows += 1;
            }
        }
        match parsed {
            Parsed::Request(request) => self.requests.write(store, token, &RequestRow::new(raw, request)).await,
            Parsed::Result(seen) => self.observations.write(store, token, &ObservationRow::new(raw, seen)).await,
            Parsed::Failure(failure) => self.failures.write(store, token, &FailureRow::new(raw, failure)).await,
            Parsed::DeadLetter(dead) => self.dead_letters.write(store, token, &DeadLetterRow::new(raw, dead)).await,
            Parsed::Change(change) => self.changes.write(store, token, &ChangeRow::new(raw, change)).await,
            Parsed::Invalid(why) => {
                tracing::debug!(record = %raw.position_id(), %why, "unreadable: stored as a dead letter");
                self.dead_letters.write(store, token, &DeadLetterRow::unreadable(raw, why)).await
            }
            Parsed::Skipped(_) => Ok(()),
        }
    }

    async fn end(self) -> Result<Tally, Error> {
        self.requests.end().await?;
        self.observations.end().await?;
        self.failures.end().await?;
        self.dead_letters.end().await?;
        self.changes.end().await?;
        Ok(self.tally)
    }
}

/// An insert into one table, begun with its first row: a block may have none for it, and an insert without rows is
/// one too many.
struct Table<T> {
    name: &'static str,
    insert: Option<clickhouse::insert::Insert<T>>,
}

impl<T: Row> Table<T> {
    const fn new(name: &'static str) -> Self {
        Self { name, insert: None }
    }

    async fn write(&mut self, store: &Store, token: &str, row: &T::Value<'_>) -> Result<(), Error>
    where
        T: RowWrite,
    {
        let insert = match &mut self.insert {
            Some(insert) => insert,
            closed => closed.insert(store.open(self.name, token).await?),
        };
        insert.write(row).await
    }

    async fn end(self) -> Result<(), Error> {
        match self.insert {
            Some(insert) => insert.end().await,
            None => Ok(()),
        }
    }
}
