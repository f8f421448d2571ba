//! Addresses that calls leave from: the machine's own, another of its own, or a proxy; and who uses which.
//!
//! An account keeps to one address: the one that it names, or else one chosen by rendezvous hashing (Thaler and
//! Ravishankar 1998), so that of n addresses one more takes over every (n + 1)th account and moves nobody else.
//! A vendor that bans looks at who comes from where.

use std::{cmp::Reverse, collections::HashSet, net::IpAddr, time::Duration};

use secrecy::ExposeSecret;
use serde::{Deserialize, Serialize};
use sha1::{Digest, Sha1};

use super::{
    route::{Address, Credentials, Route, is_proxy_url},
    secrets::{SecretError, SecretRef, Surroundings},
};
use crate::{message::AccountAlias, quota::Limit};

/// `[[source.address]]`: a proxy (`url`), an address of this machine (`local`), or, with neither, whichever
/// address the system takes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddressConfig {
    /// What accounts and logs call it.
    pub name: String,
    /// A proxy: `http://host:port`, `https://…`, `socks5://…` (we resolve names) or `socks5h://…` (it does).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Where the proxy's `user:password` is, if it wants one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<SecretRef>,
    /// An IP address of this machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<IpAddr>,
    /// What the vendor allows it, if it differs from the source's `address_limit`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<Limit>,
}

/// `[source.address_health]`: when an address is taken out, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HealthConfig {
    /// So many failed connections in a row take an address out.
    pub failures: u32,
    /// For how long at first; it doubles each time that the call which probes it fails too …
    #[serde(with = "humantime_serde")]
    pub rest: Duration,
    /// … up to this.
    #[serde(with = "humantime_serde")]
    pub rest_max: Duration,
    /// Whether its accounts call from another address meanwhile. By default they wait: to a vendor that bans, an
    /// account that hops between addresses looks like a stolen one, and a ban costs more than the wait.
    pub failover: bool,
}

impl Default for HealthConfig {
    fn default() -> Self {
        Self { failures: 3, rest: Duration::from_secs(30), rest_max: Duration::from_secs(600), failover: false }
    }
}

/// Why addresses cannot be used. No message has a secret in it.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// A key has a value that it cannot have.
    #[error("address {name}: {key} is {found}; it must be {allowed}")]
    Key {
        /// Which address.
        name: String,
        /// The key.
        key: &'static str,
        /// Its value.
        found: String,
        /// What it may be.
        allowed: &'static str,
    },
    /// Two addresses of one name.
    #[error("address {0} is declared twice: each name stands for one address of a source")]
    Duplicate(String),
    /// An account wants an address that is none.
    #[error("account {alias}: there is no address {wanted:?}; declared: {declared}")]
    Unknown {
        /// Which account.
        alias: AccountAlias,
        /// What it wants.
        wanted: String,
        /// What there is.
        declared: String,
    },
    /// Its credentials cannot be had.
    #[error(transparent)]
    Secret(#[from] SecretError),
}

impl AddressConfig {
    fn check(&self) -> Result<(), AddressError> {
        let wrong =
            |key, found: String, allowed| Err(AddressError::Key { name: self.name.clone(), key, found, allowed });
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if !(1..=64).contains(&self.name.len()) || !self.name.bytes().all(is_name) {
            return wrong("name", format!("{:?}", self.name), "1 to 64 ASCII letters, digits, - _ .");
        }
        if let Some(url) = &self.url
            && !is_proxy_url(url)
        {
            // What stands there may be a password.
            let found = if url.contains('@') { "a URL with credentials".to_owned() } else { format!("{url:?}") };
            return wrong("url", found, "http, https, socks5 or socks5h ://host:port; a password goes to credentials");
        }
        if self.url.is_some() && self.local.is_some() {
            return wrong("local", "set together with url".to_owned(), "left out: a proxy has an address of its own");
        }
        if self.credentials.is_some() && self.url.is_none() {
            return wrong("credentials", "set without url".to_owned(), "left out: only a proxy asks for them");
        }
        if let Some(Err(problem)) = self.limit.as_ref().map(Limit::validate) {
            return wrong("limit", problem.to_string(), "as that says");
        }
        Ok(())
    }

    fn open(&self, at: Surroundings<'_>) -> Result<Address, AddressError> {
        let what = format!("address {}: credentials", self.name);
        let credentials = self.credentials.as_ref().map(|secret| secret.resolve(&what, at)).transpose()?;
        if credentials.as_ref().is_some_and(|secret| !secret.expose_secret().contains(':')) {
            let (name, found) = (self.name.clone(), "a text without a colon".to_owned());
            return Err(AddressError::Key { name, key: "credentials", found, allowed: "user:password" });
        }
        let route = match (&self.url, self.local) {
            (Some(url), _) => {
                Route::Proxy { url: url.clone(), credentials: credentials.as_ref().map(Credentials::read) }
            }
            (None, Some(local)) => Route::Local(local),
            (None, None) => Route::Direct,
        };
        Ok(Address { name: self.name.clone(), route, limit: self.limit.clone() })
    }
}

/// The addresses of a source; the machine's own if none is declared.
///
/// # Errors
/// [`AddressError`] for the first one that cannot be used.
pub(super) fn open(addresses: &[AddressConfig], at: Surroundings<'_>) -> Result<Vec<Address>, AddressError> {
    let mut names = HashSet::new();
    for address in addresses {
        address.check()?;
        if !names.insert(&address.name) {
            return Err(AddressError::Duplicate(address.name.clone()));
        }
    }
    if addresses.is_empty() {
        return Ok(vec![Address { name: "direct".to_owned(), route: Route::Direct, limit: None }]);
    }
    addresses.iter().map(|address| address.open(at)).collect()
}

/// The address that an account's calls leave from, and all others in the order in which they replace it.
///
/// # Errors
/// [`AddressError::Unknown`] if it names one that is not there.
pub(super) fn assign(
    alias: &AccountAlias,
    wanted: Option<&str>,
    addresses: &[Address],
) -> Result<Vec<usize>, AddressError> {
    let mut order: Vec<usize> = (0..addresses.len()).collect();
    order.sort_by_cached_key(|index| Reverse(weight(alias.as_str(), &addresses[*index].name)));
    let Some(wanted) = wanted else { return Ok(order) };
    let Some(home) = order.iter().position(|index| addresses[*index].name == wanted) else {
        let declared: Vec<_> = addresses.iter().map(|address| address.name.as_str()).collect();
        let declared = declared.join(", ");
        return Err(AddressError::Unknown { alias: alias.clone(), wanted: wanted.to_owned(), declared });
    };
    order[..=home].rotate_right(1);
    Ok(order)
}

/// How much an account is drawn to an address: the same on every machine and in every version.
fn weight(alias: &str, address: &str) -> u64 {
    let digest = Sha1::new().chain_update(alias).chain_update([0]).chain_update(address).finalize();
    digest.iter().take(8).fold(0, |bits, byte| bits << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn addresses(count: usize) -> Vec<Address> {
        let address = |index| Address { name: format!("proxy-{index}"), route: Route::Direct, limit: None };
        (0..count).map(address).collect()
    }

    fn alias(number: usize) -> AccountAlias {
        AccountAlias::new(format!("shop-{number}")).unwrap()
    }

    fn home(number: usize, addresses: &[Address]) -> usize {
        assign(&alias(number), None, addresses).unwrap()[0]
    }

    #[test]
    fn accounts_are_spread_evenly_and_one_more_address_moves_only_its_own() {
        let (four, five) = (addresses(4), addresses(5));
        let mut counts = [0; 4];
        let mut moved = 0;
        for number in 0..10_000 {
            let (before, after) = (home(number, &four), home(number, &five));
            counts[before] += 1;
            moved += usize::from(before != after);
            assert!(before == after || after == 4, "nobody moves between addresses that were there before");
        }
        assert!(counts.iter().all(|count| (2_350..2_650).contains(count)), "{counts:?}");
        assert!((1_850..2_150).contains(&moved), "a fifth of 10,000 moves: {moved}");
    }

    #[test]
    fn the_order_of_the_declarations_changes_nothing() {
        let mut turned = addresses(7);
        turned.reverse();
        for number in 0..100 {
            let (one, other) = (home(number, &addresses(7)), home(number, &turned));
            assert_eq!(addresses(7)[one].name, turned[other].name);
        }
    }

    #[test]
    fn an_account_may_name_its_address_and_keeps_the_others_as_fallbacks() {
        let order = assign(&alias(1), Some("proxy-2"), &addresses(4)).unwrap();
        assert_eq!(order[0], 2);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, [0, 1, 2, 3]);
        let unknown = assign(&alias(1), Some("proxy-9"), &addresses(2)).unwrap_err().to_string();
        assert_eq!(unknown, "account shop-1: there is no address \"proxy-9\"; declared: proxy-0, proxy-1");
    }

    #[test]
    fn what_cannot_be_an_address_is_refused_and_its_password_is_not_shown() {
        use figment::providers::{Format, Toml};
        let read = |text: &str| {
            let config = <Toml as Format>::from_str::<AddressConfig>(text).map_err(|error| error.to_string())?;
            let env = |name: &str| (name == "P").then(|| "user:hunter22".to_owned());
            let at = Surroundings { folder: Path::new("/nowhere"), env: &env };
            open(&[config], at).map_err(|error| error.to_string())
        };
        let table = [
            ("name = \"\"", "name is \"\""),
            ("name = \"a b\"", "1 to 64 ASCII"),
            ("name = \"a\"\nurl = \"ftp://proxy:21\"", "url is \"ftp://proxy:21\"; it must be http, https, socks5"),
            ("name = \"a\"\nurl = \"http://u:hunter22@proxy:21\"", "url is a URL with credentials"),
            ("name = \"a\"\nurl = \"http://proxy:1\"\nlocal = \"127.0.0.2\"", "local is set together with url"),
            ("name = \"a\"\ncredentials = { env = \"P\" }", "credentials is set without url"),
            ("name = \"a\"\nurl = \"http://proxy:1\"\ncredentials = { env = \"NONE\" }", "NONE is not set"),
            ("name = \"a\"\nlocal = \"here\"", "invalid IP address"),
            ("name = \"a\"\nlimit = { calls = 0, per = \"1s\" }", "limit is calls = 0"),
            ("name = \"a\"\ncolour = \"red\"", "unknown field `colour`"),
        ];
        for (text, expected) in table {
            let message = read(text).unwrap_err();
            assert!(message.contains(expected), "{message:?} should say {expected:?}");
            assert!(!message.contains("hunter22"), "{message}");
        }
        let proxy = read("name = \"a\"\nurl = \"socks5://proxy:1080\"\ncredentials = { env = \"P\" }").unwrap();
        assert!(!format!("{proxy:?}").contains("hunter22"), "{proxy:?}");
    }
}
