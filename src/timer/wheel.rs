//! The timer wheel: delayed records in memory, ordered by due time. Pure.
//!
//! A record waits on the largest topic whose delay is not longer than the time that it has left; then it moves to a
//! shorter one, and for the last second it stays here. What is read ahead of a partition is bounded, so however much
//! waits, it waits on the topics.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use crate::{
    kafka::{Partition, outbox::Position},
    runtime::clock::Timestamp,
};

/// How many bytes are read ahead of a partition whose first record has still time: of each of dozens of partitions.
const READ_AHEAD: usize = 96 * 1024;

/// How long before the first record goes on a partition has to flow again: to fetch takes a while.
const FLOW_BEFORE: Duration = Duration::from_millis(500);

/// What a thing takes in memory.
pub trait Weight {
    /// About how many bytes; the same as long as it is held.
    fn bytes(&self) -> usize;
}

/// Something in memory, and the record that it stems from.
#[derive(Debug)]
pub struct Item<T> {
    /// The record.
    pub position: Position,
    /// What is to become of it.
    pub held: T,
}

/// One partition.
#[derive(Debug)]
struct Lane<T> {
    /// By the time at which it goes on; the second part keeps those of one millisecond apart.
    items: BTreeMap<(Timestamp, u64), Item<T>>,
    bytes: usize,
    paused: bool,
}

impl<T> Default for Lane<T> {
    fn default() -> Self {
        Self { items: BTreeMap::new(), bytes: 0, paused: false }
    }
}

impl<T> Lane<T> {
    fn first(&self) -> Option<Timestamp> {
        self.items.first_key_value().map(|((at, _), _)| *at)
    }
}

/// What is in memory of all partitions.
#[derive(Debug)]
pub struct Wheel<T> {
    lanes: HashMap<Partition, Lane<T>>,
    sequence: u64,
    bytes: usize,
    /// When so many bytes are held, partitions that hold more than their share flow no further.
    memory: usize,
}

impl<T: Weight> Wheel<T> {
    /// A wheel that holds about `memory` bytes, at most twice that.
    #[must_use]
    pub fn new(memory: usize) -> Self {
        Self { lanes: HashMap::new(), sequence: 0, bytes: 0, memory }
    }

    /// Keeps something until `at`.
    pub fn hold(&mut self, at: Timestamp, item: Item<T>) {
        let size = item.held.bytes();
        let lane = self.lanes.entry(item.position.partition.clone()).or_default();
        self.sequence += 1;
        self.bytes += size;
        lane.bytes += size;
        lane.items.insert((at, self.sequence), item);
    }

    /// Takes out one thing whose time has come.
    pub fn take(&mut self, now: Timestamp) -> Option<Item<T>> {
        let is_due = |lane: &&mut Lane<T>| lane.first().is_some_and(|at| at <= now);
        let lane = self.lanes.values_mut().filter(is_due).min_by_key(|lane| lane.first())?;
        let (_, item) = lane.items.pop_first()?;
        let size = item.held.bytes();
        lane.bytes -= size;
        self.bytes -= size;
        Some(item)
    }

    /// When the next thing goes on.
    #[must_use]
    pub fn next(&self) -> Option<Timestamp> {
        self.lanes.values().filter_map(Lane::first).min()
    }

    /// How many things are held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lanes.values().map(|lane| lane.items.len()).sum()
    }

    /// Whether nothing is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lanes.values().all(|lane| lane.items.is_empty())
    }

    /// The partitions whose flow has to change, and whether they are to flow.
    pub fn regulate(&mut self, now: Timestamp) -> Vec<(Partition, bool)> {
        let share = self.memory / self.lanes.len().max(1);
        let (bytes, memory) = (self.bytes, self.memory);
        let mut changes = Vec::new();
        for (partition, lane) in &mut self.lanes {
            let has_time = lane.first().is_some_and(|at| at > now.after(FLOW_BEFORE));
            // To stop and to go on are apart, since each stop throws away what the client has fetched ahead.
            let is_full = if lane.paused {
                (has_time && lane.bytes > READ_AHEAD / 2) || (bytes > memory / 4 * 3 && lane.bytes > share / 2)
            } else {
                (has_time && lane.bytes >= READ_AHEAD) || (bytes >= memory && lane.bytes >= share)
            };
            if is_full != lane.paused {
                lane.paused = is_full;
                changes.push((partition.clone(), !is_full));
            }
        }
        changes
    }

    /// Drops all that stems from these partitions; the records.
    pub fn forget(&mut self, partitions: &[Partition]) -> Vec<Position> {
        let lanes = partitions.iter().filter_map(|partition| self.lanes.remove(partition));
        let mut dropped = Vec::new();
        for lane in lanes {
            self.bytes -= lane.bytes;
            dropped.extend(lane.items.into_values().map(|item| item.position));
        }
        dropped
    }
}

/// When a record of a delay topic goes on: when it has been there for `delay`, but not after it is due.
///
/// It was put there by another machine's clock (`hopped_at`), and taken by the broker's (`appended_at`): the later
/// one counts, so that no clock that is behind makes it move on at once, over and over, and neither counts when it is
/// ahead of ours.
#[must_use]
pub fn goes_on_at(
    due_at: Timestamp,
    delay: Duration,
    appended_at: Timestamp,
    hopped_at: Option<Timestamp>,
    now: Timestamp,
) -> Timestamp {
    let since = hopped_at.map_or(appended_at, |hopped_at| hopped_at.max(appended_at)).min(now);
    since.after(delay).min(due_at)
}

/// Which of `delays` (ascending) is the largest not longer than what is `left`; `None`: less than all of them, so
/// the record waits in memory.
#[must_use]
pub fn tier(delays: &[Duration], left: Duration) -> Option<usize> {
    delays.iter().rposition(|delay| *delay <= left)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kafka::Epoch;

    const NOW: Timestamp = Timestamp::from_millis(1_700_000_000_000);

    fn partition(number: i32) -> Partition {
        Partition { topic: "t".into(), number }
    }

    /// Something of 1,100 bytes.
    #[derive(Debug)]
    struct Thing;

    impl Weight for Thing {
        fn bytes(&self) -> usize {
            1_100
        }
    }

    fn item(number: i32, offset: i64) -> Item<Thing> {
        Item { position: Position { partition: partition(number), epoch: Epoch(1), offset }, held: Thing }
    }

    fn millis(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// Fills a partition as a log would as long as it flows; how many bytes that makes.
    fn fill(wheel: &mut Wheel<Thing>, partitions: i32, at: Timestamp) -> usize {
        let mut flowing: Vec<_> = (0..partitions).collect();
        for offset in 0..20_000 {
            for &number in &flowing {
                wheel.hold(at, item(number, offset));
            }
            for (partition, flows) in wheel.regulate(NOW) {
                assert!(!flows);
                flowing.retain(|number| *number != partition.number);
            }
        }
        wheel.bytes
    }

    #[test]
    fn of_each_partition_no_more_is_read_ahead_than_is_soon_due() {
        let mut wheel = Wheel::new(100 << 20);
        let held = fill(&mut wheel, 4, NOW.after(millis(501)));
        assert!((4 * READ_AHEAD..4 * READ_AHEAD + 8_000).contains(&held), "{held}");
        assert_eq!(wheel.regulate(NOW.after(millis(1))).len(), 4, "they flow again before they are due");
    }

    #[test]
    fn however_much_is_due_memory_is_bounded() {
        for partitions in [1, 3, 40] {
            let mut wheel = Wheel::new(4 << 20);
            let held = fill(&mut wheel, partitions, NOW);
            assert!((4 << 20..9 << 20).contains(&held), "{held} bytes of {partitions} partitions");
            while wheel.take(NOW).is_some() {}
            assert_eq!((wheel.bytes, wheel.len()), (0, 0));
            assert!(wheel.regulate(NOW).iter().all(|(_, flows)| *flows), "all flow again");
        }
    }

    #[test]
    fn what_stems_from_a_partition_that_leaves_is_dropped_with_its_bytes() {
        let mut wheel = Wheel::new(1 << 20);
        for offset in 0..10 {
            wheel.hold(NOW, item(i32::from(offset % 2 == 1), offset));
        }
        let dropped = wheel.forget(&[partition(1), partition(7)]);
        assert_eq!(dropped.iter().map(|position| position.offset).collect::<Vec<_>>(), [1, 3, 5, 7, 9]);
        assert_eq!(wheel.len(), 5);
        while wheel.take(NOW).is_some() {}
        assert_eq!(wheel.bytes, 0);
    }

    #[test]
    fn clocks_that_are_wrong_neither_hurry_a_record_nor_hold_it_back() {
        let at = |appended: i64, hopped: Option<i64>| {
            let time = |by: i64| Timestamp::from_millis(NOW.as_millis() + by);
            goes_on_at(time(60_000), millis(4_000), time(appended), hopped.map(time), NOW).as_millis() - NOW.as_millis()
        };
        assert_eq!(at(-1_000, Some(-1_010)), 3_000);
        assert_eq!(at(-1_000, None), 3_000);
        assert_eq!(at(-3_600_000, Some(-10)), 3_990, "the brokers' clock is an hour behind");
        assert_eq!(at(3_600_000, Some(-10)), 4_000, "or ahead");
        assert_eq!(at(-10, Some(3_600_000)), 4_000, "the other machine's is ahead");
        assert_eq!(goes_on_at(NOW.after(millis(100)), millis(4_000), NOW, None, NOW), NOW.after(millis(100)));
    }

    proptest! {
        #[test]
        fn hops_come_to_an_end_in_less_than_the_smallest_delay(left_ms in 0_u64..200_000_000) {
            let delays: Vec<_> = [1_u64, 4, 16, 64, 256, 1_024, 4_096, 16_384, 65_536].map(Duration::from_secs).into();
            let (mut left, mut hops) = (millis(left_ms), 0);
            while let Some(tier) = tier(&delays, left) {
                left -= delays[tier];
                hops += 1;
            }
            prop_assert!(left < Duration::from_secs(1));
            // Three in each of the nine.
            prop_assert!(hops <= 27, "{hops}");
        }
    }
}
