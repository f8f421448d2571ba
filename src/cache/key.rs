//! The cache key: source, item, and everything else that changes the reply. Pure.

use std::{fmt, sync::Arc};

use super::config::SourceCache;
use crate::message::{Request, SourceName};

/// A longer key is not worth the room: such requests are always called for.
const LIMIT: usize = 1_024;

/// What one answer is kept under. Two requests have the same key only if the vendor is asked the same.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(Arc<str>);

impl Key {
    /// Its text: printable ASCII without spaces or braces.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// One that was read from somewhere, as it stands.
    #[must_use]
    pub fn from_text(text: &str) -> Self {
        Self(text.into())
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A source, as far as its cache has to know it.
pub trait CachedSource {
    /// Its name.
    fn name(&self) -> &SourceName;

    /// How long its answers count; `None`: they are not given again.
    fn cache(&self) -> Option<&SourceCache>;

    /// A digest of everything in its configuration that may change a reply: with another one its cache begins anew.
    fn digest(&self) -> &str;
}

/// Makes the keys of one source.
#[derive(Clone, Debug)]
pub struct Keys {
    /// The source and what it is asked for: `ali1688/3f2a…/`.
    prefix: String,
}

impl Keys {
    /// The keys of a source as it is configured: with another API, other columns or other fixed parameters, nothing
    /// that was kept before fits. Its protocol says what of its keys decides a reply.
    #[must_use]
    pub fn new(source: &impl CachedSource) -> Self {
        let mut prefix = String::new();
        encode(&mut prefix, source.name().as_str());
        Self { prefix: format!("{prefix}/{}/", source.digest()) }
    }

    /// The key of a request; `None` if it would be too long.
    #[must_use]
    pub fn key(&self, request: &Request) -> Option<Key> {
        let mut text = String::with_capacity(self.prefix.len() + 64);
        text.push_str(&self.prefix);
        encode(&mut text, request.item.as_str());
        // A map: in the order of the names, each once.
        for (index, (name, value)) in request.params.iter().enumerate() {
            text.push(if index == 0 { '?' } else { '&' });
            encode(&mut text, name);
            text.push('=');
            encode(&mut text, value);
        }
        (text.len() <= LIMIT).then(|| Key(text.into()))
    }
}

/// Everything but letters, digits, `-`, `_` and `.` as `%XX`: what separates parts cannot stand inside one.
fn encode(text: &mut String, part: &str) {
    for byte in part.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.".contains(&byte) {
            text.push(char::from(byte));
        } else {
            let digit = |nibble: u8| char::from(b"0123456789ABCDEF"[usize::from(nibble)]);
            text.extend(['%', digit(byte >> 4), digit(byte & 15)]);
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::{message::ItemId, platform::SourceConfig};

    pub fn source(more: &str) -> SourceConfig {
        use figment::providers::{Format, Toml};
        let text = format!("name = \"ali1688\"\nkind = \"ali1688\"\n{more}");
        <Toml as Format>::from_str(&text).unwrap()
    }

    fn request(item: &str, params: &[(&str, &str)]) -> Request {
        let params = params.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Request { params, ..Request::new(ItemId::new(item).unwrap()) }
    }

    #[test]
    fn every_parameter_that_changes_the_reply_is_in_the_key() {
        let keys = Keys::new(&source(""));
        let key = |request: &Request| keys.key(request).unwrap();
        let plain = key(&request("1", &[]));
        assert!(plain.as_str().starts_with("ali1688/") && plain.as_str().ends_with("/1"), "{plain}");
        let all = [
            plain,
            key(&request("2", &[])),
            key(&request("1", &[("zip", "10001")])),
            key(&request("1", &[("zip", "10002")])),
            key(&request("1", &[("marketplace", "10001")])),
            key(&request("1", &[("fields", "a"), ("promotion", "b")])),
            key(&request("1", &[("fields", "a&promotion=b")])),
            key(&request("1?fields=a", &[])),
        ];
        let distinct: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len(), "{all:?}");
    }

    #[test]
    fn what_changes_no_reply_is_not_in_the_key() {
        let keys = Keys::new(&source(""));
        let batch = Some(crate::message::BatchId::new("monday").unwrap());
        let other = Request { batch, calls: 3, max_age: None, ..request("1", &[]) };
        assert_eq!(keys.key(&other), keys.key(&request("1", &[])));
        let slower = Keys::new(&source("timeout = \"5s\"\nunlimited = true\ncalls_in_flight = 7\nexpress_share = 0.3"));
        assert_eq!(slower.key(&other), keys.key(&other));
        let steadier = Keys::new(&source("breaker = { share = 0.9 }\nfallback = \"taobao\""));
        assert_eq!(steadier.key(&other), keys.key(&other));
        for more in ["version = \"2\"", "params = { webSite = \"alibaba\" }", "columns = { title = \"/a\" }"] {
            assert_ne!(Keys::new(&source(more)).key(&other), keys.key(&other), "{more}");
        }
    }

    #[test]
    fn an_endless_parameter_is_not_kept() {
        assert_eq!(Keys::new(&source("")).key(&request("1", &[("q", &"x".repeat(2_000))])), None);
    }

    fn any_params() -> impl Strategy<Value = BTreeMap<String, String>> {
        proptest::collection::btree_map("[a-b=&?/%]{0,3}", "[a-b=&?/%]{0,3}", 0..3)
    }

    proptest! {
        #[test]
        fn two_requests_have_one_key_only_if_they_ask_the_same(
            one in ("[1-2?&=/%]{1,3}", any_params()), two in ("[1-2?&=/%]{1,3}", any_params()),
        ) {
            let keys = Keys::new(&source(""));
            let key = |(item, params): &(String, BTreeMap<String, String>)| {
                keys.key(&Request { params: params.clone(), ..Request::new(ItemId::new(item.as_str()).unwrap()) })
            };
            prop_assert_eq!(key(&one) == key(&two), one == two);
        }
    }
}
