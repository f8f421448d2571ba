//! How calls leave: from the machine's own address, from another one of its own, or through a proxy.

use std::net::IpAddr;

use reqwest::Url;
use secrecy::{ExposeSecret, SecretString};

use crate::quota::Limit;

/// An address that is ready to be called from.
#[derive(Clone, Debug)]
pub struct Address {
    /// What accounts and logs call it.
    pub name: String,
    /// How its calls leave.
    pub route: Route,
    /// What the vendor allows it, if it differs from the others.
    pub limit: Option<Limit>,
}

/// How calls leave.
#[derive(Clone, Debug)]
pub enum Route {
    /// From whichever address the system takes.
    Direct,
    /// From this address of the machine.
    Local(IpAddr),
    /// Through a proxy.
    Proxy {
        /// Without anything secret.
        url: String,
        /// If the proxy wants some.
        credentials: Option<Credentials>,
    },
}

/// A proxy's user and password.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// Many proxies put a session's id here, so that it is no less secret.
    pub user: SecretString,
    /// The password.
    pub password: SecretString,
}

impl Credentials {
    /// Of `user:password`.
    pub(super) fn read(text: &SecretString) -> Self {
        let (user, password) = text.expose_secret().split_once(':').unwrap_or_default();
        Self { user: user.into(), password: password.into() }
    }
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

/// Whether a text is a proxy's URL: scheme, host and perhaps a port, and nothing secret.
pub(super) fn is_proxy_url(text: &str) -> bool {
    let Ok(url) = text.parse::<Url>() else {
        return false;
    };
    matches!(url.scheme(), "http" | "https" | "socks5" | "socks5h")
        && url.has_host()
        && matches!(url.path(), "" | "/")
        && url.query().is_none()
        && url.fragment().is_none()
        && url.username().is_empty()
        && url.password().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_url_has_a_host_and_nothing_secret() {
        for right in ["https://gw.open.1688.com", "http://127.0.0.1:8080", "https://proxy/1688/"] {
            assert!(is_base_url(right), "{right}");
        }
        for wrong in
            ["", "gw.open.1688.com", "ftp://gw", "https://", "https://u:p@gw", "https://gw/?k=1", "https://gw/#x"]
        {
            assert!(!is_base_url(wrong), "{wrong}");
        }
    }
}
