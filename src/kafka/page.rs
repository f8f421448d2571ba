//! A bitmap of a million consecutive offsets in 128 KiB, by which `verify` compares a topic with its table.

use std::{collections::BTreeMap, ops::Range};

/// How many offsets a page covers.
pub const PAGE: i64 = 1 << 20;

/// A set of offsets within one page, and how often those that are there more than once.
#[derive(Clone, Debug)]
pub struct Page {
    first: i64,
    bits: Vec<u64>,
    again: BTreeMap<i64, u32>,
    count: u64,
}

/// Where two sides differ.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// On the first side only.
    pub missing: Vec<i64>,
    /// On the second side only.
    pub stray: Vec<i64>,
    /// More than once on the second side, with how often.
    pub doubled: Vec<(i64, u32)>,
}

impl Page {
    /// The page that `offset` is on, with nothing in it.
    #[must_use]
    pub fn of(offset: i64) -> Self {
        Self { first: offset.div_euclid(PAGE) * PAGE, bits: vec![0; 1 << 14], again: BTreeMap::new(), count: 0 }
    }

    /// The offsets that it covers.
    #[must_use]
    pub fn range(&self) -> Range<i64> {
        self.first..self.first.saturating_add(PAGE)
    }

    /// Adds an offset, perhaps again. One of another page is ignored.
    pub fn add(&mut self, offset: i64) {
        let Some((word, bit)) = self.place(offset) else { return };
        self.count += 1;
        if self.bits[word] & bit != 0 {
            *self.again.entry(offset).or_insert(1) += 1;
        }
        self.bits[word] |= bit;
    }

    /// Whether an offset has been added.
    #[must_use]
    pub fn has(&self, offset: i64) -> bool {
        self.place(offset).is_some_and(|(word, bit)| self.bits[word] & bit != 0)
    }

    /// How many were added, those that came again included.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// How `other` differs from this page, within `range`.
    #[must_use]
    pub fn difference(&self, other: &Self, range: &Range<i64>) -> Difference {
        let mut found = Difference::default();
        for (word, (ours, theirs)) in self.bits.iter().zip(&other.bits).enumerate() {
            let mut differing = ours ^ theirs;
            while differing != 0 {
                let bit = differing.trailing_zeros();
                differing &= differing - 1;
                let offset = self.first + i64::try_from(word * 64).unwrap_or(0) + i64::from(bit);
                if range.contains(&offset) {
                    if ours & (1 << bit) == 0 { found.stray.push(offset) } else { found.missing.push(offset) }
                }
            }
        }
        let doubled = other.again.iter().filter(|(offset, _)| range.contains(offset));
        found.doubled = doubled.map(|(offset, times)| (*offset, *times)).collect();
        found
    }

    fn place(&self, offset: i64) -> Option<(usize, u64)> {
        let index = usize::try_from(offset.checked_sub(self.first)?).ok()?;
        (index < self.bits.len() * 64).then(|| (index / 64, 1 << (index % 64)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn page(offsets: &[i64]) -> Page {
        let mut page = Page::of(offsets.first().copied().unwrap_or(0));
        for offset in offsets {
            page.add(*offset);
        }
        page
    }

    #[test]
    fn what_is_missing_stray_and_doubled_is_named() {
        let there = page(&[PAGE, PAGE + 1, PAGE + 5, PAGE + 5, PAGE + 5, 2 * PAGE - 1]);
        let expected = page(&[PAGE, PAGE + 2, PAGE + 5, 2 * PAGE - 1]);
        let found = expected.difference(&there, &there.range());
        assert_eq!(found, Difference { missing: vec![PAGE + 2], stray: vec![PAGE + 1], doubled: vec![(PAGE + 5, 3)] });
        assert_eq!(there.count(), 6);
        assert_eq!(expected.difference(&there, &(PAGE + 3..PAGE + 5)), Difference::default());
    }

    #[test]
    fn an_offset_of_another_page_is_not_on_this_one() {
        let mut page = Page::of(5);
        for offset in [-1, PAGE, i64::MAX, i64::MIN] {
            page.add(offset);
            assert!(!page.has(offset));
        }
        assert_eq!((page.range(), page.count()), (0..PAGE, 0));
    }

    proptest! {
        #[test]
        fn the_difference_is_that_of_the_lists(
            ours in prop::collection::btree_set(0i64..300, 0..100),
            theirs in prop::collection::vec(0i64..300, 0..100),
        ) {
            let (expected, there) = (page(&ours.iter().copied().collect::<Vec<_>>()), page(&theirs));
            let mut times = BTreeMap::<i64, u32>::new();
            for offset in &theirs {
                *times.entry(*offset).or_default() += 1;
            }
            let found = expected.difference(&there, &(0..PAGE));
            prop_assert_eq!(found.missing, ours.iter().copied().filter(|o| !times.contains_key(o)).collect::<Vec<_>>());
            prop_assert_eq!(found.stray, times.keys().copied().filter(|o| !ours.contains(o)).collect::<Vec<_>>());
            prop_assert_eq!(found.doubled, times.into_iter().filter(|(_, n)| *n > 1).collect::<Vec<_>>());
        }
    }
}
