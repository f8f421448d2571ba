//! What the limits of a source come down to: a spacing, a lateness and budgets for each account, address and the
//! source itself. Pure.

use std::time::Duration;

use super::{
    Limit, Pacing,
    adapt::{Basis, least_of_guess},
    budget::Rule,
    limit::{Micros, micros},
    pace::Pace,
};

/// An account that nothing limits calls no faster than this, wherever it matters how many calls there may have been: 10,000
/// a second are more than a process makes.
const FREE_SPACING: Micros = 100;

/// What a vendor allows a source: all of it holds together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Each account, by index.
    pub accounts: Vec<AccountLimits>,
    /// All calls of the source.
    pub source: Vec<Limit>,
    /// The calls that leave from each address that has no limits of its own.
    pub address: Vec<Limit>,
    /// The addresses by index, as far as there is something to say of them.
    pub addresses: Vec<AddressLimits>,
    /// Accounts without a limit go as fast as they can: somebody said so.
    pub unlimited: bool,
    /// After so long each call has ended, whatever the vendor does; `None`: nobody has said.
    pub longest_call: Option<Duration>,
}

/// What a vendor allows one address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddressLimits {
    /// What the fleet calls it: whoever has another list of addresses shares those of the same name.
    pub name: String,
    /// What holds instead of [`Limits::address`]; `None` = that.
    pub own: Option<Vec<Limit>>,
}

impl Limits {
    /// With `unknown` for every account that nothing paces, neither a limit of its own nor one that it shares.
    ///
    /// An API without any limit is rare, and one whose limit nobody has looked up is not: calling that one as fast as it
    /// goes gets the account banned at its first backlog. So it begins slowly and is sought, as [`super::adapt`] has
    /// it; as fast as it goes is for those who say so.
    #[must_use]
    pub fn or_unknown(&self, unknown: &Limit) -> Self {
        let mut limits = self.clone();
        let is_paced = |limits: &[Limit]| limits.iter().any(Limit::is_paced);
        if self.unlimited || is_paced(&self.source) {
            return limits;
        }
        let is_unknown =
            |account: &&mut AccountLimits| !is_paced(&account.limits) && !is_paced(self.of_address(account.address));
        for account in limits.accounts.iter_mut().filter(is_unknown) {
            account.limits.push(unknown.clone());
            account.is_guess = true;
        }
        limits
    }
}

/// What a vendor allows an account.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AccountLimits {
    /// Limits that all hold together; none = as fast as it goes.
    pub limits: Vec<Limit>,
    /// Index of the address that its calls leave from: the same for accounts that share one.
    pub address: usize,
    /// Where it goes, in this order, as long as that one is held; empty = it waits.
    pub fallbacks: Vec<usize>,
    /// How many of its calls may be under way at once; `None` = any number.
    pub in_flight: Option<u32>,
    /// Its limits are a guess, with which a search begins.
    pub is_guess: bool,
}

impl Limits {
    /// Whether there is a budget among them: something that is spent and has to be remembered.
    #[must_use]
    pub fn has_budgets(&self) -> bool {
        let accounts = self.accounts.iter().flat_map(|account| &account.limits);
        let addresses = self.addresses.iter().flat_map(|address| address.own.iter().flatten());
        accounts.chain(&self.source).chain(&self.address).chain(addresses).any(|limit| !limit.is_paced())
    }

    /// One limit for each account, all of one address.
    #[must_use]
    pub fn of_accounts(limits: impl IntoIterator<Item = Option<Limit>>) -> Self {
        let account =
            |limit: Option<Limit>| AccountLimits { limits: limit.into_iter().collect(), ..Default::default() };
        Self { accounts: limits.into_iter().map(account).collect(), ..Self::default() }
    }

    /// How many addresses there are; at least one.
    #[must_use]
    pub fn address_count(&self) -> usize {
        let used = self.accounts.iter().map(|account| account.address + 1).max();
        used.unwrap_or_default().max(self.addresses.len()).max(1)
    }

    /// What the vendor allows the address of this index.
    #[must_use]
    pub fn of_address(&self, index: usize) -> &[Limit] {
        let own = self.addresses.get(index).and_then(|address| address.own.as_deref());
        own.unwrap_or(&self.address)
    }
}

impl AccountLimits {
    fn basis(&self) -> Basis {
        match self.limits.iter().any(Limit::is_paced) {
            true if self.is_guess => Basis::Guess,
            true => Basis::Known,
            false => Basis::Free,
        }
    }
}

/// The same in the terms of the arithmetic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// By index.
    pub accounts: Vec<AccountPlan>,
    /// By index; at least one.
    pub addresses: Vec<Rules>,
    /// What the fleet calls them.
    pub address_names: Vec<String>,
    /// For all calls together.
    pub source: Rules,
    /// As [`Limits::longest_call`].
    pub longest_call: Option<Duration>,
}

/// The least time between two calls, as far as anything keeps them apart: of what nobody can know, such as the calls of a
/// process that was killed, this bounds how many there were.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fastest {
    /// All calls of the source.
    pub source: Micros,
    /// Those from each address, by index.
    pub addresses: Vec<Micros>,
    /// Those of each account, by index.
    pub accounts: Vec<Micros>,
}

/// One account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccountPlan {
    /// What it keeps to.
    pub rules: Rules,
    /// What its spacing is.
    pub basis: Basis,
    /// Index of its address.
    pub address: usize,
    /// Where it goes, in this order, as long as that one is held.
    pub fallbacks: Vec<usize>,
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
        let terms = |limits: &[Limit]| {
            let budgets = limits.iter().filter_map(|limit| Rule::of(limit, pacing)).collect();
            let Pace { spacing, lateness } = pacing.pace(limits);
            (Rules { spacing: micros(spacing), budgets }, lateness)
        };
        let (source, mut shared) = terms(&limits.source);
        let mut addresses = Vec::new();
        for number in 0..limits.address_count() {
            let (rules, lateness) = terms(limits.of_address(number));
            addresses.push(rules);
            // An account may move, so that every address counts for it.
            shared = shared.min(lateness);
        }
        let account = |account: &AccountLimits| {
            let (rules, lateness) = terms(&account.limits);
            AccountPlan {
                rules,
                basis: account.basis(),
                address: account.address,
                fallbacks: account.fallbacks.clone(),
                in_flight: account.in_flight,
                lateness: lateness.min(shared),
            }
        };
        let name = |number: usize| {
            let named = limits.addresses.get(number).map(|address| address.name.clone());
            named.unwrap_or_else(|| number.to_string())
        };
        Self {
            accounts: limits.accounts.iter().map(account).collect(),
            address_names: (0..addresses.len()).map(name).collect(),
            addresses,
            source,
            longest_call: limits.longest_call,
        }
    }

    /// How fast calls can follow each other: what has no spacing of its own is as fast as its accounts together.
    #[must_use]
    pub fn fastest(&self) -> Fastest {
        let of_address = |index: &usize| self.addresses.get(*index).map_or(0, |rules| rules.spacing);
        let account = |account: &AccountPlan| {
            let own = match (account.basis, account.rules.spacing) {
                (Basis::Free, _) | (_, 0) => FREE_SPACING,
                (Basis::Known, spacing) => spacing,
                // What is sought may have been found by now.
                (Basis::Guess, spacing) => least_of_guess(spacing),
            };
            let places = std::iter::once(&account.address).chain(&account.fallbacks);
            own.max(places.map(of_address).min().unwrap_or_default()).max(self.source.spacing)
        };
        let accounts: Vec<Micros> = self.accounts.iter().map(account).collect();
        let together = |spacings: &mut dyn Iterator<Item = Micros>| interval(spacings).max(1);
        let address = |(index, rules): (usize, &Rules)| {
            let may_call =
                |account: &(&AccountPlan, &Micros)| account.0.address == index || account.0.fallbacks.contains(&index);
            let callers = self.accounts.iter().zip(&accounts);
            let together = together(&mut callers.filter(may_call).map(|(_, spacing)| *spacing));
            rules.spacing.max(together).max(self.source.spacing)
        };
        let addresses = self.addresses.iter().enumerate().map(address).collect();
        let source = self.source.spacing.max(together(&mut accounts.iter().copied()));
        Fastest { source, addresses, accounts }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::Counting;

    #[test]
    fn what_has_no_pace_of_its_own_is_as_fast_as_its_accounts_together() {
        let second = Duration::from_secs(1);
        let of =
            |calls| AccountLimits { limits: vec![Limit::new(calls, second, 5).unwrap()], ..AccountLimits::default() };
        let day = Limit::window(5_000, second * 86_400, Counting::Sliding).unwrap();
        let away = AccountLimits { address: 1, fallbacks: vec![0], ..of(5) };
        let accounts = vec![of(10), of(10), away, AccountLimits { limits: vec![day.clone()], ..of(1) }];
        let limits = Limits { accounts, source: vec![day], ..Limits::default() };
        let pacing = Pacing { margin: 0.0, jitter: Duration::ZERO };
        let fastest = Plan::new(&limits, &pacing).fastest();
        assert_eq!(fastest.accounts, [100_000, 100_000, 200_000, FREE_SPACING]);
        assert_eq!(fastest.addresses, [99, 199_999], "an account may come here when its own address is away");
        assert_eq!(fastest.source, 99);
        let limits = Limits { source: vec![Limit::new(2, second, 2).unwrap()], ..limits };
        let fastest = Plan::new(&limits, &pacing).fastest();
        assert_eq!((fastest.source, &fastest.accounts[..]), (500_000, &[500_000; 4][..]), "nobody is faster than all");
        let guess = AccountLimits { is_guess: true, ..of(1) };
        let fastest = Plan::new(&Limits { accounts: vec![guess], ..Limits::default() }, &pacing).fastest();
        assert!((1_000..1_100).contains(&fastest.accounts[0]), "{fastest:?}: a thousand times what it began with");
    }

    #[test]
    fn only_an_account_that_nothing_paces_begins_with_a_guess() {
        let second = Duration::from_secs(1);
        let (unknown, limit) = (Limit::new(1, second, 1).unwrap(), Limit::new(10, second, 5).unwrap());
        let day = Limit::window(5_000, second * 86_400, Counting::Sliding).unwrap();
        let limits = Limits::of_accounts([None, Some(limit.clone()), Some(day.clone())]);
        let guessed = limits.or_unknown(&unknown);
        assert_eq!(guessed.accounts[0].limits, std::slice::from_ref(&unknown));
        assert_eq!(guessed.accounts[1], limits.accounts[1]);
        assert_eq!(guessed.accounts[2].limits, [day, unknown.clone()], "a budget holds on top");
        let bases: Vec<_> =
            Plan::new(&guessed, &Pacing::default()).accounts.iter().map(|account| account.basis).collect();
        assert_eq!(bases, [Basis::Guess, Basis::Known, Basis::Guess]);
        for paced in [
            Limits { unlimited: true, ..limits.clone() },
            Limits { source: vec![limit.clone()], ..limits.clone() },
            Limits { address: vec![limit], ..limits },
        ] {
            assert_eq!(paced.or_unknown(&unknown), paced);
        }
    }
}
