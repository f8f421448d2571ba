//! The tables and views: numbered migrations, forward only, each safe to run again.

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
    pub(super) sql: &'static str,
}

/// All of them, by version.
pub const MIGRATIONS: [Migration; 10] = [
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
    Migration {
        version: 10,
        name: "further_columns",
        sql: include_str!("../../schemas/clickhouse/010_further_columns.sql"),
    },
];

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

/// The statements of a file, each of which ends a line with `;`: ClickHouse takes one at a time over HTTP.
pub(super) fn statements(sql: &str) -> Vec<String> {
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
                    || statement.contains("\nMODIFY QUERY ")
                    || statement.starts_with("CREATE OR REPLACE VIEW ")
                    || harmless.iter().any(|start| statement.starts_with(start));
                assert!(again, "{:03}: {statement}", migration.version);
            }
        }
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
