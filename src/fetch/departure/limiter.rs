//! How many calls all sources of a process have under way together: each call holds a permit until it has ended.

use std::{future::poll_fn, sync::Arc};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::PollSemaphore;

/// Permits for so many calls at once. Clones share them.
#[derive(Clone, Debug)]
pub struct CallLimiter(Arc<Semaphore>);

impl CallLimiter {
    /// For so many calls, at least one.
    #[must_use]
    pub fn new(calls: usize) -> Self {
        Self(Arc::new(Semaphore::new(calls.clamp(1, Semaphore::MAX_PERMITS))))
    }
}

/// A source's permit for its next call.
///
/// # Ordering
/// Permits go to sources in the order in which they have begun to wait, one at a time: a source with a long backlog does
/// not keep another one out.
#[derive(Debug)]
pub(super) struct NextPermit {
    limiter: CallLimiter,
    permit: Option<OwnedSemaphorePermit>,
    /// Our turn, while we wait for one.
    turn: Option<PollSemaphore>,
}

impl NextPermit {
    pub(super) fn new(limiter: CallLimiter) -> Self {
        Self { limiter, permit: None, turn: None }
    }

    /// Whether the next call has its permit; else it is waited for from now on, see [`Self::acquired`].
    pub(super) fn acquire(&mut self) -> bool {
        if self.permit.is_none() && self.turn.is_none() {
            self.permit = Arc::clone(&self.limiter.0).try_acquire_owned().ok();
        }
        if self.permit.is_none() && self.turn.is_none() {
            self.turn = Some(PollSemaphore::new(Arc::clone(&self.limiter.0)));
        }
        self.permit.is_some()
    }

    /// How many calls could leave now.
    pub(super) fn available(&self) -> usize {
        self.limiter.0.available_permits() + usize::from(self.permit.is_some())
    }

    /// Whether a permit is waited for.
    pub(super) fn is_awaited(&self) -> bool {
        self.turn.is_some()
    }

    /// Waits for the permit; unless one is [awaited](Self::is_awaited) for ever.
    ///
    /// # Cancellation
    /// Safe: the turn is kept.
    pub(super) async fn acquired(&mut self) {
        let Some(turn) = &mut self.turn else { return std::future::pending().await };
        self.permit = poll_fn(|context| turn.poll_acquire(context)).await;
        self.turn = None;
    }

    /// The permit, for a call that leaves now; it is given back by being dropped.
    pub(super) fn take(&mut self) -> Option<OwnedSemaphorePermit> {
        self.permit.take()
    }

    /// There is no call to come soon: others may have the permit, or the turn.
    pub(super) fn release(&mut self) {
        (self.permit, self.turn) = (None, None);
    }
}
