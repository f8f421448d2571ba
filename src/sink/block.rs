//! Cuts the records of a partition into blocks: contiguous offset ranges, each of which becomes one insert.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    mem,
    time::Duration,
};

use tokio::time::Instant;

use super::intent::Intent;
use crate::{
    kafka::{Partition, Record},
    runtime::clock::Timestamp,
    store::write::ROWS_MAX,
};

/// What a record weighs in memory beside its bytes: the struct, its headers' names, the row made of it.
const OVERHEAD: usize = 256;

/// How far a block may grow beyond `rows` when more is waiting: fewer, larger inserts are cheaper for ClickHouse.
pub(super) const GROWTH: usize = 8;

/// In so many months the records of a block may be. The tables are split by months, and an insert makes a part in each:
/// ClickHouse refuses one that makes more than 100. It recognises the repetition of a block in each of its months by
/// the one token, also if only some of them were stored.
///
/// Producers choose their records' times. If each change of month began a block, one that hands old times on, or mixes
/// seconds and milliseconds, would make an insert of each record.
const MONTHS_MAX: usize = 50;

/// When a block is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// With so many records a block is ready; if more wait by then, it takes up to eight times as many.
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
    /// the transaction markers there.
    pub records: Vec<Record>,
    /// What they weigh in memory.
    pub bytes: usize,
    came_at: Instant,
}

impl Block {
    /// The offset of its first record.
    #[must_use]
    pub fn first(&self) -> i64 {
        self.records.first().map_or(0, |record| record.offset)
    }

    /// The offset after its last record.
    #[must_use]
    pub fn next(&self) -> i64 {
        self.records.last().map_or(0, |record| record.offset + 1)
    }

    /// Cuts off the records from `index` on.
    pub(super) fn split_off(&mut self, index: usize) -> Self {
        let records = self.records.split_off(index);
        let bytes = records.iter().map(weight).sum();
        self.bytes -= bytes;
        Self { partition: self.partition.clone(), records, bytes, came_at: self.came_at }
    }
}

/// What [`Blocks::take`] found.
#[derive(Debug)]
pub enum Cut {
    /// A block that no intent is known of.
    New(Block),
    /// The block of an intent, whole again.
    Rebuilt(Block, Intent),
    /// Not all records of an intent are on Kafka any longer.
    Lost(Intent),
}

/// A record that waits to be in a block.
#[derive(Debug)]
struct Waiting {
    record: Record,
    came_at: Instant,
    bytes: usize,
    month: u32,
}

/// The records of one partition on their way into blocks.
#[derive(Debug)]
pub struct Blocks {
    partition: Partition,
    limits: Limits,
    /// Blocks that were announced before; they have to be cut exactly so again.
    rebuild: VecDeque<Intent>,
    waiting: VecDeque<Waiting>,
    /// How many of them are in each month.
    months: BTreeMap<u32, usize>,
    last: Option<i64>,
    gone_at: Option<Instant>,
    bytes: usize,
    is_sealed: bool,
}

impl Blocks {
    /// Nothing yet. The blocks of `rebuild`, by offset, come first.
    #[must_use]
    pub fn new(partition: Partition, limits: Limits, rebuild: Vec<Intent>) -> Self {
        Self {
            partition,
            limits,
            rebuild: rebuild.into(),
            waiting: VecDeque::new(),
            months: BTreeMap::new(),
            last: None,
            gone_at: None,
            bytes: 0,
            is_sealed: false,
        }
    }

    /// Other limits, for the blocks that are yet to be cut.
    pub fn limit(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// The limits for the blocks that are yet to be cut.
    #[must_use]
    pub const fn limits(&self) -> Limits {
        self.limits
    }

    /// Adds the next record. One that is not beyond the last one is dropped: it is here already.
    pub fn push(&mut self, record: Record, now: Instant) {
        if self.last.is_some_and(|last| record.offset <= last) {
            return;
        }
        self.last = Some(record.offset);
        self.is_sealed = false;
        let waiting = self.counted(record, now);
        self.waiting.push_back(waiting);
    }

    fn counted(&mut self, record: Record, came_at: Instant) -> Waiting {
        let (month, bytes) = (month(record.time), weight(&record));
        *self.months.entry(month).or_default() += 1;
        self.bytes += bytes;
        Waiting { record, came_at, bytes, month }
    }

    /// The records before `until` are gone from Kafka: they will not come.
    pub fn gone(&mut self, until: i64, now: Instant) {
        self.gone_at = Some(now);
        self.last = self.last.max(Some(until - 1));
    }

    /// The next block that is full or old enough at `now`, in order of the offsets.
    pub fn take(&mut self, now: Instant) -> Option<Cut> {
        if self.due().is_none_or(|due| due > now) {
            return None;
        }
        let Some(intent) = self.rebuild.pop_front() else {
            return self.cut(self.length()).map(Cut::New);
        };
        let count = self.waiting.partition_point(|waiting| waiting.record.offset < intent.next);
        let whole = count == intent.records() && count > 0;
        match self.cut(count) {
            Some(block) if whole && block.first() == intent.first && block.next() == intent.next => {
                Some(Cut::Rebuilt(block, intent))
            }
            _ => Some(Cut::Lost(intent)),
        }
    }

    /// How many records the next new block takes.
    fn length(&self) -> usize {
        let (mut rows, mut bytes, mut months) = (0, 0_usize, BTreeSet::new());
        for waiting in &self.waiting {
            bytes = bytes.saturating_add(waiting.bytes);
            months.insert(waiting.month);
            if months.len() > MONTHS_MAX || rows >= self.limits.rows.saturating_mul(GROWTH).min(ROWS_MAX) {
                break;
            }
            if rows > 0 && bytes > self.limits.bytes {
                break;
            }
            rows += 1;
        }
        rows
    }

    fn cut(&mut self, rows: usize) -> Option<Block> {
        let came_at = self.waiting.front()?.came_at;
        let mut bytes = 0;
        let mut records = Vec::with_capacity(rows);
        for waiting in self.waiting.drain(..rows) {
            bytes += waiting.bytes;
            if let Some(count) = self.months.get_mut(&waiting.month) {
                *count -= 1;
            }
            records.push(waiting.record);
        }
        self.months.retain(|_, count| *count > 0);
        self.bytes -= bytes;
        if records.is_empty() {
            return None;
        }
        Some(Block { partition: self.partition.clone(), records, bytes, came_at })
    }

    /// Puts back what was cut off a block.
    pub(super) fn put_back(&mut self, block: Block) {
        for record in block.records.into_iter().rev() {
            let waiting = self.counted(record, block.came_at);
            self.waiting.push_front(waiting);
        }
    }

    /// Ends the last block, however small it is.
    pub fn seal(&mut self) {
        self.is_sealed = true;
    }

    /// When [`Self::take`] will have a block; `None` while records are missing for it.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        if let Some(intent) = self.rebuild.front() {
            let is_complete = self.last.is_some_and(|last| last + 1 >= intent.next);
            // If nothing of it is left there is no record to take the time from, but it is due all the same.
            return self.waiting.front().map(|waiting| waiting.came_at).or(self.gone_at).filter(|_| is_complete);
        }
        let came_at = self.waiting.front()?.came_at;
        Some(if self.is_full() { came_at } else { came_at + self.limits.age })
    }

    /// Whether the next block has its end, so that waiting would not make it larger, or not much.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.is_sealed
            || !self.rebuild.is_empty()
            || self.months.len() > MONTHS_MAX
            || self.waiting.len() >= self.limits.rows
            || self.bytes >= self.limits.bytes
    }

    /// Whether a block that was announced before cannot be cut until more records come.
    #[must_use]
    pub fn lacks_records(&self) -> bool {
        !self.rebuild.is_empty() && self.due().is_none()
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
pub(super) fn month(time: Timestamp) -> u32 {
    let at = jiff::Timestamp::from_millisecond(crate::store::row::storable(time)).unwrap_or_default();
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
            log: None,
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

    fn new(limits: Limits) -> Blocks {
        Blocks::new(partition(), limits, Vec::new())
    }

    fn taken(blocks: &mut Blocks, now: Instant) -> Option<Block> {
        match blocks.take(now)? {
            Cut::New(block) => Some(block),
            cut @ (Cut::Rebuilt(..) | Cut::Lost(_)) => panic!("{cut:?}"),
        }
    }

    fn ranges(blocks: &mut Blocks, now: Instant) -> Vec<(i64, i64)> {
        std::iter::from_fn(|| taken(blocks, now)).map(|block| (block.first(), block.next())).collect()
    }

    #[test]
    fn a_block_is_ready_when_it_has_enough_rows_or_is_old_enough() {
        let start = Instant::now();
        let mut blocks = new(limits(3, usize::MAX));
        for offset in 10..13 {
            blocks.push(record(offset, 1, 0), start);
        }
        assert_eq!(ranges(&mut blocks, start), [(10, 13)]);
        for offset in 13..15 {
            blocks.push(record(offset, 1, 0), start);
        }
        assert_eq!((blocks.due(), ranges(&mut blocks, start)), (Some(start + Duration::from_secs(1)), vec![]));
        assert_eq!(ranges(&mut blocks, start + Duration::from_secs(1)), [(13, 15)]);
        assert_eq!((blocks.due(), blocks.bytes()), (None, 0));
    }

    #[test]
    fn what_has_waited_goes_together_up_to_eight_times_the_rows() {
        let start = Instant::now();
        let mut blocks = new(limits(3, usize::MAX));
        for offset in 0..30 {
            blocks.push(record(offset, 1, 0), start);
        }
        assert_eq!(ranges(&mut blocks, start), [(0, 24), (24, 30)]);
    }

    #[test]
    fn whatever_times_producers_give_blocks_are_no_smaller_for_it() {
        let november = 1_795_824_000_000; // 2026-11-28
        let mut blocks = new(limits(1_000, usize::MAX));
        // Seconds, milliseconds and microseconds, and times handed on from the last three years.
        for offset in 0..10_000 {
            let handed_on = november - (offset * 7_919 % 1_000) * 86_400_000;
            let time = [november / 1_000, november, november * 1_000, handed_on][usize::try_from(offset % 4).unwrap()];
            blocks.push(record(offset, 1, time), Instant::now());
        }
        blocks.seal();
        assert_eq!(ranges(&mut blocks, Instant::now()), [(0, 8_000), (8_000, 10_000)]);
    }

    #[test]
    fn a_block_makes_no_more_parts_than_clickhouse_takes() {
        let mut blocks = new(limits(1_000, usize::MAX));
        for offset in 0..120 {
            assert_eq!(blocks.is_full(), offset > 50, "{offset}");
            blocks.push(record(offset, 1, offset * 31 * 86_400_000), Instant::now());
        }
        assert_eq!(ranges(&mut blocks, Instant::now()), [(0, 50), (50, 100)]);
        assert!(!blocks.is_full(), "the rest waits for others");
    }

    #[test]
    fn a_record_larger_than_a_block_is_a_block_of_its_own() {
        let mut blocks = new(limits(100, 2_000));
        for (offset, size) in [(1, 10), (2, 50_000), (3, 10)] {
            blocks.push(record(offset, size, 0), Instant::now());
        }
        blocks.seal();
        assert_eq!(ranges(&mut blocks, Instant::now()), [(1, 2), (2, 3), (3, 4)]);
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

    fn intent(first: i64, next: i64, rows: usize) -> Intent {
        Intent { first, next, rows, ..Intent::default() }
    }

    #[test]
    fn an_announced_block_is_cut_exactly_so_again_whatever_the_limits_say() {
        let start = Instant::now();
        let announced = vec![intent(10, 15, 4), intent(15, 17, 2)];
        let mut blocks = Blocks::new(partition(), limits(2, 1), announced);
        for offset in [10, 11, 12] {
            blocks.push(record(offset, 1, 0), start);
        }
        assert!(blocks.due().is_none() && blocks.take(start + Duration::from_secs(9)).is_none(), "not whole yet");
        for offset in [14, 15, 16, 17] {
            blocks.push(record(offset, 1, 0), start);
        }
        let mut ranges = Vec::new();
        while let Some(Cut::Rebuilt(block, intent)) = blocks.take(start) {
            assert_eq!((block.first(), block.next(), block.records.len()), (intent.first, intent.next, intent.rows));
            ranges.push(intent.first);
        }
        assert_eq!(ranges, [10, 15]);
    }

    #[test]
    fn an_announced_block_with_a_hole_is_lost_and_the_next_is_not() {
        let start = Instant::now();
        for (gone, kept) in [(12, vec![12, 13, 14, 15, 16]), (15, vec![15, 16]), (0, vec![10, 11, 13, 14, 15, 16])] {
            let mut blocks = Blocks::new(partition(), limits(2, 1_000), vec![intent(10, 15, 5), intent(15, 17, 2)]);
            blocks.gone(gone, start);
            for offset in kept {
                blocks.push(record(offset, 1, 0), start);
            }
            assert!(matches!(blocks.take(start), Some(Cut::Lost(lost)) if lost.first == 10), "gone until {gone}");
            assert!(matches!(blocks.take(start), Some(Cut::Rebuilt(block, _)) if block.first() == 15));
        }
        let mut blocks = Blocks::new(partition(), limits(2, 1_000), vec![intent(10, 15, 5)]);
        blocks.gone(20, start);
        assert!(matches!(blocks.take(start), Some(Cut::Lost(_))), "although no record ever comes");
    }

    proptest! {
        #[test]
        fn blocks_cover_every_record_once_in_order_and_respect_the_bounds(
            steps in prop::collection::vec((1i64..4, 0usize..3_000, 0i64..120, 0u64..700, any::<bool>(), 0usize..5), 1..200),
            rows in 1usize..20,
            bytes in 500usize..10_000,
        ) {
            let limits = limits(rows, bytes);
            let mut blocks = new(limits);
            let (mut now, mut offset, mut cut, mut pushed) = (Instant::now(), 0, Vec::new(), Vec::new());
            for (gap, size, day, wait, take, back) in steps {
                offset += gap;
                now += Duration::from_millis(wait);
                pushed.push(offset);
                blocks.push(record(offset, size, day * 86_400_000), now);
                blocks.push(record(offset, size, 0), now); // read twice: dropped
                while let Some(mut block) = take.then(|| taken(&mut blocks, now)).flatten() {
                    if block.records.len() > back && back > 0 {
                        let rest = block.split_off(back);
                        blocks.put_back(rest);
                    }
                    cut.push(block);
                }
                prop_assert!(!take || blocks.due().is_none_or(|due| due > now));
            }
            blocks.seal();
            cut.extend(std::iter::from_fn(|| taken(&mut blocks, now)));
            let covered: Vec<_> = cut.iter().flat_map(|block| block.records.iter().map(|r| r.offset)).collect();
            prop_assert_eq!(covered, pushed);
            prop_assert_eq!(blocks.bytes(), 0);
            for block in &cut {
                prop_assert!(!block.records.is_empty() && block.records.len() <= rows * GROWTH);
                prop_assert!(block.bytes <= bytes || block.records.len() == 1);
                prop_assert_eq!(block.bytes, block.records.iter().map(weight).sum::<usize>());
            }
        }
    }
}
