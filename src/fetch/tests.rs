//! fetch against a scripted log and no vendor at all.

use std::{collections::BTreeSet, time::Duration};

use bytes::Bytes;

use super::{call::Advice, *};
use crate::{
    kafka::{
        Epoch, RECORD_LIMIT,
        ledger::{Admit, Ledger, WINDOW},
        scripted::{Log, assigned, partition, records},
    },
    message::{AccountAlias, Columns, DeadLetter, ItemId, Lane, Request, RequestId, SourceName, Status},
    platform::{
        Account, Answer, Exchange, HttpReply, Refusal, RefusalKind, Reply, Vendor, http,
        route::{Address, Route},
    },
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
        Exchange::post("http://127.0.0.1:9/".to_owned(), vec![])
    }
    fn interpret(&self, _: &[&Request], _: &HttpReply) -> Reply {
        (self.0)()
    }
}

pub(super) fn caller() -> Caller {
    caller_of(|| unreachable!("nobody calls"))
}

pub(super) fn caller_of(answer: fn() -> Reply) -> Caller {
    caller_for("ali1688", Arc::new(Odd(answer)))
}

pub(super) fn caller_for(source: &str, vendor: Arc<dyn Vendor>) -> Caller {
    caller_from(1, source, vendor)
}

fn caller_from(addresses: usize, source: &str, vendor: Arc<dyn Vendor>) -> Caller {
    caller_by(&vec![Route::Direct; addresses], &http::Manners::default(), source, vendor)
}

pub(super) fn caller_by(routes: &[Route], manners: &http::Manners, source: &str, vendor: Arc<dyn Vendor>) -> Caller {
    let address = |route: &Route| Address { name: "a".to_owned(), route: route.clone(), limit: None };
    let addresses: Vec<_> = routes.iter().map(address).collect();
    let timeouts = http::Timeouts { total: Duration::from_secs(5), connect: Duration::from_secs(2) };
    Caller::new(CallerParts {
        source: SourceName::new(source).unwrap(),
        vendor,
        client: http::Client::from_addresses(timeouts, manners, &addresses).unwrap(),
        accounts: Arc::new(["a", "b"].map(|alias| Account {
            alias: AccountAlias::new(alias).unwrap(),
            app_key: "key".to_owned(),
            app_secret: "secret".into(),
            access_token: None,
            refresh_token: None,
            limit: None,
            limits: vec![],
            calls_in_flight: None,
            address: None,
        })),
        tokens: Arc::new(FileStore::new("nowhere/tokens.json".into())),
        guard: Guard::new(&[], None, &Clock::System),
        topics: Topics::new(topics::Config::default()),
        clock: Clock::simulated(Timestamp::from_millis(0)),
        rng: Dice::seeded(1),
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
    let fetch = Fetch::new(reader, log.clone(), caller(), quota, Config::default());
    let fetch = Box::pin(fetch.run(stop.clone()));
    events.send(assigned()).unwrap();
    events.send(records(0, [Bytes::from_static(b"")])).unwrap();
    let stopped = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        stop.cancel();
    };
    let end = tokio::time::timeout(Duration::from_secs(30), Box::pin(async { tokio::join!(fetch, stopped) }));
    end.await.expect("it waits for the transaction for ever").0.unwrap();
}

pub(super) fn job(calls: u32) -> Job {
    let request = Request { calls, ..Request::new(ItemId::new("1").unwrap()) };
    let position = Position { partition: partition(), epoch: Epoch(1), offset: 0 };
    let id = RequestId::new("r").unwrap();
    Job {
        position,
        id,
        request,
        lane: Lane::Bulk,
        traceparent: String::new(),
        since: Instant::now(),
        coalesced: vec![],
        single_flight: None,
        unprocessed: 0,
    }
}

fn replied() -> HttpReply {
    HttpReply::new(200, Bytes::new(), Timestamp::from_millis(0))
}

#[test]
fn a_vendors_code_that_panics_or_answers_for_too_few_refuses_the_call() {
    let request = job(0).request;
    let panicking = caller_of(|| panic!("at the disco")).understand(&[&request, &request], &replied());
    assert!(matches!(panicking, Reply::Refused(Refusal { kind: RefusalKind::Bug, .. })), "{panicking:?}");
    let too_few = caller_of(|| Reply::Each(vec![])).understand(&[&request, &request], &replied());
    assert!(matches!(too_few, Reply::Refused(Refusal { kind: RefusalKind::Malformed, .. })), "{too_few:?}");
    let too_few = caller_of(|| Reply::Pending(vec![])).understand(&[&request], &replied());
    assert!(matches!(too_few, Reply::Refused(Refusal { kind: RefusalKind::Malformed, .. })), "{too_few:?}");
}

#[tokio::test]
async fn a_request_that_claims_the_most_calls_is_called_for_like_any_other() {
    let now = Instant::now();
    let slot = Slot { account: 0, address: 0, at: now, latest: now + Duration::from_secs(60) };
    let caller = Arc::new(caller());
    let permit = caller.permit(0).unwrap();
    let ended = caller.call(slot, permit, vec![job(u32::MAX)], call::Travel::default()).await;
    assert_eq!(ended.outcomes.len(), 1);
}

/// A vendor that echoes what it is sent, whatever becomes of the item.
struct Echo(String, Status);

impl Vendor for Echo {
    fn batch_max(&self) -> usize {
        1
    }
    fn prepare(&self, account: &Account, _: &[&Request], _: Timestamp) -> Exchange {
        use secrecy::ExposeSecret as _;
        let secret = account.app_secret.expose_secret().to_owned();
        let signature = "6666 by nobody else".to_owned();
        Exchange::post(self.0.clone(), vec![("token".to_owned(), secret), ("sign".to_owned(), signature)])
    }
    fn interpret(&self, _: &[&Request], reply: &HttpReply) -> Reply {
        let raw = serde_json::from_slice(&reply.body).unwrap();
        Reply::Each(vec![Ok(Answer { status: self.1, columns: Columns::default(), raw: Some(raw) })])
    }
}

#[tokio::test]
async fn what_a_vendor_echoes_is_in_no_record_whatever_it_says_of_the_item() {
    let echo = axum::routing::post(async |form: axum::Form<std::collections::BTreeMap<String, String>>| {
        let axum::Form(form) = form;
        axum::Json(serde_json::json!({"sub_msg": "the secret of nobody", "args": form, "n": 1.5}))
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move { axum::serve(listener, axum::Router::new().route("/", echo)).await.unwrap() });
    for status in [Status::Found, Status::Absent, Status::OffShelf] {
        let now = Instant::now();
        let slot = Slot { account: 0, address: 0, at: now, latest: now + Duration::from_secs(60) };
        let caller = Arc::new(caller_for("ali1688", Arc::new(Echo(url.clone(), status))));
        let permit = caller.permit(0).unwrap();
        let mut ended = Arc::clone(&caller).call(slot, permit, vec![job(0)], call::Travel::default()).await;
        let (_, end) = ended.outcomes.pop().unwrap();
        let records = end.records(caller.outcomes(), Timestamp::from_millis(0)).unwrap();
        let result: crate::message::Observation = serde_json::from_slice(&records[0].value).unwrap();
        // The secret is the word that the message has in it, too: there it is no secret.
        let raw = r#"{"args":{"sign":"[secret]","token":"[secret]"},"n":1.5,"sub_msg":"the secret of nobody"}"#;
        assert_eq!((result.status, result.raw.unwrap().get()), (status, raw));
    }
}

#[test]
fn a_result_too_large_for_a_record_is_a_failure_that_says_so() {
    let raw = serde_json::value::RawValue::from_string(format!("\"{}\"", "x".repeat(RECORD_LIMIT + 1))).unwrap();
    let answer = Answer { status: Status::Found, columns: Columns::default(), raw: Some(raw) };
    let facts = call_facts::CallFacts {
        account: AccountAlias::new("a").unwrap(),
        ended_at: Timestamp::from_millis(0),
        latency: Duration::ZERO,
        http_status: Some(200),
    };
    let outcomes = outcome::Outcomes::new(SourceName::new("s").unwrap(), &Topics::new(topics::Config::default()));
    let records = outcomes.result(&job(0), answer.into(), &facts, crate::message::Via::Call);
    assert_eq!(&*records[0].topic, "weir.failures");
    assert!(records[0].size() < RECORD_LIMIT);
    let failure: crate::message::Failure = serde_json::from_slice(&records[0].value).unwrap();
    assert_eq!(failure.attempt.class, crate::message::Class::Bug);
    assert!(failure.attempt.message.contains("bytes"), "{failure:?}");
}

/// A stage whose calls end as a test says, and the quota that hears of it: two accounts of 10/s.
pub(super) fn stage(config: Config) -> (Fetch<impl Reader, Log>, Arc<Memory>) {
    let log = Log::default();
    let (_, reader) = log.reader();
    let limit = crate::quota::Limit::new(10, Duration::from_secs(1), 5).unwrap();
    let quota = Arc::new(Memory::new(vec![Some(limit); 2], Pacing::default()));
    (Fetch::new(reader, log, caller(), Arc::clone(&quota) as Arc<dyn Quota>, config), quota)
}

/// The same whose calls leave from so many addresses.
pub(super) fn stage_from(addresses: usize) -> (Fetch<impl Reader, Log>, Arc<Memory>) {
    let log = Log::default();
    let (_, reader) = log.reader();
    let limit = crate::quota::Limit::new(10, Duration::from_secs(1), 5).unwrap();
    let mut limits = crate::quota::plan::Limits::of_accounts(vec![Some(limit); 2]);
    limits.accounts[1].address = addresses - 1;
    let quota = Arc::new(Memory::with_limits(&limits, &Pacing::default(), &Clock::System));
    let caller = caller_from(addresses, "ali1688", Arc::new(Odd(|| unreachable!("nobody calls"))));
    (Fetch::new(reader, log, caller, Arc::clone(&quota) as Arc<dyn Quota>, Config::default()), quota)
}

pub(super) fn ended(left_at: Instant, advice: Advice, kind: Option<RefusalKind>) -> Ended {
    let refusal = kind.map(|kind| Refusal { kind, code: "c".to_owned(), message: "m".to_owned() });
    let contact = call::Contact::Called(Some(200));
    Ended {
        unused: None,
        account: 0,
        address: 0,
        contact,
        left_at,
        replied_at: Instant::now(),
        departed_at: None,
        latency: None,
        advice,
        outcomes: vec![],
        bytes: 0,
        to_look_up: None,
        missed: vec![],
        refusal,
        has_answer: false,
        is_dead: false,
        is_outdated: false,
        tickets: None,
        travel: call::Travel::default(),
        refused: None,
        is_one_items: false,
    }
}

/// For how long an account is held.
pub(super) fn held(quota: &Memory, account: usize) -> Duration {
    held_of(quota, (account, 0))
}

/// For how long an address is held.
pub(super) fn held_at(quota: &Memory, address: usize) -> Duration {
    held_of(quota, (0, address))
}

fn held_of(quota: &Memory, (account, address): (usize, usize)) -> Duration {
    let now = Instant::now();
    let is_held = |secs: &u64| {
        let at = now + Duration::from_secs(*secs);
        quota.is_held(&Slot { account, address, at, latest: at })
    };
    Duration::from_secs((0..200_000).take_while(is_held).count() as u64)
}

/// A vendor at this address whose replies nobody understands.
struct At(String);
impl Vendor for At {
    fn batch_max(&self) -> usize {
        2
    }
    fn prepare(&self, _: &Account, _: &[&Request], _: Timestamp) -> Exchange {
        Exchange::post(self.0.clone(), vec![])
    }
    fn interpret(&self, _: &[&Request], _: &HttpReply) -> Reply {
        let (kind, code, message) = (RefusalKind::Malformed, "m".to_owned(), String::new());
        Reply::Refused(Refusal { kind, code, message })
    }
}

/// A caller of a peer that has closed the only connection while it was idle, after two answers; what that does to a call
/// for these.
async fn called_on_an_idle_connection_that_was_closed(jobs: Vec<Job>) -> call::Ended {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let mut server = JoinSet::new();
    server.spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut buffer = [0; 4096];
        for _ in 0..2 {
            let _ = socket.read(&mut buffer).await;
            let _ = socket.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await;
        }
        let _ = socket.read(&mut buffer).await;
    });
    let caller = Arc::new(caller_for("ali1688", Arc::new(At(url))));
    let slot = || {
        let now = Instant::now();
        Slot { account: 0, address: 0, at: now, latest: now + Duration::from_secs(60) }
    };
    for _ in 0..2 {
        let answered =
            Arc::clone(&caller).call(slot(), caller.permit(0).unwrap(), vec![job(0)], call::Travel::default()).await;
        assert!(matches!(answered.contact, call::Contact::Called(Some(200))), "{answered:?}");
    }
    caller.clone().call(slot(), caller.permit(0).unwrap(), jobs, call::Travel::default()).await
}

#[tokio::test]
async fn a_call_whose_idle_connection_was_closed_is_made_again_once_and_then_counts() {
    let closed = called_on_an_idle_connection_that_was_closed(vec![job(0)]).await;
    assert!(matches!(closed.contact, call::Contact::Unprocessed(_)), "{closed:?}");
    let [again] = &closed.missed[..] else { panic!("{closed:?}") };
    assert_eq!((again.unprocessed, closed.outcomes.len()), (1, 0));
    let counts = called_on_an_idle_connection_that_was_closed(closed.missed).await;
    assert!(matches!(counts.contact, call::Contact::Called(None)) && counts.outcomes.len() == 1, "{counts:?}");
}

#[tokio::test]
async fn a_request_whose_calls_came_to_nothing_too_often_fails_alone_and_is_no_outage() {
    let (spent, mut other) = (Job { unprocessed: 3, ..job(0) }, job(0));
    other.position.offset = 1;
    let spent = Job { coalesced: vec![Job { position: Position { offset: 2, ..job(0).position }, ..job(0) }], ..spent };
    let closed = called_on_an_idle_connection_that_was_closed(vec![spent, other]).await;
    assert!(matches!(closed.contact, call::Contact::Unprocessed(_)), "{closed:?}");
    let missed: Vec<_> = closed.missed.iter().map(|job| (job.position.offset, job.unprocessed)).collect();
    assert_eq!(missed, [(2, 1), (1, 1)], "with one more chance");
    let [(failed, end::End::Made(records))] = &closed.outcomes[..] else { panic!("{closed:?}") };
    assert_eq!((failed.offset, records.len()), (0, 1));
    assert!(closed.refused.is_none() && closed.refusal.is_some_and(|refusal| refusal.kind == RefusalKind::Outage));
}

#[test]
fn a_reply_that_makes_no_sense_is_quoted_in_one_line_without_control_characters() {
    let request = job(0).request;
    let body = Bytes::from(format!("\u{7}{{\"msg\":\r\n\t\"系统维护中\u{1b}[2J\"}}{}", "x".repeat(9_000)));
    let reply = HttpReply { body, ..replied() };
    let quoted = |answer: fn() -> Reply| {
        let understood = caller_of(answer).understand(&[&request, &request], &reply);
        understood.refusals().map(|refusal| refusal.message.as_str()).collect::<String>()
    };
    let message = quoted(|| Reply::Refused(refused(RefusalKind::Malformed)));
    assert!(
        message.starts_with("m; the reply begins: {\"msg\": \"系统维护中 [2J\"}xx") && message.len() < 250,
        "{message}"
    );
    assert_eq!(
        quoted(|| Reply::Each(vec![Err(refused(RefusalKind::Malformed)), Err(refused(RefusalKind::Bug))])),
        format!("{message}m")
    );
    assert_eq!(quoted(|| Reply::Refused(refused(RefusalKind::Outage))), "m");
}

fn refused(kind: RefusalKind) -> Refusal {
    Refusal { kind, code: "c".to_owned(), message: "m".to_owned() }
}
