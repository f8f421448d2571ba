//! Target tables of `replay` other than the sink's own: whether they exist, and if not how to create them.

use super::exit::Ended;
use crate::{
    message::envelope::Kind,
    store::{Store, TroubleKind, present::Place},
};

/// Fails with the command that makes the table, if it is not there.
pub(super) async fn expect_table(store: &Store, database: &str, table: &str, kind: Kind) -> anyhow::Result<()> {
    match store.has_table(table).await {
        Ok(true) => Ok(()),
        Err(trouble) if trouble.kind != TroubleKind::Schema => Err(trouble.into()),
        // The other trouble: there is not even the database.
        Ok(false) | Err(_) => Err(Ended::failed(missing(database, table, kind)).into()),
    }
}

fn missing(database: &str, table: &str, kind: Kind) -> String {
    let own = Place::of(kind).table;
    let (what, command) = if table == own {
        ("like the sink's", format!("WEIR_CLICKHOUSE__DATABASE={database} weir schema apply"))
    } else {
        ("with the columns of the sink's", format!("weir query \"CREATE TABLE {database}.{table} AS {own}\""))
    };
    format!("there is no table {database}.{table}. Create one {what} with: {command}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_that_is_not_there_can_be_made_with_one_command() {
        let ends = |table: &str, command: &str| {
            let text = missing("trial", table, Kind::Result);
            assert!(text.contains(&format!("trial.{table}")) && text.ends_with(command), "{text}");
        };
        ends("observations", "with: WEIR_CLICKHOUSE__DATABASE=trial weir schema apply");
        ends("kept", "with: weir query \"CREATE TABLE trial.kept AS observations\"");
    }
}
