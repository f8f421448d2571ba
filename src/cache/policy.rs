//! Cache policy: how long an answer is valid for a request, and when to refresh it early. Pure.
//!
//! An answer has two ends: until the *soft* one it is given again without a thought; from there to the *hard* one it is
//! given too, and the first request that finds a slot to spare makes a call instead. Beyond the hard one it is never
//! given, not even when the vendor is away.

use std::time::Duration;

use crate::{message::Status, runtime::clock::Timestamp};

/// Answers that come together must not end together: the soft end is up to so much earlier.
const SPREAD: f64 = 0.1;

/// So far ahead may another machine's clock be; an answer from beyond is not believed.
const AHEAD_MAX: Duration = Duration::from_secs(60);

/// How many calls in a row that brought the same make an item as steady as can be, or as lively.
const STEADY_MAX: i8 = 8;

/// The rules of one source, complete and checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Rules {
    /// From the vendor's answer to the soft end.
    pub fresh: Duration,
    /// To the hard end.
    pub kept: Duration,
    /// The hard end is up to so much later.
    pub jitter: Duration,
    /// To both ends, where there is no such item.
    pub absent: Duration,
    /// To both ends, where it is not for sale.
    pub off_shelf: Duration,
    /// `fresh` becomes at most so many times as long, and at least as short; from 1.
    pub stretch: f64,
    /// How eager early refreshes are; 1 = as in the paper, 0 = none.
    pub early: f64,
    /// Whether an answer that is kept stands in for an outage.
    pub stale_if_error: bool,
}

/// When an answer ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// When the vendor gave it.
    pub fetched_at: Timestamp,
    /// Its soft end.
    pub soft_at: Timestamp,
    /// Its hard end.
    pub hard_at: Timestamp,
    /// How long the call took.
    pub delta: Duration,
}

/// What is known of an item besides the answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Habit {
    /// How often the answer before was given again.
    pub hits: u32,
    /// Above 0: so many calls in a row brought the same; below: it keeps changing.
    pub steady: i8,
}

/// Whether an answer may be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Yes.
    Fresh,
    /// Yes; with a slot to spare a call is better.
    Due,
    /// No: it is older than this request allows. For an outage it may do.
    TooOld,
    /// No, to nobody.
    Ended,
}

impl Verdict {
    /// Whether the request can be answered with it.
    #[must_use]
    pub const fn is_usable(self) -> bool {
        matches!(self, Self::Fresh | Self::Due)
    }
}

/// Judges an answer for a request that allows `max_age`. `luck`: from 0 to 1, evenly.
///
/// With a `max_age` the request has said what it takes, and only the hard end goes before it. Without one, a request
/// is the likelier to refresh the answer early the nearer the soft end and the slower the call is (`XFetch`, Vattani et
/// al., PVLDB 8, 2015): so one of many that ask for a hot item does, before all of them have to.
#[must_use]
pub fn judge(ends: &Ends, now: Timestamp, max_age: Option<Duration>, early: f64, luck: f64) -> Verdict {
    if now >= ends.hard_at || ends.fetched_at.since(now) > AHEAD_MAX {
        return Verdict::Ended;
    }
    if let Some(most) = max_age {
        let is_enough = most > Duration::ZERO && now.since(ends.fetched_at) <= most;
        return if is_enough { Verdict::Fresh } else { Verdict::TooOld };
    }
    let ahead = ends.delta.as_secs_f64() * early * -luck.max(f64::MIN_POSITIVE).ln();
    let ahead = Duration::try_from_secs_f64(ahead).unwrap_or(Duration::MAX);
    if now.after(ahead) >= ends.soft_at { Verdict::Due } else { Verdict::Fresh }
}

/// Whether an answer may stand in for an outage: it is within its hard end, and the request does not insist on a call.
#[must_use]
pub fn stands_in(ends: &Ends, now: Timestamp, max_age: Option<Duration>) -> bool {
    max_age != Some(Duration::ZERO) && judge(ends, now, None, 0.0, 1.0).is_usable()
}

impl Rules {
    /// The ends of an answer that the vendor gave at `fetched_at`. `luck`: two numbers from 0 to 1, evenly.
    #[must_use]
    pub fn ends(
        &self,
        status: Status,
        fetched_at: Timestamp,
        delta: Duration,
        habit: Habit,
        [soft, hard]: [f64; 2],
    ) -> Ends {
        let (fresh, kept) = match status {
            Status::Found => (self.stretched(habit), self.kept),
            // Nobody is to miss for long that it has come back.
            Status::Absent => (self.absent, self.absent),
            Status::OffShelf => (self.off_shelf, self.off_shelf),
        };
        let later = if status == Status::Found { self.jitter.mul_f64(hard) } else { Duration::ZERO };
        let kept = kept + later;
        let fresh = fresh.mul_f64(1.0 - SPREAD * soft).min(kept);
        Ends { fetched_at, soft_at: fetched_at.after(fresh), hard_at: fetched_at.after(kept), delta }
    }

    /// `fresh` for an item of these habits: longer for a popular and for a steady one, shorter for one that keeps
    /// changing, within the bounds, and never beyond the hard end.
    #[must_use]
    pub fn stretched(&self, habit: Habit) -> Duration {
        // A thousand times as many hits count like ten doublings of which each adds a tenth.
        let popular = 1.0 + 0.1 * f64::from(habit.hits).ln_1p() / std::f64::consts::LN_2;
        let steady = f64::from(habit.steady.clamp(-STEADY_MAX, STEADY_MAX)) / 4.0;
        let factor = (popular * steady.exp2()).clamp(1.0 / self.stretch, self.stretch);
        self.fresh.mul_f64(factor).min(self.kept)
    }
}

impl Habit {
    /// The habits after a further call that brought the same as the last one, or something else; nothing is known
    /// after the first.
    ///
    /// One change weighs as much as two calls without: better too fresh than too old.
    #[must_use]
    pub fn after(self, is_same: bool) -> Self {
        let step = if is_same { 1 } else { -2 };
        Self { steady: self.steady.saturating_add(step).clamp(-STEADY_MAX, STEADY_MAX), ..self }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: Timestamp = Timestamp::from_millis(1_800_000_000_000);

    fn rules() -> Rules {
        let secs = Duration::from_secs;
        let (fresh, kept, jitter, absent, off_shelf) = (secs(300), secs(3_600), secs(60), secs(60), secs(120));
        Rules { fresh, kept, jitter, absent, off_shelf, stretch: 2.0, early: 1.0, stale_if_error: true }
    }

    fn before(age: Duration) -> Timestamp {
        Timestamp::from_millis(NOW.as_millis() - i64::try_from(age.as_millis()).unwrap())
    }

    fn found(age: Duration) -> Ends {
        rules().ends(Status::Found, before(age), Duration::from_millis(200), Habit::default(), [0.0, 0.0])
    }

    #[test]
    fn an_answer_is_fresh_then_due_then_ended() {
        for (secs, expected) in [
            (0, Verdict::Fresh),
            (298, Verdict::Fresh),
            (300, Verdict::Due),
            (3_599, Verdict::Due),
            (3_600, Verdict::Ended),
            (99_999, Verdict::Ended),
        ] {
            assert_eq!(judge(&found(Duration::from_secs(secs)), NOW, None, 1.0, 0.5), expected, "{secs} s");
        }
    }

    #[test]
    fn a_request_that_says_how_old_gets_no_older_and_zero_gets_a_call() {
        let ends = found(Duration::from_secs(600));
        let verdict = |secs| judge(&ends, NOW, Some(Duration::from_secs(secs)), 1.0, 0.5);
        assert_eq!([verdict(0), verdict(599), verdict(600)], [Verdict::TooOld, Verdict::TooOld, Verdict::Fresh]);
        let just_now = found(Duration::ZERO);
        assert_eq!(judge(&just_now, NOW, Some(Duration::ZERO), 1.0, 0.5), Verdict::TooOld);
        assert!(!stands_in(&just_now, NOW, Some(Duration::ZERO)), "who insists on a call gets one");
        assert!(stands_in(&ends, NOW, Some(Duration::from_secs(1))));
        assert!(!stands_in(&found(Duration::from_secs(3_600)), NOW, None), "never beyond the hard end");
    }

    #[test]
    fn an_answer_from_the_future_is_not_believed() {
        let ends = Ends { fetched_at: NOW.after(Duration::from_secs(61)), ..found(Duration::ZERO) };
        assert_eq!(judge(&ends, NOW, None, 0.0, 0.5), Verdict::Ended);
    }

    #[test]
    fn a_slow_call_is_begun_earlier_and_only_by_the_lucky() {
        let ends = Ends { delta: Duration::from_secs(2), ..found(Duration::from_secs(295)) };
        assert_eq!(judge(&ends, NOW, None, 1.0, 0.5), Verdict::Fresh);
        assert_eq!(judge(&ends, NOW, None, 1.0, 0.01), Verdict::Due);
        assert_eq!(judge(&ends, NOW, None, 0.0, 0.0), Verdict::Fresh, "switched off");
    }

    #[test]
    fn what_is_not_there_counts_for_less() {
        for (status, secs) in [(Status::Absent, 60), (Status::OffShelf, 120)] {
            let ends = rules().ends(status, NOW, Duration::ZERO, Habit { hits: 9, steady: 8 }, [0.0, 1.0]);
            assert_eq!((ends.soft_at, ends.hard_at), (NOW.after(Duration::from_secs(secs)), ends.soft_at));
        }
    }

    #[test]
    fn popular_and_steady_items_count_longer_and_lively_ones_less() {
        let secs = |hits, steady| rules().stretched(Habit { hits, steady }).as_secs();
        assert_eq!((secs(0, 0), secs(0, 4), secs(0, -4)), (300, 600, 150));
        assert!(secs(100, 0) > secs(10, 0) && secs(10, 0) > 300);
        assert_eq!((secs(u32::MAX, 8), secs(0, -8)), (600, 150), "within the bounds");
        let mut habit = Habit::default();
        for is_same in [true, true, true, false] {
            habit = habit.after(is_same);
        }
        assert_eq!(habit.steady, 1);
    }

    prop_compose! {
        fn any_rules()(fresh in 1u64..100_000, more in 0u64..1_000_000, jitter in 0u64..1_000, absent in 1u64..1_000,
                       stretch in 1.0f64..10.0) -> Rules {
            let secs = Duration::from_secs;
            Rules { fresh: secs(fresh), kept: secs(fresh + more), jitter: secs(jitter), absent: secs(absent),
                    off_shelf: secs(absent), stretch, ..rules() }
        }
    }

    proptest! {
        #[test]
        fn the_ends_stay_within_their_bounds(
            rules in any_rules(), hits: u32, steady: i8, luck in (0.0f64..1.0, 0.0f64..1.0),
        ) {
            let ends = rules.ends(Status::Found, NOW, Duration::ZERO, Habit { hits, steady }, [luck.0, luck.1]);
            let (soft, hard) = (ends.soft_at.since(NOW), ends.hard_at.since(NOW));
            let tick = Duration::from_millis(1);
            prop_assert!(soft <= hard && hard <= rules.kept + rules.jitter && hard + tick >= rules.kept);
            prop_assert!(soft <= rules.fresh.mul_f64(rules.stretch) + tick);
            let least = rules.fresh.mul_f64((1.0 - SPREAD) / rules.stretch);
            prop_assert!(soft + tick >= least);
        }

        #[test]
        fn nothing_is_given_beyond_the_hard_end_or_older_than_allowed(
            age in 0u64..10_000, luck in 0.0f64..1.0, most in proptest::option::of(0u64..10_000),
        ) {
            let (ends, most) = (found(Duration::from_secs(age)), most.map(Duration::from_secs));
            if judge(&ends, NOW, most, 1.0, luck).is_usable() {
                prop_assert!(NOW < ends.hard_at);
                prop_assert!(most.is_none_or(|most| Duration::from_secs(age) <= most && !most.is_zero()));
            }
        }

        #[test]
        fn more_hits_never_shorten_and_more_calm_never_either(hits in 0u32..1_000_000, steady in -8i8..8) {
            let at = |hits, steady| rules().stretched(Habit { hits, steady });
            prop_assert!(at(hits, steady) <= at(hits + 1, steady) && at(hits, steady) <= at(hits, steady + 1));
        }
    }
}
