//! `[[source]]`: a vendor's API that weir collects from, and the accounts that it is called with.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use figment::{
    error::Kind as Wrong,
    value::{Dict, Num, Value},
};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _, ser::SerializeMap};

use super::{
    Account, Vendor,
    accounts::{self, AccountConfig},
    address::{self, AddressConfig, HealthConfig},
    credentials::Credentials,
    http::{Authorities, Client, Manners, Timeouts},
    limits::SourceLimits,
    preset::Preset,
    problem::{Problem, check_time, require},
    protocol::{Chosen, Kind, known_keys},
    route::Address,
    secrets::Surroundings,
};
use crate::{
    breaker::BreakerConfig,
    cache,
    message::{Lane, SourceName},
    quota::{
        Limit,
        money::{BudgetConfig, Budgets, Money, OnBudget},
        plan::Limits,
    },
};

/// `[[source]]`: one table, in which each protocol has keys of its own beside those that all sources have.
///
/// Keys whose default depends on the protocol are filled in when it is read: what is shown is what is in effect.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// What all sources have.
    pub common: Common,
    /// Which protocol it speaks (`kind`), and the keys of that.
    pub protocol: Chosen,
}

/// The keys of `[[source]]` that do not depend on its protocol.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Common {
    /// What topics, records and rows call it.
    pub name: SourceName,
    /// How long a call may take, from connecting to the last byte.
    #[serde(default = "default_timeout", with = "humantime_serde")]
    pub timeout: Duration,
    /// How long connecting may take.
    #[serde(default = "default_connect_timeout", with = "humantime_serde")]
    pub connect_timeout: Duration,
    /// How long the addresses of the vendor's name count.
    #[serde(default = "default_dns_cache", with = "humantime_serde")]
    pub dns_cache: Duration,
    /// A PEM file of certificates that are trusted besides the system's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// The most calls that may be under way at once, whatever address they leave from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calls_in_flight: Option<usize>,
    /// The most of them to the vendor's host from each address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calls_in_flight_per_host: Option<usize>,
    /// A TOML file of `[[account]]` tables with their secrets, readable for its owner alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accounts_file: Option<PathBuf>,
    /// Accounts whose secrets are in the environment or in a file each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub account: Vec<AccountConfig>,
    /// Limits that somebody has published, by name; the keys below go before them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preset: Option<Preset>,
    /// What the vendor allows each account that has no limit of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<Limit>,
    /// Further limits of each account that has none of its own, which hold together with that one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub limits: Vec<Limit>,
    /// What the vendor allows all accounts together.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shared_limits: Vec<Limit>,
    /// What the vendor allows each address that calls come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address_limit: Option<Limit>,
    /// Whether accounts without a limit go as fast as they can; else their limit is sought, beginning slowly.
    #[serde(default)]
    pub unlimited: bool,
    /// The share of the slots that express requests get while the backlog waits too: above 0, below 1.
    #[serde(default = "Lane::express_share")]
    pub express_share: f64,
    /// What one call costs, in whatever the vendor bills.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost_per_call: Option<Money>,
    /// What that is in, for people: any text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub currency: Option<String>,
    /// How much may be spent.
    #[serde(default)]
    pub budget: BudgetConfig,
    /// What happens when it is spent.
    #[serde(default)]
    pub on_budget: OnBudget,
    /// When its calls stop since it does not answer, and how they begin again.
    #[serde(default)]
    pub breaker: BreakerConfig,
    /// Another source, which gets the requests while this one does not answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<SourceName>,
    /// Addresses that calls leave from: proxies, or addresses of the machine. Without any: its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub address: Vec<AddressConfig>,
    /// When an address is taken out, and for how long.
    #[serde(default)]
    pub address_health: HealthConfig,
    /// How long its answers are given again; without it each request is called for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<cache::SourceConfig>,
}

const fn default_timeout() -> Duration {
    Duration::from_secs(10)
}

const fn default_connect_timeout() -> Duration {
    Duration::from_secs(2)
}

const fn default_dns_cache() -> Duration {
    Duration::from_secs(5 * 60)
}

impl SourceConfig {
    /// Reads a table that knows where its values stand.
    ///
    /// # Errors
    /// The first key that is missing, unknown to this protocol or has a value that it cannot have, with its path.
    #[allow(clippy::result_large_err, reason = "figment's, and read once at a start")]
    pub fn read(table: &Value) -> Result<Self, figment::Error> {
        let Value::Dict(tag, keys) = table else {
            return Err(Wrong::InvalidType(table.to_actual(), "a table".to_owned()).into());
        };
        let (tag, mut keys) = (*tag, keys.clone());
        let (shared, mut own) = (known_keys::<Common>(), Dict::new());
        let kind = keys.remove("kind").map(|kind| Kind::named(&kind).map_err(|error| error.with_path("kind")));
        let kind = kind.transpose()?;
        keys.retain(|key, value| {
            let is_shared = shared.contains(&key.as_str());
            if !is_shared {
                own.insert(key.clone(), value.clone());
            }
            is_shared
        });
        let common = Value::Dict(tag, keys).deserialize()?;
        let kind = kind.ok_or_else(|| Wrong::MissingField("kind".into()))?;
        Ok(Self { common, protocol: kind.read(&Value::Dict(tag, own), shared)? })
    }

    /// The protocol, set up as configured.
    ///
    /// # Errors
    /// [`Problem`] names the key, what was found and what is allowed.
    pub fn vendor(&self) -> Result<Arc<dyn Vendor>, Problem> {
        self.protocol.protocol().vendor()
    }
}

/// The protocol's keys after the first of the others, as one would write them.
impl Serialize for SourceConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let common = toml::Table::try_from(&self.common).map_err(serde::ser::Error::custom)?;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("name", &self.common.name)?;
        map.serialize_entry("kind", self.protocol.kind())?;
        let rest = common.iter().filter(|(key, _)| *key != "name");
        self.protocol.shown().iter().chain(rest).try_for_each(|(key, value)| map.serialize_entry(key, value))?;
        map.end()
    }
}

/// As [`SourceConfig::read`], from a form that does not say where its values stand.
impl<'de> Deserialize<'de> for SourceConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let table = value_of(serde_json::Value::deserialize(deserializer)?);
        Self::read(&table).map_err(|error| {
            if let Wrong::UnknownField(key, allowed) = &error.kind {
                return D::Error::unknown_field(key, allowed);
            }
            if let Wrong::UnknownVariant(word, allowed) = &error.kind {
                return D::Error::unknown_variant(word, allowed);
            }
            D::Error::custom(error)
        })
    }
}

/// Numbers of JSON keep their text, which no other reader of them expects.
fn value_of(json: serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::Empty(figment::value::Tag::Default, figment::value::Empty::None),
        serde_json::Value::Bool(is) => is.into(),
        serde_json::Value::Number(number) => {
            let whole = number.as_i64().map(Num::I64).or_else(|| number.as_u64().map(Num::U64));
            let number = whole.or_else(|| number.as_f64().map(Num::F64)).unwrap_or(Num::F64(f64::NAN));
            Value::Num(figment::value::Tag::Default, number)
        }
        serde_json::Value::String(text) => text.into(),
        serde_json::Value::Array(elements) => elements.into_iter().map(value_of).collect::<Vec<_>>().into(),
        serde_json::Value::Object(members) => {
            members.into_iter().map(|(key, value)| (key, value_of(value))).collect::<Dict>().into()
        }
    }
}

/// A source that is ready to be called.
#[derive(Clone)]
pub struct Source {
    /// What topics, records and rows call it.
    pub name: SourceName,
    /// Its protocol.
    pub vendor: Arc<dyn Vendor>,
    /// Its connections.
    pub client: Client,
    /// Its accounts, at least one; slots name them by their index.
    pub accounts: Arc<[Account]>,
    /// Where the accounts' secrets stand.
    pub credentials: Credentials,
    /// Accounts without a limit go as fast as they can.
    pub unlimited: bool,
    /// The addresses that calls leave from, at least one; slots name them by their index.
    pub addresses: Arc<[Address]>,
    /// When an address is taken out.
    pub address_health: HealthConfig,
    /// Of each account, the address that its calls leave from, and then those that replace it.
    homes: Vec<Vec<usize>>,
    /// The most calls that may be under way at once; `None`: any number.
    pub calls_in_flight: Option<usize>,
    /// What calls cost and may cost, if they cost something.
    pub budgets: Option<Budgets>,
    /// The share of the slots that express requests get while the backlog waits too.
    pub express_share: f64,
    /// When its calls stop since it does not answer, and who gets its requests meanwhile.
    pub breaker: (BreakerConfig, Option<SourceName>),
    limits: SourceLimits,
}

/// Why a source cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("source {source_name}: {problem}")]
pub struct OpenError {
    /// Which source.
    pub source_name: SourceName,
    /// What is wrong.
    pub problem: Problem,
}

impl Source {
    /// Checks a source's configuration, reads its secrets and prepares its connections. Connects to nothing.
    ///
    /// Relative paths begin at `folder`, the configuration's; `env` reads a variable of the environment.
    ///
    /// # Errors
    /// [`OpenError`] names the key, what was found and what is allowed.
    pub fn open(config: &SourceConfig, folder: &Path, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, OpenError> {
        Self::build(config, Surroundings { folder, env })
            .map_err(|problem| OpenError { source_name: config.common.name.clone(), problem })
    }

    /// Everything that the vendor allows, as the quota reads it.
    #[must_use]
    pub fn quota(&self) -> Limits {
        let limits = self.limits.quota(&self.accounts, &self.addresses, &self.homes, self.address_health.failover);
        // It may wait for its turn among the calls in flight for as long as it may take.
        Limits { unlimited: self.unlimited, longest_call: Some(self.client.timeout() * 2), ..limits }
    }

    /// What the vendor allows each account that has no limit of its own, preset included.
    #[must_use]
    pub fn account_limit(&self) -> Option<&Limit> {
        self.limits.account.as_ref()
    }

    /// How many accounts call from each address, by index.
    #[must_use]
    pub fn accounts_by_address(&self) -> Vec<usize> {
        let count = |index| self.homes.iter().filter(|order| order.first() == Some(&index)).count();
        (0..self.addresses.len()).map(count).collect()
    }

    fn build(config: &SourceConfig, at: Surroundings<'_>) -> Result<Self, Problem> {
        let SourceConfig { common: config, protocol } = config;
        let protocol = protocol.protocol();
        protocol.check()?;
        config.check()?;
        let vendor = protocol.vendor()?;
        let accounts = accounts::load(&config.account, config.accounts_file.as_deref(), at)?;
        if accounts.is_empty() {
            return Err(Problem::NoAccount);
        }
        for account in &accounts {
            account.check_key(protocol.needs_app_key())?;
            for limit in account.limit.iter().chain(&account.limits) {
                check_limit(&format!("a limit of account {}", account.alias), limit)?;
            }
            let cap = account.calls_in_flight;
            let key = format!("calls_in_flight of account {}", account.alias);
            require(&key, &format!("{:?}", cap.unwrap_or_default()), cap != Some(0), "at least 1")?;
        }
        let addresses = address::open(&config.address, at)?;
        let home = |account: &Account| address::assign(&account.alias, account.address.as_deref(), &addresses);
        let homes = accounts.iter().map(home).collect::<Result<_, _>>()?;
        let timeouts = Timeouts { total: config.timeout, connect: config.connect_timeout };
        let [in_all, per_host] = config.in_flight();
        let of_all_addresses = per_host.map(|calls| calls.saturating_mul(addresses.len()));
        let calls_in_flight = in_all.into_iter().chain(of_all_addresses);
        let calls_per_host = per_host.unwrap_or(Manners::default().calls_per_host);
        let authorities = config.ca_file.as_ref().map(|file| authorities(&at.folder.join(file))).transpose()?;
        let authorities = authorities.unwrap_or_default();
        let manners = Manners { dns_cache: config.dns_cache, calls_per_host, authorities };
        let client = Client::from_addresses(timeouts, &manners, &addresses);
        Ok(Self {
            name: config.name.clone(),
            vendor,
            client: client.map_err(|error| Problem::Client(error.to_string()))?,
            accounts: accounts.into(),
            credentials: Credentials::new(
                &config.account,
                config.accounts_file.as_deref(),
                protocol.needs_app_key(),
                at.folder,
            ),
            unlimited: config.unlimited,
            addresses: addresses.into(),
            address_health: config.address_health,
            homes,
            calls_in_flight: calls_in_flight.min(),
            budgets: config.budgets(),
            express_share: config.express_share,
            breaker: (config.breaker, config.fallback.clone()),
            limits: config.limits_in_effect(),
        })
    }
}

impl cache::CachedSource for SourceConfig {
    fn name(&self) -> &SourceName {
        &self.common.name
    }

    fn cache(&self) -> Option<&cache::SourceConfig> {
        self.common.cache.as_ref()
    }

    fn digest(&self) -> &str {
        self.protocol.digest()
    }
}

impl Common {
    /// Which limits hold, those of the preset put in.
    fn limits_in_effect(&self) -> SourceLimits {
        let preset = self.preset;
        SourceLimits {
            account: self.limit.clone().or_else(|| preset?.account()),
            further: self.limits.clone(),
            shared: self.shared_limits.iter().cloned().chain(self.budgets().and_then(|all| all.day_limit())).collect(),
            address: self.address_limit.clone().or_else(|| preset?.address()),
        }
    }

    /// How many calls may be under way: in all, and to the host from each address. The preset's unless said otherwise.
    pub(crate) fn in_flight(&self) -> [Option<usize>; 2] {
        let [in_all, per_host] = self.preset.and_then(Preset::calls_in_flight).map_or([None; 2], |both| both.map(Some));
        [self.calls_in_flight.or(in_all), self.calls_in_flight_per_host.or(per_host)]
    }

    /// What calls cost and may cost, in calls.
    #[must_use]
    pub fn budgets(&self) -> Option<Budgets> {
        self.cost_per_call.map(|cost| Budgets::new(cost, &self.budget, self.on_budget))
    }

    fn check_budget(&self) -> Result<(), Problem> {
        let has_budget = self.budget.per_day.is_some() || self.budget.per_batch.is_some();
        let Some(Budgets { cost, per_day, per_batch, .. }) = self.budgets() else {
            let (found, allowed) = ("not set".to_owned(), "an amount such as \"0.02\", since there is a budget");
            let problem = Problem::Key { key: "cost_per_call".to_owned(), found, allowed };
            return if has_budget { Err(problem) } else { Ok(()) };
        };
        let check = |key: &str, budget: Option<Money>, calls: Option<u64>| match (budget, calls) {
            (Some(found), Some(0)) => {
                let found = format!("{found}, less than one call at {cost}");
                Err(Problem::Key { key: key.to_owned(), found, allowed: "at least cost_per_call" })
            }
            _ => Ok(()),
        };
        check("budget.per_day", self.budget.per_day, per_day)?;
        check("budget.per_batch", self.budget.per_batch, per_batch)
    }

    fn check(&self) -> Result<(), Problem> {
        self.check_budget()?;
        let health = &self.address_health;
        let failures = health.failures.to_string();
        require("address_health.failures", &failures, health.failures > 0, "at least 1")?;
        check_time("address_health.rest", health.rest)?;
        let is_right = health.rest_max >= health.rest && health.rest_max <= Duration::from_secs(24 * 60 * 60);
        let found = humantime::format_duration(health.rest_max).to_string();
        require("address_health.rest_max", &found, is_right, "at least address_health.rest, at most 1day")?;
        let (share, allowed) = (self.express_share, "above 0 and below 1: 0.5 is every other call");
        require("express_share", &share.to_string(), share > 0.0 && share < 1.0, allowed)?;
        self.breaker.check().map_err(|(key, found, allowed)| Problem::Key { key, found, allowed })?;
        check_time("timeout", self.timeout)?;
        check_time("connect_timeout", self.connect_timeout)?;
        let is_right = self.dns_cache <= Duration::from_secs(24 * 60 * 60);
        let found = humantime::format_duration(self.dns_cache).to_string();
        require("dns_cache", &found, is_right, "from 0s (not kept) to 1day")?;
        let [in_all, per_host] = [self.calls_in_flight, self.calls_in_flight_per_host];
        for (key, calls) in [("calls_in_flight", in_all), ("calls_in_flight_per_host", per_host)] {
            let is_right = calls.is_none_or(|calls| (1..=65_536).contains(&calls));
            require(key, &calls.unwrap_or_default().to_string(), is_right, "from 1 to 65536")?;
        }
        let limits = self.limit.iter().map(|limit| ("limit", limit));
        let limits = limits.chain(self.limits.iter().map(|limit| ("limits", limit)));
        let limits = limits.chain(self.shared_limits.iter().map(|limit| ("shared_limits", limit)));
        let mut limits = limits.chain(self.address_limit.iter().map(|limit| ("address_limit", limit)));
        limits.try_for_each(|(key, limit)| check_limit(key, limit))
    }
}

fn authorities(file: &Path) -> Result<Authorities, Problem> {
    let read = std::fs::read(file).map_err(|error| error.to_string());
    read.and_then(|text| Authorities::from_pem(&text)).map_err(|what| {
        let found = format!("{} ({what})", file.display());
        Problem::Key { key: "ca_file".to_owned(), found, allowed: "a file with certificates in PEM form" }
    })
}

fn check_limit(key: &str, limit: &Limit) -> Result<(), Problem> {
    let Err(problem) = limit.validate() else { return Ok(()) };
    let found = format!("{} calls per {}, burst {} ({problem})", limit.calls, limit.per, limit.burst);
    Err(Problem::Key { key: key.to_owned(), found, allowed: "as the brackets say" })
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
