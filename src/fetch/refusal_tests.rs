//! fetch against vendors that refuse as real ones have been seen to: over the loopback, by this project's own code for
//! Taobao and 1688.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Mutex,
    time::Duration,
};

use axum::{Form, Router, extract::State, response::Response};
use bytes::Bytes;
use figment::providers::{Format, Toml};
use tokio::task::JoinHandle;

use super::{tests::caller_for, *};
use crate::{
    kafka::scripted::{Log, assigned, records},
    message::{DeadLetter, Failure, Observation},
    platform::SourceConfig,
    quota::{memory::Memory, pace::Pacing},
    topics::{self, Topics},
};

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
        let caller = caller_for("it", vendor);
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

fn json(body: impl ToString) -> Response {
    Response::new(body.to_string().into())
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
        assert_eq!(rig.quota.snapshot(0..2, crate::runtime::clock::Timestamp::from_millis(0)).whole.held, None);
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
