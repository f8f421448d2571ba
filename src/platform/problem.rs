//! What is wrong with a source's configuration, and the checks that several of its parts need.

use std::time::Duration;

use super::{accounts::AccountsError, address::AddressError, pick::InvalidPointer, route};

/// What is wrong with a source's configuration.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// A key has a value that it cannot have.
    #[error("{key} is {found}; it must be {allowed}")]
    Key {
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What it may be.
        allowed: &'static str,
    },
    /// A key of another kind.
    #[error("{key} is not a key of this kind and dialect: leave it out")]
    Stranger {
        /// The key.
        key: String,
    },
    /// A column pointer is none.
    #[error("columns: {0}")]
    Pointer(#[from] InvalidPointer),
    /// An address cannot be used, or an account's is none.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// An account cannot be used.
    #[error(transparent)]
    Accounts(#[from] AccountsError),
    /// There is nobody to call as.
    #[error("it has no account: add [[source.account]] or an accounts_file with [[account]] tables")]
    NoAccount,
    /// The TLS library, or the like, does not start.
    #[error("cannot make an HTTP client: {0}")]
    Client(String),
}

impl Problem {
    /// A key of another kind.
    pub(super) fn stranger(key: &str) -> Self {
        Self::Stranger { key: key.to_owned() }
    }
}

/// Whether a value is right, as whoever asks has found; else what is wrong with it.
pub(super) fn require(key: &str, found: &str, is_right: bool, allowed: &'static str) -> Result<(), Problem> {
    if is_right { Ok(()) } else { Err(Problem::Key { key: key.to_owned(), found: format!("{found:?}"), allowed }) }
}

/// Whether a time is one that a call may take.
pub(super) fn check_time(key: &str, time: Duration) -> Result<(), Problem> {
    let is_right = (Duration::from_millis(1)..=Duration::from_secs(600)).contains(&time);
    let found = humantime::format_duration(time).to_string();
    if is_right { Ok(()) } else { Err(Problem::Key { key: key.to_owned(), found, allowed: "from 1ms to 10m" }) }
}

/// Whether a text is a URL that paths can be added to, without anything secret in it.
pub(super) fn check_url(key: &str, url: &str) -> Result<(), Problem> {
    require(key, url, route::is_base_url(url), "http:// or https://, a host and perhaps a path")
}

/// Whether a text can stand in a path or be a parameter's name.
pub(super) fn check_word(key: &str, word: &str) -> Result<(), Problem> {
    require(key, word, is_word(word), "ASCII letters, digits, - _ .")
}

/// Whether one call may carry so many ids of an API that takes `most`.
pub(super) fn check_batch(batch_max: Option<usize>, most: usize) -> Result<(), Problem> {
    let batch_max = batch_max.unwrap_or(1);
    let is_right = (1..=most).contains(&batch_max);
    require("batch_max", &batch_max.to_string(), is_right, "from 1 to what the API takes, see weir.example.toml")
}

/// Whether a text is made of ASCII letters, digits, `-`, `_` and `.`, at least one.
pub(super) fn is_word(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}
