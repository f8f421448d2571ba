//! `[quota]`: where slots are counted, and how far weir stays away from a vendor's limit.

use std::{sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    Aliases, Counting, Limit, Pacing, Past, Quota,
    division::{Division, Indivisible},
    memory::Memory,
    plan::Limits,
    redis::{self, Plans, Redis, Sharing},
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
    /// What a worker does when Redis is lost and its lease is used up.
    pub on_redis_loss: OnRedisLoss,
    /// With [`OnRedisLoss::Share`]: the share of every limit that Redis never grants, for workers that have lost it.
    pub reserve: f64,
    /// With [`OnRedisLoss::Share`]: among how many workers that is divided. Further ones wait without Redis.
    pub workers_max: u32,
    /// With [`OnRedisLoss::Share`]: for how long a worker goes on without Redis.
    #[serde(with = "humantime_serde")]
    pub share_for: Duration,
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
    #[error("quota.store is \"redis\" but redis.url is not set: set it, or use \"memory\" for one process")]
    NoUrl,
    /// Redis' address is none.
    #[error(transparent)]
    Url(#[from] redis::InvalidUrl),
    /// `on_redis_loss = "share"` with limits that do not allow it.
    #[error(transparent)]
    Share(#[from] Indivisible),
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
            Ok(Arc::new(Redis::new(url, &config.prefix, source, aliases, config.plans(limits)?, past)?))
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

/// What a worker does without Redis.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnRedisLoss {
    /// It waits until Redis is back.
    #[default]
    Stop,
    /// It goes on at a share that Redis never grants: see [`super::division`].
    Share,
}

impl Default for Config {
    fn default() -> Self {
        let Pacing { margin, jitter } = Pacing::default();
        Self {
            store: Store::default(),
            prefix: "weir".to_owned(),
            on_redis_loss: OnRedisLoss::default(),
            reserve: 0.1,
            workers_max: 4,
            share_for: Duration::from_secs(15 * 60),
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

    /// What limits come to in Redis, and without it.
    ///
    /// # Errors
    /// [`Indivisible`]: with these limits nobody can go on without Redis.
    pub fn plans(&self, limits: &Limits) -> Result<Plans, Indivisible> {
        match self.on_redis_loss {
            OnRedisLoss::Stop => Ok(Plans::whole(limits, &self.pacing())),
            OnRedisLoss::Share => {
                let division = Division { reserve: self.reserve, workers: self.workers_max };
                Plans::shared(limits, &self.pacing(), Sharing { division, lasts: self.share_for })
            }
        }
    }
}
