//! `[quota]`: where slots are counted, and how far weir stays away from a vendor's limit.

use std::{sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    Aliases, Counting, Limit, Pacing, Past, Quota,
    memory::Memory,
    plan::{Limits, Plan},
    redis::{self, Redis},
};
use crate::{message::SourceName, runtime::clock::Clock};

/// `[quota]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where slots are counted.
    pub store: Store,
    /// What Redis' keys begin with.
    pub prefix: String,
    /// As [`Pacing::margin`].
    pub margin: f64,
    /// As [`Pacing::jitter`].
    #[serde(with = "humantime_serde")]
    pub jitter: Duration,
    /// With what an account begins of which nobody has said any limit: see [`Limits::or_unknown`].
    pub unknown: Limit,
}

/// Why there is no quota.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// `store = "redis"` alone.
    #[error("quota.store is \"redis\", but redis.url is not set: set it, or use \"memory\" for one process")]
    NoUrl,
    /// Redis' address is none.
    #[error(transparent)]
    Url(#[from] redis::InvalidUrl),
}

/// The quota of a source as it is configured, in the light of its past; needs a tokio runtime.
///
/// # Errors
/// [`OpenError`]: Redis' address is missing or none. Connects in the background.
pub fn open(
    config: &Config,
    redis_url: Option<&str>,
    source: &SourceName,
    aliases: &Aliases,
    limits: &Limits,
    clock: &Clock,
    past: &Past,
) -> Result<Arc<dyn Quota>, OpenError> {
    let limits = &limits.or_unknown(&config.unknown);
    match config.store {
        Store::Memory => {
            let memory = Memory::with_limits(limits, &config.pacing(), clock);
            memory.recall(aliases, past);
            Ok(Arc::new(memory))
        }
        Store::Redis => {
            let url = redis_url.ok_or(OpenError::NoUrl)?;
            let plan = Plan::new(limits, &config.pacing());
            Ok(Arc::new(Redis::new(url, &config.prefix, source, aliases, plan, past)?))
        }
    }
}

/// Where slots are counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Store {
    /// In this process: the only one that calls.
    #[default]
    Memory,
    /// In Redis, at `redis.url`, for all processes together.
    Redis,
}

impl Default for Config {
    fn default() -> Self {
        let Pacing { margin, jitter } = Pacing::default();
        Self {
            store: Store::default(),
            prefix: "weir".to_owned(),
            margin,
            jitter,
            unknown: Limit {
                calls: 1,
                per: Duration::from_secs(1).into(),
                burst: 1,
                kind: Counting::Bucket,
                starts_at: None,
                spread: false,
            },
        }
    }
}

impl Config {
    /// The pace.
    #[must_use]
    pub const fn pacing(&self) -> Pacing {
        Pacing { margin: self.margin, jitter: self.jitter }
    }
}
