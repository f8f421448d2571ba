//! Which budgets are spent, in words and until when: for `weir quota`, `/ready`, `weir status`, the log and the metrics.

use super::{
    Limit, Pacing, Quota, Snapshot,
    budget::{Budget, Rule},
    limit::micros_since_1970,
    money::{Budgets, Money},
    plan::Limits,
};
use crate::{
    message::{Spent, UsedUpReport},
    runtime::clock::Timestamp,
};

/// What a source may spend, with what is needed to say it.
#[derive(Clone, Debug, Default)]
pub struct Allowance {
    /// Its limits, as its quota has them.
    pub limits: Limits,
    /// How far weir stays away from them.
    pub pacing: Pacing,
    /// What its calls cost, what they may cost in a day, and in which currency.
    pub money: Option<(Budgets, Option<Money>, String)>,
}

impl Allowance {
    /// The budget of these limits, which hold together, that is spent for longest from `now` on, if one is. Windows that a
    /// process waits out at its start are part of the pace: nobody is told of each minute that is used up.
    ///
    /// `spent`: what is spent of each of their budgets, in the order of the limits.
    #[must_use]
    pub fn used_up(&self, limits: &[Limit], spent: &[Spent], now: Timestamp) -> Option<UsedUpReport> {
        let now = micros_since_1970(now);
        let budgets = limits.iter().filter_map(|limit| Some((limit, Rule::of(limit, &self.pacing)?)));
        let spent = budgets.zip(spent).filter(|((_, rule), _)| !rule.learns).filter_map(|((limit, rule), spent)| {
            let mut budget = Budget::new(rule);
            budget.recall(spent, 0, now);
            let until = budget.free_at(now);
            (until > now).then_some((until, limit))
        });
        let (until, limit) = spent.max_by_key(|(until, _)| *until)?;
        let until = i64::try_from(until.div_ceil(1_000)).unwrap_or(i64::MAX);
        Some(UsedUpReport { reason: self.words(limit), until_at: Timestamp::from_millis(until) })
    }

    fn words(&self, limit: &Limit) -> String {
        match &self.money {
            Some((budgets, Some(per_day), currency)) if budgets.day_limit().as_ref() == Some(limit) => {
                let space = if currency.is_empty() { "" } else { " " };
                let spent = budgets.cost.times(limit.calls.into());
                format!("day budget spent, {spent} of {per_day}{space}{currency}")
            }
            Some(_) | None => format!("budget spent, {} of {} calls of {}", limit.calls, limit.calls, limit.words()),
        }
    }

    /// Why nobody of the source can call at `now`, if that is since budgets are spent: the source's own, or one of every
    /// account or its address.
    pub fn stops(&self, quota: &dyn Quota, now: Timestamp) -> Option<UsedUpReport> {
        const AT_ONCE: usize = 500;
        let Snapshot { whole, addresses, .. } = quota.snapshot(0..0, now);
        if let Some(used_up) = self.used_up(&self.limits.source, &whole.spent, now) {
            return Some(used_up);
        }
        let addresses: Vec<_> = addresses
            .iter()
            .enumerate()
            .map(|(index, address)| self.used_up(self.limits.of_address(index), &address.spent, now))
            .collect();
        let (count, mut first) = (self.limits.accounts.len(), None::<UsedUpReport>);
        for from in (0..count).step_by(AT_ONCE) {
            let accounts = from..(from + AT_ONCE).min(count);
            let states = quota.snapshot(accounts.clone(), now).accounts;
            for (index, state) in accounts.zip(states) {
                let own = self.used_up(&self.limits.accounts[index].limits, &state.spent, now);
                let address = addresses.get(state.address).cloned().flatten();
                let used_up = own.into_iter().chain(address).max_by_key(|used_up| used_up.until_at)?;
                if first.as_ref().is_none_or(|first| used_up.until_at < first.until_at) {
                    first = Some(used_up);
                }
            }
        }
        let first = first?;
        let reason = match count {
            1 => first.reason,
            _ => format!("the budgets of all {count} accounts are spent; the first: {}", first.reason),
        };
        Some(UsedUpReport { reason, until_at: first.until_at })
    }
}

/// `day budget spent, 400.00 of 400.00 CNY, resumes 2026-12-01T00:00:02Z`
#[must_use]
pub fn words(UsedUpReport { reason, until_at }: &UsedUpReport) -> String {
    let until = jiff::Timestamp::from_millisecond(until_at.as_millis()).unwrap_or_default();
    format!("{reason}, resumes {}", until.strftime("%Y-%m-%dT%H:%M:%SZ"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::*;
    use crate::{
        quota::{
            Counting, Lease,
            memory::Memory,
            money::{BudgetConfig, OnBudget},
            plan::AccountLimits,
        },
        runtime::clock::Clock,
    };

    const DAY: Duration = Duration::from_secs(86_400);

    async fn spend(memory: &Memory) {
        let until = Instant::now() + Duration::from_secs(60);
        while Instant::now() < until {
            match memory.lease(64).await {
                Lease::Slots(slots) => slots.iter().for_each(|slot| memory.ended(slot.account)),
                Lease::NotBefore(at) => tokio::time::sleep_until(at.min(until)).await,
                Lease::Nobody => panic!("nobody is disabled"),
            }
        }
    }

    fn account(limits: Vec<Limit>) -> AccountLimits {
        AccountLimits { limits, ..AccountLimits::default() }
    }

    fn money() -> (Budgets, Option<Money>) {
        let money = |text: &str| Money::parse(text).unwrap();
        let per_day = Some(money("0.40"));
        let config = BudgetConfig { per_day, ..BudgetConfig::default() };
        (Budgets::new(money("0.02"), &config, OnBudget::Stop), per_day)
    }

    #[tokio::test(start_paused = true)]
    async fn a_days_money_that_is_spent_is_told_in_money_with_the_time_at_which_calls_go_on() {
        // 2023-11-14T22:13:20Z.
        let clock = Clock::simulated(Timestamp::from_millis(1_700_000_000_000));
        let (budgets, per_day) = money();
        let limits = Limits {
            accounts: vec![account(vec![Limit::new(10, Duration::from_secs(1), 5).unwrap()]); 2],
            source: vec![Limit::new(50, Duration::from_secs(1), 5).unwrap(), budgets.day_limit().unwrap()],
            ..Limits::default()
        };
        let memory = Memory::with_limits(&limits, &Pacing::default(), &clock);
        let money = Some((budgets, per_day, "CNY".to_owned()));
        let allowance = Allowance { limits, pacing: Pacing::default(), money };
        assert_eq!(allowance.stops(&memory, clock.now()), None);
        spend(&memory).await;
        let told = allowance.stops(&memory, clock.now()).unwrap();
        assert_eq!(words(&told), "day budget spent, 0.40 of 0.40 CNY, resumes 2023-11-15T00:00:02Z");
        tokio::time::sleep(DAY / 12).await;
        assert_eq!(allowance.stops(&memory, clock.now()), None, "a new day");
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_stops_when_the_budgets_of_all_its_accounts_are_spent_and_not_before() {
        let clock = Clock::simulated(Timestamp::from_millis(1_700_000_000_000));
        let limit = Limit::new(10, Duration::from_secs(1), 5).unwrap();
        let day = |calls| Limit::window(calls, DAY, Counting::Sliding).unwrap();
        let minute = Limit::window(30, Duration::from_secs(60), Counting::Sliding).unwrap();
        let limits = |last: Limit| Limits {
            accounts: vec![account(vec![limit.clone(), day(20)]), account(vec![limit.clone(), last])],
            ..Limits::default()
        };
        for (last, stops) in [(day(5_000), false), (minute, false), (day(10), true)] {
            let limits = limits(last);
            let memory = Memory::with_limits(&limits, &Pacing::default(), &clock);
            spend(&memory).await;
            let allowance = Allowance { limits, pacing: Pacing::default(), money: None };
            let told = allowance.stops(&memory, clock.now());
            assert_eq!(told.is_some(), stops, "{told:?}");
            if let Some(told) = told {
                let first = "the budgets of all 2 accounts are spent; the first: budget spent, ";
                assert!(told.reason.starts_with(first) && told.reason.contains("calls of "), "{told:?}");
                assert!(told.until_at.since(clock.now()) > DAY * 9 / 10, "{told:?}");
            }
        }
    }
}
