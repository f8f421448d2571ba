//! Items whose calls end in outages while the source answers for others. Pure.

use std::collections::{HashMap, VecDeque};

/// So many items are remembered; of more the first ones are forgotten.
const MOST: usize = 10_000;

/// What is known of items whose last call ended in an outage, by their [`fingerprint`](crate::fetch::backlog::fingerprint): of two that share
/// one, one is at worst held to be like the other.
///
/// One that fails while others are answered says nothing of the source when it fails again, in whatever request. Where
/// nearly all answers come from the cache the few calls that are left are for such items, and would shut a source that
/// answers everything else. As long as nobody is answered after its failure the source may as well be away.
#[derive(Debug, Default)]
pub(super) struct Suspects {
    /// How many calls had been answered when the item first failed.
    failed_at: HashMap<u64, u64>,
    /// The first to be forgotten first; also items that have been answered since.
    order: VecDeque<u64>,
    answered: u64,
}

impl Suspects {
    /// Whether it failed before, and others were answered after that.
    pub(super) fn has(&self, item: u64) -> bool {
        self.failed_at.get(&item).is_some_and(|failed_at| *failed_at < self.answered)
    }

    /// The source has answered a call for these.
    pub(super) fn answered(&mut self, items: &[u64]) {
        self.answered += 1;
        for item in items {
            self.failed_at.remove(item);
        }
    }

    /// A call for these has ended in an outage.
    pub(super) fn failed(&mut self, items: &[u64]) {
        for item in items {
            if self.failed_at.contains_key(item) {
                continue;
            }
            while self.order.len() >= MOST {
                let first = self.order.pop_front();
                first.and_then(|first| self.failed_at.remove(&first));
            }
            self.order.push_back(*item);
            self.failed_at.insert(*item, self.answered);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_item_is_suspect_only_once_another_was_answered_after_its_failure() {
        let mut suspects = Suspects::default();
        suspects.answered(&[9]);
        suspects.failed(&[1, 2]);
        assert!(!suspects.has(1) && !suspects.has(3));
        suspects.answered(&[9]);
        assert!(suspects.has(1) && suspects.has(2) && !suspects.has(9));
        suspects.failed(&[1]);
        assert!(suspects.has(1), "failing again does not clear it");
        suspects.answered(&[1]);
        assert!(!suspects.has(1) && suspects.has(2));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut suspects = Suspects::default();
        for name in 0..3 * MOST as u64 {
            suspects.failed(&[name]);
            suspects.answered(&[name % 7 + u64::MAX / 2]);
        }
        assert!(suspects.failed_at.len() <= MOST && suspects.order.len() <= MOST);
        assert!(suspects.has(3 * MOST as u64 - 1) && !suspects.has(0));
    }
}
