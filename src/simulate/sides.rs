//! What can be chosen for Taobao and its resellers, which have accounts of their own.

use std::{path::PathBuf, time::Duration};

use super::{SimulateError, limiter::Quota};

/// The accounts of a gateway and what they may.
#[derive(Clone, Debug, PartialEq)]
pub struct SideOptions {
    /// How many accounts exist.
    pub accounts: usize,
    /// Where to write their secrets, mode 600.
    pub accounts_file: Option<PathBuf>,
    /// Each account's quota.
    pub quota: Quota,
    /// The quota of the API for all its callers.
    pub api_quota: Quota,
}

impl SideOptions {
    /// So many accounts of 10 calls in any second.
    #[must_use]
    pub const fn of(accounts: usize) -> Self {
        Self { accounts, accounts_file: None, quota: per_second(10), api_quota: Quota::None }
    }

    pub(super) fn check(&self, option: &'static str) -> Result<(), SimulateError> {
        if (1..=1_000_000).contains(&self.accounts) {
            return Ok(());
        }
        Err(SimulateError::Option { option, found: self.accounts.to_string(), allowed: "from 1 to 1000000" })
    }
}

const fn per_second(calls: u32) -> Quota {
    Quota::Sliding { calls, window: Duration::from_secs(1) }
}

/// The same on the command line.
#[derive(Clone, Debug, clap::Args)]
pub struct SideArgs {
    /// How many accounts Taobao has.
    #[arg(long, default_value_t = 100, value_name = "COUNT", help_heading = "Taobao")]
    taobao_accounts: usize,
    /// Write Taobao's accounts to this file.
    #[arg(long, value_name = "FILE", help_heading = "Taobao")]
    write_taobao_accounts: Option<PathBuf>,
    /// Calls of a Taobao account in any second; beyond it the account is banned for a second or two.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..), value_name = "CALLS",
          help_heading = "Taobao")]
    taobao_rate: u32,
    /// Calls of all Taobao accounts together in any second; without it any number.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..), value_name = "CALLS", help_heading = "Taobao")]
    taobao_api_rate: Option<u32>,
    /// How many keys the resellers have given.
    #[arg(long, default_value_t = 4, value_name = "COUNT", help_heading = "Taobao")]
    reseller_keys: usize,
    /// Write the resellers' keys to this file.
    #[arg(long, value_name = "FILE", help_heading = "Taobao")]
    write_reseller_keys: Option<PathBuf>,
    /// Calls with a reseller's key in any second.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..), value_name = "CALLS",
          help_heading = "Taobao")]
    reseller_rate: u32,
}

impl SideArgs {
    /// Taobao's, then the resellers'.
    pub(super) fn into_options(self, no_limit: bool) -> [SideOptions; 2] {
        let quota = |calls: u32| if no_limit { Quota::None } else { per_second(calls) };
        [
            SideOptions {
                accounts: self.taobao_accounts,
                accounts_file: self.write_taobao_accounts,
                quota: quota(self.taobao_rate),
                api_quota: self.taobao_api_rate.map_or(Quota::None, per_second),
            },
            SideOptions {
                accounts: self.reseller_keys,
                accounts_file: self.write_reseller_keys,
                quota: quota(self.reseller_rate),
                api_quota: Quota::None,
            },
        ]
    }
}
