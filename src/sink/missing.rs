//! Rows that are missing, into any table of the schema: the inserts of `replay`.

use super::{
    columns::Columns,
    connection::Trouble,
    insert::Store,
    present::Place,
    row::{self, Parsed},
};
use crate::kafka::{Partition, Record};

/// So many rows are made before other tasks of the thread get their turn.
const TURN: usize = 64;

impl Store {
    /// Inserts rows of one partition, all of one kind, under a token: repeated under the same one, they are there once.
    /// ClickHouse killed in mid-insert may know the token and not have the rows, so whoever is not sure counts them.
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
        let mut columns = Columns::expecting(rows.len());
        for (count, (record, parsed)) in rows.iter().enumerate() {
            row::put(&mut columns, &record.raw(partition), parsed);
            if count % TURN == TURN - 1 {
                tokio::task::yield_now().await;
            }
        }
        self.within(self.write(&place.table, &columns, token)).await
    }
}
