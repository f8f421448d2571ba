//! The two backlogs of a source, and whose turn it is. Pure.
//!
//! A slot belongs to no request until it leaves, so an express request takes the very next one. While both lanes wait,
//! express has its share of the slots and not more; what one lane does not need is the other's.

use std::time::Duration;

use tokio::time::Instant;

use super::{grouped::Grouped, job::Job};
use crate::{kafka::Partition, message::Lane};

/// Who is next, if both wait.
///
/// Counts by how much express is ahead of its share: an express slot adds `1 − share`, one of the backlog takes
/// `share` off. Express is next unless it is ahead; so over any row of slots for which both wait it gets its share to
/// within one slot. Time without waiting saves nothing up, but lets what is ahead be forgotten.
#[derive(Debug)]
pub(super) struct Arbiter {
    share: f64,
    ahead: f64,
}

impl Arbiter {
    pub(super) fn new(share: f64) -> Self {
        Self { share, ahead: 0.0 }
    }

    /// The express lane's share of the slots from now on.
    pub(super) fn set_share(&mut self, share: f64) {
        self.share = share;
    }

    /// The lane whose turn it is, if one waits.
    pub(super) fn next(&self, waits: impl Fn(Lane) -> bool) -> Option<Lane> {
        // A sum of many shares is not exact.
        let preferred = if self.ahead < 1e-9 { Lane::Express } else { Lane::Bulk };
        [preferred, preferred.other()].into_iter().find(|lane| waits(*lane))
    }

    /// A slot has gone to this lane, whether or not the other one waited for it.
    pub(super) fn served(&mut self, lane: Lane, other_waits: bool) {
        match (lane, other_waits) {
            (Lane::Express, true) => self.ahead += 1.0 - self.share,
            (Lane::Express, false) => {}
            (Lane::Bulk, true) => self.ahead -= self.share,
            (Lane::Bulk, false) => self.ahead = (self.ahead - self.share).max(self.ahead.min(0.0)),
        }
    }
}

/// What waits for a call.
#[derive(Debug)]
pub(super) struct Lanes {
    bulk: Grouped<Job>,
    express: Grouped<Job>,
    arbiter: Arbiter,
}

/// When requests leave that travel together.
#[derive(Clone, Copy, Debug)]
pub(super) struct Departure {
    /// How many go into a call.
    pub(super) most: usize,
    /// How long one waits for others while slots are free.
    pub(super) window: Duration,
    /// Now.
    pub(super) now: Instant,
}

impl Lanes {
    pub(super) fn new(share: f64) -> Self {
        Self { bulk: Grouped::default(), express: Grouped::default(), arbiter: Arbiter::new(share) }
    }

    pub(super) fn set_share(&mut self, share: f64) {
        self.arbiter.set_share(share);
    }

    fn of(&self, lane: Lane) -> &Grouped<Job> {
        match lane {
            Lane::Bulk => &self.bulk,
            Lane::Express => &self.express,
        }
    }

    fn of_mut(&mut self, lane: Lane) -> &mut Grouped<Job> {
        match lane {
            Lane::Bulk => &mut self.bulk,
            Lane::Express => &mut self.express,
        }
    }

    /// Adds a request; one that was taken out before comes back to its place.
    pub(super) fn push(&mut self, job: Job) {
        self.of_mut(job.lane).push(job);
    }

    pub(super) fn len(&self) -> usize {
        self.bulk.len() + self.express.len()
    }

    pub(super) fn len_of(&self, lane: Lane) -> usize {
        self.of(lane).len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn waiting_in(&self, partition: &Partition) -> usize {
        self.bulk.waiting_in(partition) + self.express.waiting_in(partition)
    }

    /// About how many calls all that waits needs.
    pub(super) fn calls(&self, most: usize) -> usize {
        self.bulk.calls(most) + self.express.calls(most)
    }

    /// Whether anything that waits may start.
    pub(super) fn can_start(&self, may_start: impl Fn(&Job) -> bool) -> bool {
        Lane::ALL.into_iter().any(|lane| self.of(lane).heads().any(&may_start))
    }

    /// When the call of this request leaves, if a slot is free: as soon as it is full, or has waited for others.
    fn leaves_at(&self, job: &Job, Departure { most, window, now }: Departure) -> Instant {
        let together = self.bulk.size(&job.request.params) + self.express.size(&job.request.params);
        if together >= most { now } else { job.since + window }
    }

    /// When the next call leaves, if a slot is free; `None`: nothing may start.
    pub(super) fn departs_at(&self, departure: Departure, may_start: impl Fn(&Job) -> bool) -> Option<Instant> {
        let heads = Lane::ALL.into_iter().flat_map(|lane| self.of(lane).heads());
        heads.filter(|job| may_start(job)).map(|job| self.leaves_at(job, departure)).min()
    }

    /// The request that the next slot is for: it counts as the turn of its lane. One whose call would wait for others goes
    /// behind one whose call would not.
    pub(super) fn pop(&mut self, departure: Departure, may_start: impl Fn(&Job) -> bool) -> Option<Job> {
        let waits = |lane| self.of(lane).heads().any(&may_start);
        let lane = self.arbiter.next(waits)?;
        let other_waits = waits(lane.other());
        let leaves = |job: &Job| may_start(job) && self.leaves_at(job, departure) <= departure.now;
        let first = self.of(lane).heads().find(|job| leaves(job)).map(|job| job.position.clone());
        let job =
            self.of_mut(lane).pop(|job| first.as_ref().map_or_else(|| may_start(job), |at| job.position == *at))?;
        self.arbiter.served(lane, other_waits);
        Some(job)
    }

    /// A request that travels along in a call that leaves anyway, express ones first.
    pub(super) fn pop_along(&mut self, first: &Job, may_start: impl Fn(&Job) -> bool) -> Option<Job> {
        Lane::ALL.into_iter().find_map(|lane| self.of_mut(lane).pop_of(&first.request.params, &may_start))
    }

    /// Requests that ask for the same as this one, up to so many.
    pub(super) fn pop_alike(&mut self, job: &Job, most: usize, may_start: impl Fn(&Job) -> bool) -> Vec<Job> {
        let mut alike = Vec::new();
        for lane in Lane::ALL {
            alike.extend(self.of_mut(lane).pop_alike(job, most - alike.len(), &may_start));
        }
        alike
    }

    /// Takes all that waits in a lane.
    pub(super) fn take(&mut self, lane: Lane) -> Vec<Job> {
        self.of_mut(lane).clear()
    }

    /// Takes a partition out, with all that waits in it.
    pub(super) fn remove(&mut self, partition: &Partition) -> Vec<Job> {
        Lane::ALL.into_iter().flat_map(|lane| self.of_mut(lane).remove(partition)).collect()
    }

    pub(super) fn clear(&mut self) -> Vec<Job> {
        Lane::ALL.into_iter().flat_map(|lane| self.take(lane)).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Serves slots one after the other; for each, who waits, and who was served.
    fn served(share: f64, waiting: &[(bool, bool)]) -> Vec<Option<Lane>> {
        let mut arbiter = Arbiter::new(share);
        let serve = |(bulk, express): &(bool, bool)| {
            let waits = |lane| if lane == Lane::Express { *express } else { *bulk };
            let lane = arbiter.next(waits)?;
            arbiter.served(lane, waits(lane.other()));
            Some(lane)
        };
        waiting.iter().map(serve).collect()
    }

    #[test]
    fn half_and_half_while_both_wait_and_all_for_who_waits_alone() {
        let order = |share: f64, waiting: &[(bool, bool)]| -> String {
            let letter = |lane: Option<Lane>| lane.map_or('-', |lane| if lane.is_bulk() { 'b' } else { 'E' });
            served(share, waiting).into_iter().map(letter).collect()
        };
        let (bulk, express, both, nobody) = ((true, false), (false, true), (true, true), (false, false));
        assert_eq!(order(0.5, &[both; 6]), "EbEbEb");
        assert_eq!(order(0.25, &[both; 8]), "EbbbEbbb");
        assert_eq!(order(0.5, &[express, express, express, both, nobody, bulk]), "EEEE-b");
        assert_eq!(order(0.5, &[bulk, bulk, bulk, both, both, both]), "bbbEbE", "waiting saves nothing up");
    }

    fn asks(zip: &str, offset: i64, since: Instant) -> Job {
        let mut job = crate::fetch::tests::job(0);
        job.request.params.insert("zip".to_owned(), zip.to_owned());
        job.request.item = crate::message::ItemId::new(offset.to_string()).unwrap();
        (job.position.offset, job.since) = (offset, since);
        job
    }

    #[test]
    fn a_call_leaves_when_it_is_full_or_its_first_has_waited_and_takes_along_what_has_the_same_parameters() {
        let (mut lanes, start) = (Lanes::new(0.5), Instant::now());
        let window = Duration::from_millis(10);
        let at = |now: Instant| Departure { most: 3, window, now };
        assert_eq!(lanes.departs_at(at(start), |_| true), None);
        for (offset, zip) in (0..).zip(["1", "2", "1", "2"]) {
            lanes.push(asks(zip, offset, start));
        }
        assert_eq!(lanes.departs_at(at(start), |_| true), Some(start + window));
        lanes.push(asks("1", 4, start + window / 2));
        let now = start + window / 2;
        assert_eq!(lanes.departs_at(at(now), |_| true), Some(now), "three of a kind are a full call");
        assert_eq!(lanes.departs_at(at(now), |_| false), None, "but the window of their partition is full");
        let first = lanes.pop(at(now), |_| true).unwrap();
        let along: Vec<_> =
            std::iter::from_fn(|| lanes.pop_along(&first, |_| true)).map(|job| job.position.offset).collect();
        assert_eq!((first.position.offset, along), (0, vec![2, 4]));
        assert_eq!(lanes.departs_at(at(now), |_| true), Some(start + window), "the others wait on");
        assert_eq!((lanes.len(), lanes.calls(3)), (2, 1));
    }

    fn share() -> impl Strategy<Value = f64> {
        0.01f64..0.99
    }

    fn waiting() -> impl Strategy<Value = Vec<(bool, bool)>> {
        prop::collection::vec((any::<bool>(), any::<bool>()), 0..200)
    }

    proptest! {
        #[test]
        fn no_slot_is_lost_and_nobody_is_served_who_does_not_wait(share in share(), waiting in waiting()) {
            for ((bulk, express), lane) in waiting.iter().zip(served(share, &waiting)) {
                prop_assert_eq!(lane.is_some(), *bulk || *express);
                prop_assert!(lane != Some(Lane::Bulk) || *bulk);
                prop_assert!(lane != Some(Lane::Express) || *express);
            }
        }

        #[test]
        #[allow(clippy::cast_precision_loss, reason = "counts of a few hundred")]
        fn in_any_row_of_slots_that_both_want_express_has_its_share_to_within_one(
            share in share(), before in waiting(), row in 1usize..300, from in 0usize..300,
        ) {
            let waiting: Vec<_> = before.iter().copied().chain(vec![(true, true); row]).collect();
            let lanes = served(share, &waiting);
            let piece = &lanes[(before.len() + from % row)..];
            let express = piece.iter().filter(|lane| **lane == Some(Lane::Express)).count() as f64;
            let due = share * piece.len() as f64;
            prop_assert!((express - due).abs() < 1.0 + 1e-6, "{} of {} at {}", express, piece.len(), share);
        }

        #[test]
        fn at_half_of_the_slots_and_more_express_waits_for_one_slot_of_the_backlog_at_most(
            share in 0.5f64..0.99, waiting in waiting(),
        ) {
            let lanes = served(share, &waiting);
            for (slot, pair) in lanes.windows(2).enumerate() {
                let express_waits = waiting[slot].1 && waiting[slot + 1].1;
                prop_assert!(!(express_waits && pair == [Some(Lane::Bulk), Some(Lane::Bulk)]), "at slot {}", slot);
            }
        }
    }
}
