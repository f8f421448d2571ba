//! Classification of ClickHouse errors, with a hint for each.

use std::{fmt, time::Duration};

use clickhouse::error::Error;

use crate::{message::codec::shorten, runtime::error_chain::chain};

/// ClickHouse's code for what a user or a query may not do who or which only reads.
const READONLY: u32 = 164;

const SYNTAX_ERROR: u32 = 62;
const UNKNOWN_TABLE: u32 = 60;
const UNKNOWN_DATABASE: u32 = 81;

/// The kind of a ClickHouse error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TroubleKind {
    /// Unreachable, or no answer in time.
    Away,
    /// It cannot accept inserts now: too many parts, no memory, disk full, read-only.
    Unable,
    /// The database, a table or a column is not there.
    Schema,
    /// Authentication or permission failed.
    Login,
    /// Anything else.
    Refused,
}

impl TroubleKind {
    /// The word in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Away => "away",
            Self::Unable => "unable",
            Self::Schema => "schema",
            Self::Login => "login",
            Self::Refused => "refused",
        }
    }
}

/// Why a request to ClickHouse failed. All kinds may pass, if the hint is acted on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Trouble {
    /// What kind.
    pub kind: TroubleKind,
    /// ClickHouse's error code, if it was an error of ClickHouse.
    pub code: Option<u32>,
    /// Its first line.
    pub message: String,
    /// The materialized view, as `database.name`, that would not take rows which their table has taken.
    pub view: Option<String>,
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, code, message, .. } = self;
        match kind {
            TroubleKind::Away => write!(f, "ClickHouse unreachable: {message}"),
            TroubleKind::Unable | TroubleKind::Schema | TroubleKind::Login | TroubleKind::Refused => match code {
                Some(code) => write!(f, "ClickHouse error {code}: {message}"),
                None => write!(f, "ClickHouse: {message}"),
            },
        }?;
        match self.hint() {
            "" => Ok(()),
            hint => write!(f, ". {hint}"),
        }
    }
}

impl Trouble {
    /// What to do about it; empty if nothing is known to help.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        if matches!(self.code, Some(READONLY)) {
            return "clickhouse.user is read-only, or the command only reads: nothing can be written or set";
        }
        // Before it inserts: a view feeds a table that is not there.
        if self.message.starts_with("Target table ") {
            return "Run `weir schema apply` if that table is weir's; if it is yours, create it again or drop the view that feeds it";
        }
        match self.kind {
            TroubleKind::Away => "Is it running, and is clickhouse.url right?",
            TroubleKind::Schema => "Run `weir schema apply`",
            TroubleKind::Login => "Check clickhouse.user and its password",
            TroubleKind::Unable => "It lacks resources: check its disk, memory and merges",
            TroubleKind::Refused => "",
        }
    }

    /// The same, of SQL that a person wrote: the schema is not what is wrong, unless `is_own` knows the table or
    /// database that is not there.
    #[must_use]
    pub(super) fn in_sql_by_hand(self, is_own: impl Fn(&str) -> bool) -> Self {
        let is_missing = matches!(self.code, Some(UNKNOWN_TABLE | UNKNOWN_DATABASE));
        let is_schema = is_missing && missing_name(&self.message).is_some_and(is_own);
        match self.kind {
            TroubleKind::Refused if self.code == Some(SYNTAX_ERROR) => {
                // What could stand there instead is a list that fills a screen.
                let message = self.message.split(". Expected one of").next().unwrap_or_default().to_owned();
                Self { message, ..self }
            }
            TroubleKind::Schema if !is_schema => Self { kind: TroubleKind::Refused, ..self },
            TroubleKind::Schema
            | TroubleKind::Away
            | TroubleKind::Unable
            | TroubleKind::Login
            | TroubleKind::Refused => self,
        }
    }

    /// Whether a user who may only read has asked for a setting of his own. Nothing was asked then.
    #[must_use]
    pub fn is_bound_to_settings(&self) -> bool {
        self.code == Some(READONLY) && self.message.starts_with("Cannot modify")
    }

    /// Whether ClickHouse ran out of memory over what it was given (`MEMORY_LIMIT_EXCEEDED`).
    #[must_use]
    pub fn is_too_large(&self) -> bool {
        self.code == Some(241)
    }

    /// Whether it cannot merge as fast as it is given parts (`TOO_MANY_PARTS`).
    #[must_use]
    pub fn is_too_often(&self) -> bool {
        self.code == Some(252)
    }

    /// No answer within `limit`.
    #[must_use]
    pub fn timed_out(limit: Duration) -> Self {
        let message = format!("no answer within {}", humantime::format_duration(limit));
        Self { kind: TroubleKind::Away, code: None, message, view: None }
    }
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        if let Error::BadResponse(text) = &error {
            return answered(text);
        }
        #[allow(
            clippy::wildcard_enum_match_arm,
            reason = "the crate's list is open, and waiting is right for all others"
        )]
        let kind = match &error {
            Error::Network(_) | Error::TimedOut => TroubleKind::Away,
            Error::SchemaMismatch(_) => TroubleKind::Schema,
            _ => TroubleKind::Refused,
        };
        Self { kind, code: None, message: first_line(&chain(&error)), view: None }
    }
}

/// Reads an error text of ClickHouse: `Code: 60. DB::Exception: Table d.t does not exist. (UNKNOWN_TABLE) (version …)`.
fn answered(text: &str) -> Trouble {
    let code = text.split_once("Code: ").and_then(|(_, rest)| {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        rest[..digits].parse::<u32>().ok()
    });
    let message = match text.split_once("DB::Exception: ") {
        Some((_, message)) => message,
        None => text,
    };
    let message = message.split(" (version ").next().unwrap_or(message);
    Trouble { kind: kind_of(code), code, message: first_line(message), view: refusing_view(message) }
}

/// The view of `…: while pushing to view d.v. (CANNOT_PARSE_TEXT)`: rows are in their table by then. The last one, where
/// a view's table has views of its own.
fn refusing_view(message: &str) -> Option<String> {
    let (_, rest) = message.rsplit_once("while pushing to view ")?;
    let name = rest.split([' ', '\n']).next()?;
    Some(name.trim_end_matches(['.', ':', ',']).to_owned())
}

/// The numbers are ClickHouse's own, see `system.errors`.
fn kind_of(code: Option<u32>) -> TroubleKind {
    match code {
        // A proxy between us and ClickHouse answers without a code: 502, 503.
        // TIMEOUT_EXCEEDED, SOCKET_TIMEOUT, NETWORK_ERROR
        None | Some(159 | 209 | 210) => TroubleKind::Away,
        // CANNOT_WRITE_TO_FILE_DESCRIPTOR (a disk that was full only in the midst of it), READONLY,
        // CANNOT_ALLOCATE_MEMORY, TOO_MANY_SIMULTANEOUS_QUERIES, NO_ZOOKEEPER, MEMORY_LIMIT_EXCEEDED,
        // TABLE_IS_READ_ONLY, NOT_ENOUGH_SPACE, TOO_MANY_PARTS, UNKNOWN_STATUS_OF_INSERT, CANNOT_SCHEDULE_TASK,
        // SERVER_OVERLOADED, KEEPER_EXCEPTION
        Some(75 | 164 | 173 | 202 | 225 | 241 | 242 | 243 | 252 | 319 | 439 | 745 | 999) => TroubleKind::Unable,
        // NOT_FOUND_COLUMN_IN_BLOCK, NO_SUCH_COLUMN_IN_TABLE, UNKNOWN_IDENTIFIER, UNKNOWN_TABLE, UNKNOWN_DATABASE
        Some(10 | 16 | 47 | 60 | 81) => TroubleKind::Schema,
        // UNKNOWN_USER, WRONG_PASSWORD, REQUIRED_PASSWORD, ACCESS_DENIED, AUTHENTICATION_FAILED
        Some(192 | 193 | 194 | 497 | 516) => TroubleKind::Login,
        Some(_) => TroubleKind::Refused,
    }
}

/// The table or database of `Table d.t does not exist`, `Unknown table expression identifier 'd.t'`, `Could not find
/// table: t` or `Database d does not exist`.
fn missing_name(message: &str) -> Option<&str> {
    let (_, rest) =
        ["identifier '", "table: ", "Table ", "Database "].iter().find_map(|lead| message.split_once(lead))?;
    let name = rest.split(|c: char| c.is_whitespace() || c == '\'').next()?;
    Some(name.trim_end_matches('.')).filter(|name| !name.is_empty())
}

fn first_line(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default().trim().trim_end_matches('.');
    shorten(line, 1_000).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_told_by_its_code_and_says_what_to_do() {
        let table = [
            (
                "Code: 60. DB::Exception: Table d.t does not exist. (UNKNOWN_TABLE) (version 26.9.2.1)",
                TroubleKind::Schema,
            ),
            ("Code: 252. DB::Exception: Too many parts (300). (TOO_MANY_PARTS)", TroubleKind::Unable),
            ("Code: 241. DB::Exception: Memory limit exceeded\nstack trace", TroubleKind::Unable),
            ("Code: 243. DB::Exception: Cannot reserve 1.00 MiB, not enough space", TroubleKind::Unable),
            ("Code: 75. DB::Exception: Cannot write to file: errno: 28, No space left on device", TroubleKind::Unable),
            ("Code: 745. DB::Exception: CPU is overloaded. (SERVER_OVERLOADED)", TroubleKind::Unable),
            ("Code: 516. DB::Exception: default: Authentication failed", TroubleKind::Login),
            ("Code: 62. DB::Exception: Syntax error", TroubleKind::Refused),
            ("502 Bad Gateway", TroubleKind::Away),
        ];
        for (text, kind) in table {
            assert_eq!(Trouble::from(Error::BadResponse(text.to_owned())).kind, kind, "{text}");
        }
        let bound = |text: &str| Trouble::from(Error::BadResponse(text.to_owned())).is_bound_to_settings();
        assert!(bound("Code: 164. DB::Exception: Cannot modify 'readonly' setting in readonly mode. (READONLY)"));
        assert!(!bound("Code: 164. DB::Exception: Cannot execute query in readonly mode. (READONLY)"));
        let unknown = Trouble::from(Error::BadResponse(table[0].0.to_owned()));
        assert_eq!(unknown.view, None);
        let view = "Code: 6. DB::Exception: Cannot parse string 'x' as UInt8: while executing 'f': while pushing to view u.bad. (CANNOT_PARSE_TEXT) (version 26.9.2.1)";
        assert_eq!(Trouble::from(Error::BadResponse(view.to_owned())).view.as_deref(), Some("u.bad"));
        let target = "Code: 60. DB::Exception: Target table 'v.t' of view 'u.obs' doesn't exists. (UNKNOWN_TABLE)";
        assert!(Trouble::from(Error::BadResponse(target.to_owned())).hint().contains("drop the view that feeds it"));
        assert_eq!(
            unknown.to_string(),
            "ClickHouse error 60: Table d.t does not exist. (UNKNOWN_TABLE). Run `weir schema apply`"
        );
    }

    #[test]
    fn a_slip_in_sql_by_hand_is_no_matter_of_the_schema_but_a_table_of_ours_that_is_missing_is() {
        let hint = |text: &str| {
            let trouble = Trouble::from(Error::BadResponse(text.to_owned()));
            trouble.in_sql_by_hand(|name| crate::store::migrations::lacks("weir", name)).hint()
        };
        let apply = "Run `weir schema apply`";
        let table = [
            ("Code: 62. DB::Exception: Syntax error: failed at position 7", ""),
            (
                "Code: 47. DB::Exception: Unknown expression identifier `nonsense`. In scope SELECT nonsense FROM items",
                "",
            ),
            ("Code: 16. DB::Exception: No such column a in table weir.items (cc35)", ""),
            ("Code: 60. DB::Exception: Unknown table expression identifier 'itmes'. Maybe you meant weir.items?", ""),
            ("Code: 60. DB::Exception: Unknown table expression identifier 'other.items'. Maybe you", ""),
            ("Code: 60. DB::Exception: Table weir.foo does not exist", ""),
            ("Code: 81. DB::Exception: Database other does not exist. (UNKNOWN_DATABASE)", ""),
            ("Code: 60. DB::Exception: Unknown table expression identifier 'items'. In scope SELECT", apply),
            ("Code: 60. DB::Exception: Unknown table expression identifier 'weir.batches'", apply),
            ("Code: 60. DB::Exception: Table weir.items does not exist. Maybe you meant pol.items?", apply),
            ("Code: 60. DB::Exception: Could not find table: observations. (UNKNOWN_TABLE)", apply),
            ("Code: 81. DB::Exception: Database weir does not exist. (UNKNOWN_DATABASE)", apply),
        ];
        for (text, expected) in table {
            assert_eq!(hint(text), expected, "{text}");
        }
        let syntax =
            "Code: 62. DB::Exception: Syntax error: failed at position 7 (1): 1. Expected one of: Dot, token, OR";
        let shown = Trouble::from(Error::BadResponse(syntax.to_owned())).in_sql_by_hand(|_| true).to_string();
        assert_eq!(shown, "ClickHouse error 62: Syntax error: failed at position 7 (1): 1");
        assert_eq!(hint("502 Bad Gateway"), "Is it running, and is clickhouse.url right?");
    }
}
