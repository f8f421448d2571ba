//! The webhook: one POST of JSON for the end of a batch.

use std::time::Duration;

use reqwest::{Client, Url};
use secrecy::{ExposeSecret, SecretString};

use super::Config;
use crate::{
    message::{BatchEnd, codec},
    runtime::{error_chain::chain, http_client},
};

/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Where ends are posted to. Its address and its key are never shown: the address of a hook is often its key.
#[derive(Clone, Debug)]
pub struct Webhook {
    client: Client,
    url: SecretString,
    authorization: Option<SecretString>,
}

/// Why a webhook cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    /// The address.
    #[error("batches.webhook must be an http:// or https:// address")]
    Address,
    /// TLS.
    #[error("the client for batches.webhook cannot be made: {0}")]
    Client(String),
}

impl Webhook {
    /// The webhook of the configuration, if it names one. Connects to nothing.
    ///
    /// # Errors
    /// [`WebhookError`]
    pub fn open(config: &Config) -> Result<Option<Self>, WebhookError> {
        let Some(url) = &config.webhook else { return Ok(None) };
        let address = Url::parse(url.expose_secret()).map_err(|_| WebhookError::Address)?;
        if !matches!(address.scheme(), "http" | "https") || !address.has_host() {
            return Err(WebhookError::Address);
        }
        let client = http_client::builder()
            .timeout(TIMEOUT)
            .build()
            .map_err(|error| WebhookError::Client(error.without_url().to_string()))?;
        Ok(Some(Self { client, url: url.clone(), authorization: config.authorization.clone() }))
    }

    /// Posts the end of a batch.
    ///
    /// # Errors
    /// Why it was not taken, in words without the address. It may have been taken all the same.
    pub async fn post(&self, end: &BatchEnd) -> Result<(), String> {
        let post = self.client.post(self.url.expose_secret()).header("content-type", "application/json");
        let mut post = post.body(codec::json_of(end));
        if let Some(authorization) = &self.authorization {
            post = post.header("authorization", authorization.expose_secret());
        }
        let answer = post.send().await.map_err(|error| chain(&error.without_url()))?;
        let status = answer.status();
        if status.is_success() { Ok(()) } else { Err(format!("it answered HTTP {status}")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(url: &str) -> Result<Option<Webhook>, WebhookError> {
        Webhook::open(&Config { webhook: Some(url.into()), ..Config::default() })
    }

    #[test]
    fn an_address_is_taken_only_if_something_can_be_posted_there() {
        for bad in ["", "hooks.example/x", "ftp://hooks.example/x", "https://"] {
            assert!(matches!(open(bad), Err(WebhookError::Address)), "{bad}");
        }
        let hook = open("https://hooks.example/s3cret").unwrap();
        assert!(hook.is_some() && !format!("{hook:?}").contains("s3cret"));
        assert!(Webhook::open(&Config::default()).unwrap().is_none());
    }
}
