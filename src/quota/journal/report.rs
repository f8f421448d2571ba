//! A worker's reports: what it knows of its accounts, in records that are not too large.

use std::{
    collections::HashMap,
    fmt::Write as _,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    ops::Range,
    sync::Arc,
};

use super::known::report_key;
use crate::{
    kafka::Outgoing,
    message::{
        AccountReport, AddressReport, CutOffReport, DelayReport, HoldReport, QuotaReport, SourceName, WholeReport,
        codec,
        envelope::{Envelope, Kind},
    },
    quota::{
        AddressState, Aliases, CutOff, Held, Limit, Quota, Snapshot, Tally,
        plan::Limits,
        purse::Purse,
        tally::{Again, Counts, midnight},
        used_up::Allowance,
    },
    runtime::clock::{Clock, Timestamp},
};

/// How many accounts a record is about: some 100 kB, most of it what is spent.
pub const CHUNK: usize = 500;

/// Everything that a report is made of.
pub struct Reporter {
    /// The topic.
    pub topic: Arc<str>,
    /// The source.
    pub source: SourceName,
    /// This worker.
    pub instance: String,
    /// Its accounts.
    pub aliases: Aliases,
    /// What each of them is allowed, in words.
    pub allowed: Vec<String>,
    /// The same as the quota has it, to tell which budgets are spent.
    pub allowance: Arc<Allowance>,
    /// What is spent and held.
    pub quota: Arc<dyn Quota>,
    /// What is spent of the budgets of batches, if they have any.
    pub purse: Option<Arc<Purse>>,
    /// What became of the slots.
    pub tally: Arc<Tally>,
    /// The time of day.
    pub clock: Clock,
}

/// A report ready to be written, and a fingerprint of all in it but its time.
pub struct Written {
    /// Which part.
    pub chunk: u32,
    /// The fingerprint.
    pub print: u64,
    /// The record.
    pub record: Outgoing,
}

impl Reporter {
    /// In how many parts the accounts are reported; at least one.
    #[must_use]
    pub fn chunks(&self) -> u32 {
        u32::try_from(self.aliases.len().div_ceil(CHUNK).max(1)).unwrap_or(u32::MAX)
    }

    /// Calls of today, of all accounts.
    #[must_use]
    pub fn calls(&self) -> u64 {
        (0..self.aliases.len()).map(|account| self.tally.of(account).calls).sum()
    }

    /// One part as a record.
    #[must_use]
    pub fn write(&self, chunk: u32, closed: bool) -> Written {
        let report = self.report(chunk, closed);
        let still =
            QuotaReport { reported_at: Timestamp::default(), counted_at: Timestamp::default(), ..report.clone() };
        let mut hasher = DefaultHasher::new();
        serde_json::to_vec(&still).unwrap_or_default().hash(&mut hasher);
        let (id, writer) = (uuid::Uuid::now_v7().to_string(), format!("weir/fetch/{}", self.source));
        let (kind, time) = (Kind::QuotaReport, report.reported_at);
        let encoded = codec::encode(&Envelope { kind, id: &id, writer: &writer, time, traceparent: None }, &report);
        let key = Some(report_key(&self.source, &self.instance, chunk).into());
        let record = Outgoing { topic: Arc::clone(&self.topic), key, value: encoded.value, headers: encoded.headers };
        Written { chunk, print: hasher.finish(), record }
    }

    fn report(&self, chunk: u32, closed: bool) -> QuotaReport {
        let now = self.clock.now();
        let first = usize::try_from(chunk).unwrap_or_default() * CHUNK;
        let accounts: Range<usize> = first..(first + CHUNK).min(self.aliases.len());
        let Snapshot { counted_at, whole, addresses, accounts: states, cut_off } =
            self.quota.snapshot(accounts.clone(), now);
        let allowance = &*self.allowance;
        let limits_of = |index: usize| allowance.limits.accounts.get(index).map_or(&[][..], |of| of.limits.as_slice());
        let address_of = |index: usize| addresses.get(index).filter(|_| addresses.len() > 1);
        let account = |(index, state): (usize, crate::quota::State)| {
            let counts = self.tally.of(index);
            AccountReport {
                alias: self.aliases[index].clone(),
                allowed: self.allowed.get(index).cloned().unwrap_or_default(),
                calls_last_minute: counts.last_minute(now),
                calls: counts.calls,
                refused: counts.refused,
                late: counts.late,
                returned: counts.returned,
                held: state.held.as_ref().map(hold_report),
                used_up: allowance.used_up(limits_of(index), &state.spent, now),
                address: address_of(state.address).map(|address| address.name.clone()),
                next_at: state.next_at,
                spent: state.spent,
            }
        };
        let accounts = accounts.zip(states).map(account).collect();
        let address = |(index, AddressState { name, held, spent }): (usize, AddressState)| {
            let held = held.as_ref().map(hold_report);
            let used_up = allowance.used_up(allowance.limits.of_address(index), &spent, now);
            AddressReport { name, held, used_up, spent }
        };
        let addresses = addresses.into_iter().enumerate().map(address).collect();
        let cut_off = cut_off.map(|CutOff { since, stopped }| CutOffReport { since_at: since, stopped });
        let millis = |time: std::time::Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let delays = self.tally.delayed().map(|delayed| DelayReport {
            late_ms: millis(delayed.late),
            bunched_ms: millis(delayed.bunched),
            pace: (delayed.share * 1_000.0).round() / 1_000.0,
        });
        let batches = self.purse.as_ref().map(|purse| purse.reports()).unwrap_or_default();
        let used_up = allowance.used_up(&allowance.limits.source, &whole.spent, now);
        let again = self.tally.again();
        let whole = WholeReport {
            held: whole.held.as_ref().map(hold_report),
            used_up,
            spent: whole.spent,
            addresses,
            batches,
            cut_off,
            delays,
            calls_again: again.calls,
            silent_ends: again.silent_ends,
        };
        QuotaReport {
            source: self.source.clone(),
            instance: self.instance.clone(),
            chunk,
            chunks: self.chunks(),
            reported_at: now,
            counted_at,
            day_at: midnight(now),
            closed,
            whole: (chunk == 0).then_some(whole),
            accounts,
        }
    }

    /// Goes on with today's counts where a worker of this name ended.
    pub fn resume<'a>(&self, reports: impl Iterator<Item = &'a QuotaReport>) {
        let indices: HashMap<_, _> = self.aliases.iter().zip(0..).collect();
        for report in reports.filter(|report| report.instance == self.instance) {
            if let Some(whole) = &report.whole {
                let again = Again::of_day(report.day_at, whole.calls_again, whole.silent_ends);
                self.tally.resume_again(again, report.closed);
            }
            for account in &report.accounts {
                let Some(&index) = indices.get(&account.alias) else { continue };
                let AccountReport { calls, refused, late, returned, .. } = *account;
                self.tally.resume(index, &Counts::of_day(report.day_at, [calls, refused, late, returned]));
            }
        }
    }
}

fn hold_report(held: &Held) -> HoldReport {
    HoldReport { until_at: held.until, reason: held.cause.reason.to_string(), since_at: held.cause.since }
}

/// What each account is allowed, in words.
#[must_use]
pub fn allowed(limits: &Limits) -> Vec<String> {
    let words = |account: &crate::quota::plan::AccountLimits| {
        let mut words = account.limits.iter().map(Limit::words).collect::<Vec<_>>().join(", ");
        if let Some(most) = account.in_flight {
            let _ = write!(words, "{}{most} at once", if words.is_empty() { "" } else { ", " });
        }
        match (words.is_empty(), account.is_guess) {
            (true, _) => "no limit".to_owned(),
            (false, true) => format!("unknown, from {words}"),
            (false, false) => words,
        }
    };
    limits.accounts.iter().map(words).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        message::AccountAlias,
        quota::{Counting, Hold, Lease, Pacing, Scope, memory::Memory, plan::AccountLimits},
    };

    fn reporter(accounts: usize) -> Reporter {
        let day = Limit::window(5_000, Duration::from_secs(86_400), Counting::Sliding).unwrap();
        let limits = vec![Limit::new(10, Duration::from_secs(1), 5).unwrap(), day];
        let account = AccountLimits { limits, in_flight: Some(3), ..AccountLimits::default() };
        let limits = Limits { accounts: vec![account; accounts], ..Limits::default() };
        let clock = Clock::simulated(Timestamp::from_millis(1_700_000_000_000));
        Reporter {
            topic: "weir.quota".into(),
            source: SourceName::new("ali1688").unwrap(),
            instance: "w".to_owned(),
            aliases: (0..accounts).map(|n| AccountAlias::new(format!("account-{n}")).unwrap()).collect(),
            allowed: allowed(&limits),
            allowance: Arc::new(Allowance { limits: limits.clone(), ..Allowance::default() }),
            quota: Arc::new(Memory::with_limits(&limits, &Pacing::default(), &clock)),
            purse: None,
            tally: Arc::new(Tally::new(accounts, clock.clone())),
            clock,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_report_says_what_is_allowed_used_spent_and_held() {
        let reporter = reporter(2);
        tokio::time::sleep(Duration::from_secs(5)).await;
        let Lease::Slots(slots) = reporter.quota.lease(2).await else { panic!("rested accounts have slots") };
        reporter.tally.called(slots[0].account, true);
        reporter.tally.called(slots[1].account, true);
        let cause = crate::quota::Cause::new("401", reporter.clock.now());
        reporter.quota.hold(Scope::Account(1), Hold::Disabled, &cause).await;
        let report = reporter.report(0, false);
        let [first, second] = &report.accounts[..] else { panic!("{report:?}") };
        assert_eq!((first.allowed.as_str(), first.calls, first.refused), ("10/1s burst 5, 5000/1day, 3 at once", 1, 1));
        assert_eq!((first.held.clone(), first.spent[0].calls.iter().sum::<u64>()), (None, 1));
        let held = second.held.clone().unwrap();
        assert_eq!((held.until_at, held.reason.as_str(), second.next_at), (None, "401", None));
        let text = serde_json::to_vec(&report).unwrap();
        assert_eq!(serde_json::from_slice::<QuotaReport>(&text).unwrap(), report);
    }

    #[tokio::test(start_paused = true)]
    async fn a_report_says_which_budget_is_spent_and_until_when() {
        let reporter = reporter(1);
        let limit = &reporter.allowance.limits.accounts[0].limits[1];
        let state = reporter.quota.snapshot(0..1, reporter.clock.now()).accounts.remove(0);
        let rule = crate::quota::budget::Rule::of(limit, &Pacing::default()).unwrap();
        let mut budget = crate::quota::budget::Budget::new(rule);
        budget.doubt(u64::MAX, 1_700_000_000_000_000);
        let spent = vec![budget.spent()];
        assert!(state.spent[0].calls.is_empty() && reporter.report(0, false).accounts[0].used_up.is_none());
        let told =
            reporter.allowance.used_up(&reporter.allowance.limits.accounts[0].limits, &spent, reporter.clock.now());
        assert_eq!(told.unwrap().reason, "budget spent, 5000 of 5000 calls of 5000/1day");
    }

    #[tokio::test(start_paused = true)]
    async fn the_print_changes_with_what_is_known_and_not_with_the_time() {
        let reporter = reporter(1);
        tokio::time::sleep(Duration::from_secs(60)).await;
        let print = || reporter.write(0, false).print;
        let before = print();
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(print(), before);
        reporter.tally.called(0, false);
        assert_ne!(print(), before);
    }

    #[tokio::test(start_paused = true)]
    async fn ten_thousand_accounts_are_twenty_records_and_a_busy_days_history_of_one_is_small() {
        assert_eq!(reporter(10_000).chunks(), 20);
        assert_eq!(reporter(10_000).report(19, false).accounts.len(), CHUNK);
        let reporter = reporter(CHUNK);
        for _ in 0..100 {
            tokio::time::sleep(Duration::from_secs(864)).await;
            let Lease::Slots(slots) = reporter.quota.lease(CHUNK).await else { panic!("rested accounts have slots") };
            for slot in slots {
                reporter.quota.ended(slot.account);
            }
        }
        let buckets: usize =
            reporter.report(0, false).accounts.iter().map(|account| account.spent[0].calls.len()).sum();
        assert!(buckets > CHUNK * 50, "{buckets} buckets");
        let size = reporter.write(0, false).record.size();
        assert!(size < 512 * 1024, "{size}");
    }
}
