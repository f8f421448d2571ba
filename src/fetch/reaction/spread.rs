//! By how much the time of a call varies: an upper bound of the jitter that the pace has to cover. Pure.
//!
//! The pace counts with the variation of the *one-way* delay to the vendor, which nobody can measure from one end. What
//! can be measured is a call's whole time, from leaving to the last byte: way there, the vendor's work, way back, and a
//! new connection now and then. Since none of these is ever below its own minimum, the way there varies by no more
//! than the whole does. So a spread within the declared jitter proves the declaration right, and one beyond it proves
//! nothing: a vendor that takes 200 to 500 ms has a spread of 300 ms on a way that varies by two.
//!
//! Therefore the measurement never moves the pace. A pace that followed it would fall to a fifth at such a vendor (100/s
//! with a burst of 5) for no refusal at all. What moves the pace is the refusal itself ([`crate::quota::adapt`]): that
//! is the one sign of too much jitter, and a longer spacing is the answer to it. The spread is told along with the
//! refusal, so that whoever reads it can tell a way that varies from a limit that is wrong.

use std::time::Duration;

use tokio::time::Instant;

/// The calls of the last five to ten minutes.
#[derive(Debug)]
pub(super) struct Spread {
    running: Window,
    before: Window,
    began_at: Instant,
}

/// How many calls took how long: bucket `n` begins at `1.05ⁿ` times 100 µs.
#[derive(Debug)]
struct Window {
    least: Duration,
    calls: u64,
    buckets: Vec<u64>,
}

impl Default for Window {
    fn default() -> Self {
        Self { least: Duration::MAX, calls: 0, buckets: vec![0; Self::BUCKETS] }
    }
}

impl Window {
    /// Up to 100 µs × 1.05^300: four minutes, far beyond any time-out.
    const BUCKETS: usize = 300;
    const FIRST_S: f64 = 1e-4;
    const STEP: f64 = 1.05;

    fn note(&mut self, took: Duration) {
        self.least = self.least.min(took);
        self.calls += 1;
        let bucket = (took.as_secs_f64() / Self::FIRST_S).max(1.0).log(Self::STEP);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float is clamped, not cut")]
        let bucket = (bucket as usize).min(Self::BUCKETS - 1);
        self.buckets[bucket] += 1;
    }

    /// The upper end of a bucket.
    fn end(bucket: usize) -> Duration {
        let exponent = i32::try_from(bucket + 1).unwrap_or(i32::MAX);
        Duration::from_secs_f64(Self::FIRST_S * Self::STEP.powi(exponent))
    }
}

impl Spread {
    const WINDOW: Duration = Duration::from_secs(300);
    /// Fewer calls say nothing of the slowest in a thousand.
    const CALLS_MIN: u64 = 1_000;

    pub(super) fn new(now: Instant) -> Self {
        Self { running: Window::default(), before: Window::default(), began_at: now }
    }

    /// One call took so long.
    pub(super) fn note(&mut self, took: Duration, now: Instant) {
        if now - self.began_at > Self::WINDOW {
            self.before = std::mem::take(&mut self.running);
            self.began_at = now;
            tracing::debug!(spread = ?self.width(), calls = self.before.calls, "measured the spread of call times");
        }
        self.running.note(took);
    }

    /// From the quickest call to the slowest but one in a thousand, 5 % too much at most; `None` = too few calls.
    pub(super) fn width(&self) -> Option<Duration> {
        let calls = self.running.calls + self.before.calls;
        if calls < Self::CALLS_MIN {
            return None;
        }
        let mut slower = calls / 1_000;
        let counts = self.running.buckets.iter().zip(&self.before.buckets).map(|(now, then)| now + then);
        let counts: Vec<u64> = counts.collect();
        let slowest = counts.iter().enumerate().rev().find(|(_, count)| {
            let is_it = **count > slower;
            slower = slower.saturating_sub(**count);
            is_it
        });
        let least = self.running.least.min(self.before.least);
        slowest.map(|(bucket, _)| Window::end(bucket).saturating_sub(least))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::clock::Dice;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn it_is_the_distance_from_the_quickest_to_nearly_the_slowest() {
        let (dice, now) = (Dice::seeded(3), Instant::now());
        let mut spread = Spread::new(now);
        for call in 0..20_000 {
            // One in two thousand takes ten seconds.
            let took = if call % 2_000 == 0 { ms(10_000) } else { ms(200) + ms(300).mul_f64(dice.fraction()) };
            spread.note(took, now);
        }
        let width = spread.width().unwrap();
        assert!((ms(299)..ms(326)).contains(&width), "{width:?}");
    }

    #[test]
    fn a_few_calls_say_nothing_and_old_ones_are_forgotten() {
        let start = Instant::now();
        let mut spread = Spread::new(start);
        (0..999).for_each(|_| spread.note(ms(100), start));
        assert_eq!(spread.width(), None);
        spread.note(ms(900), start);
        (0..5_000).for_each(|_| spread.note(ms(800), start));
        assert!(spread.width().unwrap() > ms(600));
        for minute in [6, 12] {
            (0..2_000).for_each(|_| spread.note(ms(100), start + Duration::from_secs(minute * 60)));
        }
        assert!(spread.width().unwrap() < ms(6), "{:?}", spread.width());
    }

    #[test]
    fn any_time_has_a_place() {
        let now = Instant::now();
        let mut spread = Spread::new(now);
        for took in [Duration::ZERO, Duration::from_nanos(1), Duration::from_secs(86_400)] {
            (0..1_000).for_each(|_| spread.note(took, now));
        }
        assert!(spread.width().unwrap() > Duration::from_secs(200));
    }
}
