//! Updates the schema: applies missing migrations, and re-creates dropped tables, columns and views.

mod drift;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use clickhouse::Client;
use tokio::time::timeout;

pub use self::drift::Difference;
use self::drift::{Object, Present, differences, mend, wanted};
pub use super::migrations::{MIGRATIONS, Migration};
use super::{
    connection::{ClickHouseConfig, ConnectionError, Store},
    migrations::statements,
    trouble::{Trouble, TroubleKind},
};

/// What `schema apply` has done.
#[derive(Clone, Debug, Default)]
pub struct Applied {
    /// Migrations that were run now.
    pub now: Vec<Migration>,
    /// Versions that were there before.
    pub before: Vec<u32>,
    /// Versions in the database that this weir does not know: a newer one has been here. No harm.
    pub unknown: Vec<u32>,
    /// What had been lost of earlier migrations and was made again now.
    pub mended: Vec<Difference>,
    /// What differs and was left as it is.
    pub left: Vec<Difference>,
}

/// What a database has of the schema.
#[derive(Clone, Debug, Default)]
pub struct Standing {
    /// How many of [`MIGRATIONS`] have been applied.
    pub applied: usize,
    /// How the database differs from what these made. None is looked for where a newer weir has been.
    pub differences: Vec<Difference>,
}

/// Why the schema could not be brought up to date.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// Wrong settings.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// A statement was refused. What was applied before it stays; run `schema apply` again.
    #[error("{doing} in database {database:?}: {trouble}")]
    Refused {
        /// What was attempted.
        doing: String,
        /// Where.
        database: String,
        /// What ClickHouse said.
        trouble: Trouble,
    },
}

impl SchemaError {
    /// Whether the database, or the list of migrations in it, is not there.
    #[must_use]
    pub const fn is_absent(&self) -> bool {
        matches!(self, Self::Refused { trouble: Trouble { kind: TroubleKind::Schema, .. }, .. })
    }
}

/// Creates the database, makes again what has been lost of the migrations that it has, and runs those that it does not
/// have. A view that was lost is also fed with the rows that came meanwhile. The rows of a lost table are gone.
///
/// # Errors
/// [`SchemaError`]
pub async fn apply(config: &ClickHouseConfig) -> Result<Applied, SchemaError> {
    let session = Session::open(config)?;
    session.run("creating it", "CREATE DATABASE IF NOT EXISTS {database}").await?;
    session.run("creating the list of migrations", LEDGER).await?;
    let present = session.versions().await?;
    let mut applied = Applied { unknown: unknown(&present), ..Applied::default() };
    // What a newer weir has dropped is not lost.
    if applied.unknown.is_empty() {
        let wanted = made_by(&present);
        let found = differences(&wanted, &session.present().await?);
        (applied.mended, applied.left) = found.into_iter().partition(Difference::is_mended_by_apply);
        for difference in &applied.mended {
            for statement in mend(&wanted, difference) {
                session.run(&format!("{difference}: making it again"), &statement).await?;
            }
        }
        if applied.mended.iter().any(|difference| !matches!(difference, Difference::Column { .. })) {
            session.feed_views(config, &wanted).await?;
        }
    }
    for migration in MIGRATIONS {
        if present.contains(&migration.version) {
            applied.before.push(migration.version);
            continue;
        }
        let doing = format!("applying migration {:03}_{}", migration.version, migration.name);
        for statement in statements(migration.sql) {
            session.run(&doing, &statement).await?;
        }
        let Migration { version, name, .. } = migration;
        let done = format!(
            "INSERT INTO {{database}}.schema_migrations (version, name) SETTINGS async_insert = 0 VALUES ({version}, '{name}')"
        );
        session.run(&doing, &done).await?;
        applied.now.push(migration);
    }
    Ok(applied)
}

/// What the database has of the schema. Changes nothing.
///
/// # Errors
/// [`SchemaError`], also if there is no database or no list of migrations in it: see [`SchemaError::is_absent`].
pub async fn standing(config: &ClickHouseConfig) -> Result<Standing, SchemaError> {
    let session = Session::open(config)?;
    let present = session.versions().await?;
    let applied = MIGRATIONS.iter().filter(|migration| present.contains(&migration.version)).count();
    let differences = if unknown(&present).is_empty() {
        differences(&made_by(&present), &session.present().await?)
    } else {
        Vec::new()
    };
    Ok(Standing { applied, differences })
}

fn unknown(present: &BTreeSet<u32>) -> Vec<u32> {
    present.iter().copied().filter(|v| MIGRATIONS.iter().all(|m| m.version != *v)).collect()
}

/// What the migrations of these versions have made.
fn made_by(present: &BTreeSet<u32>) -> BTreeMap<String, Object> {
    let run = MIGRATIONS.iter().filter(|migration| present.contains(&migration.version));
    // A test holds that all of them are understood; what were not is not looked for.
    wanted(run.flat_map(|migration| statements(migration.sql))).unwrap_or_default()
}

const LEDGER: &str = "CREATE TABLE IF NOT EXISTS {database}.schema_migrations (version UInt32, name String, \
    applied_at DateTime64(3, 'UTC') DEFAULT now64(3)) ENGINE = ReplacingMergeTree ORDER BY version";

struct Session<'a> {
    client: Client,
    database: &'a str,
    limit: Duration,
}

impl<'a> Session<'a> {
    fn open(config: &'a ClickHouseConfig) -> Result<Self, ConnectionError> {
        Ok(Self { client: config.server()?, database: &config.database, limit: config.timeout })
    }

    async fn present(&self) -> Result<Present, SchemaError> {
        let names = self.rows::<String>("SELECT name FROM system.tables WHERE database = '{database}'").await?;
        let columns = "SELECT table, name, type FROM system.columns WHERE database = '{database}'";
        let columns = self.rows::<(String, String, String)>(columns).await?;
        Ok(Present {
            names: names.into_iter().collect(),
            columns: columns.into_iter().map(|(table, name, kind)| ((table, name), kind)).collect(),
        })
    }

    async fn rows<T: clickhouse::RowOwned + clickhouse::RowRead>(&self, sql: &str) -> Result<Vec<T>, SchemaError> {
        let sql = sql.replace("{database}", self.database);
        let rows = timeout(self.limit, self.client.query_raw(&sql).fetch_all::<T>()).await;
        let rows = rows.map_err(|_| Trouble::timed_out(self.limit)).and_then(|rows| rows.map_err(Into::into));
        self.told("reading what is there", rows)
    }

    /// Feeds the tables of our views with all rows: what they have already they replace.
    async fn feed_views(
        &self,
        config: &ClickHouseConfig,
        wanted: &BTreeMap<String, Object>,
    ) -> Result<(), SchemaError> {
        let views = wanted.iter().filter(|(_, object)| object.kind == drift::Kind::MaterializedView);
        let views: BTreeSet<&str> = views.map(|(name, _)| name.as_str()).collect();
        let fed = Store::connect(config)?.feed(&views).await;
        self.told("feeding the tables of the views", fed)
    }

    async fn run(&self, doing: &str, statement: &str) -> Result<(), SchemaError> {
        let sql = statement.replace("{database}", self.database);
        let outcome = timeout(self.limit, self.client.query_raw(&sql).execute()).await;
        self.told(doing, outcome.map_err(|_| Trouble::timed_out(self.limit)).and_then(|done| done.map_err(Into::into)))
    }

    async fn versions(&self) -> Result<BTreeSet<u32>, SchemaError> {
        let versions = self.rows::<u32>("SELECT version FROM {database}.schema_migrations FINAL").await?;
        Ok(versions.into_iter().collect())
    }

    fn told<T>(&self, doing: &str, outcome: Result<T, Trouble>) -> Result<T, SchemaError> {
        let database = self.database.to_owned();
        outcome.map_err(|trouble| SchemaError::Refused { doing: doing.to_owned(), database, trouble })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_statement_is_understood_and_what_they_leave_is_what_people_know() {
        let all = MIGRATIONS.iter().flat_map(|migration| statements(migration.sql));
        let objects = wanted(all).unwrap();
        let of = |kind| -> Vec<_> {
            objects.iter().filter(|(_, o)| o.kind == kind).map(|(name, _)| name.as_str()).collect()
        };
        let fed = ["item_times_from_changes", "item_times_from_observations", "items_latest_from_observations"];
        assert_eq!(of(drift::Kind::MaterializedView), fed);
        assert!(of(drift::Kind::View).contains(&"items") && !of(drift::Kind::Table).contains(&"items"));
        let columns = |table: &str| objects[table].columns.iter().map(|c| c.name.as_str()).collect::<Vec<_>>();
        assert_eq!(columns("batch_ends"), ["batch", "ended_at", "told_at"]);
        assert_eq!(columns("observations")[5..7], ["source", "instead_of"]);
    }
}
