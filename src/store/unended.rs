//! Lost requests: stored in ClickHouse without an outcome, and deleted from Kafka by retention before they were called
//! for.

use std::time::Duration;

use clickhouse::Row;
use serde::Deserialize;
use tokio::time::timeout;

use super::{connection::Store, row::storable, trouble::Trouble};
use crate::{kafka::Partition, message::BatchId, runtime::clock::Timestamp};

/// How long the whole history may be looked through before the first row comes.
const PATIENCE: Duration = Duration::from_secs(600);

/// A lost request: no stage will process it any more.
#[derive(Clone, Debug, PartialEq, Eq, Row, Deserialize)]
pub struct Unended {
    /// Its id.
    pub request_id: String,
    /// Whose item it asks for.
    pub source: String,
    /// The item.
    pub item: String,
    /// Empty: none.
    pub batch: String,
    /// A JSON object, or empty.
    pub params: String,
    /// The log that its last record was on.
    pub topic: String,
    /// The partition.
    pub partition: i32,
    /// The offset.
    pub offset: i64,
    /// When it was first asked for, in milliseconds since 1970.
    pub requested_at: i64,
}

/// The newest record of each request, and whether it has an end. Spills to disk: it is the whole history.
const UNENDED: &str = "
SELECT last.1 AS request_id, last.2 AS source, last.3 AS item, last.4 AS batch, last.5 AS params, last.6 AS topic,
    last.7 AS partition, last.8 AS offset, last.9 AS requested_at
FROM
(
    SELECT request_key,
        argMaxIf((request_id, source, item, batch, params, topic, partition, offset, requested_at), recorded_at, is_end = 0) AS last,
        max(is_end) AS ended
    FROM
    (
        SELECT request_key, request_id, source::String AS source, item, batch::String AS batch, params, topic::String AS topic,
            partition, offset, toUnixTimestamp64Milli(requested_at) AS requested_at, recorded_at, 0 AS is_end
        FROM requests WHERE splitByChar('@', topic::String)[1] IN {topics: Array(String)} AND SCOPE
        UNION ALL
        SELECT request_key, '', '', '', '', '', '', 0::Int32, 0::Int64, 0::Int64, recorded_at, 1 FROM observations WHERE SCOPE
        UNION ALL
        SELECT request_key, '', '', '', '', '', '', 0::Int32, 0::Int64, 0::Int64, recorded_at, 1 FROM dead_letters WHERE SCOPE
    )
    GROUP BY request_key
    HAVING ended = 0
)
WHERE last.8 < transform(concat(last.6, '/', toString(last.7)), {places: Array(String)}, {lows: Array(Int64)}, 9223372036854775807::Int64)
ORDER BY topic, partition, offset
SETTINGS max_bytes_before_external_group_by = 1000000000, max_execution_time = 600";

impl Store {
    /// Those of these topics' requests that have no row of an end, and whose newest record is before the first that is left
    /// of its partition (`lows`, by the names of the logs), or on a log that is gone. Only those of a batch, or recorded
    /// from a time on, if one is given.
    ///
    /// # Errors
    /// [`Trouble`]
    pub async fn unended(
        &self,
        topics: &[&str],
        lows: &[(Partition, i64)],
        (batch, since): (Option<&BatchId>, Option<Timestamp>),
        mut take: impl FnMut(Unended),
    ) -> Result<(), Trouble> {
        if lows.is_empty() {
            return Ok(());
        }
        let mut scope = "1".to_owned();
        if batch.is_some() {
            scope.push_str(" AND batch = {batch: String}");
        }
        if let Some(since) = since {
            scope = format!("{scope} AND recorded_at >= fromUnixTimestamp64Milli({})", storable(since));
        }
        let places: Vec<String> = lows.iter().map(|(partition, _)| partition.to_string()).collect();
        let offsets: Vec<i64> = lows.iter().map(|(_, low)| *low).collect();
        let query = self.client.query_raw(&UNENDED.replace("SCOPE", &scope));
        let query = query.param("topics", topics).param("places", places).param("lows", offsets);
        let query = match batch {
            Some(batch) => query.param("batch", batch.as_str()),
            None => query,
        };
        let mut rows = query.fetch::<Unended>()?;
        loop {
            let row = timeout(PATIENCE, rows.next()).await.map_err(|_| Trouble::timed_out(PATIENCE))??;
            let Some(row) = row else { return Ok(()) };
            take(row);
        }
    }
}
