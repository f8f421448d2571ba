//! Borrowing slots: express requests that this process has no slot for soon get those that other processes pass on.

use std::time::Duration;

use tokio::time::Instant;

use super::Departure;
use crate::{
    fetch::job::Job,
    message::Lane,
    quota::{Lease, Passed},
};

impl Departure {
    /// A slot that leaves within so long is waited for: another one's would come no sooner.
    const SOON: Duration = Duration::from_millis(20);

    /// Asks others for slots if so many calls of express requests are [late](Self::late_express_calls), and takes what they
    /// have passed on. `wanted`: how many slots are of use in all.
    pub(in crate::fetch) async fn borrow_slots(&mut self, late: usize, wanted: usize) {
        let share = *self.express_share.borrow();
        let Passed { come, look_at } = self.quota.hurry(late, share);
        self.lanes.lend(come);
        self.look_at = look_at;
        self.has_passed |= late > 0;
        // Without any slot more are leased anyway.
        if (late > 0 || come > 0) && !self.slots.is_empty() {
            let wanted = wanted.saturating_sub(self.slots.len()).max(come).max(1);
            if let Lease::Slots(slots) = self.quota.lease(wanted).await {
                self.slots.extend(slots);
                self.slots.make_contiguous().sort_by_key(|slot| slot.at);
            }
        }
    }

    /// How many calls of express requests may leave, but have no slot of this process soon.
    pub(in crate::fetch) fn late_express_calls(&self, wanted: usize, may_start: impl Fn(&Job) -> bool) -> usize {
        let waits = |lane| self.lanes.waits(lane, &may_start);
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
        let near = if waits(Lane::Bulk) { (near as f64 * *self.express_share.borrow()).ceil() as usize } else { near };
        self.lanes.calls_of(Lane::Express, self.caller.batch_max()).min(wanted).saturating_sub(near)
    }

    /// Looks again soon while others are asked.
    pub(in crate::fetch) fn look_soon(&mut self) {
        self.wake_at = self.wake_at.into_iter().chain(self.look_at.take()).min();
    }

    /// Nobody to call for: others may use what is left of the lease.
    pub(in crate::fetch) async fn rest(&mut self) {
        if !self.slots.is_empty() {
            self.return_slots().await;
        }
        if std::mem::take(&mut self.has_passed) {
            self.quota.rest();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::VecDeque,
        ops::Range,
        sync::{Arc, Mutex, MutexGuard},
    };

    use bytes::Bytes;

    use super::*;
    use crate::{
        fetch::{Config, Fetch, tests::caller_for},
        kafka::{
            Reader,
            scripted::{Log, assigned, records},
        },
        message::Request,
        platform::{Account, Exchange, HttpReply, Reply, Vendor},
        quota::{Cause, Hold, PaceBy, PaceState, Quota, Scope, Share, Slot, Snapshot},
        runtime::clock::Timestamp,
    };

    /// A vendor at whose address nobody listens.
    struct Away;

    impl Vendor for Away {
        fn batch_max(&self) -> usize {
            1
        }
        fn prepare(&self, _: &Account, _: &[&Request], _: Timestamp) -> Exchange {
            Exchange::post("http://127.0.0.1:9/".to_owned(), vec![])
        }
        fn interpret(&self, _: &[&Request], _: &HttpReply) -> Reply {
            Reply::Each(vec![])
        }
    }

    /// A quota that does what a test says.
    #[derive(Default)]
    struct Scripted(Mutex<Script>);

    #[derive(Default)]
    struct Script {
        /// What is leased next.
        slots: VecDeque<Slot>,
        /// How many of them others have passed on.
        come: usize,
        passed: Vec<Slot>,
        /// For how many calls slots were wanted, each time.
        wanted: Vec<usize>,
        rests: usize,
    }

    impl Scripted {
        fn script(&self) -> MutexGuard<'_, Script> {
            self.0.lock().unwrap()
        }
    }

    #[async_trait::async_trait]
    impl Quota for Scripted {
        async fn lease(&self, wanted: usize) -> Lease {
            let slots = &mut self.script().slots;
            let leased: Vec<_> = slots.drain(..wanted.min(slots.len())).collect();
            let later = Instant::now() + Duration::from_secs(1);
            if leased.is_empty() { Lease::NotBefore(later) } else { Lease::Slots(leased) }
        }
        fn hurry(&self, calls: usize, _: f64) -> Passed {
            self.script().wanted.push(calls);
            let look_at = (calls > 0).then(|| Instant::now() + ms(2));
            Passed { come: std::mem::take(&mut self.script().come), look_at }
        }
        fn is_passed_on(&self, slot: &Slot) -> bool {
            self.script().passed.contains(slot)
        }
        fn rest(&self) {
            self.script().rests += 1;
        }
        async fn give_back(&self, _: Vec<Slot>) {}
        async fn hold(&self, _: Scope, _: Hold, _: &Cause) {}
        async fn release(&self, _: Scope, _: Timestamp) {}
        fn snapshot(&self, _: Range<usize>, _: Timestamp) -> Snapshot {
            unreachable!("nobody asks")
        }
        fn is_held(&self, _: &Slot) -> bool {
            false
        }
        async fn set_pace(&self, _: Scope, _: PaceBy, _: Share) {}
        async fn refused(&self, _: Scope, _: Instant) {}
        fn pace(&self, _: Scope) -> PaceState {
            PaceState::default()
        }
    }

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// A stage with so many requests of the backlog and one that is express.
    async fn stage(quota: &Arc<Scripted>, bulk: usize) -> Fetch<impl Reader, Log> {
        let log = Log::default();
        let (events, reader) = log.reader();
        let caller = caller_for("ali1688", Arc::new(Away));
        let mut fetch = Fetch::new(reader, log, caller, Arc::clone(quota) as Arc<dyn Quota>, Config::default());
        events.send(assigned()).unwrap();
        let items = (0..=bulk).map(|item| Bytes::from(item.to_string()));
        events.send(records(0, items)).unwrap();
        while fetch.departure.lanes.is_empty() {
            let event = fetch.admission.next().await.unwrap();
            fetch.take(event);
        }
        let mut waiting = fetch.departure.lanes.clear();
        let mut job = waiting.pop().unwrap();
        for job in waiting {
            fetch.departure.lanes.push(job);
        }
        job.lane = Lane::Express;
        fetch.departure.lanes.push(job);
        fetch
    }

    fn slot(start: Instant, millis: u64) -> Slot {
        let at = start + ms(millis);
        Slot { account: 0, address: 0, at, latest: at + ms(5) }
    }

    #[tokio::test(start_paused = true)]
    async fn what_others_pass_on_is_used_for_the_express_request_and_what_was_passed_on_is_not_used_here() {
        let (quota, start) = (Arc::new(Scripted::default()), Instant::now());
        let mut fetch = stage(&quota, 2).await;
        quota.script().slots.extend([80, 90, 100].map(|at| slot(start, at)));
        fetch.turn().await;
        assert_eq!(quota.script().wanted, [1], "its own first slot is far away");
        assert!(fetch.departure.wake_at.is_some_and(|at| at <= start + ms(5)), "it looks again soon");

        quota.script().slots.push_back(slot(start, 10));
        quota.script().come = 1;
        fetch.turn().await;
        fetch.turn().await;
        assert_eq!(quota.script().wanted, [1, 1, 0], "a slot has come");
        assert_eq!(fetch.departure.wake_at, Some(start + ms(10)));
        tokio::time::sleep_until(start + ms(10)).await;
        fetch.turn().await;
        assert_eq!(
            (fetch.calls.len(), fetch.departure.lanes.len_of(Lane::Express), fetch.departure.lanes.len()),
            (1, 0, 2)
        );

        // The next one is passed on while it waits here.
        quota.script().passed.push(slot(start, 80));
        for (at, calls) in [(80, 1), (90, 2)] {
            tokio::time::sleep_until(start + ms(at)).await;
            fetch.turn().await;
            assert_eq!(fetch.calls.len(), calls, "after {at} ms");
        }
        assert_eq!(quota.script().rests, 0);
        tokio::time::sleep_until(start + ms(100)).await;
        fetch.turn().await;
        assert_eq!((fetch.calls.len(), quota.script().rests), (3, 1), "nothing is left to do");
    }

    #[tokio::test(start_paused = true)]
    async fn an_express_request_with_a_slot_soon_asks_nobody() {
        let (quota, start) = (Arc::new(Scripted::default()), Instant::now());
        let mut fetch = stage(&quota, 2).await;
        quota.script().slots.extend([15, 90].map(|at| slot(start, at)));
        fetch.departure.slots.extend(quota.script().slots.drain(..));
        fetch.turn().await;
        assert_eq!((quota.script().wanted.as_slice(), fetch.departure.wake_at), ([0].as_slice(), Some(start + ms(15))));
    }
}
