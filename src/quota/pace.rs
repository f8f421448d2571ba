//! How far apart the slots of an account stand, so that the vendor's bucket never runs dry. Pure arithmetic.
//!
//! The vendor judges when calls *arrive*. Slots that leave evenly arrive unevenly: two calls may come closer
//! together by as much as the way to the vendor varies (J, the largest minus the smallest one-way delay). For
//! a bucket of B tokens that gains r a second, of any n + 1 calls in a row the last must not arrive before the
//! bucket has gained what the first B did not cover; in the worst case the first call is delayed by all of J
//! and the last by nothing. With an even spacing T that holds for every n exactly if
//!
//! > T ≥ 1/r and B·T ≥ 1/r + J, so T = max(1/r, (1/r + J) / B)
//!
//! (`engine.md` section 5; the reasoning of GCRA, the ATM Forum's Generic Cell Rate Algorithm, where J is the
//! cell delay variation and (B − 1)/r the tolerance). A burst of 1 + rJ therefore gives the full rate, and a
//! burst of 1 pays for every millisecond of jitter.
//!
//! A window of W that grants C calls asks that call n + C arrives at least W after call n, wherever the window
//! begins: C·T ≥ W + J, so T = (W + J)/C. Both are one inequality: *n calls apart by T cover a base time and
//! the jitter*, with n = B and base = 1/r for a bucket, n = C and base = W for a window. Of several limits the
//! largest T satisfies all.
//!
//! Our own lateness, between a slot and the moment its call leaves, is jitter too. What we allow ourselves is
//! part of T where nothing else covers it, but never more than costs a thirtieth of the rate ([`Pacing::guard`]).

use std::time::Duration;

use super::{
    Limit, Slot,
    limit::{Counting, div_ceil},
};

/// How far weir stays away from a vendor's limit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pacing {
    /// The share of the allowed rate that is left unused, since the vendor's clock and ours drift apart: NTP
    /// slews a clock by up to 0.0005, and even 0.00005 eats a burst of 5 within minutes. 0 to 0.5.
    pub margin: f64,
    /// How much the one-way delay to the vendor varies at most. The way through a home router or to another
    /// continent takes 50 ms and more; within a region over warm connections 10 ms are ample, which costs
    /// 10 calls/s with a burst of 2 or more nothing, and with a burst of 1 a tenth.
    pub jitter: Duration,
}

impl Default for Pacing {
    fn default() -> Self {
        Self { margin: 0.001, jitter: Duration::from_millis(10) }
    }
}

/// Why a pacing makes no sense.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum InvalidPacing {
    /// The margin is no share, or would leave nothing.
    #[error("margin = {found} must be from 0 to {} (0.001 leaves a thousandth of the rate unused)", Pacing::MARGIN_MAX)]
    Margin {
        /// What was given.
        found: f64,
    },
    /// Far more than any network.
    #[error("jitter = {found:?} is more than {:?}: give the variation of the one-way delay", Pacing::JITTER_MAX)]
    Jitter {
        /// What was given.
        found: Duration,
    },
}

impl Pacing {
    /// The largest margin.
    pub const MARGIN_MAX: f64 = 0.5;
    /// The largest jitter.
    pub const JITTER_MAX: Duration = Duration::from_secs(10);
    /// Later than this a slot is dropped even if the burst would cover it: a worker that was stalled for
    /// longer should ask anew.
    pub const LATENESS_MAX: Duration = Duration::from_millis(250);

    /// Checks what was read from a file.
    ///
    /// # Errors
    /// [`InvalidPacing`] says which number makes no sense.
    pub fn validate(&self) -> Result<(), InvalidPacing> {
        if !(0.0..=Self::MARGIN_MAX).contains(&self.margin) {
            return Err(InvalidPacing::Margin { found: self.margin });
        }
        if self.jitter > Self::JITTER_MAX {
            return Err(InvalidPacing::Jitter { found: self.jitter });
        }
        Ok(())
    }

    /// The spacing of the slots under one limit, in nanoseconds and rounded up.
    ///
    /// [`Self::guard`] counts as jitter too: whether a call left late or travelled slowly is all the same to
    /// the vendor. The margin stretches the whole spacing, jitter included, since it is time that drifts.
    #[must_use]
    pub fn spacing(&self, limit: &Limit) -> Duration {
        self.pace(std::slice::from_ref(limit)).spacing
    }

    /// How late a slot under one limit may be used without a refusal.
    #[must_use]
    pub fn lateness(&self, limit: &Limit) -> Duration {
        self.pace(std::slice::from_ref(limit)).lateness
    }

    /// The pace that satisfies all these limits together; those that are budgets do not matter here.
    ///
    /// Lateness is what is left over of the inequality: n·T − base − J. A quarter of that is ours, the rest
    /// stays with the network, whose delays nobody can foresee while our own lateness can be measured; and at
    /// least the guard. With 10 calls/s and a burst of 5 it is about 100 ms, so that a busy machine loses
    /// hardly a slot. T is the spacing before the margin: what is kept back for drifting clocks is not spent.
    #[must_use]
    pub fn pace(&self, limits: &[Limit]) -> Pace {
        let paced = || limits.iter().filter(|limit| limit.is_paced());
        let tightest = paced().map(|limit| self.tightest(limit)).max().unwrap_or_default();
        let lateness = paced().map(|limit| {
            let (calls, base) = covered(limit);
            let spare = tightest.saturating_mul(calls).saturating_sub(base + self.jitter);
            (spare / 4).max(self.guard(limit).min(spare))
        });
        let lateness = lateness.min().unwrap_or(Self::LATENESS_MAX).min(Self::LATENESS_MAX);
        Pace { spacing: stretch(tightest, self.margin), lateness }
    }

    /// How late a call may leave at least: a thirtieth of what the spacing has to cover anyway, so that it
    /// costs no more of the rate, but from [`Slot::GUARD_MIN`], below which no timer is, to [`Slot::GUARD`].
    #[must_use]
    pub fn guard(&self, limit: &Limit) -> Duration {
        ((covered(limit).1 + self.jitter) / 30).clamp(Slot::GUARD_MIN, Slot::GUARD)
    }

    /// The spacing if clocks did not drift.
    fn tightest(&self, limit: &Limit) -> Duration {
        let (calls, base) = covered(limit);
        limit.interval().max(div_ceil(base + self.jitter + self.guard(limit), calls))
    }
}

/// How fast the slots of an account, an address or a source may follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Between two slots; zero without a limit.
    pub spacing: Duration,
    /// How late a slot may be used.
    pub lateness: Duration,
}

/// So many spacings must cover so much time, and the jitter.
fn covered(limit: &Limit) -> (u32, Duration) {
    match limit.kind {
        Counting::Bucket => (limit.burst, limit.interval()),
        Counting::Fixed | Counting::Sliding => (limit.calls, limit.longest()),
    }
}

/// `spacing / (1 − margin)`, rounded up; the margin in millionths, so that the rest is exact.
fn stretch(spacing: Duration, margin: f64) -> Duration {
    const WHOLE: u128 = 1_000_000;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to 0..=500000 before")]
    let left_out = (margin.clamp(0.0, Pacing::MARGIN_MAX) * 1e6).ceil() as u128;
    let nanos = (spacing.as_nanos() * WHOLE).div_ceil(WHOLE - left_out.min(WHOLE / 2));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::quota::model::Bucket;

    fn limit(calls: u32, per_ms: u64, burst: u32) -> Limit {
        Limit::new(calls, Duration::from_millis(per_ms), burst).unwrap()
    }

    fn window(calls: u32, per_ms: u64) -> Limit {
        Limit::window(calls, Duration::from_millis(per_ms), Counting::Sliding).unwrap()
    }

    fn pacing(margin: f64, jitter_ms: u64) -> Pacing {
        Pacing { margin, jitter: Duration::from_millis(jitter_ms) }
    }

    /// How many of these calls, sent `spacing` apart and delayed by `delays`, the vendor refuses.
    fn refused(limit: &Limit, spacing: Duration, delays: impl Iterator<Item = Duration>) -> usize {
        let sent = (0u32..).map(|i| spacing * i);
        let mut arrivals: Vec<Duration> = sent.zip(delays).map(|(at, delay)| at + delay).collect();
        arrivals.sort_unstable();
        Bucket::new(limit).refused(arrivals)
    }

    /// The worst way: one call is held up for as long as possible, those behind it catch up with it.
    fn worst_delays(spacing: Duration, spread: Duration) -> impl Iterator<Item = Duration> {
        (0..2_000u32).map(move |i| spread.saturating_sub(spacing * i))
    }

    #[test]
    fn the_spacing_is_the_formula_of_the_design() {
        // The guard counts as jitter: a thirtieth, from 1 to 5 ms.
        let table = [
            (limit(100, 1_000, 5), pacing(0.0, 50), Duration::from_micros(12_400)),
            (limit(100, 1_000, 1), pacing(0.0, 50), Duration::from_millis(62)),
            (limit(100, 1_000, 5), pacing(0.0, 10), Duration::from_millis(10)),
            (limit(10, 1_000, 1), pacing(0.0, 20), Duration::from_millis(124)),
            (window(100, 1_000), pacing(0.0, 50), Duration::from_micros(10_550)),
            (limit(10, 1_000, 2), pacing(0.0, 45), Duration::from_millis(100)),
            (limit(60, 60_000, 1), pacing(0.0, 0), Duration::from_millis(1_005)),
            (limit(10, 1_000, 5), pacing(0.001, 10), Duration::from_nanos(100_100_101)),
        ];
        for (limit, pacing, expected) in table {
            assert_eq!(pacing.spacing(&limit), expected, "{limit:?} {pacing:?}");
        }
    }

    #[test]
    fn of_several_limits_the_slowest_sets_the_pace_and_budgets_do_not() {
        let pacing = pacing(0.0, 20);
        let day = window(1, 86_400_000);
        let pace = pacing.pace(&[limit(10, 1_000, 5), window(8, 1_000), day.clone()]);
        assert_eq!(pace.spacing, Duration::from_micros(128_125));
        // The window covers it barely, the bucket would cover more.
        assert_eq!(pace.lateness, Slot::GUARD);
        let free = Pace { spacing: Duration::ZERO, lateness: Pacing::LATENESS_MAX };
        assert_eq!(pacing.pace(&[day]), free);
    }

    #[test]
    fn settings_that_make_no_sense_are_refused() {
        assert_eq!(Pacing::default().validate(), Ok(()));
        for margin in [-0.1, 0.6, f64::NAN] {
            assert!(pacing(margin, 10).validate().is_err(), "{margin}");
        }
        assert!(pacing(0.0, 60_000).validate().is_err());
    }

    #[test]
    fn a_pace_faster_than_the_formula_is_caught_by_the_vendor() {
        // A test of the tests: the formula leaves nothing to spare, and the judge notices.
        for (limit, jitter) in [(limit(10, 1_000, 1), 20), (limit(100, 1_000, 5), 50), (limit(100, 1_000, 3), 5)] {
            let pacing = pacing(0.0, jitter);
            let spread = pacing.jitter + pacing.guard(&limit);
            let right = pacing.spacing(&limit);
            assert_eq!(refused(&limit, right, worst_delays(right, spread)), 0, "{limit:?}");
            let fast = right.mul_f64(0.99);
            assert!(refused(&limit, fast, worst_delays(fast, spread)) > 0, "{limit:?} at 1 % too fast");
        }
    }

    proptest! {
        #[test]
        fn the_vendor_never_refuses_however_the_delays_fall(
            calls in 1u32..500, per_ms in 1u64..5_000, burst in 1u32..30, jitter_ms in 0u64..300,
            margin in 0.0f64..0.01, shares in prop::collection::vec(0.0f64..=1.0, 300),
        ) {
            let (limit, pacing) = (limit(calls, per_ms, burst), pacing(margin, jitter_ms));
            let spread = pacing.jitter + pacing.guard(&limit);
            let spacing = pacing.spacing(&limit);
            prop_assert_eq!(refused(&limit, spacing, shares.iter().map(|share| spread.mul_f64(*share))), 0);
            let extremes = shares.iter().map(|share| if *share < 0.5 { Duration::ZERO } else { spread });
            prop_assert_eq!(refused(&limit, spacing, extremes), 0);
            prop_assert_eq!(refused(&limit, spacing, worst_delays(spacing, spread)), 0);
        }

        #[test]
        fn the_margin_also_covers_a_vendor_whose_clock_is_slow(
            calls in 1u32..500, burst in 1u32..10, jitter_ms in 0u64..50, drift in 0.0f64..0.000_9,
        ) {
            let (limit, pacing) = (limit(calls, 1_000, burst), pacing(0.001, jitter_ms));
            let seen = pacing.spacing(&limit).mul_f64(1.0 - drift);
            let spread = pacing.jitter + pacing.guard(&limit);
            prop_assert_eq!(refused(&limit, seen, worst_delays(seen, spread)), 0);
        }

        #[test]
        fn a_tighter_limit_or_more_jitter_is_never_faster(
            calls in 1u32..500, per_ms in 1u64..5_000, burst in 1u32..30, jitter_ms in 0u64..300,
        ) {
            let pacing = pacing(0.001, jitter_ms);
            let spacing = pacing.spacing(&limit(calls, per_ms, burst));
            prop_assert!(spacing >= pacing.spacing(&limit(calls + 1, per_ms, burst)));
            prop_assert!(spacing >= pacing.spacing(&limit(calls, per_ms, burst + 1)));
            let rougher = Pacing { jitter: pacing.jitter + Duration::from_millis(1), ..pacing };
            prop_assert!(rougher.spacing(&limit(calls, per_ms, burst)) >= spacing);
        }
    }

    proptest! {
        #[test]
        fn slots_used_as_late_as_allowed_are_never_refused_even_by_a_slow_clock(
            calls in 1u32..200, burst in 1u32..50, jitter_ms in 0u64..60, drift in 0.0f64..0.000_9,
            delays in prop::collection::vec((0.0..=1.0f64, 0.0..=1.0f64), 1..400),
        ) {
            let (limit, pacing) = (limit(calls, 1_000, burst), pacing(0.001, jitter_ms));
            let lateness = pacing.lateness(&limit);
            let seen = pacing.spacing(&limit).mul_f64(1.0 - drift);
            let delays = delays.iter().map(|(late, way)| lateness.mul_f64(*late) + pacing.jitter.mul_f64(*way));
            prop_assert_eq!(refused(&limit, seen, delays), 0);
            prop_assert_eq!(refused(&limit, seen, worst_delays(seen, lateness + pacing.jitter)), 0);
        }
    }
}
