//! sink: every topic → ClickHouse, one block of contiguous offsets at a time.

use std::time::Duration;

use bytesize::ByteSize;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};

/// `[sink]`: when a block is full.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Rows of a block, at most.
    pub rows: usize,
    /// Bytes of a block, at most.
    pub bytes: ByteSize,
    /// Age of a block's first record, at most.
    #[serde(with = "humantime_serde")]
    pub age: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self { rows: 10_000, bytes: ByteSize::mib(16), age: Duration::from_secs(1) }
    }
}

/// `[clickhouse]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClickHouseConfig {
    /// The HTTP interface.
    pub url: String,
    /// The database; `schema apply` creates it.
    pub database: String,
    /// The user.
    pub user: String,
    /// The password, from the environment (`WEIR_CLICKHOUSE__PASSWORD`) or from `password_file`.
    pub password: Option<SecretString>,
    /// A file with the password.
    pub password_file: Option<std::path::PathBuf>,
}

impl Default for ClickHouseConfig {
    fn default() -> Self {
        Self {
            url: "http://127.0.0.1:8123".to_owned(),
            database: "weir".to_owned(),
            user: "default".to_owned(),
            password: None,
            password_file: None,
        }
    }
}
