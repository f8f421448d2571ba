//! `[fetch]`: how much may be under way, and how often outcomes are made visible.

use std::time::Duration;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

pub use super::admission::at_risk::AtRisk;

/// `[fetch]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// How often outcomes are made visible, at most: each transaction costs the broker 5–9 ms of CPU.
    #[serde(with = "humantime_serde")]
    pub commit_every: Duration,
    /// How many requests of a source may wait in memory for their slot, of each lane.
    pub backlog: usize,
    /// How many calls of a source may be under way at once.
    pub calls_in_flight: usize,
    /// How many calls of all sources of this process may be under way at once.
    pub calls_in_flight_in_all: usize,
    /// How many bytes of finished outcomes may wait for their transaction before calls pause.
    pub outcomes_limit: ByteSize,
    /// How many calls may have outcomes that cannot be committed, before the next ones wait for a commit.
    pub at_risk: AtRisk,
    /// Whether headers of a reply that say that a quota is used up hold the account before a refusal does.
    pub heed_hints: bool,
    /// How long a partition that goes to another member may take to finish its calls in flight.
    #[serde(with = "humantime_serde")]
    pub drain: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            commit_every: Duration::from_millis(50),
            backlog: 4_096,
            calls_in_flight: 1_024,
            calls_in_flight_in_all: 4_096,
            outcomes_limit: ByteSize::mib(64),
            at_risk: AtRisk::default(),
            heed_hints: true,
            drain: Duration::from_secs(5),
        }
    }
}
