//! A worker's side of holds: what is in force, what Redis is to be told of, and what others have told. No I/O.

use std::{ops::Range, time::Duration};

use tokio::time::Instant;

use super::{
    super::wire::{HoldAsk, HoldsAsk, Named, PIECE, Told},
    Local,
};
use crate::{
    quota::{
        AddressState, Cause, Held, Hold, Scope, State,
        limit::{Micros, micros},
    },
    runtime::clock::Timestamp,
};

/// A hold, or the end of one (`hold` = none).
#[derive(Clone, Debug)]
pub(super) struct Change {
    scope: Scope,
    hold: Option<Hold>,
    cause: Cause,
}

impl Local {
    /// Holds from now on, and tells Redis.
    pub fn hold(&mut self, scope: Scope, hold: Hold, cause: &Cause) {
        if self.apply(scope, hold, cause) {
            self.outgoing.push(Change { scope, hold: Some(hold), cause: cause.clone() });
        }
    }

    /// Ends a hold, and tells Redis.
    pub fn release(&mut self, scope: Scope, as_of: Timestamp, now: Instant) {
        self.apply_release(scope, as_of, now);
        self.outgoing.push(Change { scope, hold: None, cause: Cause::new("", as_of) });
    }

    fn apply_release(&mut self, scope: Scope, as_of: Timestamp, now: Instant) {
        if !self.causes.release(scope, as_of) {
            return;
        }
        let Some((until, disabled)) = self.standing_mut(scope) else { return };
        (*until, *disabled) = (None, false);
        // Whoever was told to come back when the hold ends may come now.
        self.ask_at = now;
    }

    /// Tells Redis again of every hold in force and of every share that was asked for: its state is lost.
    pub fn tell_again(&mut self, now: Instant) {
        self.holds_heard = None;
        let accounts = (0..self.accounts.len()).map(Scope::Account);
        let addresses = (0..self.addresses.len()).map(Scope::Address);
        for scope in accounts.chain(addresses).chain([Scope::Source]) {
            let Some((until, disabled)) = self.standing(scope) else { continue };
            let until = until.filter(|until| *until > now).map(Hold::Until);
            let holds = until.into_iter().chain(disabled.then_some(Hold::Disabled));
            let cause = self.causes.of(scope);
            self.outgoing.extend(holds.map(|hold| Change { scope, hold: Some(hold), cause: cause.clone() }));
        }
        self.ask_again();
    }

    fn standing(&self, scope: Scope) -> Option<(Option<Instant>, bool)> {
        match scope {
            Scope::Source => Some((self.held_until, self.disabled)),
            Scope::Address(index) => self.addresses.get(index).map(|known| (known.held_until, known.disabled)),
            Scope::Account(index) => self.accounts.get(index).map(|known| (known.held_until, known.disabled)),
        }
    }

    fn standing_mut(&mut self, scope: Scope) -> Option<(&mut Option<Instant>, &mut bool)> {
        match scope {
            Scope::Source => Some((&mut self.held_until, &mut self.disabled)),
            Scope::Address(index) => {
                self.addresses.get_mut(index).map(|known| (&mut known.held_until, &mut known.disabled))
            }
            Scope::Account(index) => {
                self.accounts.get_mut(index).map(|known| (&mut known.held_until, &mut known.disabled))
            }
        }
    }

    fn held_now(&self, scope: Scope, now: (Instant, Timestamp)) -> Option<Held> {
        let (until, disabled) = self.standing(scope)?;
        let time = |at: Instant| now.1.after(at.saturating_duration_since(now.0));
        let until = until.filter(|until| *until > now.0);
        (disabled || until.is_some())
            .then(|| Held { until: until.filter(|_| !disabled).map(time), cause: self.causes.of(scope) })
    }

    /// What is known of a scope, but not what is spent; `None` if there is no such account.
    pub fn state(&self, scope: Scope, now: (Instant, Timestamp)) -> Option<State> {
        self.standing(scope)?;
        let is_next = |slot: &crate::quota::Slot| Scope::Account(slot.account) == scope && slot.at > now.0;
        let next = self.slots.iter().find(|(slot, _)| is_next(slot));
        let next_at = next.map(|(slot, _)| now.1.after(slot.at.saturating_duration_since(now.0)));
        let address = match scope {
            Scope::Account(index) => self.address_of(index, now.0),
            Scope::Source | Scope::Address(_) => 0,
        };
        Some(State { held: self.held_now(scope, now), spent: Vec::new(), next_at, address })
    }

    /// What is known of each address, but not what is spent.
    pub fn address_states(&self, now: (Instant, Timestamp)) -> Vec<AddressState> {
        let states = self.addresses.iter().enumerate().map(|(index, known)| AddressState {
            name: known.name.clone(),
            held: self.held_now(Scope::Address(index), now),
            spent: Vec::new(),
        });
        states.collect()
    }

    /// Where an account's calls leave from: its home, else the first of its fallbacks that is not held.
    fn address_of(&self, index: usize, now: Instant) -> usize {
        let Some(account) = self.accounts.get(index) else { return 0 };
        let is_free = |address: &&usize| {
            let known = self.addresses.get(**address);
            known.is_some_and(|known| !known.disabled && known.held_until.is_none_or(|until| until <= now))
        };
        std::iter::once(&account.home).chain(&account.fallbacks).find(is_free).copied().unwrap_or(account.home)
    }

    fn apply(&mut self, scope: Scope, hold: Hold, cause: &Cause) -> bool {
        let Some((held_until, disabled)) = self.standing(scope) else { return false };
        let longer = match hold {
            Hold::Until(until) => !disabled && Some(until) > held_until,
            Hold::Disabled => true,
        };
        if !self.causes.hold(scope, cause, longer) {
            return false;
        }
        if let Some((held_until, disabled)) = self.standing_mut(scope) {
            match hold {
                Hold::Until(until) => *held_until = (*held_until).max(Some(until)),
                Hold::Disabled => *disabled = true,
            }
        }
        true
    }

    /// A hold that another worker announced.
    pub fn announced(&mut self, told: &Told, now: Instant) {
        let Told { name, until, cause } = told;
        let scope = match Named::of(name) {
            Named::Source => Some(Scope::Source),
            Named::Address(name) => self.address(name).map(Scope::Address),
            Named::Account(name) => self.index(name).map(Scope::Account),
        };
        let Some(scope) = scope else { return };
        match *until {
            0 => self.apply_release(scope, cause.since, now),
            Micros::MAX => {
                self.apply(scope, Hold::Disabled, cause);
            }
            until => {
                if let Some(offset) = self.offset {
                    self.apply(scope, Hold::Until(offset.instants(until, now).1), cause);
                }
            }
        }
    }

    /// Which holds are asked for next.
    pub(super) fn holds_ask(&self) -> HoldsAsk {
        let names = self.accounts[self.holds_wanted()].iter().map(|account| account.name.clone()).collect();
        HoldsAsk { names, whole: self.holds_heard.is_none() }
    }

    fn holds_wanted(&self) -> Range<usize> {
        let first = self.holds_heard.map_or(0, |(heard, _)| heard);
        first..(first + PIECE).min(self.accounts.len())
    }

    /// The holds that were asked for, as Redis knows them.
    pub fn replace_holds(&mut self, holds: &[Told], seq: u64, now: Instant) {
        let wanted = self.holds_wanted();
        if self.holds_heard.is_none() {
            (self.held_until, self.disabled) = (None, false);
            self.causes.forget_hold(Scope::Source);
            for (index, address) in self.addresses.iter_mut().enumerate() {
                (address.held_until, address.disabled) = (None, false);
                self.causes.forget_hold(Scope::Address(index));
            }
        }
        for index in wanted.clone() {
            (self.accounts[index].held_until, self.accounts[index].disabled) = (None, false);
            self.causes.forget_hold(Scope::Account(index));
        }
        // Zero: the source is held by nothing, which is no release.
        for told in holds.iter().filter(|told| told.until > 0) {
            self.announced(told, now);
        }
        for Change { scope, hold, cause } in self.outgoing.clone() {
            match hold {
                Some(hold) => {
                    self.apply(scope, hold, &cause);
                }
                None => self.apply_release(scope, cause.since, now),
            }
        }
        // What has changed since the first piece may concern accounts of it: then all are asked for again.
        let since = self.holds_heard.map_or(seq, |(_, since)| since);
        self.seq = seq;
        if wanted.end < self.accounts.len() {
            self.holds_heard = Some((wanted.end, since));
        } else {
            (self.seq_known, self.holds_heard) = (since, None);
        }
    }

    pub(super) fn hold_ask(&self, change: &Change, now: Instant) -> HoldAsk {
        let (name, address) = self.names_of(change.scope);
        let wait = match change.hold {
            Some(Hold::Until(until)) => until.saturating_duration_since(now),
            Some(Hold::Disabled) | None => Duration::ZERO,
        };
        HoldAsk {
            name,
            address,
            wait: micros(wait),
            disabled: change.hold == Some(Hold::Disabled),
            release: change.hold.is_none(),
            why: change.cause.reason.to_string(),
            since: change.cause.since.as_millis(),
        }
    }

    /// So many holds have been told.
    pub fn told(&mut self, count: usize) {
        self.outgoing.drain(..count.min(self.outgoing.len()));
    }
}
