//! The quota of one process: a [`Timetable`] behind a lock.

use std::{
    ops::Range,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use async_trait::async_trait;
use tokio::time::Instant;
use tracing::warn;

use super::{
    AddressState, Aliases, Cause, Held, Hold, Lease, Limit, PaceBy, PaceState, Pacing, Past, Quota, Scope, Share, Slot,
    Snapshot, State,
    limit::{Micros, micros},
    plan::{Fastest, Limits, Plan},
    state::Causes,
    timetable::{Granted, Standing, Timetable},
};
use crate::runtime::clock::{Clock, Timestamp};

/// How far ahead slots are handed out: far enough to wake up in time for them, near enough for a hold or a
/// crash to waste few.
pub const HORIZON: Duration = Duration::from_millis(100);

/// Slots of one source, for one process.
///
/// A lock guards the arithmetic (well under a microsecond per slot) and is never held across an await.
#[derive(Debug)]
pub struct Memory {
    table: Mutex<Timetable>,
    /// What the addresses are called, by index.
    addresses: Vec<String>,
    /// How fast calls can follow each other.
    fastest: Fastest,
    /// How late slots may be used, by account.
    lateness: Vec<Duration>,
    /// Locked after the table.
    causes: Mutex<Causes>,
    epoch: Epoch,
    clock: Clock,
}

/// Where tokio's time stands in the timetable's, which is the time of day at the start and never runs back.
///
/// Tokio's time stands still while the machine is suspended, and knows nothing of somebody who sets the clock. So how
/// long the machine was suspended is added, and how far the time of day has gone away since is known apart.
#[derive(Debug)]
struct Epoch {
    at: Instant,
    micros: Micros,
    uptime: Duration,
    /// For so long the machine was suspended since then, in microseconds.
    suspended: AtomicU64,
    /// So far is the time of day ahead of the timetable's, in microseconds.
    ahead: AtomicI64,
}

impl Epoch {
    /// Less is how exactly clocks can be compared, and how NTP slews them: windows have two seconds to spare.
    const NOTICED: Micros = 500_000;

    /// Now.
    pub(super) fn new(clock: &Clock) -> Self {
        Self {
            at: Instant::now(),
            micros: day_micros(clock),
            uptime: clock.uptime(),
            suspended: AtomicU64::new(0),
            ahead: AtomicI64::new(0),
        }
    }

    /// Rounded up: a slot is never in the past.
    pub(super) fn micros(&self, at: Instant) -> Micros {
        let before = micros(self.at.saturating_duration_since(at));
        let start = self.micros + self.suspended.load(Relaxed);
        (start + micros(at.saturating_duration_since(self.at))).saturating_sub(before)
    }

    /// The instant of a time; at most a year ahead.
    pub(super) fn instant(&self, at: Micros) -> Instant {
        let start = self.micros + self.suspended.load(Relaxed);
        self.at + Duration::from_micros(at.saturating_sub(start)).min(Limit::PER_MAX)
    }

    /// The time of day of a time.
    fn time_of_day(&self, at: Micros) -> Timestamp {
        let at = if at == Micros::MAX { at } else { at.saturating_add_signed(self.ahead.load(Relaxed)) };
        Timestamp::from_millis(i64::try_from(at / 1_000).unwrap_or(i64::MAX))
    }

    /// Looks at the clocks; by how much the time of day is ahead now, if that has changed.
    fn follow(&self, clock: &Clock) -> Option<i64> {
        let elapsed = self.at.elapsed();
        let suspended = micros(clock.uptime().saturating_sub(self.uptime).saturating_sub(elapsed));
        let known = self.suspended.load(Relaxed);
        if suspended > known + Self::NOTICED {
            self.suspended.store(suspended, Relaxed);
            let time = Duration::from_micros(suspended - known);
            warn!(?time, "this machine was suspended; quota windows, holds and budgets went on meanwhile");
        }
        let own = i128::from(self.micros(Instant::now()));
        let ahead = i64::try_from(i128::from(day_micros(clock)) - own).unwrap_or_default();
        let before = self.ahead.load(Relaxed);
        if ahead.abs_diff(before) <= Self::NOTICED {
            return None;
        }
        self.ahead.store(ahead, Relaxed);
        let seconds = (ahead - before) / 1_000_000;
        warn!(
            seconds,
            "this machine's clock was changed: limits that begin at a time of day follow it, the pace stays"
        );
        Some(ahead)
    }
}

fn day_micros(clock: &Clock) -> Micros {
    u64::try_from(clock.now().as_millis()).unwrap_or_default() * 1_000
}

impl Memory {
    /// The quota of accounts with these limits, by index; `None` = the vendor does not limit this account.
    ///
    /// The first slot of an account comes after one spacing (at most a second), since a process that stood
    /// here a moment ago may have used the vendor's last token; and accounts start evenly out of phase.
    #[must_use]
    pub fn new(limits: Vec<Option<Limit>>, pacing: Pacing) -> Self {
        Self::with_limits(&Limits::of_accounts(limits), &pacing, &Clock::System)
    }

    /// The same with all that a source can have of limits. `clock` tells where windows of known phase begin.
    #[must_use]
    pub fn with_limits(limits: &Limits, pacing: &Pacing, clock: &Clock) -> Self {
        let (plan, epoch) = (Plan::new(limits, pacing), Epoch::new(clock));
        Self {
            table: Mutex::new(Timetable::new(&plan, epoch.micros)),
            fastest: plan.fastest(),
            lateness: plan.accounts.iter().map(|account| account.lateness).collect(),
            addresses: plan.address_names,
            causes: Mutex::default(),
            epoch,
            clock: clock.clone(),
        }
    }

    /// Takes over what is known of the past of these accounts, by index. For the start, before anything is leased.
    pub fn recall(&self, aliases: &Aliases, past: &Past) {
        self.table().recall(aliases, &self.addresses, past, &self.fastest);
    }

    fn causes(&self) -> MutexGuard<'_, Causes> {
        self.causes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self, scope: Scope, standing: &Standing, now: Timestamp) -> Option<Held> {
        let until = self.epoch.time_of_day(standing.held_until);
        (standing.disabled || until > now)
            .then(|| Held { until: (!standing.disabled).then_some(until), cause: self.causes().of(scope) })
    }

    /// The standing of a scope in a record's terms.
    fn state(&self, scope: Scope, standing: Standing, now: Timestamp) -> State {
        let time_of_day = |at: Micros| self.epoch.time_of_day(at);
        let later = |at: Micros| time_of_day(at) > now;
        let held = self.held(scope, &standing, now);
        let next_at = standing.next_at.filter(|at| held.is_none() && later(*at) && *at != Micros::MAX).map(time_of_day);
        State { held, spent: standing.spent, next_at, address: standing.address }
    }

    fn address_state(&self, table: &Timetable, index: usize, now: Timestamp) -> Option<AddressState> {
        let standing = table.standing(Scope::Address(index))?;
        let held = self.held(Scope::Address(index), &standing, now);
        Some(AddressState { name: self.addresses.get(index)?.clone(), held, spent: standing.spent })
    }

    fn table(&self) -> MutexGuard<'_, Timetable> {
        // Every step leaves the table whole, so a panic elsewhere under the lock has broken nothing.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot(&self, (account, at): (usize, Micros), address: usize) -> Slot {
        let at = self.epoch.instant(at);
        Slot { account, address, at, latest: at + self.lateness[account] }
    }
}

#[async_trait]
impl Quota for Memory {
    async fn lease(&self, wanted: usize) -> Lease {
        let mut table = self.table();
        if let Some(ahead) = self.epoch.follow(&self.clock) {
            table.set_ahead(ahead);
        }
        let now = Instant::now();
        let until = self.epoch.micros(now + HORIZON);
        match table.lease(wanted, self.epoch.micros(now), until) {
            Granted::Slots(slots) => {
                Lease::Slots(slots.into_iter().map(|slot| self.slot(slot, table.address_of(slot.0))).collect())
            }
            // Only the end of a call can help, and whoever ends one asks again.
            Granted::NotBefore(Micros::MAX) => Lease::NotBefore(now + HORIZON),
            // Asking as soon as the slot comes within the horizon leaves time to wake up for it.
            Granted::NotBefore(at) => Lease::NotBefore(self.epoch.instant(at) - HORIZON),
            Granted::Nobody => Lease::Nobody,
        }
    }

    async fn give_back(&self, slots: Vec<Slot>) {
        let mut table = self.table();
        for slot in slots {
            let at = self.epoch.micros(slot.at);
            if slot.address == table.address_of(slot.account) {
                table.give_back([(slot.account, at)]);
            } else {
                table.give_up(slot.account, at, slot.address);
            }
        }
    }

    async fn drop_unused(&self, slot: Slot) {
        self.table().give_up(slot.account, self.epoch.micros(slot.at), slot.address);
    }

    fn ended(&self, account: usize) {
        self.table().ended(account);
    }

    async fn hold(&self, scope: Scope, hold: Hold, cause: &Cause) {
        let mut table = self.table();
        let Some((held_until, disabled)) = table.held(scope) else { return };
        let longer = match hold {
            Hold::Until(until) => !disabled && self.epoch.micros(until) > held_until,
            Hold::Disabled => true,
        };
        if !self.causes().hold(scope, cause, longer) {
            return;
        }
        match (scope, hold) {
            (Scope::Source, Hold::Until(until)) => table.hold_source(self.epoch.micros(until)),
            (Scope::Source, Hold::Disabled) => table.disable_source(),
            (Scope::Address(index), hold) => {
                let until = match hold {
                    Hold::Until(until) => self.epoch.micros(until),
                    Hold::Disabled => Micros::MAX,
                };
                table.hold_address(index, until, self.epoch.micros(Instant::now()));
            }
            (Scope::Account(index), Hold::Until(until)) => table.hold_account(index, self.epoch.micros(until)),
            (Scope::Account(index), Hold::Disabled) => table.disable_account(index),
        }
    }

    async fn release(&self, scope: Scope, as_of: Timestamp) {
        let mut table = self.table();
        if self.causes().release(scope, as_of) {
            match scope {
                Scope::Source => table.release_source(),
                Scope::Address(index) => table.release_address(index, self.epoch.micros(Instant::now())),
                Scope::Account(index) => table.release_account(index),
            }
        }
    }

    fn snapshot(&self, accounts: Range<usize>, now: Timestamp) -> Snapshot {
        let table = self.table();
        let state = |scope: Scope| Some(self.state(scope, table.standing(scope)?, now));
        Snapshot {
            counted_at: now,
            whole: state(Scope::Source).unwrap_or_default(),
            addresses: (0..self.addresses.len()).map_while(|index| self.address_state(&table, index, now)).collect(),
            accounts: accounts.map_while(|index| state(Scope::Account(index))).collect(),
            cut_off: None,
        }
    }

    fn is_held(&self, slot: &Slot) -> bool {
        self.table().is_held_at(slot.account, self.epoch.micros(slot.at), slot.address)
    }

    async fn set_pace(&self, scope: Scope, by: PaceBy, share: Share) {
        self.table().set_pace(scope, by, share);
    }

    async fn refused(&self, scope: Scope, left_at: Instant) {
        let now = self.epoch.micros(Instant::now());
        self.table().refused(scope, self.epoch.micros(left_at), now);
    }

    fn pace(&self, scope: Scope) -> PaceState {
        self.table().pace(scope)
    }
}

#[cfg(test)]
mod tests;
