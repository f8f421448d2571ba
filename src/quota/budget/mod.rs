//! A minute's or a day's allowance: what was spent is counted in buckets of time, so that no window of the
//! vendor's ever sees too much. Pure; times are microseconds since 1970.
//!
//! A window whose phase nobody tells, or a sliding one, may begin anywhere. Its length, and the jitter by which
//! calls arrive later than they left, touches at most `span` buckets in a row: as long as no `span` buckets in
//! a row hold more than is allowed, no window does. That costs about two buckets of a hundred, so 2 % of the
//! budget. A window of known phase is one bucket; calls near its border count on both sides of it. Those that follow a
//! calendar are numbered by that ([`super::civil`]).

pub mod spent;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use super::{
    Limit, Pacing,
    civil::Calendar,
    limit::{Counting, Micros, micros},
};

/// What may be spent, and how it is counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// In each `span` buckets in a row.
    pub calls: u64,
    /// The length of a bucket.
    pub width: Micros,
    /// The first bucket begins so long before 1970.
    pub shift: Micros,
    /// How many buckets in a row count together.
    pub span: u64,
    /// A call counts also for buckets that end so shortly before it …
    pub before: Micros,
    /// … or begin so shortly after it.
    pub after: Micros,
    /// Whether a process that knows nothing of the past takes everything for spent, and waits.
    pub learns: bool,
    /// Which windows the buckets are, if they follow a calendar: then not those of width and shift.
    pub calendar: Option<Arc<Calendar>>,
}

impl Rule {
    /// Into how many buckets a window of unknown phase is divided.
    const BUCKETS: u64 = 100;
    /// How far a vendor's clock may be from ours, for windows of known phase.
    const CLOCKS_APART: Duration = Duration::from_secs(2);
    /// A process that starts takes what shorter windows allow for spent by its predecessor; for a longer one it
    /// would stand still for too long.
    const LEARNED_MAX: Duration = Duration::from_secs(120);

    /// The rule for a limit that is a budget; `None` for one that is paced.
    #[must_use]
    pub fn of(limit: &Limit, pacing: &Pacing) -> Option<Self> {
        if limit.is_paced() {
            return None;
        }
        let late = micros(pacing.jitter + Pacing::LATENESS_MAX);
        let per = micros(*limit.per).max(1);
        let learns = *limit.per <= Self::LEARNED_MAX;
        let calls = limit.calls.into();
        if let (Counting::Fixed, Some(starts_at)) = (limit.kind, &limit.starts_at) {
            let apart = micros(Self::CLOCKS_APART);
            let (before, after) = (apart, apart + late);
            if let Some(calendar) = limit.calendar() {
                let (width, calendar) = (calendar.width(), Some(Arc::new(calendar)));
                return Some(Self { calls, width, shift: 0, span: 1, before, after, learns: false, calendar });
            }
            let starts = i128::from(starts_at.at().as_millis()) * 1_000;
            let shift = u64::try_from((-starts).rem_euclid(i128::from(per))).unwrap_or_default();
            return Some(Self { calls, width: per, shift, span: 1, before, after, learns, calendar: None });
        }
        let width = per.div_ceil(Self::BUCKETS);
        let span = (per + late).div_ceil(width) + 1;
        Some(Self { calls, width, shift: 0, span, before: 0, after: 0, learns, calendar: None })
    }

    /// The number of the bucket that a time is in.
    pub(super) fn index(&self, at: Micros) -> u64 {
        match &self.calendar {
            Some(calendar) => calendar.number(at),
            None => (at + self.shift) / self.width,
        }
    }

    /// When a bucket begins.
    pub(super) fn begin(&self, index: u64) -> Micros {
        match &self.calendar {
            Some(calendar) => calendar.begin(index),
            None => (index * self.width).saturating_sub(self.shift),
        }
    }

    /// The buckets for which a call counts.
    fn touched(&self, at: Micros) -> std::ops::RangeInclusive<u64> {
        self.index(at.saturating_sub(self.before))..=self.index(at + self.after)
    }
}

/// A budget and what is spent of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Budget {
    rule: Rule,
    /// Calls per bucket, the oldest first; no empty ones.
    spent: VecDeque<(u64, u64)>,
}

impl Budget {
    /// An untouched budget.
    #[must_use]
    pub const fn new(rule: Rule) -> Self {
        Self { rule, spent: VecDeque::new() }
    }

    /// What it is a budget of.
    #[must_use]
    pub const fn rule(&self) -> &Rule {
        &self.rule
    }

    /// Takes for spent what may have been before `now`, if the rule asks for it.
    pub fn learn(&mut self, now: Micros) {
        if self.rule.learns {
            self.add(self.rule.index(now), self.rule.calls);
        }
    }

    /// The earliest time from `at` on at which a call is within the budget.
    #[must_use]
    pub fn free_at(&self, mut at: Micros) -> Micros {
        while let Some(index) = self.rule.touched(at).find_map(|index| self.full_until(index)) {
            at = self.rule.begin(index) + self.rule.before;
        }
        at
    }

    /// If the buckets that end with this one are full: the first one for which enough of them are forgotten.
    fn full_until(&self, index: u64) -> Option<u64> {
        let counted = || self.spent.iter().filter(|(bucket, _)| bucket + self.rule.span > index);
        let mut used: u64 = counted().map(|(_, calls)| calls).sum();
        let mut until = None;
        for (bucket, calls) in counted() {
            if used < self.rule.calls {
                break;
            }
            used -= calls;
            until = Some(bucket + self.rule.span);
        }
        until
    }

    /// Counts a call that leaves at `at`.
    pub fn charge(&mut self, at: Micros) {
        for index in self.rule.touched(at) {
            self.add(index, 1);
        }
        let oldest = *self.rule.touched(at).start();
        while self.spent.front().is_some_and(|(bucket, _)| bucket + self.rule.span <= oldest) {
            self.spent.pop_front();
        }
    }

    /// Takes back a call that was counted at `at` and did not leave.
    pub fn refund(&mut self, at: Micros) {
        for index in self.rule.touched(at) {
            if let Some((_, calls)) = self.spent.iter_mut().find(|(bucket, _)| *bucket == index) {
                *calls = calls.saturating_sub(1);
            }
        }
        self.spent.retain(|(_, calls)| *calls > 0);
    }

    fn add(&mut self, index: u64, calls: u64) {
        // Times hardly ever go back, so that the place is at the end.
        let place = self.spent.iter().rposition(|(bucket, _)| *bucket <= index);
        match place.map(|place| (place, &mut self.spent[place])) {
            Some((_, (bucket, count))) if *bucket == index => *count += calls,
            Some((place, _)) => self.spent.insert(place + 1, (index, calls)),
            None => self.spent.push_front((index, calls)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        runtime::clock::Timestamp,
        simulate::limiter::{Limiter, Quota},
    };

    const SECOND: Micros = 1_000_000;
    /// 2023-11-14T22:13:20Z.
    const START: Micros = 1_700_000_000 * SECOND;

    fn budget(calls: u32, per_s: u64, starts_at: Option<i64>) -> Budget {
        let kind = if starts_at.is_some() { Counting::Fixed } else { Counting::Sliding };
        let limit = Limit::window(calls, Duration::from_secs(per_s), kind).unwrap();
        let limit = Limit { starts_at: starts_at.map(|at| Timestamp::from_millis(at).into()), ..limit };
        Budget::new(Rule::of(&limit, &Pacing::default()).unwrap())
    }

    /// Spends as fast as it goes.
    fn spend(budget: &mut Budget, from: Micros, until: Micros, gap: Micros) -> Vec<Micros> {
        let (mut at, mut spent) = (from, Vec::new());
        loop {
            at = budget.free_at(at);
            if at >= until {
                return spent;
            }
            budget.charge(at);
            spent.push(at);
            at += gap;
        }
    }

    #[test]
    fn a_minutes_calls_leave_as_they_are_needed_and_the_next_ones_a_minute_later() {
        let mut budget = budget(60, 60, None);
        let spent = spend(&mut budget, START, START + 600 * SECOND, 10_000);
        assert_eq!(spent[59] - spent[0], 590_000);
        assert!((60 * SECOND..62 * SECOND).contains(&(spent[60] - spent[0])), "{}", spent[60] - spent[0]);
        assert!(spent.len() >= 588, "98 % of 600: {}", spent.len());
    }

    #[test]
    fn a_day_that_begins_at_the_vendors_midnight_is_spent_to_the_last_call() {
        // Midnight in Shanghai: 16:00 UTC.
        let mut budget = budget(100, 86_400, Some(1_699_977_600_000));
        let midnight = 1_700_064_000 * SECOND;
        assert_eq!(spend(&mut budget, START, midnight - 10 * SECOND, SECOND).len(), 100);
        let next = budget.free_at(midnight - 10 * SECOND);
        assert_eq!(next, midnight + 2 * SECOND, "clocks may be two seconds apart");
        assert_eq!(spend(&mut budget, next, midnight + 80_000 * SECOND, SECOND).len(), 100);
    }

    #[test]
    fn a_day_and_a_month_of_a_zone_are_spent_to_the_last_call_across_a_change_of_the_clocks() {
        let at = |text: &str| u64::try_from(text.parse::<jiff::Timestamp>().unwrap().as_microsecond()).unwrap();
        let budget = |per: &str| {
            let starts_at = "2026-01-01T00:00:00-08:00[America/Los_Angeles]";
            let limit = serde_json::json!({"calls": 100, "per": per, "kind": "fixed", "starts_at": starts_at});
            let limit: Limit = serde_json::from_value(limit).unwrap();
            Budget::new(Rule::of(&limit, &Pacing::default()).unwrap())
        };
        // Summer time begins on March 8 and ends on November 1.
        let table = [
            ("1day", "2026-03-07T20:00:00Z", ["2026-03-08T08:00:02Z", "2026-03-09T07:00:02Z"]),
            ("1day", "2026-10-31T20:00:00Z", ["2026-11-01T07:00:02Z", "2026-11-02T08:00:02Z"]),
            ("1month", "2026-02-20T20:00:00Z", ["2026-03-01T08:00:02Z", "2026-04-01T07:00:02Z"]),
            ("1week", "2026-03-04T20:00:00Z", ["2026-03-05T08:00:02Z", "2026-03-12T07:00:02Z"]),
        ];
        for (per, from, begins) in table {
            let mut budget = budget(per);
            let mut from = at(from);
            for begin in begins {
                let spent = spend(&mut budget, from, from + 600 * SECOND, SECOND);
                assert_eq!((spent.len(), budget.free_at(from + 600 * SECOND)), (100, at(begin)), "{per}");
                from = at(begin);
            }
        }
    }

    #[test]
    fn what_is_taken_back_can_be_spent_again() {
        let mut budget = budget(2, 60, None);
        budget.charge(START);
        budget.charge(START + SECOND);
        assert!(budget.free_at(START + 2 * SECOND) > START + 50 * SECOND);
        budget.refund(START + SECOND);
        assert_eq!(budget.free_at(START + 2 * SECOND), START + 2 * SECOND);
    }

    #[test]
    fn who_knows_nothing_of_the_past_waits_for_a_minute_but_not_for_a_day() {
        let mut minute = budget(60, 60, None);
        minute.learn(START);
        assert!(minute.free_at(START) >= START + 60 * SECOND);
        let mut day = budget(60, 86_400, None);
        day.learn(START);
        assert_eq!(day.free_at(START), START);
    }

    proptest! {
        #[test]
        fn no_window_of_the_vendors_sees_too_much_wherever_it_begins(
            calls in 1u32..40, per_s in 11u64..100, phase_ms in 0u64..100_000, is_known: bool,
            gaps in prop::collection::vec(0u64..3_000_000, 50..400),
            delays in prop::collection::vec(0u64..260_000, 400),
        ) {
            let window = Duration::from_secs(per_s);
            let mut budget = budget(calls, per_s, is_known.then(|| i64::try_from(phase_ms).unwrap()));
            let (mut at, mut arrivals) = (START, Vec::new());
            for (gap, delay) in gaps.iter().zip(delays) {
                at = budget.free_at(at + gap);
                budget.charge(at);
                arrivals.push(Duration::from_micros(at + delay));
            }
            arrivals.sort_unstable();
            // The simulator's windows are shifted by what is left of one at its start.
            let since = Duration::from_millis(per_s * 1_000 - phase_ms % (per_s * 1_000));
            let fixed = Limiter::new(Quota::Fixed { calls, window }, since);
            let sliding = (!is_known).then(|| Limiter::new(Quota::Sliding { calls, window }, Duration::ZERO));
            for mut vendor in [Some(fixed), sliding].into_iter().flatten() {
                let refused = arrivals.iter().filter(|arrival| !vendor.admit(**arrival)).count();
                prop_assert_eq!(refused, 0);
            }
        }
    }
}
