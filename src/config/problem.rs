//! Configuration errors: each names the key, its origin, what was found and what is allowed.

use std::{fmt, io, path::PathBuf};

use figment::error::{Actual, Kind};

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        error: io::Error,
    },
    /// The file is not TOML.
    #[error("the configuration file {} is not valid TOML: {reason}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What the parser said, with line and column.
        reason: String,
    },
    /// At least one problem; all that could be found.
    #[error("{}", list(.0))]
    Invalid(Vec<Problem>),
}

fn list(problems: &[Problem]) -> String {
    let head = match problems {
        [_] => "the configuration is not valid:".to_owned(),
        _ => format!("the configuration is not valid, {} problems:", problems.len()),
    };
    problems.iter().fold(head, |text, problem| format!("{text}\n  {problem}"))
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The key, from the top: `retry.base`, `source.ali1688.url`.
    pub key: String,
    /// The file or the variable that it comes from, if it does not stand there by default.
    pub place: Option<String>,
    /// What was found, and what is allowed.
    pub what: String,
}

impl Problem {
    /// A problem of a key.
    #[must_use]
    pub fn new(key: impl Into<String>, what: impl Into<String>) -> Self {
        Self { key: key.into(), place: None, what: what.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Some(place) => write!(f, "{} ({place}): {}", self.key, self.what),
            None => write!(f, "{}: {}", self.key, self.what),
        }
    }
}

/// Words for what serde objects to at `key`.
pub(super) fn words(key: &str, kind: &Kind) -> String {
    match kind {
        Kind::UnknownField(_, allowed) => format!("there is no such key; allowed here: {}", allowed.join(", ")),
        Kind::UnknownVariant(found, allowed) => {
            let allowed: Vec<_> = allowed.iter().map(|word| format!("{word:?}")).collect();
            format!("found {found:?}, allowed: {}", allowed.join(", "))
        }
        Kind::InvalidType(found, allowed) | Kind::InvalidValue(found, allowed) => {
            format!("found {}, allowed: {}", found_words(key, found), allowed_words(allowed))
        }
        Kind::MissingField(_) => "is missing".to_owned(),
        Kind::Message(message) if is_secret(key) => format!("refused ({} bytes about a secret)", message.len()),
        Kind::Message(message) => message.clone(),
        Kind::InvalidLength(..)
        | Kind::DuplicateField(_)
        | Kind::ISizeOutOfRange(_)
        | Kind::USizeOutOfRange(_)
        | Kind::Unsupported(_)
        | Kind::UnsupportedKey(..) => kind.to_string(),
    }
}

/// Whether the value of this key must not be shown. A path to a file with a secret is none itself.
pub(super) fn is_secret(key: &str) -> bool {
    let key = key.to_ascii_lowercase();
    let names = ["password", "secret", "token", "sasl.jaas", "ssl.key.pem", "api_key", "session_key", "authorization"];
    !key.ends_with("_file") && !key.ends_with(".location") && names.iter().any(|name| key.contains(name))
}

fn found_words(key: &str, found: &Actual) -> String {
    let secret = is_secret(key) || ["redis.url", "batches.webhook"].contains(&key);
    match found {
        Actual::Str(_) | Actual::Char(_) if secret => "a text".to_owned(),
        Actual::Bool(_) | Actual::Unsigned(_) | Actual::Signed(_) | Actual::Float(_) if secret => {
            "a number or boolean without quotes".to_owned()
        }
        Actual::Bool(value) => value.to_string(),
        Actual::Unsigned(value) => value.to_string(),
        Actual::Signed(value) => value.to_string(),
        Actual::Float(value) => value.to_string(),
        Actual::Char(value) => format!("{:?}", value.to_string()),
        Actual::Str(value) => format!("{value:?}"),
        Actual::Seq => "a list".to_owned(),
        Actual::Map => "a table".to_owned(),
        Actual::Unit | Actual::Option => "nothing".to_owned(),
        Actual::Bytes(_)
        | Actual::NewtypeStruct
        | Actual::Enum
        | Actual::UnitVariant
        | Actual::NewtypeVariant
        | Actual::TupleVariant
        | Actual::StructVariant
        | Actual::Other(_) => found.to_string(),
    }
}

/// serde names Rust's types; the reader of a TOML file wants to know what to write.
fn allowed_words(expected: &str) -> String {
    let plain = match expected {
        "a duration" => r#"a duration such as "500ms", "30s", "5m" or "2h""#,
        "an integer or string" | "parsable string" => r#"a size such as "64KiB" or "8MiB""#,
        "u8" => "a whole number from 0 to 255",
        "u16" => "a whole number from 0 to 65535",
        "u32" | "u64" | "usize" => "a whole number, not negative",
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number",
        "f32" | "f64" => "a number",
        "a string" | "string" => "a text in quotes",
        "a boolean" => "true or false",
        "a map" => "a table",
        "a sequence" => "a list",
        other if other.starts_with("struct ") => "a table",
        other => other,
    };
    plain.to_owned()
}
