//! The arithmetic of slots: per account a theoretical arrival time, the earliest account first. Pure.
//!
//! [`super::memory`] keeps one in this process, and `lease.lua` does the same step by step in Redis. Times are
//! microseconds since 1970.
//!
//! A slot is the latest of all the times that concern it: its account's, its address's, the source's, their
//! budgets' and the holds'; then each of them advances. Slots of *different* accounts are taken in time order:
//! several of one account ahead would, under a limit that accounts share, keep the others waiting for nothing.
//!
//! An account whose time has passed is *idle*: its next slot is now, never in the past. Idle accounts do not all
//! begin at the same instant: they begin one source interval apart (the interval at which the accounts together
//! call), so that the calls of a source leave evenly after a start, a pause and a lull alike.
//!
//! A pace is a spacing, and shares and refusals stretch it: those of an account or address its own, those of the source every
//! spacing there is, so that a source at half its pace makes half the calls whichever limit binds it.
//!
//! A slot that comes back is handed out again as it is, whoever asks: the vendor cannot tell the difference.
//!
//! While an address is held, accounts that may go elsewhere do (the first of their fallbacks that is not held),
//! and they come home when it is over. Everything that a slot costs is charged where its call leaves from.

mod paces;
mod recall;

use std::collections::BTreeSet;

use self::paces::Pace;
pub use self::recall::Standing;
use super::{
    adapt::{Basis, stretched},
    budget::Budget,
    limit::Micros,
    plan::{AccountPlan, Plan, Rules, interval},
};

/// The longest silence at the start: see [`Timetable::new`].
const FIRST_WAIT_MAX: Micros = 1_000_000;

/// What a lease comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Granted {
    /// Account and time, in time order; at least one.
    Slots(Vec<(usize, Micros)>),
    /// No slot before this time. `Micros::MAX`: only the end of a call can bring one.
    NotBefore(Micros),
    /// Every account is disabled.
    Nobody,
}

/// What keeps calls apart: for an account, an address or the source.
#[derive(Clone, Debug)]
struct Gate {
    spacing: Micros,
    /// Not before this time: the theoretical arrival time.
    next: Micros,
    budgets: Vec<Budget>,
    /// How far the time of day is ahead of this timetable's time, for windows that begin at a time of day.
    ahead: i64,
}

impl Gate {
    fn new(rules: &Rules, next: Micros, now: Micros) -> Self {
        let mut budgets: Vec<Budget> = rules.budgets.iter().cloned().map(Budget::new).collect();
        for budget in &mut budgets {
            budget.learn(now);
        }
        Self { spacing: rules.spacing, next, budgets, ahead: 0 }
    }

    /// What a budget counts by: the time of day if its windows begin at one.
    const fn shown_to(&self, budget: &Budget, at: Micros) -> Micros {
        if budget.rule().span == 1 { at.saturating_add_signed(self.ahead) } else { at }
    }

    fn budget_free_at(&self, budget: &Budget, at: Micros) -> Micros {
        let shown = self.shown_to(budget, at);
        at + budget.free_at(shown).saturating_sub(shown)
    }

    /// The earliest time from `at` on at which everything here allows a call.
    fn free_at(&self, at: Micros) -> Micros {
        let mut at = at.max(self.next);
        loop {
            let later = self.budgets.iter().fold(at, |at, budget| self.budget_free_at(budget, at));
            if later == at {
                return at;
            }
            at = later;
        }
    }

    fn take(&mut self, at: Micros, spacing: Micros) {
        self.next = at + spacing;
        self.each_budget(at, Budget::charge);
    }

    fn refund(&mut self, at: Micros) {
        self.each_budget(at, Budget::refund);
    }

    fn each_budget(&mut self, at: Micros, what: fn(&mut Budget, Micros)) {
        let ahead = self.ahead;
        for budget in &mut self.budgets {
            let shown = if budget.rule().span == 1 { at.saturating_add_signed(ahead) } else { at };
            what(budget, shown);
        }
    }
}

/// A place in a queue: time, then order of arrival, then the account's index.
type Place = (Micros, u64, usize);

#[derive(Clone, Debug)]
struct Account {
    gate: Gate,
    pace: Pace,
    /// Where its calls leave from now.
    address: usize,
    home: usize,
    fallbacks: Vec<usize>,
    /// Not before this time by a hold.
    held_until: Micros,
    disabled: bool,
    /// Slots handed out whose calls have not ended.
    in_flight: u32,
    in_flight_max: u32,
    /// Where it stands in its address's queue; `None` = disabled, or as many calls under way as may be.
    place: Option<Place>,
}

#[derive(Clone, Debug)]
struct Address {
    gate: Gate,
    pace: Pace,
    queue: BTreeSet<Place>,
    /// Not before this time by a hold; `Micros::MAX` = until an operator acts.
    held_until: Micros,
}

/// The slots of one source.
#[derive(Clone, Debug)]
pub struct Timetable {
    accounts: Vec<Account>,
    addresses: Vec<Address>,
    source: Gate,
    pace: Pace,
    /// Between two slots if all accounts call evenly.
    interval: Micros,
    /// The next idle account starts no earlier.
    next_start: Micros,
    /// The whole source waits until then.
    held_until: Micros,
    /// The whole source is off.
    disabled: bool,
    /// Accounts that are not disabled.
    enabled: usize,
    /// Slots that came back, and wait for their time or for somebody who wants them.
    returned: BTreeSet<Place>,
    /// Numbers the places, so that equal times are served in turn.
    arrivals: u64,
    /// When a hold of an address ends and accounts come home; `Micros::MAX` = nobody is away.
    home_at: Micros,
}

impl Timetable {
    /// A timetable that begins at `now`.
    ///
    /// The first slot of an account comes after one spacing (at most a second), since a process that stood
    /// here a moment ago may have used the vendor's last token; and accounts start evenly out of phase.
    #[must_use]
    pub fn new(plan: &Plan, now: Micros) -> Self {
        let first = |rules: &Rules| Gate::new(rules, now + rules.spacing.min(FIRST_WAIT_MAX), now);
        let address = |rules: &Rules| Address {
            gate: first(rules),
            pace: Pace::new(Basis::Known),
            queue: BTreeSet::new(),
            held_until: 0,
        };
        let mut table = Self {
            accounts: Vec::with_capacity(plan.accounts.len()),
            addresses: plan.addresses.iter().map(address).collect(),
            source: first(&plan.source),
            pace: Pace::new(Basis::Known),
            interval: interval(plan.accounts.iter().map(|account| account.rules.spacing)),
            next_start: now,
            held_until: 0,
            disabled: false,
            enabled: plan.accounts.len(),
            returned: BTreeSet::new(),
            arrivals: 0,
            home_at: Micros::MAX,
        };
        let count = plan.accounts.len() as u64;
        for (index, AccountPlan { rules, basis, address, fallbacks, in_flight, .. }) in (0u64..).zip(&plan.accounts) {
            let mut gate = first(rules);
            gate.next += rules.spacing * index / count;
            let in_flight_max = in_flight.unwrap_or(u32::MAX);
            table.accounts.push(Account {
                gate,
                pace: Pace::new(*basis),
                address: *address,
                home: *address,
                fallbacks: fallbacks.clone(),
                held_until: 0,
                disabled: false,
                in_flight: 0,
                in_flight_max,
                place: None,
            });
            table.enter(table.accounts.len() - 1);
        }
        table
    }

    /// The time of day is so far ahead of this timetable's time, in microseconds: somebody has set the clock. Windows that
    /// begin at a time of day follow it; what keeps calls apart, and holds, do not.
    pub fn set_ahead(&mut self, ahead: i64) {
        self.source.ahead = ahead;
        self.addresses.iter_mut().for_each(|address| address.gate.ahead = ahead);
        for index in 0..self.accounts.len() {
            self.accounts[index].gate.ahead = ahead;
            if self.accounts[index].place.is_some() {
                self.enter(index);
            }
        }
    }

    /// Up to `wanted` slots (at least one), none earlier than `now` nor later than `until`.
    pub fn lease(&mut self, wanted: usize, now: Micros, until: Micros) -> Granted {
        if self.disabled || self.enabled == 0 {
            return Granted::Nobody;
        }
        if now >= self.home_at {
            self.settle(now);
        }
        let earliest = now.max(self.held_until);
        self.expire(earliest);
        let mut slots = Vec::new();
        while slots.len() < wanted.max(1) {
            let fresh = self.candidate(earliest);
            let returned = self.returned.first().map(|&(at, _, index)| (at, index));
            let returned = returned.filter(|returned| fresh.is_none_or(|fresh| returned.0 <= fresh.0));
            let Some((at, index)) = returned.or(fresh) else { break };
            if at > until {
                break;
            }
            if returned.is_some() {
                self.returned.pop_first();
                self.begin_call(index);
            } else {
                self.take(index, at, earliest);
            }
            slots.push((index, at));
        }
        if slots.is_empty() { Granted::NotBefore(self.next_at(earliest)) } else { Granted::Slots(slots) }
    }

    /// Slots come back unused. Each call of a slot ends once: here, or by [`Self::ended`].
    pub fn give_back(&mut self, slots: impl IntoIterator<Item = (usize, Micros)>) {
        for (index, at) in slots {
            if index < self.accounts.len() {
                self.end_call(index);
                self.arrivals += 1;
                self.returned.insert((at, self.arrivals, index));
            }
        }
    }

    /// A slot comes back that was for another address than the account's calls leave from now: nobody can use it.
    pub fn give_up(&mut self, index: usize, at: Micros, address: usize) {
        if index < self.accounts.len() {
            self.end_call(index);
            self.refund(index, at, address);
        }
    }

    /// Where the account's calls leave from now.
    #[must_use]
    pub fn address_of(&self, index: usize) -> usize {
        self.accounts.get(index).map_or(0, |account| account.address)
    }

    /// A call of the account has ended.
    pub fn ended(&mut self, index: usize) {
        if index < self.accounts.len() {
            self.end_call(index);
        }
    }

    /// Nobody of the source calls before `until`.
    pub fn hold_source(&mut self, until: Micros) {
        self.held_until = self.held_until.max(until);
    }

    /// The account does not call before `until`.
    pub fn hold_account(&mut self, index: usize, until: Micros) {
        if let Some(account) = self.accounts.get_mut(index) {
            account.held_until = account.held_until.max(until);
            if account.place.is_some() {
                self.enter(index);
            }
        }
    }

    /// No call leaves from the address before `until`; `Micros::MAX` = not any more.
    pub fn hold_address(&mut self, address: usize, until: Micros, now: Micros) {
        if let Some(address) = self.addresses.get_mut(address) {
            address.held_until = address.held_until.max(until);
            self.settle(now);
        }
    }

    /// Nobody of the source calls any more.
    pub fn disable_source(&mut self) {
        self.disabled = true;
    }

    /// The account does not call any more.
    pub fn disable_account(&mut self, index: usize) {
        if let Some(account) = self.accounts.get_mut(index).filter(|account| !account.disabled) {
            account.disabled = true;
            self.leave(index);
            self.enabled -= 1;
            let enabled = self.accounts.iter().filter(|account| !account.disabled);
            self.interval = interval(enabled.map(|account| account.gate.spacing));
        }
    }

    /// Whether a slot of the account, from the address that its calls leave from now, has been overtaken by a hold.
    #[must_use]
    pub fn is_held(&self, index: usize, at: Micros) -> bool {
        self.accounts.get(index).is_none_or(|account| self.is_held_at(index, at, account.address))
    }

    /// The same of a slot from a certain address.
    #[must_use]
    pub fn is_held_at(&self, index: usize, at: Micros, address: usize) -> bool {
        let account = self.accounts.get(index);
        self.disabled
            || at < self.held_until
            || self.addresses.get(address).is_none_or(|address| at < address.held_until)
            || account.is_none_or(|account| account.disabled || at < account.held_until)
    }

    /// Sends accounts away from addresses that are held, and home to those that are not any more.
    fn settle(&mut self, now: Micros) {
        let mut home_at = Micros::MAX;
        for index in 0..self.accounts.len() {
            let account = &self.accounts[index];
            if account.fallbacks.is_empty() {
                continue;
            }
            let is_free = |address: &&usize| self.addresses[**address].held_until <= now;
            let home = account.home;
            let wanted = std::iter::once(&home).chain(&account.fallbacks).find(is_free).copied().unwrap_or(home);
            if self.addresses[home].held_until > now {
                home_at = home_at.min(self.addresses[home].held_until);
            }
            if wanted != account.address {
                self.move_to(index, wanted);
            }
        }
        self.home_at = home_at;
    }

    fn move_to(&mut self, index: usize, address: usize) {
        let returned: Vec<_> = self.returned.iter().filter(|slot| slot.2 == index).copied().collect();
        for slot in returned {
            self.forget(slot);
        }
        let has_place = self.accounts[index].place.is_some();
        self.leave(index);
        self.accounts[index].address = address;
        if has_place {
            self.enter(index);
        }
    }

    /// Forgets returned slots that nobody can use any more.
    fn expire(&mut self, earliest: Micros) {
        let is_gone = |slot: &&Place| slot.0 < earliest || self.is_held(slot.2, slot.0);
        let gone: Vec<_> = self.returned.iter().filter(is_gone).copied().collect();
        for slot in gone {
            self.forget(slot);
        }
    }

    fn forget(&mut self, slot: Place) {
        self.returned.remove(&slot);
        let (at, _, index) = slot;
        self.refund(index, at, self.accounts[index].address);
    }

    fn refund(&mut self, index: usize, at: Micros, address: usize) {
        self.accounts[index].gate.refund(at);
        if let Some(address) = self.addresses.get_mut(address) {
            address.gate.refund(at);
        }
        self.source.refund(at);
        if self.accounts[index].place.is_some() {
            self.enter(index);
        }
    }

    /// When to ask again.
    fn next_at(&self, earliest: Micros) -> Micros {
        let returned = self.returned.first().map(|place| place.0);
        let fresh = self.candidate(earliest).map(|(at, _)| at);
        [returned, fresh].into_iter().flatten().min().unwrap_or(Micros::MAX)
    }

    /// The account with the earliest slot, and its time.
    fn candidate(&self, earliest: Micros) -> Option<(Micros, usize)> {
        let of_address = |address: &Address| {
            let idle = address.queue.first().filter(|place| place.0 <= earliest);
            let idle = idle.map(|&(_, _, index)| (self.free_at(index, earliest.max(self.next_start)), index));
            let waiting = address.queue.range((earliest + 1, 0, 0)..).next();
            let waiting = waiting.map(|&(at, _, index)| (self.free_at(index, at), index));
            // The one that is idle has waited for longer.
            match (idle, waiting) {
                (Some(idle), Some(waiting)) if waiting.0 < idle.0 => Some(waiting),
                (idle, waiting) => idle.or(waiting),
            }
        };
        self.addresses.iter().filter_map(of_address).min_by_key(|(at, _)| *at)
    }

    /// The earliest time from `at` on at which account, address and source all allow a call.
    fn free_at(&self, index: usize, at: Micros) -> Micros {
        let account = &self.accounts[index];
        let address = &self.addresses[account.address];
        let gates = [&account.gate, &address.gate, &self.source];
        let mut at = at.max(address.held_until);
        if at == Micros::MAX {
            return at;
        }
        loop {
            let later = gates.iter().fold(at, |at, gate| gate.free_at(at));
            if later == at {
                return at;
            }
            at = later;
        }
    }

    /// Gives the slot at `at` to the account.
    fn take(&mut self, index: usize, at: Micros, earliest: Micros) {
        let account = &mut self.accounts[index];
        let all = self.pace.stretch();
        if account.place.is_some_and(|place| place.0 <= earliest) {
            self.next_start = at + stretched(self.interval, all);
        }
        account.pace.adapt.slot(at);
        self.pace.adapt.slot(at);
        let own = account.pace.adapt.spacing(account.gate.spacing, all / account.pace.shares.product());
        account.gate.take(at, own);
        let address = &mut self.addresses[account.address];
        address.pace.adapt.slot(at);
        address.gate.take(at, stretched(address.gate.spacing, all * address.pace.stretch()));
        self.source.take(at, stretched(self.source.spacing, all));
        self.enter(index);
        self.begin_call(index);
    }

    fn begin_call(&mut self, index: usize) {
        let account = &mut self.accounts[index];
        account.in_flight = account.in_flight.saturating_add(1);
        if account.in_flight >= account.in_flight_max {
            self.leave(index);
        }
    }

    fn end_call(&mut self, index: usize) {
        let account = &mut self.accounts[index];
        account.in_flight = account.in_flight.saturating_sub(1);
        if account.place.is_none() && !account.disabled && account.in_flight < account.in_flight_max {
            self.enter(index);
        }
    }

    /// Puts an account at its place.
    fn enter(&mut self, index: usize) {
        self.leave(index);
        self.arrivals += 1;
        let account = &mut self.accounts[index];
        let place = (account.gate.free_at(account.held_until), self.arrivals, index);
        account.place = Some(place);
        self.addresses[account.address].queue.insert(place);
    }

    fn leave(&mut self, index: usize) {
        let account = &mut self.accounts[index];
        if let Some(place) = account.place.take() {
            self.addresses[account.address].queue.remove(&place);
        }
    }
}

#[cfg(test)]
mod tests;
