//! What the simulated gateway counts, for people, benchmarks and tests.

use std::{
    collections::HashMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::meter::{Meter, Rates};

/// How many distinct items are counted exactly.
const ITEMS_LIMIT: usize = 2_000_000;
/// One lock per shard, so that two calls at once seldom wait for each other.
const SHARDS: usize = 16;
/// How many accounts `offenders` names.
const OFFENDERS: usize = 10;

/// What became of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Found,
    Absent,
    OffShelf,
    /// Refused with a reason that is the caller's.
    Refused(Refused),
    /// Throttled although within the quota.
    InjectedThrottle,
    /// Any other mishap.
    InjectedFailure,
    /// Tokens were given; early: the ones before had lived less than half of their time.
    Renewed {
        early: bool,
    },
}

/// Why a call was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// Over the account's quota: what a client must never cause.
    Violation,
    /// Token missing or wrong.
    Unauthorised,
    /// While a ban of an earlier call lasts.
    Banned,
    /// More ids than a call may have.
    TooMany,
    /// API, key, signature or parameters.
    Other,
}

/// A snapshot of all gateways together, as `/stats` shows it. Adds up: `served` = `found` + `absent` + `off_shelf` + `refused` +
/// `injected_throttles` + `injected_failures` + `renewals`; `refused` includes `violations` and `unauthorised`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Calls that were answered, in whatever way.
    pub served: u64,
    /// Answered with a product on sale.
    pub found: u64,
    /// Answered that there is no such product.
    pub absent: u64,
    /// Answered that the product is no longer sold.
    pub off_shelf: u64,
    /// Refused for a reason that is the caller's.
    pub refused: u64,
    /// Refused since the account was over its quota.
    pub violations: u64,
    /// Refused for a missing or wrong token.
    pub unauthorised: u64,
    /// Throttled on purpose although within the quota.
    pub injected_throttles: u64,
    /// Failed on purpose.
    pub injected_failures: u64,
    /// Tokens given for a refresh token or a code.
    #[serde(default)]
    pub renewals: u64,
    /// Those whose token had lived less than half of its time: a fleet renews each once.
    #[serde(default)]
    pub renewals_early: u64,
    /// Calls whose client went away before the answer.
    pub abandoned: u64,
    /// Calls that have not been answered yet.
    pub in_flight: u64,
    /// Calls per second.
    pub calls_per_second: Rates,
    /// Distinct items that were asked for within the quota; a lower bound if not `distinct_items_exact`.
    pub distinct_items: u64,
    /// Whether every distinct item could be counted.
    pub distinct_items_exact: bool,
    /// The most calls within the quota for one item.
    pub calls_per_item_max: u64,
    /// The accounts with most violations, the worst first.
    pub offenders: Vec<Offender>,
    /// Each gateway that was called: calls, ids per call, violations.
    #[serde(default)]
    pub gateways: std::collections::BTreeMap<String, GatewayReport>,
    /// The addresses that calls came from, by number.
    #[serde(default)]
    pub addresses: Vec<AddressReport>,
}

/// An address that calls came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressReport {
    /// Which address.
    pub address: std::net::IpAddr,
    /// How many calls came from it.
    pub calls: u64,
    /// How many of these were over its quota; the report's `violations` include those with a valid signature.
    pub violations: u64,
    /// The accounts that called from it, in order, at most 1,000.
    pub accounts: Vec<String>,
}

/// An account that went over its quota.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offender {
    /// Which account.
    pub alias: String,
    /// How often.
    pub violations: u64,
}

/// One gateway's counts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GatewayReport {
    /// Calls that were answered, in whatever way.
    pub calls: u64,
    /// Calls that were about items, and were not refused.
    pub item_calls: u64,
    /// Ids in those.
    pub items: u64,
    /// `items` / `item_calls`; 0 without calls.
    pub items_per_call: f64,
    /// The most ids of a call.
    pub items_per_call_max: u64,
    /// Refused for a reason that is the caller's.
    pub refused: u64,
    /// Of those: over the quota of an account, of an address or of the API.
    pub violations: u64,
    /// Of those: while a ban lasted. Calls that were under way when it began are among them.
    pub during_bans: u64,
    /// Of those: with more ids than a call may have.
    pub too_many_ids: u64,
    /// Throttled or failed on purpose.
    pub injected: u64,
    /// Tokens given.
    pub renewals: u64,
}

/// The counters. Cheap to update from many calls at once.
#[derive(Debug)]
pub(super) struct Stats {
    found: AtomicU64,
    absent: AtomicU64,
    off_shelf: AtomicU64,
    violations: AtomicU64,
    unauthorised: AtomicU64,
    refused_otherwise: AtomicU64,
    injected_throttles: AtomicU64,
    injected_failures: AtomicU64,
    renewals: AtomicU64,
    renewals_early: AtomicU64,
    abandoned: AtomicU64,
    in_flight: AtomicU64,
    /// By the account's index.
    violations_of: Vec<AtomicU64>,
    meter: Mutex<Meter>,
    items: Vec<Mutex<HashMap<u64, u32>>>,
    items_limit: usize,
}

impl Stats {
    pub(super) fn new(accounts: usize) -> Self {
        Self {
            found: AtomicU64::new(0),
            absent: AtomicU64::new(0),
            off_shelf: AtomicU64::new(0),
            violations: AtomicU64::new(0),
            unauthorised: AtomicU64::new(0),
            refused_otherwise: AtomicU64::new(0),
            injected_throttles: AtomicU64::new(0),
            injected_failures: AtomicU64::new(0),
            renewals: AtomicU64::new(0),
            renewals_early: AtomicU64::new(0),
            abandoned: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            violations_of: (0..accounts).map(|_| AtomicU64::new(0)).collect(),
            meter: Mutex::new(Meter::new(Duration::ZERO)),
            items: (0..SHARDS).map(|_| Mutex::new(HashMap::new())).collect(),
            items_limit: ITEMS_LIMIT,
        }
    }

    /// A call arrived. It is in flight until the guard is dropped.
    pub(super) fn arrive(&self, at: Duration) -> InFlight<'_> {
        self.in_flight.fetch_add(1, Relaxed);
        self.meter.lock().unwrap_or_else(PoisonError::into_inner).arrive(at);
        InFlight { stats: self, answered: false }
    }

    /// Counts one more call for an item.
    pub(super) fn asked_for(&self, item: u64) {
        // Neighbouring ids are the rule: spread them by a multiplication.
        let spread = item.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 60;
        let Some(shard) = usize::try_from(spread).ok().and_then(|at| self.items.get(at)) else { return };
        let mut counts = shard.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&item) {
            *count = count.saturating_add(1);
        } else if counts.len() < self.items_limit / SHARDS {
            counts.insert(item, 1);
        }
    }

    fn count(&self, outcome: Outcome, account: Option<usize>) {
        let counter = match outcome {
            Outcome::Found => &self.found,
            Outcome::Absent => &self.absent,
            Outcome::OffShelf => &self.off_shelf,
            Outcome::Refused(Refused::Violation) => {
                if let Some(counter) = account.and_then(|index| self.violations_of.get(index)) {
                    counter.fetch_add(1, Relaxed);
                }
                &self.violations
            }
            Outcome::Refused(Refused::Unauthorised) => &self.unauthorised,
            Outcome::Refused(Refused::Banned | Refused::TooMany | Refused::Other) => &self.refused_otherwise,
            Outcome::InjectedThrottle => &self.injected_throttles,
            Outcome::InjectedFailure => &self.injected_failures,
            Outcome::Renewed { early } => {
                self.renewals_early.fetch_add(early.into(), Relaxed);
                &self.renewals
            }
        };
        counter.fetch_add(1, Relaxed);
    }

    /// A snapshot at `now`; `alias` names an account by its index.
    pub(super) fn report(&self, now: Duration, alias: impl Fn(usize) -> String) -> Report {
        let [found, absent, off_shelf, violations, unauthorised, otherwise, throttles, failures, renewals] =
            self.outcomes().map(|counter| counter.load(Relaxed));
        let refused = violations + unauthorised + otherwise;
        let items = self.items();
        Report {
            served: found + absent + off_shelf + refused + throttles + failures + renewals,
            found,
            absent,
            off_shelf,
            refused,
            violations,
            unauthorised,
            injected_throttles: throttles,
            injected_failures: failures,
            renewals,
            renewals_early: self.renewals_early.load(Relaxed),
            abandoned: self.abandoned.load(Relaxed),
            in_flight: self.in_flight.load(Relaxed),
            calls_per_second: self.meter.lock().unwrap_or_else(PoisonError::into_inner).rates(now),
            distinct_items: items.distinct,
            distinct_items_exact: items.exact,
            calls_per_item_max: items.most,
            offenders: self.offenders(alias),
            gateways: std::collections::BTreeMap::new(),
            addresses: Vec::new(),
        }
    }

    /// Everything back to zero, but for the calls in flight.
    pub(super) fn reset(&self, now: Duration) {
        for counter in
            self.outcomes().into_iter().chain([&self.abandoned, &self.renewals_early]).chain(&self.violations_of)
        {
            counter.store(0, Relaxed);
        }
        for shard in &self.items {
            shard.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
        *self.meter.lock().unwrap_or_else(PoisonError::into_inner) = Meter::new(now);
    }

    fn outcomes(&self) -> [&AtomicU64; 9] {
        [
            &self.found,
            &self.absent,
            &self.off_shelf,
            &self.violations,
            &self.unauthorised,
            &self.refused_otherwise,
            &self.injected_throttles,
            &self.injected_failures,
            &self.renewals,
        ]
    }

    fn items(&self) -> Items {
        let mut items = Items { distinct: 0, exact: true, most: 0 };
        for shard in &self.items {
            let counts = shard.lock().unwrap_or_else(PoisonError::into_inner);
            items.distinct += counts.len() as u64;
            items.exact &= counts.len() < self.items_limit / SHARDS;
            items.most = items.most.max(u64::from(counts.values().copied().max().unwrap_or(0)));
        }
        items
    }

    fn offenders(&self, alias: impl Fn(usize) -> String) -> Vec<Offender> {
        let counts = self.violations_of.iter().map(|counter| counter.load(Relaxed)).enumerate();
        let mut counts: Vec<(usize, u64)> = counts.filter(|(_, violations)| *violations > 0).collect();
        counts.sort_by_key(|(index, violations)| (u64::MAX - violations, *index));
        counts.truncate(OFFENDERS);
        counts.into_iter().map(|(index, violations)| Offender { alias: alias(index), violations }).collect()
    }
}

struct Items {
    distinct: u64,
    exact: bool,
    most: u64,
}

/// A call that has not been answered yet.
#[derive(Debug)]
pub(super) struct InFlight<'a> {
    stats: &'a Stats,
    answered: bool,
}

impl InFlight<'_> {
    /// The answer is on its way.
    pub(super) fn answer(mut self, outcome: Outcome, account: Option<usize>) {
        self.answered = true;
        self.stats.count(outcome, account);
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.stats.in_flight.fetch_sub(1, Relaxed);
        if !self.answered {
            self.stats.abandoned.fetch_add(1, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(stats: &Stats) -> Report {
        stats.report(Duration::from_secs(1), |index| format!("sim-{index}"))
    }

    #[test]
    fn the_parts_add_up_to_what_was_served() {
        let stats = Stats::new(3);
        let outcomes = [
            (Outcome::Found, 7),
            (Outcome::Absent, 1),
            (Outcome::OffShelf, 2),
            (Outcome::Refused(Refused::Violation), 3),
            (Outcome::Refused(Refused::Unauthorised), 4),
            (Outcome::Refused(Refused::Other), 5),
            (Outcome::InjectedThrottle, 6),
            (Outcome::InjectedFailure, 8),
            (Outcome::Renewed { early: false }, 9),
            (Outcome::Renewed { early: true }, 1),
        ];
        for (outcome, times) in outcomes {
            for _ in 0..times {
                stats.arrive(Duration::ZERO).answer(outcome, Some(1));
            }
        }
        drop(stats.arrive(Duration::ZERO));
        let in_flight = stats.arrive(Duration::ZERO);

        let report = report(&stats);
        assert_eq!((report.served, report.refused, report.violations, report.unauthorised), (46, 12, 3, 4));
        assert_eq!((report.found, report.absent, report.off_shelf), (7, 1, 2));
        assert_eq!((report.injected_throttles, report.injected_failures), (6, 8));
        assert_eq!((report.renewals, report.renewals_early), (10, 1));
        assert_eq!((report.abandoned, report.in_flight), (1, 1));
        assert_eq!(report.offenders, [Offender { alias: "sim-1".into(), violations: 3 }]);
        drop(in_flight);
    }

    #[test]
    fn offenders_are_the_ten_worst_in_order() {
        let stats = Stats::new(20);
        for account in 0..20 {
            for _ in 0..account {
                stats.arrive(Duration::ZERO).answer(Outcome::Refused(Refused::Violation), Some(account));
            }
        }
        let violations: Vec<u64> = report(&stats).offenders.iter().map(|offender| offender.violations).collect();
        assert_eq!(violations, (10..20).rev().collect::<Vec<u64>>());
    }

    #[test]
    fn items_are_counted_exactly_up_to_the_limit() {
        let stats = Stats { items_limit: 32 * SHARDS, ..Stats::new(0) };
        for item in 0..100 {
            stats.asked_for(item);
        }
        stats.asked_for(7);
        let first = report(&stats);
        assert_eq!((first.distinct_items, first.distinct_items_exact, first.calls_per_item_max), (100, true, 2));
        for item in 0..10_000 {
            stats.asked_for(item);
        }
        let full = report(&stats);
        assert_eq!((full.distinct_items, full.distinct_items_exact), (32 * SHARDS as u64, false));
    }

    #[test]
    fn a_reset_keeps_only_what_is_in_flight() {
        let stats = Stats::new(1);
        let in_flight = stats.arrive(Duration::ZERO);
        stats.arrive(Duration::ZERO).answer(Outcome::Refused(Refused::Violation), Some(0));
        stats.asked_for(1);
        stats.reset(Duration::from_millis(500));
        let after = report(&stats);
        assert_eq!((after.served, after.violations, after.distinct_items, after.in_flight), (0, 0, 0, 1));
        assert!(after.offenders.is_empty());
        assert_eq!(after.calls_per_second, Rates { last_1s: 0.0, last_10s: 0.0 });
        drop(in_flight);
    }
}
