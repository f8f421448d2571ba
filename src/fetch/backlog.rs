//! What waits for its partition's window: one queue per partition in the order of offsets, served in turn. Pure.

use std::{
    collections::{BTreeMap, HashMap, VecDeque, btree_map::OccupiedEntry},
    hash::{DefaultHasher, Hash, Hasher as _},
};

use crate::kafka::Partition;

/// Something with a place in its partition.
pub(super) trait Placed {
    fn offset(&self) -> i64;

    /// About how many bytes it will take.
    fn bytes(&self) -> usize {
        0
    }
}

/// Something that a call can be made for, with others of its group.
pub(super) trait Waits: Placed {
    /// What has to be the same in one call.
    type Group: Clone + Eq + Hash + std::fmt::Debug;
    fn group(&self) -> &Self::Group;
    /// What is asked for in it.
    fn item(&self) -> &str;
    fn partition(&self) -> &Partition;
}

/// The same for requests that ask for the same; two others may share one.
pub(super) fn fingerprint<T: Waits>(item: &T) -> u64 {
    let mut hasher = DefaultHasher::new();
    (item.group(), item.item()).hash(&mut hasher);
    hasher.finish()
}

/// Queues by partition, the lowest offset first: what comes late may be the very one that the window waits for, and what
/// came before it may be beyond the window's end. Taking turns means that no partition waits for another, and one whose
/// window is full holds nobody back.
#[derive(Debug)]
pub(super) struct Backlog<T> {
    queues: HashMap<Partition, BTreeMap<i64, T>>,
    /// Partitions with something in their queue, the next one first.
    turns: VecDeque<Partition>,
    /// [`Placed::bytes`] of what waits, by partition.
    bytes: HashMap<Partition, usize>,
    len: usize,
}

impl<T> Default for Backlog<T> {
    fn default() -> Self {
        Self { queues: HashMap::new(), turns: VecDeque::new(), bytes: HashMap::new(), len: 0 }
    }
}

impl<T: Placed> Backlog<T> {
    /// Adds an item at its place among the others of its partition.
    pub(super) fn push(&mut self, partition: &Partition, item: T) {
        *self.bytes.entry(partition.clone()).or_default() += item.bytes();
        match self.queue(partition).insert(item.offset(), item) {
            Some(replaced) => self.free(partition, replaced.bytes()),
            None => self.len += 1,
        }
    }

    fn free(&mut self, partition: &Partition, bytes: usize) {
        if let Some(held) = self.bytes.get_mut(partition) {
            *held = held.saturating_sub(bytes);
        }
    }

    /// About how many bytes wait in a partition.
    pub(super) fn bytes_in(&self, partition: &Partition) -> usize {
        self.bytes.get(partition).copied().unwrap_or_default()
    }

    /// All that waits.
    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.queues.values().flat_map(BTreeMap::values)
    }

    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        self.bytes.values().sum()
    }

    /// The queue that is about to get an item, and a turn if it had none.
    fn queue(&mut self, partition: &Partition) -> &mut BTreeMap<i64, T> {
        if self.waiting_in(partition) == 0 {
            self.turns.push_back(partition.clone());
        }
        self.queues.entry(partition.clone()).or_default()
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn waiting_in(&self, partition: &Partition) -> usize {
        self.queues.get(partition).map_or(0, BTreeMap::len)
    }

    /// Whether the first item of any queue may start.
    #[cfg(test)]
    fn can_start(&self, may_start: impl Fn(&T) -> bool) -> bool {
        self.turns.iter().filter_map(|partition| self.queues.get(partition)?.values().next()).any(may_start)
    }

    /// The first item, of the next partition in turn, that may start.
    pub(super) fn pop(&mut self, may_start: impl Fn(&T) -> bool) -> Option<T> {
        for _ in 0..self.turns.len() {
            let partition = self.turns.pop_front()?;
            let queue = self.queues.get_mut(&partition)?;
            let item = queue.first_entry().filter(|first| may_start(first.get())).map(OccupiedEntry::remove);
            let freed = item.as_ref().map_or(0, Placed::bytes);
            self.free(&partition, freed);
            if self.waiting_in(&partition) > 0 {
                self.turns.push_back(partition);
            }
            if item.is_some() {
                self.len -= 1;
                return item;
            }
        }
        None
    }

    /// Takes a partition out, with all that waits in it.
    pub(super) fn remove(&mut self, partition: &Partition) -> Vec<T> {
        self.turns.retain(|turn| turn != partition);
        self.bytes.remove(partition);
        let items = self.queues.remove(partition).unwrap_or_default();
        self.len -= items.len();
        items.into_values().collect()
    }

    pub(super) fn clear(&mut self) -> Vec<T> {
        self.turns.clear();
        self.bytes.clear();
        self.len = 0;
        self.queues.drain().flat_map(|(_, queue)| queue.into_values()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Placed for (i32, i32) {
        fn offset(&self) -> i64 {
            self.1.into()
        }
    }

    fn partition(number: i32) -> Partition {
        Partition { topic: "t".into(), number }
    }

    fn filled() -> Backlog<(i32, i32)> {
        let mut backlog = Backlog::default();
        for item in 0..3 {
            (0..2).for_each(|number| backlog.push(&partition(number), (number, item)));
        }
        backlog
    }

    #[test]
    fn partitions_take_turns_and_each_keeps_its_order() {
        let mut backlog = filled();
        let order: Vec<_> = std::iter::from_fn(|| backlog.pop(|_| true)).collect();
        assert_eq!(order, [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]);
        assert!(backlog.is_empty());
    }

    #[test]
    fn a_partition_that_may_not_start_holds_nobody_back() {
        let mut backlog = filled();
        let order: Vec<_> = std::iter::from_fn(|| backlog.pop(|(number, _)| *number == 1)).collect();
        assert_eq!(order, [(1, 0), (1, 1), (1, 2)]);
        assert!(!backlog.can_start(|(number, _)| *number == 1));
        assert_eq!((backlog.len(), backlog.waiting_in(&partition(0))), (3, 3));
    }

    #[test]
    fn what_comes_late_but_stands_first_is_not_held_up_by_what_is_beyond_the_window() {
        let mut backlog = Backlog::default();
        for offset in [9, 3, 8, 2] {
            backlog.push(&partition(0), (0, offset));
        }
        let within: Vec<_> = std::iter::from_fn(|| backlog.pop(|(_, offset)| *offset < 5)).collect();
        assert_eq!((within, backlog.len()), (vec![(0, 2), (0, 3)], 2));
    }

    #[test]
    fn a_removed_partition_takes_its_items_along() {
        let mut backlog = filled();
        assert_eq!(backlog.remove(&partition(0)).len(), 3);
        assert_eq!(backlog.len(), 3);
        assert_eq!(backlog.pop(|_| true), Some((1, 0)));
    }
}
