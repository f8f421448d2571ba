//! `[serve]`: where items are served, and how long and how many may wait for one.

use std::{net::SocketAddr, time::Duration};

use serde::{Deserialize, Serialize};

use crate::runtime::health;

/// `[serve]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The public listener: items and `/health` alone. Without one, items are served on `[http] listen`, beside `/ready` and
    /// `/metrics`.
    #[serde(deserialize_with = "health::read_address", skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// How long a request over HTTP waits for an item that is not in the cache: then 503, and the item comes later.
    #[serde(with = "humantime_serde")]
    pub wait: Duration,
    /// How many may wait at once; beyond it 503 at once.
    pub waiting: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { listen: None, wait: Duration::from_secs(10), waiting: 1_000 }
    }
}
