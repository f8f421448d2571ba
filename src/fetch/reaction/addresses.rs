//! The health of the addresses that calls leave from: which one is taken out, for how long, and how it is tried
//! again. Pure.

use std::{collections::BTreeSet, time::Duration};

use tokio::time::Instant;

use crate::{
    platform::address::HealthConfig,
    runtime::{backoff::doubled, clock::Timestamp},
};

/// The addresses of one source, by index.
#[derive(Debug)]
pub(super) struct Addresses {
    config: HealthConfig,
    states: Vec<State>,
    /// How many calls were answered.
    answers: u64,
}

#[derive(Clone, Debug, Default)]
struct State {
    /// Failed connections in a row.
    failures: u32,
    /// Accounts that the vendor has forbidden from here, and no answer since.
    forbidden: BTreeSet<usize>,
    forbidden_row: u32,
    /// Replies in a row in which nothing was answered, and how many calls had been answered before the first of them.
    unanswered: u32,
    answers_before: u64,
    /// It was taken out for these.
    is_unanswered: bool,
    /// How often it was taken out in a row.
    rests: u32,
    /// Taken out until then, and no call since.
    rests_until: Option<Instant>,
    /// Since when the others wait for the call that tries it.
    tried_at: Option<Timestamp>,
    /// A reply through it said that the service is away until then.
    away_until: Option<Instant>,
}

/// Of whom a reply that says that the service is away says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Away {
    /// Of all: another address has heard the same, or there is no other.
    Source,
    /// Of this address, as far as is known: for how long it is taken out, unless it is already.
    Address(Option<Duration>),
}

/// An address is used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Back {
    /// As of when nobody needs to wait for the call any more that tried it, if anybody does.
    pub(super) tried_at: Option<Timestamp>,
}

impl Addresses {
    /// The vendor forbids so many accounts of one address: it means the address.
    const FORBIDDEN_ACCOUNTS: usize = 2;
    /// The same if only one account calls from it: so often in a row.
    const FORBIDDEN_ROW: u32 = 3;
    /// Replies in a row in which nothing is answered, while calls from other addresses are: it means the address.
    const UNANSWERED_ROW: u32 = 5;
    /// How long the others wait for the call that probes an address, at most.
    const PROBE: Duration = Duration::from_secs(5);

    pub(super) fn new(config: HealthConfig, count: usize) -> Self {
        Self { config, states: vec![State::default(); count], answers: 0 }
    }

    /// No connection through this address: for how long it is taken out now, if it is.
    pub(super) fn failed(&mut self, address: usize, now: Instant) -> Option<Duration> {
        let failures = self.config.failures;
        let state = self.states.get_mut(address)?;
        state.failures += 1;
        let is_out = state.failures >= failures || state.rests > 0;
        if is_out { self.rest(address, now) } else { None }
    }

    /// The vendor forbids an account to call from here without saying why (HTTP 403): for how long the address
    /// is taken out now, if it is.
    pub(super) fn forbidden(&mut self, address: usize, account: usize, now: Instant) -> Option<Duration> {
        let state = self.states.get_mut(address)?;
        state.failures = 0;
        state.forbidden.insert(account);
        state.forbidden_row += 1;
        let is_banned = state.forbidden.len() >= Self::FORBIDDEN_ACCOUNTS
            || state.forbidden_row >= Self::FORBIDDEN_ROW
            || state.rests > 0;
        if is_banned { self.rest(address, now) } else { None }
    }

    /// The vendor answered a call from here: something if it had been taken out before.
    pub(super) fn answered(&mut self, address: usize) -> Option<Back> {
        self.answers += 1;
        let State { rests, tried_at, .. } = std::mem::take(self.states.get_mut(address)?);
        (rests > 0).then_some(Back { tried_at })
    }

    /// A reply came to here that answers nothing, but is none of an outage either: something if the address had been
    /// taken out before for want of a connection.
    pub(super) fn replied(&mut self, address: usize) -> Option<Back> {
        let state = self.states.get_mut(address)?;
        if state.is_unanswered {
            return None;
        }
        let kept = State { unanswered: state.unanswered, answers_before: state.answers_before, ..State::default() };
        let State { rests, tried_at, .. } = std::mem::replace(state, kept);
        (rests > 0).then_some(Back { tried_at })
    }

    /// A reply came to here in which nothing was answered, by an outage or by what nobody understands: for how long the
    /// address is taken out now, if it is. Where no other address is answered either, it is not the address.
    pub(super) fn unanswered(&mut self, address: usize, now: Instant) -> Option<Duration> {
        let (answers, state) = (self.answers, self.states.get_mut(address)?);
        if state.unanswered == 0 {
            state.answers_before = answers;
        }
        state.unanswered = state.unanswered.saturating_add(1);
        // An answer to here would have ended the row.
        let others_are = answers > state.answers_before;
        if state.is_unanswered || (state.unanswered >= Self::UNANSWERED_ROW && others_are) {
            state.is_unanswered = true;
            return self.rest(address, now);
        }
        None
    }

    /// A call leaves: for how long the others of its address wait for what comes of it, if they do.
    pub(super) fn probe(&mut self, address: usize, now: Timestamp) -> Option<Duration> {
        let state = self.states.get_mut(address)?;
        state.rests_until.take()?;
        state.tried_at = Some(now);
        Some(Self::PROBE.min(self.config.rest))
    }

    /// A reply through this address says that the service is away for so long. A proxy or a gateway says so of itself as
    /// well as of the vendor.
    pub(super) fn away(&mut self, address: usize, wait: Duration, now: Instant) -> Away {
        let count = self.states.len();
        let Some(state) = self.states.get_mut(address) else { return Away::Source };
        state.away_until = Some(now + wait);
        let is_known = state.rests_until.is_some_and(|until| until > now);
        let agree = self.states.iter().filter(|state| state.away_until.is_some_and(|until| until > now)).count();
        if count < 2 || agree > 1 {
            return Away::Source;
        }
        if is_known {
            return Away::Address(None);
        }
        let state = &mut self.states[address];
        (state.rests, state.rests_until, state.tried_at) = (state.rests.max(1), Some(now + wait), None);
        Away::Address(Some(wait))
    }

    fn rest(&mut self, address: usize, now: Instant) -> Option<Duration> {
        let HealthConfig { rest, rest_max, .. } = self.config;
        let state = self.states.get_mut(address)?;
        // A call that had left before: this is known.
        if state.rests_until.is_some_and(|until| until > now) {
            return None;
        }
        let rest = doubled(rest, state.rests, rest_max);
        state.rests = state.rests.saturating_add(1);
        state.rests_until = Some(now + rest);
        state.tried_at = None;
        Some(rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const AT: Timestamp = Timestamp::from_millis(7);

    fn addresses() -> (Addresses, Instant) {
        (Addresses::new(HealthConfig::default(), 2), Instant::now())
    }

    #[test]
    fn three_failures_in_a_row_take_an_address_out_and_the_rest_doubles_up_to_ten_minutes() {
        let (mut addresses, mut now) = addresses();
        assert_eq!((addresses.failed(0, now), addresses.failed(0, now)), (None, None));
        let mut rests = vec![addresses.failed(0, now).unwrap().as_secs()];
        for _ in 0..6 {
            assert_eq!(addresses.failed(0, now), None, "of a call that had left before");
            now += SECOND * 600;
            assert_eq!(addresses.probe(0, AT), Some(5 * SECOND), "one call goes ahead");
            assert_eq!(addresses.probe(0, AT), None);
            rests.push(addresses.failed(0, now).unwrap().as_secs());
        }
        assert_eq!(rests, [30, 60, 120, 240, 480, 600, 600]);
        assert_eq!(addresses.failed(1, now), None, "the other one is well");
    }

    #[test]
    fn an_answer_ends_the_row() {
        let (mut addresses, now) = addresses();
        for _ in 0..10 {
            assert_eq!((addresses.failed(0, now), addresses.failed(0, now)), (None, None));
            assert_eq!(addresses.answered(0), None);
        }
        (0..3).for_each(|_| _ = addresses.failed(0, now));
        assert_eq!(addresses.answered(0), Some(Back { tried_at: None }), "it comes back, by a call of before");
        assert_eq!((addresses.probe(0, AT), addresses.failed(0, now)), (None, None));
    }

    #[test]
    fn who_waited_for_the_call_that_tried_an_address_is_released_when_it_is_answered() {
        let (mut addresses, now) = addresses();
        (0..3).for_each(|_| _ = addresses.failed(0, now));
        assert!(addresses.probe(0, AT).is_some());
        assert_eq!(addresses.answered(0), Some(Back { tried_at: Some(AT) }));
        assert_eq!(addresses.answered(0), None, "once");
        (0..3).for_each(|_| _ = addresses.failed(0, now));
        assert!(addresses.probe(0, AT).is_some());
        assert!(addresses.failed(0, now).is_some(), "it is still away: the new rest is not the call's to end");
        assert_eq!(addresses.answered(0), Some(Back { tried_at: None }));
    }

    #[test]
    fn a_service_is_away_for_all_once_two_addresses_say_so_at_the_same_time() {
        let (mut addresses, now) = addresses();
        assert_eq!(addresses.away(0, 60 * SECOND, now), Away::Address(Some(60 * SECOND)));
        assert_eq!(addresses.away(0, 60 * SECOND, now + SECOND), Away::Address(None), "it had left before");
        assert_eq!(addresses.away(1, 60 * SECOND, now + 61 * SECOND), Away::Address(Some(60 * SECOND)), "later");
        assert_eq!(addresses.away(0, 60 * SECOND, now + 62 * SECOND), Away::Source);
        assert!(addresses.answered(0).is_some() && addresses.answered(1).is_some());
        assert_eq!(addresses.away(0, 60 * SECOND, now), Away::Address(Some(60 * SECOND)), "both had answered");
        let mut alone = Addresses::new(HealthConfig::default(), 1);
        assert_eq!(alone.away(0, SECOND, now), Away::Source);
    }

    #[test]
    fn an_address_to_which_nothing_is_answered_is_taken_out_while_others_are_and_until_it_is() {
        let (mut addresses, now) = addresses();
        let row = |addresses: &mut Addresses| (0..5).filter_map(|_| addresses.unanswered(0, now)).collect::<Vec<_>>();
        assert_eq!((row(&mut addresses), row(&mut addresses)), (vec![], vec![]), "nobody is answered");
        addresses.answered(1);
        assert_eq!(addresses.unanswered(0, now), Some(30 * SECOND));
        assert_eq!(addresses.unanswered(0, now), None, "of a call that had left before");
        let now = now + 30 * SECOND;
        assert!(addresses.probe(0, AT).is_some());
        assert_eq!(addresses.replied(0), None, "a refusal is no answer");
        assert_eq!(addresses.unanswered(0, now), Some(60 * SECOND), "still");
        assert!(addresses.probe(0, AT).is_some());
        assert_eq!(addresses.answered(0), Some(Back { tried_at: Some(AT) }));
        assert_eq!(row(&mut addresses), [], "a new row");
    }

    #[test]
    fn an_address_whose_proxy_was_away_is_back_with_any_reply() {
        let (mut addresses, now) = addresses();
        (0..3).for_each(|_| _ = addresses.failed(0, now));
        assert!(addresses.replied(0).is_some());
        assert_eq!(addresses.replied(0), None);
    }

    #[test]
    fn two_forbidden_accounts_are_a_banned_address_and_one_is_none() {
        let (mut addresses, now) = addresses();
        assert_eq!(addresses.forbidden(0, 7, now), None);
        assert_eq!(addresses.forbidden(0, 7, now), None);
        assert_eq!(addresses.forbidden(1, 8, now), None, "another address");
        assert_eq!(addresses.forbidden(0, 9, now), Some(30 * SECOND));
        let (mut alone, now) = (Addresses::new(HealthConfig::default(), 1), now);
        let rests: Vec<_> = (0..3).map(|_| alone.forbidden(0, 7, now)).collect();
        assert_eq!(rests, [None, None, Some(30 * SECOND)]);
        assert_eq!(alone.forbidden(0, 7, now + 31 * SECOND), Some(60 * SECOND), "still banned after its rest");
    }
}
