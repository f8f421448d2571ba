//! What the ends of calls mean for the calls to come.

use std::time::Duration;

use tokio::time::Instant;

use crate::{
    fetch::{
        Config,
        call::{Advice, Contact, Ended},
        tests::{ended, held, stage},
    },
    platform::{Affected, HttpReply, RefusalKind},
    quota::{Quota as _, Scope},
    runtime::clock::Timestamp,
};

fn replied_with(status: u16, retry_after: u64, used_up: u64) -> Advice {
    let [retry_after, used_up] = [retry_after, used_up].map(|n| (n > 0).then(|| n.to_string()));
    let lines =
        [("retry-after", retry_after), ("x-ratelimit-remaining", Some("0".to_owned())), ("x-ratelimit-reset", used_up)];
    let lines = lines.into_iter().filter_map(|(name, value)| Some((name, value?)));
    Advice::of(&HttpReply::new(status, "", Timestamp::from_millis(0)).with_headers(lines))
}

#[tokio::test(start_paused = true)]
async fn a_quota_that_is_used_up_holds_the_account_though_the_reply_was_good() {
    for (heed_hints, seconds) in [(true, 40), (false, 0)] {
        let (mut fetch, quota) = stage(Config { heed_hints, ..Config::default() });
        fetch.end_calls(ended(Instant::now(), replied_with(200, 0, 40), None)).await.unwrap();
        assert_eq!(held(&quota, 0).as_secs(), seconds);
        assert_eq!(held(&quota, 1).as_secs(), 0, "the other account goes on");
    }
    let (mut fetch, quota) = stage(Config::default());
    fetch.end_calls(ended(Instant::now(), replied_with(200, 0, 1), None)).await.unwrap();
    assert_eq!(held(&quota, 0).as_secs(), 0, "whole seconds say nothing of less than one");
}

#[tokio::test(start_paused = true)]
async fn a_service_that_is_away_and_says_for_how_long_is_called_by_nobody() {
    let (mut fetch, quota) = stage(Config::default());
    let outage = Some(RefusalKind::Outage);
    fetch.end_calls(ended(Instant::now(), replied_with(502, 30, 0), outage.clone())).await.unwrap();
    assert_eq!(held(&quota, 1).as_secs(), 0, "Retry-After belongs to 503");
    fetch.end_calls(ended(Instant::now(), replied_with(503, 30, 0), outage)).await.unwrap();
    assert_eq!((held(&quota, 0).as_secs(), held(&quota, 1).as_secs()), (30, 30));
    assert_eq!(quota.pace(Scope::Source).refused, 0, "an outage is no sign of a wrong pace");
    let counts = fetch.tally().of(0);
    assert_eq!((counts.calls, counts.refused), (2, 0), "an outage is no refusal");
}

#[tokio::test(start_paused = true)]
async fn a_burst_of_throttles_is_one_rest_and_one_step_of_the_pace() {
    let (mut fetch, quota) = stage(Config::default());
    let left = Instant::now();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let throttled = |scope, wait| Some(RefusalKind::Throttled { scope, wait });
    for call in 0..5 {
        let left = left + Duration::from_millis(call * 20);
        let end = ended(left, replied_with(429, 0, 0), throttled(Affected::Account, None));
        fetch.end_calls(end).await.unwrap();
    }
    assert_eq!((held(&quota, 0).as_secs(), held(&quota, 1).as_secs()), (10, 0));
    let pace = quota.pace(Scope::Account(0));
    assert!((pace.share - 1.0 / 1.05).abs() < 1e-9 && pace.refused == 5, "{pace:?}");
    assert_eq!(quota.pace(Scope::Account(1)).refused, 0);
    assert_eq!(fetch.tally().of(0).refused, 5);

    // The vendor's own time overrides its other headers, and an API's ban is everybody's.
    let wait = Some(Duration::from_secs(7));
    fetch.end_calls(ended(left, replied_with(429, 7, 3_000), throttled(Affected::Everyone, wait))).await.unwrap();
    assert_eq!((held(&quota, 0).as_secs(), held(&quota, 1).as_secs()), (10, 7));
    assert_eq!(quota.pace(Scope::Source).refused, 1);
}

#[tokio::test(start_paused = true)]
async fn a_ban_for_the_rest_of_the_day_is_obeyed_and_says_nothing_of_the_pace() {
    let (mut fetch, quota) = stage(Config::default());
    let day = RefusalKind::Throttled { scope: Affected::Account, wait: Some(Duration::from_secs(31_062)) };
    fetch.end_calls(ended(Instant::now(), Advice::default(), Some(day))).await.unwrap();
    assert_eq!(held(&quota, 0).as_secs(), 31_062);
    assert_eq!(quota.pace(Scope::Account(0)), crate::quota::PaceState::default());
}

#[tokio::test(start_paused = true)]
async fn what_this_machine_or_a_peer_has_not_let_pass_spends_nothing_and_is_called_for_again() {
    for (contact, pauses) in [
        (Contact::Machine("no file descriptor left".to_owned()), true),
        (Contact::Unprocessed("GOAWAY".to_owned()), false),
    ] {
        let (mut fetch, quota) = stage(Config::default());
        for _ in 0..50 {
            let tickets = fetch.reaction.breakers.admit(0, &[], Instant::now());
            let end = ended(Instant::now(), Advice::default(), None);
            let end = Ended { contact: contact.clone(), tickets, ..end };
            fetch.end_calls(end).await.unwrap();
        }
        assert_eq!((held(&quota, 0).as_secs(), held(&quota, 1).as_secs()), (0, 0), "nobody is to blame");
        assert_eq!((fetch.tally().of(0).calls, fetch.tally().of(0).refused), (0, 0));
        let now = Instant::now();
        let until = fetch.reaction.exhaustion.pauses_until(now);
        assert_eq!(until, pauses.then(|| now + Duration::from_millis(250)), "{contact:?}");
    }
}
