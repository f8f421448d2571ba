//! Which limits are in effect for a source: what is said for an account, else for the source, else by a preset.

use super::{Account, route::Address};
use crate::quota::{
    Limit,
    plan::{AccountLimits, AddressLimits, Limits},
};

/// A source's limits, presets put in.
#[derive(Clone, Debug)]
pub(super) struct SourceLimits {
    /// Each account that has none of its own.
    pub(super) account: Option<Limit>,
    /// What holds together with it.
    pub(super) further: Vec<Limit>,
    /// All accounts together.
    pub(super) shared: Vec<Limit>,
    /// Each address that has none of its own.
    pub(super) address: Option<Limit>,
}

impl SourceLimits {
    /// All of it, as the quota reads it. `homes`: of each account, its address and then those that replace it.
    pub(super) fn quota(
        &self,
        accounts: &[Account],
        addresses: &[Address],
        homes: &[Vec<usize>],
        failover: bool,
    ) -> Limits {
        let account = |(account, order): (&Account, &Vec<usize>)| {
            let (home, others) = order.split_first().map_or((0, &[][..]), |(home, others)| (*home, others));
            let fallbacks = if failover { others.to_vec() } else { Vec::new() };
            AccountLimits {
                limits: self.of_account(account),
                address: home,
                fallbacks,
                in_flight: account.calls_in_flight,
                is_guess: false,
            }
        };
        let address = |address: &Address| AddressLimits {
            name: address.name.clone(),
            own: address.limit.clone().map(|limit| vec![limit]),
        };
        Limits {
            unlimited: false,
            longest_call: None,
            accounts: accounts.iter().zip(homes).map(account).collect(),
            source: self.shared.clone(),
            address: self.address.iter().cloned().collect(),
            addresses: addresses.iter().map(address).collect(),
        }
    }

    fn of_account(&self, account: &Account) -> Vec<Limit> {
        if account.limit.is_some() || !account.limits.is_empty() {
            account.limit.iter().chain(&account.limits).cloned().collect()
        } else {
            self.account.iter().chain(&self.further).cloned().collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use figment::providers::{Format, Toml};

    use super::*;
    use crate::platform::{Source, SourceConfig};

    fn open(more: &str, account: &str) -> Result<Source, String> {
        let text = format!(
            r#"name = "a"
               kind = "ali1688"
               {more}
               account = [
                   {{ alias = "one", app_key = "1", app_secret = {{ env = "S" }} {account} }},
                   {{ alias = "two", app_key = "2", app_secret = {{ env = "S" }} }},
               ]"#
        );
        let config = <Toml as Format>::from_str::<SourceConfig>(&text).map_err(|error| error.to_string())?;
        Source::open(&config, Path::new("/nowhere"), &|_| Some("secret".to_owned())).map_err(|error| error.to_string())
    }

    fn calls(limits: &[Limit]) -> Vec<u32> {
        limits.iter().map(|limit| limit.calls).collect()
    }

    #[test]
    fn a_preset_gives_limits_and_explicit_keys_go_before_it() {
        let quota = open("preset = \"taobao-8-of-10-per-second\"", "").unwrap().quota();
        assert_eq!((calls(&quota.accounts[0].limits), calls(&quota.address)), (vec![8], vec![99]));
        let more = r#"preset = "taobao-8-of-10-per-second"
                      limit = { calls = 5, per = "1s" }
                      limits = [{ calls = 1000, per = "1day", kind = "sliding" }]
                      address_limit = { calls = 50, per = "1s" }"#;
        let quota = open(more, ", preset = \"1688-60-per-minute\"").unwrap().quota();
        assert_eq!(calls(&quota.accounts[0].limits), [60], "an account's own, and nothing of the source's");
        assert_eq!(calls(&quota.accounts[1].limits), [5, 1_000]);
        assert_eq!(calls(&quota.address), [50]);
    }

    #[test]
    fn an_unknown_preset_and_one_without_accounts_are_refused_with_what_there_is() {
        let unknown = open("preset = \"1688\"", "").err().unwrap();
        for preset in crate::platform::preset::Preset::ALL {
            assert!(unknown.contains(preset.name()), "{unknown}");
        }
        let silent = open("", ", preset = \"taobao-below-100-per-address\"").err().unwrap();
        assert!(silent.contains("account one: preset \"taobao-below-100-per-address\" says nothing"), "{silent}");
    }

    #[test]
    fn addresses_have_limits_and_accounts_their_address() {
        let more = r#"address_limit = { calls = 50, per = "1s" }
                      address = [{ name = "x" }, { name = "y", limit = { calls = 7, per = "1s" } }]"#;
        let quota = open(more, ", address = \"y\"").unwrap().quota();
        assert_eq!((quota.accounts[0].address, &quota.accounts[0].fallbacks[..]), (1, &[][..]), "it waits");
        assert_eq!((calls(quota.of_address(0)), calls(quota.of_address(1))), (vec![50], vec![7]));
        let more = format!("address_health = {{ failover = true }}\n{more}");
        let quota = open(&more, ", address = \"y\"").unwrap().quota();
        assert_eq!(quota.accounts[0].fallbacks, [0]);
        let unknown = open("", ", address = \"z\"").err().unwrap();
        assert!(unknown.contains("account one: there is no address \"z\"; declared: direct"), "{unknown}");
    }
}
