//! A histogram of how late retries were sent. Pure.

use std::time::Duration;

/// Four steps to each doubling, up to an hour and a half and beyond.
const STEPS: usize = 88;

/// Counts requests by how late they were, to a quarter of an octave.
#[derive(Debug)]
pub struct Lateness {
    counts: [u64; STEPS],
}

/// What has been counted, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// How many requests.
    pub count: u64,
    /// Half of them were at most this late.
    pub half: u64,
    /// 99 in 100 of them were at most this late.
    pub nearly_all: u64,
}

impl Default for Lateness {
    fn default() -> Self {
        Self { counts: [0; STEPS] }
    }
}

impl Lateness {
    /// A request was sent so late.
    pub fn note(&mut self, late: Duration) {
        let step = step(u64::try_from(late.as_millis()).unwrap_or(u64::MAX));
        self.counts[step] = self.counts[step].saturating_add(1);
    }

    /// What has been noted since the last time, if anything.
    pub fn take(&mut self) -> Option<Told> {
        let counts = std::mem::take(self).counts;
        let count: u64 = counts.iter().sum();
        let at_most = |share: u64| {
            let (wanted, mut seen) = ((count * share).div_ceil(100), 0);
            let reached = |of: &u64| {
                seen += of;
                seen >= wanted
            };
            counts.iter().position(reached).map_or(0, longest)
        };
        (count > 0).then(|| Told { count, half: at_most(50), nearly_all: at_most(99) })
    }
}

/// Which counter is for so many milliseconds.
fn step(millis: u64) -> usize {
    if millis < 4 {
        return usize::try_from(millis).unwrap_or(0);
    }
    let octave = millis.ilog2();
    let quarter = (millis >> (octave - 2)) & 3;
    (octave as usize * 4 - 4 + usize::try_from(quarter).unwrap_or(0)).min(STEPS - 1)
}

/// The most milliseconds that a counter is for.
fn longest(step: usize) -> u64 {
    let step = step as u64;
    if step < 4 { step } else { ((5 + step % 4) << (step / 4 - 1)) - 1 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_share_is_told_and_then_forgotten() {
        let mut lateness = Lateness::default();
        assert_eq!(lateness.take(), None);
        for millis in 1..=1_000 {
            lateness.note(Duration::from_millis(millis));
        }
        assert_eq!(lateness.take(), Some(Told { count: 1_000, half: 511, nearly_all: 1_023 }));
        assert_eq!(lateness.take(), None);
        lateness.note(Duration::MAX);
        assert!(lateness.take().is_some_and(|told| told.half > 5_000_000));
    }

    proptest! {
        #[test]
        fn a_counter_tells_no_less_than_what_was_noted_and_at_most_a_quarter_more(millis in 0_u64..8_000_000) {
            let told = longest(step(millis));
            prop_assert!(told >= millis && told <= millis + millis / 4, "{millis} told as {told}");
        }
    }
}
