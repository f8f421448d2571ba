//! Room for the calls of all sources of a process: whoever calls takes a place, and leaves it when the call has ended.

use std::{future::poll_fn, sync::Arc};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::PollSemaphore;

/// Room for so many calls at once. Clones share it.
#[derive(Clone, Debug)]
pub struct Room(Arc<Semaphore>);

impl Room {
    /// Room for so many calls, at least one.
    #[must_use]
    pub fn new(calls: usize) -> Self {
        Self(Arc::new(Semaphore::new(calls.clamp(1, Semaphore::MAX_PERMITS))))
    }
}

/// A source's next place in the room.
///
/// # Ordering
/// Places go to sources in the order in which they have begun to wait, one at a time: a source with a long backlog does
/// not keep another one out.
#[derive(Debug)]
pub(super) struct Place {
    room: Room,
    ours: Option<OwnedSemaphorePermit>,
    /// Our turn, while we wait for one.
    turn: Option<PollSemaphore>,
}

impl Place {
    pub(super) fn new(room: Room) -> Self {
        Self { room, ours: None, turn: None }
    }

    /// Whether a place is ours; else it is waited for from now on, see [`Self::comes`].
    pub(super) fn is_ours(&mut self) -> bool {
        if self.ours.is_none() && self.turn.is_none() {
            self.ours = Arc::clone(&self.room.0).try_acquire_owned().ok();
        }
        if self.ours.is_none() && self.turn.is_none() {
            self.turn = Some(PollSemaphore::new(Arc::clone(&self.room.0)));
        }
        self.ours.is_some()
    }

    /// How many calls could leave now.
    pub(super) fn free(&self) -> usize {
        self.room.0.available_permits() + usize::from(self.ours.is_some())
    }

    /// Whether a place is waited for.
    pub(super) fn is_awaited(&self) -> bool {
        self.turn.is_some()
    }

    /// Waits for the place; without a wish for one it never comes.
    ///
    /// # Cancellation
    /// Safe: the turn is kept.
    pub(super) async fn comes(&mut self) {
        let Some(turn) = &mut self.turn else { return std::future::pending().await };
        self.ours = poll_fn(|context| turn.poll_acquire(context)).await;
        self.turn = None;
    }

    /// The place, for a call that leaves now.
    pub(super) fn take(&mut self) -> Option<OwnedSemaphorePermit> {
        self.ours.take()
    }

    /// There is no call to come soon: others may have the place, or the turn.
    pub(super) fn leave(&mut self) {
        (self.ours, self.turn) = (None, None);
    }
}
