//! The breakers at work: fetch against a scripted log and a vendor that does not answer.

use std::time::Duration;

use bytes::Bytes;

use crate::kafka::Outgoing;

use crate::{
    breaker::{BreakerConfig, Verdict},
    fetch::{
        call::{Advice, Contact},
        reaction::{breakers::Breakers, outage::REASON},
        tests::{caller, ended, held, held_at, job, stage, stage_from},
        *,
    },
    kafka::{
        Assignment, Committed, Epoch, Event,
        scripted::{Log, World},
    },
    message::{Attempt, Class, Failure, Lane, Request, codec, envelope::header},
    platform::{Affected, RefusalKind},
    quota::{Scope, memory::Memory, pace::Pacing},
    runtime::clock::Timestamp,
    topics::{self, Topics},
};

const NOW: Timestamp = Timestamp::from_millis(0);

/// One call of the account, which ends so.
async fn call<R: Reader, W: Writer>(fetch: &mut Fetch<R, W>, account: usize, kind: Option<RefusalKind>) {
    let tickets = fetch.reaction.breakers.admit(account, &[], Instant::now());
    let has_answer = kind.is_none();
    let end = ended(Instant::now(), Advice::default(), kind);
    fetch.end_calls(Ended { account, has_answer, tickets, ..end }).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn outages_of_all_hold_the_source_and_of_one_account_that_account() {
    let (mut fetch, quota) = stage(Config::default());
    for number in 0..5 {
        // A row of what nobody understands is no better.
        let kind = if number < 2 { RefusalKind::Malformed } else { RefusalKind::Outage };
        call(&mut fetch, number % 2, Some(kind)).await;
    }
    assert_eq!((held(&quota, 0).as_secs(), held(&quota, 1).as_secs()), (30, 30));
    let cause = quota.snapshot(0..2, NOW).whole.held.unwrap().cause;
    assert_eq!(&*cause.reason, "breaker open: 5 outages in a row; last failure: c: m");

    let (mut fetch, quota) = stage(Config::default());
    for _ in 0..5 {
        call(&mut fetch, 1, None).await;
        call(&mut fetch, 0, Some(RefusalKind::Outage)).await;
    }
    assert_eq!((held(&quota, 0).as_secs(), held(&quota, 1).as_secs()), (30, 0), "the other carries its load");
    assert_eq!(quota.snapshot(0..2, NOW).whole.held, None);
}

fn attempt(class: Class, code: &str) -> Attempt {
    Attempt {
        at: NOW,
        account: None,
        class,
        code: code.to_owned(),
        message: String::new(),
        http_status: None,
        latency_ms: 0,
        not_before: None,
    }
}

#[test]
fn items_that_fail_again_and_again_do_not_shut_a_source_but_new_ones_do() {
    let now = Instant::now();
    let calls = |histories: &[Option<Attempt>]| {
        let mut breakers = Breakers::new(BreakerConfig::default(), 1);
        for _ in 0..5 {
            let with = |history: &Option<Attempt>| {
                let mut job = job(0);
                job.request.history.extend(history.clone());
                job
            };
            let jobs: Vec<_> = histories.iter().map(with).collect();
            let tickets = breakers.admit(0, &jobs, now).unwrap();
            breakers.ended(&tickets, Verdict::Outage, now);
        }
        breakers.shut(now).is_some()
    };
    let failed = Some(attempt(Class::Outage, "http.503"));
    assert!(!calls(std::slice::from_ref(&failed)) && !calls(&[failed.clone(), failed.clone()]));
    assert!(calls(&[None]) && calls(&[failed, None]));
    assert!(!calls(&[Some(attempt(Class::Malformed, "reply"))]), "a sick item does not always fail in the same way");
    assert!(calls(&[Some(attempt(Class::Throttled, "429"))]), "that was not the item's fault");
    assert!(calls(&[Some(attempt(Class::Outage, "weir.held.breaker"))]), "it was not called for");
}

#[tokio::test]
async fn items_that_failed_while_others_were_answered_do_not_shut_a_source_in_new_requests_either() {
    let (mut breakers, mut now) = (Breakers::new(BreakerConfig::default(), 1), Instant::now());
    let mut call = |item: u32, verdict| {
        now += Duration::from_millis(200);
        let mut job = job(0);
        job.request.item = crate::message::ItemId::new(item.to_string()).unwrap();
        let tickets = breakers.admit(0, &[job], now).unwrap();
        breakers.ended(&tickets, verdict, now);
        breakers.shut(now).is_some()
    };
    // The first collection: most are answered, six never are.
    for item in 0..60 {
        assert!(!call(item, if item % 10 == 0 { Verdict::Outage } else { Verdict::Good }));
    }
    // The second: all others come from the cache.
    for round in 0..5 {
        for item in (0..60).step_by(10) {
            assert!(!call(item, Verdict::Outage), "round {round}");
        }
    }
    assert!((100..105).any(|item| call(item, Verdict::Outage)), "those of which nothing is known open it");
}

#[tokio::test(start_paused = true)]
async fn outages_count_in_the_order_of_their_replies_however_late_they_are_told_of() {
    let (fetch, quota) = stage(Config::default());
    // Nothing but the row can open it, and as soon as there is one.
    let config = BreakerConfig { share: 0.01, sample: 100_000, ..BreakerConfig::default() };
    let mut fetch = fetch.with_breaker(config, None);
    let start = Instant::now();
    let (outages, answers): (Vec<u64>, Vec<u64>) = (0..100).partition(|number| number % 20 == 0);
    for number in outages.into_iter().chain(answers) {
        let kind = (number % 20 == 0).then_some(RefusalKind::Outage);
        let tickets = fetch.reaction.breakers.admit(0, &[], start);
        let has_answer = kind.is_none();
        let end = ended(start, Advice::default(), kind);
        let replied_at = start + Duration::from_millis(number);
        let end = Ended { replied_at, has_answer, tickets, ..end };
        fetch.calls.spawn(async move { end });
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let first = fetch.calls.join_next().await.unwrap().unwrap();
    fetch.end_calls(first).await.unwrap();
    assert!(fetch.calls.is_empty());
    assert_eq!(quota.snapshot(0..2, NOW).whole.held, None, "there are nineteen answers between any two");
}

#[test]
fn an_item_that_failed_while_others_were_answered_is_no_probe_and_one_that_failed_with_all_is() {
    let (mut breakers, mut now) = (Breakers::new(BreakerConfig::default(), 1), Instant::now());
    let asks = |item: &str| {
        let mut job = job(0);
        job.request.item = crate::message::ItemId::new(item).unwrap();
        job
    };
    let mut call = |item: &str, verdict, now| {
        let tickets = breakers.admit(0, &[asks(item)], now).unwrap();
        breakers.ended(&tickets, verdict, now);
        breakers.shut(now).is_some()
    };
    assert!(!call("sick", Verdict::Outage, now) && !call("well", Verdict::Good, now));
    assert!((0..5).any(|item| call(&item.to_string(), Verdict::Outage, now)), "then it goes away");
    now += Duration::from_secs(30);
    assert!(!call("sick", Verdict::Outage, now), "nobody knows more than before");
    assert!(call("0", Verdict::Outage, now), "it is still away");
    now += Duration::from_secs(30);
    assert!(!call("1", Verdict::Good, now));
    let ranks = ["sick", "0", "1", "new"].map(|item| breakers.failures_of(&asks(item)));
    assert_eq!(ranks, [1, 1, 0, 0]);
}

#[tokio::test(start_paused = true)]
async fn only_outages_count() {
    let (mut fetch, quota) = stage(Config::default());
    let wait = Some(Duration::ZERO);
    for kind in [RefusalKind::Bug, RefusalKind::Throttled { scope: Affected::Everyone, wait }] {
        for _ in 0..50 {
            call(&mut fetch, 0, Some(kind.clone())).await;
        }
    }
    // No way to the vendor is the address's trouble.
    for _ in 0..50 {
        let tickets = fetch.reaction.breakers.admit(1, &[], Instant::now());
        let end = ended(Instant::now(), Advice::default(), None);
        fetch
            .reaction
            .judge(&Ended { account: 1, tickets, contact: Contact::NoWay("proxy".to_owned()), ..end }, false)
            .await;
    }
    let is_open = |quota: &Memory| {
        let held = quota.snapshot(0..2, NOW).whole.held;
        held.is_some_and(|held| held.cause.reason.starts_with(REASON))
    };
    assert!(!is_open(&quota));
    // Of a batch one item was answered: the vendor is there.
    for _ in 0..50 {
        let tickets = fetch.reaction.breakers.admit(0, &[], Instant::now());
        let end = ended(Instant::now(), Advice::default(), Some(RefusalKind::Outage));
        fetch.end_calls(Ended { tickets, has_answer: true, ..end }).await.unwrap();
    }
    assert!(!is_open(&quota));
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_meets_the_hold_of_another_opens_its_own_and_an_operator_ends_it() {
    let (mut fetch, quota) = stage(Config::default());
    let cause = crate::quota::Cause::new("breaker open: 5 outages in a row", Timestamp::from_millis(1));
    let until = Instant::now() + Duration::from_secs(30);
    quota.hold(Scope::Source, crate::quota::Hold::Until(until), &cause).await;
    fetch.departure.push(job(0));
    fetch.reaction.heed_fleet();
    assert!(fetch.reaction.breakers.shut(Instant::now()).is_some());
    tokio::time::sleep(Duration::from_secs(2)).await;
    fetch.sit_out(until).await;
    assert!(fetch.reaction.breakers.shut(Instant::now()).is_some(), "the hold is still there");
    quota.release(Scope::Source, Timestamp::from_millis(2)).await;
    fetch.sit_out(until).await;
    assert_eq!(fetch.reaction.breakers.shut(Instant::now()), None);
    assert_eq!(fetch.reaction.breakers.room(Instant::now()), 3, "it tries");
}

#[tokio::test(start_paused = true)]
async fn one_proxys_retry_after_rests_that_proxy_until_a_second_one_says_the_same() {
    let away = Advice { unavailable: Some(Duration::from_secs(60)), used_up: None };
    let (mut fetch, quota) = stage_from(2);
    for _ in 0..50 {
        let tickets = fetch.reaction.breakers.admit(0, &[], Instant::now());
        let end = ended(Instant::now(), away, Some(RefusalKind::Outage));
        fetch.end_calls(Ended { tickets, ..end }).await.unwrap();
    }
    assert_eq!((held_at(&quota, 0).as_secs(), held_at(&quota, 1).as_secs()), (60, 0), "the vendor is healthy");
    let end = ended(Instant::now(), away, Some(RefusalKind::Outage));
    fetch.end_calls(Ended { address: 1, ..end }).await.unwrap();
    assert_eq!((held_at(&quota, 0).as_secs(), held_at(&quota, 1).as_secs()), (60, 60));
    let held = quota.snapshot(0..2, NOW).whole.held.unwrap();
    assert_eq!(&*held.cause.reason, "breaker open: vendor announced an outage of 1m (HTTP 503)");
}

#[tokio::test(start_paused = true)]
async fn a_vendor_that_says_that_it_is_away_for_a_day_is_asked_again_after_five_minutes() {
    let (mut fetch, quota) = stage(Config::default());
    let away = Advice { unavailable: Some(Duration::from_secs(86_400)), used_up: None };
    fetch.end_calls(ended(Instant::now(), away, Some(RefusalKind::Outage))).await.unwrap();
    assert_eq!(held(&quota, 0).as_secs(), 300);
    let reason = quota.snapshot(0..2, NOW).whole.held.unwrap().cause.reason;
    let said = "breaker open: vendor announced an outage of 1day (HTTP 503); calls are tried again after 5m \
                (breaker.open_max)";
    assert_eq!(&*reason, said);
    tokio::time::sleep(Duration::from_secs(301)).await;
    assert_eq!(fetch.reaction.breakers.room(Instant::now()), 3, "a few calls find out");
}

fn names() -> Topics {
    Topics::new(topics::Config::default())
}

fn source(name: &str) -> SourceName {
    SourceName::new(name).unwrap()
}

fn partition(lane: Lane) -> Partition {
    Partition { topic: names().requests_by(&source("ali1688"), lane).into(), number: 0 }
}

/// Fifty requests of the backlog and one express, of a vendor at whose address nobody listens; what is visible after a
/// hundred seconds.
async fn outage(fallback: Option<&str>) -> (Log, Vec<Outgoing>) {
    let log = Log::default();
    let (events, reader) = log.reader();
    let config = Config { calls_in_flight: 1, ..Config::default() };
    let quota = Arc::new(Memory::new(vec![None], Pacing::default()));
    let stop = CancellationToken::new();
    let other = fallback.map(|name| SourceName::new(name).unwrap());
    let fetch = Fetch::new(reader, log.clone(), caller(), quota, config).with_breaker(BreakerConfig::default(), other);
    let assignment = |lane| Assignment {
        partition: partition(lane),
        epoch: Epoch(1),
        committed: Some(Committed { offset: 0, metadata: String::new() }),
        log: None,
    };
    events.send(Event::Assigned(vec![assignment(Lane::Bulk), assignment(Lane::Express)])).unwrap();
    let records = |lane, from: i64, to: i64| {
        let record = |offset: i64| crate::kafka::Record {
            offset,
            time: NOW,
            key: None,
            value: Some(Bytes::from(format!("6100000000{offset:02}"))),
            headers: vec![],
            log: None,
        };
        Event::Records { partition: partition(lane), epoch: Epoch(1), records: (from..to).map(record).collect() }
    };
    events.send(records(Lane::Bulk, 0, 50)).unwrap();
    let script = async {
        tokio::time::sleep(Duration::from_secs(10)).await;
        events.send(records(Lane::Express, 0, 1)).unwrap();
        tokio::time::sleep(Duration::from_secs(90)).await;
        stop.cancel();
    };
    let (ended, ()) = tokio::join!(fetch.run(stop.clone()), script);
    ended.unwrap();
    let records = std::mem::take(&mut log.world().records);
    (log, records)
}

fn failures(records: &[Outgoing]) -> Vec<Failure> {
    let of_topic = records.iter().filter(|record| *record.topic == *names().failures());
    of_topic.map(|record| serde_json::from_slice(&record.value).unwrap()).collect()
}

#[tokio::test(start_paused = true)]
async fn while_it_is_open_the_backlog_waits_and_an_express_request_is_put_off_at_once() {
    let (log, records) = outage(None).await;
    let failures = failures(&records);
    assert_eq!(failures.len(), records.len());
    let (held, called): (Vec<_>, Vec<_>) = failures.iter().partition(|failure| failure.attempt.is_held_back());
    // Two travel in a call, and one call at a time: five open it, and after each thirty seconds the first probe does.
    let seconds: Vec<_> = called.iter().step_by(2).map(|failure| failure.attempt.at.as_millis() / 1_000).collect();
    assert_eq!(seconds, [0, 0, 0, 0, 0, 30, 60, 90]);
    let [express] = held[..] else { panic!("one is in a hurry: {held:?}") };
    assert_eq!((express.attempt.code.as_str(), express.lane), ("weir.held.breaker", Lane::Express));
    assert!(!express.attempt.is_spent() && express.attempt.not_before > Some(express.attempt.at));
    let World { committed, .. } = &*log.world();
    assert_eq!(committed[&partition(Lane::Express)].offset, 1);
    assert_eq!(
        committed[&partition(Lane::Bulk)].offset,
        i64::try_from(called.len()).unwrap(),
        "the rest is done later"
    );
}

#[tokio::test(start_paused = true)]
async fn first_time_requests_are_the_probes_though_overdue_retries_stand_before_them() {
    let log = Log::default();
    let (events, reader) = log.reader();
    let config = Config { calls_in_flight: 1, ..Config::default() };
    let quota = Arc::new(Memory::new(vec![None], Pacing::default()));
    let stop = CancellationToken::new();
    let fetch = Fetch::new(reader, log.clone(), caller(), quota, config);
    let partition = partition(Lane::Bulk);
    let committed = Some(Committed { offset: 0, metadata: String::new() });
    events
        .send(Event::Assigned(vec![Assignment { partition: partition.clone(), epoch: Epoch(1), committed, log: None }]))
        .unwrap();
    // Ten that open it, two in a call; forty that have failed before; ten that have not.
    let is_retry = |offset: i64| (10..50).contains(&offset);
    let record = |offset: i64| {
        let mut request = Request::new(crate::message::ItemId::new(format!("6100000000{offset:02}")).unwrap());
        if is_retry(offset) {
            request.source = Some(source("ali1688"));
            request.calls = 1;
            request.history = vec![attempt(Class::Outage, "http.503")];
        }
        let envelope = crate::message::envelope::Envelope {
            kind: crate::message::envelope::Kind::Request,
            id: &format!("r{offset}"),
            writer: "test",
            time: NOW,
            traceparent: None,
        };
        let codec::Encoded { headers, value } = codec::encode(&envelope, &request);
        crate::kafka::Record { offset, time: NOW, key: None, value: Some(value), headers, log: None }
    };
    let records = (0..60).map(record).collect();
    events.send(Event::Records { partition, epoch: Epoch(1), records }).unwrap();
    let script = async {
        tokio::time::sleep(Duration::from_secs(100)).await;
        stop.cancel();
    };
    let (ended, ()) = tokio::join!(fetch.run(stop.clone()), script);
    ended.unwrap();
    let failures = failures(&log.world().records);
    let probes = failures.iter().filter(|failure| failure.attempt.at.as_millis() > 1_000);
    let items: Vec<_> = probes.step_by(2).map(|failure| failure.request.item.as_str()).collect();
    assert_eq!(items, ["610000000050", "610000000051", "610000000052"], "after 30, 60 and 90 seconds");
}

#[tokio::test(start_paused = true)]
async fn another_source_that_stands_in_gets_all_requests_and_their_chains_go_on_there() {
    let (log, records) = outage(Some("taobao")).await;
    let called = failures(&records).len();
    let other = source("taobao");
    let moved: Vec<_> = records.iter().filter(|record| *record.topic != *names().failures()).collect();
    assert_eq!((called + moved.len(), log.world().committed[&partition(Lane::Bulk)].offset), (51, 50));
    for record in moved {
        let is_express = *record.topic == *names().express(&other);
        assert!(is_express || *record.topic == *names().requests(&other), "{}", record.topic);
        let raw = codec::Raw {
            topic: &record.topic,
            partition: 0,
            offset: 0,
            time: NOW,
            headers: &record.headers,
            value: Some(&record.value),
        };
        let received = codec::read_request(&raw, &other).unwrap();
        let Request { instead_of, history, .. } = &received.request;
        assert_eq!(instead_of.as_ref().map(SourceName::as_str), Some("ali1688"));
        assert!(!received.request.begins_a_chain() && received.request.attempts_spent() == 0, "{history:?}");
        let came_from = partition(if is_express { Lane::Express } else { Lane::Bulk });
        assert!(header(&record.headers, "ce_id").unwrap().starts_with(&format!("{came_from}/")));
    }
}
