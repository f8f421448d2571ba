//! The last door before a vendor: knows the vendor's own limit, not our pace, and never has to close if our pace
//! is right.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use governor::{
    RateLimiter,
    clock::Clock,
    middleware::NoOpMiddleware,
    state::{InMemoryState, NotKeyed},
};
use tokio::time::Instant;
use tracing::warn;

use super::{Counting, Limit, plan::Limits};

/// An independent check of every call: per account, per address that calls leave from, and for the source.
///
/// It waits and never refuses; that it waited at all means that the pace is wrong, or that somebody else
/// shares the account.
#[derive(Debug)]
pub struct Guard {
    accounts: Vec<Vec<Bucket>>,
    /// Of each account, the index of the address that its calls leave from if nobody says otherwise.
    homes: Vec<usize>,
    addresses: Vec<Vec<Bucket>>,
    source: Vec<Bucket>,
    held: AtomicU64,
}

type Bucket = RateLimiter<NotKeyed, InMemoryState, TokioClock, NoOpMiddleware<std::time::Instant>>;

/// Tokio's clock, which tests can pause.
#[derive(Clone, Debug)]
struct TokioClock;

impl Clock for TokioClock {
    type Instant = std::time::Instant;

    fn now(&self) -> Self::Instant {
        Instant::now().into_std()
    }
}

impl Guard {
    /// A guard with the vendor's limits per account, by index, and for the outgoing address.
    #[must_use]
    pub fn new(accounts: &[Option<Limit>], address: Option<&Limit>) -> Self {
        let mut limits = Limits::of_accounts(accounts.iter().cloned());
        limits.address.extend(address.cloned());
        Self::of(&limits)
    }

    /// A guard with everything that the vendor allows.
    #[must_use]
    pub fn of(limits: &Limits) -> Self {
        let buckets = |limits: &[Limit]| limits.iter().filter_map(bucket).collect::<Vec<_>>();
        Self {
            accounts: limits.accounts.iter().map(|account| buckets(&account.limits)).collect(),
            homes: limits.accounts.iter().map(|account| account.address).collect(),
            addresses: (0..limits.address_count()).map(|index| buckets(limits.of_address(index))).collect(),
            source: buckets(&limits.source),
            held: AtomicU64::new(0),
        }
    }

    /// Lets one call of `account` through as soon as the vendor's limits allow it; how long that took.
    ///
    /// # Cancellation
    /// Safe: a dropped call may have taken a token of the address that nobody uses, which only costs speed.
    pub async fn pass(&self, account: usize) -> Duration {
        self.pass_from(account, self.homes.get(account).copied().unwrap_or_default()).await
    }

    /// The same for a call that leaves from a certain address.
    ///
    /// # Cancellation
    /// As [`Self::pass`].
    pub async fn pass_from(&self, account: usize, address: usize) -> Duration {
        let Err(mut wait) = self.ask(account, address) else { return Duration::ZERO };
        let arrived = Instant::now();
        loop {
            tokio::time::sleep(wait).await;
            match self.ask(account, address) {
                Ok(()) => break,
                Err(more) => wait = more,
            }
        }
        let held = arrived.elapsed();
        self.count(account, held);
        held
    }

    /// How many calls had to wait so far.
    #[must_use]
    pub fn held_total(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Asks all limits at one instant: a token taken before a wait would say nothing about the time after it.
    /// So the address may be charged again for a call that its account held.
    fn ask(&self, account: usize, address: usize) -> Result<(), Duration> {
        let account = self.accounts.get(account).into_iter().flatten();
        let address = self.addresses.get(address).into_iter().flatten();
        self.source.iter().chain(address).chain(account).try_for_each(|bucket| {
            bucket.check().map_err(|refusal| refusal.wait_time_from(TokioClock.now()).max(Duration::from_nanos(1)))
        })
    }

    fn count(&self, account: usize, held: Duration) {
        let total = self.held.fetch_add(1, Ordering::Relaxed) + 1;
        // A wrong pace holds every call: say so at once, then ever more rarely.
        if total.is_power_of_two() {
            let held_ms = held.as_millis();
            warn!(account, held_ms, total, "the guard held a call: the pace is above the vendor's limit");
        }
    }
}

/// `None` only for a limit that [`Limit::validate`] refuses.
fn bucket(limit: &Limit) -> Option<Bucket> {
    // A window lets all its calls through at once.
    let burst = match limit.kind {
        Counting::Bucket => limit.burst,
        Counting::Fixed | Counting::Sliding => limit.calls,
    };
    let quota = governor::Quota::with_period(limit.interval())?.allow_burst(burst.try_into().ok()?);
    Some(RateLimiter::direct_with_clock(quota, TokioClock))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        quota::{Lease, Quota as _, memory::Memory, pace::Pacing},
        runtime::clock::Dice,
    };

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn limit(calls: u32, burst: u32) -> Limit {
        Limit::new(calls, Duration::from_secs(1), burst).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_passes_and_the_next_call_is_held_and_counted() {
        let guard = Guard::new(&[Some(limit(10, 3)), Some(limit(10, 3))], None);
        for _ in 0..3 {
            assert_eq!(guard.pass(0).await, Duration::ZERO);
        }
        let held = guard.pass(0).await;
        assert!((ms(100)..=ms(102)).contains(&held), "{held:?}");
        assert_eq!(guard.pass(1).await, Duration::ZERO, "accounts do not share a limit");
        assert_eq!(guard.held_total(), 1);
    }

    #[tokio::test]
    async fn a_call_that_need_not_wait_is_not_counted_by_a_clock_that_runs() {
        let guard = Guard::new(&[Some(limit(10, 3))], None);
        assert_eq!(guard.pass(0).await, Duration::ZERO);
        assert_eq!(guard.held_total(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn all_accounts_share_the_limit_of_the_address() {
        let guard = Guard::new(&[None, Some(limit(10, 5))], Some(&limit(10, 1)));
        assert_eq!(guard.pass(0).await, Duration::ZERO);
        assert!(guard.pass(1).await >= ms(100));
        assert!(guard.pass(7).await >= ms(100), "an account that it does not know");
        assert_eq!(guard.held_total(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn calls_that_come_at_once_leave_at_the_vendors_rate() {
        let guard = Guard::new(&[Some(limit(10, 1))], None);
        let start = Instant::now();
        futures::future::join_all((0..11).map(|_| guard.pass(0))).await;
        assert!(start.elapsed() >= ms(1_000), "11 calls at 10/s took {:?}", start.elapsed());
        assert_eq!(guard.held_total(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn our_pace_never_makes_it_wait_even_if_calls_leave_late() {
        for burst in [1, 5] {
            let limits = vec![Some(limit(10, burst)); 4];
            let guard = Guard::new(&limits, Some(&limit(200, 20)));
            let memory = Memory::new(limits, Pacing { margin: 0.0, jitter: Duration::ZERO });
            let dice = Dice::seeded(burst.into());
            let mut left = Instant::now();
            for _ in 0..2_000 {
                let slot = match memory.lease(1).await {
                    Lease::Slots(slots) => slots[0].clone(),
                    Lease::NotBefore(at) => {
                        tokio::time::sleep_until(at).await;
                        continue;
                    }
                    Lease::Nobody => panic!("nobody is disabled"),
                };
                left = left.max(slot.at + ms(2).mul_f64(dice.fraction()));
                tokio::time::sleep_until(left).await;
                assert_eq!(guard.pass(slot.account).await, Duration::ZERO);
            }
            assert_eq!(guard.held_total(), 0);
        }
    }
}
