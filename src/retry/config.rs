//! `[retry]`: how often, how long and until when a request is tried again.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// `[retry]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// How many attempts a request has in all. Throttles and refused accounts spend none.
    pub attempts: u32,
    /// The delay before the second attempt.
    #[serde(with = "humantime_serde")]
    pub base: Duration,
    /// What each further delay is multiplied by.
    pub factor: f64,
    /// The longest delay.
    #[serde(with = "humantime_serde")]
    pub cap: Duration,
    /// A request older than this ends, whatever is wrong.
    #[serde(with = "humantime_serde")]
    pub age_limit: Duration,
    /// How many failures may wait in memory.
    pub waiting: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            attempts: 5,
            base: Duration::from_secs(5),
            factor: 2.0,
            cap: Duration::from_secs(600),
            age_limit: Duration::from_secs(24 * 60 * 60),
            waiting: 20_000,
        }
    }
}
