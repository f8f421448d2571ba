//! fetch against vendors that refuse as real ones have been seen to: over the loopback, by this project's own code for
//! Taobao and 1688.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{Form, Router, extract::State, response::Response};
use bytes::Bytes;
use figment::providers::{Format, Toml};
use tokio::task::JoinHandle;

use crate::{
    fetch::{tests::caller_for, *},
    kafka::scripted::{Log, assigned, records},
    message::{DeadLetter, Failure, Observation, Request},
    platform::{self, SourceConfig},
    quota::{memory::Memory, pace::Pacing},
    runtime::clock::Timestamp,
    topics::{self, Topics},
};

const NOW: Timestamp = Timestamp::from_millis(0);

/// How long anything may take.
const DEADLINE: Duration = Duration::from_secs(60);

type Params = BTreeMap<String, String>;
type Says = Arc<dyn Fn(usize, &Params) -> Response + Send + Sync>;

#[derive(Clone)]
struct Vendor {
    says: Says,
    calls: Arc<Mutex<Vec<Params>>>,
}

/// A vendor that says what a test wants to each call, by its number and its form; and what comes of it.
struct Rig {
    calls: Arc<Mutex<Vec<Params>>>,
    log: Log,
    events: tokio::sync::mpsc::UnboundedSender<crate::kafka::Event>,
    quota: Arc<Memory>,
    stage: JoinHandle<Result<(), FetchError>>,
    stop: CancellationToken,
    _server: JoinSet<std::io::Result<()>>,
}

impl Rig {
    async fn start(source: &str, says: impl Fn(usize, &Params) -> Response + Send + Sync + 'static) -> Self {
        Self::start_as(|vendor| vendor, source, says).await
    }

    /// The same with a protocol that is made of the source's.
    async fn start_as(
        made_of: impl FnOnce(Arc<dyn platform::Vendor>) -> Arc<dyn platform::Vendor>,
        source: &str,
        says: impl Fn(usize, &Params) -> Response + Send + Sync + 'static,
    ) -> Self {
        async fn answer(State(vendor): State<Vendor>, Form(form): Form<Params>) -> Response {
            let number = {
                let mut calls = vendor.calls.lock().unwrap();
                calls.push(form.clone());
                calls.len() - 1
            };
            (vendor.says)(number, &form)
        }
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let calls = Arc::<Mutex<Vec<Params>>>::default();
        let vendor = Vendor { says: Arc::new(says), calls: Arc::clone(&calls) };
        let mut server = JoinSet::new();
        server.spawn(axum::serve(listener, Router::new().fallback(answer).with_state(vendor)).into_future());
        let text = format!("name = \"it\"\nurl = {url:?}\n{source}");
        let vendor = <Toml as Format>::from_str::<SourceConfig>(&text).unwrap().vendor().unwrap();
        let quota = Arc::new(Memory::new(vec![None; 2], Pacing::default()));
        let (log, stop) = (Log::default(), CancellationToken::new());
        let (events, reader) = log.reader();
        events.send(assigned()).unwrap();
        let config = Config { calls_in_flight: 4, ..Config::default() };
        let caller = caller_for("it", made_of(vendor));
        let fetch = Fetch::new(reader, log.clone(), caller, Arc::clone(&quota) as Arc<dyn Quota>, config);
        #[allow(clippy::disallowed_methods, reason = "the handle is kept")]
        let stage = tokio::spawn(fetch.run(stop.clone()));
        Self { calls, log, events, quota, stage, stop, _server: server }
    }

    fn request(&self, offset: usize, ids: impl Iterator<Item = u64>) {
        let offset = i64::try_from(offset).unwrap();
        self.events.send(records(offset, ids.map(|id| Bytes::from(id.to_string())))).unwrap();
    }

    fn ended(&self) -> usize {
        self.log.world().records.len()
    }

    fn calls(&self) -> usize {
        self.calls.lock().unwrap().len()
    }

    async fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let since = Instant::now();
        while !condition(self) {
            let (ended, calls) = (self.ended(), self.calls());
            assert!(since.elapsed() < DEADLINE, "in vain: {what}; {ended} have ended, {calls} calls");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Stops; the results and the failures.
    async fn end(self) -> (Vec<Observation>, Vec<Failure>) {
        self.stop.cancel();
        self.stage.await.unwrap().unwrap();
        let names = Topics::new(topics::Config::default());
        let world = self.log.world();
        let (mut results, mut failures) = (vec![], vec![]);
        for record in &world.records {
            if *record.topic == *names.results() {
                results.push(serde_json::from_slice(&record.value).unwrap());
            } else if *record.topic == *names.failures() {
                failures.push(serde_json::from_slice(&record.value).unwrap());
            } else {
                let dead: DeadLetter = serde_json::from_slice(&record.value).unwrap();
                panic!("dead: {dead:?}");
            }
        }
        (results, failures)
    }
}

fn json(body: impl Into<axum::body::Body>) -> Response {
    Response::new(body.into())
}

/// TOP's good reply: a row for each id.
fn rows(form: &Params) -> Response {
    let rows: Vec<String> =
        form["num_iids"].split(',').map(|id| format!(r#"{{"num_iid":{id},"price":"1.00"}}"#)).collect();
    json(format!(r#"{{"items_seller_list_get_response":{{"items":{{"item":[{}]}}}}}}"#, rows.join(",")))
}

fn ids(form: &Params) -> impl Iterator<Item = u64> {
    form["num_iids"].split(',').map(|id| id.parse().unwrap())
}

const FIRST: u64 = 610_000_000_000;

/// One in fifty, and not evenly.
fn is_poisoned(id: u64) -> bool {
    (id - FIRST) % 50 == (id - FIRST) / 50 * 7 % 50
}

fn top_error(code: u32, sub_code: &str, sub_msg: &str) -> String {
    let error = serde_json::json!({"code": code, "msg": "Remote service error", "sub_code": sub_code, "sub_msg": sub_msg, "request_id": "rxvsf5lo4ufl"});
    serde_json::json!({"error_response": error}).to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_thousand_ids_exactly_the_forty_poisoned_ones_end_and_no_other_spends_an_attempt() {
    // By the number that is known, by one that nobody knows, and by one that is said of an only item otherwise.
    for (sub_code, message) in
        [("-4003", "invalid item id"), ("-77", "服务内部错误"), ("isv.invalid-parameter", "num_iids")]
    {
        let rig = Rig::start("kind = \"taobao\"", move |_, form| {
            if ids(form).any(is_poisoned) { json(top_error(15, sub_code, message)) } else { rows(form) }
        })
        .await;
        rig.request(0, FIRST..FIRST + 2_000);
        rig.until("all end", |rig| rig.ended() == 2_000).await;
        // The next time they are known.
        let first = rig.calls();
        rig.request(2_000, FIRST..FIRST + 2_000);
        rig.until("all end", |rig| rig.ended() == 4_000).await;
        let again = rig.calls() - first;
        assert_eq!(held(&rig), None);
        let (results, failures) = rig.end().await;
        let poisoned: BTreeSet<String> =
            (FIRST..FIRST + 2_000).filter(|id| is_poisoned(*id)).map(|id| id.to_string()).collect();
        let ended: BTreeSet<String> = failures.iter().map(|failure| failure.request.item.to_string()).collect();
        assert_eq!((ended, failures.len(), poisoned.len()), (poisoned, 80, 40));
        for failure in &failures {
            assert_eq!(failure.attempt.code, format!("15/{sub_code}"));
            // The first time by being alone to blame, the next time a number that nobody knows is tried again.
            let is_sure = sub_code != "-77" || failures.iter().take(40).any(|first| first == failure);
            assert_eq!(failure.attempt.class == crate::message::Class::Bug, is_sure, "{failure:?}");
        }
        assert!(results.len() == 3_920 && results.iter().all(|result| result.calls == 1));
        println!("{sub_code}: {first} calls, then {again}");
        assert!(first <= 340, "{first} calls; 279 is the least that any way needs");
        assert!(again <= 150, "{again} calls");
    }
}

fn held(rig: &Rig) -> Option<String> {
    let held = rig.quota.snapshot(0..2, NOW).whole.held;
    held.map(|held| held.cause.reason.to_string())
}

/// The flag that is set once the vendor answers.
fn mended() -> (Arc<AtomicBool>, Arc<AtomicBool>) {
    let flag = Arc::new(AtomicBool::new(false));
    (Arc::clone(&flag), flag)
}

impl Rig {
    /// Waits for what was under way when the source was held; a hold that is missing sooner has not arrived yet.
    async fn settle(&self) {
        tokio::time::sleep(Duration::from_millis(1_100)).await;
    }

    /// The vendor answers again, and an operator who has mended what was wrong ends the hold.
    async fn mend(&self, flag: &AtomicBool) {
        flag.store(true, Ordering::Relaxed);
        self.quota.release(crate::quota::Scope::Source, Timestamp::from_millis(i64::MAX / 2)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_clock_ends_no_request_and_the_hold_says_by_how_much_it_is_wrong() {
    let (is_right, flag) = mended();
    let rig = Rig::start("kind = \"taobao\"", move |_, form| {
        if is_right.load(Ordering::Relaxed) {
            return rows(form);
        }
        let mut reply = json(r#"{"error_response":{"code":31,"msg":"Invalid Timestamp","request_id":"r"}}"#);
        // The rig's clock began with 1970.
        reply.headers_mut().insert("date", "Thu, 01 Jan 1970 00:25:00 GMT".parse().unwrap());
        reply
    })
    .await;
    rig.request(0, FIRST..FIRST + 1_000);
    rig.until("the source is held", |rig| held(rig).is_some()).await;
    let why = held(&rig).unwrap();
    assert!(why.contains("set its clock") && why.contains("clock is 24m 5") && why.contains("behind"), "{why}");
    rig.settle().await;
    // Those that were under way together.
    let refused = rig.calls();
    assert!((1..=4).contains(&refused), "{refused} calls");
    assert_eq!(rig.ended(), 0, "no request ends by it");
    rig.mend(&flag).await;
    rig.until("all are answered", |rig| rig.ended() == 1_000).await;
    assert!(rig.calls() <= 50 + refused, "{} calls", rig.calls());
    let (results, failures) = rig.end().await;
    assert!(failures.is_empty() && results.iter().all(|result| result.calls == 1), "no attempt is spent");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_refused_for_every_request_alike_holds_the_source_with_words() {
    let top =
        |code: u32, msg: &str| format!(r#"{{"error_response":{{"code":{code},"msg":"{msg}","request_id":"r"}}}}"#);
    let aop = |code: &str| format!(r#"{{"error_code":"{code}","error_message":"words"}}"#);
    // Where an item may be to blame a few calls more find out that none is.
    let table = [
        ("kind = \"taobao\"", top(22, "Invalid Method"), 4, "url, api and version"),
        ("kind = \"taobao\"", top(41, "Invalid Arguments"), 7, "api and params"),
        ("kind = \"ali1688\"", aop("gw.APIUnsupported"), 4, "url, api and version"),
        ("kind = \"ali1688\"", aop("gw.ParamMissing"), 7, "api and params"),
        ("kind = \"taobao_reseller\"", r#"{"error_code":"4010","reason":"words"}"#.to_owned(), 7, "api and params"),
    ];
    for (source, body, most, words) in table {
        let rig = Rig::start(source, move |_, _| json(body.clone())).await;
        rig.request(0, FIRST..FIRST + 1_000);
        rig.until("the source is held", |rig| held(rig).is_some()).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        let why = held(&rig).unwrap();
        assert!(why.contains(words) && why.contains('('), "{why}");
        assert!(rig.calls() <= most, "{source}: {} calls", rig.calls());
        let (results, failures) = rig.end().await;
        assert!(results.is_empty() && failures.is_empty(), "no request ends by it: {failures:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_refused_of_one_request_alone_ends_that_and_holds_nobody() {
    let rig = Rig::start("kind = \"taobao\"", |_, form| {
        let refused = r#"{"error_response":{"code":41,"msg":"Invalid Arguments","request_id":"r"}}"#;
        if ids(form).any(|id| id == FIRST + 777) { json(refused) } else { rows(form) }
    })
    .await;
    rig.request(0, FIRST..FIRST + 2_000);
    rig.until("most are answered", |rig| rig.ended() >= 1_980).await;
    // What is found out by others' answers needs others.
    let mut asked = 2_000;
    while rig.ended() < asked {
        rig.request(asked, FIRST + 10_000..FIRST + 10_001);
        asked += 1;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(asked < 2_200, "{} have ended", rig.ended());
    }
    assert_eq!(held(&rig), None);
    let (results, failures) = rig.end().await;
    assert!(results.iter().all(|result| result.calls == 1));
    let [failure] = &failures[..] else { panic!("{failures:?}") };
    assert_eq!((failure.attempt.class, failure.attempt.code.as_str()), (crate::message::Class::Bug, "41"));
    assert_eq!(failure.request.item.as_str(), (FIRST + 777).to_string());
}

/// A protocol in which `task …` says that the answer comes later.
struct AnswersLater(Arc<dyn platform::Vendor>);

impl platform::Vendor for AnswersLater {
    fn batch_max(&self) -> usize {
        self.0.batch_max()
    }
    fn prepare(&self, account: &platform::Account, requests: &[&Request], now: Timestamp) -> platform::Exchange {
        self.0.prepare(account, requests, now)
    }
    fn interpret(&self, requests: &[&Request], reply: &platform::HttpReply) -> platform::Reply {
        let task = std::str::from_utf8(&reply.body).unwrap().strip_prefix("task ");
        let Some(task) = task else { return self.0.interpret(requests, reply) };
        platform::Reply::Pending(requests.iter().map(|_| Ok(platform::Task(task.to_owned()))).collect())
    }
}

fn product(form: &Params) -> Response {
    json(format!(r#"{{"productInfo":{{"productID":{},"subject":"cup","status":"published"}}}}"#, form["productID"]))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vendor_that_answers_everything_later_holds_a_source_that_waits_for_nothing() {
    let later = |vendor| Arc::new(AnswersLater(vendor)) as Arc<dyn platform::Vendor>;
    let rig = Rig::start_as(later, "kind = \"ali1688\"", |_, _| json("task s_1")).await;
    rig.request(0, FIRST..FIRST + 1_000);
    rig.until("the source is held", |rig| held(rig).is_some()).await;
    let why = held(&rig).unwrap();
    assert!(why.contains("answers later") && why.contains("(pending") && why.contains("s_1"), "{why}");
    assert!(rig.calls() <= 7, "each may be paid for: {} calls", rig.calls());
    let (results, failures) = rig.end().await;
    assert!(results.is_empty() && failures.is_empty(), "no request ends by it: {failures:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_answer_that_comes_later_ends_that_request_by_the_name_of_its_task() {
    let later = |vendor| Arc::new(AnswersLater(vendor)) as Arc<dyn platform::Vendor>;
    let slow = (FIRST + 77).to_string();
    let says = move |_, form: &Params| if form["productID"] == slow { json("task s_77") } else { product(form) };
    let rig = Rig::start_as(later, "kind = \"ali1688\"", says).await;
    rig.request(0, FIRST..FIRST + 200);
    rig.until("all have ended", |rig| rig.ended() == 200).await;
    assert_eq!((held(&rig), rig.calls()), (None, 200));
    let (results, failures) = rig.end().await;
    let [failure] = &failures[..] else { panic!("{failures:?}") };
    assert_eq!((results.len(), failure.request.item.as_str()), (199, (FIRST + 77).to_string().as_str()));
    assert_eq!((failure.attempt.class, failure.attempt.code.as_str()), (crate::message::Class::Bug, "pending"));
    assert!(failure.attempt.message.contains("(as s_77)"), "{}", failure.attempt.message);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_notice_instead_of_answers_holds_the_source_like_an_outage() {
    // One item a call: five in a row. Twenty a call: it takes longer to see that it is not one item.
    for (source, most_calls, most_failed) in [("kind = \"ali1688\"", 9, 9), ("kind = \"taobao\"", 34, 12)] {
        let (is_over, flag) = mended();
        let rig = Rig::start(source, move |_, form| {
            if !is_over.load(Ordering::Relaxed) {
                json("{\"msg\":\"系统维护中\\u0007\"}")
            } else if form.contains_key("num_iids") {
                rows(form)
            } else {
                json(format!(r#"{{"productInfo":{{"productID":{}}}}}"#, form["productID"]))
            }
        })
        .await;
        rig.request(0, FIRST..FIRST + 500);
        rig.until("the source is held", |rig| held(rig).is_some()).await;
        let why = held(&rig).unwrap();
        assert!(why.contains("系统维护中"), "{why}");
        rig.settle().await;
        assert!(rig.calls() <= most_calls, "{source}: {} calls", rig.calls());
        rig.mend(&flag).await;
        rig.until("all have an end", |rig| rig.ended() == 500).await;
        let (results, failures) = rig.end().await;
        assert!(failures.len() <= most_failed, "{source}: {} attempts are spent", failures.len());
        assert!(results.iter().all(|result| result.calls == 1));
        for failure in failures {
            let message = &failure.attempt.message;
            assert!(message.ends_with(r#"the reply begins: {"msg":"系统维护中\u0007"}"#), "{message}");
        }
    }
}
