//! What calls have cost so far, and which requests may still be called for.
//!
//! A batch's budget is spent out of a [`Purse`]. A day's budget that stops calls is a limit of the quota, which counts
//! for the fleet; here it is only watched when calls are to go on, and by each process for itself.

use std::sync::Arc;

use crate::{
    message::BatchId,
    quota::{
        Pay, Purse,
        money::{Budgets, OnBudget},
    },
    runtime::clock::Timestamp,
};

/// What one source has spent.
#[derive(Debug, Default)]
pub(super) struct Spending {
    budgets: Option<Budgets>,
    purse: Option<Arc<Purse>>,
    day: i64,
    in_day: u64,
}

impl Spending {
    pub(super) fn new(budgets: Option<Budgets>, purse: Option<Arc<Purse>>) -> Self {
        Self { budgets, purse, ..Self::default() }
    }

    /// Whether a call for this batch can be paid for, as far as is known; what cannot ends as a dead letter.
    pub(super) fn expect(&self, batch: Option<&BatchId>) -> Pay {
        let (Some(purse), Some(batch)) = (&self.purse, batch) else { return Pay::Go };
        purse.expect(batch)
    }

    /// Pays for a call that serves this batch too, unless that is among those that have paid for it.
    pub(super) fn pay(&self, batch: Option<&BatchId>, paid: &mut Vec<BatchId>) -> Pay {
        let (Some(purse), Some(batch)) = (&self.purse, batch) else { return Pay::Go };
        if paid.contains(batch) {
            return Pay::Go;
        }
        let pay = purse.charge(batch);
        if pay == Pay::Go {
            paid.push(batch.clone());
        }
        pay
    }

    /// Counts a call that leaves; how many there were, if the day's budget is spent with it and they are to go on.
    pub(super) fn count_call(&mut self, now: Timestamp) -> Option<u64> {
        let budgets = self.budgets.as_ref()?;
        let day = budgets.day(now);
        if day != self.day {
            (self.day, self.in_day) = (day, 0);
        }
        self.in_day += 1;
        let is_last = budgets.on_budget == OnBudget::Warn && budgets.per_day == Some(self.in_day);
        is_last.then_some(self.in_day)
    }

    /// A call that was paid for by these batches did not leave; without any there was no such call.
    pub(super) fn refund(&mut self, batches: &[Option<&BatchId>]) {
        if !batches.is_empty() {
            self.in_day = self.in_day.saturating_sub(1);
        }
        if let Some(purse) = &self.purse {
            batches.iter().flatten().for_each(|batch| purse.refund(batch));
        }
    }

    /// Batches whose budget was found spent since this was asked last.
    pub(super) fn newly_spent(&self) -> Vec<BatchId> {
        self.purse.as_ref().map(|purse| purse.newly_spent()).unwrap_or_default()
    }

    /// Waits until what was to wait can perhaps be paid for.
    ///
    /// # Cancellation
    /// Safe.
    pub(super) async fn changed(&self) {
        match &self.purse {
            Some(purse) => purse.changed().await,
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::{
        Past,
        money::{BudgetConfig, Money},
    };

    fn spending(on_budget: OnBudget) -> Spending {
        let money = |text: &str| Money::parse(text).unwrap();
        let budget = BudgetConfig { per_day: Some(money("0.05")), per_batch: Some(money("0.02")), day_starts_at: None };
        let budgets = Budgets::new(money("0.01"), &budget, on_budget);
        let purse = Purse::new(&budgets, &Past::default()).map(Arc::new);
        Spending::new(Some(budgets), purse)
    }

    fn batch(name: &str) -> BatchId {
        BatchId::new(name).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_stops_when_its_money_is_spent_and_the_others_go_on() {
        let mut spending = spending(OnBudget::Stop);
        let (one, other) = (batch("one"), batch("other"));
        let call = |spending: &Spending, batch: &BatchId| spending.pay(Some(batch), &mut Vec::new());
        assert_eq!([call(&spending, &one), call(&spending, &one)], [Pay::Go; 2]);
        assert_eq!((call(&spending, &one), spending.expect(Some(&one))), (Pay::Spent, Pay::Spent));
        assert_eq!((call(&spending, &other), spending.expect(None)), (Pay::Go, Pay::Go));
        assert_eq!((spending.newly_spent(), spending.newly_spent()), (vec![one.clone()], vec![]));
        let mut paid = vec![one.clone()];
        assert_eq!(spending.pay(Some(&one), &mut paid), Pay::Go, "a call is paid for once by each batch");
        spending.refund(&[Some(&one)]);
        assert_eq!(call(&spending, &one), Pay::Go, "a call that did not leave costs nothing");
    }

    #[tokio::test(start_paused = true)]
    async fn told_to_go_on_it_says_once_that_a_budget_is_spent() {
        let mut spending = spending(OnBudget::Warn);
        let (one, now) = (batch("one"), Timestamp::from_millis(0));
        let mut spent = Vec::new();
        for _ in 0..8 {
            assert_eq!(spending.pay(Some(&one), &mut Vec::new()), Pay::Go);
            spent.extend(spending.count_call(now));
            tokio::time::advance(std::time::Duration::from_secs(2)).await;
        }
        assert_eq!(spent, [5]);
        assert_eq!((spending.newly_spent(), spending.newly_spent()), (vec![one], vec![]));
        let tomorrow = Timestamp::from_millis(86_400_000);
        let spent: Vec<_> = (0..8).filter_map(|_| spending.count_call(tomorrow)).collect();
        assert_eq!(spent, [5]);
    }
}
