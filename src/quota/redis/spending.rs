//! What is spent in Redis, as a worker remembers it, and as records have it. No I/O.

use serde_json::{Value, json};

use crate::{
    message::{AccountAlias, Spent},
    quota::{
        Past,
        budget::{
            Rule,
            spent::{fitted, spent},
        },
        limit::Micros,
        past::PastOf,
        plan::{Plan, Rules},
    },
    runtime::clock::Timestamp,
};

/// What is spent of all budgets of a source.
#[derive(Debug, PartialEq, Eq)]
pub struct Spending {
    /// When it was counted, in microseconds; and the same in a record's terms.
    at: Micros,
    pub counted_at: Timestamp,
    pub source: Vec<Spent>,
    pub addresses: Vec<Vec<Spent>>,
    /// By index.
    pub accounts: Vec<Vec<Spent>>,
    names: Vec<String>,
}

fn time(at: Micros) -> Timestamp {
    Timestamp::from_millis(i64::try_from(at / 1_000).unwrap_or(i64::MAX))
}

impl Spending {
    /// What the script says; `None` if it is not what it should be.
    pub fn read(memory: &str, plan: &Plan, names: &[String]) -> Option<Self> {
        let memory: Value = serde_json::from_str(memory).ok()?;
        let at = memory["at"].as_str()?.parse().ok()?;
        let addresses = plan.addresses.iter().enumerate();
        let accounts = plan.accounts.iter().zip(names);
        Some(Self {
            at,
            counted_at: time(at),
            source: read_all(&plan.source, &memory["source"]),
            addresses: addresses.map(|(index, rules)| read_all(rules, &memory["addresses"][index])).collect(),
            accounts: accounts.map(|(plan, name)| read_all(&plan.rules, &memory["accounts"][name])).collect(),
            names: names.to_vec(),
        })
    }

    /// What reports say, for the budgets of this plan; counted so long ago as there is doubt.
    pub fn of(past: &Past, plan: &Plan, aliases: &[AccountAlias]) -> Self {
        let none = PastOf::default();
        let addresses = plan.addresses.iter().zip(&plan.address_names);
        let accounts = plan.accounts.iter().zip(aliases);
        let all = past.accounts.values().chain(past.addresses.values()).chain([&past.whole]);
        let until = all.map(|known| known.doubt_until).max().unwrap_or_default();
        let until = u64::try_from(until.as_millis()).unwrap_or_default() * 1_000;
        let at = until.saturating_sub(u64::try_from(past.doubt().as_micros()).unwrap_or(u64::MAX));
        Self {
            at,
            counted_at: time(at),
            source: known(&plan.source, &past.whole),
            addresses: addresses.map(|(of, name)| known(of, past.addresses.get(name).unwrap_or(&none))).collect(),
            accounts: accounts
                .map(|(plan, alias)| known(&plan.rules, past.accounts.get(alias).unwrap_or(&none)))
                .collect(),
            names: aliases.iter().map(|alias| alias.as_str().to_owned()).collect(),
        }
    }

    /// The same for the script.
    pub fn json(&self) -> String {
        let flat = |of: &Vec<Spent>| -> Vec<Vec<u64>> {
            let buckets = |spent: &Spent| {
                let calls = (spent.first..).zip(&spent.calls).filter(|(_, calls)| **calls > 0);
                calls.flat_map(|(index, calls)| [index, *calls]).collect()
            };
            of.iter().map(buckets).collect()
        };
        let accounts: serde_json::Map<String, Value> =
            self.names.iter().zip(&self.accounts).map(|(name, of)| (name.clone(), json!(flat(of)))).collect();
        json!({
            "at": self.at.to_string(), "source": flat(&self.source),
            "addresses": self.addresses.iter().map(flat).collect::<Vec<_>>(), "accounts": accounts,
        })
        .to_string()
    }
}

/// Flat lists of bucket and calls, one for each rule. An empty list may be an object: Lua has only tables.
fn read_all(rules: &Rules, lists: &Value) -> Vec<Spent> {
    let read = |(number, rule): (usize, &Rule)| {
        let list: Vec<u64> = lists[number].as_array().into_iter().flatten().filter_map(number_of).collect();
        spent(rule, list.chunks_exact(2).map(|pair| (pair[0], pair[1])))
    };
    rules.budgets.iter().enumerate().map(read).collect()
}

/// Lua writes large numbers as 1.6e+09.
fn number_of(value: &Value) -> Option<u64> {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "numbers of buckets and calls")]
    value.as_u64().or_else(|| value.as_f64().map(|number| number as u64))
}

fn known(rules: &Rules, past: &PastOf) -> Vec<Spent> {
    let of = |rule: &Rule| spent(rule, past.of(rule).map(|spent| fitted(spent, rule)).unwrap_or_default().into_iter());
    rules.budgets.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::quota::{
        Counting, Limit, Pacing,
        plan::{AccountLimits, Limits},
    };

    fn plan() -> Plan {
        let day = Limit::window(100, Duration::from_secs(86_400), Counting::Sliding).unwrap();
        let limits = vec![Limit::new(10, Duration::from_secs(1), 5).unwrap(), day];
        let account = AccountLimits { limits, ..AccountLimits::default() };
        Plan::new(&Limits { accounts: vec![account; 2], ..Limits::default() }, &Pacing::default())
    }

    #[test]
    fn what_the_script_remembers_is_read_and_written_again() {
        let memory = r#"{"at":"1700000000000000","source":{},"addresses":[{}],
            "accounts":{"a":[[1967592,7,1967594,2]],"b":[{}]}}"#;
        let names = ["a".to_owned(), "b".to_owned()];
        let spending = Spending::read(memory, &plan(), &names).unwrap();
        assert_eq!((spending.accounts[0][0].first, &*spending.accounts[0][0].calls), (1_967_592, &[7, 0, 2][..]));
        assert!(spending.accounts[1][0].calls.is_empty());
        assert_eq!(Spending::read(&spending.json(), &plan(), &names), Some(spending));
        assert_eq!(Spending::read("[]", &plan(), &names), None);
    }

    #[test]
    fn what_reports_say_is_counted_as_long_ago_as_there_is_doubt() {
        let aliases = ["a", "b"].map(|name| AccountAlias::new(name).unwrap());
        let at = Timestamp::from_millis(1_700_000_000_000);
        let spent = Spent { width: 864_000_000, shift: 0, span: 102, calendar: None, first: 1_967_592, calls: vec![7] };
        let known =
            PastOf { spent: vec![spent], counted_at: at, doubt_until: at.after(Duration::from_secs(3)), held: None };
        let past = Past { is_known: true, accounts: [(aliases[0].clone(), known)].into(), ..Past::default() };
        let spending = Spending::of(&past, &plan(), &aliases);
        assert_eq!((spending.counted_at, spending.accounts[0][0].calls.iter().sum::<u64>()), (at, 7));
        assert!(spending.accounts[1][0].calls.is_empty());
        assert!(!past.is_quiet());
    }
}
