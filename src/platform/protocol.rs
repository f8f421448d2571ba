//! The protocols that a source can speak: one table of them, and what is made of a source's keys.
//!
//! A protocol owns its keys of `[[source]]`: their defaults, their check, their documentation, and which of them decide
//! what a reply says. Whoever adds one writes a type that is `Keys`, and a line in `KINDS`.

#![allow(clippy::result_large_err, reason = "figment's, and read once at a start")]

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, LazyLock, OnceLock},
};

use figment::{
    Error,
    error::Kind as Wrong,
    value::{Dict, Value},
};
use schemars::{JsonSchema, Schema};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, DeserializeOwned, Error as _, IntoDeserializer},
};
use sha1::{Digest as _, Sha1};

use super::{Vendor, ali1688, problem::Problem, reseller, taobao};

/// Every protocol, in the order in which people are told of them.
static KINDS: [Kind; 3] = [Kind::of::<ali1688::Keys>(), Kind::of::<taobao::Keys>(), Kind::of::<reseller::Keys>()];

/// Parameters of every call, by name.
pub type Params = BTreeMap<String, String>;

/// A protocol, set up by a source's keys.
pub trait Protocol: fmt::Debug + Send + Sync {
    /// Where calls go: scheme, host and perhaps a path, without anything secret.
    fn url(&self) -> &str;

    /// Whether each key has a value that it can have.
    ///
    /// # Errors
    /// [`Problem`] names the key, what was found and what is allowed.
    fn check(&self) -> Result<(), Problem>;

    /// What makes the calls and reads the replies.
    ///
    /// # Errors
    /// As [`Self::check`].
    fn vendor(&self) -> Result<Arc<dyn Vendor>, Problem>;

    /// Whether accounts need a name that the vendor knows, beside their secret.
    fn needs_app_key(&self) -> bool {
        true
    }
}

/// The keys of a protocol as `[[source]]` has them. The descriptions of its schema are what users read.
pub(super) trait Keys: Protocol + Serialize + DeserializeOwned + JsonSchema + 'static {
    /// `kind` of such a source.
    const KIND: &'static str;

    /// Keys that change no reply. Whatever is not named here does, also a key that comes later: at worst the cache begins
    /// anew when it is changed.
    const NO_MATTER: &'static [&'static str];

    /// Puts the defaults in where nothing is said, so that what is shown is what is in effect.
    fn filled(self) -> Self;
}

/// A line of the table of protocols.
pub(super) struct Kind {
    name: &'static str,
    keys: fn() -> &'static [&'static str],
    read: fn(&Value) -> Result<Chosen, Error>,
    schema: fn() -> Schema,
    /// Every key that such a source may have.
    allowed: OnceLock<Vec<&'static str>>,
}

impl Kind {
    const fn of<K: Keys>() -> Self {
        let schema = || schemars::schema_for!(K);
        Self { name: K::KIND, keys: known_keys::<K>, read: Chosen::read::<K>, schema, allowed: OnceLock::new() }
    }

    /// The protocol of this name.
    ///
    /// # Errors
    /// There is none: which there are.
    pub(super) fn named(name: &Value) -> Result<&'static Self, Error> {
        static NAMES: LazyLock<Vec<&'static str>> = LazyLock::new(|| KINDS.iter().map(|kind| kind.name).collect());
        let name: String = name.deserialize()?;
        let known = KINDS.iter().find(|kind| kind.name == name);
        known.ok_or_else(|| Wrong::UnknownVariant(name, &NAMES).into())
    }

    /// Reads the protocol's own keys: all that a source has beside those of `shared`, which every source may have.
    ///
    /// # Errors
    /// A key is not one of them, or cannot have its value; the error has its path.
    pub(super) fn read(&'static self, own: &Value, shared: &[&'static str]) -> Result<Chosen, Error> {
        let mut named = own.as_dict().into_iter().flat_map(Dict::keys);
        match named.find(|key| !(self.keys)().contains(&key.as_str())) {
            Some(key) => Err(self.unknown(key, own, shared).with_path(key)),
            None => (self.read)(own),
        }
    }

    fn unknown(&'static self, key: &str, own: &Value, shared: &[&'static str]) -> Error {
        let allowed = self.allowed.get_or_init(|| {
            let mut all = [shared, (self.keys)(), &["kind"]].concat();
            all.sort_unstable();
            all
        });
        let is_another_kinds = KINDS.iter().any(|kind| (kind.keys)().contains(&key));
        // Which form of a protocol: a kind without that key has no choice of them.
        if let Some(found) = own.find_ref(key).and_then(Value::as_str).filter(|_| key == "dialect") {
            let (key, found) = (key.to_owned(), format!("{found:?}"));
            let problem = Problem::Key { key, found, allowed: "left out: this kind has only one" };
            return Error::from(problem.to_string());
        }
        if is_another_kinds {
            return Error::from(format!("{}; allowed here: {}", Problem::stranger(key), allowed.join(", ")));
        }
        Wrong::UnknownField(key.to_owned(), allowed).into()
    }
}

/// The keys of a table, as serde knows them.
pub(super) fn known_keys<T: DeserializeOwned>() -> &'static [&'static str] {
    // No key is called this; whoever refuses it lists those that there are.
    let table = Value::from(Dict::from([(String::new(), Value::from(false))]));
    match table.deserialize::<T>().map_err(|error| error.kind) {
        Err(Wrong::UnknownField(_, known)) => known,
        Ok(_) | Err(_) => &[],
    }
}

/// The descriptions of the keys of each protocol, by its name.
#[must_use]
pub fn schemas() -> Vec<(&'static str, Schema)> {
    KINDS.iter().map(|kind| (kind.name, (kind.schema)())).collect()
}

/// The protocol that a source has chosen, with its keys.
#[derive(Clone, Debug)]
pub struct Chosen {
    kind: &'static str,
    protocol: Arc<dyn Protocol>,
    shown: toml::Table,
    digest: String,
}

impl Chosen {
    fn read<K: Keys>(own: &Value) -> Result<Self, Error> {
        let keys = own.deserialize::<K>()?.filled();
        let shown = toml::Table::try_from(&keys).map_err(|error| Error::from(error.to_string()))?;
        let digest = digest(K::KIND, &shown, K::NO_MATTER);
        Ok(Self { kind: K::KIND, protocol: Arc::new(keys), shown, digest })
    }

    /// What a configuration calls it.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        self.kind
    }

    /// What is made of its keys.
    #[must_use]
    pub fn protocol(&self) -> &dyn Protocol {
        &*self.protocol
    }

    /// Its keys as a configuration may have them, those included that were left out.
    #[must_use]
    pub const fn shown(&self) -> &toml::Table {
        &self.shown
    }

    /// A digest of what decides the replies: two sources with the same one are told the same of an item. Eight hex digits.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.digest
    }
}

fn digest(kind: &str, shown: &toml::Table, no_matter: &[&str]) -> String {
    let decisive = shown.iter().filter(|(key, _)| !no_matter.contains(&key.as_str()));
    let text = decisive.map(|(key, value)| (key.as_str(), value.to_string())).collect::<BTreeMap<_, _>>();
    hex::encode(&Sha1::digest(format!("{kind}{text:?}"))[..4])
}

/// What a key says; if that is nothing, its default.
pub(super) fn or(said: String, default: &str) -> String {
    if said.is_empty() { default.to_owned() } else { said }
}

/// Reads a word that a key can have; else says of this key what it may be.
pub(super) fn word<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
    deserializer: D,
    key: &str,
    allowed: &'static str,
) -> Result<T, D::Error> {
    let found = String::deserialize(deserializer)?;
    let read = T::deserialize(IntoDeserializer::<de::value::Error>::into_deserializer(found.clone()));
    read.map_err(|_| D::Error::custom(Problem::Key { key: key.to_owned(), found: format!("{found:?}"), allowed }))
}
