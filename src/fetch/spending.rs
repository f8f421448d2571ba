//! What calls have cost so far, by batch and day, and which requests may still be called for. Pure.
//!
//! Each process counts its own. A day's budget that stops calls is a limit of the quota, which counts for the
//! fleet; here it is only watched when calls are to go on.

use std::collections::{HashMap, VecDeque};

use crate::{
    message::BatchId,
    quota::money::{Budgets, OnBudget},
    runtime::clock::Timestamp,
};

/// How many batches are counted at once; of those that were first heard of longest ago the count is forgotten.
const BATCHES: usize = 10_000;

/// What one source has spent.
#[derive(Debug, Default)]
pub(super) struct Spending {
    budgets: Option<Budgets>,
    batches: HashMap<BatchId, u64>,
    /// The batches, the oldest first.
    order: VecDeque<BatchId>,
    day: i64,
    in_day: u64,
}

/// A budget that a call has just used up.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Spent {
    Day(u64),
    Batch(BatchId, u64),
}

impl Spending {
    pub(super) fn new(budgets: Option<Budgets>) -> Self {
        Self { budgets, ..Self::default() }
    }

    /// Whether a call for this batch is still paid for; what is not ends as a dead letter.
    pub(super) fn may_call(&self, batch: Option<&BatchId>) -> bool {
        let Some(Budgets { per_batch: Some(allowed), on_budget: OnBudget::Stop, .. }) = &self.budgets else {
            return true;
        };
        batch.and_then(|batch| self.batches.get(batch)).copied().unwrap_or_default() < *allowed
    }

    /// Counts one call that leaves, for a request of this batch; which budget it has used up to the last call.
    pub(super) fn charge(&mut self, batch: Option<&BatchId>, now: Timestamp) -> Vec<Spent> {
        let Some(budgets) = self.budgets else { return Vec::new() };
        let mut spent = Vec::new();
        let day = budgets.day(now);
        if day != self.day {
            (self.day, self.in_day) = (day, 0);
        }
        self.in_day += 1;
        if budgets.on_budget == OnBudget::Warn && budgets.per_day == Some(self.in_day) {
            spent.push(Spent::Day(self.in_day));
        }
        if let (Some(batch), Some(allowed)) = (batch, budgets.per_batch) {
            let calls = self.count(batch);
            *calls += 1;
            if *calls == allowed {
                spent.push(Spent::Batch(batch.clone(), allowed));
            }
        }
        spent
    }

    /// A call that was counted did not leave.
    pub(super) fn refund(&mut self, batch: Option<&BatchId>) {
        self.in_day = self.in_day.saturating_sub(1);
        if let Some(calls) = batch.and_then(|batch| self.batches.get_mut(batch)) {
            *calls = calls.saturating_sub(1);
        }
    }

    fn count(&mut self, batch: &BatchId) -> &mut u64 {
        if !self.batches.contains_key(batch) {
            if self.order.len() >= BATCHES
                && let Some(oldest) = self.order.pop_front()
            {
                self.batches.remove(&oldest);
            }
            self.order.push_back(batch.clone());
        }
        self.batches.entry(batch.clone()).or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::money::{BudgetConfig, Money};

    fn spending(on_budget: OnBudget) -> Spending {
        let money = |text: &str| Money::parse(text).unwrap();
        let budget = BudgetConfig { per_day: Some(money("0.05")), per_batch: Some(money("0.02")), day_starts_at: None };
        Spending::new(Some(Budgets::new(money("0.01"), &budget, on_budget)))
    }

    fn batch(name: &str) -> BatchId {
        BatchId::new(name).unwrap()
    }

    #[test]
    fn a_batch_stops_when_its_money_is_spent_and_the_others_go_on() {
        let (mut spending, now) = (spending(OnBudget::Stop), Timestamp::from_millis(0));
        let (one, other) = (batch("one"), batch("other"));
        assert_eq!(spending.charge(Some(&one), now), []);
        assert!(spending.may_call(Some(&one)));
        assert_eq!(spending.charge(Some(&one), now), [Spent::Batch(one.clone(), 2)]);
        assert!(!spending.may_call(Some(&one)));
        assert!(spending.may_call(Some(&other)) && spending.may_call(None));
        spending.refund(Some(&one));
        assert!(spending.may_call(Some(&one)), "a call that did not leave costs nothing");
    }

    #[test]
    fn told_to_go_on_it_says_once_that_a_budget_is_spent() {
        let (mut spending, now) = (spending(OnBudget::Warn), Timestamp::from_millis(0));
        let one = batch("one");
        let spent: Vec<_> = (0..8).flat_map(|_| spending.charge(Some(&one), now)).collect();
        assert_eq!(spent, [Spent::Batch(one.clone(), 2), Spent::Day(5)]);
        assert!(spending.may_call(Some(&one)));
        let tomorrow = Timestamp::from_millis(86_400_000);
        let spent: Vec<_> = (0..8).flat_map(|_| spending.charge(None, tomorrow)).collect();
        assert_eq!(spent, [Spent::Day(5)]);
    }

    #[test]
    fn only_so_many_batches_are_counted() {
        let mut spending = spending(OnBudget::Stop);
        for number in 0..=BATCHES {
            spending.charge(Some(&batch(&format!("b{number}"))), Timestamp::from_millis(0));
        }
        assert_eq!((spending.batches.len(), spending.order.len()), (BATCHES, BATCHES));
        assert!(!spending.batches.contains_key(&batch("b0")));
    }
}
