//! ClickHouse from outside of weir: databases of one's own, counts, and the bare client.

use anyhow::{Context, Result};
use clickhouse::Client;
use weir::store::{ClickHouseConfig, schema};

/// A database with weir's tables.
pub struct Tables {
    pub config: ClickHouseConfig,
    pub client: Client,
}

impl Tables {
    pub async fn new(what: &str) -> Result<Self> {
        let url =
            std::env::var("WEIR_TEST_CLICKHOUSE").context("WEIR_TEST_CLICKHOUSE is not set: deploy/local/bench")?;
        let database = format!("bench_{what}_{}", std::process::id());
        let config = ClickHouseConfig { url, database, ..ClickHouseConfig::default() };
        schema::apply(&config).await?;
        let client = Client::default().with_url(&config.url).with_user(&config.user).with_database(&config.database);
        Ok(Self { config, client })
    }

    pub async fn count(&self) -> Result<u64> {
        Ok(self.client.query("SELECT count() FROM observations").fetch_one().await?)
    }

    /// How many inserts the server has begun since its start; of all clients.
    pub async fn inserts(&self) -> Result<u64> {
        Ok(self.client.query("SELECT sum(value) FROM system.events WHERE event = 'InsertQuery'").fetch_one().await?)
    }

    /// The active parts of a table.
    pub async fn parts(&self) -> Result<u64> {
        let sql =
            "SELECT count() FROM system.parts WHERE active AND database = currentDatabase() AND table = 'observations'";
        Ok(self.client.query(sql).fetch_one().await?)
    }

    /// What a row of a table takes on disk, in bytes: all of it, and the column `raw`.
    pub async fn bytes_of_row(&self, table: &str) -> Result<(f64, f64)> {
        let sql = "SELECT sum(column_data_compressed_bytes) / rows_all, \
                sumIf(column_data_compressed_bytes, column = 'raw') / rows_all \
            FROM system.parts_columns CROSS JOIN \
                (SELECT sum(rows) AS rows_all FROM system.parts \
                    WHERE active AND database = currentDatabase() AND table = ?) AS total \
            WHERE active AND database = currentDatabase() AND table = ? GROUP BY rows_all";
        Ok(self.client.query(sql).bind(table).bind(table).fetch_one().await?)
    }

    pub async fn drop(self) -> Result<()> {
        Ok(self.client.query(&format!("DROP DATABASE {} SYNC", self.config.database)).execute().await?)
    }
}
