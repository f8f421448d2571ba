//! Which partitions are ours, shared by the thread that reads and the thread that commits.
//!
//! The broker refuses the offsets of a member whose generation is over, but with *fresh* group metadata it
//! accepts offsets for partitions that the member does not own (measured, see the design notes). So a commit
//! holds a [`Permit`] from the check of its epochs to its end, and a rebalance takes a partition away only
//! when no commit holds one.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, Weak},
};

use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerGroupMetadata};

use super::{Epoch, Partition, reader::Context};

/// Our place in a consumer group. Opaque to stages; cheap to clone.
#[derive(Clone)]
pub struct Membership(Arc<Inner>);

struct Inner {
    owned: RwLock<HashMap<Partition, Epoch>>,
    consumer: OnceLock<Weak<BaseConsumer<Context>>>,
}

/// Permission to commit, for as long as it lives: meanwhile no partition is taken away.
pub(super) struct Permit<'a> {
    _owned: RwLockReadGuard<'a, HashMap<Partition, Epoch>>,
    consumer: &'a OnceLock<Weak<BaseConsumer<Context>>>,
}

impl Membership {
    pub(super) fn new() -> Self {
        Self(Arc::new(Inner { owned: RwLock::new(HashMap::new()), consumer: OnceLock::new() }))
    }

    /// The consumer whose membership it is; weak, so that it ends on its own thread.
    pub(super) fn belongs_to(&self, consumer: &Arc<BaseConsumer<Context>>) {
        let _ = self.0.consumer.set(Arc::downgrade(consumer));
    }

    pub(super) fn add(&self, partition: Partition, epoch: Epoch) {
        self.0.owned.write().unwrap_or_else(PoisonError::into_inner).insert(partition, epoch);
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
        self.0.owned.read().unwrap_or_else(PoisonError::into_inner).get(partition).copied()
    }

    /// Permission to commit for these partitions under these epochs, if all of them are still ours.
    pub(super) fn permit<'p>(
        &self,
        mut wanted: impl Iterator<Item = (&'p Partition, Epoch)>,
    ) -> Result<Permit<'_>, Partition> {
        let owned = self.0.owned.read().unwrap_or_else(PoisonError::into_inner);
        match wanted.find(|(partition, epoch)| owned.get(*partition) != Some(epoch)) {
            Some((partition, _)) => Err(partition.clone()),
            None => Ok(Permit { _owned: owned, consumer: &self.0.consumer }),
        }
    }
}

impl Permit<'_> {
    /// The generation that the broker is to check; `None` if the reader has ended.
    pub(super) fn group_metadata(&self) -> Option<ConsumerGroupMetadata> {
        self.consumer.get()?.upgrade()?.group_metadata()
    }
}

impl fmt::Debug for Membership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Membership")
    }
}
