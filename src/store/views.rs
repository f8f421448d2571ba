//! Materialized views on weir's tables, filled again where an interrupted insert may not have reached them.

use std::collections::BTreeSet;

use clickhouse::Row;
use serde::Deserialize;

use super::{connection::Store, migrations, quoting::quoted, row, trouble::Trouble};
use crate::{message::envelope::Kind, runtime::metrics::METRICS};

impl Store {
    /// Feeds the views with the rows of a kind for which `range` holds. A view that is not weir's own and lacks them now is
    /// told with `block` and the statement that fills it.
    ///
    /// # Errors
    /// [`Trouble`] with a view of weir's own, or with the question which views there are.
    pub async fn refill_views(
        &self,
        kind: Kind,
        range: &str,
        block: &str,
        refused_by: Option<&Trouble>,
    ) -> Result<(), Trouble> {
        let table = row::table(kind);
        let query = self.client.query_raw(VIEWS).param("table", table).param("view", "");
        for view in self.within(query.fetch_all::<View>()).await? {
            let fill = view.fill(self.client.database().unwrap_or_default(), table, Some(range));
            let is_own = view.is_current > 0 && migrations::is_view(&view.name);
            let refused = refused_by.filter(|trouble| trouble.view.as_deref() == Some(&view.full_name()));
            let why = match (refused, view.bears_it > 0) {
                (Some(trouble), false) => trouble.message.clone(),
                (None, false) => match refused_by.and_then(|trouble| trouble.view.as_ref()) {
                    Some(other) => {
                        format!("the insert was aborted by view {other}; its rows may have been stored before")
                    }
                    None => "the outcome of the insert is unknown; its rows may have been stored".to_owned(),
                },
                // Without deduplication: a token could be known for rows that are not there.
                (_, true) => match self.within(self.client.query_raw(&fill).execute()).await {
                    Ok(()) => continue,
                    Err(trouble) if is_own => return Err(trouble),
                    Err(trouble) => trouble.message,
                },
            };
            METRICS.view_lacks(&view.full_name());
            tracing::warn!(
                view = view.full_name(),
                block,
                why,
                "a view of yours may lack the rows of this block; weir's tables have them. When the view accepts \
                 inserts again, run: {fill}"
            );
        }
        Ok(())
    }

    /// Feeds the tables of these views of our own with all rows there are: what they have already they replace.
    pub(super) async fn feed(&self, names: &BTreeSet<&str>) -> Result<(), Trouble> {
        for name in names {
            let query = self.client.query_raw(VIEWS).param("table", "").param("view", name);
            for view in self.within(query.fetch_all::<View>()).await? {
                let fill = view.fill(self.client.database().unwrap_or_default(), "", None);
                // All rows take longer than a statement may: it ends when ClickHouse does.
                self.client.query_raw(&fill).execute().await?;
            }
        }
        Ok(())
    }
}

/// The materialized views that read a table of ours, in whatever database, or the one of ours with this name; and whether
/// the tables that they feed bear the same row twice: those that replace it, and those that only keep the least and the
/// greatest. A view without a named table feeds one of its own, which is written to by the view's name.
const VIEWS: &str = r"
SELECT toUInt8(database = currentDatabase()) AS is_current, database, name, select, target, columns,
    toUInt8(engine LIKE '%Replacing%'
        OR (engine LIKE '%AggregatingMergeTree' AND target NOT IN
            (SELECT concat(database, '.', table) FROM system.columns WHERE type LIKE '%AggregateFunction(%'
                AND NOT match(type, '^SimpleAggregateFunction\((min|max),')))) AS bears_it
FROM
(
    SELECT database, name, as_select AS select,
        extract(create_table_query, '^[^(]*? TO ([^ (]+)') AS named,
        if(named = '', concat('`', database, '`.`', name, '`'), named) AS target,
        extract(create_table_query, ' ENGINE = (\\w+)') AS own_engine
    FROM system.tables
    WHERE engine = 'MaterializedView' AND (
        (database, name) IN
            (SELECT arrayJoin(arrayZip(dependencies_database, dependencies_table)) FROM system.tables
                WHERE database = currentDatabase() AND name = {table: String})
        OR (database = currentDatabase() AND name = {view: String}))
) AS views
INNER JOIN
(
    SELECT database, table AS name, arrayStringConcat(groupArray(concat('`', column, '`')), ', ') AS columns
    FROM (SELECT database, table, name AS column FROM system.columns ORDER BY position) GROUP BY database, table
) AS columns USING (database, name)
LEFT JOIN (SELECT concat(database, '.', name) AS target, engine AS target_engine FROM system.tables) AS tables USING (target)
ARRAY JOIN [if(named = '', own_engine, target_engine)] AS engine
ORDER BY database, name";

#[derive(Row, Deserialize)]
struct View {
    is_current: u8,
    database: String,
    name: String,
    select: String,
    target: String,
    columns: String,
    bears_it: u8,
}

impl View {
    /// As ClickHouse names it in errors.
    fn full_name(&self) -> String {
        format!("{}.{}", self.database, self.name)
    }

    /// The statement that feeds it with the rows of `database.table` for which `range` holds, or with all rows.
    fn fill(&self, database: &str, table: &str, range: Option<&str>) -> String {
        let Self { target, columns, select, .. } = self;
        let filter =
            range.map(|range| format!(", additional_table_filters = {{'{database}.{table}': {}}}", quoted(range)));
        let filter = filter.unwrap_or_default();
        format!("INSERT INTO {target} ({columns}) {select} SETTINGS insert_deduplicate = 0, async_insert = 0{filter}")
    }
}
