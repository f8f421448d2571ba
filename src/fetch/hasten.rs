//! Express requests that this process has no slot for soon: other processes pass theirs on.

use std::time::Duration;

use tokio::time::Instant;

use super::Fetch;
use crate::{
    kafka::{Reader, Writer},
    message::Lane,
    quota::Lease,
};

/// What passes between this process and others.
#[derive(Debug, Default)]
pub(super) struct Haste {
    /// An express request waits for slots of others.
    waits: bool,
    /// Since everything was done last, slots were asked of others or passed on to them.
    pub(super) has_passed: bool,
}

impl<R: Reader, W: Writer> Fetch<R, W> {
    /// A slot that leaves within so long is waited for: another one's would come no sooner.
    const SOON: Duration = Duration::from_millis(20);

    /// Whoever waits for a slot of others looks so often whether it has come.
    const LOOK: Duration = Duration::from_millis(2);

    /// Asks others for slots if an express request has none soon, and takes what they have passed on.
    pub(super) async fn hasten(&mut self) {
        let share = *self.express_share.borrow();
        let calls = self.late_express_calls(share);
        self.backlog.lend(self.quota.hurry(calls, share));
        self.haste.waits = calls > 0;
        self.haste.has_passed |= self.haste.waits;
        // Without any slot more are leased anyway.
        if self.haste.waits && !self.slots.is_empty() {
            let wanted = self.calls_wanted().saturating_sub(self.slots.len()).max(1);
            if let Lease::Slots(slots) = self.quota.lease(wanted).await {
                self.slots.extend(slots);
                self.slots.make_contiguous().sort_by_key(|slot| slot.at);
            }
        }
    }

    /// How many calls of express requests may leave, but have no slot of this process soon.
    fn late_express_calls(&self, share: f64) -> usize {
        let waits = |lane| self.backlog.waits(lane, |job| self.intake.may_start(&job.position));
        if !waits(Lane::Express) {
            return 0;
        }
        let soon = Instant::now() + Self::SOON;
        let near = self.slots.iter().filter(|slot| slot.at <= soon && !self.quota.is_passed_on(slot)).count();
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "some ten"
        )]
        let near = if waits(Lane::Bulk) { (near as f64 * share).ceil() as usize } else { near };
        self.backlog.calls_of(Lane::Express, self.caller.batch_max()).min(self.calls_wanted()).saturating_sub(near)
    }

    /// Looks again soon while others are asked.
    pub(super) fn look_soon(&mut self) {
        if std::mem::take(&mut self.haste.waits) {
            let soon = Instant::now() + Self::LOOK;
            self.wake_at = Some(self.wake_at.map_or(soon, |at| at.min(soon)));
        }
    }

    /// Nobody to call for: others may use what is left of the lease.
    pub(super) async fn rest(&mut self) {
        if !self.slots.is_empty() {
            self.return_slots().await;
        }
        if std::mem::take(&mut self.haste.has_passed) {
            self.quota.rest();
        }
    }
}
