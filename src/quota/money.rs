//! What calls cost, and how many of them a budget pays for. Pure; decimal, never floating point.

use std::fmt;

use rust_decimal::{Decimal, prelude::ToPrimitive};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{
    Counting, Limit,
    civil::{Calendar, StartsAt},
    limit::micros_since_1970,
};
use crate::runtime::clock::Timestamp;

/// An amount in whatever currency the vendor bills; written in quotes (`"0.02"`), above zero.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Money(Decimal);

impl Money {
    /// Reads an amount.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        match Decimal::from_str_exact(text.trim()) {
            Ok(amount) if amount > Decimal::ZERO => Ok(Self(amount)),
            Ok(_) | Err(_) => Err(format!("found {text:?}, allowed: an amount above zero, such as \"0.02\"")),
        }
    }
}

impl Money {
    /// So many times as much.
    #[must_use]
    pub fn times(self, calls: u64) -> Self {
        Self(self.0.saturating_mul(calls.into()))
    }
}

impl fmt::Display for Money {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Money {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for Money {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Money {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // A number without quotes would have been through floating point, where 0.1 is not a tenth.
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(de::Error::custom)
    }
}

/// `budget = { … }` of a source: how much may be spent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BudgetConfig {
    /// In each day.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_day: Option<Money>,
    /// For each batch, its retries included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_batch: Option<Money>,
    /// Any time at which a day begins, perhaps with a zone; without it, midnight UTC.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub day_starts_at: Option<StartsAt>,
}

/// What happens when a budget is spent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBudget {
    /// No more calls: those of a day wait for the next one, the rest of a batch ends as dead letters.
    #[default]
    Stop,
    /// Calls go on, and the log says so once for each day and batch.
    Warn,
}

/// How many whole calls a budget pays for.
#[must_use]
pub fn calls_allowed(budget: Money, cost: Money) -> u64 {
    // Division may round; a call that is not quite paid for is none.
    let Some(calls) = budget.0.checked_div(cost.0) else { return u64::MAX };
    let calls = calls.floor();
    let is_paid = calls.checked_mul(cost.0).is_some_and(|price| price <= budget.0);
    let calls = calls.to_u64().unwrap_or(u64::MAX);
    if is_paid { calls } else { calls.saturating_sub(1) }
}

/// A source's costs and budgets, in calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Budgets {
    /// What a call costs.
    pub cost: Money,
    /// Calls in each day.
    pub per_day: Option<u64>,
    /// Calls for each batch.
    pub per_batch: Option<u64>,
    /// Any time at which a day begins.
    pub day_starts_at: StartsAt,
    /// What happens beyond them.
    pub on_budget: OnBudget,
}

impl Budgets {
    /// In calls what is configured in money.
    #[must_use]
    pub fn new(cost: Money, budget: &BudgetConfig, on_budget: OnBudget) -> Self {
        let calls = |budget: Money| calls_allowed(budget, cost);
        Self {
            cost,
            per_day: budget.per_day.map(calls),
            per_batch: budget.per_batch.map(calls),
            day_starts_at: budget.day_starts_at.clone().unwrap_or_default(),
            on_budget,
        }
    }

    /// The limit that stops calls when the day's money is spent, for all accounts of the source together.
    #[must_use]
    pub fn day_limit(&self) -> Option<Limit> {
        let per_day = self.per_day.filter(|_| self.on_budget == OnBudget::Stop)?;
        Some(Limit {
            calls: u32::try_from(per_day).unwrap_or(u32::MAX),
            per: Self::DAY.into(),
            burst: 1,
            kind: Counting::Fixed,
            starts_at: Some(self.day_starts_at.clone()),
            spread: false,
        })
    }

    /// The number of the day that it is `at`.
    #[must_use]
    pub fn day(&self, at: Timestamp) -> i64 {
        if let Some(calendar) = Calendar::new(Self::DAY.into(), &self.day_starts_at) {
            return i64::try_from(calendar.number(micros_since_1970(at))).unwrap_or(i64::MAX);
        }
        let day = i64::try_from(Self::DAY.as_millis()).unwrap_or(i64::MAX);
        at.as_millis().saturating_sub(self.day_starts_at.at().as_millis()).div_euclid(day)
    }

    const DAY: std::time::Duration = std::time::Duration::from_secs(24 * 60 * 60);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn money(text: &str) -> Money {
        Money::parse(text).unwrap()
    }

    #[test]
    fn a_budget_pays_for_whole_calls() {
        let table = [
            ("50.00", "0.02", 2_500),
            ("10", "3", 3),
            ("0.3", "0.1", 3),
            ("0.01", "0.02", 0),
            ("1", "0.0000001", 10_000_000),
            ("79228162514264337593543950335", "0.0000000001", u64::MAX),
        ];
        for (budget, cost, calls) in table {
            assert_eq!(calls_allowed(money(budget), money(cost)), calls, "{budget} at {cost}");
        }
    }

    #[test]
    fn an_amount_is_a_decimal_in_quotes_above_zero() {
        for wrong in ["", "0", "-1", "free", "1,5", "1e9x"] {
            assert!(Money::parse(wrong).unwrap_err().contains("above zero"), "{wrong}");
        }
        let read = |text: &str| serde_json::from_str::<BudgetConfig>(text).map_err(|error| error.to_string());
        assert_eq!(read(r#"{"per_day": "50.00"}"#).unwrap().per_day, Some(money("50")));
        assert!(read(r#"{"per_day": 50.0}"#).unwrap_err().contains("expected a string"));
        assert_eq!(serde_json::to_string(&money("50.00")).unwrap(), "\"50.00\"");
    }

    #[test]
    fn days_begin_when_they_are_told_to() {
        let zoned =
            serde_json::json!({"per_day": "1", "day_starts_at": "2026-01-01T00:00:00-08:00[America/Los_Angeles]"});
        let zoned = Budgets::new(money("0.5"), &serde_json::from_value(zoned).unwrap(), OnBudget::Warn);
        let day = |text: &str| zoned.day(serde_json::from_value(text.into()).unwrap());
        assert_eq!(day("2026-07-01T06:59:59Z") + 1, day("2026-07-01T07:00:00Z"), "in summer");
        assert_eq!(day("2026-12-01T07:59:59Z") + 1, day("2026-12-01T08:00:00Z"), "in winter");
        let shanghai = "2026-01-01T00:00:00+08:00";
        let budget = serde_json::json!({"per_day": "1", "day_starts_at": shanghai});
        let budget: BudgetConfig = serde_json::from_value(budget).unwrap();
        let budgets = Budgets::new(money("0.5"), &budget, OnBudget::Stop);
        let at = |text: &str| budgets.day(serde_json::from_value(text.into()).unwrap());
        assert_eq!(at("2026-03-01T15:59:59Z") + 1, at("2026-03-01T16:00:00Z"));
        let limit = budgets.day_limit().unwrap();
        assert_eq!((limit.calls, limit.validate(), limit.is_paced()), (2, Ok(()), false));
        assert_eq!(Budgets { on_budget: OnBudget::Warn, ..budgets }.day_limit(), None);
    }

    proptest! {
        #[test]
        fn what_is_allowed_is_paid_for_and_one_more_is_not(budget in 1i64..1_000_000_000, cost in 1i64..100_000, scale in 0u32..6) {
            let (budget, cost) = (Money(Decimal::new(budget, 2)), Money(Decimal::new(cost, scale)));
            let calls = Decimal::from(calls_allowed(budget, cost));
            prop_assert!(calls * cost.0 <= budget.0);
            prop_assert!((calls + Decimal::ONE) * cost.0 > budget.0);
        }
    }
}
