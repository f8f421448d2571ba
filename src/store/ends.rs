//! Finished batches whose end is not published yet, and the record of those that are.

use clickhouse::{Row, error::Error};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::{connection::Store, row::storable, trouble::Trouble};
use crate::{
    message::{BatchEnd, BatchId},
    runtime::clock::Timestamp,
};

/// A batch whose requests have all come to their end, as the view has it.
#[derive(Row, Deserialize)]
struct EndRow {
    batch: String,
    requested: u64,
    found: u64,
    absent: u64,
    off_shelf: u64,
    dead: u64,
    ended_at: i64,
}

impl EndRow {
    /// `None` for a name that no batch of weir has: then the rows are not weir's.
    fn end(self) -> Option<BatchEnd> {
        let Self { batch, requested, found, absent, off_shelf, dead, ended_at } = self;
        let finished_at = Timestamp::from_millis(ended_at);
        Some(BatchEnd { batch: BatchId::new(batch).ok()?, requested, found, absent, off_shelf, dead, finished_at })
    }
}

/// A row of `batch_ends`.
#[derive(Row, Serialize)]
struct End<'a> {
    batch: &'a str,
    ended_at: i64,
    told_at: i64,
}

/// Only batches with a record since `since` and none since `before` are looked at closely, and only where something
/// has come after what was told: counting the requests of a batch costs, finding its last record does not.
const UNTOLD: &str = "
SELECT batch, requested, found, absent, off_shelf, dead, toUnixTimestamp64Milli(batches.last_at) AS ended_at
FROM batches
WHERE under_way = 0 AND batch IN
(
    SELECT batch FROM
    (
        SELECT batch, max(at) AS last_at FROM
        (
            SELECT batch, max(recorded_at) AS at FROM requests WHERE recorded_at >= fromUnixTimestamp64Milli({since: Int64}) GROUP BY batch
            UNION ALL
            SELECT batch, max(recorded_at) AS at FROM observations WHERE recorded_at >= fromUnixTimestamp64Milli({since: Int64}) GROUP BY batch
            UNION ALL
            SELECT batch, max(recorded_at) AS at FROM failures WHERE recorded_at >= fromUnixTimestamp64Milli({since: Int64}) GROUP BY batch
            UNION ALL
            SELECT batch, max(recorded_at) AS at FROM dead_letters WHERE recorded_at >= fromUnixTimestamp64Milli({since: Int64}) GROUP BY batch
        )
        WHERE batch != ''
        GROUP BY batch
    ) AS seen
    LEFT JOIN (SELECT batch, max(ended_at) AS told_to FROM batch_ends GROUP BY batch) AS told USING (batch)
    WHERE last_at > told_to AND last_at < fromUnixTimestamp64Milli({before: Int64})
        AND last_at > (SELECT max(ended_at) FROM batch_ends WHERE batch = '')
)
ORDER BY ended_at
LIMIT 1000";

impl Store {
    /// Says that ends from now on are to be told, if that has never been said.
    ///
    /// # Errors
    /// [`Trouble`]
    pub async fn begin_telling(&self, now: Timestamp) -> Result<(), Trouble> {
        let known = self.client.query_raw("SELECT count() FROM batch_ends WHERE batch = ''").fetch_one::<u64>();
        let known = timeout(self.timeout, known).await.map_err(|_| Trouble::timed_out(self.timeout))??;
        if known == 0 { self.told("", now, now).await } else { Ok(()) }
    }

    /// The batches that have ended and whose end has not been told, the earliest first; a thousand at most. Of those
    /// with a record since `since` and none since `before`.
    ///
    /// # Errors
    /// [`Trouble`]
    pub async fn untold_ends(&self, since: Timestamp, before: Timestamp) -> Result<Vec<BatchEnd>, Trouble> {
        let query = self.client.query_raw(UNTOLD).param("since", storable(since)).param("before", storable(before));
        let ends = timeout(self.timeout, query.with_setting("use_query_cache", "0").fetch_all::<EndRow>()).await;
        let ends = ends.map_err(|_| Trouble::timed_out(self.timeout))??;
        Ok(ends.into_iter().filter_map(EndRow::end).collect())
    }

    /// Remembers that the end of a batch has been told.
    ///
    /// # Errors
    /// [`Trouble`]; then it is told once more.
    pub async fn told(&self, batch: &str, ended_at: Timestamp, now: Timestamp) -> Result<(), Trouble> {
        let row = End { batch, ended_at: storable(ended_at), told_at: storable(now) };
        let write = async {
            let client = self.client.clone().with_setting("async_insert", "0");
            let mut insert = client.insert::<End<'_>>("batch_ends").await?;
            insert.write(&row).await?;
            insert.end().await
        };
        let outcome: Result<(), Error> =
            timeout(self.timeout, write).await.map_err(|_| Trouble::timed_out(self.timeout))?;
        Ok(outcome?)
    }
}
