//! What stretches the spacings of a timetable: shares that somebody asks for, and refusals.

use super::Timetable;
use crate::quota::{
    Scope,
    adapt::{Adapt, Basis},
    limit::Micros,
    share::{PaceBy, PaceState, Share, Shares},
};

/// What stretches the spacings of an account, an address or the source.
#[derive(Clone, Debug)]
pub(super) struct Pace {
    pub(super) shares: Shares,
    pub(super) adapt: Adapt,
}

impl Pace {
    pub(super) fn new(basis: Basis) -> Self {
        Self { shares: Shares::default(), adapt: Adapt::new(basis) }
    }

    /// By how much, all together.
    pub(super) fn stretch(&self) -> f64 {
        self.adapt.stretch() / self.shares.product()
    }

    fn state(&self) -> PaceState {
        PaceState { share: 1.0 / self.stretch(), refused: self.adapt.refused() }
    }
}

impl Timetable {
    /// Whoever is within `scope` goes at this share of the planned rate, as far as `by` is concerned.
    pub fn set_pace(&mut self, scope: Scope, by: PaceBy, share: Share) {
        if let Some((pace, _)) = self.pace_of(scope) {
            pace.shares.set(by, share);
        }
    }

    /// The vendor refused a call that had left at `left_at`, for the sake of `scope`. Whether that slows down.
    pub fn refused(&mut self, scope: Scope, left_at: Micros, now: Micros) -> bool {
        self.pace_of(scope).is_some_and(|(pace, planned)| pace.adapt.refuse(left_at, now, planned))
    }

    /// How fast calls go within `scope`.
    #[must_use]
    pub fn pace(&self, scope: Scope) -> PaceState {
        let pace = match scope {
            Scope::Source => Some(&self.pace),
            Scope::Address(index) => self.addresses.get(index).map(|address| &address.pace),
            Scope::Account(index) => self.accounts.get(index).map(|account| &account.pace),
        };
        pace.map(Pace::state).unwrap_or_default()
    }

    /// A pace, and the spacing that it stretches.
    fn pace_of(&mut self, scope: Scope) -> Option<(&mut Pace, Micros)> {
        match scope {
            Scope::Source => Some((&mut self.pace, self.source.spacing.max(self.interval))),
            Scope::Address(index) => {
                self.addresses.get_mut(index).map(|address| (&mut address.pace, address.gate.spacing))
            }
            Scope::Account(index) => {
                self.accounts.get_mut(index).map(|account| (&mut account.pace, account.gate.spacing))
            }
        }
    }
}
