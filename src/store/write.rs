//! Inserts rows as one block: columnar, LZ4, synchronous, with a deduplication token.

use bytes::BytesMut;
use clickhouse::{error::Error, insert_formatted::InsertFormatted};

use super::{columns::Columns, connection::Store, quoting::identifier, trouble::Trouble};

/// The most rows that ClickHouse takes as one block, and so recognises under one token. Its default is a little more.
pub const ROWS_MAX: usize = 1_000_000;

/// So many bytes are compressed and sent at once, about a millisecond's work.
const PIECE: usize = 256 * 1024;

impl Store {
    /// Inserts rows as one block of ClickHouse under a token: repeated under the same one, they are there once. ClickHouse
    /// killed in mid-insert may know the token and not have the rows, so whoever is not sure counts them.
    ///
    /// # Cancellation
    /// Whether the rows are stored is then unknown.
    ///
    /// # Errors
    /// [`Trouble`]: perhaps stored, perhaps not.
    pub async fn insert_columns(&self, table: &str, columns: &Columns, token: &str) -> Result<(), Trouble> {
        self.within(self.write(table, columns, token)).await
    }

    async fn write(&self, table: &str, columns: &Columns, token: &str) -> Result<(), Error> {
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
}
