//! What outlives a timetable: its past when it begins, holds that end early, and what is known of it.

use super::{Gate, Timetable};
use crate::{
    message::{AccountAlias, Spent},
    quota::{Past, limit::Micros, past::PastOf, plan::interval},
};

/// What is known of an account, or of the source.
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
}

impl Gate {
    fn recall(&mut self, past: &PastOf, spacing: Micros) {
        for budget in &mut self.budgets {
            past.apply(budget, spacing);
        }
    }

    fn spent(&self) -> Vec<Spent> {
        self.budgets.iter().map(super::Budget::spent).collect()
    }
}

impl Timetable {
    /// Takes over what is known of the past. For the start, before anything is leased.
    pub fn recall(&mut self, aliases: &[AccountAlias], past: &Past) {
        let shared = self.source.spacing;
        self.source.recall(&past.whole, shared);
        for (address, past) in self.addresses.iter_mut().zip(&past.addresses) {
            let spacing = address.gate.spacing.max(shared);
            address.gate.recall(past, spacing);
        }
        for (index, alias) in aliases.iter().enumerate().take(self.accounts.len()) {
            let Some(past) = past.accounts.get(alias) else { continue };
            let account = &mut self.accounts[index];
            let spacing = account.gate.spacing.max(self.addresses[account.address].gate.spacing).max(shared);
            account.gate.recall(past, spacing);
            if account.place.is_some() {
                self.enter(index);
            }
        }
    }

    /// The source's hold is over, and it is on again.
    pub fn release_source(&mut self) {
        (self.held_until, self.disabled) = (0, false);
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

    /// What is known of the source as a whole.
    #[must_use]
    pub fn source_standing(&self) -> Standing {
        let (held_until, disabled) = (self.held_until, self.disabled);
        Standing { held_until, disabled, next_at: None, spent: self.source.spent() }
    }

    /// What is spent of the budgets of each address.
    #[must_use]
    pub fn addresses_spent(&self) -> Vec<Vec<Spent>> {
        self.addresses.iter().map(|address| address.gate.spent()).collect()
    }

    /// What is known of an account; `None` if there is no such account.
    #[must_use]
    pub fn standing(&self, index: usize) -> Option<Standing> {
        let account = self.accounts.get(index)?;
        let next_at = account.place.map(|place| place.0);
        let (held_until, disabled) = (account.held_until, account.disabled);
        Some(Standing { held_until, disabled, next_at, spent: account.gate.spent() })
    }
}
