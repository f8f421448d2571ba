//! The quota of a fleet: the timetable in Redis, a lease ahead in this process.
//!
//! `lease.lua` is the arithmetic. A driver task keeps the connection: it fetches slots before they are wanted,
//! in blocks sized by demand, tells of holds and hears of those of others, so that [`Quota::lease`] answers at
//! once and Redis is asked about once for ten calls. Without Redis a worker uses up what it has leased and then
//! stops until Redis is back: nobody else can know what it would do on its own.

mod driver;
mod local;
#[cfg(test)]
mod model;
mod offset;
mod purse_wire;
mod spending;
mod wire;

use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use tokio::{sync::Notify, task::JoinHandle, time::Instant};

use self::{
    driver::Driver,
    local::{Known, Local, paces::Heard},
    spending::Spending,
};
use super::{
    Aliases, Cause, CutOff, Hold, Lease, PaceBy, PaceState, Passed, Past, Quota, Scope, Share, Slot, Snapshot, State,
    limit::Micros, plan::Plan, purse::Purse,
};
use crate::{
    message::SourceName,
    runtime::{clock::Timestamp, redis_server},
};

pub use crate::runtime::redis_server::InvalidUrl;

/// How far ahead a slot may be leased: 16 workers that share 100/s lease blocks of a dozen in turn. After a loss of
/// state nobody calls for so long.
pub const AHEAD: Duration = Duration::from_secs(4);

/// Slots of one source, shared by all processes that use the same Redis.
pub struct Redis {
    shared: Arc<Shared>,
    driver: JoinHandle<()>,
}

/// What the driver and its users share.
pub(super) struct Shared {
    local: Mutex<Local>,
    wake: Notify,
    counts: Mutex<Counts>,
    /// What is spent of long budgets, as Redis said lately.
    spending: Mutex<Option<Arc<Spending>>>,
    /// Out of which the calls of batches are paid, if they have a budget.
    purse: OnceLock<Arc<Purse>>,
}

/// What was asked of Redis so far.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Calls to Redis.
    pub operations: u64,
    /// How long the last leases took, at most 4,096 of them.
    pub leases: std::collections::VecDeque<Duration>,
    /// Slots that their reply brought too late.
    pub discarded: u64,
}

impl Shared {
    fn local(&self) -> MutexGuard<'_, Local> {
        // Every step leaves it whole, so a panic elsewhere under the lock has broken nothing.
        self.local.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spending(&self) -> MutexGuard<'_, Option<Arc<Spending>>> {
        self.spending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Redis {
    /// The quota of a source in the Redis at `url`, under keys that begin with `prefix`; needs a tokio runtime.
    ///
    /// Connects in the background. Accounts are shared by their aliases: whoever started last decides on their
    /// limits. `past`: what is known if Redis knows nothing.
    ///
    /// # Errors
    /// [`InvalidUrl`].
    pub fn new(
        url: &str,
        prefix: &str,
        source: &SourceName,
        aliases: &Aliases,
        plan: Plan,
        past: &Past,
    ) -> Result<Self, InvalidUrl> {
        let client = redis_server::client(url)?;
        let names: Vec<String> = aliases.iter().map(|alias| alias.as_str().to_owned()).collect();
        let known = |(name, account): (&String, &super::plan::AccountPlan)| Known {
            name: name.clone(),
            lateness: account.lateness,
            home: account.address,
            fallbacks: account.fallbacks.clone(),
            held_until: None,
            disabled: false,
            is_capped: account.in_flight.is_some(),
            pace: Heard::default(),
        };
        let accounts = names.iter().zip(&plan.accounts).map(known).collect();
        let ahead = Micros::try_from(AHEAD.as_micros()).unwrap_or(Micros::MAX);
        let (addresses, longest_call) = (plan.address_names.clone(), plan.longest_call);
        let shared = Arc::new(Shared {
            local: Mutex::new(Local::new(accounts, addresses, block(&plan), ahead, longest_call)),
            wake: Notify::new(),
            counts: Mutex::default(),
            spending: Mutex::default(),
            purse: OnceLock::new(),
        });
        let key = format!("{prefix}:quota:{{{source}}}");
        let driver = Driver::new(Arc::clone(&shared), client, key, plan, names, ahead, (aliases, past));
        #[allow(clippy::disallowed_methods, reason = "the handle is kept, and dropping the quota ends the task")]
        let driver = tokio::spawn(driver.run());
        Ok(Self { shared, driver })
    }

    /// What was asked of Redis so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let discarded = self.shared.local().discarded;
        Counts { discarded, ..self.shared.counts().clone() }
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

fn millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

/// How many slots to keep ahead, how many of them to ask for at once, and how long it takes for half of them to come. Ahead:
/// what 240 ms ask for, so that a refill of half of it is more than ten calls. At once: what 24 ms ask for, if that is
/// more than a refill of the smallest block; fewer would cost more operations than one for ten calls.
fn block(plan: &Plan) -> (usize, usize, Duration) {
    let interval = super::plan::interval(plan.accounts.iter().map(|account| account.rules.spacing));
    let interval = interval.max(plan.source.spacing).max(1);
    let (depth, most) = ((240_000 / interval).clamp(24, 128), (24_000 / interval).clamp(24, 128));
    let [depth_slots, most_slots] = [depth, most].map(|slots| usize::try_from(slots).unwrap_or(usize::MAX));
    (depth_slots, most_slots, Duration::from_micros(interval.saturating_mul(depth / 2)))
}

#[async_trait]
impl Quota for Redis {
    fn is_shared(&self) -> bool {
        true
    }

    async fn lease(&self, wanted: usize) -> Lease {
        let lease = self.shared.local().lease(wanted, Instant::now());
        self.shared.wake.notify_one();
        lease
    }

    fn fund(&self, purse: &Arc<Purse>) {
        let depth = self.shared.local().depth();
        purse.share(u64::try_from(depth).unwrap_or(u64::MAX));
        if self.shared.purse.set(Arc::clone(purse)).is_ok() {
            self.shared.wake.notify_one();
        }
    }

    async fn give_back(&self, slots: Vec<Slot>) {
        self.shared.local().give_back(&slots, Instant::now());
        self.shared.wake.notify_one();
    }

    async fn drop_unused(&self, slot: Slot) {
        self.shared.local().drop_unused(&slot, Instant::now());
        self.shared.wake.notify_one();
    }

    fn ended(&self, account: usize) {
        self.shared.local().end(account, Instant::now());
        self.shared.wake.notify_one();
    }

    fn hurry(&self, calls: usize, share: f64) -> Passed {
        let passed = self.shared.local().hurry(calls, share, Instant::now());
        if calls > 0 {
            self.shared.wake.notify_one();
        }
        passed
    }

    fn is_passed_on(&self, slot: &Slot) -> bool {
        self.shared.local().is_passed_on(slot)
    }

    fn rest(&self) {
        self.shared.local().rest(Instant::now());
        self.shared.wake.notify_one();
    }

    async fn hold(&self, scope: Scope, hold: Hold, cause: &Cause) {
        self.shared.local().hold(scope, hold, cause);
        self.shared.wake.notify_one();
    }

    async fn release(&self, scope: Scope, as_of: Timestamp) {
        self.shared.local().release(scope, as_of, Instant::now());
        self.shared.wake.notify_one();
    }

    fn snapshot(&self, accounts: Range<usize>, now: Timestamp) -> Snapshot {
        let spending = self.shared.spending().clone();
        let (local, at) = (self.shared.local(), (Instant::now(), now));
        let account = |index: usize| {
            let state = local.state(Scope::Account(index), at)?;
            let spent = spending.as_ref().and_then(|spending| spending.accounts.get(index).cloned());
            Some(State { spent: spent.unwrap_or_default(), ..state })
        };
        let whole = local.state(Scope::Source, at).unwrap_or_default();
        let mut addresses = local.address_states(at);
        for (address, spent) in addresses.iter_mut().zip(spending.iter().flat_map(|spending| &spending.addresses)) {
            address.spent.clone_from(spent);
        }
        Snapshot {
            counted_at: spending.as_ref().map_or(now, |spending| spending.counted_at),
            whole: State { spent: spending.as_ref().map(|s| s.source.clone()).unwrap_or_default(), ..whole },
            addresses,
            accounts: accounts.map_while(account).collect(),
            cut_off: local.cut_off_at.map(|since| CutOff {
                since: Timestamp::from_millis(now.as_millis() - millis(at.0.saturating_duration_since(since))),
                stopped: local.has_stopped(at.0),
            }),
        }
    }

    fn is_held(&self, slot: &Slot) -> bool {
        self.shared.local().is_held(slot)
    }

    async fn set_pace(&self, scope: Scope, by: PaceBy, share: Share) {
        self.shared.local().set_pace(scope, by, share);
        self.shared.wake.notify_one();
    }

    async fn refused(&self, scope: Scope, left_at: Instant) {
        self.shared.local().refused(scope, left_at, Instant::now());
        self.shared.wake.notify_one();
    }

    fn pace(&self, scope: Scope) -> PaceState {
        self.shared.local().pace(scope, Instant::now())
    }
}
