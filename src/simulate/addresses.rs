//! The addresses that calls come from: each with a quota of its own, judged by arrival.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::{
    limiter::{Limiter, Quota},
    stats::AddressReport,
};

/// How many addresses are told apart; whoever comes later counts as the last one.
const ADDRESSES_LIMIT: usize = 10_000;
/// How many accounts of an address are named.
const ACCOUNTS_LIMIT: usize = 1_000;

/// All addresses so far.
#[derive(Debug)]
pub(super) struct Addresses {
    quota: Quota,
    seen: Mutex<BTreeMap<IpAddr, Seen>>,
}

#[derive(Debug)]
struct Seen {
    limiter: Limiter,
    calls: u64,
    violations: u64,
    accounts: BTreeSet<usize>,
}

impl Addresses {
    pub(super) fn new(quota: Quota) -> Self {
        Self { quota, seen: Mutex::default() }
    }

    /// Whether a call that arrived from there at that time is within the address's quota; if so it is spent.
    pub(super) fn admit(&self, from: IpAddr, arrived: Duration) -> bool {
        let mut addresses = self.lock();
        let from = if addresses.len() < ADDRESSES_LIMIT || addresses.contains_key(&from) {
            from
        } else {
            addresses.last_key_value().map_or(from, |(last, _)| *last)
        };
        let seen = addresses.entry(from).or_insert_with(|| Seen {
            limiter: Limiter::new(self.quota, Duration::ZERO),
            calls: 0,
            violations: 0,
            accounts: BTreeSet::new(),
        });
        let is_within = seen.limiter.admit(arrived);
        seen.calls += 1;
        seen.violations += u64::from(!is_within);
        is_within
    }

    /// Notes who called from there.
    pub(super) fn count(&self, from: IpAddr, account: Option<usize>) {
        if let (Some(account), Some(seen)) = (account, self.lock().get_mut(&from))
            && seen.accounts.len() < ACCOUNTS_LIMIT
        {
            seen.accounts.insert(account);
        }
    }

    /// A snapshot; `alias` names an account by its index.
    pub(super) fn report(&self, alias: impl Fn(usize) -> String) -> Vec<AddressReport> {
        let report = |(address, seen): (&IpAddr, &Seen)| AddressReport {
            address: *address,
            calls: seen.calls,
            violations: seen.violations,
            accounts: seen.accounts.iter().map(|account| alias(*account)).collect(),
        };
        self.lock().iter().map(report).collect()
    }

    /// Counts to zero; what is spent of a quota stays spent.
    pub(super) fn reset(&self) {
        for seen in self.lock().values_mut() {
            (seen.calls, seen.violations) = (0, 0);
            seen.accounts.clear();
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<IpAddr, Seen>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_address_is_judged_for_itself_and_reports_who_came_from_it() {
        let addresses = Addresses::new(Quota::Sliding { calls: 2, window: Duration::from_secs(1) });
        let (one, other): (IpAddr, IpAddr) = ("127.0.0.1".parse().unwrap(), "127.0.0.2".parse().unwrap());
        let admitted: Vec<bool> =
            [one, one, one, other].into_iter().map(|from| addresses.admit(from, Duration::ZERO)).collect();
        assert_eq!(admitted, [true, true, false, true]);
        addresses.count(one, Some(3));
        addresses.count(other, None);
        let report = addresses.report(|index| format!("sim-{index}"));
        assert_eq!((report[0].calls, report[0].violations, report[0].accounts.clone()), (3, 1, vec!["sim-3".into()]));
        assert_eq!((report[1].calls, report[1].violations, report[1].accounts.len()), (1, 0, 0));
        addresses.reset();
        assert_eq!(addresses.report(|_| String::new())[0].calls, 0);
        assert!(!addresses.admit(one, Duration::from_millis(900)), "what is spent stays spent");
    }
}
