//! What a worker does without Redis, if it may: a part of the quota that Redis never grants to anybody.
//!
//! [`Division`](crate::quota::division) says why that is safe for at most so many workers. Redis counts them: a worker that
//! is connected has a *seat*, which it keeps for a while after it was heard of last; nobody else gets it before that time
//! is over, by Redis' clock, and the worker stops a little earlier, by its own.

use std::{
    collections::VecDeque,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::Instant;

use super::local::Local;
use crate::{
    quota::{Lease, Quota as _, Slot, division::Division, memory::Memory, plan::Plan},
    runtime::clock::Clock,
};

/// How a worker may go on without Redis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sharing {
    /// What is kept back, for how many.
    pub division: Division,
    /// For how long after it was heard of last.
    pub lasts: Duration,
}

/// A worker's part.
#[derive(Debug)]
pub(super) struct Alone {
    memory: Memory,
    /// Slots of it that were handed out lately: they may come back.
    out: Mutex<VecDeque<Slot>>,
    /// How many of them were not given back, since Redis was lost last.
    taken: AtomicU64,
}

impl Alone {
    pub fn new(plan: Plan) -> Self {
        Self { memory: Memory::on(plan, &Clock::System), out: Mutex::default(), taken: AtomicU64::new(0) }
    }

    /// Redis is lost: what is taken is counted from here.
    pub fn begin(&self) {
        self.taken.store(0, Relaxed);
    }

    /// How many slots were taken since then.
    pub fn taken(&self) -> u64 {
        self.taken.load(Relaxed)
    }

    /// A seat was got that somebody else may have had.
    pub fn seated(&self) {
        self.memory.learn();
    }

    /// Takes over what holds and slows whom.
    pub fn mirror(&self, local: &Local) {
        self.memory.mirror(local.standings());
    }

    pub async fn lease(&self, wanted: usize) -> Lease {
        let lease = self.memory.lease(wanted).await;
        if let Lease::Slots(slots) = &lease {
            self.taken.fetch_add(u64::try_from(slots.len()).unwrap_or_default(), Relaxed);
            let (mut out, now) = (self.out(), Instant::now());
            out.extend(slots.iter().cloned());
            while out.front().is_some_and(|slot| slot.at + Duration::from_secs(5) < now) {
                out.pop_front();
            }
        }
        lease
    }

    /// Takes back those of these that are its own.
    pub async fn give_back(&self, slots: &[Slot]) {
        let own: Vec<Slot> = {
            let mut out = self.out();
            let found = slots.iter().filter_map(|slot| {
                let at = out.iter().position(|out| out == slot)?;
                out.remove(at)
            });
            found.collect()
        };
        if !own.is_empty() {
            let back = u64::try_from(own.len()).unwrap_or_default();
            // Slots of before the last loss may come back after it.
            self.taken.fetch_update(Relaxed, Relaxed, |taken| Some(taken.saturating_sub(back))).ok();
            self.memory.give_back(own).await;
        }
    }

    fn out(&self) -> std::sync::MutexGuard<'_, VecDeque<Slot>> {
        // Every step leaves it whole, so a panic elsewhere under the lock has broken nothing.
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
