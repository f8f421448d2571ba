//! When may who call: slots are times, handed out so that the vendor's own limiter never says no.
//!
//! A [`Quota`] leases several [`Slot`]s of a source ahead, in time order over its accounts; each is permission
//! for one call at one instant. A slot that is missed is dropped, never caught up. [`plan`] says what the
//! vendor's [`Limit`]s come down to: the spacing that [`pace`] derives, and [`budget`]s. [`timetable`] is the
//! arithmetic: [`memory`] keeps it for one process, [`redis`] for a fleet. [`adapt`] lets the pace give way where the vendor refuses all the same, and [`share`] says who else
//! asked for less. [`turn`] divides slots between express requests and the backlog, in a process and between processes,
//! which pass slots on to whoever has an express request. [`guard`] stands at the last door with the limit itself.
//! [`journal`] keeps what is spent and held on a topic, and follows what an operator sets there. [`used_up`] says which
//! budgets are spent.

pub mod adapt;
pub mod budget;
pub mod calendar;
pub mod civil;
mod config;
#[cfg(test)]
mod feedback_tests;
pub mod guard;
pub mod journal;
mod limit;
pub mod memory;
mod micros;
#[cfg(test)]
pub(crate) mod model;
pub mod money;
pub mod pace;
pub mod past;
pub mod plan;
pub mod purse;
pub mod redis;
pub mod share;
mod state;
pub mod tally;
pub mod timetable;
pub mod turn;
pub mod used_up;

use std::{ops::Range, sync::Arc, time::Duration};

use async_trait::async_trait;
pub use config::{Config, OpenError, Store, open};
pub use limit::{Counting, InvalidLimit, Limit, Micros};
pub use pace::Pacing;
pub use past::Past;
pub use purse::{Pay, Purse};
pub use share::{PaceBy, PaceState, Share};
pub use state::{AddressState, Cause, CutOff, Held, Snapshot, State};
pub use tally::Tally;
use tokio::time::Instant;

use crate::{message::AccountAlias, runtime::clock::Timestamp};

/// Permission to make one call at one instant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Index of the account in the source's list.
    pub account: usize,
    /// Index of the address that the call leaves from.
    pub address: usize,
    /// When the call leaves.
    pub at: Instant,
    /// Until when it still may: a later one would arrive in the time of later slots.
    pub latest: Instant,
}

impl Slot {
    /// How late a call may leave at a pace that counts with it; a larger burst allows more, and a limit that
    /// would lose too much of its rate allows less, see [`pace::Pacing::guard`].
    pub const GUARD: Duration = Duration::from_millis(5);
    /// How late a call may always leave.
    pub const GUARD_MIN: Duration = Duration::from_millis(1);

    /// Whether it has been missed: drop it, never catch up.
    #[must_use]
    pub fn is_late(&self, now: Instant) -> bool {
        now > self.latest
    }
}

/// What [`Quota::lease`] grants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lease {
    /// Slots in time order; at least one, at most as many as asked for.
    Slots(Vec<Slot>),
    /// Nobody may call before this time: ask again then.
    NotBefore(Instant),
    /// Every account is disabled: only an operator can help.
    Nobody,
}

/// What [`Quota::hurry`] has brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// How many slots have come from others since it was said last.
    pub come: usize,
    /// When to say it again, if there are others to ask.
    pub look_at: Option<Instant>,
}

/// What a refusal, or an operator, takes out of use or slows down.
///
/// A source is one API, and an account belongs to one source. So a ban per (account, API) is [`Self::Account`], and one
/// per API, whoever calls, is [`Self::Source`]: they are kept apart, and neither touches another source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// One account, for all its calls.
    Account(usize),
    /// One address that calls leave from, for all accounts that use it.
    Address(usize),
    /// The source's API, for all accounts.
    Source,
}

/// Until when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// Not before this time.
    Until(Instant),
    /// Until an operator acts: the vendor refused the credentials.
    Disabled,
}

/// Hands out times at which calls may leave.
#[async_trait]
pub trait Quota: Send + Sync {
    /// Leases up to `wanted` slots of the source, in time order, none earlier than now.
    async fn lease(&self, wanted: usize) -> Lease;

    /// Grants the calls of batches out of budgets that all processes spend together. What does nothing leaves the purse
    /// to itself, as is right for one process.
    fn fund(&self, purse: &Arc<Purse>) {
        let _ = purse;
    }

    /// Whether other processes spend the same.
    fn is_shared(&self) -> bool {
        false
    }

    /// Returns slots that will not be used; the arithmetic takes them back where it still can.
    async fn give_back(&self, slots: Vec<Slot>);

    /// Gives up a slot whose time has come and in which no call has left: it is not handed out again, but its budgets have
    /// it back.
    async fn drop_unused(&self, slot: Slot) {
        self.give_back(vec![slot]).await;
    }

    /// A call whose slot was not given back has ended: of accounts whose calls under way are limited, each slot
    /// must come to one or the other, or they run out.
    fn ended(&self, account: usize) {
        let _ = account;
    }

    /// Somebody waits for so many calls for which this process has no slot that leaves soon: others may pass theirs on to
    /// it, up to this share of what they have. To be said again while it is so; [`Quota::lease`] hands out what comes.
    ///
    /// Who says this, if only of no calls, looks by [`Quota::is_passed_on`] before each of its own.
    fn hurry(&self, calls: usize, share: f64) -> Passed {
        let (_, _) = (calls, share);
        Passed::default()
    }

    /// Whether a slot that was handed out has been passed on to another process. Of a slot whose time had come when this
    /// was asked, it does not change any more.
    fn is_passed_on(&self, slot: &Slot) -> bool {
        let _ = slot;
        false
    }

    /// Nothing waits here any more: what was leased ahead is for others.
    fn rest(&self) {}

    /// Moves the shared time: nobody calls within `scope` before the hold ends. Slots already leased are
    /// checked again by [`Quota::is_held`].
    async fn hold(&self, scope: Scope, hold: Hold, cause: &Cause);

    /// Ends the hold of `scope`, and enables it again, if it was held before `as_of`; what held it before that
    /// time and is told of later does not count any more. In whatever order holds and releases arrive, and
    /// however often, they come to the same.
    async fn release(&self, scope: Scope, as_of: Timestamp);

    /// What is known of the source and of these accounts, by index; at `now`.
    fn snapshot(&self, accounts: Range<usize>, now: Timestamp) -> Snapshot;

    /// Whether a leased slot has been overtaken by a hold.
    fn is_held(&self, slot: &Slot) -> bool;

    /// Lets everybody call within `scope` at this share of the planned rate, from the next slot that is made on; a source's
    /// share is that of each of its accounts, addresses and shared limits. What others asked for stays, and multiplies.
    /// Budgets are allowances and stay whole.
    async fn set_pace(&self, scope: Scope, by: PaceBy, share: Share);

    /// The vendor refused a call as too fast that had left at `left_at`: the pace within `scope` gives way for everybody,
    /// as [`adapt`] has it.
    async fn refused(&self, scope: Scope, left_at: Instant);

    /// How fast calls go within `scope`.
    fn pace(&self, scope: Scope) -> PaceState;
}

/// The accounts of a source by index, as slots name them.
pub type Aliases = Arc<[AccountAlias]>;
