//! Requests that wait for their slot: one queue per partition, served in turn. Pure.

use std::collections::{HashMap, VecDeque};

use crate::kafka::Partition;

/// Queues by partition. Taking turns means that no partition waits for another, and one whose window is full
/// holds nobody back.
#[derive(Debug)]
pub(super) struct Backlog<T> {
    queues: HashMap<Partition, VecDeque<T>>,
    /// Partitions with something in their queue, the next one first.
    turns: VecDeque<Partition>,
    len: usize,
}

impl<T> Default for Backlog<T> {
    fn default() -> Self {
        Self { queues: HashMap::new(), turns: VecDeque::new(), len: 0 }
    }
}

impl<T> Backlog<T> {
    /// Adds an item behind the others of its partition.
    pub(super) fn push(&mut self, partition: &Partition, item: T) {
        self.queue(partition).push_back(item);
        self.len += 1;
    }

    /// The queue that is about to get an item, and a turn if it had none.
    fn queue(&mut self, partition: &Partition) -> &mut VecDeque<T> {
        if self.waiting_in(partition) == 0 {
            self.turns.push_back(partition.clone());
        }
        self.queues.entry(partition.clone()).or_default()
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.len
    }

    #[cfg(test)]
    fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn waiting_in(&self, partition: &Partition) -> usize {
        self.queues.get(partition).map_or(0, VecDeque::len)
    }

    /// Whether the first item of any queue may start.
    #[cfg(test)]
    fn can_start(&self, may_start: impl Fn(&T) -> bool) -> bool {
        self.turns.iter().filter_map(|partition| self.queues.get(partition)?.front()).any(may_start)
    }

    /// The first item, of the next partition in turn, that may start.
    pub(super) fn pop(&mut self, may_start: impl Fn(&T) -> bool) -> Option<T> {
        for _ in 0..self.turns.len() {
            let partition = self.turns.pop_front()?;
            let queue = self.queues.get_mut(&partition)?;
            let item = if queue.front().is_some_and(&may_start) { queue.pop_front() } else { None };
            if !queue.is_empty() {
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
    pub(super) fn remove(&mut self, partition: &Partition) -> VecDeque<T> {
        self.turns.retain(|turn| turn != partition);
        let items = self.queues.remove(partition).unwrap_or_default();
        self.len -= items.len();
        items
    }

    pub(super) fn clear(&mut self) -> Vec<T> {
        self.turns.clear();
        self.len = 0;
        self.queues.drain().flat_map(|(_, queue)| queue).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn a_removed_partition_takes_its_items_along() {
        let mut backlog = filled();
        assert_eq!(backlog.remove(&partition(0)).len(), 3);
        assert_eq!(backlog.len(), 3);
        assert_eq!(backlog.pop(|_| true), Some((1, 0)));
    }
}
