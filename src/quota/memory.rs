//! The quota of one process: a theoretical arrival time per account, the earliest account first.
//!
//! Each account has the time of its next slot. An account whose time has passed is *idle*: its next slot is
//! now, never in the past. All others wait in time order. Idle accounts do not all begin at the same instant:
//! they begin one source interval apart (the interval at which the accounts together call), so that the calls
//! of a source leave evenly after a start, a pause and a lull alike.

use std::{
    collections::BTreeSet,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use tokio::time::Instant;

use super::{Hold, Lease, Limit, Quota, Scope, Slot, pace::Pacing};

/// How far ahead slots are handed out: far enough to wake up in time for them, near enough for a hold or a
/// crash to waste few.
pub const HORIZON: Duration = Duration::from_millis(100);

/// The longest silence at the start: see [`Memory::new`].
const FIRST_WAIT_MAX: Duration = Duration::from_secs(1);

/// Slots of one source, for one process.
///
/// A lock guards the arithmetic (well under a microsecond per slot) and is never held across an await.
#[derive(Debug)]
pub struct Memory {
    state: Mutex<State>,
}

impl Memory {
    /// The quota of accounts with these limits, by index; `None` = the vendor does not limit this account.
    ///
    /// The first slot of an account comes after one spacing (at most a second), since a process that stood
    /// here a moment ago may have used the vendor's last token; and accounts start evenly out of phase.
    #[must_use]
    pub fn new(limits: Vec<Option<Limit>>, pacing: Pacing) -> Self {
        Self { state: Mutex::new(State::new(limits, pacing, Instant::now())) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every step leaves the state whole, so a panic elsewhere under the lock has broken nothing.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Quota for Memory {
    async fn lease(&self, wanted: usize) -> Lease {
        self.state().lease(wanted, Instant::now())
    }

    async fn give_back(&self, slots: Vec<Slot>) {
        self.state().give_back(slots);
    }

    async fn hold(&self, scope: Scope, hold: Hold) {
        self.state().hold(scope, hold);
    }

    fn is_held(&self, slot: &Slot) -> bool {
        self.state().is_held(slot)
    }
}

/// A place in a queue: time, then order of arrival, then the account's index.
type Place = (Instant, u64, usize);

/// One account.
#[derive(Debug)]
struct Account {
    /// Between two slots; zero = no limit.
    spacing: Duration,
    /// How late its slots may be used.
    lateness: Duration,
    /// Not before this time by its pace: the theoretical arrival time.
    next: Instant,
    /// Not before this time by a hold.
    held_until: Option<Instant>,
    /// Where it stands, in `idle` or `waiting`; `None` = disabled.
    place: Option<Place>,
}

impl Account {
    fn ready(&self) -> Instant {
        self.held_until.map_or(self.next, |held| held.max(self.next))
    }
}

#[derive(Debug)]
struct State {
    accounts: Vec<Account>,
    /// Accounts that could have called before now, the longest idle first.
    idle: BTreeSet<Place>,
    /// Accounts with a time to come, or not yet seen to be idle.
    waiting: BTreeSet<Place>,
    /// Between two slots if all accounts call evenly.
    interval: Duration,
    /// The next idle account starts no earlier.
    next_start: Instant,
    /// The whole source waits until then.
    held_until: Option<Instant>,
    /// The whole source is off.
    disabled: bool,
    /// Numbers the places, so that equal times are served in turn.
    arrivals: u64,
}

impl State {
    fn new(limits: Vec<Option<Limit>>, pacing: Pacing, now: Instant) -> Self {
        let pace = |limit: Limit| (pacing.spacing(&limit), pacing.lateness(&limit));
        let paces: Vec<_> =
            limits.into_iter().map(|limit| limit.map_or((Duration::ZERO, Pacing::LATENESS_MAX), pace)).collect();
        let spacings: Vec<Duration> = paces.iter().map(|(spacing, _)| *spacing).collect();
        let count = u32::try_from(spacings.len()).unwrap_or(u32::MAX);
        let mut state = Self {
            accounts: Vec::with_capacity(spacings.len()),
            idle: BTreeSet::new(),
            waiting: BTreeSet::new(),
            interval: interval(&spacings),
            next_start: now,
            held_until: None,
            disabled: false,
            arrivals: 0,
        };
        for (index, (spacing, lateness)) in (0u32..).zip(paces) {
            let phase = spacing / count * index;
            let next = now + spacing.min(FIRST_WAIT_MAX) + phase;
            state.accounts.push(Account { spacing, lateness, next, held_until: None, place: None });
            state.enter(state.accounts.len() - 1);
        }
        state
    }

    fn lease(&mut self, wanted: usize, now: Instant) -> Lease {
        if self.disabled || (self.idle.is_empty() && self.waiting.is_empty()) {
            return Lease::Nobody;
        }
        let earliest = self.held_until.map_or(now, |held| held.max(now));
        self.find_idle(earliest);
        let mut slots = Vec::new();
        while let Some((at, index)) = self.candidate(earliest) {
            if at > now + HORIZON && slots.is_empty() {
                // Asking as soon as the slot comes within the horizon leaves time to wake up for it.
                return Lease::NotBefore(at - HORIZON);
            }
            if at > now + HORIZON || slots.len() >= wanted.max(1) {
                break;
            }
            self.take(index, at, earliest);
            slots.push(Slot { account: index, at, latest: at + self.accounts[index].lateness });
        }
        Lease::Slots(slots)
    }

    /// Moves accounts whose time has come to the idle ones.
    fn find_idle(&mut self, earliest: Instant) {
        while let Some(&place) = self.waiting.first() {
            if place.0 > earliest {
                break;
            }
            self.waiting.pop_first();
            self.idle.insert(place);
        }
    }

    /// The account with the earliest slot, and its time.
    fn candidate(&self, earliest: Instant) -> Option<(Instant, usize)> {
        let idle = self.idle.first().map(|&(_, _, index)| (self.next_start.max(earliest), index));
        let waiting = self.waiting.first().map(|&(at, _, index)| (at, index));
        match (idle, waiting) {
            (Some(idle), Some(waiting)) if waiting.0 < idle.0 => Some(waiting),
            (Some(idle), _) => Some(idle),
            (None, waiting) => waiting,
        }
    }

    /// Gives the slot at `at` to the account.
    fn take(&mut self, index: usize, at: Instant, earliest: Instant) {
        if self.leave(index) {
            self.next_start = at + self.interval;
        }
        let account = &mut self.accounts[index];
        account.next = at + account.spacing;
        let ready = account.ready();
        if ready <= earliest {
            // Only without a limit: ready again at once, behind the others.
            let place = self.stand(index, ready);
            self.idle.insert(place);
        } else {
            self.enter(index);
        }
    }

    /// Puts an account at its place among the waiting.
    fn enter(&mut self, index: usize) {
        let place = self.stand(index, self.accounts[index].ready());
        self.waiting.insert(place);
    }

    fn stand(&mut self, index: usize, at: Instant) -> Place {
        self.arrivals += 1;
        let place = (at, self.arrivals, index);
        self.accounts[index].place = Some(place);
        place
    }

    /// Takes an account out of its queue; whether it was idle.
    fn leave(&mut self, index: usize) -> bool {
        let Some(place) = self.accounts[index].place.take() else { return false };
        !self.waiting.remove(&place) && self.idle.remove(&place)
    }

    fn give_back(&mut self, mut slots: Vec<Slot>) {
        // The last first: each makes the one before it the last of its account.
        slots.sort_unstable_by_key(|slot| std::cmp::Reverse(slot.at));
        for slot in slots {
            let Some(account) = self.accounts.get_mut(slot.account) else { continue };
            if account.next != slot.at + account.spacing || account.spacing.is_zero() {
                continue;
            }
            account.next = slot.at;
            self.next_start = self.next_start.min(slot.at);
            // A disabled account has no place to go back to.
            if self.accounts[slot.account].place.is_some() {
                self.leave(slot.account);
                self.enter(slot.account);
            }
        }
    }

    fn hold(&mut self, scope: Scope, hold: Hold) {
        match (scope, hold) {
            (Scope::Source, Hold::Until(until)) => self.held_until = self.held_until.max(Some(until)),
            (Scope::Source, Hold::Disabled) => self.disabled = true,
            (Scope::Account(index), hold) => self.hold_account(index, hold),
        }
    }

    fn hold_account(&mut self, index: usize, hold: Hold) {
        // Disabled stays disabled: a throttle that was under way does not bring the account back.
        let Some(account) = self.accounts.get_mut(index).filter(|account| account.place.is_some()) else { return };
        match hold {
            Hold::Until(until) => {
                account.held_until = account.held_until.max(Some(until));
                self.leave(index);
                self.enter(index);
            }
            Hold::Disabled => {
                self.leave(index);
                self.interval = interval(&self.enabled_spacings());
            }
        }
    }

    fn enabled_spacings(&self) -> Vec<Duration> {
        self.accounts.iter().filter(|account| account.place.is_some()).map(|account| account.spacing).collect()
    }

    fn is_held(&self, slot: &Slot) -> bool {
        let before = |held: Option<Instant>| held.is_some_and(|held| slot.at < held);
        let account = self.accounts.get(slot.account);
        self.disabled
            || before(self.held_until)
            || account.is_none_or(|account| account.place.is_none() || before(account.held_until))
    }
}

/// The time between two slots of a source whose accounts have these spacings; zero if one has no limit.
fn interval(spacings: &[Duration]) -> Duration {
    let per_second: f64 = spacings.iter().map(|spacing| 1.0 / spacing.as_secs_f64()).sum();
    // Without accounts the sum is zero, with an unlimited one infinite: neither has an interval.
    Duration::try_from_secs_f64(1.0 / per_second).unwrap_or_default()
}

#[cfg(test)]
mod tests;
