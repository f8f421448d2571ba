//! How a pace gives way to refusals and comes back: additive increase, multiplicative decrease. Pure.
//!
//! The pace of [`super::pace`] is refused nothing as long as what was configured is true: the vendor's limit, and the
//! jitter of the way there. A refusal says that one of them is not. Which one cannot be known, and need not be: the
//! spacing covers both (`T ≥ (1/r + J)/B`), so a longer one is right in either case. Each refusal makes it 5 % longer,
//! each minute of calls without one 0.1 % shorter, down to the plan (`engine.md`, section 5). A limit that was secretly
//! halved is met after 15 such steps, and then tried about once an hour.
//!
//! *One* burst of refusals is one step. A call that left before the step did so at the old pace, so that its refusal says
//! nothing of the new one; the same holds for the first few calls after it, which still pay for those before (TCP's rule
//! of one reduction per window, RFC 6582). So nobody needs to know how long a round trip is.
//!
//! Where the limit is not known at all the plan is a guess to begin with. It is *sought* first: twice as fast after each
//! minute of calls, until the first refusal; from then on by the small steps, in both directions.
//!
//! An account that may go as fast as it can has no pace to stretch. At its first refusal it gets one: the rate at which
//! slots were handed out lately.

use super::limit::Micros;

/// What a refusal makes of the spacing.
pub const SLOWER: f64 = 1.05;
/// By what share a minute of calls without a refusal shortens it.
pub const PROBE_PER_MINUTE: f64 = 0.001;
/// The longest spacing, in plans: slower than this, only a hold helps.
pub const STRETCH_MAX: f64 = 100.0;
/// The shortest spacing of a guess, in guesses.
pub const STRETCH_MIN: f64 = 0.001;
/// So many spacings after a step pay for the calls before it.
pub const DEAF: Micros = 4;
/// The longest gap between two slots that counts as a time of calls: who hardly calls learns little.
pub const QUIET_MAX: Micros = 10_000_000;

/// The shortest spacing that a search can come to which begins with this one.
#[must_use]
pub const fn least_of_guess(spacing: Micros) -> Micros {
    /// One by [`STRETCH_MIN`].
    const TIMES: Micros = 1_000;
    spacing / TIMES
}

const MINUTE: f64 = 60_000_000.0;
const SECOND: Micros = 1_000_000;

/// The state of one account, or of a source as a whole.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapt {
    /// What the spacing is multiplied by.
    stretch: f64,
    /// Refusals of calls that left before this are counted only.
    deaf_until: Micros,
    /// Up to here the time without refusals is counted; 0 = nothing was called yet.
    quiet_from: Micros,
    refused: u64,
    basis: Basis,
    /// The spacing that was measured where none was planned.
    learned: Micros,
    meter: Meter,
}

/// What the planned spacing is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Basis {
    /// What the vendor's limit comes down to: never exceeded.
    #[default]
    Known,
    /// A careful beginning, since nobody knows the limit.
    Guess,
    /// None: somebody said that there is no limit.
    Free,
}

/// Counts the slots of the second that is running and of the one before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Meter {
    from: Micros,
    slots: u64,
    before: u64,
}

impl Adapt {
    /// At the planned pace.
    #[must_use]
    pub fn new(basis: Basis) -> Self {
        let (stretch, meter) = (1.0, Meter::default());
        Self { stretch, deaf_until: 0, quiet_from: 0, refused: 0, basis, learned: 0, meter }
    }

    /// A slot at `at` was handed out: one more call without a refusal so far.
    pub fn slot(&mut self, at: Micros) {
        let quiet = if self.quiet_from == 0 { 0 } else { at.saturating_sub(self.quiet_from).min(QUIET_MAX) };
        self.quiet_from = self.quiet_from.max(at);
        if self.basis == Basis::Free && self.learned == 0 {
            return self.meter.count(at);
        }
        let fastest = if self.basis == Basis::Known { 1.0 } else { STRETCH_MIN };
        #[allow(clippy::cast_precision_loss, reason = "at most ten seconds")]
        let minutes = quiet as f64 / MINUTE;
        let is_sought = self.basis == Basis::Guess && self.refused == 0;
        let shorter = if is_sought { (-minutes).exp2() } else { 1.0 - PROBE_PER_MINUTE * minutes };
        self.stretch = (self.stretch * shorter).max(fastest);
    }

    /// The vendor refused a call that left at `left_at`, under this planned spacing. Whether that slows down.
    pub fn refuse(&mut self, left_at: Micros, now: Micros, planned: Micros) -> bool {
        self.refused += 1;
        if left_at < self.deaf_until {
            return false;
        }
        if planned == 0 && self.learned == 0 {
            self.learned = self.meter.spacing();
        }
        self.stretch = (self.stretch * SLOWER).min(STRETCH_MAX);
        self.deaf_until = now.max(left_at) + DEAF * self.spacing(planned, 1.0);
        self.quiet_from = self.quiet_from.max(now);
        true
    }

    /// The spacing that a planned one becomes, longer by `by`, which is what others ask for.
    #[must_use]
    pub fn spacing(&self, planned: Micros, by: f64) -> Micros {
        let base = if planned > 0 { planned } else { self.learned };
        stretched(base, self.stretch * by)
    }

    /// What the spacing is multiplied by.
    #[must_use]
    pub const fn stretch(&self) -> f64 {
        self.stretch
    }

    /// How many calls were refused.
    #[must_use]
    pub const fn refused(&self) -> u64 {
        self.refused
    }
}

impl Meter {
    fn count(&mut self, at: Micros) {
        if at >= self.from + SECOND {
            self.before = if at < self.from + 2 * SECOND { self.slots } else { 0 };
            (self.from, self.slots) = (at, 0);
        }
        self.slots += 1;
    }

    fn spacing(&self) -> Micros {
        SECOND / self.slots.max(self.before).max(1)
    }
}

/// Rounded up: later is always lawful.
#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a spacing is far below 2^52, and a float is clamped, not cut"
)]
pub(super) fn stretched(spacing: Micros, by: f64) -> Micros {
    // What divides into a whole number must not be rounded up for the last bit of a float.
    if (by - 1.0).abs() < f64::EPSILON { spacing } else { (spacing as f64 * by - 1e-6).ceil() as Micros }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MILLI: Micros = 1_000;
    const START: Micros = 1_700_000_000 * SECOND;
    const PLANNED: Micros = 100 * MILLI;

    /// Calls evenly at its own pace for so long, from `from` on.
    fn call(adapt: &mut Adapt, from: Micros, minutes: u64) -> Micros {
        let mut at = from;
        while at < from + minutes * 60 * SECOND {
            adapt.slot(at);
            at += adapt.spacing(PLANNED, 1.0);
        }
        at
    }

    #[test]
    fn a_burst_of_refusals_is_one_step_and_the_next_round_another() {
        let mut adapt = Adapt::new(Basis::Known);
        let left = |call: u64| START + call * PLANNED;
        // Five calls were under way; their refusals come 400 ms later.
        let steps: Vec<bool> = (0..5).map(|call| adapt.refuse(left(call), left(call) + 400 * MILLI, PLANNED)).collect();
        assert_eq!(steps, [true, false, false, false, false]);
        assert_eq!((adapt.spacing(PLANNED, 1.0), adapt.refused()), (105 * MILLI, 5));
        // Four spacings after the first refusal came.
        assert!(!adapt.refuse(left(4) + 419 * MILLI, left(20), PLANNED));
        assert!(adapt.refuse(left(4) + 420 * MILLI, left(20), PLANNED));
    }

    #[test]
    fn fifty_minutes_of_calls_without_a_refusal_undo_a_step_and_no_more() {
        let mut adapt = Adapt::new(Basis::Known);
        adapt.refuse(START, START, PLANNED);
        let at = call(&mut adapt, START, 40);
        assert!(adapt.stretch() > 1.005, "{}", adapt.stretch());
        call(&mut adapt, at, 20);
        assert!((adapt.stretch() - 1.0).abs() < f64::EPSILON, "never above the plan: {}", adapt.stretch());
    }

    #[test]
    fn a_time_without_calls_teaches_nothing() {
        let mut adapt = Adapt::new(Basis::Known);
        adapt.refuse(START, START, PLANNED);
        adapt.slot(START);
        adapt.slot(START + 86_400 * SECOND);
        assert!(adapt.stretch() > 1.049, "{}", adapt.stretch());
    }

    #[test]
    fn an_unknown_limit_is_sought_by_doubling_and_then_by_small_steps() {
        let mut adapt = Adapt::new(Basis::Guess);
        adapt.slot(START);
        let at = call(&mut adapt, START, 3);
        let found = adapt.stretch();
        assert!((0.12..0.13).contains(&found), "three doublings: {found}");
        adapt.refuse(at, at, PLANNED);
        call(&mut adapt, at, 5);
        assert!((adapt.stretch() / (found * SLOWER) - 0.995).abs() < 0.001, "{}", adapt.stretch());
    }

    #[test]
    fn who_may_go_as_fast_as_possible_gets_the_pace_it_had_at_the_first_refusal() {
        let mut adapt = Adapt::new(Basis::Free);
        for slot in 0..3_000 {
            adapt.slot(START + slot * 5 * MILLI);
        }
        assert_eq!(adapt.spacing(0, 1.0), 0);
        let now = START + 15 * SECOND;
        adapt.refuse(now, now, 0);
        assert_eq!(adapt.spacing(0, 1.0), 5_250, "200/s, and 5 % longer");
    }

    #[test]
    fn the_floor_is_a_hundredth_and_shares_come_on_top() {
        let mut adapt = Adapt::new(Basis::Known);
        let mut at = START;
        for _ in 0..1_000 {
            adapt.refuse(at, at, PLANNED);
            at += 100 * SECOND;
        }
        assert_eq!(adapt.spacing(PLANNED, 1.0), 100 * PLANNED);
        assert_eq!(Adapt::new(Basis::Known).spacing(PLANNED, 1.0 / 0.3), 333_334);
    }

    proptest! {
        #[test]
        fn whatever_happens_a_plan_is_never_exceeded_and_the_floor_is_kept(
            steps in prop::collection::vec((any::<bool>(), 0u64..5_000_000, 0u64..2_000_000), 1..300),
            planned in 1u64..10_000_000,
        ) {
            let (mut adapt, mut now) = (Adapt::new(Basis::Known), START);
            for (is_refusal, gap, age) in steps {
                now += gap;
                let before = adapt.stretch();
                if is_refusal {
                    adapt.refuse(now - age, now, planned);
                    prop_assert!(adapt.stretch() <= before * SLOWER + 1e-12 && adapt.stretch() >= before);
                } else {
                    adapt.slot(now);
                    prop_assert!(adapt.stretch() <= before);
                }
                let spacing = adapt.spacing(planned, 1.0);
                prop_assert!(spacing >= planned && spacing <= planned * 100);
            }
        }
    }
}
