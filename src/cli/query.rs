//! `weir query`: SQL for ClickHouse, for machines that have no client of it.

use std::{io::Read, path::PathBuf};

use anyhow::Context;

use super::exit::{Ended, Exit};
use crate::{
    config::Config,
    store::query::{Format, format_of, query},
};

pub(super) const LONG_ABOUT: &str = "\
Run SQL in ClickHouse.

The result is printed as it arrives, as a table or in any ClickHouse output format. Tables: observations, failures, \
dead_letters, requests. Views: items, changes, batches, source_health, and daily(time_zone = 'Asia/Shanghai').";

pub(super) const EXAMPLES: &str = "\
Examples:
  weir query \"SELECT status, count() FROM items GROUP BY status\"
  weir query --format CSVWithNames \"SELECT * FROM changes\" > changes.csv
  weir query --file schemas/clickhouse/queries/08_drops.sql
  echo \"SELECT * FROM batches\" | weir query -";

const FORMATS: &str = "One of ClickHouse's formats: CSV, TSV, JSONEachRow, Vertical, …; without it a table";

/// `weir query`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The SQL; `-` reads it from standard input.
    #[arg(required_unless_present = "file", conflicts_with = "file")]
    sql: Option<String>,
    /// Read the SQL from a file.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    #[arg(long, value_name = "FORMAT", help = FORMATS)]
    format: Option<String>,
}

pub(super) async fn run(args: Args, config: &Config) -> anyhow::Result<Exit> {
    let sql = match (args.sql, args.file) {
        (_, Some(file)) => {
            std::fs::read_to_string(&file).with_context(|| format!("cannot read the SQL from {}", file.display()))?
        }
        (Some(sql), None) if sql == "-" => tokio::task::spawn_blocking(read_stdin).await??,
        (sql, None) => sql.unwrap_or_default(),
    };
    if sql.trim().is_empty() {
        return Err(Ended::usage("no SQL was given").into());
    }
    let format = match args.format {
        Some(name) => {
            expect_format(config, &sql, &name, "--format").await?;
            Format::Named(name)
        }
        None => Format::Table { colour: console::colors_enabled() },
    };
    let answered = query(&config.clickhouse, &sql, &format, &mut tokio::io::stdout()).await;
    answered.map_err(|error| error.in_sql_by_hand(&config.clickhouse.database))?;
    Ok(Exit::Done)
}

/// Refuses SQL with a FORMAT of its own where `option` asks for another: ClickHouse would take the one in the SQL without a
/// word.
pub(super) async fn expect_format(config: &Config, sql: &str, wanted: &str, option: &str) -> Result<(), Ended> {
    match format_of(&config.clickhouse, sql).await {
        Some(found) if !found.eq_ignore_ascii_case(wanted) => Err(Ended::usage(format!(
            "the SQL says FORMAT {found}, but {option} asks for {wanted}: remove one of them"
        ))),
        Some(_) | None => Ok(()),
    }
}

fn read_stdin() -> anyhow::Result<String> {
    let mut sql = String::new();
    std::io::stdin().read_to_string(&mut sql).context("cannot read the SQL from standard input")?;
    Ok(sql)
}
