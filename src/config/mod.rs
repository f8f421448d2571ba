//! The only reader of the configuration file and the environment.
//!
//! [`load`] puts the layers on each other (defaults, file, environment: `layers`), turns them into each
//! module's own `Config` and collects everything that is wrong (`problem`, `check`) before it gives up.
//! [`Config::redacted`] prints what is in effect, without secrets.

mod check;
mod layers;
mod print;
mod problem;

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

pub use problem::{ConfigError, Problem};

use crate::{
    batches,
    cache::{self, Cache},
    changes, fetch, kafka,
    message::SourceName,
    platform::SourceConfig,
    quota, retry,
    runtime::{health, logging},
    serve, sink, store,
    tokens::{self, TokenStore},
    topics,
};

/// The file that is read if nobody names another, as far as it exists.
pub const DEFAULT_FILE: &str = "weir.toml";

/// Everything that can be set. Each section belongs to the module that uses it.
#[derive(Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The file that it was read from, if any.
    #[serde(skip)]
    pub file: Option<PathBuf>,
    /// `[instance]`
    pub instance: Instance,
    /// `[kafka]`
    pub kafka: kafka::client::Config,
    /// `[topics]`
    pub topics: topics::Config,
    /// `[clickhouse]`; a relative `password_file` has been joined to the file's folder.
    pub clickhouse: store::ClickHouseConfig,
    /// `[redis]`
    pub redis: Redis,
    /// `[cache]`
    pub cache: cache::Config,
    /// `[fetch]`
    pub fetch: fetch::Config,
    /// `[quota]`
    pub quota: quota::Config,
    /// `[tokens]`
    pub tokens: tokens::Config,
    /// `[retry]`
    pub retry: retry::Config,
    /// `[changes]`
    pub changes: changes::Config,
    /// `[sink]`
    pub sink: sink::Config,
    /// `[serve]`
    pub serve: serve::Config,
    /// `[batches]`
    pub batches: batches::Config,
    /// `[http]`
    pub http: health::Config,
    /// `[log]`
    pub log: logging::Config,
    /// `[[calendar]]`, in the order of the file.
    pub calendar: Vec<quota::calendar::Window>,
    /// `[[source]]`, in the order of the file.
    #[serde(rename = "source")]
    pub sources: Vec<SourceConfig>,
}

/// `[instance]`: this process among others.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Instance {
    /// A name that stays the same over restarts and that no other process has at the same time:
    /// `transactional.id` and `group.instance.id` follow from it.
    pub name: String,
}

impl Default for Instance {
    fn default() -> Self {
        Self { name: hostname() }
    }
}

/// `[redis]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Redis {
    /// `redis://[user:password@]host:port/db`, or `rediss://` with TLS; without it weir does without Redis.
    pub url: Option<SecretString>,
}

/// As [`Config::redacted`]: properties of Kafka may hold passwords.
impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.redacted())
    }
}

impl Config {
    /// The source of this name.
    #[must_use]
    pub fn source(&self, name: &str) -> Option<&SourceConfig> {
        self.sources.iter().find(|source| source.common.name.as_str() == name)
    }

    /// The names of all sources, in the order of the file.
    #[must_use]
    pub fn source_names(&self) -> Vec<SourceName> {
        self.sources.iter().map(|source| source.common.name.clone()).collect()
    }

    /// What is wrong with it beyond the form: limits, duplicates, names that Kafka does not take.
    #[must_use]
    pub fn validate(&self) -> Vec<Problem> {
        check::problems(self)
    }

    /// What is in effect, as TOML; every secret is `***`.
    #[must_use]
    pub fn redacted(&self) -> String {
        print::redacted(self)
    }

    /// Where renewed tokens are kept. Connects to nothing.
    ///
    /// # Errors
    /// `OpenError` of the tokens, which [`load`] has excluded.
    pub fn token_store(&self) -> anyhow::Result<Arc<dyn TokenStore>> {
        let redis = self.redis.url.as_ref().map(ExposeSecret::expose_secret);
        Ok(tokens::open(&self.tokens, self.folder(), redis, &self.quota.prefix)?)
    }

    /// The cache, as it is configured. Connects in the background.
    ///
    /// # Errors
    /// `InvalidUrl` of Redis.
    pub fn open_cache(&self) -> anyhow::Result<Cache> {
        let redis = self.redis.url.as_ref().map(ExposeSecret::expose_secret);
        Ok(Cache::open(&self.cache, redis)?)
    }

    /// Where relative paths begin: the file's folder, without a file the working directory.
    #[must_use]
    pub fn folder(&self) -> &Path {
        let parent = self.file.as_deref().and_then(Path::parent);
        parent.filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
    }
}

/// Reads `file` (or `./weir.toml` if it exists) and the environment.
///
/// # Errors
/// [`ConfigError`], which lists every problem with its key and its place.
pub fn load(file: Option<&Path>) -> Result<Config, ConfigError> {
    let file = file.or_else(|| Some(Path::new(DEFAULT_FILE)).filter(|path| path.exists()));
    let text = file.map(read_file).transpose()?;
    read(
        file.zip(text.as_deref()),
        std::env::vars_os().filter_map(|(name, value)| {
            // Variables that are not UTF-8 cannot be ours.
            Some((name.into_string().ok()?, value.into_string().ok()?))
        }),
    )
}

fn read_file(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|error| ConfigError::Unreadable { path: path.to_owned(), error })
}

/// The same from memory: a file's path and text, and the variables.
fn read(
    file: Option<(&Path, &str)>,
    variables: impl IntoIterator<Item = (String, String)>,
) -> Result<Config, ConfigError> {
    let (mut config, mut problems) = layers::assemble(file, variables)?;
    config.file = file.map(|(path, _)| path.to_owned());
    config.kafka.logs = kafka::log_names::Logs::noted_on(&topics::Topics::new(config.topics.clone()).control());
    let folder = config.folder().to_owned();
    if let Some(path) = config.clickhouse.password_file.as_mut().filter(|path| path.is_relative()) {
        *path = folder.join(&path);
    }
    problems.extend(config.validate());
    if problems.is_empty() { Ok(config) } else { Err(ConfigError::Invalid(problems)) }
}

/// A variable that the configuration names, such as one with a secret.
#[must_use]
pub fn variable(name: &str) -> Option<String> {
    #[allow(clippy::disallowed_methods, reason = "the one place that reads the environment")]
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The machine's name; in a container that is stable, its pod's.
fn hostname() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let name = name.map(|name| name.trim().to_owned()).filter(|name| !name.is_empty());
    name.or_else(|| variable("HOSTNAME")).unwrap_or_else(|| "weir".to_owned())
}

#[cfg(test)]
mod tests;
