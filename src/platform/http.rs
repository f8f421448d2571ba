//! The vendors' HTTP client: pooled connections, one call per exchange, nothing without a limit.

use std::{error::Error, time::Duration};

use bytes::{Bytes, BytesMut};
use reqwest::{Response, Url, header};

use super::{Exchange, HttpReply, Refusal, RefusalKind};
use crate::{
    message::codec::shorten,
    runtime::clock::{Clock, Timestamp},
};

/// The longest body that is read, in bytes: far more than any product has, and little enough that its record
/// fits into a topic.
pub const BODY_LIMIT: usize = 4 * 1024 * 1024;

/// The longest time that `Retry-After` is believed.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// How much of an error's text is kept, in bytes.
const MESSAGE_LIMIT: usize = 300;

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// From the start of a call to the last byte of its reply.
    pub total: Duration,
    /// Connecting, with TLS.
    pub connect: Duration,
}

/// A pool of connections. Clones share it.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    timeout: Duration,
}

/// The client cannot be made: TLS does not start.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ClientError(String);

enum Broken {
    Transport(reqwest::Error),
    TooLong,
}

impl Client {
    /// Prepares a client. Connects to nothing.
    ///
    /// # Errors
    /// [`ClientError`] if the TLS library does not start.
    pub fn new(timeouts: Timeouts) -> Result<Self, ClientError> {
        let http = reqwest::Client::builder()
            .user_agent(concat!("weir/", env!("CARGO_PKG_VERSION")))
            .timeout(timeouts.total)
            .connect_timeout(timeouts.connect)
            .tcp_nodelay(true)
            .tcp_keepalive(Duration::from_secs(30))
            .http2_adaptive_window(true)
            // A redirect would send the secrets in the form to somebody else, and a call that is repeated
            // behind our back would have no slot.
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .referer(false)
            .no_proxy()
            .build();
        http.map(|http| Self { http, timeout: timeouts.total }).map_err(|error| ClientError(chain(&error)))
    }

    /// How long one call takes at most.
    #[must_use]
    pub const fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Makes one call: posts the form and reads the whole reply, whatever its status.
    ///
    /// # Errors
    /// A [`Refusal`] of kind [`RefusalKind::Outage`] if there is no whole reply, with one of the codes
    /// `timeout`, `connect`, `dns`, `tls`, `closed` and `body`.
    ///
    /// # Cancellation
    /// Dropping the future closes the connection (HTTP/1.1) or resets the stream (HTTP/2); the vendor may
    /// have counted the call.
    pub async fn exchange(&self, exchange: &Exchange) -> Result<HttpReply, Refusal> {
        self.attempt(exchange).await.map_err(|broken| broken.refusal(&exchange.url))
    }

    async fn attempt(&self, exchange: &Exchange) -> Result<HttpReply, Broken> {
        let sent = self.http.post(&exchange.url).form(&exchange.form).send().await;
        let response = sent.map_err(Broken::Transport)?;
        let status = response.status().as_u16();
        let retry_after = retry_after_of(&response);
        Ok(HttpReply { status, retry_after, body: body(response).await? })
    }
}

async fn body(mut response: Response) -> Result<Bytes, Broken> {
    let announced = response.content_length().unwrap_or(0);
    if announced > BODY_LIMIT as u64 {
        return Err(Broken::TooLong);
    }
    let Some(first) = response.chunk().await.map_err(Broken::Transport)? else {
        return Ok(Bytes::new());
    };
    let Some(second) = response.chunk().await.map_err(Broken::Transport)? else {
        return if first.len() > BODY_LIMIT { Err(Broken::TooLong) } else { Ok(first) };
    };
    let mut body =
        BytesMut::with_capacity(usize::try_from(announced).unwrap_or(0).max(2 * (first.len() + second.len())));
    body.extend_from_slice(&first);
    let mut next = Some(second);
    while let Some(chunk) = next {
        if body.len() + chunk.len() > BODY_LIMIT {
            return Err(Broken::TooLong);
        }
        body.extend_from_slice(&chunk);
        next = response.chunk().await.map_err(Broken::Transport)?;
    }
    Ok(body.freeze())
}

impl Broken {
    fn refusal(self, url: &str) -> Refusal {
        let to = url.split(['?', '#']).next().unwrap_or_default();
        let (kind, code, why) = match self {
            Self::TooLong => (RefusalKind::Outage, "body", format!("the reply has more than {BODY_LIMIT} bytes")),
            Self::Transport(error) if error.is_builder() => (RefusalKind::Bug, "url", chain(&error.without_url())),
            Self::Transport(error) => {
                let error = error.without_url();
                let why = chain(&error);
                (RefusalKind::Outage, code_of(&error, &why), why)
            }
        };
        let message = format!("POST {to}: {why}");
        Refusal { kind, code: code.to_owned(), message: shorten(&message, MESSAGE_LIMIT).into_owned() }
    }
}

fn code_of(error: &reqwest::Error, why: &str) -> &'static str {
    let says = |words: &[&str]| words.iter().any(|word| why.contains(word));
    if error.is_connect() && says(&["dns error"]) {
        "dns"
    } else if error.is_connect() && says(&["SSL", "ssl", "TLS", "tls", "certificate"]) {
        "tls"
    } else if error.is_connect() {
        "connect"
    } else if error.is_timeout() {
        "timeout"
    } else if error.is_body() || error.is_decode() {
        "body"
    } else {
        "closed"
    }
}

/// An error and its causes in one line, no words twice.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = error.source();
    }
    text
}

/// Whether a text is a URL that paths can be added to, without anything secret in it.
pub(super) fn is_base_url(text: &str) -> bool {
    let Ok(url) = text.parse::<Url>() else {
        return false;
    };
    let is_http = matches!(url.scheme(), "http" | "https") && url.has_host();
    is_http
        && url.query().is_none()
        && url.fragment().is_none()
        && url.username().is_empty()
        && url.password().is_none()
}

/// A URL with these parameters as its query; nothing if it is no URL.
pub(super) fn with_query(url: &str, params: &[(&str, &str)]) -> Option<String> {
    Url::parse_with_params(url, params).ok().map(String::from)
}

fn retry_after_of(response: &Response) -> Option<Duration> {
    let text = |name| response.headers().get(name)?.to_str().ok();
    let value = text(header::RETRY_AFTER)?;
    // A date is meant on the sender's clock, which it sends along.
    let now = text(header::DATE).and_then(http_date).unwrap_or_else(|| Clock::System.now());
    retry_after(value, now)
}

/// The time from `now` that a `Retry-After` in either form asks for, at most [`RETRY_AFTER_MAX`].
///
/// Nothing if it is garbage, zero or in the past: the caller then backs off by its own rule.
#[must_use]
pub fn retry_after(value: &str, now: Timestamp) -> Option<Duration> {
    let value = value.trim();
    let wait = if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        value.parse().map_or(RETRY_AFTER_MAX, Duration::from_secs)
    } else {
        http_date(value)?.since(now)
    };
    (!wait.is_zero()).then(|| wait.min(RETRY_AFTER_MAX))
}

/// A date in the form of today or in one of the two older ones that RFC 9110 has recipients accept.
fn http_date(text: &str) -> Option<Timestamp> {
    let older = || {
        let formats = ["%A, %d-%b-%y %H:%M:%S GMT", "%a %b %e %H:%M:%S %Y"];
        let civil = formats.iter().find_map(|format| jiff::civil::DateTime::strptime(format, text).ok())?;
        civil.to_zoned(jiff::tz::TimeZone::UTC).ok()
    };
    let at = jiff::fmt::rfc2822::parse(text).ok().or_else(older)?;
    Some(Timestamp::from_millis(at.timestamp().as_millisecond()))
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
