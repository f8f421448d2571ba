//! Cuts the records of a partition into blocks: contiguous offset ranges, each of which becomes one insert.

use std::{collections::VecDeque, mem, time::Duration};

use tokio::time::Instant;

use crate::{
    kafka::{Partition, Record},
    runtime::clock::Timestamp,
};

/// What a record weighs in memory beside its bytes: the struct, its headers' names, the row made of it.
const OVERHEAD: usize = 256;

/// When a block is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Records, at most.
    pub rows: usize,
    /// Bytes in memory, at most; one record that is larger is a block of its own.
    pub bytes: usize,
    /// Age since its first record came.
    pub age: Duration,
}

/// Records of one partition that are inserted together, under one token.
#[derive(Clone, Debug)]
pub struct Block {
    /// Where they come from.
    pub partition: Partition,
    /// In order of their offsets; never empty. Offsets that are missing in between never were records: Kafka puts
    /// the marks of transactions there.
    pub records: Vec<Record>,
    /// What they weigh in memory.
    pub bytes: usize,
    month: u32,
    opened: Instant,
}

impl Block {
    /// The offset of its first record.
    #[must_use]
    pub fn first(&self) -> i64 {
        self.records.first().map_or(0, |record| record.offset)
    }

    /// The offset of its last record.
    #[must_use]
    pub fn last(&self) -> i64 {
        self.records.last().map_or(0, |record| record.offset)
    }

    /// What ClickHouse recognises a repeated insert by: the same for the same range of the same partition.
    #[must_use]
    pub fn token(&self) -> String {
        format!("{}:{}:{}-{}", self.partition.topic, self.partition.number, self.first(), self.last())
    }

    /// When its first record came.
    #[must_use]
    pub fn opened(&self) -> Instant {
        self.opened
    }

    fn takes(&self, record: &Record, limits: &Limits) -> bool {
        self.records.len() < limits.rows
            && self.bytes.saturating_add(weight(record)) <= limits.bytes
            // ClickHouse recognises a repetition within one partition of the table, and these are months.
            && self.month == month(record.time)
    }

    fn is_full(&self, limits: &Limits) -> bool {
        self.records.len() >= limits.rows || self.bytes >= limits.bytes
    }
}

/// The records of one partition on their way into blocks.
#[derive(Debug)]
pub struct Blocks {
    partition: Partition,
    limits: Limits,
    sealed: VecDeque<Block>,
    open: Option<Block>,
    last: Option<i64>,
    bytes: usize,
}

impl Blocks {
    /// Nothing yet.
    #[must_use]
    pub fn new(partition: Partition, limits: Limits) -> Self {
        Self { partition, limits, sealed: VecDeque::new(), open: None, last: None, bytes: 0 }
    }

    /// Adds the next record. One that is not beyond the last one is dropped: it is in a block already.
    pub fn push(&mut self, record: Record, now: Instant) {
        if self.last.is_some_and(|last| record.offset <= last) {
            return;
        }
        self.last = Some(record.offset);
        let bytes = weight(&record);
        self.bytes += bytes;
        if self.open.as_ref().is_some_and(|open| !open.takes(&record, &self.limits)) {
            self.sealed.extend(self.open.take());
        }
        let open = self.open.get_or_insert_with(|| Block {
            partition: self.partition.clone(),
            records: Vec::new(),
            bytes: 0,
            month: month(record.time),
            opened: now,
        });
        open.bytes += bytes;
        open.records.push(record);
        if open.is_full(&self.limits) {
            self.sealed.extend(self.open.take());
        }
    }

    /// The next block that is full or old enough at `now`, in order of the offsets.
    pub fn take(&mut self, now: Instant) -> Option<Block> {
        if self.sealed.is_empty() && self.open.as_ref().is_some_and(|open| open.opened + self.limits.age <= now) {
            self.seal();
        }
        let block = self.sealed.pop_front()?;
        self.bytes -= block.bytes;
        Some(block)
    }

    /// Ends the open block, however small it is.
    pub fn seal(&mut self) {
        self.sealed.extend(self.open.take());
    }

    /// When [`Self::take`] will have a block; `None` while there are no records.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        match self.sealed.front() {
            Some(block) => Some(block.opened),
            None => self.open.as_ref().map(|open| open.opened + self.limits.age),
        }
    }

    /// What waits here, in bytes of memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// What a record takes in memory, about.
fn weight(record: &Record) -> usize {
    let headers: usize = record.headers.iter().map(|(name, value)| name.len() + value.len()).sum();
    let bytes = |part: &Option<bytes::Bytes>| part.as_ref().map_or(0, bytes::Bytes::len);
    OVERHEAD + mem::size_of::<Record>() + headers + bytes(&record.key) + bytes(&record.value)
}

/// The month of a record's time as `toYYYYMM(recorded_at)` has it.
fn month(time: Timestamp) -> u32 {
    let at = jiff::Timestamp::from_millisecond(super::row::storable(time)).unwrap_or_default();
    let date = at.to_zoned(jiff::tz::TimeZone::UTC).date();
    u32::from(date.year().unsigned_abs()) * 100 + u32::from(date.month().unsigned_abs())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn partition() -> Partition {
        Partition { topic: "weir.results".into(), number: 3 }
    }

    fn record(offset: i64, size: usize, time: i64) -> Record {
        Record {
            offset,
            time: Timestamp::from_millis(time),
            key: None,
            value: Some(vec![b'x'; size].into()),
            headers: Vec::new(),
        }
    }

    fn limits(rows: usize, bytes: usize) -> Limits {
        Limits { rows, bytes, age: Duration::from_secs(1) }
    }

    fn ranges(blocks: &mut Blocks, now: Instant) -> Vec<(i64, i64)> {
        std::iter::from_fn(|| blocks.take(now)).map(|block| (block.first(), block.last())).collect()
    }

    #[test]
    fn a_block_is_ready_when_it_has_enough_rows_or_is_old_enough() {
        let start = Instant::now();
        let mut blocks = Blocks::new(partition(), limits(3, usize::MAX));
        for offset in 10..15 {
            blocks.push(record(offset, 1, 0), start);
        }
        assert_eq!(ranges(&mut blocks, start), [(10, 12)]);
        assert_eq!(blocks.due(), Some(start + Duration::from_secs(1)));
        assert_eq!(ranges(&mut blocks, start + Duration::from_secs(1)), [(13, 14)]);
        assert_eq!((blocks.due(), blocks.bytes()), (None, 0));
    }

    #[test]
    fn a_token_names_the_range_so_a_rebuilt_block_has_the_same_one() {
        let mut blocks = Blocks::new(partition(), limits(2, usize::MAX));
        for offset in [7, 9] {
            blocks.push(record(offset, 1, 0), Instant::now());
        }
        assert_eq!(blocks.take(Instant::now()).unwrap().token(), "weir.results:3:7-9");
    }

    #[test]
    fn another_month_begins_another_block() {
        let november = 1_795_824_000_000; // 2026-11-28
        let december = november + 7 * 86_400_000;
        let mut blocks = Blocks::new(partition(), limits(100, usize::MAX));
        for (offset, time) in [(1, november), (2, december), (3, december), (4, november)] {
            blocks.push(record(offset, 1, time), Instant::now());
        }
        blocks.seal();
        assert_eq!(ranges(&mut blocks, Instant::now()), [(1, 1), (2, 3), (4, 4)]);
    }

    #[test]
    fn a_record_larger_than_a_block_is_a_block_of_its_own() {
        let mut blocks = Blocks::new(partition(), limits(100, 2_000));
        for (offset, size) in [(1, 10), (2, 50_000), (3, 10)] {
            blocks.push(record(offset, size, 0), Instant::now());
        }
        blocks.seal();
        assert_eq!(ranges(&mut blocks, Instant::now()), [(1, 1), (2, 2), (3, 3)]);
    }

    #[test]
    fn months_are_those_of_utc_and_of_the_stored_time() {
        for (millis, expected) in [
            (0, 197_001),
            (-5_000, 197_001),
            (1_795_824_000_000, 202_611),
            (1_796_083_199_999, 202_611),
            (1_796_083_200_000, 202_612),
            (i64::MAX, 229_912),
        ] {
            assert_eq!(month(Timestamp::from_millis(millis)), expected, "{millis}");
        }
    }

    proptest! {
        #[test]
        fn blocks_cover_every_record_once_in_order_and_respect_the_bounds(
            steps in prop::collection::vec((1i64..4, 0usize..3_000, 0i64..120, 0u64..700, any::<bool>()), 1..200),
            rows in 1usize..20,
            bytes in 500usize..10_000,
        ) {
            let limits = limits(rows, bytes);
            let mut blocks = Blocks::new(partition(), limits);
            let (mut now, mut offset, mut taken, mut pushed) = (Instant::now(), 0, Vec::new(), Vec::new());
            for (gap, size, day, wait, take) in steps {
                offset += gap;
                now += Duration::from_millis(wait);
                pushed.push(offset);
                blocks.push(record(offset, size, day * 86_400_000), now);
                blocks.push(record(offset, size, 0), now); // read twice: dropped
                if take {
                    taken.extend(std::iter::from_fn(|| blocks.take(now)));
                    prop_assert!(blocks.due().is_none_or(|due| due > now));
                }
            }
            blocks.seal();
            taken.extend(std::iter::from_fn(|| blocks.take(now)));
            let covered: Vec<_> = taken.iter().flat_map(|block| block.records.iter().map(|r| r.offset)).collect();
            prop_assert_eq!(covered, pushed);
            prop_assert_eq!(blocks.bytes(), 0);
            for block in &taken {
                prop_assert!(!block.records.is_empty() && block.records.len() <= rows);
                prop_assert!(block.bytes <= bytes || block.records.len() == 1);
                prop_assert_eq!(block.bytes, block.records.iter().map(weight).sum::<usize>());
                prop_assert!(block.records.iter().all(|r| month(r.time) == month(block.records[0].time)));
            }
        }
    }
}
