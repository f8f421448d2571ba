//! The HTTP client settings shared by vendors, webhooks and weir's own processes.

use reqwest::{Client, ClientBuilder, redirect, retry};

/// A client that calls once, where it was sent: a redirect would carry keys to somebody else, and a call that is repeated
/// behind our back is in nobody's books. Timeouts and proxies are the caller's: by default there is no timeout, and the
/// environment's proxies are used.
pub fn builder() -> ClientBuilder {
    Client::builder()
        .user_agent(concat!("weir/", env!("CARGO_PKG_VERSION")))
        .redirect(redirect::Policy::none())
        .retry(retry::never())
        .referer(false)
}
