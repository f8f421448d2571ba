//! What the limits of a source come down to: a spacing, a lateness and budgets for each account, address and the
//! source itself. Pure.

use std::time::Duration;

use super::{
    Limit, Pacing,
    budget::Rule,
    limit::{Micros, micros},
};

/// What a vendor allows a source: all of it holds together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Each account, by index.
    pub accounts: Vec<AccountLimits>,
    /// All calls of the source.
    pub source: Vec<Limit>,
    /// The calls that leave from each address.
    pub address: Vec<Limit>,
}

/// What a vendor allows an account.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AccountLimits {
    /// Limits that all hold together; none = as fast as it goes.
    pub limits: Vec<Limit>,
    /// From which address its calls leave: any number, the same for accounts that share one.
    pub address: usize,
    /// How many of its calls may be under way at once; `None` = any number.
    pub in_flight: Option<u32>,
}

impl Limits {
    /// Whether there is a budget among them: something that is spent and has to be remembered.
    #[must_use]
    pub fn has_budgets(&self) -> bool {
        let accounts = self.accounts.iter().flat_map(|account| &account.limits);
        accounts.chain(&self.source).chain(&self.address).any(|limit| !limit.is_paced())
    }

    /// One limit for each account, all of one address.
    #[must_use]
    pub fn of_accounts(limits: impl IntoIterator<Item = Option<Limit>>) -> Self {
        let account =
            |limit: Option<Limit>| AccountLimits { limits: limit.into_iter().collect(), ..Default::default() };
        Self { accounts: limits.into_iter().map(account).collect(), ..Self::default() }
    }
}

/// The same in the terms of the arithmetic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// By index.
    pub accounts: Vec<AccountPlan>,
    /// By index; at least one.
    pub addresses: Vec<Rules>,
    /// For all calls together.
    pub source: Rules,
}

/// One account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccountPlan {
    /// What it keeps to.
    pub rules: Rules,
    /// Index of its address.
    pub address: usize,
    /// How many of its calls may be under way.
    pub in_flight: Option<u32>,
    /// How late a slot of it may be used, after all its limits.
    pub lateness: Duration,
}

/// What an account, an address or a source keeps to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Between two slots; zero without a limit.
    pub spacing: Micros,
    /// Long windows.
    pub budgets: Vec<Rule>,
}

impl Plan {
    /// The plan for these limits at this pacing.
    #[must_use]
    pub fn new(limits: &Limits, pacing: &Pacing) -> Self {
        let shared = pacing.pace(&limits.source).lateness.min(pacing.pace(&limits.address).lateness);
        let mut numbers: Vec<usize> = limits.accounts.iter().map(|account| account.address).collect();
        numbers.sort_unstable();
        numbers.dedup();
        let account = |account: &AccountLimits| AccountPlan {
            rules: Rules::new(&account.limits, pacing),
            address: numbers.binary_search(&account.address).unwrap_or_default(),
            in_flight: account.in_flight,
            lateness: pacing.pace(&account.limits).lateness.min(shared),
        };
        Self {
            accounts: limits.accounts.iter().map(account).collect(),
            addresses: vec![Rules::new(&limits.address, pacing); numbers.len().max(1)],
            source: Rules::new(&limits.source, pacing),
        }
    }
}

impl Rules {
    fn new(limits: &[Limit], pacing: &Pacing) -> Self {
        let budgets = limits.iter().filter_map(|limit| Rule::of(limit, pacing)).collect();
        Self { spacing: micros(pacing.pace(limits).spacing), budgets }
    }
}

/// The time between two slots of accounts with these spacings that call evenly; zero if one has no limit.
#[must_use]
pub fn interval(spacings: impl Iterator<Item = Micros>) -> Micros {
    #[allow(clippy::cast_precision_loss, reason = "a spacing of years is rounded by a second")]
    let per_micro: f64 = spacings.map(|spacing| 1.0 / spacing as f64).sum();
    // Without accounts the sum is zero, with an unlimited one infinite: neither has an interval.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float is clamped, not cut")]
    if per_micro > 0.0 { (1.0 / per_micro) as Micros } else { 0 }
}
