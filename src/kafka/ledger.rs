//! Which offsets of a partition are completed, in any order. Pure: no I/O, no clock.
//!
//! What is committed is the first offset that is not done, and in the commit's metadata a bitmap of what is
//! done beyond it. Both come from one [`Ledger::snapshot`]: an offset and a map read at different instants
//! lose or double records (confluentinc/parallel-consumer#893). A hard window bounds the map, so that it
//! always fits the broker's 4,096 bytes.

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD as BASE64};

use super::{Committed, Epoch, commit_mark};

/// The broker refuses longer commit metadata (`offset.metadata.max.bytes`, 4,096 by default).
pub const BROKERS_LIMIT: usize = 4_096;

/// What stages may say in it: the id of the topic stands before it.
pub const METADATA_LIMIT: usize = BROKERS_LIMIT - commit_mark::LENGTH;

/// How far work may run ahead of the first offset that is not done: 24,000 bits are 3,000 bytes are 4,000
/// characters of base64.
pub const WINDOW: i64 = 24_000;

/// Kind and version of the metadata. Another kind, or a newer version, must not be ignored: what it says is
/// done would be done again.
const KIND: &str = "L1:";

/// Why a commit's metadata cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// Written by something else, or by a newer weir.
    #[error("the commit metadata begins with {found:?}, this version of weir reads {KIND:?}; run the newer version")]
    Kind {
        /// How it begins.
        found: String,
    },
    /// Cut or damaged.
    #[error("the commit metadata is damaged: {reason}")]
    Damaged {
        /// What is wrong.
        reason: String,
    },
}

/// What to do with a record that has been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admit {
    /// It is new: work on it.
    New,
    /// It was done before this assignment, or is under way already: ignore it.
    Known,
}

/// The state of one partition during one assignment.
#[derive(Clone, Debug)]
pub struct Ledger {
    epoch: Epoch,
    /// Everything before it is done. `None` until the first record of a partition that was never committed:
    /// its first offset is not 0 if retention has deleted some.
    base: Option<i64>,
    /// The offset after the last one that has been read.
    next: i64,
    /// Bit `i` = offset `base + i` is done.
    done: Bits,
}

impl Ledger {
    /// The ledger of a new assignment, continued from what the group has committed.
    ///
    /// # Errors
    /// [`LedgerError`] if the metadata is not ours to read.
    pub fn new(epoch: Epoch, committed: Option<&Committed>) -> Result<Self, LedgerError> {
        let Some(committed) = committed else {
            return Ok(Self { epoch, base: None, next: 0, done: Bits::default() });
        };
        let done = Bits::after_base(&decode(&committed.metadata)?);
        let base = Some(committed.offset);
        Ok(Self { epoch, base, next: committed.offset, done })
    }

    /// The assignment that this ledger belongs to.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Takes note of a record that has been read. Offsets that were passed over hold no record for us
    /// (transaction markers, rolled back or compacted records): they count as done.
    pub fn admit(&mut self, offset: i64) -> Admit {
        let base = *self.base.get_or_insert_with(|| {
            self.next = offset;
            offset
        });
        if offset < self.next {
            return Admit::Known;
        }
        for gap in self.next..offset {
            self.done.set(gap - base);
        }
        self.next = offset + 1;
        let known = self.done.get(offset - base);
        self.advance();
        if known { Admit::Known } else { Admit::New }
    }

    /// Offsets before `until` have been deleted by retention: they count as done.
    pub fn gone(&mut self, until: i64) {
        let base = *self.base.get_or_insert(until);
        if until > base {
            self.done.drop_front(until - base);
            self.base = Some(until);
            self.next = self.next.max(until);
            self.advance();
        }
    }

    /// Whether work on this offset may begin: its completion will fit into the bitmap.
    #[must_use]
    pub fn may_start(&self, offset: i64) -> bool {
        self.base.is_none_or(|base| offset - base < WINDOW)
    }

    /// This offset has its outcome.
    pub fn complete(&mut self, offset: i64) {
        if let Some(base) = self.base.filter(|base| *base <= offset) {
            self.done.set(offset - base);
            self.advance();
        }
    }

    /// Offset and bitmap as one value; `None` if nothing has been read of a partition never committed.
    #[must_use]
    pub fn snapshot(&self) -> Option<Committed> {
        let base = self.base?;
        // A gap may reach beyond the window; it is found again when it is read again.
        let bits = self.done.bytes_after_base();
        let limit = usize::try_from(WINDOW / 8).unwrap_or(0).min(bits.len());
        Some(Committed { offset: base, metadata: encode(&bits[..limit]) })
    }

    fn advance(&mut self) {
        if let Some(base) = self.base.as_mut() {
            let ahead = self.done.leading_ones();
            self.done.drop_front(ahead);
            *base += ahead;
            // Bits beyond what has been read (from the metadata) may carry the base past `next`.
            self.next = self.next.max(*base);
        }
    }
}

fn encode(bits: &[u8]) -> String {
    let used = bits.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    if used == 0 {
        return String::new();
    }
    format!("{KIND}{}", BASE64.encode(&bits[..used]))
}

fn decode(metadata: &str) -> Result<Vec<u8>, LedgerError> {
    if metadata.is_empty() {
        return Ok(Vec::new());
    }
    let Some(map) = metadata.strip_prefix(KIND) else {
        return Err(LedgerError::Kind { found: metadata.chars().take(KIND.len()).collect() });
    };
    BASE64.decode(map).map_err(|error| LedgerError::Damaged { reason: error.to_string() })
}

/// Bits that are taken from the front as the base moves.
#[derive(Clone, Debug, Default)]
struct Bits {
    words: std::collections::VecDeque<u64>,
    /// How many bits of the first word are already dropped.
    skip: i64,
}

impl Bits {
    /// From the bitmap of a commit, whose first bit is the offset *after* the base (the base is never done).
    fn after_base(bytes: &[u8]) -> Self {
        let mut bits = Self::default();
        for (index, byte) in (0_i64..).zip(bytes) {
            for bit in (0..8).filter(|bit| byte >> bit & 1 == 1) {
                bits.set(index * 8 + bit + 1);
            }
        }
        bits
    }

    fn bytes_after_base(&self) -> Vec<u8> {
        let length = i64::try_from(self.words.len()).unwrap_or(0) * 64 - self.skip;
        let bytes = usize::try_from(length / 8 + 1).unwrap_or(0);
        let mut map = vec![0_u8; bytes];
        for (index, byte) in (0_i64..).zip(map.iter_mut()) {
            for bit in (0..8).filter(|bit| self.get(index * 8 + bit + 1)) {
                *byte |= 1 << bit;
            }
        }
        map
    }

    fn place(&self, index: i64) -> (usize, u32) {
        let index = usize::try_from(index + self.skip).unwrap_or(0);
        (index / 64, u32::try_from(index % 64).unwrap_or(0))
    }

    fn get(&self, index: i64) -> bool {
        let (word, bit) = self.place(index);
        self.words.get(word).is_some_and(|word| word >> bit & 1 == 1)
    }

    fn set(&mut self, index: i64) {
        let (word, bit) = self.place(index);
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << bit;
    }

    fn leading_ones(&self) -> i64 {
        let mut ones = -self.skip;
        for (index, word) in self.words.iter().enumerate() {
            let word = if index == 0 { word | ((1 << self.skip) - 1) } else { *word };
            ones += i64::from(word.trailing_ones());
            if word != u64::MAX {
                break;
            }
        }
        ones.max(0)
    }

    fn drop_front(&mut self, count: i64) {
        self.skip += count;
        while self.skip >= 64 {
            self.words.pop_front();
            self.skip -= 64;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    fn fresh(offset: i64) -> Ledger {
        Ledger::new(Epoch(1), Some(&Committed { offset, metadata: String::new() })).unwrap()
    }

    #[test]
    fn one_slow_offset_keeps_the_base_and_the_rest_is_in_the_map() {
        let mut ledger = fresh(100);
        (100..110).for_each(|offset| assert_eq!(ledger.admit(offset), Admit::New));
        (101..110).for_each(|offset| ledger.complete(offset));
        let snapshot = ledger.snapshot().unwrap();
        assert_eq!(snapshot.offset, 100);
        let mut again = Ledger::new(Epoch(2), Some(&snapshot)).unwrap();
        let new: Vec<_> = (100..112).filter(|offset| again.admit(*offset) == Admit::New).collect();
        assert_eq!(new, [100, 110, 111]);
        ledger.complete(100);
        assert_eq!(ledger.snapshot(), Some(Committed { offset: 110, metadata: String::new() }));
    }

    #[test]
    fn a_partition_never_committed_begins_where_its_first_record_is() {
        let mut ledger = Ledger::new(Epoch(1), None).unwrap();
        assert_eq!(ledger.snapshot(), None);
        assert_eq!(ledger.admit(7), Admit::New);
        assert_eq!(ledger.snapshot().unwrap().offset, 7);
        ledger.complete(7);
        assert_eq!(ledger.snapshot().unwrap().offset, 8);
    }

    #[test]
    fn passed_over_offsets_count_as_done() {
        let mut ledger = fresh(0);
        ledger.admit(3);
        ledger.complete(3);
        assert_eq!(ledger.snapshot().unwrap().offset, 4);
    }

    #[test]
    fn what_retention_deleted_counts_as_done() {
        let mut ledger = fresh(5);
        ledger.gone(50);
        assert_eq!(ledger.snapshot().unwrap().offset, 50);
        assert_eq!(ledger.admit(50), Admit::New);
    }

    #[test]
    fn the_longest_map_fits_the_brokers_limit() {
        let mut ledger = fresh(1_000_003);
        let last = 1_000_003 + WINDOW - 1;
        assert!((1_000_003..=last).all(|offset| ledger.admit(offset) == Admit::New));
        assert!(ledger.may_start(last));
        assert!(!ledger.may_start(last + 1));
        (1_000_004..=last).for_each(|offset| ledger.complete(offset));
        let snapshot = ledger.snapshot().unwrap();
        assert!(snapshot.metadata.len() <= METADATA_LIMIT, "{} bytes", snapshot.metadata.len());
        let mut again = Ledger::new(Epoch(2), Some(&snapshot)).unwrap();
        let new = (1_000_003..=last).filter(|offset| again.admit(*offset) == Admit::New).count();
        assert_eq!(new, 1);
    }

    #[test]
    fn a_foreign_or_newer_commit_is_refused_not_ignored() {
        for metadata in ["L2:AAAA", "B1:[[1,2]]", "hello"] {
            let committed = Committed { offset: 1, metadata: metadata.to_owned() };
            assert!(matches!(Ledger::new(Epoch(1), Some(&committed)), Err(LedgerError::Kind { .. })), "{metadata}");
        }
        let committed = Committed { offset: 1, metadata: "L1:!".to_owned() };
        assert!(matches!(Ledger::new(Epoch(1), Some(&committed)), Err(LedgerError::Damaged { .. })));
    }

    /// A partition as the broker holds it, and a consumer that works on it, dies, and comes back.
    #[derive(Debug)]
    struct Model {
        /// Offsets that hold a record (the others are markers).
        records: Vec<i64>,
        committed: Option<Committed>,
        /// Outcomes that are visible: they became so in the same step as their commit.
        visible: BTreeMap<i64, u32>,
        ledger: Ledger,
        position: usize,
        under_way: BTreeSet<i64>,
        completed: BTreeSet<i64>,
        epoch: u64,
    }

    #[derive(Clone, Debug)]
    enum Step {
        Read(u8),
        Complete(prop::sample::Index),
        Commit,
        Crash,
    }

    impl Model {
        fn new(first: i64, gaps: &[u8]) -> Self {
            let mut offset = first;
            let place = |gap: &u8| {
                offset += i64::from(*gap) + 1;
                offset
            };
            Self {
                records: gaps.iter().map(place).collect(),
                committed: None,
                visible: BTreeMap::new(),
                ledger: Ledger::new(Epoch(0), None).unwrap(),
                position: 0,
                under_way: BTreeSet::new(),
                completed: BTreeSet::new(),
                epoch: 0,
            }
        }

        fn step(&mut self, step: &Step) {
            match step {
                Step::Read(count) => self.read(usize::from(*count)),
                Step::Complete(index) if !self.under_way.is_empty() => {
                    let offset = *index.get(&self.under_way.iter().copied().collect::<Vec<_>>());
                    self.under_way.remove(&offset);
                    self.completed.insert(offset);
                }
                Step::Complete(_) => {}
                Step::Commit => self.commit(),
                Step::Crash => self.restart(),
            }
        }

        fn read(&mut self, count: usize) {
            for _ in 0..count {
                let Some(&offset) = self.records.get(self.position) else { return };
                self.position += 1;
                if self.ledger.admit(offset) == Admit::New {
                    assert!(
                        !self.visible.contains_key(&offset),
                        "{offset} is handed out though its outcome is committed"
                    );
                    self.under_way.insert(offset);
                } else {
                    assert!(self.visible.contains_key(&offset), "{offset} is passed over though it has no outcome");
                }
            }
        }

        fn commit(&mut self) {
            for offset in std::mem::take(&mut self.completed) {
                self.ledger.complete(offset);
                *self.visible.entry(offset).or_default() += 1;
            }
            if let Some(snapshot) = self.ledger.snapshot() {
                for record in self.records.iter().filter(|record| **record < snapshot.offset) {
                    assert!(self.visible.contains_key(record), "the commit passes {record}, which has no outcome");
                }
                assert!(snapshot.metadata.len() <= METADATA_LIMIT);
                self.committed = Some(snapshot);
            }
        }

        /// Kill -9, or a rebalance and back: all that survives is what is committed.
        fn restart(&mut self) {
            self.epoch += 1;
            self.ledger = Ledger::new(Epoch(self.epoch), self.committed.as_ref()).unwrap();
            let from = self.committed.as_ref().map_or(i64::MIN, |committed| committed.offset);
            self.position = self.records.partition_point(|record| *record < from);
            self.under_way.clear();
            self.completed.clear();
        }

        fn finish(&mut self) {
            self.restart();
            self.read(self.records.len());
            self.completed.append(&mut self.under_way);
            self.commit();
            let outcomes: Vec<_> = self.visible.iter().map(|(offset, times)| (*offset, *times)).collect();
            let expected: Vec<_> = self.records.iter().map(|offset| (*offset, 1)).collect();
            assert_eq!(outcomes, expected, "each record has exactly one outcome");
        }
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0_u8..40).prop_map(Step::Read),
            30 => any::<prop::sample::Index>().prop_map(Step::Complete),
            3 => Just(Step::Commit),
            1 => Just(Step::Crash),
        ];
        prop::collection::vec(step, 0..400)
    }

    proptest! {
        // 256 cases of up to 400 steps here; WEIR_LEDGER_CASES=10000 makes about two million.
        #![proptest_config(ProptestConfig::with_cases(option_env!("WEIR_LEDGER_CASES").and_then(|n| n.parse().ok()).unwrap_or(256)))]

        #[test]
        fn crash_rebalance_and_reorder_never_lose_or_double_an_outcome(
            first in 0_i64..1_000,
            gaps in prop::collection::vec(prop_oneof![9 => Just(0_u8), 1 => 0_u8..100], 1..300),
            steps in steps(),
        ) {
            let mut model = Model::new(first, &gaps);
            for step in &steps {
                model.step(step);
            }
            model.finish();
        }

        #[test]
        fn bits_behave_as_a_set(actions in prop::collection::vec((0_i64..500, 0_i64..70), 1..200)) {
            let mut bits = Bits::default();
            let mut model = BTreeSet::new();
            let mut front = 0_i64;
            for (set, dropped) in actions {
                bits.set(set);
                model.insert(front + set);
                if dropped % 7 == 0 {
                    bits.drop_front(dropped);
                    front += dropped;
                }
                let ones = (front..front + 600).take_while(|index| model.contains(index)).count();
                prop_assert_eq!(bits.leading_ones(), i64::try_from(ones).unwrap());
                prop_assert!((0..600).all(|index| bits.get(index) == model.contains(&(front + index))));
            }
        }
    }
}
