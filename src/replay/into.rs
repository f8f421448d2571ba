//! The target of a replay. Pure.

use std::{fmt, str::FromStr};

use crate::{message::envelope::Kind, store::present::Place};

/// The target of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Into {
    /// The tables that the sink writes.
    Tables,
    /// The tables of another database that has the same schema, or one table of it.
    Elsewhere {
        /// The database.
        database: String,
        /// The table; `None`: that of the kind of record.
        table: Option<String>,
    },
    /// The topics of the sources.
    Requests,
}

impl FromStr for Into {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_name = |name: &str| {
            name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
                && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        };
        let (database, table) = match text.split_once('.') {
            Some((database, table)) => (database, Some(table)),
            None => (text, None),
        };
        match text {
            "tables" => Ok(Self::Tables),
            "requests" => Ok(Self::Requests),
            _ if is_name(database) && table.is_none_or(is_name) => {
                Ok(Self::Elsewhere { database: database.to_owned(), table: table.map(str::to_owned) })
            }
            _ => Err("write tables, requests, DATABASE or DATABASE.TABLE (letters, digits and _)".to_owned()),
        }
    }
}

impl Into {
    /// The target of records of this kind, where `live` is the database that the sink writes: its tables are the sink's by
    /// any name, so that nothing is poured into them that it has still to store.
    ///
    /// # Errors
    /// What to write, if the table is that of another kind.
    pub fn of(self, kind: Kind, live: &str) -> Result<Self, String> {
        let Self::Elsewhere { database, table } = &self else { return Ok(self) };
        let own = Place::of(kind).table;
        let is_own = table.as_ref().is_none_or(|table| *table == own);
        if is_own && database == live {
            return Ok(Self::Tables);
        }
        let is_weirs = |table: &String| Kind::ALL.into_iter().any(|kind| Place::of(kind).table == *table);
        if !is_own && table.as_ref().is_some_and(is_weirs) {
            return Err(format!("{self} holds rows of another kind: write {database}, or {database}.{own}"));
        }
        Ok(self)
    }
}

impl fmt::Display for Into {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tables => f.write_str("the tables"),
            Self::Requests => f.write_str("the requests"),
            Self::Elsewhere { database, table: None } => f.write_str(database),
            Self::Elsewhere { database, table: Some(table) } => write!(f, "{database}.{table}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_a_word_or_a_name() {
        let elsewhere = |database: &str, table: Option<&str>| {
            Ok(Into::Elsewhere { database: database.to_owned(), table: table.map(str::to_owned) })
        };
        for (text, expected) in [
            ("tables", Ok(Into::Tables)),
            ("requests", Ok(Into::Requests)),
            ("trial", elsewhere("trial", None)),
            ("trial.seen_2", elsewhere("trial", Some("seen_2"))),
        ] {
            assert_eq!(text.parse::<Into>(), expected, "{text}");
        }
        for text in ["", "a b", "1a", "a.", ".b", "a.b.c", "a;DROP"] {
            assert!(text.parse::<Into>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_sinks_own_tables_are_that_by_any_name() {
        let of = |text: &str, kind| text.parse::<Into>().unwrap().of(kind, "live");
        for text in ["tables", "live", "live.observations"] {
            assert_eq!(of(text, Kind::Result), Ok(Into::Tables), "{text}");
        }
        for text in ["requests", "trial", "trial.observations", "live.kept", "trial.kept"] {
            assert_eq!(of(text, Kind::Result), Ok(text.parse().unwrap()), "{text}");
        }
        assert_eq!(of("live", Kind::Change), Ok(Into::Tables));
        for text in ["live.failures", "trial.failures"] {
            let error = of(text, Kind::Result).unwrap_err();
            assert!(error.contains(text) && error.contains(".observations"), "{error}");
        }
    }
}
