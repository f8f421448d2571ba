//! `weir schema`: the tables and views in ClickHouse.

use clap::Subcommand;

use super::{exit::Exit, terminal::say};
use crate::{config::Config, sink::schema};

/// `weir schema …`
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create the database and run the migrations that it does not have. Safe to repeat.
    #[command(after_long_help = "\
Example:
  WEIR_CLICKHOUSE__DATABASE=trial weir schema apply      # another database, for a trial

The migrations are the files of schemas/clickhouse, built into weir; the database lists the ones that it has.")]
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
            if applied.now.is_empty() {
                say(&format!("nothing to do: {database} has all {} migrations", applied.before.len()))?;
            }
            if !applied.unknown.is_empty() {
                let unknown = applied.unknown.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                say(&format!("note: {database} also has migrations of a newer weir: {unknown}. That does no harm"))?;
            }
        }
    }
    Ok(Exit::Done)
}
