//! Pauses between questions to a broker that answers at once, but not with what is needed. Pure.

use std::time::Duration;

/// Pauses that double, from 10 ms to a second.
#[derive(Debug, Default)]
pub(super) struct Pauses(u32);

impl Pauses {
    const FIRST: Duration = Duration::from_millis(10);
    const LONGEST: Duration = Duration::from_secs(1);

    /// How long to wait before the next question.
    pub(super) fn next(&mut self) -> Duration {
        let pause = Self::FIRST.saturating_mul(1 << self.0.min(10)).min(Self::LONGEST);
        self.0 += 1;
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_second() {
        let mut pauses = Pauses::default();
        let first: Vec<_> = (0..9).map(|_| pauses.next().as_millis()).collect();
        assert_eq!(first, [10, 20, 40, 80, 160, 320, 640, 1_000, 1_000]);
        assert_eq!((0..100).map(|_| pauses.next()).max(), Some(Pauses::LONGEST));
    }
}
