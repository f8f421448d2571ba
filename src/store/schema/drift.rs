//! Compares the schema that the migrations create with the existing one: dropped tables, views and columns. Pure.
//!
//! The wanted objects are read from the migrations' own SQL, so there is no second list that could differ from it. A test
//! holds that every statement is understood.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

/// What kind of object a statement creates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// Holds rows.
    Table,
    /// Feeds a table with what is inserted into another one.
    MaterializedView,
    /// Is computed when it is asked.
    View,
}

/// A table or view that the migrations make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Object {
    pub kind: Kind,
    /// Makes it as it is today when run in order; each may be run again.
    pub statements: Vec<String>,
    /// Of a table, in order.
    pub columns: Vec<Column>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Column {
    pub name: String,
    /// Its type as ClickHouse writes it.
    pub type_name: String,
    /// Type, default, codec and comment, as in `ADD COLUMN`.
    pub definition: String,
}

/// What is in the database.
#[derive(Clone, Debug, Default)]
pub(super) struct Present {
    /// Tables and views.
    pub names: BTreeSet<String>,
    /// The type of each column, by table and name.
    pub columns: BTreeMap<(String, String), String>,
}

/// How the database differs from what the migrations have made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Difference {
    /// A table is not there, and so neither are its rows.
    Table(String),
    /// A view is not there.
    View {
        /// Its name.
        name: String,
        /// It feeds a table.
        is_materialized: bool,
    },
    /// A table lacks a column.
    Column {
        /// Which table.
        table: String,
        /// Which column.
        column: String,
    },
    /// A column has another type. That may be on purpose, so it is left as it is.
    Type {
        /// Which table.
        table: String,
        /// Which column.
        column: String,
        /// What it is.
        found: String,
        /// What the migrations made it.
        expected: String,
    },
}

impl Difference {
    /// Whether `schema apply` mends it.
    #[must_use]
    pub const fn is_mended_by_apply(&self) -> bool {
        !matches!(self, Self::Type { .. })
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Table(name) => write!(f, "table {name} is missing"),
            Self::View { name, is_materialized: false } => write!(f, "view {name} is missing"),
            Self::View { name, is_materialized: true } => write!(f, "materialized view {name} is missing"),
            Self::Column { table, column } => write!(f, "column {table}.{column} is missing"),
            Self::Type { table, column, found, expected } => {
                write!(f, "column {table}.{column} is {found}, weir created it as {expected}")
            }
        }
    }
}

/// Begins what a later migration says of a column.
const COMMENT: &str = "COMMENT COLUMN IF EXISTS ";

/// Begins what a later migration makes of a materialized view, without a moment in which there is none.
const QUERY: &str = "MODIFY QUERY";

/// The objects that these statements leave behind, by name; statements in the order in which they are run.
///
/// # Errors
/// The statement that is of no known form.
pub(super) fn wanted(statements: impl IntoIterator<Item = String>) -> Result<BTreeMap<String, Object>, String> {
    let mut objects = BTreeMap::new();
    for statement in statements {
        read(&statement, &mut objects).ok_or(statement)?;
    }
    Ok(objects)
}

/// `None`: not understood.
fn read(statement: &str, objects: &mut BTreeMap<String, Object>) -> Option<()> {
    let (verb, rest) = statement.split_once("{database}.")?;
    let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
    let (name, rest) = rest.split_at(end);
    let own = || vec![statement.to_owned()];
    match verb.trim_end() {
        "CREATE TABLE IF NOT EXISTS" => {
            let object = Object { kind: Kind::Table, statements: own(), columns: columns(rest)? };
            objects.entry(name.to_owned()).or_insert(object);
        }
        "CREATE MATERIALIZED VIEW IF NOT EXISTS" => {
            let object = Object { kind: Kind::MaterializedView, statements: own(), columns: Vec::new() };
            objects.entry(name.to_owned()).or_insert(object);
        }
        "CREATE VIEW IF NOT EXISTS" => {
            let object = Object { kind: Kind::View, statements: own(), columns: Vec::new() };
            objects.entry(name.to_owned()).or_insert(object);
        }
        "CREATE OR REPLACE VIEW" => {
            objects.insert(name.to_owned(), Object { kind: Kind::View, statements: own(), columns: Vec::new() });
        }
        "DROP VIEW IF EXISTS" | "DROP TABLE IF EXISTS" => {
            objects.remove(name);
        }
        "ALTER TABLE" => {
            let object = objects.get_mut(name)?;
            object.statements.push(statement.to_owned());
            if let Some(added) = rest.trim().strip_prefix("ADD COLUMN IF NOT EXISTS ") {
                let (definition, after) = added.rsplit_once(" AFTER ")?;
                let place = object.columns.iter().position(|column| column.name == after)?;
                object.columns.insert(place + 1, column(definition)?);
            } else if !(rest.trim().starts_with(COMMENT)
                || object.kind == Kind::MaterializedView && rest.trim().starts_with(QUERY))
            {
                return None;
            }
        }
        // What fills a table once: the views that feed it say the same.
        "INSERT INTO" => {}
        _ => return None,
    }
    Some(())
}

/// The columns of `(…) ENGINE = …`, each on a line of its own.
fn columns(text: &str) -> Option<Vec<Column>> {
    let (list, _) = text.trim_start().strip_prefix("(\n")?.split_once("\n)")?;
    let lines = list.lines().map(|line| line.trim().trim_end_matches(','));
    let is_column = |line: &&str| !line.starts_with("INDEX ") && !line.starts_with("PROJECTION ");
    lines.filter(is_column).map(column).collect()
}

/// `name Type CODEC(…) COMMENT '…'`
fn column(text: &str) -> Option<Column> {
    let (name, definition) = text.trim().split_once(' ')?;
    let definition = definition.trim();
    let mut depth = 0;
    let end = definition.find(|c: char| {
        depth += i32::from(c == '(') - i32::from(c == ')');
        c == ' ' && depth == 0
    });
    let type_name = definition[..end.unwrap_or(definition.len())].to_owned();
    Some(Column { name: name.to_owned(), type_name, definition: definition.to_owned() })
}

/// How `present` differs from `wanted`; what others depend on comes first.
pub(super) fn differences(wanted: &BTreeMap<String, Object>, present: &Present) -> Vec<Difference> {
    let mut by_kind: Vec<_> = wanted.iter().collect();
    by_kind.sort_by_key(|(name, object)| (object.kind, *name));
    by_kind.into_iter().flat_map(|(name, object)| of(name, object, present)).collect()
}

fn of(name: &str, object: &Object, present: &Present) -> Vec<Difference> {
    if !present.names.contains(name) {
        return vec![match object.kind {
            Kind::Table => Difference::Table(name.to_owned()),
            Kind::MaterializedView => Difference::View { name: name.to_owned(), is_materialized: true },
            Kind::View => Difference::View { name: name.to_owned(), is_materialized: false },
        }];
    }
    let differs = |Column { name: column, type_name, .. }: &Column| {
        let (table, column) = (name.to_owned(), column.clone());
        match present.columns.get(&(table.clone(), column.clone())) {
            None => Some(Difference::Column { table, column }),
            Some(found) if found == type_name => None,
            Some(found) => Some(Difference::Type { table, column, found: found.clone(), expected: type_name.clone() }),
        }
    };
    object.columns.iter().filter_map(differs).collect()
}

/// The statements that mend a difference, none if it is left as it is.
pub(super) fn mend(wanted: &BTreeMap<String, Object>, difference: &Difference) -> Vec<String> {
    match difference {
        Difference::Table(name) | Difference::View { name, .. } => {
            wanted.get(name).map(|object| object.statements.clone()).unwrap_or_default()
        }
        Difference::Column { table, column } => {
            let Some(Object { columns, statements, .. }) = wanted.get(table) else { return Vec::new() };
            let Some(place) = columns.iter().position(|known| known.name == *column) else { return Vec::new() };
            let after = match place.checked_sub(1) {
                Some(before) => format!("AFTER {}", columns[before].name),
                None => "FIRST".to_owned(),
            };
            let definition = &columns[place].definition;
            let add =
                format!("ALTER TABLE {{database}}.{table} ADD COLUMN IF NOT EXISTS {column} {definition} {after}");
            let comments = statements.iter().filter(|statement| statement.contains(COMMENT)).cloned();
            std::iter::once(add).chain(comments).collect()
        }
        Difference::Type { .. } => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SQL: [&str; 6] = [
        "CREATE TABLE IF NOT EXISTS {database}.rows\n(\n    id   String CODEC(ZSTD),\n    at   Nullable(DateTime64(3, 'UTC')) COMMENT 'when, if (ever)',\n    INDEX by_id id TYPE minmax GRANULARITY 1\n)\nENGINE = MergeTree\nORDER BY id",
        "CREATE VIEW IF NOT EXISTS {database}.old AS SELECT 1",
        "DROP VIEW IF EXISTS {database}.old",
        "CREATE MATERIALIZED VIEW IF NOT EXISTS {database}.feeds TO {database}.rows AS SELECT 1",
        "ALTER TABLE {database}.rows\n    ADD COLUMN IF NOT EXISTS by LowCardinality(String) DEFAULT ''\n    COMMENT 'who' AFTER id",
        "CREATE OR REPLACE VIEW {database}.view AS SELECT 2",
    ];

    fn model() -> BTreeMap<String, Object> {
        wanted(SQL.map(str::to_owned)).unwrap()
    }

    fn whole() -> Present {
        let column = |name: &str, type_name: &str| (("rows".to_owned(), name.to_owned()), type_name.to_owned());
        Present {
            names: ["rows", "feeds", "view", "somebody_elses"].map(str::to_owned).into(),
            columns: BTreeMap::from([
                column("id", "String"),
                column("at", "Nullable(DateTime64(3, 'UTC'))"),
                column("by", "LowCardinality(String)"),
                column("added_by_hand", "UInt8"),
            ]),
        }
    }

    #[test]
    fn what_is_whole_does_not_differ_whatever_else_is_there() {
        assert_eq!(differences(&model(), &whole()), []);
    }

    #[test]
    fn what_is_gone_is_named_and_made_again_in_its_place() {
        let (wanted, mut present) = (model(), whole());
        present.columns.remove(&("rows".to_owned(), "by".to_owned()));
        present.columns.insert(("rows".to_owned(), "id".to_owned()), "FixedString(8)".to_owned());
        present.names.remove("view");
        present.names.remove("feeds");
        let found = differences(&wanted, &present);
        let told: Vec<_> = found.iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            [
                "column rows.id is FixedString(8), weir created it as String",
                "column rows.by is missing",
                "materialized view feeds is missing",
                "view view is missing",
            ]
        );
        assert_eq!(mend(&wanted, &found[0]), Vec::<String>::new());
        assert_eq!(
            mend(&wanted, &found[1]),
            [
                "ALTER TABLE {database}.rows ADD COLUMN IF NOT EXISTS by LowCardinality(String) DEFAULT ''\n    COMMENT 'who' AFTER id"
            ]
        );
        assert_eq!(mend(&wanted, &found[3]), [SQL[5]]);
        present.names.remove("rows");
        let found = differences(&wanted, &present);
        assert_eq!(found[0].to_string(), "table rows is missing");
        assert_eq!(mend(&wanted, &found[0]), [SQL[0], SQL[4]], "as it is today");
    }

    #[test]
    fn a_view_whose_query_was_changed_is_made_again_with_the_newest() {
        let newer = "ALTER TABLE {database}.feeds\nMODIFY QUERY SELECT 3";
        let wanted = wanted(SQL.into_iter().chain([newer]).map(str::to_owned)).unwrap();
        let mut present = whole();
        present.names.remove("feeds");
        let found = differences(&wanted, &present);
        assert_eq!((found.len(), mend(&wanted, &found[0])), (1, vec![SQL[3].to_owned(), newer.to_owned()]));
        assert!(
            super::wanted(
                SQL.into_iter().chain(["ALTER TABLE {database}.rows MODIFY QUERY SELECT 3"]).map(str::to_owned)
            )
            .is_err()
        );
    }

    #[test]
    fn a_statement_of_no_known_form_is_handed_back() {
        assert_eq!(
            wanted(["OPTIMIZE TABLE {database}.rows".to_owned()]).unwrap_err(),
            "OPTIMIZE TABLE {database}.rows"
        );
    }
}
