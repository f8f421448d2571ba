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
//! A slot that comes back is handed out again as it is, whoever asks: the vendor cannot tell the difference.

use std::collections::BTreeSet;

use super::{
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
}

impl Gate {
    fn new(rules: &Rules, next: Micros, now: Micros) -> Self {
        let mut budgets: Vec<Budget> = rules.budgets.iter().cloned().map(Budget::new).collect();
        for budget in &mut budgets {
            budget.learn(now);
        }
        Self { spacing: rules.spacing, next, budgets }
    }

    /// The earliest time from `at` on at which everything here allows a call.
    fn free_at(&self, at: Micros) -> Micros {
        let mut at = at.max(self.next);
        loop {
            let later = self.budgets.iter().fold(at, |at, budget| budget.free_at(at));
            if later == at {
                return at;
            }
            at = later;
        }
    }

    fn take(&mut self, at: Micros) {
        self.next = at + self.spacing;
        self.budgets.iter_mut().for_each(|budget| budget.charge(at));
    }

    fn refund(&mut self, at: Micros) {
        self.budgets.iter_mut().for_each(|budget| budget.refund(at));
    }
}

/// A place in a queue: time, then order of arrival, then the account's index.
type Place = (Micros, u64, usize);

#[derive(Clone, Debug)]
struct Account {
    gate: Gate,
    address: usize,
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
    queue: BTreeSet<Place>,
}

/// The slots of one source.
#[derive(Clone, Debug)]
pub struct Timetable {
    accounts: Vec<Account>,
    addresses: Vec<Address>,
    source: Gate,
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
}

impl Timetable {
    /// A timetable that begins at `now`.
    ///
    /// The first slot of an account comes after one spacing (at most a second), since a process that stood
    /// here a moment ago may have used the vendor's last token; and accounts start evenly out of phase.
    #[must_use]
    pub fn new(plan: &Plan, now: Micros) -> Self {
        let first = |rules: &Rules| Gate::new(rules, now + rules.spacing.min(FIRST_WAIT_MAX), now);
        let address = |rules: &Rules| Address { gate: first(rules), queue: BTreeSet::new() };
        let mut table = Self {
            accounts: Vec::with_capacity(plan.accounts.len()),
            addresses: plan.addresses.iter().map(address).collect(),
            source: first(&plan.source),
            interval: interval(plan.accounts.iter().map(|account| account.rules.spacing)),
            next_start: now,
            held_until: 0,
            disabled: false,
            enabled: plan.accounts.len(),
            returned: BTreeSet::new(),
            arrivals: 0,
        };
        let count = plan.accounts.len() as u64;
        for (index, AccountPlan { rules, address, in_flight, .. }) in (0u64..).zip(&plan.accounts) {
            let mut gate = first(rules);
            gate.next += rules.spacing * index / count;
            let in_flight_max = in_flight.unwrap_or(u32::MAX);
            let (address, place) = (*address, None);
            let account = Account { gate, address, held_until: 0, disabled: false, in_flight: 0, in_flight_max, place };
            table.accounts.push(account);
            table.enter(table.accounts.len() - 1);
        }
        table
    }

    /// Up to `wanted` slots (at least one), none earlier than `now` nor later than `until`.
    pub fn lease(&mut self, wanted: usize, now: Micros, until: Micros) -> Granted {
        if self.disabled || self.enabled == 0 {
            return Granted::Nobody;
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

    /// The source may call again.
    pub fn enable_source(&mut self) {
        self.disabled = false;
    }

    /// The account may call again.
    pub fn enable_account(&mut self, index: usize) {
        if let Some(account) = self.accounts.get_mut(index).filter(|account| account.disabled) {
            account.disabled = false;
            self.enabled += 1;
            if account.in_flight < account.in_flight_max {
                self.enter(index);
            }
            let enabled = self.accounts.iter().filter(|account| !account.disabled);
            self.interval = interval(enabled.map(|account| account.gate.spacing));
        }
    }

    /// Whether a slot has been overtaken by a hold.
    #[must_use]
    pub fn is_held(&self, index: usize, at: Micros) -> bool {
        let account = self.accounts.get(index);
        self.disabled
            || at < self.held_until
            || account.is_none_or(|account| account.disabled || at < account.held_until)
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
        let address = self.accounts[index].address;
        self.accounts[index].gate.refund(at);
        self.addresses[address].gate.refund(at);
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
    fn free_at(&self, index: usize, mut at: Micros) -> Micros {
        let account = &self.accounts[index];
        let gates = [&account.gate, &self.addresses[account.address].gate, &self.source];
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
        if account.place.is_some_and(|place| place.0 <= earliest) {
            self.next_start = at + self.interval;
        }
        account.gate.take(at);
        self.addresses[account.address].gate.take(at);
        self.source.take(at);
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
