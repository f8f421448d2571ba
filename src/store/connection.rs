//! ClickHouse connection settings: address, user, database, timeouts.

use std::{fs, io, path::PathBuf, time::Duration};

use clickhouse::{Client, error::Error};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use tokio::time::timeout;

use super::trouble::Trouble;

/// How long the answer to a ping may take.
const PING: Duration = Duration::from_secs(5);

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
    pub password_file: Option<PathBuf>,
    /// How long one insert or statement may take.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
}

impl Default for ClickHouseConfig {
    fn default() -> Self {
        Self {
            url: "http://127.0.0.1:8123".to_owned(),
            database: "weir".to_owned(),
            user: "default".to_owned(),
            password: None,
            password_file: None,
            timeout: Duration::from_secs(60),
        }
    }
}

/// What is wrong with `[clickhouse]`.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The password's file.
    #[error("clickhouse.password_file {path:?} cannot be read: {error}")]
    PasswordFile {
        /// Which file.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// Two passwords.
    #[error("clickhouse.password and clickhouse.password_file are both set: remove one")]
    TwoPasswords,
    /// A database name that would need quoting everywhere.
    #[error("clickhouse.database is {found:?}: use letters, digits and _, not a digit first")]
    Database {
        /// The name.
        found: String,
    },
    /// Not an address.
    #[error("clickhouse.url is {found:?}: it begins with http:// or https:// and holds no user or password")]
    Url {
        /// What stands there, without what may be a secret.
        found: String,
    },
}

impl ClickHouseConfig {
    /// A client for this server and database. Makes no connection yet.
    ///
    /// # Errors
    /// [`ConnectionError`]: the configuration is wrong.
    pub(super) fn client(&self) -> Result<Client, ConnectionError> {
        Ok(self.server()?.with_database(&self.database))
    }

    /// A client that names no database: the one to create it with.
    pub(super) fn server(&self) -> Result<Client, ConnectionError> {
        self.check()?;
        let client = Client::default().with_url(&self.url).with_user(&self.user);
        Ok(match self.password()? {
            Some(password) => client.with_password(password.expose_secret()),
            None => client,
        })
    }

    fn check(&self) -> Result<(), ConnectionError> {
        let mut letters = self.database.chars();
        let first = letters.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
        if !first || !letters.all(|c| c.is_ascii_alphanumeric() || c == '_') {
            return Err(ConnectionError::Database { found: self.database.clone() });
        }
        let host = self.url.strip_prefix("http://").or_else(|| self.url.strip_prefix("https://"));
        match host {
            // A password in the address would stand in errors and logs.
            Some(host) if !host.is_empty() && !host.contains('@') => Ok(()),
            Some(host) => Err(ConnectionError::Url { found: host.rsplit('@').next().unwrap_or_default().to_owned() }),
            None => Err(ConnectionError::Url { found: self.url.rsplit('@').next().unwrap_or_default().to_owned() }),
        }
    }

    fn password(&self) -> Result<Option<SecretString>, ConnectionError> {
        match (&self.password, &self.password_file) {
            (Some(_), Some(_)) => Err(ConnectionError::TwoPasswords),
            (Some(password), None) => Ok(Some(password.clone())),
            (None, Some(path)) => match fs::read_to_string(path) {
                Ok(text) => Ok(Some(text.trim_end_matches(['\r', '\n']).into())),
                Err(error) => Err(ConnectionError::PasswordFile { path: path.clone(), error }),
            },
            (None, None) => Ok(None),
        }
    }
}

/// The database.
#[derive(Clone, Debug)]
pub struct Store {
    pub(super) client: Client,
    pub(super) timeout: Duration,
}

impl Store {
    /// The database of `config`. Nothing is sent yet, so it need not be there.
    ///
    /// # Errors
    /// [`ConnectionError`]: the configuration is wrong.
    pub fn connect(config: &ClickHouseConfig) -> Result<Self, ConnectionError> {
        Ok(Self { client: config.client()?, timeout: config.timeout })
    }

    /// ClickHouse's version: it is there, lets us in, and has our database.
    ///
    /// # Errors
    /// [`Trouble`] says what is missing.
    pub async fn ping(&self) -> Result<String, Trouble> {
        let limit = PING.min(self.timeout);
        let answer = timeout(limit, self.client.query_raw("SELECT version()").fetch_one::<String>()).await;
        Ok(answer.map_err(|_| Trouble::timed_out(limit))??)
    }

    /// Waits for an answer as long as one may take.
    ///
    /// # Errors
    /// [`Trouble`], also if there is no answer in that time.
    pub(super) async fn within<T>(&self, answer: impl Future<Output = Result<T, Error>>) -> Result<T, Trouble> {
        match timeout(self.timeout, answer).await {
            Ok(outcome) => outcome.map_err(Trouble::from),
            Err(_) => Err(Trouble::timed_out(self.timeout)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_configuration_is_refused_without_showing_a_password() {
        let with = |change: fn(&mut ClickHouseConfig)| {
            let mut config = ClickHouseConfig::default();
            change(&mut config);
            config.client().map(|_| ()).unwrap_err().to_string()
        };
        assert!(with(|c| c.database = "we ir".to_owned()).contains("\"we ir\""));
        assert!(with(|c| c.url = "127.0.0.1:8123".to_owned()).contains("http://"));
        let shown = with(|c| c.url = "http://me:hush@host:8123".to_owned());
        assert!(shown.contains("host:8123") && !shown.contains("hush"), "{shown}");
        assert!(
            with(|c| {
                c.password = Some("a".into());
                c.password_file = Some("b".into());
            })
            .contains("both")
        );
    }

    #[test]
    fn a_password_file_may_end_in_a_newline() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "s3cret\n").unwrap();
        let config = ClickHouseConfig { password_file: Some(file.path().to_owned()), ..Default::default() };
        assert_eq!(config.password().unwrap().unwrap().expose_secret(), "s3cret");
    }
}
