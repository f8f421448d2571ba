//! What waits in one lane for a call, found by what can travel together. Pure.
//!
//! Each partition has its requests in the order of their offsets, and partitions take turns, so none waits for another
//! and one whose window is full holds nobody back. Beside that each knows which of its requests have the same
//! parameters, and the whole knows which ask for the very same: so filling a call looks at no request that does not go
//! along.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use crate::{
    fetch::backlog::{Waits, fingerprint},
    kafka::Partition,
};

/// The requests that wait.
#[derive(Debug)]
pub(super) struct Grouped<T: Waits> {
    queues: HashMap<Partition, Queue<T>>,
    /// Partitions with something in their queue, the next one first.
    turns: VecDeque<Partition>,
    /// How many there are of each group.
    sizes: HashMap<T::Group, usize>,
    /// Where requests stand that ask for the same, by a hash of group and item.
    alike: HashMap<u64, BTreeSet<(Partition, i64)>>,
    len: usize,
}

#[derive(Debug)]
struct Queue<T: Waits> {
    items: BTreeMap<i64, T>,
    groups: HashMap<T::Group, BTreeSet<i64>>,
}

impl<T: Waits> Default for Grouped<T> {
    fn default() -> Self {
        let (queues, turns, sizes, alike) = (HashMap::new(), VecDeque::new(), HashMap::new(), HashMap::new());
        Self { queues, turns, sizes, alike, len: 0 }
    }
}

impl<T: Waits> Grouped<T> {
    /// Adds a request; one that was taken out before comes back to its place.
    pub(super) fn push(&mut self, item: T) {
        let (partition, offset) = (item.partition().clone(), item.offset());
        let queue = self.queues.entry(partition.clone()).or_insert_with(|| {
            self.turns.push_back(partition.clone());
            Queue { items: BTreeMap::new(), groups: HashMap::new() }
        });
        self.alike.entry(fingerprint(&item)).or_default().insert((partition, offset));
        *self.sizes.entry(item.group().clone()).or_default() += 1;
        queue.groups.entry(item.group().clone()).or_default().insert(offset);
        queue.items.insert(offset, item);
        self.len += 1;
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn waiting_in(&self, partition: &Partition) -> usize {
        self.queues.get(partition).map_or(0, |queue| queue.items.len())
    }

    /// How many there are of a group.
    pub(super) fn size(&self, group: &T::Group) -> usize {
        self.sizes.get(group).copied().unwrap_or_default()
    }

    /// How many calls they need, if so many go into one.
    pub(super) fn calls(&self, most: usize) -> usize {
        if most <= 1 { self.len } else { self.len.div_ceil(most) + self.sizes.len().saturating_sub(1) }
    }

    /// The first of each partition, in turn.
    pub(super) fn heads(&self) -> impl Iterator<Item = &T> {
        self.turns.iter().filter_map(|partition| self.queues.get(partition)?.items.values().next())
    }

    /// The first of the next partition in turn that may be taken.
    pub(super) fn pop(&mut self, may: impl Fn(&T) -> bool) -> Option<T> {
        let found = self.heads().find(|item| may(item));
        let (partition, offset) = found.map(|item| (item.partition().clone(), item.offset()))?;
        // Its turn is over.
        if let Some(turn) = self.turns.iter().position(|turn| *turn == partition) {
            self.turns.rotate_left(turn + 1);
        }
        self.take(&partition, offset)
    }

    fn find_least(&self, rank: impl Fn(&T) -> u32, may: impl Fn(&T) -> bool) -> Option<(u32, &T)> {
        let queues = self.turns.iter().filter_map(|partition| self.queues.get(partition));
        let mut least: Option<(u32, &T)> = None;
        for item in queues.flat_map(|queue| queue.items.values()).filter(|item| may(item)) {
            let rank = rank(item);
            if least.is_none_or(|(lowest, _)| rank < lowest) {
                least = Some((rank, item));
            }
            if rank == 0 {
                break;
            }
        }
        least
    }

    /// The lowest rank of all that may be taken, also of those that others stand before. Looks at each of them.
    pub(super) fn least(&self, rank: impl Fn(&T) -> u32, may: impl Fn(&T) -> bool) -> Option<u32> {
        self.find_least(rank, may).map(|(rank, _)| rank)
    }

    /// The first of the lowest rank.
    pub(super) fn pop_least(&mut self, rank: impl Fn(&T) -> u32, may: impl Fn(&T) -> bool) -> Option<T> {
        let (_, item) = self.find_least(rank, may)?;
        let (partition, offset) = (item.partition().clone(), item.offset());
        self.take(&partition, offset)
    }

    /// The first of this group that may be taken, of the next partition in turn that has one.
    pub(super) fn pop_of(&mut self, group: &T::Group, may: impl Fn(&T) -> bool) -> Option<T> {
        if self.size(group) == 0 {
            return None;
        }
        let first = |partition: &Partition| {
            let queue = self.queues.get(partition)?;
            let item = queue.items.get(queue.groups.get(group)?.first()?)?;
            may(item).then(|| (partition.clone(), item.offset()))
        };
        let (partition, offset) = self.turns.iter().find_map(first)?;
        self.take(&partition, offset)
    }

    /// Takes out those that ask for the same as `other`, up to so many.
    pub(super) fn pop_alike(&mut self, other: &T, most: usize, may: impl Fn(&T) -> bool) -> Vec<T> {
        let Some(places) = self.alike.get(&fingerprint(other)) else { return Vec::new() };
        let is_alike = |(partition, offset): &&(Partition, i64)| {
            let item = self.queues.get(partition).and_then(|queue| queue.items.get(offset));
            item.is_some_and(|item| item.group() == other.group() && item.item() == other.item() && may(item))
        };
        let places: Vec<_> = places.iter().filter(is_alike).take(most).cloned().collect();
        places.iter().filter_map(|(partition, offset)| self.take(partition, *offset)).collect()
    }

    fn take(&mut self, partition: &Partition, offset: i64) -> Option<T> {
        let queue = self.queues.get_mut(partition)?;
        let item = queue.items.remove(&offset)?;
        if let Some(offsets) = queue.groups.get_mut(item.group()) {
            offsets.remove(&offset);
            if offsets.is_empty() {
                queue.groups.remove(item.group());
            }
        }
        if queue.items.is_empty() {
            self.queues.remove(partition);
            self.turns.retain(|turn| turn != partition);
        }
        self.forget(&item);
        Some(item)
    }

    /// Counts a request no more that is out of its queue.
    fn forget(&mut self, item: &T) {
        self.len -= 1;
        if let Some(size) = self.sizes.get_mut(item.group()) {
            *size -= 1;
            if *size == 0 {
                self.sizes.remove(item.group());
            }
        }
        let print = fingerprint(item);
        if let Some(places) = self.alike.get_mut(&print) {
            places.remove(&(item.partition().clone(), item.offset()));
            if places.is_empty() {
                self.alike.remove(&print);
            }
        }
    }

    /// Takes a partition out, with all that waits in it.
    pub(super) fn remove(&mut self, partition: &Partition) -> Vec<T> {
        self.turns.retain(|turn| turn != partition);
        let items: Vec<T> =
            self.queues.remove(partition).map_or_else(Vec::new, |queue| queue.items.into_values().collect());
        for item in &items {
            self.forget(item);
        }
        items
    }

    pub(super) fn clear(&mut self) -> Vec<T> {
        let cleared = std::mem::take(self);
        cleared.queues.into_values().flat_map(|queue| queue.items.into_values()).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fetch::backlog::Placed;

    #[derive(Clone, Debug, PartialEq)]
    struct Ask {
        partition: Partition,
        offset: i64,
        group: u8,
        item: String,
    }

    impl Waits for Ask {
        type Group = u8;
        fn group(&self) -> &u8 {
            &self.group
        }
        fn item(&self) -> &str {
            &self.item
        }
        fn partition(&self) -> &Partition {
            &self.partition
        }
    }

    impl Placed for Ask {
        fn offset(&self) -> i64 {
            self.offset
        }
    }

    fn partition(number: i32) -> Partition {
        Partition { topic: "t".into(), number }
    }

    fn ask(number: i32, offset: i64, group: u8, item: u8) -> Ask {
        Ask { partition: partition(number), offset, group, item: item.to_string() }
    }

    #[test]
    fn partitions_take_turns_and_each_keeps_its_order_also_for_what_comes_back() {
        let mut waiting = Grouped::default();
        for offset in 0..3 {
            (0..2).for_each(|number| waiting.push(ask(number, offset, 0, 0)));
        }
        let first = waiting.pop(|_| true).unwrap();
        assert_eq!((first.partition.number, first.offset), (0, 0));
        waiting.push(first);
        let order: Vec<_> =
            std::iter::from_fn(|| waiting.pop(|_| true)).map(|a| (a.partition.number, a.offset)).collect();
        assert_eq!(order, [(1, 0), (0, 0), (1, 1), (0, 1), (1, 2), (0, 2)]);
        assert_eq!((waiting.len(), waiting.size(&0)), (0, 0));
    }

    #[test]
    fn a_partition_whose_window_is_full_holds_nobody_back() {
        let mut waiting = Grouped::default();
        (0..4).for_each(|place| waiting.push(ask(place % 2, i64::from(place), 0, 0)));
        let order: Vec<_> = std::iter::from_fn(|| waiting.pop(|ask| ask.partition.number == 1)).collect();
        assert_eq!(order.len(), 2);
        assert_eq!((waiting.len(), waiting.waiting_in(&partition(0))), (2, 2));
    }

    #[test]
    fn what_goes_along_is_found_behind_others_and_what_is_alike_in_any_partition() {
        let mut waiting = Grouped::default();
        for offset in 0..100 {
            waiting.push(ask(0, offset, u8::try_from(offset % 10).unwrap(), 7));
            waiting.push(ask(1, offset, u8::try_from(offset % 10).unwrap(), 8));
        }
        let least = waiting.pop_least(|ask| u32::from(ask.group != 6) + u32::from(ask.item != "8"), |_| true).unwrap();
        assert_eq!((least.partition.number, least.offset), (1, 6), "the first of its kind, behind others");
        assert_eq!(waiting.least(|ask| u32::from(ask.group), |ask| ask.offset % 10 > 3), Some(4));
        waiting.push(least);
        let of_three: Vec<_> = std::iter::from_fn(|| waiting.pop_of(&3, |_| true)).collect();
        assert!(of_three.len() == 20 && of_three.iter().all(|ask| ask.group == 3));
        let alike = waiting.pop_alike(&ask(9, 9, 4, 7), 6, |_| true);
        assert!(alike.len() == 6 && alike.iter().all(|ask| ask.group == 4 && ask.item == "7"));
        assert_eq!(waiting.pop_alike(&ask(9, 9, 4, 7), 6, |_| true).len(), 4);
        assert_eq!((waiting.len(), waiting.calls(40), waiting.calls(1)), (170, 13, 170));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Push(i32, u8, u8),
        Pop,
        PopOf(u8),
        PopAlike(u8, u8, usize),
        Return(prop::sample::Index),
        Remove(i32),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0..3i32, 0..4u8, 0..4u8).prop_map(|(number, group, item)| Step::Push(number, group, item)),
            2 => Just(Step::Pop),
            3 => (0..4u8).prop_map(Step::PopOf),
            2 => (0..4u8, 0..4u8, 0..5usize).prop_map(|(group, item, most)| Step::PopAlike(group, item, most)),
            2 => any::<prop::sample::Index>().prop_map(Step::Return),
            1 => (0..3i32).prop_map(Step::Remove),
        ]
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_given_twice_and_all_counts_agree(steps in prop::collection::vec(step(), 0..300)) {
            let (mut waiting, mut model, mut out) = (Grouped::default(), Vec::<Ask>::new(), Vec::<Ask>::new());
            for (offset, step) in (0..).zip(steps) {
                let taken = match step {
                    Step::Push(number, group, item) => {
                        let ask = ask(number, offset, group, item);
                        model.push(ask.clone());
                        waiting.push(ask);
                        vec![]
                    }
                    Step::Pop => waiting.pop(|_| true).into_iter().collect(),
                    Step::PopOf(group) => {
                        let popped = waiting.pop_of(&group, |_| true);
                        prop_assert_eq!(popped.is_some(), model.iter().any(|ask| ask.group == group));
                        popped.into_iter().collect()
                    }
                    Step::PopAlike(group, item, most) => {
                        let other = ask(0, -1, group, item);
                        let there = model.iter().filter(|ask| ask.group == group && ask.item == other.item).count();
                        let popped = waiting.pop_alike(&other, most, |_| true);
                        prop_assert_eq!(popped.len(), there.min(most));
                        popped
                    }
                    Step::Return(index) if !out.is_empty() => {
                        let ask = out.swap_remove(index.index(out.len()));
                        model.push(ask.clone());
                        waiting.push(ask);
                        vec![]
                    }
                    Step::Return(_) => vec![],
                    Step::Remove(number) => waiting.remove(&partition(number)),
                };
                for ask in taken {
                    let place = model.iter().position(|known| *known == ask);
                    prop_assert!(place.is_some(), "given twice: {:?}", ask);
                    model.swap_remove(place.unwrap());
                    out.push(ask);
                }
                prop_assert_eq!(waiting.len(), model.len());
                for group in 0..4 {
                    prop_assert_eq!(waiting.size(&group), model.iter().filter(|ask| ask.group == group).count());
                }
                for number in 0..3 {
                    let there = model.iter().filter(|ask| ask.partition.number == number).map(|ask| ask.offset).min();
                    let head = waiting.heads().find(|ask| ask.partition.number == number).map(|ask| ask.offset);
                    prop_assert_eq!(head, there, "the first of partition {}", number);
                }
            }
            prop_assert_eq!(waiting.clear().len(), model.len());
            prop_assert!(waiting.alike.is_empty() && waiting.sizes.is_empty() && waiting.turns.is_empty());
        }
    }
}
