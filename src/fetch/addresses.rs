//! The health of the addresses that calls leave from: which one is taken out, for how long, and how it is tried
//! again. Pure.

use std::{collections::BTreeSet, time::Duration};

use tokio::time::Instant;

use crate::{platform::address::HealthConfig, runtime::clock::Timestamp};

/// The addresses of one source, by index.
#[derive(Debug)]
pub(super) struct Addresses {
    config: HealthConfig,
    states: Vec<State>,
}

#[derive(Clone, Debug, Default)]
struct State {
    /// Failed connections in a row.
    failures: u32,
    /// Accounts that the vendor has forbidden from here, and no answer since.
    forbidden: BTreeSet<usize>,
    forbidden_row: u32,
    /// How often it was taken out in a row.
    rests: u32,
    /// Taken out until then, and no call since.
    rests_until: Option<Instant>,
    /// Since when the others wait for the call that tries it.
    tried_at: Option<Timestamp>,
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
    /// How long the others wait for the call that probes an address, at most.
    const PROBE: Duration = Duration::from_secs(5);

    pub(super) fn new(config: HealthConfig, count: usize) -> Self {
        Self { config, states: vec![State::default(); count] }
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
        let State { rests, tried_at, .. } = std::mem::take(self.states.get_mut(address)?);
        (rests > 0).then_some(Back { tried_at })
    }

    /// A call leaves: for how long the others of its address wait for what comes of it, if they do.
    pub(super) fn probe(&mut self, address: usize, now: Timestamp) -> Option<Duration> {
        let state = self.states.get_mut(address)?;
        state.rests_until.take()?;
        state.tried_at = Some(now);
        Some(Self::PROBE.min(self.config.rest))
    }

    fn rest(&mut self, address: usize, now: Instant) -> Option<Duration> {
        let HealthConfig { rest, rest_max, .. } = self.config;
        let state = self.states.get_mut(address)?;
        // A call that had left before: this is known.
        if state.rests_until.is_some_and(|until| until > now) {
            return None;
        }
        let rest = rest.saturating_mul(1 << state.rests.min(16)).min(rest_max);
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
