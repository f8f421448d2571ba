//! Dice without a memory: the same seed, question and number always fall the same way.
//!
//! A generator with a state would make an item's fate depend on who was asked before it.

/// What is being rolled for, so that two questions about one item are independent.
#[derive(Clone, Copy, Debug)]
pub(super) enum Question {
    /// Found, absent or off the shelf.
    Shelf = 1,
    /// Which kind of off the shelf.
    OffShelf,
    /// Throttled, failing, broken, hopeless or none of these.
    Trouble,
    /// How often a troubled item goes wrong.
    Times,
    /// How it goes wrong this time.
    Mishap,
    /// How long a reply takes.
    Latency,
    /// HTTP 200 or 401 for a refused token.
    TokenSpelling,
    /// The gateway's request id.
    RequestId,
    /// Where a fixed window begins.
    Phase,
    /// Keys, secrets and tokens.
    Credentials,
    /// What a product looks like.
    Product,
    /// Sample ids.
    SampleIds,
    /// How long a ban lasts.
    Ban,
    /// Which calls an outage on command strikes.
    Chaos,
}

/// 64 even bits for one question about one number.
pub(super) fn roll(seed: u64, question: Question, number: u64) -> u64 {
    mix(mix(seed ^ (question as u64) << 56).wrapping_add(number))
}

/// From 0 (included) to 1 (excluded).
pub(super) fn fraction(bits: u64) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "53 bits fit an f64 exactly")]
    let numerator = (bits >> 11) as f64;
    numerator / 9_007_199_254_740_992.0
}

/// A number from 0 (included) to `below` (excluded); 0 if `below` is 0.
pub(super) fn below(bits: u64, below: u64) -> u64 {
    u64::try_from((u128::from(bits) * u128::from(below)) >> 64).unwrap_or(0)
}

/// The next bits of a short sequence that starts with a roll.
pub(super) fn next(bits: &mut u64) -> u64 {
    *bits = bits.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mix(*bits)
}

/// The finaliser of `SplitMix64` (Steele, Lea, Flood 2014): every input bit reaches every output bit.
fn mix(bits: u64) -> u64 {
    let bits = bits.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_numbers_and_seeds_all_change_the_roll() {
        let first = roll(7, Question::Shelf, 584_051_070_147);
        assert_eq!(first, roll(7, Question::Shelf, 584_051_070_147));
        assert_ne!(first, roll(8, Question::Shelf, 584_051_070_147));
        assert_ne!(first, roll(7, Question::Trouble, 584_051_070_147));
        assert_ne!(first, roll(7, Question::Shelf, 584_051_070_148));
    }

    #[test]
    fn a_fraction_is_even_over_neighbouring_numbers() {
        let low = (0..100_000).filter(|id| fraction(roll(7, Question::Shelf, *id)) < 0.02).count();
        assert!((1_850..2_150).contains(&low), "{low} of 100,000 below 0.02");
    }

    #[test]
    fn a_number_below_stays_below() {
        assert_eq!(below(u64::MAX, 10), 9);
        assert_eq!(below(0, 10), 0);
        assert_eq!(below(u64::MAX, 0), 0);
    }
}
