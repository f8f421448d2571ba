//! The partitions assigned to this process, shared by the thread that reads and the thread that commits.
//!
//! The broker refuses the offsets of a member whose generation is over, but with *fresh* group metadata it
//! accepts offsets for partitions that the member does not own (measured, see the design notes). So a commit
//! holds a [`Permit`] from the check of its epochs to its end. A rebalance takes a partition away from new commits at
//! once, and then waits for those under way: for a while only, since one can hang in a client whose brokers are killed.
//! One that still ends after that carries the generation of its beginning, which the broker refuses by then.
//!
//! One process can be several members of the group, one for each set of topics (see [`super::GroupConfig`]): then a
//! commit is checked against the generation of each member whose partitions it is about.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerGroupMetadata};

use super::{
    Epoch, Offsets, Partition,
    reader::Context,
    topic_ids::{TopicId, TopicIds},
};

/// Membership in a consumer group. Opaque to stages; cheap to clone.
#[derive(Clone)]
pub struct Membership(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    /// A commit has ended.
    ended: Condvar,
    consumers: OnceLock<Vec<Weak<BaseConsumer<Context>>>>,
    epochs: AtomicU64,
}

#[derive(Default)]
struct State {
    owned: HashMap<Partition, Owned>,
    /// The number that the next commit gets.
    next: u64,
    /// The numbers of the commits under way.
    under_way: BTreeSet<u64>,
}

#[derive(Clone, Copy)]
struct Owned {
    epoch: Epoch,
    /// Which of this process's members has it.
    member: usize,
    /// Which log of its topic it is, if the brokers say so.
    id: Option<TopicId>,
}

/// Permission to commit these partitions, for as long as it lives: who takes one of them away waits for its end.
pub(super) struct Permit {
    number: u64,
    owned: HashMap<Partition, Owned>,
    membership: Membership,
}

/// The commits that were under way when partitions were taken away: those with a smaller number.
#[derive(Clone, Copy, Debug)]
pub(super) struct UnderWay(u64);

impl Membership {
    pub(super) fn new() -> Self {
        let (state, ended, consumers) = (Mutex::default(), Condvar::new(), OnceLock::new());
        Self(Arc::new(Inner { state, ended, consumers, epochs: AtomicU64::new(0) }))
    }

    /// The consumers whose memberships it is, by the number of the member; weak, so that they end on their own thread.
    pub(super) fn belongs_to(&self, consumers: &[Arc<BaseConsumer<Context>>]) {
        let _ = self.0.consumers.set(consumers.iter().map(Arc::downgrade).collect());
    }

    /// The consumer of this member; `None` if reading has ended.
    pub(super) fn consumer(&self, member: usize) -> Option<Arc<BaseConsumer<Context>>> {
        self.0.consumers.get()?.get(member)?.upgrade()
    }

    /// An epoch that no assignment of this process has had.
    pub(super) fn new_epoch(&self) -> Epoch {
        Epoch(self.0.epochs.fetch_add(1, Ordering::Relaxed) + 1)
    }

    pub(super) fn add(&self, partition: Partition, epoch: Epoch, member: usize, id: Option<TopicId>) {
        self.state().owned.insert(partition, Owned { epoch, member, id });
    }

    /// Takes partitions away from every commit that begins from now on. Those under way have to be waited for, see
    /// [`Self::have_ended`].
    #[must_use]
    pub(super) fn remove<'p>(&self, partitions: impl IntoIterator<Item = &'p Partition>) -> UnderWay {
        let mut state = self.state();
        for partition in partitions {
            state.owned.remove(partition);
        }
        UnderWay(state.next)
    }

    /// The same with all partitions.
    #[must_use]
    pub(super) fn clear(&self) -> UnderWay {
        let mut state = self.state();
        state.owned.clear();
        UnderWay(state.next)
    }

    /// Waits until these commits have ended, at most so long; whether they have.
    pub(super) fn have_ended(&self, UnderWay(before): UnderWay, within: Duration) -> bool {
        let goes_on = |state: &mut State| state.under_way.first().is_some_and(|first| *first < before);
        let waited = self.0.ended.wait_timeout_while(self.state(), within, goes_on);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    pub(super) fn epoch(&self, partition: &Partition) -> Option<Epoch> {
        self.state().owned.get(partition).map(|owned| owned.epoch)
    }

    /// Which of this process's members has the partition.
    pub(super) fn member(&self, partition: &Partition) -> Option<usize> {
        self.state().owned.get(partition).map(|owned| owned.member)
    }

    /// The partitions of a member whose topics have another id by now.
    pub(super) fn outdated(&self, member: usize, now: &TopicIds) -> Vec<Partition> {
        let is_other = |topic: &str, owned: &Owned| {
            owned.member == member && owned.id.zip(now.get(topic)).is_some_and(|(own, now)| own != *now)
        };
        let state = self.state();
        let outdated = state.owned.iter().filter(|(partition, owned)| is_other(&partition.topic, owned));
        outdated.map(|(partition, _)| partition.clone()).collect()
    }

    /// The topics of a member's partitions.
    pub(super) fn topics(&self, member: usize) -> BTreeSet<Arc<str>> {
        let state = self.state();
        let of_member = state.owned.iter().filter(|(_, owned)| owned.member == member);
        of_member.map(|(partition, _)| Arc::clone(&partition.topic)).collect()
    }

    /// Permission to commit for these partitions under these epochs, if all of them are still ours.
    pub(super) fn permit<'p>(&self, wanted: impl Iterator<Item = (&'p Partition, Epoch)>) -> Result<Permit, Partition> {
        let mut state = self.state();
        let mut owned = HashMap::new();
        for (partition, epoch) in wanted {
            let ours = state.owned.get(partition).filter(|owned| owned.epoch == epoch);
            owned.insert(partition.clone(), *ours.ok_or_else(|| partition.clone())?);
        }
        let number = state.next;
        state.next += 1;
        state.under_way.insert(number);
        Ok(Permit { number, owned, membership: self.clone() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.membership.state().under_way.remove(&self.number);
        self.membership.0.ended.notify_all();
    }
}

impl Permit {
    /// Which log of its topic a partition is, if the brokers say so.
    pub(super) fn id(&self, partition: &Partition) -> Option<TopicId> {
        self.owned.get(partition).and_then(|owned| owned.id)
    }

    /// These offsets by the member that has their partitions, each part with its consumer. `None` if the reader has
    /// ended.
    pub(super) fn by_member(&self, offsets: Offsets) -> Option<Vec<(Arc<BaseConsumer<Context>>, Offsets)>> {
        let mut parts: BTreeMap<usize, Offsets> = BTreeMap::new();
        for offset in offsets {
            parts.entry(self.owned.get(&offset.0)?.member).or_default().push(offset);
        }
        parts.into_iter().map(|(member, offsets)| Some((self.membership.consumer(member)?, offsets))).collect()
    }

    /// As [`Self::by_member`], with the generation that the broker is to check for each part.
    pub(super) fn generations(&self, offsets: Offsets) -> Option<Vec<(ConsumerGroupMetadata, Offsets)>> {
        let parts = self.by_member(offsets)?.into_iter();
        parts.map(|(consumer, offsets)| Some((consumer.group_metadata()?, offsets))).collect()
    }
}

impl fmt::Debug for Membership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Membership")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::ZERO;

    fn partition(number: i32) -> Partition {
        Partition { topic: "t".into(), number }
    }

    fn owner(numbers: &[i32]) -> (Membership, Epoch) {
        let membership = Membership::new();
        let epoch = membership.new_epoch();
        for number in numbers {
            membership.add(partition(*number), epoch, 0, None);
        }
        (membership, epoch)
    }

    #[test]
    fn a_partition_is_taken_from_new_commits_at_once_though_one_under_way_never_ends() {
        let (membership, epoch) = owner(&[0, 1]);
        let stuck = membership.permit([(&partition(0), epoch)].into_iter()).ok().unwrap();
        let under_way = membership.remove([&partition(0)]);
        assert_eq!(membership.epoch(&partition(0)), None);
        assert_eq!(membership.permit([(&partition(0), epoch)].into_iter()).err(), Some(partition(0)));
        // The stage is served meanwhile, and begins what it may.
        assert_eq!(membership.epoch(&partition(1)), Some(epoch));
        let later = membership.permit([(&partition(1), epoch)].into_iter()).ok().unwrap();
        assert!(!membership.have_ended(under_way, Duration::from_millis(1)));
        drop(stuck);
        assert!(membership.have_ended(under_way, NOW), "one that began later does not count");
        assert!(!membership.have_ended(membership.clear(), NOW));
        drop(later);
        assert!(membership.have_ended(membership.clear(), NOW));
    }

    #[test]
    fn who_takes_a_partition_away_waits_for_the_commit_under_way() {
        let (membership, epoch) = owner(&[0]);
        let permit = membership.permit([(&partition(0), epoch)].into_iter()).ok().unwrap();
        let under_way = membership.remove([&partition(0)]);
        let commit = std::thread::spawn(move || drop(permit));
        assert!(membership.have_ended(under_way, Duration::from_secs(60)));
        commit.join().unwrap();
    }

    #[test]
    fn a_commit_that_is_refused_holds_up_nobody() {
        let (membership, epoch) = owner(&[0]);
        let wanted = [(partition(0), epoch), (partition(1), epoch)];
        assert!(membership.permit(wanted.iter().map(|(partition, epoch)| (partition, *epoch))).is_err());
        assert!(membership.have_ended(membership.clear(), NOW));
    }
}
