//! Who holds and has spent what of the budgets of batches, as anybody knows it: each holder's newest word counts. Pure.
//!
//! However often and in whatever order the same words arrive, they come to the same; so whoever knows something may
//! always tell it.

use std::collections::{BTreeMap, HashMap};

use crate::message::{BatchId, BatchPart, BatchReport};

/// How many batches are remembered: of those that were touched longest ago what is spent is forgotten.
pub const BATCHES: usize = 10_000;

/// What one holder may spend of a batch's budget, and has spent, in calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// How many calls it may make in all.
    pub granted: u64,
    /// How many it has made.
    pub calls: u64,
    /// The number of its last word.
    pub seq: u64,
}

impl Part {
    /// Of two words of the same holder the newer one; of two with one number the larger.
    #[must_use]
    pub fn newer(self, other: Self) -> Self {
        match self.seq.cmp(&other.seq) {
            std::cmp::Ordering::Greater => self,
            std::cmp::Ordering::Less => other,
            std::cmp::Ordering::Equal => {
                Self { granted: self.granted.max(other.granted), calls: self.calls.max(other.calls), seq: self.seq }
            }
        }
    }
}

/// What a holder has said of a batch.
pub type Word = (BatchId, String, Part);

/// All parts that are known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    batches: HashMap<BatchId, Parts>,
    /// By when they were touched, the longest ago first.
    order: BTreeMap<u64, BatchId>,
    touched: u64,
}

/// The parts of one batch, by holder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Parts {
    touched: u64,
    of: HashMap<String, Part>,
}

impl Ledger {
    /// Takes a holder's word; whether it says anything new.
    pub fn learn(&mut self, batch: &BatchId, holder: &str, part: Part) -> bool {
        self.touch(batch);
        let Some(parts) = self.batches.get_mut(batch) else { return false };
        let known = parts.of.entry(holder.to_owned()).or_default();
        let newer = known.newer(part);
        let is_new = newer != *known;
        *known = newer;
        is_new
    }

    fn touch(&mut self, batch: &BatchId) {
        self.touched += 1;
        let parts = self.batches.entry(batch.clone()).or_default();
        self.order.remove(&std::mem::replace(&mut parts.touched, self.touched));
        self.order.insert(self.touched, batch.clone());
        if self.batches.len() > BATCHES
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.batches.remove(&oldest);
        }
    }

    /// What a holder has of a batch.
    #[must_use]
    pub fn part(&self, batch: &BatchId, holder: &str) -> Part {
        self.batches.get(batch).and_then(|parts| parts.of.get(holder)).copied().unwrap_or_default()
    }

    /// Takes in a report.
    pub fn read(&mut self, reports: &[BatchReport]) {
        for BatchReport { batch, parts, .. } in reports {
            for BatchPart { holder, granted, calls, seq } in parts {
                self.learn(batch, holder, Part { granted: *granted, calls: *calls, seq: *seq });
            }
        }
    }

    /// Those that were touched last, for a report, the oldest first.
    #[must_use]
    pub fn reports(&self, most: usize, allowed: u64) -> Vec<BatchReport> {
        let report = |batch: &BatchId| {
            let of = self.batches.get(batch).into_iter().flat_map(|parts| &parts.of);
            let part = |(holder, part): (&String, &Part)| {
                let Part { granted, calls, seq } = *part;
                BatchPart { holder: holder.clone(), granted, calls, seq }
            };
            let mut parts: Vec<BatchPart> = of.map(part).collect();
            parts.sort_unstable_by(|one, other| one.holder.cmp(&other.holder));
            BatchReport { batch: batch.clone(), allowed, parts }
        };
        let mut reports: Vec<BatchReport> = self.order.values().rev().take(most).map(report).collect();
        reports.reverse();
        reports
    }

    /// Everything, the batch that was touched longest ago first.
    pub fn words(&self) -> impl Iterator<Item = Word> {
        let parts = self.order.values().filter_map(|batch| Some((batch, self.batches.get(batch)?)));
        parts.flat_map(|(batch, parts)| parts.of.iter().map(|(holder, part)| (batch.clone(), holder.clone(), *part)))
    }

    /// Whether nothing is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn batch(name: &str) -> BatchId {
        BatchId::new(name).unwrap()
    }

    fn part((granted, calls, seq): (u64, u64, u64)) -> Part {
        Part { granted, calls, seq }
    }

    proptest! {
        #[test]
        fn words_come_to_the_same_in_any_order_and_however_often(
            words in prop::collection::vec((0u64..9, 0u64..9, 0u64..4), 1..8), turn in 0usize..8,
        ) {
            let (mut one, mut other) = (Ledger::default(), Ledger::default());
            let mut turned = words.clone();
            turned.rotate_left(turn % words.len());
            for word in &words {
                one.learn(&batch("b"), "h", part(*word));
            }
            for word in turned.iter().chain(&words) {
                other.learn(&batch("b"), "h", part(*word));
            }
            prop_assert_eq!(one.part(&batch("b"), "h"), other.part(&batch("b"), "h"));
        }
    }

    #[test]
    fn a_report_is_read_again_and_names_what_was_touched_last() {
        let mut ledger = Ledger::default();
        for name in ["a", "b", "c"] {
            ledger.learn(&batch(name), "h", part((8, 3, 1)));
        }
        ledger.learn(&batch("a"), "g", part((5, 5, 9)));
        let reports = ledger.reports(2, 20);
        let names: Vec<&str> = reports.iter().map(|report| report.batch.as_str()).collect();
        assert_eq!(names, ["c", "a"]);
        let mut again = Ledger::default();
        again.read(&ledger.reports(9, 20));
        assert_eq!(again.reports(9, 20), ledger.reports(9, 20));
        assert_eq!(again.part(&batch("a"), "g"), part((5, 5, 9)));
    }

    #[test]
    fn only_so_many_batches_are_remembered() {
        let mut ledger = Ledger::default();
        for number in 0..=BATCHES {
            ledger.learn(&batch(&format!("b{number}")), "h", part((1, 1, 1)));
        }
        assert_eq!((ledger.batches.len(), ledger.order.len()), (BATCHES, BATCHES));
        assert_eq!(ledger.part(&batch("b0"), "h"), Part::default());
    }
}
