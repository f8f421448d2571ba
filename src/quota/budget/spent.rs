//! What is spent of a budget as records have it, and back.

use super::{Budget, Rule};
use crate::{message::Spent, quota::limit::Micros};

/// More buckets than any rule has: a record with more is not ours.
const BUCKETS_MAX: usize = 4_096;

impl Budget {
    /// What is spent, for a record.
    #[must_use]
    pub fn spent(&self) -> Spent {
        spent(&self.rule, self.spent.iter().copied())
    }

    /// Takes the past for what it was, and `doubt` calls more that may have been made until `until`. Nothing else
    /// is taken for spent any more.
    pub fn recall(&mut self, past: &Spent, doubt: u64, until: Micros) {
        self.spent.clear();
        for (index, calls) in fitted(past, &self.rule) {
            self.add(index, calls);
        }
        self.doubt(doubt, until);
    }

    /// Takes so many calls for made at a time, as far as there is something left of the budget.
    pub fn doubt(&mut self, calls: u64, at: Micros) {
        let calls = calls.min(self.rule.calls);
        if calls > 0 {
            for index in self.rule.touched(at) {
                self.add(index, calls);
            }
        }
    }
}

/// Numbered buckets, in order, as a record has them.
#[must_use]
pub fn spent(rule: &Rule, buckets: impl Iterator<Item = (u64, u64)>) -> Spent {
    let buckets: Vec<(u64, u64)> = buckets.collect();
    let last = buckets.last().map_or(0, |bucket| bucket.0);
    // Older ones count no more for any call to come.
    let mut buckets = buckets.into_iter().filter(|bucket| bucket.0 + rule.span + 2 > last).peekable();
    let first = buckets.peek().map_or(0, |bucket| bucket.0);
    let mut calls = Vec::new();
    for (index, count) in buckets {
        let place = usize::try_from(index - first).unwrap_or(BUCKETS_MAX).min(BUCKETS_MAX);
        calls.resize(calls.len().max(place + 1), 0);
        calls[place] += count;
    }
    let (mut shift, mut calendar) = (rule.shift, None);
    if let Some(known) = &rule.calendar {
        let next = first + u64::try_from(calls.len()).unwrap_or_default();
        shift = next.saturating_mul(rule.width).saturating_sub(known.begin(next));
        calendar = Some(known.name().to_owned());
    }
    Spent { width: rule.width, shift, span: rule.span, calendar, first, calls }
}

/// The same in the buckets of a rule. If the limit has changed meanwhile, calls count where their old bucket ended:
/// never earlier than they were made.
pub fn fitted(past: &Spent, rule: &Rule) -> Vec<(u64, u64)> {
    let same = has_buckets_of(past, rule);
    let index = |number: u64| {
        let end = number.saturating_add(1).saturating_mul(past.width).saturating_sub(past.shift).saturating_sub(1);
        if same { number } else { rule.index(end) }
    };
    let calls = (past.first..).zip(past.calls.iter().take(BUCKETS_MAX + 1));
    calls.filter(|(_, calls)| **calls > 0).map(|(number, calls)| (index(number), *calls)).collect()
}

/// Of several accounts of the same past the larger, bucket by bucket: each may have been told of the others'.
#[must_use]
pub fn merged(mut one: Vec<Spent>, other: &[Spent]) -> Vec<Spent> {
    for spent in other {
        let same = |own: &&mut Spent| {
            let has_shift = own.shift == spent.shift || own.calendar.is_some();
            own.width == spent.width && own.calendar == spent.calendar && has_shift && own.span == spent.span
        };
        match one.iter_mut().find(same) {
            None => one.push(spent.clone()),
            Some(own) => merge(own, spent),
        }
    }
    one
}

fn merge(own: &mut Spent, other: &Spent) {
    let mut buckets = std::collections::BTreeMap::new();
    for spent in [&*own, other] {
        for (index, calls) in (spent.first..).zip(spent.calls.iter().take(BUCKETS_MAX + 1)) {
            let most: &mut u64 = buckets.entry(index).or_default();
            *most = (*most).max(*calls);
        }
    }
    buckets.retain(|_, calls| *calls > 0);
    // Of a calendar the one that ends last says how.
    let end = |spent: &Spent| spent.first + u64::try_from(spent.calls.len()).unwrap_or_default();
    let (width, span, calendar) = (own.width, own.span, own.calendar.take());
    let shift = if end(other) > end(own) { other.shift } else { own.shift };
    let (before, after, learns) = (0, 0, false);
    let rule = Rule { calls: 0, width, shift, span, before, after, learns, calendar: None };
    *own = Spent { calendar, ..spent(&rule, buckets.into_iter()) };
}

/// Whether a record's buckets are those of a rule.
fn has_buckets_of(past: &Spent, rule: &Rule) -> bool {
    match (&past.calendar, &rule.calendar) {
        (Some(past), Some(calendar)) => past == calendar.name(),
        (None, None) => past.width == rule.width && past.shift == rule.shift,
        (Some(_), None) | (None, Some(_)) => false,
    }
}

/// Whether a record speaks of this rule's limit, as it is or as it was.
#[must_use]
pub fn concerns(past: &Spent, rule: &Rule) -> bool {
    has_buckets_of(past, rule) && past.span == rule.span
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::quota::{Counting, Limit, Pacing};

    const SECOND: Micros = 1_000_000;
    const START: Micros = 1_700_000_000 * SECOND;

    fn budget(calls: u32, per_s: u64) -> Budget {
        let limit = Limit::window(calls, Duration::from_secs(per_s), Counting::Sliding).unwrap();
        Budget::new(Rule::of(&limit, &Pacing::default()).unwrap())
    }

    fn left(budget: &Budget, at: Micros) -> u64 {
        let (mut budget, mut left) = (budget.clone(), 0);
        while budget.free_at(at) == at {
            budget.charge(at);
            left += 1;
        }
        left
    }

    #[test]
    fn what_is_spent_survives_as_a_record_and_doubt_is_added_to_it() {
        let mut day = budget(100, 86_400);
        (0..20).for_each(|n| day.charge(START + n * 1_000 * SECOND));
        let now = START + 20_000 * SECOND;
        let text = serde_json::to_string(&day.spent()).unwrap();
        assert!(text.len() < 200, "{text}");
        let past: Spent = serde_json::from_str(&text).unwrap();
        let mut again = budget(100, 86_400);
        again.recall(&past, 0, now);
        assert_eq!((again.spent(), left(&again, now)), (day.spent(), 80));
        again.recall(&past, 30, now);
        assert_eq!(left(&again, now), 50);
        again.recall(&past, 1_000_000, now);
        assert_eq!(left(&again, now), 0);
        assert_eq!(left(&again, now + 90_000 * SECOND), 100, "a day later all of it is forgotten");
    }

    #[test]
    fn a_known_past_takes_the_place_of_waiting_for_a_window() {
        let mut minute = budget(60, 60);
        let mut past = budget(60, 60);
        (0..10).for_each(|n| past.charge(START + n * SECOND));
        minute.learn(START + 10 * SECOND);
        assert_eq!(left(&minute, START + 10 * SECOND), 0);
        minute.recall(&past.spent(), 0, START);
        assert_eq!(left(&minute, START + 10 * SECOND), 50);
    }

    #[test]
    fn a_changed_limit_counts_the_calls_no_earlier_than_they_were_made() {
        let mut day = budget(100, 86_400);
        (0..20).for_each(|n| day.charge(START + n * 1_000 * SECOND));
        let mut hour = budget(50, 3_600);
        let now = START + 20_000 * SECOND;
        hour.recall(&day.spent(), 0, now);
        let recent = 50 - left(&hour, now);
        assert!((3..=5).contains(&recent), "of the last hour 3 or 4 and perhaps one of the bucket before: {recent}");
    }

    #[test]
    fn a_month_of_a_calendar_is_remembered_by_its_number_and_by_another_limit_for_what_it_was() {
        let at = |text: &str| u64::try_from(text.parse::<jiff::Timestamp>().unwrap().as_microsecond()).unwrap();
        let budget = |per: &str, starts_at: &str| {
            let limit = serde_json::json!({"calls": 100, "per": per, "kind": "fixed", "starts_at": starts_at});
            Budget::new(Rule::of(&serde_json::from_value(limit).unwrap(), &Pacing::default()).unwrap())
        };
        let zoned = "2026-01-01T00:00:00-08:00[America/Los_Angeles]";
        let mut month = budget("1month", zoned);
        let now = at("2026-03-20T12:00:00Z");
        (0..60).for_each(|n| month.charge(now + n * SECOND));
        let record = month.spent();
        let read: Spent = serde_json::from_str(&serde_json::to_string(&record).unwrap()).unwrap();
        let mut again = budget("1month", zoned);
        again.recall(&read, 0, now);
        assert_eq!(left(&again, now + 60 * SECOND), 40);
        assert_eq!(left(&again, at("2026-04-01T07:00:02Z")), 100);
        // The same month, told in another way; and a length of time.
        let mut told = budget("1month", "2026-02-01T00:00:00-08:00[America/Los_Angeles]");
        told.recall(&read, 0, now);
        assert_eq!(left(&told, now + 60 * SECOND), 40);
        let mut days = budget("30days", "2026-03-03T00:00:00Z");
        days.recall(&read, 0, now);
        assert_eq!(left(&days, now + 60 * SECOND), 40);
        // Reports of two months come to the larger of each.
        let mut later = budget("1month", zoned);
        later.charge(at("2026-04-05T00:00:00Z"));
        let both = merged(vec![later.spent()], &[read]);
        assert_eq!((both.len(), &both[0].calls[..], both[0].shift), (1, &[60, 1][..], later.spent().shift));
    }

    #[test]
    fn of_two_reports_of_one_past_the_larger_counts_and_not_the_sum() {
        let (mut first, mut second) = (budget(100, 86_400), budget(100, 86_400));
        (0..10).for_each(|_| first.charge(START));
        second.recall(&first.spent(), 0, START);
        (0..5).for_each(|_| second.charge(START + 5_000 * SECOND));
        let both = merged(vec![first.spent()], &[second.spent()]);
        assert_eq!(both, vec![second.spent()]);
        assert_eq!(merged(Vec::new(), &both), both);
    }
}
