//! Which partitions are ours, shared by the thread that reads and the thread that commits.
//!
//! The broker refuses the offsets of a member whose generation is over, but with *fresh* group metadata it
//! accepts offsets for partitions that the member does not own (measured, see the design notes). So a commit
//! holds a [`Permit`] from the check of its epochs to its end, and a rebalance takes a partition away only
//! when no commit holds one.
//!
//! One process can be several members of the group, one for each set of topics (see [`super::GroupConfig`]): then a
//! commit is checked against the generation of each member whose partitions it is about.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    sync::{
        Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerGroupMetadata};

use super::{
    Epoch, Offsets, Partition,
    reader::Context,
    topic_ids::{TopicId, TopicIds},
};

/// Our place in a consumer group. Opaque to stages; cheap to clone.
#[derive(Clone)]
pub struct Membership(Arc<Inner>);

struct Inner {
    owned: RwLock<HashMap<Partition, Owned>>,
    consumers: OnceLock<Vec<Weak<BaseConsumer<Context>>>>,
    epochs: AtomicU64,
}

#[derive(Clone, Copy)]
struct Owned {
    epoch: Epoch,
    /// Which of this process's members has it.
    member: usize,
    /// Which log of its topic it is, if the brokers say so.
    id: Option<TopicId>,
}

/// Permission to commit, for as long as it lives: meanwhile no partition is taken away.
pub(super) struct Permit<'a> {
    owned: RwLockReadGuard<'a, HashMap<Partition, Owned>>,
    membership: &'a Membership,
}

impl Membership {
    pub(super) fn new() -> Self {
        let (owned, consumers) = (RwLock::new(HashMap::new()), OnceLock::new());
        Self(Arc::new(Inner { owned, consumers, epochs: AtomicU64::new(0) }))
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
        let mut owned = self.0.owned.write().unwrap_or_else(PoisonError::into_inner);
        owned.insert(partition, Owned { epoch, member, id });
    }

    /// Takes partitions away; waits until no commit is under way.
    pub(super) fn remove<'p>(&self, partitions: impl IntoIterator<Item = &'p Partition>) {
        let mut owned = self.0.owned.write().unwrap_or_else(PoisonError::into_inner);
        for partition in partitions {
            owned.remove(partition);
        }
    }

    /// Takes all partitions away; waits until no commit is under way.
    pub(super) fn clear(&self) {
        self.0.owned.write().unwrap_or_else(PoisonError::into_inner).clear();
    }

    pub(super) fn epoch(&self, partition: &Partition) -> Option<Epoch> {
        self.read().get(partition).map(|owned| owned.epoch)
    }

    /// Which of this process's members has the partition.
    pub(super) fn member(&self, partition: &Partition) -> Option<usize> {
        self.read().get(partition).map(|owned| owned.member)
    }

    /// The partitions of a member whose topics have another id by now.
    pub(super) fn outdated(&self, member: usize, now: &TopicIds) -> Vec<Partition> {
        let is_other = |topic: &str, owned: &Owned| {
            owned.member == member && owned.id.zip(now.get(topic)).is_some_and(|(own, now)| own != *now)
        };
        let owned = self.read();
        let outdated = owned.iter().filter(|(partition, owned)| is_other(&partition.topic, owned));
        outdated.map(|(partition, _)| partition.clone()).collect()
    }

    /// The topics of a member's partitions.
    pub(super) fn topics(&self, member: usize) -> BTreeSet<Arc<str>> {
        let owned = self.read();
        let of_member = owned.iter().filter(|(_, owned)| owned.member == member);
        of_member.map(|(partition, _)| Arc::clone(&partition.topic)).collect()
    }

    /// Permission to commit for these partitions under these epochs, if all of them are still ours.
    pub(super) fn permit<'p>(
        &self,
        mut wanted: impl Iterator<Item = (&'p Partition, Epoch)>,
    ) -> Result<Permit<'_>, Partition> {
        let owned = self.read();
        match wanted.find(|(partition, epoch)| owned.get(*partition).is_none_or(|owned| owned.epoch != *epoch)) {
            Some((partition, _)) => Err(partition.clone()),
            None => Ok(Permit { owned, membership: self }),
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, HashMap<Partition, Owned>> {
        self.0.owned.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Permit<'_> {
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
