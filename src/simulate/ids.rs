//! Sample item ids: 12 digits like 1688's, distinct, the same for the same seed.

use super::dice::{Question, roll};

/// The first and the number of ids in 1688's present range of 12 digits.
const FIRST: u64 = 520_000_000_000;
const RANGE: u64 = 400_000_000_000;

/// The smallest even number of bits that covers [`RANGE`].
const HALF_BITS: u32 = 20;
const HALF: u64 = (1 << HALF_BITS) - 1;

/// An endless-looking sequence of distinct ids; it ends after 400,000,000,000.
///
/// A permutation of the range gives distinct ids without remembering any.
pub fn sample(seed: u64) -> impl Iterator<Item = u64> {
    (0..RANGE).map(move |index| {
        let mut at = shuffle(seed, index);
        // The network permutes 2^40 numbers; walking on until one is in the range permutes the range.
        while at >= RANGE {
            at = shuffle(seed, at);
        }
        FIRST + at
    })
}

/// A four-round Feistel network: a permutation whatever its round function is.
fn shuffle(seed: u64, number: u64) -> u64 {
    let (mut left, mut right) = ((number >> HALF_BITS) & HALF, number & HALF);
    for round in 0..4 {
        let mask = roll(seed, Question::SampleIds, right | round << HALF_BITS) & HALF;
        (left, right) = (right, left ^ mask);
    }
    left << HALF_BITS | right
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn ids_are_distinct_and_have_twelve_digits() {
        let ids: HashSet<u64> = sample(7).take(200_000).collect();
        assert_eq!(ids.len(), 200_000);
        assert!(ids.iter().all(|id| id.to_string().len() == 12));
    }

    #[test]
    fn a_seed_gives_the_same_ids_again_and_another_seed_others() {
        let take = |seed| sample(seed).take(100).collect::<Vec<_>>();
        assert_eq!(take(7), take(7));
        assert_ne!(take(7), take(8));
    }

    #[test]
    fn neighbours_in_the_sequence_are_far_apart() {
        let ids: Vec<u64> = sample(7).take(1_000).collect();
        let near = ids.windows(2).filter(|pair| pair[0].abs_diff(pair[1]) < 1_000_000).count();
        assert!(near < 5, "{near} of 1,000 neighbours differ by less than a million");
    }
}
