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
    Spent { width: rule.width, shift: rule.shift, span: rule.span, first, calls }
}

/// The same in the buckets of a rule. If the limit has changed meanwhile, calls count where their old bucket ended:
/// never earlier than they were made.
pub fn fitted(past: &Spent, rule: &Rule) -> Vec<(u64, u64)> {
    let same = past.width == rule.width && past.shift == rule.shift;
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
        let same = |own: &&mut Spent| own.width == spent.width && own.shift == spent.shift && own.span == spent.span;
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
    let rule =
        Rule { calls: 0, width: own.width, shift: own.shift, span: own.span, before: 0, after: 0, learns: false };
    *own = spent(&rule, buckets.into_iter());
}

/// Whether a record speaks of this rule's limit, as it is or as it was.
#[must_use]
pub fn concerns(past: &Spent, rule: &Rule) -> bool {
    past.width == rule.width && past.shift == rule.shift && past.span == rule.span
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
