//! A worker's side of paces: what it has heard, and what Redis is to be told of. No I/O.

use tokio::time::Instant;

use super::{
    super::wire::{PaceAsk, PaceChange, Paced},
    Local,
};
use crate::quota::{PaceBy, PaceState, Scope, Share, adapt::SLOWER, limit::micros};

/// How many refusals may wait for Redis.
const PACES: usize = 256;

/// A pace as Redis announced it last; until it has answered, as this worker expects it.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    /// Without what late calls leave of it.
    state: PaceState,
    /// The share that late calls, of whichever worker, leave of it, and until when.
    delays: Option<(f64, Instant)>,
    /// Calls that left before this slow nothing down any more.
    slowed_at: Option<Instant>,
}

impl Heard {
    fn state(&self, now: Instant) -> PaceState {
        let delays = self.delays.filter(|(_, until)| now < *until).map_or(1.0, |(share, _)| share);
        PaceState { share: self.state.share * delays, ..self.state }
    }

    fn refused(&mut self, left_at: Instant, now: Instant) {
        self.state.refused += 1;
        if self.slowed_at.is_none_or(|slowed_at| left_at >= slowed_at) {
            self.state.share /= SLOWER;
            self.slowed_at = Some(now);
        }
    }
}

/// A change of pace that Redis is to be told of.
#[derive(Clone, Copy, Debug)]
pub(super) enum NewPace {
    Asked(PaceBy, Share),
    Refused(Instant),
}

impl Local {
    /// Somebody asks for a share.
    pub fn set_pace(&mut self, scope: Scope, by: PaceBy, share: Share) {
        self.asked.insert((scope, by), share);
        self.tell(scope, NewPace::Asked(by, share));
    }

    /// Asks for all shares again.
    pub(super) fn ask_again(&mut self) {
        for ((scope, by), share) in self.asked.clone() {
            self.tell(scope, NewPace::Asked(by, share));
        }
    }

    /// The vendor refused a call.
    pub fn refused(&mut self, scope: Scope, left_at: Instant, now: Instant) {
        self.tell(scope, NewPace::Refused(left_at));
        if let Some(pace) = self.heard(scope) {
            pace.refused(left_at, now);
        }
    }

    /// A slowdown takes a single refusal: what exceeds the queue while Redis is away is only not counted.
    fn tell(&mut self, scope: Scope, pace: NewPace) {
        let is_known = self.heard(scope).is_some();
        if is_known && (self.paces.len() < PACES || matches!(pace, NewPace::Asked(..))) {
            self.paces.push_back((scope, pace));
        }
    }

    /// How fast calls go, as far as this worker has heard.
    pub fn pace(&mut self, scope: Scope, now: Instant) -> PaceState {
        self.heard(scope).map(|heard| heard.state(now)).unwrap_or_default()
    }

    /// A pace that a worker, this one perhaps, has changed.
    pub fn paced(&mut self, paced: &Paced, now: Instant) {
        let until = self.offset.filter(|_| paced.delays < 1.0).map(|offset| offset.instants(paced.delays_til, now).1);
        let delays = until.map(|until| (paced.delays, until));
        let state = PaceState { share: paced.share, refused: paced.refused };
        let scope = match (paced.account.as_str(), paced.address.as_str()) {
            ("", "") => Some(Scope::Source),
            ("", address) => self.address(address).map(Scope::Address),
            (account, _) => self.index(account).map(Scope::Account),
        };
        if let Some(pace) = scope.and_then(|scope| self.heard(scope)) {
            (pace.state, pace.delays) = (state, delays);
        }
    }

    fn heard(&mut self, scope: Scope) -> Option<&mut Heard> {
        match scope {
            Scope::Source => Some(&mut self.pace),
            Scope::Address(index) => self.addresses.get_mut(index).map(|address| &mut address.pace),
            Scope::Account(index) => self.accounts.get_mut(index).map(|account| &mut account.pace),
        }
    }

    /// So many changes of pace have been told.
    pub fn told_paces(&mut self, count: usize) {
        self.paces.drain(..count.min(self.paces.len()));
    }

    pub(super) fn pace_ask(&self, (scope, pace): (Scope, NewPace), now: Instant) -> PaceAsk {
        let (name, address) = self.names_of(scope);
        let what = match pace {
            NewPace::Asked(by, share) => PaceChange::Asked { by, share },
            NewPace::Refused(left_at) => PaceChange::Refused { age: micros(now.saturating_duration_since(left_at)) },
        };
        PaceAsk { name, address, what }
    }
}
