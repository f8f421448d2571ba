//! What a process that begins takes for granted: merged from the reports of all workers and from what an operator
//! has set. Pure.
//!
//! Between a worker's last report and its end it may have called without anybody knowing. A worker that cannot
//! report stops after [`UNREPORTED_MAX`]; one that ends in good order says so. What lies in between is doubt: as
//! many calls as the pace allows are taken for made, at the latest moment that they can have been made. What has no pace of
//! its own, such as a source with nothing but a day's budget, has that of its accounts together ([`Fastest`]).
//!
//! [`Fastest`]: super::plan::Fastest

use std::{collections::HashMap, time::Duration};

use super::{
    Cause, Held,
    budget::{
        Budget, Rule,
        spent::{concerns, merged},
    },
    limit::Micros,
    purse::ledger::Ledger,
};
use crate::{
    message::{AccountAlias, HoldReport, QuotaReport, QuotaSetting, Spent},
    runtime::clock::Timestamp,
};

/// For so long a worker may call without its reports being taken, at most.
pub const UNREPORTED_MAX: Duration = Duration::from_secs(60);

/// What is known of the past of a source.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Past {
    /// Somebody has looked: what is not here has not been.
    pub is_read: bool,
    /// There are reports: workers have called before.
    pub is_known: bool,
    /// The source as a whole.
    pub whole: PastOf,
    /// Each address of which there is a report, by its name.
    pub addresses: HashMap<String, PastOf>,
    /// Each account of which there is a report.
    pub accounts: HashMap<AccountAlias, PastOf>,
    /// What is spent of the budgets of batches.
    pub batches: Ledger,
}

/// What is known of the past of one account, address, or of the source as a whole.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PastOf {
    /// What was spent of its budgets.
    pub spent: Vec<Spent>,
    /// When that was counted.
    pub counted_at: Timestamp,
    /// Until when unreported calls may have been made.
    pub doubt_until: Timestamp,
    /// Why it does not call.
    pub held: Option<Held>,
}

/// What is set for a source.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// For each account, and for the source as a whole.
    pub accounts: HashMap<Option<AccountAlias>, QuotaSetting>,
    /// For each address, by its name.
    pub addresses: HashMap<String, QuotaSetting>,
}

/// Everything that reports and settings say, as of `now`.
#[must_use]
pub fn merge<'a>(reports: impl IntoIterator<Item = &'a QuotaReport>, settings: &Settings, now: Timestamp) -> Past {
    let mut past = Past { is_read: true, ..Past::default() };
    for report in reports {
        past.is_known = true;
        if let Some(whole) = &report.whole {
            past.whole.learn(report, &whole.spent, whole.held.as_ref(), now);
            past.batches.read(&whole.batches);
            for address in &whole.addresses {
                let known = past.addresses.entry(address.name.clone()).or_default();
                known.learn(report, &address.spent, address.held.as_ref(), now);
            }
        }
        for account in &report.accounts {
            let known = past.accounts.entry(account.alias.clone()).or_default();
            known.learn(report, &account.spent, account.held.as_ref(), now);
        }
    }
    past.whole.settle(settings.accounts.get(&None), now);
    for (name, known) in &mut past.addresses {
        known.settle(settings.addresses.get(name), now);
    }
    for (alias, known) in &mut past.accounts {
        known.settle(settings.accounts.get(&Some(alias.clone())), now);
    }
    past
}

impl Past {
    /// Whether nobody can have called since it was counted.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        let all = self.accounts.values().chain(self.addresses.values()).chain([&self.whole]);
        all.into_iter().all(|known| known.doubt().is_zero())
    }

    /// When it was counted, at the earliest; and for how long nobody knows what was called.
    #[must_use]
    pub fn doubt(&self) -> Duration {
        let all = self.accounts.values().chain(self.addresses.values()).chain([&self.whole]);
        all.map(PastOf::doubt).max().unwrap_or_default()
    }
}

impl PastOf {
    fn learn(&mut self, report: &QuotaReport, spent: &[Spent], held: Option<&HoldReport>, now: Timestamp) {
        self.spent = merged(std::mem::take(&mut self.spent), spent);
        self.counted_at = self.counted_at.max(report.counted_at);
        let until = if report.closed { report.reported_at } else { report.reported_at.after(UNREPORTED_MAX).min(now) };
        self.doubt_until = self.doubt_until.max(until);
        if let Some(held) = held {
            let held = Held {
                until: held.until_at,
                cause: Cause { reason: held.reason.as_str().into(), since: held.since_at },
            };
            self.held = Some(match self.held.take() {
                Some(known) => known.longer(held),
                None => held,
            });
        }
    }

    /// What is over, or was resumed by an operator, holds nobody any more.
    fn settle(&mut self, setting: Option<&QuotaSetting>, now: Timestamp) {
        let resumed_at = setting.and_then(|setting| setting.resumed_at);
        let holds = |held: &Held| {
            held.until.is_none_or(|until| until > now) && resumed_at.is_none_or(|resumed| held.cause.since > resumed)
        };
        self.held = self.held.take().filter(holds);
    }

    /// For how long nobody knows what was called.
    #[must_use]
    pub fn doubt(&self) -> Duration {
        self.doubt_until.since(self.counted_at)
    }

    /// How many calls may have been made unreported, `fastest` apart; zero: any number.
    #[must_use]
    pub fn doubted_calls(&self, fastest: Micros) -> u64 {
        let doubt = u64::try_from(self.doubt().as_micros()).unwrap_or(u64::MAX);
        match (doubt, fastest) {
            (0, _) => 0,
            (_, 0) => u64::MAX,
            (doubt, fastest) => doubt / fastest + 1,
        }
    }

    /// What is known of a rule's budget: of the same limit, else of the limit most like it that was there before.
    #[must_use]
    pub fn of(&self, rule: &Rule) -> Option<&Spent> {
        let window = |width: u64, span: u64| width.saturating_mul(span);
        let own = window(rule.width, rule.span);
        let longer = |spent: &&Spent| window(spent.width, spent.span) >= own;
        let by_window = |spent: &&Spent| window(spent.width, spent.span);
        let same = self.spent.iter().find(|spent| concerns(spent, rule));
        same.or_else(|| self.spent.iter().filter(longer).min_by_key(by_window))
            .or_else(|| self.spent.iter().max_by_key(by_window))
    }

    /// Brings a budget up to date. One of which nothing is known stays as it is.
    pub fn apply(&self, budget: &mut Budget, fastest: Micros) {
        if let Some(spent) = self.of(budget.rule()) {
            let until = u64::try_from(self.doubt_until.as_millis()).unwrap_or_default() * 1_000;
            budget.recall(spent, self.doubted_calls(fastest), until);
        }
    }
}

#[cfg(test)]
mod tests;
