//! The retry policy: when a failed request is tried again, or why it becomes a dead letter. Pure.
//!
//! A stage that holds a request back without having called for it (an open breaker, a paused account, a lost vendor)
//! writes a failure as for a call, whose attempt has a code that begins with [`Attempt::HELD_BACK`], such as
//! `weir.held.breaker`; its class says why. Such an attempt is never spent, whatever its class; the request comes again
//! at the attempt's `not_before`, else after a second, doubling to a minute with each time in a row. Rules do not
//! change that, since nothing has failed. Only `expires_at` ends it.
//!
//! The age limit counts from the first call, and ends a request only at a failure that spends an attempt: a throttle or
//! a refused account says nothing of the request, which waits as long as it takes. Unless a rule that names the class
//! sets an age limit for it.

use std::time::Duration;

use super::{
    config::{Config, Jitter, Policy},
    history,
};
use crate::{
    message::{Attempt, Class, Failure, Reason, Request, codec::REQUEST_LIMIT},
    runtime::clock::Timestamp,
};

/// What is to be done with a failed request. Either way it carries the failed attempt in its history.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// Send the request again.
    Again {
        /// Not before this time.
        at: Timestamp,
        /// The request with its history extended.
        request: Request,
    },
    /// Give it up.
    Dead {
        /// Why.
        reason: Reason,
        /// The same for people.
        message: String,
        /// The request with its history extended.
        request: Request,
    },
}

/// Decides about `failure` at `now`; `chance` is a random number from 0 to 1.
#[must_use]
pub fn decide(failure: &Failure, config: &Config, now: Timestamp, chance: f64) -> Decision {
    let policy = config.policy(&failure.source, &failure.attempt);
    let request = history::extended(&failure.request, &failure.attempt);
    match verdict(&request, &failure.attempt, &policy, now, chance) {
        Ok(at) => Decision::Again { at, request },
        Err((reason, message)) => Decision::Dead { reason, message, request },
    }
}

/// When the request is due, or why it has ended.
fn verdict(
    request: &Request,
    attempt: &Attempt,
    policy: &Policy,
    now: Timestamp,
    chance: f64,
) -> Result<Timestamp, (Reason, String)> {
    let last = format!("{} {}: {}", attempt.class.as_str(), attempt.code, attempt.message);
    if attempt.class == Class::Bug {
        return Err((Reason::Permanent, format!("the vendor rejects the request as wrong; {last}")));
    }
    let spent = request.attempts_spent();
    if spent >= policy.attempts {
        return Err((Reason::Exhausted, format!("all {spent} attempts failed; the last: {last}")));
    }
    if let Some(length) = history::too_long(request) {
        let message = format!(
            "even with a shortened history the request has {length} bytes, more than the {REQUEST_LIMIT} of a request \
             topic; the last: {last}"
        );
        return Err((Reason::Invalid, message));
    }
    let at = due(request, attempt, policy, now, chance);
    match end_of_life(request, policy) {
        Some((end, why)) if at > end => {
            Err((Reason::Expired, format!("its retry would be due at {at}, but {why} ends at {end}; the last: {last}")))
        }
        Some(_) | None => Ok(at),
    }
}

/// After which time the request is of no use, and why; `None`: it is of use for ever.
///
/// Its age counts from its first call: how long it had waited for that says nothing of the vendor.
fn end_of_life(request: &Request, policy: &Policy) -> Option<(Timestamp, &'static str)> {
    let expires = request.expires_at.map(|at| (at, "its expires_at"));
    let too_old = request.called_at.map(|at| (at.after(policy.age_limit), "the age limit since its first call"));
    expires.into_iter().chain(too_old).min_by_key(|(at, _)| *at)
}

/// When the request is due: never before the vendor's own time, if it gave one.
fn due(request: &Request, attempt: &Attempt, policy: &Policy, now: Timestamp, chance: f64) -> Timestamp {
    // From the failure, not from now: a restart of this stage makes nobody wait again. The other machine's
    // clock may be ahead.
    let failed = attempt.at.min(now);
    let told = attempt.not_before.filter(|told| *told > failed);
    let after = |times| failed.after(left_to_chance(backoff(policy, times), policy.jitter, chance));
    let at = if attempt.is_spent() {
        let waited = after(request.attempts_spent());
        told.map_or(waited, |told| told.max(waited))
    } else {
        told.unwrap_or_else(|| after(held_back_in_a_row(&request.history)))
    };
    at.max(now)
}

/// The longest delay after `times` failures: `base · factor^(times − 1)`, at most `cap`.
fn backoff(policy: &Policy, times: u32) -> Duration {
    let exponent = i32::try_from(times.saturating_sub(1)).unwrap_or(i32::MAX);
    let seconds = policy.base.as_secs_f64() * policy.factor.max(1.0).powi(exponent);
    Duration::try_from_secs_f64(seconds).unwrap_or(policy.cap).min(policy.cap)
}

/// How many throttles and the like came last, without an attempt that was spent.
fn held_back_in_a_row(history: &[Attempt]) -> u32 {
    u32::try_from(history.iter().rev().take_while(|attempt| !attempt.is_spent()).count()).unwrap_or(u32::MAX)
}

/// A delay of which some is left to chance; a number that is no share counts as all of it.
fn left_to_chance(delay: Duration, jitter: Jitter, chance: f64) -> Duration {
    let share = |of: Duration| if (0.0..=1.0).contains(&chance) { of.mul_f64(chance) } else { of };
    match jitter {
        Jitter::Full => share(delay),
        Jitter::Half => delay / 2 + share(delay / 2),
        Jitter::None => delay,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        message::{ItemId, Lane, RequestId, SourceName},
        retry::Rule,
    };

    const NOW: Timestamp = Timestamp::from_millis(1_700_000_000_000);

    fn after(seconds: u64) -> Timestamp {
        NOW.after(Duration::from_secs(seconds))
    }

    fn attempt(class: Class, at: Timestamp) -> Attempt {
        Attempt {
            at,
            account: None,
            class,
            code: "the.code".to_owned(),
            message: "the words".to_owned(),
            http_status: None,
            latency_ms: 5,
            not_before: None,
        }
    }

    /// The last of `classes` has just failed, the others stand in the history.
    fn failure(classes: &[Class]) -> Failure {
        let (last, earlier) = classes.split_last().unwrap();
        let mut request = Request::new(ItemId::new("1").unwrap());
        request.requested_at = Some(NOW);
        request.history = earlier.iter().map(|class| attempt(*class, NOW)).collect();
        Failure {
            request_id: RequestId::new("r1").unwrap(),
            source: SourceName::new("ali1688").unwrap(),
            request,
            attempt: attempt(*last, NOW),
            lane: Lane::Bulk,
        }
    }

    /// The standard policy, but for what `change` does to it.
    fn with(change: impl FnOnce(&mut Policy)) -> Config {
        let mut config = Config::default();
        change(&mut config.policy);
        config
    }

    fn due_in(failure: &Failure, jitter: f64) -> Duration {
        match decide(failure, &Config::default(), NOW, jitter) {
            Decision::Again { at, .. } => at.since(NOW),
            dead @ Decision::Dead { .. } => panic!("{dead:?}"),
        }
    }

    fn reason(failure: &Failure, config: &Config, now: Timestamp) -> Reason {
        match decide(failure, config, now, 1.0) {
            Decision::Dead { reason, .. } => reason,
            again @ Decision::Again { .. } => panic!("{again:?}"),
        }
    }

    use Class::{Bug, Denied, Malformed, Outage, Throttled};

    #[test]
    fn delays_grow_with_spent_attempts_and_with_throttles_in_a_row() {
        let table: &[(&[Class], u64)] = &[
            (&[Outage], 5_000),
            (&[Outage, Malformed], 10_000),
            (&[Outage, Throttled, Denied, Outage, Outage], 20_000),
            (&[Throttled], 1_000),
            (&[Denied], 1_000),
            (&[Throttled, Denied, Throttled], 4_000),
            (&[Throttled, Throttled, Outage, Throttled], 1_000),
            (&[Throttled; 40], 60_000),
        ];
        for (classes, expected) in table {
            assert_eq!(due_in(&failure(classes), 1.0).as_millis(), u128::from(*expected), "{classes:?}");
        }
        assert_eq!(due_in(&failure(&[Outage]), 0.0), Duration::ZERO, "full jitter begins at nothing");
        assert_eq!(due_in(&failure(&[Throttled]), 0.0), Duration::from_millis(500));
    }

    #[test]
    fn the_vendors_time_rules_throttles_and_delays_the_rest() {
        let mut throttled = failure(&[Throttled, Throttled, Throttled, Throttled]);
        throttled.attempt.not_before = Some(after(2));
        assert_eq!(due_in(&throttled, 1.0), Duration::from_secs(2), "neither earlier nor later");
        // "Retry-After: 0" tells nothing.
        throttled.attempt.not_before = Some(NOW);
        assert_eq!(due_in(&throttled, 1.0), Duration::from_secs(8));

        let mut outage = failure(&[Outage]);
        outage.attempt.not_before = Some(after(3));
        assert_eq!(due_in(&outage, 0.0), Duration::from_secs(3));
        assert_eq!(due_in(&outage, 1.0), Duration::from_secs(5));
    }

    #[test]
    fn the_delay_counts_from_the_failure_whatever_the_other_clock_shows() {
        let config = Config::default();
        let at = |failed: Timestamp| {
            let mut failure = failure(&[Outage]);
            failure.attempt.at = failed;
            match decide(&failure, &config, after(60), 1.0) {
                Decision::Again { at, .. } => at,
                dead @ Decision::Dead { .. } => panic!("{dead:?}"),
            }
        };
        assert_eq!(at(after(58)), after(63));
        assert_eq!(at(NOW), after(60), "due long ago: now");
        assert_eq!(at(after(3_600)), after(65), "a clock an hour ahead");
    }

    #[test]
    fn a_request_ends_for_the_first_reason_that_applies() {
        let config = Config::default();
        assert_eq!(reason(&failure(&[Bug]), &config, NOW), Reason::Permanent);
        assert_eq!(reason(&failure(&[Outage; 5]), &config, NOW), Reason::Exhausted);
        assert_eq!(reason(&failure(&[Outage]), &with(|policy| policy.attempts = 1), NOW), Reason::Exhausted);
        let mut five = vec![Throttled; 30];
        five.extend([Outage; 5]);
        assert_eq!(reason(&failure(&five), &config, NOW), Reason::Exhausted);
        let mut old = failure(&[Outage, Outage]);
        old.attempt.at = after(24 * 3_600);
        assert_eq!(reason(&old, &config, old.attempt.at), Reason::Expired);
        let mut short = failure(&[Outage]);
        short.request.expires_at = Some(after(4));
        assert_eq!(reason(&short, &config, NOW), Reason::Expired);
        short.request.expires_at = Some(after(5));
        assert_eq!(due_in(&short, 1.0), Duration::from_secs(5));
    }

    #[test]
    fn what_weir_itself_holds_back_spends_nothing_and_ends_only_when_the_user_says_so() {
        let mut config = with(|policy| policy.attempts = 1);
        config.rules = vec![Rule { attempts: Some(1), base: Some(Duration::from_secs(77)), ..Rule::default() }];
        let mut failure = failure(&[Outage]);
        failure.attempt.code = format!("{}breaker", Attempt::HELD_BACK);
        let mut now = NOW;
        let delays: Vec<u64> = (0..40)
            .map(|_| {
                let Decision::Again { at, request } = decide(&failure, &config, now, 1.0) else { panic!("ended") };
                assert_eq!(request.attempts_spent(), 0);
                failure.request = request;
                let delay = at.since(now).as_secs();
                now = at;
                failure.attempt.at = now;
                delay
            })
            .collect();
        assert_eq!(delays[..8], [1, 2, 4, 8, 16, 32, 60, 60]);
        failure.attempt.not_before = Some(now.after(Duration::from_secs(300)));
        let Decision::Again { at, .. } = decide(&failure, &config, now, 1.0) else { panic!("ended") };
        assert_eq!(at.since(now).as_secs(), 300, "who holds it back may know until when");
        failure.attempt.at = after(24 * 3_600 + 1);
        let decision = decide(&failure, &config, failure.attempt.at, 1.0);
        assert!(matches!(decision, Decision::Again { .. }), "nobody has called for it yet: {decision:?}");
        failure.request.expires_at = Some(after(24 * 3_600));
        assert_eq!(reason(&failure, &config, failure.attempt.at), Reason::Expired);
        failure.request.expires_at = None;
        // The next call that is made and fails is the only one that is allowed.
        failure.attempt.at = now;
        failure.attempt.code = "http.503".to_owned();
        assert_eq!(reason(&failure, &config, now), Reason::Exhausted);
    }

    #[test]
    fn a_dead_letter_says_why_and_has_the_whole_history() {
        let Decision::Dead { message, request, .. } = decide(&failure(&[Outage; 5]), &Config::default(), NOW, 0.5)
        else {
            panic!("five attempts are all")
        };
        assert_eq!(message, "all 5 attempts failed; the last: outage the.code: the words");
        assert_eq!(request.history.len(), 5);
    }

    #[test]
    fn when_it_was_first_called_is_kept_and_of_an_earlier_version_it_is_what_the_history_has() {
        let mut failure = failure(&[Outage, Outage, Outage]);
        failure.request.history[0].code = format!("{}breaker", Attempt::HELD_BACK);
        failure.request.history[1].at = after(60);
        failure.attempt.at = after(120);
        let Decision::Again { request, .. } = decide(&failure, &Config::default(), after(120), 1.0) else { panic!() };
        assert_eq!(request.called_at, Some(after(60)), "held back is not called");
        failure.request = Request { history: Vec::new(), ..request };
        let Decision::Again { request, .. } = decide(&failure, &Config::default(), after(120), 1.0) else { panic!() };
        assert_eq!(request.called_at, Some(after(60)), "whatever of the history is left out");
    }

    #[test]
    fn age_counts_from_the_first_call_and_a_throttle_ends_nothing_by_age() {
        let config = Config::default();
        let day = Duration::from_secs(24 * 3_600);
        let later = NOW.after(day + Duration::from_secs(1));
        for class in [Throttled, Denied, Outage] {
            let mut waited = failure(&[class]);
            waited.attempt.at = later;
            let decision = decide(&waited, &config, later, 1.0);
            assert!(
                matches!(decision, Decision::Again { .. }),
                "{class:?}: it waited for its first call: {decision:?}"
            );
        }
        for class in [Throttled, Denied] {
            let mut old = failure(&[Outage, class]);
            old.attempt.at = later.after(9 * day);
            let decision = decide(&old, &config, old.attempt.at, 1.0);
            assert!(matches!(decision, Decision::Again { .. }), "{class:?}: {decision:?}");
        }
        let mut old = failure(&[Throttled, Outage]);
        old.attempt.at = later;
        assert_eq!(
            reason(&old, &config, later),
            Reason::Expired,
            "its first call was a day ago, and the vendor is broken"
        );
        // Unless the user says so.
        let mut rules = config.clone();
        let hour = Some(Duration::from_secs(3_600));
        rules.rules = vec![Rule { classes: vec![Throttled], age_limit: hour, ..Rule::default() }];
        let mut throttled = failure(&[Throttled, Throttled]);
        throttled.attempt.at = after(3_601);
        assert_eq!(reason(&throttled, &rules, after(3_601)), Reason::Expired);
        throttled.request.expires_at = Some(after(3_600));
        assert_eq!(reason(&throttled, &config, after(3_601)), Reason::Expired);
    }

    #[test]
    fn a_long_history_loses_its_middle_but_no_spent_attempt() {
        let config = with(|policy| policy.attempts = 100);
        let mut failure = failure(&[Throttled]);
        for round in 0u32..400 {
            failure.attempt.latency_ms = round;
            failure.attempt.class = if round % 5 == 4 { Outage } else { Throttled };
            let Decision::Again { request, .. } = decide(&failure, &config, NOW, 0.5) else { break };
            assert_eq!(request.attempts_spent(), (round + 1) / 5, "round {round}");
            assert!(
                request.history.len() <= history::LIMIT.max((round as usize + 1) / 5 + history::SPARE_MIN),
                "round {round}"
            );
            assert_eq!(request.history.last(), Some(&failure.attempt));
            if round < 200 {
                let first: Vec<u32> = request.history.iter().take(5).map(|attempt| attempt.latency_ms).collect();
                assert!([0, 1, 2, 3, 4].starts_with(&first), "{first:?}");
            }
            failure.request = request;
        }
        assert_eq!(failure.request.attempts_spent(), 80);
    }

    fn class() -> impl Strategy<Value = Class> {
        prop::sample::select(Class::ALL.to_vec())
    }

    proptest! {
        #[test]
        fn a_request_is_never_due_early_nor_later_than_the_bound(
            classes in prop::collection::vec(class(), 1..70), jitter in -0.5f64..1.5,
            told in prop::option::of(-100i64..100_000), base_ms in 0u64..100_000, factor in 0.0f64..10.0,
        ) {
            let config = with(|policy| {
                *policy = Policy { base: Duration::from_millis(base_ms), factor, attempts: 60, ..*policy };
            });
            let mut failure = failure(&classes);
            failure.attempt.not_before = told.map(|told| Timestamp::from_millis(NOW.as_millis() + told));
            if let Decision::Again { at, request } = decide(&failure, &config, NOW, jitter) {
                let earliest = failure.attempt.not_before.unwrap_or(NOW).max(NOW);
                prop_assert!(at >= earliest);
                prop_assert!(at <= earliest.max(NOW.after(config.policy.cap.max(Duration::from_secs(60)))));
                prop_assert!(!failure.attempt.is_spent() || request.attempts_spent() < config.policy.attempts);
            }
        }

        #[test]
        fn the_bound_never_shrinks(spent in 1u32..2_000, factor in 0.0f64..1e9, base_ms in 0u64..10_000_000) {
            let policy = Policy { factor, base: Duration::from_millis(base_ms), ..Config::default().policy };
            prop_assert!(backoff(&policy, spent) <= backoff(&policy, spent + 1));
            prop_assert!(backoff(&policy, spent) <= policy.cap);
        }

        #[test]
        fn a_request_that_fails_ends_within_its_age_and_one_that_only_waits_does_not(
            classes in prop::collection::vec(class(), 1..20), jitter in 0.0f64..1.0,
        ) {
            let config = Config::default();
            let (mut failure, mut now) = (failure(&[Throttled]), NOW);
            let fails = classes.iter().any(|class| class.spends_an_attempt());
            // The same weather over and over.
            for round in 0..500 {
                failure.attempt = attempt(classes[round % classes.len()], now);
                let Decision::Again { at, request } = decide(&failure, &config, now, jitter) else {
                    prop_assert!(fails, "nothing has failed");
                    return Ok(());
                };
                prop_assert!(!failure.attempt.is_spent() || at <= NOW.after(config.policy.age_limit));
                prop_assert!(request.history.len() <= history::LIMIT);
                (failure.request, now) = (request, at);
            }
            prop_assert!(!fails, "still alive at {now}");
        }
    }
}
