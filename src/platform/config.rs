//! `[[source]]`: a vendor's API that weir collects from, and the accounts that it is called with.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{
    Account, Vendor,
    accounts::{self, AccountConfig, AccountsError},
    address::{self, Address, AddressConfig, AddressError, HealthConfig},
    ali1688::{Ali1688, Pointers, Settings},
    http::{self, Client, Timeouts},
    limits::SourceLimits,
    pick::InvalidPointer,
    preset::Preset,
    secrets::Surroundings,
};
use crate::{
    cache,
    message::SourceName,
    quota::{
        Limit,
        money::{BudgetConfig, Budgets, Money, OnBudget},
        plan::Limits,
    },
};

/// Which protocol a source speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// 1688's open platform.
    Ali1688,
}

/// `[[source]]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// What topics, records and rows call it.
    pub name: SourceName,
    /// Which protocol it speaks.
    pub kind: Kind,
    /// Scheme, host and perhaps a path.
    #[serde(default = "default_url")]
    pub url: String,
    /// The page where a user authorises an app.
    #[serde(default = "default_authorise_url")]
    pub authorise_url: String,
    /// Namespace and name of the API.
    #[serde(default = "default_api")]
    pub api: String,
    /// The API's version.
    #[serde(default = "default_version")]
    pub version: String,
    /// The name of the parameter that carries the item's id.
    #[serde(default = "default_item_param")]
    pub item_param: String,
    /// Parameters of every call; those of a request cannot change them.
    #[serde(default = "default_params")]
    pub params: BTreeMap<String, String>,
    /// Where the reply has its columns.
    #[serde(default)]
    pub columns: Pointers,
    /// How long a call may take, from connecting to the last byte.
    #[serde(default = "default_timeout", with = "humantime_serde")]
    pub timeout: Duration,
    /// How long connecting may take.
    #[serde(default = "default_connect_timeout", with = "humantime_serde")]
    pub connect_timeout: Duration,
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
    #[serde(default = "default_express_share")]
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

fn default_url() -> String {
    "https://gw.open.1688.com".to_owned()
}

fn default_authorise_url() -> String {
    "https://auth.1688.com/oauth/authorize".to_owned()
}

fn default_api() -> String {
    "com.alibaba.product/alibaba.product.get".to_owned()
}

fn default_version() -> String {
    "1".to_owned()
}

fn default_item_param() -> String {
    "productID".to_owned()
}

fn default_params() -> BTreeMap<String, String> {
    BTreeMap::from([("webSite".to_owned(), "1688".to_owned())])
}

const fn default_express_share() -> f64 {
    0.5
}

const fn default_timeout() -> Duration {
    Duration::from_secs(10)
}

const fn default_connect_timeout() -> Duration {
    Duration::from_secs(2)
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
    /// Accounts without a limit go as fast as they can.
    pub unlimited: bool,
    /// The addresses that calls leave from, at least one; slots name them by their index.
    pub addresses: Arc<[Address]>,
    /// When an address is taken out.
    pub address_health: HealthConfig,
    /// Of each account, the address that its calls leave from, and then those that replace it.
    homes: Vec<Vec<usize>>,
    /// What calls cost and may cost, if they cost something.
    pub budgets: Option<Budgets>,
    /// The share of the slots that express requests get while the backlog waits too.
    pub express_share: f64,
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

/// What is wrong with a source's configuration.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// A key has a value that it cannot have.
    #[error("{key} is {found}; it must be {allowed}")]
    Key {
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What it may be.
        allowed: &'static str,
    },
    /// A column pointer is none.
    #[error("columns: {0}")]
    Pointer(#[from] InvalidPointer),
    /// An address cannot be used, or an account's is none.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// An account cannot be used.
    #[error(transparent)]
    Accounts(#[from] AccountsError),
    /// There is nobody to call as.
    #[error("it has no account: add [[source.account]] or an accounts_file with [[account]] tables")]
    NoAccount,
    /// The TLS library, or the like, does not start.
    #[error("cannot make an HTTP client: {0}")]
    Client(String),
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
            .map_err(|problem| OpenError { source_name: config.name.clone(), problem })
    }

    /// Everything that the vendor allows, as the quota reads it.
    #[must_use]
    pub fn quota(&self) -> Limits {
        let limits = self.limits.quota(&self.accounts, &self.addresses, &self.homes, self.address_health.failover);
        Limits { unlimited: self.unlimited, ..limits }
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
        config.check()?;
        let vendor = config.vendor()?;
        let accounts = accounts::load(&config.account, config.accounts_file.as_deref(), at)?;
        if accounts.is_empty() {
            return Err(Problem::NoAccount);
        }
        for account in &accounts {
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
        let client = Client::from_addresses(timeouts, &addresses);
        Ok(Self {
            name: config.name.clone(),
            vendor,
            client: client.map_err(|error| Problem::Client(error.to_string()))?,
            accounts: accounts.into(),
            unlimited: config.unlimited,
            addresses: addresses.into(),
            address_health: config.address_health,
            homes,
            budgets: config.budgets(),
            express_share: config.express_share,
            limits: SourceLimits::of(config),
        })
    }
}

impl SourceConfig {
    /// The protocol that the source speaks, set up as configured.
    ///
    /// # Errors
    /// [`Problem::Pointer`] if a column's pointer is none.
    pub fn vendor(&self) -> Result<Arc<dyn Vendor>, Problem> {
        match self.kind {
            Kind::Ali1688 => Ok(Arc::new(Ali1688::new(self.settings())?)),
        }
    }

    fn settings(&self) -> Settings {
        Settings {
            url: self.url.clone(),
            authorise_url: self.authorise_url.clone(),
            api: self.api.clone(),
            version: self.version.clone(),
            item_param: self.item_param.clone(),
            params: self.params.clone(),
            columns: self.columns.clone(),
        }
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
        require("url", &self.url, http::is_base_url(&self.url), "http:// or https://, a host and perhaps a path")?;
        let page = &self.authorise_url;
        require("authorise_url", page, http::is_base_url(page), "http:// or https://, a host and perhaps a path")?;
        let words: Vec<_> = self.api.split('/').collect();
        let is_api = words.len() == 2 && words.iter().all(|word| is_word(word));
        require("api", &self.api, is_api, "namespace/name, like com.alibaba.product/alibaba.product.get")?;
        require("version", &self.version, is_word(&self.version), "ASCII letters, digits, - _ .")?;
        require("item_param", &self.item_param, is_word(&self.item_param), "ASCII letters, digits, - _ .")?;
        let health = &self.address_health;
        let failures = health.failures.to_string();
        require("address_health.failures", &failures, health.failures > 0, "at least 1")?;
        check_time("address_health.rest", health.rest)?;
        let is_right = health.rest_max >= health.rest && health.rest_max <= Duration::from_secs(24 * 60 * 60);
        let found = humantime::format_duration(health.rest_max).to_string();
        require("address_health.rest_max", &found, is_right, "at least address_health.rest, at most 1day")?;
        let (share, allowed) = (self.express_share, "above 0 and below 1: 0.5 is every other call");
        require("express_share", &share.to_string(), share > 0.0 && share < 1.0, allowed)?;
        check_time("timeout", self.timeout)?;
        check_time("connect_timeout", self.connect_timeout)?;
        let limits = self.limit.iter().map(|limit| ("limit", limit));
        let limits = limits.chain(self.limits.iter().map(|limit| ("limits", limit)));
        let limits = limits.chain(self.shared_limits.iter().map(|limit| ("shared_limits", limit)));
        let mut limits = limits.chain(self.address_limit.iter().map(|limit| ("address_limit", limit)));
        limits.try_for_each(|(key, limit)| check_limit(key, limit))
    }
}

fn require(key: &str, found: &str, is_right: bool, allowed: &'static str) -> Result<(), Problem> {
    if is_right { Ok(()) } else { Err(Problem::Key { key: key.to_owned(), found: format!("{found:?}"), allowed }) }
}

fn check_time(key: &str, time: Duration) -> Result<(), Problem> {
    let is_right = (Duration::from_millis(1)..=Duration::from_secs(600)).contains(&time);
    let found = humantime::format_duration(time).to_string();
    if is_right { Ok(()) } else { Err(Problem::Key { key: key.to_owned(), found, allowed: "from 1ms to 10m" }) }
}

fn check_limit(key: &str, limit: &Limit) -> Result<(), Problem> {
    let Err(problem) = limit.validate() else { return Ok(()) };
    let per = humantime::format_duration(limit.per);
    let found = format!("{} calls per {per}, burst {} ({problem})", limit.calls, limit.burst);
    Err(Problem::Key { key: key.to_owned(), found, allowed: "at least 1 call, burst 1, in more than no time" })
}

fn is_word(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use figment::providers::{Format, Toml};

    const MINIMAL: &str = r#"
        name = "ali1688"
        kind = "ali1688"
        limit = { calls = 10, per = "1s", burst = 2 }
        account = [{ alias = "one", app_key = "1", app_secret = { env = "S" } }]
    "#;

    fn open(text: &str) -> Result<Source, String> {
        let config = <Toml as Format>::from_str::<SourceConfig>(text).map_err(|error| error.to_string())?;
        let env = |name: &str| (name == "S").then(|| "secret".to_owned());
        Source::open(&config, Path::new("/nowhere"), &env).map_err(|error| error.to_string())
    }

    #[test]
    fn a_source_needs_a_name_a_kind_and_an_account() {
        let source = open(MINIMAL).unwrap();
        assert_eq!(source.accounts.len(), 1);
        assert_eq!(source.quota().accounts[0].limits, source.account_limit().cloned().into_iter().collect::<Vec<_>>());
        assert_eq!(source.vendor.batch_max(), 1);
    }

    #[test]
    fn the_limit_of_an_account_goes_before_that_of_the_source() {
        let text = MINIMAL.replace("{ env = \"S\" } }", "{ env = \"S\" }, limit = { calls = 3, per = \"1m\" } }");
        let source = open(&text).unwrap();
        assert_eq!(source.quota().accounts[0].limits[0].calls, 3);
    }

    #[test]
    fn several_limits_hold_together_and_some_for_all_accounts() {
        let more = r#"limits = [{ calls = 300, per = "1m", kind = "sliding" }]
                      shared_limits = [{ calls = 50, per = "1s", burst = 5 }]"#;
        let source = open(&format!("{MINIMAL}\n{more}")).unwrap();
        let quota = source.quota();
        assert_eq!(quota.accounts[0].limits.iter().map(|limit| limit.calls).collect::<Vec<_>>(), [10, 300]);
        assert_eq!(quota.source[0].calls, 50);
        let own = MINIMAL.replace(
            "{ env = \"S\" } }",
            "{ env = \"S\" }, limits = [{ calls = 3, per = \"1m\" }], calls_in_flight = 2 }",
        );
        let account = &open(&format!("{own}\n{more}")).unwrap().quota().accounts[0];
        assert_eq!((account.limits.len(), account.limits[0].calls, account.in_flight), (1, 3, Some(2)));
    }

    #[test]
    fn a_wrong_key_is_named_with_what_was_found_and_what_is_allowed() {
        let table = [
            ("url = \"ftp://gw\"", "url is \"ftp://gw\"; it must be http:// or https://"),
            ("url = \"https://gw/?key=1\"", "url is"),
            ("authorise_url = \"auth.1688.com\"", "authorise_url is \"auth.1688.com\"; it must be http:// or https://"),
            ("api = \"alibaba.product.get\"", "api is \"alibaba.product.get\"; it must be namespace/name"),
            ("api = \"a/b/c\"", "api is"),
            ("version = \"\"", "version is \"\""),
            ("item_param = \"a b\"", "item_param is \"a b\""),
            ("express_share = 1.0", "express_share is \"1\"; it must be above 0 and below 1"),
            ("timeout = \"0s\"", "timeout is 0s; it must be from 1ms to 10m"),
            ("connect_timeout = \"1h\"", "connect_timeout is 1h"),
            ("address_limit = { calls = 0, per = \"1s\" }", "address_limit is 0 calls per 1s, burst 1"),
            (
                "limits = [{ calls = 9, per = \"1s\", spread = true }]",
                "limits is 9 calls per 1s, burst 1 (spread is only",
            ),
            ("columns = { title = \"subject\" }", "columns: \"subject\" is not a JSON pointer"),
            ("colour = \"red\"", "unknown field `colour`"),
            ("budget = { per_day = \"1\" }", "cost_per_call is not set; it must be an amount"),
            ("cost_per_call = 0.1", "expected a string"),
            (
                "cost_per_call = \"2\"\nbudget = { per_batch = \"1.5\" }",
                "budget.per_batch is 1.5, less than one call at 2; it must be at least cost_per_call",
            ),
            ("address_health = { failures = 0 }", "address_health.failures is \"0\"; it must be at least 1"),
            (
                "address_health = { rest = \"5m\", rest_max = \"1m\" }",
                "address_health.rest_max is \"1m\"; it must be at",
            ),
            ("accounts_file = \"none.toml\"", "source ali1688: accounts_file: cannot read /nowhere/none.toml"),
        ];
        for (line, expected) in table {
            let message = open(&format!("{MINIMAL}\n{line}")).err().unwrap();
            assert!(message.contains(expected), "{message:?} should say {expected:?}");
        }
    }

    #[test]
    fn a_source_without_accounts_or_of_an_unknown_kind_is_refused() {
        let nobody = open("name = \"a\"\nkind = \"ali1688\"").err().unwrap();
        assert!(nobody.contains("has no account"), "{nobody}");
        let unknown = open("name = \"a\"\nkind = \"ebay\"").err().unwrap();
        assert!(unknown.contains("`ebay`, expected `ali1688`"), "{unknown}");
    }

    #[test]
    fn the_configuration_can_be_shown_without_its_secrets() {
        let config = <Toml as Format>::from_str::<SourceConfig>(MINIMAL).unwrap();
        let shown = serde_json::to_string(&config).unwrap();
        assert!(shown.contains(r#""app_secret":{"env":"S"}"#), "{shown}");
    }
}
