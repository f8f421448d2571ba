//! The vendor's own limiters: token bucket, fixed window and sliding log, judged by arrival.

use std::{collections::VecDeque, time::Duration};

/// A quota as the vendor enforces it. A refused call costs nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Quota {
    /// `burst` calls at once, then one every `1 / rate` seconds.
    Bucket {
        /// Calls per second.
        rate: f64,
        /// Calls at once after a pause.
        burst: u32,
    },
    /// At most `calls` in each window; where the windows begin is the vendor's secret.
    Fixed {
        /// Calls per window.
        calls: u32,
        /// The window's length.
        window: Duration,
    },
    /// At most `calls` in any stretch of `window`.
    Sliding {
        /// Calls per stretch.
        calls: u32,
        /// The stretch's length.
        window: Duration,
    },
    /// No limit.
    None,
}

/// One account's limiter: pure, time is an argument.
///
/// # Ordering
/// Calls are judged in the order in which they are asked about. Two threads may ask in the other order than the
/// calls arrived (by microseconds); the later question then counts as arriving together with the earlier one.
#[derive(Clone, Debug)]
pub struct Limiter {
    latest: u64,
    rule: Rule,
}

/// All times in nanoseconds since the limiter's start.
#[derive(Clone, Debug)]
enum Rule {
    /// The bucket as a theoretical arrival time: exact in integers, no refill to round.
    Bucket {
        interval: u64,
        tolerance: u64,
        free_at: u64,
    },
    Fixed {
        calls: u32,
        window: u64,
        phase: u64,
        current: u64,
        used: u32,
    },
    Sliding {
        calls: usize,
        window: u64,
        admitted: VecDeque<u64>,
    },
    None,
}

impl Limiter {
    /// A limiter with its whole quota free. `phase` shifts the borders of fixed windows.
    #[must_use]
    pub fn new(quota: Quota, phase: Duration) -> Self {
        let rule = match quota {
            Quota::Bucket { rate, burst } => {
                let interval = nanos(Duration::try_from_secs_f64(1.0 / rate).unwrap_or(Duration::MAX));
                let tolerance = interval.saturating_mul(u64::from(burst.saturating_sub(1)));
                Rule::Bucket { interval, tolerance, free_at: 0 }
            }
            Quota::Fixed { calls, window } => {
                let window = nanos(window).max(1);
                Rule::Fixed { calls, window, phase: nanos(phase) % window, current: 0, used: 0 }
            }
            Quota::Sliding { calls, window } => Rule::Sliding {
                calls: usize::try_from(calls).unwrap_or(usize::MAX),
                window: nanos(window),
                admitted: VecDeque::new(),
            },
            Quota::None => Rule::None,
        };
        Self { latest: 0, rule }
    }

    /// Whether a call that arrived at `arrived` (since the start) is within the quota; if so it is spent.
    pub fn admit(&mut self, arrived: Duration) -> bool {
        let now = nanos(arrived).max(self.latest);
        self.latest = now;
        match &mut self.rule {
            Rule::Bucket { interval, tolerance, free_at } => {
                let admitted = *free_at <= now.saturating_add(*tolerance);
                if admitted {
                    *free_at = now.max(*free_at).saturating_add(*interval);
                }
                admitted
            }
            Rule::Fixed { calls, window, phase, current, used } => {
                let index = now.saturating_add(*phase) / *window;
                if index != *current {
                    (*current, *used) = (index, 0);
                }
                let admitted = *used < *calls;
                *used += u32::from(admitted);
                admitted
            }
            Rule::Sliding { calls, window, admitted } => {
                while admitted.front().is_some_and(|first| now - first >= *window) {
                    admitted.pop_front();
                }
                let within = admitted.len() < *calls;
                if within {
                    admitted.push_back(now);
                }
                within
            }
            Rule::None => true,
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// Whether one more call at `now` is lawful after all of `admitted`, straight from the definition.
    fn lawful(quota: Quota, phase: u64, admitted: &[u64], now: u64) -> bool {
        match quota {
            // A bucket of b filled at r is the same as: from any admitted call on, never more than b + r × time.
            Quota::Bucket { rate, burst } => {
                let interval = nanos(Duration::try_from_secs_f64(1.0 / rate).unwrap());
                burst > 0
                    && (0..admitted.len()).all(|from| {
                        let calls = (admitted.len() - from + 1) as u64;
                        calls * interval <= u64::from(burst) * interval + (now - admitted[from])
                    })
            }
            Quota::Fixed { calls, window } => {
                let index = |at: u64| (at + phase) / nanos(window);
                admitted.iter().filter(|at| index(**at) == index(now)).count() < calls as usize
            }
            Quota::Sliding { calls, window } => {
                admitted.iter().filter(|at| now - **at < nanos(window)).count() < calls as usize
            }
            Quota::None => true,
        }
    }

    fn quotas() -> impl Strategy<Value = Quota> {
        let window = || (50_u64..2_000).prop_map(Duration::from_millis);
        prop_oneof![
            (1_u32..200, 1_u32..20).prop_map(|(rate, burst)| Quota::Bucket { rate: f64::from(rate), burst }),
            (1_u32..20, window()).prop_map(|(calls, window)| Quota::Fixed { calls, window }),
            (1_u32..20, window()).prop_map(|(calls, window)| Quota::Sliding { calls, window }),
        ]
    }

    /// Gaps from a burst to a pause, many of them exactly on a border.
    fn gaps() -> impl Strategy<Value = Vec<u64>> {
        let gap = prop_oneof![Just(0), Just(SECOND / 10), Just(SECOND), 0..SECOND / 5, 0..3 * SECOND];
        prop::collection::vec(gap, 1..120)
    }

    proptest! {
        #[test]
        fn every_judgement_is_that_of_the_definition(quota in quotas(), phase in 0..SECOND, gaps in gaps()) {
            let mut limiter = Limiter::new(quota, Duration::from_nanos(phase));
            let phase = match quota {
                Quota::Fixed { window, .. } => phase % nanos(window),
                Quota::Bucket { .. } | Quota::Sliding { .. } | Quota::None => phase,
            };
            let (mut admitted, mut now) = (Vec::new(), 0);
            for gap in gaps {
                now += gap;
                let expected = lawful(quota, phase, &admitted, now);
                prop_assert_eq!(limiter.admit(Duration::from_nanos(now)), expected, "at {} after {:?}", now, &admitted);
                if expected {
                    admitted.push(now);
                }
            }
        }

        #[test]
        fn a_call_asked_about_late_counts_as_arriving_with_the_latest(quota in quotas(), gaps in gaps()) {
            let (mut swapped, mut sorted) = (Limiter::new(quota, Duration::ZERO), Limiter::new(quota, Duration::ZERO));
            let (mut now, mut latest) = (SECOND, 0);
            for (index, gap) in gaps.into_iter().enumerate() {
                now += gap;
                let asked = if index % 3 == 2 { now.saturating_sub(SECOND / 2) } else { now };
                latest = latest.max(asked);
                let expected = sorted.admit(Duration::from_nanos(latest));
                prop_assert_eq!(swapped.admit(Duration::from_nanos(asked)), expected);
            }
        }
    }

    #[test]
    fn a_bucket_lets_the_burst_through_and_then_the_rate() {
        let mut limiter = Limiter::new(Quota::Bucket { rate: 10.0, burst: 5 }, Duration::ZERO);
        let at_once = (0..20).filter(|_| limiter.admit(Duration::ZERO)).count();
        assert_eq!(at_once, 5);
        assert!(!limiter.admit(Duration::from_millis(99)));
        assert!(limiter.admit(Duration::from_millis(100)));
        assert!(!limiter.admit(Duration::from_millis(100)));
    }

    #[test]
    fn a_window_forgets_at_its_border_and_a_log_does_not() {
        let window = Duration::from_secs(1);
        let mut fixed = Limiter::new(Quota::Fixed { calls: 2, window }, Duration::ZERO);
        let mut sliding = Limiter::new(Quota::Sliding { calls: 2, window }, Duration::ZERO);
        let arrivals = [900, 950, 1_000, 1_050, 1_900];
        let judge = |limiter: &mut Limiter| arrivals.map(|ms| limiter.admit(Duration::from_millis(ms)));
        assert_eq!(judge(&mut fixed), [true, true, true, true, false]);
        assert_eq!(judge(&mut sliding), [true, true, false, false, true]);
    }

    #[test]
    fn no_limit_refuses_nothing() {
        let mut limiter = Limiter::new(Quota::None, Duration::ZERO);
        assert!((0..10_000).all(|_| limiter.admit(Duration::ZERO)));
    }
}
