//! `weir schema`: the tables and views in ClickHouse.

use clap::Subcommand;

use super::{exit::Exit, terminal::say};
use crate::{config::Config, store::schema};

/// `weir schema …`
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create the database, apply missing migrations, and re-create what was dropped. Safe to repeat.
    #[command(after_long_help = "\
Example:
  WEIR_CLICKHOUSE__DATABASE=trial weir schema apply      # another database, for a trial

The migrations are the files of schemas/clickhouse, built into weir; the database lists the applied ones. Dropped \
tables, columns and views are re-created empty: weir replay restores the rows that Kafka still has. A column of a \
different type is reported and left as it is.")]
    Apply,
}

pub(super) async fn run(command: &Command, config: &Config) -> anyhow::Result<Exit> {
    match command {
        Command::Apply => {
            let applied = schema::apply(&config.clickhouse).await?;
            let database = &config.clickhouse.database;
            for migration in &applied.now {
                say(&format!("applied  {:03}_{} in {database}", migration.version, migration.name))?;
            }
            for difference in &applied.mended {
                say(&format!("created  {difference}: re-created in {database}{}", after(difference)))?;
            }
            for difference in &applied.left {
                say(&format!("skipped  {difference}: it may be intended"))?;
            }
            if applied.now.is_empty() && applied.mended.is_empty() {
                say(&format!("nothing to do: {database} has all {} migrations", applied.before.len()))?;
            }
            if !applied.unknown.is_empty() {
                let unknown = applied.unknown.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                say(&format!("note: {database} also has migrations of a newer weir: {unknown}. This is harmless"))?;
            }
        }
    }
    Ok(Exit::Done)
}

/// What a person may want to do after a difference was mended.
const fn after(difference: &schema::Difference) -> &'static str {
    use schema::Difference;
    match difference {
        Difference::Table(_) => {
            ". Its rows are gone: `weir replay --help` explains how to restore what Kafka still holds"
        }
        Difference::Column { .. } => ". Existing rows have its default; `weir replay --help` explains how to fill it",
        Difference::View { is_materialized: true, .. } => ", and its table is fed",
        Difference::View { .. } | Difference::Type { .. } => "",
    }
}
