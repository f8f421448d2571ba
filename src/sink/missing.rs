//! Rows that are missing, into any table of the schema: the inserts of `replay`.

use clickhouse::{Row, RowWrite, error::Error};
use tokio::time::timeout;

use super::{
    connection::Trouble,
    insert::Store,
    present::Place,
    row::{ChangeRow, DeadLetterRow, FailureRow, ObservationRow, Parsed, RequestRow},
};
use crate::kafka::{Partition, Record};

/// So many rows are made before other tasks of the thread get their turn.
const TURN: usize = 64;

impl Store {
    /// Inserts rows of one partition under a token: repeated under the same one, they are there once. ClickHouse
    /// killed in mid-insert may know the token and not have the rows, so whoever is not sure counts them.
    ///
    /// # Errors
    /// [`Trouble`]: perhaps stored, perhaps not.
    pub async fn insert_missing(
        &self,
        place: &Place,
        partition: &Partition,
        rows: &[(Record, Parsed)],
        token: &str,
    ) -> Result<(), Trouble> {
        let outcome = timeout(self.timeout, self.write_rows(place, partition, rows, token)).await;
        outcome.map_err(|_| Trouble::timed_out(self.timeout))?.map_err(Trouble::from)
    }

    async fn write_rows(
        &self,
        place: &Place,
        partition: &Partition,
        rows: &[(Record, Parsed)],
        token: &str,
    ) -> Result<(), Error> {
        let mut requests = Filling::<RequestRow<'static>>::new(self, &place.table, token);
        let mut observations = Filling::<ObservationRow<'static>>::new(self, &place.table, token);
        let mut failures = Filling::<FailureRow<'static>>::new(self, &place.table, token);
        let mut changes = Filling::<ChangeRow<'static>>::new(self, &place.table, token);
        let mut dead_letters = Filling::<DeadLetterRow>::new(self, &place.table, token);
        for (count, (record, parsed)) in rows.iter().enumerate() {
            let raw = record.raw(partition);
            match parsed {
                Parsed::Request(request) => requests.write(&RequestRow::new(&raw, request)).await?,
                Parsed::Result(seen) => observations.write(&ObservationRow::new(&raw, seen)).await?,
                Parsed::Failure(failure) => failures.write(&FailureRow::new(&raw, failure)).await?,
                Parsed::Change(change) => changes.write(&ChangeRow::new(&raw, change)).await?,
                Parsed::DeadLetter(dead) => dead_letters.write(&DeadLetterRow::new(&raw, dead)).await?,
                Parsed::Raw(why) => dead_letters.write(&DeadLetterRow::unreadable(&raw, why)).await?,
                Parsed::Poison(_) | Parsed::Skipped(_) => {}
            }
            if count % TURN == TURN - 1 {
                tokio::task::yield_now().await;
            }
        }
        requests.end().await?;
        observations.end().await?;
        failures.end().await?;
        changes.end().await?;
        dead_letters.end().await
    }
}

/// An insert that begins with its first row.
pub(super) struct Filling<'a, T> {
    store: &'a Store,
    table: &'a str,
    token: &'a str,
    insert: Option<clickhouse::insert::Insert<T>>,
}

impl<'a, T: Row + RowWrite> Filling<'a, T> {
    pub(super) const fn new(store: &'a Store, table: &'a str, token: &'a str) -> Self {
        Self { store, table, token, insert: None }
    }

    pub(super) async fn write(&mut self, row: &T::Value<'_>) -> Result<(), Error> {
        let insert = match &mut self.insert {
            Some(insert) => insert,
            closed => closed.insert(self.store.open(self.table, self.token).await?),
        };
        insert.write(row).await
    }

    pub(super) async fn end(self) -> Result<(), Error> {
        match self.insert {
            Some(insert) => insert.end().await,
            None => Ok(()),
        }
    }
}
