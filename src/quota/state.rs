//! What is known of a source and its accounts at a moment: holds with their reasons, and what is spent.

use std::{collections::HashMap, sync::Arc};

use super::Scope;
use crate::{
    message::{Spent, codec::shorten},
    runtime::clock::Timestamp,
};

/// Why somebody does not call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// The vendor's code, or the operator's words.
    pub reason: Arc<str>,
    /// When it came to be.
    pub since: Timestamp,
}

impl Cause {
    /// The longest reason, in bytes; a longer one is cut.
    pub const REASON_LIMIT: usize = 200;

    /// A cause from a text that somebody else wrote.
    #[must_use]
    pub fn new(reason: &str, since: Timestamp) -> Self {
        Self { reason: shorten(reason, Self::REASON_LIMIT).into(), since }
    }
}

/// A hold with its reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Until when; `None`: disabled until an operator acts.
    pub until: Option<Timestamp>,
    /// Why.
    pub cause: Cause,
}

impl Held {
    /// Of two holds of one scope the one that lasts longer.
    #[must_use]
    pub fn longer(self, other: Self) -> Self {
        let lasts = |held: &Self| held.until.unwrap_or(Timestamp::from_millis(i64::MAX));
        if lasts(&other) > lasts(&self) { other } else { self }
    }
}

/// What is known of an account, or of the source as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Why it does not call.
    pub held: Option<Held>,
    /// What is spent of its budgets.
    pub spent: Vec<Spent>,
    /// When it may call next, if that is later than now and known.
    pub next_at: Option<Timestamp>,
    /// Of an account: index of the address that its calls leave from now.
    pub address: usize,
}

/// What is known of an address that calls leave from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressState {
    /// What the fleet calls it.
    pub name: String,
    /// Why no call leaves from it.
    pub held: Option<Held>,
    /// What is spent of its budgets.
    pub spent: Vec<Spent>,
}

/// What is known of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// When what is spent was counted.
    pub counted_at: Timestamp,
    /// The source as a whole.
    pub whole: State,
    /// Every address, by index.
    pub addresses: Vec<AddressState>,
    /// The accounts that were asked for.
    pub accounts: Vec<State>,
    /// Redis keeps the quota, and is away.
    pub cut_off: Option<CutOff>,
}

/// A worker that cannot reach Redis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CutOff {
    /// Since when it is away.
    pub since: Timestamp,
    /// Its lease is used up: no call leaves until Redis is back.
    pub stopped: bool,
}

impl CutOff {
    /// Why no call leaves, if none does; for `/ready`.
    #[must_use]
    pub fn reason(&self) -> Option<String> {
        let since = self.since;
        self.stopped.then(|| format!("calls stopped: Redis, which holds the quota, is unreachable since {since}; they resume when it is back. Is it running? Is redis.url right?"))
    }
}

/// The causes of the holds in force, and what has been released.
#[derive(Debug, Default)]
pub(super) struct Causes {
    held: HashMap<Scope, Cause>,
    released: HashMap<Scope, Timestamp>,
}

impl Causes {
    /// Takes a hold's cause, which counts if the hold is `longer` than what is in force; false if the hold has been
    /// released already.
    pub fn hold(&mut self, scope: Scope, cause: &Cause, longer: bool) -> bool {
        if self.released.get(&scope).is_some_and(|released| cause.since <= *released) {
            return false;
        }
        if longer || !self.held.contains_key(&scope) {
            self.held.insert(scope, cause.clone());
        }
        true
    }

    /// Takes a release; false if the hold in force is a newer one.
    pub fn release(&mut self, scope: Scope, as_of: Timestamp) -> bool {
        let released = self.released.entry(scope).or_insert(as_of);
        *released = as_of.max(*released);
        if self.held.get(&scope).is_some_and(|cause| cause.since > as_of) {
            return false;
        }
        self.held.remove(&scope);
        true
    }

    /// This is not held; what has been released stays so.
    pub fn forget_hold(&mut self, scope: Scope) {
        self.held.remove(&scope);
    }

    /// Why it is held.
    pub fn of(&self, scope: Scope) -> Cause {
        let unknown = || Cause { reason: "unknown".into(), since: Timestamp::default() };
        self.held.get(&scope).cloned().unwrap_or_else(unknown)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_millis(millis)
    }

    proptest! {
        #[test]
        fn holds_and_releases_come_to_the_same_in_any_order(
            hold_at in 0i64..20, releases in prop::collection::vec(0i64..20, 1..4), seed in 0usize..24,
        ) {
            let cause = Cause::new("slow down", at(hold_at));
            let mut steps: Vec<Option<i64>> = releases.iter().copied().map(Some).chain([None, None]).collect();
            let middle = seed % steps.len();
            steps.rotate_left(middle);
            let (mut causes, mut is_held) = (Causes::default(), false);
            for step in steps {
                match step {
                    None => is_held |= causes.hold(Scope::Source, &cause, true),
                    Some(as_of) => is_held &= !causes.release(Scope::Source, at(as_of)),
                }
            }
            prop_assert_eq!(is_held, releases.iter().all(|as_of| *as_of < hold_at));
        }
    }

    #[test]
    fn a_reason_is_cut_and_the_longer_hold_counts() {
        assert!(Cause::new(&"é".repeat(300), at(0)).reason.len() <= Cause::REASON_LIMIT + 3);
        let held = |until: Option<i64>| Held { until: until.map(at), cause: Cause::new("a", at(0)) };
        assert_eq!(held(Some(5)).longer(held(None)), held(None));
        assert_eq!(held(Some(5)).longer(held(Some(4))), held(Some(5)));
    }
}
