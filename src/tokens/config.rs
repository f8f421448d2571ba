//! `[tokens]`: where renewed tokens are kept.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};

use super::{
    TokenStore,
    file::FileStore,
    redis::RedisStore,
    seal::{InvalidKey, Sealer},
};

/// `[tokens]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where.
    pub store: Store,
    /// The file, if there; a relative path begins at the configuration's folder.
    pub file: PathBuf,
    /// Seals what is in Redis: 32 bytes in base64 or hex. From `WEIR_TOKENS__KEY` only.
    pub key: Option<SecretString>,
}

impl Default for Config {
    fn default() -> Self {
        Self { store: Store::default(), file: PathBuf::from(".weir/tokens.json"), key: None }
    }
}

/// Where renewed tokens are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Store {
    /// In a file that only its owner can read, for the processes of one machine.
    #[default]
    File,
    /// In Redis at `redis.url`, sealed, for any number of machines.
    Redis,
}

/// Why there is no store.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// `store = "redis"` alone.
    #[error("tokens.store is \"redis\" but redis.url is not set: set it, or use \"file\" on one machine")]
    NoUrl,
    /// No key to seal with.
    #[error(
        "tokens.store is \"redis\" but there is no key to seal the tokens with: set WEIR_TOKENS__KEY, the same for all processes: openssl rand -base64 32"
    )]
    NoKey,
    /// A key that is none.
    #[error("WEIR_TOKENS__KEY {0}")]
    Key(#[from] InvalidKey),
    /// Redis' address is none.
    #[error("redis.url cannot be used: {0}")]
    Url(#[from] ::redis::RedisError),
}

/// The store as it is configured. Connects to nothing.
///
/// # Errors
/// `OpenError` says which setting is missing or wrong.
pub fn open(
    config: &Config,
    folder: &Path,
    redis: Option<&str>,
    prefix: &str,
) -> Result<Arc<dyn TokenStore>, OpenError> {
    match config.store {
        Store::File => Ok(Arc::new(FileStore::new(folder.join(&config.file)))),
        Store::Redis => {
            let key = config.key.as_ref().ok_or(OpenError::NoKey)?;
            let sealer = Sealer::new(key.expose_secret())?;
            Ok(Arc::new(RedisStore::new(redis.ok_or(OpenError::NoUrl)?, prefix, sealer)?))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redis_needs_a_url_and_a_key_that_is_one() {
        let with = |key: Option<&str>, url| {
            let config = Config { store: Store::Redis, key: key.map(Into::into), ..Config::default() };
            open(&config, Path::new("."), url, "weir").err().map(|error| error.to_string()).unwrap_or_default()
        };
        let (key, url) = (Some("a".repeat(64)), Some("redis://127.0.0.1:1"));
        assert!(with(None, url).contains("openssl rand -base64 32"));
        assert!(with(Some("hunter2"), url).contains("32 bytes") && !with(Some("hunter2"), url).contains("hunter2"));
        assert!(with(key.as_deref(), None).contains("redis.url"));
        assert_eq!(with(key.as_deref(), url), "");
    }
}
