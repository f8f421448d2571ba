//! The tables and views: numbered migrations, forward only, each safe to run again; and what has been lost of them since.

mod drift;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use clickhouse::Client;
use tokio::time::timeout;

pub use self::drift::Difference;
use self::drift::{Object, Present, differences, mend, wanted};
use super::{
    connection::{ClickHouseConfig, ConnectionError, Trouble, TroubleKind},
    insert::Store,
};

/// One file of `schemas/clickhouse/`.
///
/// Every statement says IF NOT EXISTS (or IF EXISTS), or does no harm the second time, and a column that is added later has a DEFAULT: so two
/// processes may apply a migration at once, and an older sink keeps writing to a newer table.
#[derive(Clone, Copy, Debug)]
pub struct Migration {
    /// Its number; applied in this order.
    pub version: u32,
    /// The name of its file without number and ending.
    pub name: &'static str,
    sql: &'static str,
}

/// All of them, by version.
pub const MIGRATIONS: [Migration; 9] = [
    Migration { version: 1, name: "tables", sql: include_str!("../../schemas/clickhouse/001_tables.sql") },
    Migration { version: 2, name: "items", sql: include_str!("../../schemas/clickhouse/002_items.sql") },
    Migration { version: 3, name: "views", sql: include_str!("../../schemas/clickhouse/003_views.sql") },
    Migration { version: 4, name: "item_times", sql: include_str!("../../schemas/clickhouse/004_item_times.sql") },
    Migration { version: 5, name: "changes", sql: include_str!("../../schemas/clickhouse/005_changes.sql") },
    Migration { version: 6, name: "batches", sql: include_str!("../../schemas/clickhouse/006_batches.sql") },
    Migration { version: 7, name: "batch_ends", sql: include_str!("../../schemas/clickhouse/007_batch_ends.sql") },
    Migration {
        version: 8,
        name: "source_health",
        sql: include_str!("../../schemas/clickhouse/008_source_health.sql"),
    },
    Migration { version: 9, name: "stand_ins", sql: include_str!("../../schemas/clickhouse/009_stand_ins.sql") },
];

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

/// Whether a materialized view of this name is one that a migration makes.
pub(super) fn is_view(name: &str) -> bool {
    let made = MIGRATIONS
        .iter()
        .flat_map(|migration| migration.sql.split("CREATE MATERIALIZED VIEW IF NOT EXISTS {database}.").skip(1));
    made.filter_map(|rest| rest.split(' ').next()).any(|own| own == name)
}

/// Whether a table or database that ClickHouse says is not there is one that a migration makes: `database` itself, or a
/// table or view in it, with or without its name before it.
pub(super) fn lacks(database: &str, name: &str) -> bool {
    let table = match name.split_once('.') {
        Some((of, table)) if of == database => table,
        None if name != database => name,
        Some(_) => return false,
        None => return true,
    };
    let made = MIGRATIONS.iter().flat_map(|migration| migration.sql.split(" IF NOT EXISTS {database}.").skip(1));
    made.filter_map(|rest| rest.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next()).any(|own| own == table)
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

/// The statements of a file, each of which ends a line with `;`: ClickHouse takes one at a time over HTTP.
fn statements(sql: &str) -> Vec<String> {
    let (mut done, mut open) = (Vec::new(), String::new());
    for line in sql.lines().filter(|line| !line.trim_start().starts_with("--")) {
        match line.trim_end().strip_suffix(';') {
            Some(end) => done.push(std::mem::take(&mut open) + end),
            None => open = open + line + "\n",
        }
    }
    done.push(open);
    done.iter().map(|statement| statement.trim().to_owned()).filter(|statement| !statement.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_statement_can_be_run_again() {
        for migration in MIGRATIONS {
            let statements = statements(migration.sql);
            assert!(!statements.is_empty(), "{}", migration.name);
            for statement in statements {
                // What replaces rows, or takes the least and the greatest, may be filled twice.
                let harmless = ["INSERT INTO {database}.items_latest", "INSERT INTO {database}.item_times"];
                let again = statement.contains(" EXISTS {database}.")
                    || statement.contains("ADD COLUMN IF NOT EXISTS ")
                    || statement.contains(" COMMENT COLUMN IF EXISTS ")
                    || statement.starts_with("CREATE OR REPLACE VIEW ")
                    || harmless.iter().any(|start| statement.starts_with(start));
                assert!(again, "{:03}: {statement}", migration.version);
            }
        }
    }

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

    #[test]
    fn migrations_are_numbered_from_one_and_each_file_is_among_them() {
        let known: Vec<_> = MIGRATIONS.iter().map(|m| format!("{:03}_{}.sql", m.version, m.name)).collect();
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/schemas/clickhouse");
        let entries = std::fs::read_dir(folder).unwrap().map(Result::unwrap);
        let files = entries.filter(|entry| entry.path().extension().is_some_and(|ending| ending == "sql"));
        let mut files: Vec<_> = files.map(|file| file.file_name().into_string().unwrap()).collect();
        files.sort();
        assert_eq!(files, known);
        assert!(MIGRATIONS.iter().zip(1..).all(|(migration, number)| migration.version == number));
    }

    #[test]
    fn every_table_of_rows_remembers_its_tokens_and_is_split_by_a_time_of_the_record() {
        for migration in MIGRATIONS {
            for statement in statements(migration.sql).iter().filter(|s| s.starts_with("CREATE TABLE")) {
                assert!(statement.contains("non_replicated_deduplication_window"), "{statement}");
                assert!(!statement.contains("now()"), "{statement}");
            }
        }
    }
}
