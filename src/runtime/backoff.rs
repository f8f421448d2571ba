//! Exponential backoff: pauses that double with each failure in a row. Pure: the caller sleeps.

use std::time::Duration;

/// The pause after `times` failures in a row before this one: `first` · 2^`times`, at most `longest`.
#[must_use]
pub fn doubled(first: Duration, times: u32, longest: Duration) -> Duration {
    first.saturating_mul(1_u32.checked_shl(times).unwrap_or(u32::MAX)).min(longest)
}

/// Counts failures in a row.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    times: u32,
}

impl Backoff {
    /// Pauses from `first` to `longest`.
    #[must_use]
    pub const fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, times: 0 }
    }

    /// Something has failed: how long to wait before the next attempt.
    #[must_use]
    pub fn failed(&mut self) -> Duration {
        let pause = doubled(self.first, self.times, self.longest);
        self.times = self.times.saturating_add(1);
        pause
    }

    /// It has worked: the next pause is the first again.
    pub const fn reset(&mut self) {
        self.times = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_second() {
        let mut pauses = Backoff::new(Duration::from_millis(10), Duration::from_secs(1));
        let first: Vec<_> = (0..9).map(|_| pauses.failed().as_millis()).collect();
        assert_eq!(first, [10, 20, 40, 80, 160, 320, 640, 1_000, 1_000]);
        assert_eq!((0..100).map(|_| pauses.failed()).max(), Some(Duration::from_secs(1)));
        pauses.reset();
        assert_eq!(pauses.failed(), Duration::from_millis(10));
    }

    #[test]
    fn no_number_of_failures_is_too_large() {
        for times in [31, 32, u32::MAX] {
            assert_eq!(doubled(Duration::from_millis(1), times, Duration::from_secs(60)), Duration::from_secs(60));
        }
    }
}
