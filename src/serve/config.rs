//! `[serve]`: how long and how many may wait for an item.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// `[serve]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// How long a request over HTTP waits for an item that is not in the cache: then 503, and the item comes later.
    #[serde(with = "humantime_serde")]
    pub wait: Duration,
    /// How many may wait at once; beyond it 503 at once.
    pub waiting: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { wait: Duration::from_secs(10), waiting: 1_000 }
    }
}
