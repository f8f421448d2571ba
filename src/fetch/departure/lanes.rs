//! The two backlogs of a source, and whose turn it is. Pure.
//!
//! A slot belongs to no request until it leaves, so an express request takes the very next one. While both lanes wait,
//! express has its share of the slots and not more; what one lane does not need is the other's.

use std::time::Duration;

use tokio::time::Instant;

use super::grouped::Grouped;
use crate::{fetch::job::Job, kafka::Partition, message::Lane, quota::turn::Arbiter};

/// What waits for a call.
#[derive(Debug)]
pub(super) struct Lanes {
    bulk: Grouped<Job>,
    express: Grouped<Job>,
    arbiter: Arbiter,
}

/// When requests leave that travel together.
#[derive(Clone, Copy, Debug)]
pub(super) struct Batching {
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

    /// Others have passed on so many slots for express requests.
    pub(super) fn lend(&mut self, slots: usize) {
        self.arbiter.lend(slots);
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

    /// The same of what waits in a lane.
    pub(super) fn calls_of(&self, lane: Lane, most: usize) -> usize {
        self.of(lane).calls(most)
    }

    /// Whether anything that waits in a lane may start.
    pub(super) fn waits(&self, lane: Lane, may_start: impl Fn(&Job) -> bool) -> bool {
        self.of(lane).heads().any(may_start)
    }

    /// Whether anything that waits may start.
    pub(super) fn can_start(&self, may_start: impl Fn(&Job) -> bool) -> bool {
        Lane::ALL.into_iter().any(|lane| self.waits(lane, &may_start))
    }

    /// When the call of this request leaves, if a slot is free: as soon as it is full, or has waited for others.
    fn leaves_at(&self, job: &Job, Batching { most, window, now }: Batching) -> Instant {
        let together = self.bulk.size(&job.request.params) + self.express.size(&job.request.params);
        if together >= most { now } else { job.since + window }
    }

    /// When the next call leaves, if a slot is free; `None`: nothing may start.
    pub(super) fn departs_at(&self, batching: Batching, may_start: impl Fn(&Job) -> bool) -> Option<Instant> {
        let heads = Lane::ALL.into_iter().flat_map(|lane| self.of(lane).heads());
        heads.filter(|job| may_start(job)).map(|job| self.leaves_at(job, batching)).min()
    }

    /// The request that the next slot is for: it counts as the turn of its lane. One whose call would wait for others goes
    /// behind one whose call would not.
    pub(super) fn pop(&mut self, batching: Batching, may_start: impl Fn(&Job) -> bool) -> Option<Job> {
        let waits = |lane| self.waits(lane, &may_start);
        let lane = self.arbiter.next(waits)?;
        let other_waits = waits(lane.other());
        let leaves = |job: &Job| may_start(job) && self.leaves_at(job, batching) <= batching.now;
        let first = self.of(lane).heads().find(|job| leaves(job)).map(|job| job.position.clone());
        let job =
            self.of_mut(lane).pop(|job| first.as_ref().map_or_else(|| may_start(job), |at| job.position == *at))?;
        self.arbiter.served(lane, other_waits);
        Some(job)
    }

    /// The request of the lowest rank, an express one first; no lane's turn.
    pub(super) fn pop_least(&mut self, rank: impl Fn(&Job) -> u32, may_start: impl Fn(&Job) -> bool) -> Option<Job> {
        let of_lane = |lane| Some((self.of(lane).least(&rank, &may_start)?, lane));
        let (_, lane) = [Lane::Express, Lane::Bulk].into_iter().filter_map(of_lane).min_by_key(|(rank, _)| *rank)?;
        self.of_mut(lane).pop_least(&rank, &may_start)
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
    use super::*;

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
        let at = |now: Instant| Batching { most: 3, window, now };
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
}
