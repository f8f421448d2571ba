//! What outlives a timetable: its past when it begins, holds that end early, and what is known of it.

use super::{Gate, Timetable};
use crate::{
    message::{AccountAlias, Spent},
    quota::{
        Past, Scope,
        limit::Micros,
        past::PastOf,
        plan::{Fastest, interval},
    },
};

/// What is known of an account, of an address, or of the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Not before this time by a hold.
    pub held_until: Micros,
    /// Whether it is off.
    pub disabled: bool,
    /// The next time that its limits allow.
    pub next_at: Option<Micros>,
    /// What is spent of its budgets.
    pub spent: Vec<Spent>,
    /// Of an account: the address that its calls leave from now.
    pub address: usize,
}

impl Gate {
    fn recall(&mut self, past: &PastOf, fastest: Micros) {
        for budget in &mut self.budgets {
            past.apply(budget, fastest);
        }
    }

    fn spent(&self) -> Vec<Spent> {
        self.budgets.iter().map(super::Budget::spent).collect()
    }
}

impl Timetable {
    /// Takes over what is known of the past, and what may have been called unknown to anybody, at most as fast as
    /// `fastest`. For the start, before anything is leased.
    pub fn recall(&mut self, aliases: &[AccountAlias], addresses: &[String], past: &Past, fastest: &Fastest) {
        self.source.recall(&past.whole, fastest.source);
        for ((address, name), fastest) in self.addresses.iter_mut().zip(addresses).zip(&fastest.addresses) {
            let Some(past) = past.addresses.get(name) else { continue };
            address.gate.recall(past, *fastest);
        }
        for (index, (alias, fastest)) in aliases.iter().zip(&fastest.accounts).enumerate().take(self.accounts.len()) {
            let Some(past) = past.accounts.get(alias) else { continue };
            let account = &mut self.accounts[index];
            account.gate.recall(past, *fastest);
            if account.place.is_some() {
                self.enter(index);
            }
        }
    }

    /// The source's hold is over, and it is on again.
    pub fn release_source(&mut self) {
        (self.held_until, self.disabled) = (0, false);
    }

    /// Calls leave from the address again.
    pub fn release_address(&mut self, index: usize, now: Micros) {
        if let Some(address) = self.addresses.get_mut(index) {
            address.held_until = 0;
            self.settle(now);
        }
    }

    /// The account's hold is over, and it is on again.
    pub fn release_account(&mut self, index: usize) {
        let Some(account) = self.accounts.get_mut(index) else { return };
        account.held_until = 0;
        if std::mem::take(&mut account.disabled) {
            self.enabled += 1;
            let enabled = self.accounts.iter().filter(|account| !account.disabled);
            self.interval = interval(enabled.map(|account| account.gate.spacing));
        }
        let account = &self.accounts[index];
        if account.in_flight < account.in_flight_max {
            self.enter(index);
        }
    }

    /// Until when a scope is held, and whether it is off; `None` if there is no such account or address.
    #[must_use]
    pub fn held(&self, scope: Scope) -> Option<(Micros, bool)> {
        match scope {
            Scope::Source => Some((self.held_until, self.disabled)),
            Scope::Address(index) => {
                self.addresses.get(index).map(|address| (address.held_until, address.held_until == Micros::MAX))
            }
            Scope::Account(index) => self.accounts.get(index).map(|account| (account.held_until, account.disabled)),
        }
    }

    /// What is known of a scope; `None` if there is no such account or address.
    #[must_use]
    pub fn standing(&self, scope: Scope) -> Option<Standing> {
        let (held_until, disabled) = self.held(scope)?;
        let (gate, next_at, address) = match scope {
            Scope::Source => (&self.source, None, 0),
            Scope::Address(index) => (&self.addresses.get(index)?.gate, None, index),
            Scope::Account(index) => {
                let account = self.accounts.get(index)?;
                (&account.gate, account.place.map(|place| place.0), account.address)
            }
        };
        Some(Standing { held_until, disabled, next_at, spent: gate.spent(), address })
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use super::*;
    use crate::{
        quota::{
            Aliases, Cause, Counting, Hold, Lease, Limit, Pacing, Quota, Scope,
            budget::Rule,
            memory::Memory,
            plan::{AccountLimits, Limits},
        },
        runtime::clock::{Clock, Timestamp},
    };

    fn limits() -> Limits {
        let day = Limit::window(30, Duration::from_secs(86_400), Counting::Sliding).unwrap();
        let limits = vec![Limit::new(2, Duration::from_secs(1), 1).unwrap(), day];
        let account = AccountLimits { limits, ..AccountLimits::default() };
        Limits { accounts: vec![account; 2], ..Limits::default() }
    }

    fn aliases() -> Aliases {
        ["one", "two"].map(|name| AccountAlias::new(name).unwrap()).into()
    }

    fn start(clock: &Clock, past: &Past) -> Memory {
        let memory = Memory::with_limits(&limits(), &Pacing::default(), clock);
        memory.recall(&aliases(), past);
        memory
    }

    /// Calls of the first account within a minute.
    async fn calls(memory: &Memory) -> usize {
        let until = tokio::time::Instant::now() + Duration::from_secs(60);
        let mut calls = 0;
        while tokio::time::Instant::now() < until {
            if let Lease::Slots(slots) = memory.lease(8).await {
                calls += slots.iter().filter(|slot| slot.account == 0).count();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        calls
    }

    /// What a process knows when it reads what `memory` has reported `ago`.
    fn past(memory: &Memory, clock: &Clock, ago: Duration) -> Past {
        let now = clock.now();
        let known = |state: crate::quota::State| PastOf {
            spent: state.spent,
            counted_at: now,
            doubt_until: now.after(ago),
            held: None,
        };
        let states = memory.snapshot(0..2, now).accounts.into_iter().map(known);
        let accounts = aliases().iter().cloned().zip(states).collect();
        Past { is_read: true, is_known: true, accounts, ..Past::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_that_begins_has_what_the_one_before_it_left_of_a_days_budget() {
        let clock = Clock::simulated(Timestamp::from_millis(1_700_000_000_000));
        let memory = start(&clock, &Past::default());
        let mut spent = 0;
        while spent < 20 {
            if let Lease::Slots(slots) = memory.lease(1).await {
                spent += usize::from(slots[0].account == 0);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let known = past(&memory, &clock, Duration::ZERO);
        assert_eq!(calls(&start(&clock, &known)).await, 10);
        let killed = past(&memory, &clock, Duration::from_secs(2));
        // 2 s at 2/s, a little slower, and one.
        let left = calls(&start(&clock, &killed)).await;
        assert!((5..=6).contains(&left), "{left}");
        assert_eq!(calls(&start(&clock, &Past::default())).await, 30, "who knows nothing has all of it");
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_kill_a_budget_that_all_accounts_share_lacks_what_they_can_have_called_together_and_no_more() {
        let clock = Clock::simulated(Timestamp::from_millis(1_700_000_000_000));
        let day = Limit::window(100_000, Duration::from_secs(86_400), Counting::Sliding).unwrap();
        let limits = Limits { source: vec![day], ..limits() };
        let memory = Memory::with_limits(&limits, &Pacing::default(), &clock);
        let mut known = past(&memory, &clock, Duration::from_secs(10));
        known.whole = known.accounts[&aliases()[0]].clone();
        let mut budget = crate::quota::budget::Budget::new(Rule::of(&limits.source[0], &Pacing::default()).unwrap());
        (0..986).for_each(|_| budget.charge(1_700_000_000_000_000));
        known.whole.spent = vec![budget.spent()];
        memory.recall(&aliases(), &known);
        let spent = memory.snapshot(0..0, clock.now()).whole.spent[0].calls.iter().sum::<u64>();
        // Two accounts of 2/s, 10 s, one more call, and rounding.
        assert!((986 + 39..=986 + 42).contains(&spent), "{spent}");
        let own = calls(&memory).await;
        assert!((9..=11).contains(&own), "of its own 30 it lacks what it can have called itself: {own}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_held_address_is_told_with_its_reason_and_released_as_an_account_is() {
        let clock = Clock::simulated(Timestamp::from_millis(1_700_000_000_000));
        let mut limits = limits();
        limits.accounts[1].address = 1;
        limits.accounts[1].fallbacks = vec![0];
        let memory: Arc<dyn Quota> = Arc::new(Memory::with_limits(&limits, &Pacing::default(), &clock));
        tokio::time::sleep(Duration::from_secs(5)).await;
        let states = || memory.snapshot(0..2, clock.now());
        assert!(states().addresses.iter().all(|address| address.held.is_none()));
        let cause = Cause::new("no way", clock.now());
        let until = tokio::time::Instant::now() + Duration::from_secs(60);
        for (address, hold) in [(0, Hold::Until(until)), (1, Hold::Disabled)] {
            memory.hold(Scope::Address(address), hold, &cause).await;
        }
        let held = states().addresses.into_iter().map(|address| address.held.unwrap());
        let held: Vec<_> = held.map(|held| (held.until.is_some(), held.cause)).collect();
        assert_eq!(held, [(true, cause.clone()), (false, cause.clone())]);
        memory.release(Scope::Address(0), Timestamp::from_millis(0)).await;
        assert!(states().addresses[0].held.is_some(), "that release is older than the hold");
        assert!(matches!(memory.lease(1).await, Lease::NotBefore(_)));
        memory.release(Scope::Address(0), clock.now()).await;
        assert_eq!(states().accounts.iter().map(|account| account.address).collect::<Vec<_>>(), [0, 0]);
        let Lease::Slots(slots) = memory.lease(1).await else { panic!("it is on again") };
        assert_eq!(slots[0].address, 0);
        memory.release(Scope::Address(1), clock.now()).await;
        assert_eq!(states().accounts[1].address, 1, "it is home");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_released_calls_again_and_is_told_with_its_reason_until_then() {
        let clock = Clock::simulated(Timestamp::from_millis(1_700_000_000_000));
        let memory: Arc<dyn Quota> = Arc::new(start(&clock, &Past::default()));
        let cause = Cause::new("401", clock.now());
        memory.hold(Scope::Account(0), Hold::Disabled, &cause).await;
        memory.hold(Scope::Account(1), Hold::Disabled, &cause).await;
        assert_eq!(memory.lease(1).await, Lease::Nobody);
        let held = memory.snapshot(0..1, clock.now()).accounts.remove(0).held.unwrap();
        assert_eq!((held.until, held.cause), (None, cause.clone()));
        tokio::time::sleep(Duration::from_secs(5)).await;
        memory.release(Scope::Account(0), clock.now()).await;
        let Lease::Slots(slots) = memory.lease(1).await else { panic!("it is on again") };
        assert_eq!(slots[0].account, 0);
        assert_eq!(memory.snapshot(0..1, clock.now()).accounts[0].held, None);
        memory.hold(Scope::Account(0), Hold::Disabled, &cause).await;
        assert!(!memory.is_held(&slots[0]), "that hold was released already");
        memory.release(Scope::Account(1), Timestamp::from_millis(0)).await;
        assert!(memory.snapshot(1..2, clock.now()).accounts[0].held.is_some(), "that release is older than the hold");
    }
}
