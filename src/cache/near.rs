//! L1: answers in the memory of this process, bounded by bytes. The newest answer for a key wins.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use moka::{ops::compute::Op, sync::Cache};

use super::{answer::Kept, key::Key};
use crate::runtime::clock::Timestamp;

/// What an entry costs besides its answer: moka's own, the key and ours.
const OVERHEAD: usize = 256;

/// What this process knows of a key.
#[derive(Debug)]
enum Entry {
    /// An answer, and how often it has been given.
    Answer(Kept, AtomicU32),
    /// Nothing fetched before this time counts: somebody has said so while an older answer may still be on its way here.
    Dropped(Timestamp),
}

impl Entry {
    fn at(&self) -> Timestamp {
        match self {
            Self::Answer(kept, _) => kept.ends.fetched_at,
            Self::Dropped(at) => *at,
        }
    }

    fn size(&self) -> usize {
        match self {
            Self::Answer(kept, _) => kept.answer.size(),
            Self::Dropped(_) => 0,
        }
    }
}

/// Answers in memory. When they expire is for whoever reads them: they carry their ends, by the stage's own clock.
#[derive(Clone, Debug)]
pub struct Near(Cache<Key, Arc<Entry>>);

impl Near {
    /// Room for about so many bytes.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        let weigh = |key: &Key, entry: &Arc<Entry>| {
            u32::try_from(OVERHEAD + key.as_str().len() + entry.size()).unwrap_or(u32::MAX)
        };
        Self(Cache::builder().max_capacity(bytes).weigher(weigh).build())
    }

    /// What is kept, whether it has expired or not, and how often it was given.
    #[must_use]
    pub fn get(&self, key: &Key) -> Option<(Kept, u32)> {
        match &*self.0.get(key)? {
            Entry::Answer(kept, hits) => Some((kept.clone(), hits.load(Ordering::Relaxed))),
            Entry::Dropped(_) => None,
        }
    }

    /// An answer was given to a request.
    pub fn count(&self, key: &Key) {
        if let Some(entry) = self.0.get(key)
            && let Entry::Answer(_, hits) = &*entry
        {
            hits.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Keeps an answer, unless a newer one is there or it has been dropped since.
    pub fn put(&self, key: &Key, kept: Kept) {
        self.newer(key, Arc::new(Entry::Answer(kept, AtomicU32::new(0))));
    }

    /// Whatever was fetched before `at` counts no more, also if it comes only now.
    pub fn drop_older(&self, key: &Key, at: Timestamp) {
        self.newer(key, Arc::new(Entry::Dropped(at)));
    }

    fn newer(&self, key: &Key, entry: Arc<Entry>) {
        self.0.entry_by_ref(key).and_compute_with(|there| match there {
            // The very answer that others were told of replaces nothing.
            Some(there) if there.value().at() >= entry.at() => Op::Nop,
            _ => Op::Put(entry),
        });
    }

    /// How many keys there are, about.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.run_pending_tasks();
        self.0.entry_count()
    }

    /// Whether there is nothing, about.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many bytes they take, about.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.run_pending_tasks();
        self.0.weighted_size()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::answer::tests::kept, *};

    fn key(text: &str) -> Key {
        Key::from_text(text)
    }

    fn at(near: &Near, key: &Key) -> Option<i64> {
        near.get(key).map(|(kept, _)| kept.ends.fetched_at.as_millis())
    }

    #[test]
    fn the_newest_answer_wins_whatever_the_order() {
        let (near, key) = (Near::new(1 << 20), key("k"));
        near.put(&key, kept(2_000, "2"));
        near.put(&key, kept(1_000, "1"));
        assert_eq!(at(&near, &key), Some(2_000));
        near.put(&key, kept(3_000, "3"));
        assert_eq!(at(&near, &key), Some(3_000));
    }

    #[test]
    fn what_was_dropped_does_not_come_back_late() {
        let (near, key) = (Near::new(1 << 20), key("k"));
        near.put(&key, kept(1_000, "1"));
        near.drop_older(&key, Timestamp::from_millis(2_000));
        assert_eq!(at(&near, &key), None);
        near.put(&key, kept(1_500, "\"on its way since before\""));
        assert_eq!(at(&near, &key), None);
        near.put(&key, kept(2_001, "2"));
        assert_eq!(at(&near, &key), Some(2_001));
        near.drop_older(&key, Timestamp::from_millis(2_001));
        assert_eq!(at(&near, &key), Some(2_001), "the answer that the others were told of stays");
    }

    #[test]
    fn what_was_dropped_before_it_was_known_does_not_come_late_either() {
        let (near, key) = (Near::new(1 << 20), key("k"));
        near.drop_older(&key, Timestamp::from_millis(2_000));
        near.put(&key, kept(1_999, "1"));
        assert_eq!(at(&near, &key), None);
    }

    #[test]
    fn it_is_bounded_by_bytes_and_counts_hits() {
        let near = Near::new(100_000);
        let raw = format!("\"{}\"", "x".repeat(5_000));
        for number in 0..200 {
            near.put(&key(&number.to_string()), kept(1_000, &raw));
        }
        assert!(near.bytes() <= 100_000 && near.len() < 20, "{} bytes", near.bytes());
        let (near, key) = (Near::new(100_000), key("k"));
        near.put(&key, kept(1_000, "1"));
        near.count(&key);
        near.count(&key);
        assert_eq!(near.get(&key).unwrap().1, 2);
    }
}
