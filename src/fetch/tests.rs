//! fetch against a scripted log and no vendor at all.

use std::{collections::BTreeSet, time::Duration};

use bytes::Bytes;

use super::*;
use crate::{
    kafka::{
        Epoch, RECORD_LIMIT,
        ledger::{Admit, Ledger, WINDOW},
        scripted::{Log, assigned, partition, records},
    },
    message::{AccountAlias, Columns, DeadLetter, ItemId, Request, RequestId, SourceName, Status},
    platform::{Account, Answer, Exchange, HttpReply, Reply, Vendor, http},
    quota::{guard::Guard, memory::Memory, pace::Pacing},
    runtime::clock::{Clock, Dice, Timestamp},
    tokens::file::FileStore,
    topics::{self, Topics},
};

/// A vendor whose code answers in a way of its own. Nobody listens at its address.
struct Odd(fn() -> Reply);

impl Vendor for Odd {
    fn batch_max(&self) -> usize {
        2
    }
    fn prepare(&self, _: &Account, _: &[&Request], _: Timestamp) -> Exchange {
        Exchange { url: "http://127.0.0.1:9/".to_owned(), form: vec![] }
    }
    fn interpret(&self, _: &[&Request], _: &HttpReply) -> Reply {
        (self.0)()
    }
}

fn caller() -> Caller {
    caller_of(|| unreachable!("nobody calls"))
}

fn caller_of(answer: fn() -> Reply) -> Caller {
    let timeouts = http::Timeouts { total: Duration::from_secs(5), connect: Duration::from_secs(2) };
    Caller::new(CallerParts {
        source: SourceName::new("ali1688").unwrap(),
        vendor: Arc::new(Odd(answer)),
        client: http::Client::new(timeouts).unwrap(),
        accounts: Arc::new([Account {
            alias: AccountAlias::new("a").unwrap(),
            app_key: "key".to_owned(),
            app_secret: "secret".into(),
            access_token: None,
            refresh_token: None,
            limit: None,
            limits: vec![],
            calls_in_flight: None,
        }]),
        tokens: Arc::new(FileStore::new("nowhere/tokens.json".into())),
        guard: Guard::new(&[], None),
        topics: Topics::new(topics::Config::default()),
        clock: Clock::simulated(Timestamp::from_millis(0)),
        dice: Dice::seeded(1),
    })
}

#[tokio::test(start_paused = true)]
async fn bad_input_beyond_the_window_of_a_slow_request_is_neither_lost_nor_doubled() {
    let log = Log::default();
    let (events, reader) = log.reader();
    let quota = Arc::new(Memory::new(vec![], Pacing::default()));
    let stop = CancellationToken::new();
    let fetch = Fetch::new(reader, log.clone(), caller(), quota, Config::default()).run(stop.clone());
    let count = WINDOW + 5_000;
    events.send(assigned()).unwrap();
    events.send(records(0, [Bytes::from_static(b"1")])).unwrap();
    for offset in 1..count {
        events.send(records(offset, [Bytes::from_static(b"")])).unwrap();
    }
    let (ended, ()) = tokio::join!(fetch, async {
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(log.world().paused, [partition()], "what waits is bounded");
        stop.cancel();
    });
    ended.unwrap();

    let world = log.world();
    let offset =
        |record: &crate::kafka::Outgoing| serde_json::from_slice::<DeadLetter>(&record.value).unwrap().origin.offset;
    let visible: BTreeSet<i64> = world.records.iter().map(offset).collect();
    assert_eq!(visible.len(), world.records.len());
    let mut ledger = Ledger::new(Epoch(2), world.committed.get(&partition())).unwrap();
    let again: BTreeSet<i64> = (0..count).filter(|offset| ledger.admit(*offset) == Admit::New).collect();
    let expected: BTreeSet<i64> = (0..count).filter(|offset| !visible.contains(offset)).collect();
    assert!(again == expected, "{} visible, {} of {count} to be done again", visible.len(), again.len());
}

#[tokio::test(start_paused = true)]
async fn a_stop_ends_though_kafka_is_away() {
    let log = Log::default();
    log.world().is_away = true;
    let (events, reader) = log.reader();
    let quota = Arc::new(Memory::new(vec![], Pacing::default()));
    let stop = CancellationToken::new();
    let fetch = Fetch::new(reader, log.clone(), caller(), quota, Config::default()).run(stop.clone());
    events.send(assigned()).unwrap();
    events.send(records(0, [Bytes::from_static(b"")])).unwrap();
    let stopped = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        stop.cancel();
    };
    let end = tokio::time::timeout(Duration::from_secs(30), async { tokio::join!(fetch, stopped) });
    end.await.expect("it waits for the transaction for ever").0.unwrap();
}

fn job(calls: u32) -> Job {
    let request = Request { calls, ..Request::new(ItemId::new("1").unwrap()) };
    let position = Position { partition: partition(), epoch: Epoch(1), offset: 0 };
    Job { position, id: RequestId::new("r").unwrap(), request, traceparent: String::new() }
}

fn replied() -> HttpReply {
    HttpReply { status: 200, retry_after: None, body: Bytes::new() }
}

#[test]
fn a_vendors_code_that_panics_or_answers_for_too_few_refuses_the_call() {
    let request = job(0).request;
    let panicking = caller_of(|| panic!("at the disco")).understand(&[&request, &request], &replied());
    assert!(matches!(panicking, Reply::Refused(Refusal { kind: RefusalKind::Bug, .. })), "{panicking:?}");
    let too_few = caller_of(|| Reply::Each(vec![])).understand(&[&request, &request], &replied());
    assert!(matches!(too_few, Reply::Refused(Refusal { kind: RefusalKind::Malformed, .. })), "{too_few:?}");
}

#[tokio::test]
async fn a_request_that_claims_the_most_calls_is_called_for_like_any_other() {
    let now = Instant::now();
    let slot = Slot { account: 0, at: now, latest: now + Duration::from_secs(60) };
    let ended = Arc::new(caller()).call(slot, vec![job(u32::MAX)]).await;
    assert_eq!(ended.outcomes.len(), 1);
}

#[test]
fn a_result_too_large_for_a_record_is_a_failure_that_says_so() {
    let raw = serde_json::value::RawValue::from_string(format!("\"{}\"", "x".repeat(RECORD_LIMIT + 1))).unwrap();
    let answer = Answer { status: Status::Found, columns: Columns::default(), raw: Some(raw) };
    let facts = outcome::CallFacts {
        account: AccountAlias::new("a").unwrap(),
        ended_at: Timestamp::from_millis(0),
        latency: Duration::ZERO,
        http_status: Some(200),
    };
    let outcomes = outcome::Outcomes::new(SourceName::new("s").unwrap(), &Topics::new(topics::Config::default()));
    let records = outcomes.result(&job(0), answer, &facts);
    assert_eq!(&*records[0].topic, "weir.failures");
    assert!(records[0].size() < RECORD_LIMIT);
    let failure: crate::message::Failure = serde_json::from_slice(&records[0].value).unwrap();
    assert_eq!(failure.attempt.class, crate::message::Class::Bug);
    assert!(failure.attempt.message.contains("bytes"), "{failure:?}");
}
