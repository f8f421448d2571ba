//! fetch and retry on the real broker, against the simulated gateway, in this process.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use weir::{
    breaker::BreakerConfig,
    fetch::{self, Caller, CallerParts, Fetch, FetchError},
    kafka::{GroupConfig, KafkaReader, KafkaWriter, Producer, intake::IntakeError},
    message::SourceName,
    platform::{Account, SourceConfig, http},
    quota::{Limit, guard::Guard, memory::Memory, pace::Pacing},
    retry::{self, Retry},
    runtime::clock::{Clock, Dice},
    simulate::{self, Latency, Options, Quota, Shares, Simulator},
    tokens::file::FileStore,
    topics::{self, Groups, Topics},
};

use crate::stack::{self, Follower, eventually, kafka, outgoing, produce, unique};

/// A gateway, its topics, and the stages between them.
pub struct Rig {
    pub simulator: Simulator,
    pub source: SourceName,
    pub topics: Topics,
    groups: Groups,
    limit: Option<Limit>,
    pub breaker: BreakerConfig,
    pub stop: CancellationToken,
    /// Where renewed tokens are kept.
    folder: tempfile::TempDir,
}

impl Rig {
    pub async fn new(what: &str, options: Options) -> Self {
        let limit = match options.quota {
            Quota::None => None,
            _ => Some(Limit::new(10, Duration::from_secs(1), 5).unwrap()),
        };
        let source = SourceName::new("ali1688").unwrap();
        Self {
            topics: stack::topics(what, &source, 4).await,
            simulator: simulate::start(options, Clock::System).await.unwrap(),
            groups: Groups::new(unique("group")),
            // Much fails on purpose: a breaker that opened would only make tests wait.
            breaker: BreakerConfig { failures: 1_000, sample: 100_000, ..BreakerConfig::default() },
            stop: CancellationToken::new(),
            folder: tempfile::tempdir().unwrap(),
            source,
            limit,
        }
    }

    pub async fn request(&self, values: impl IntoIterator<Item = String>) {
        produce(&self.topics.requests(&self.source), values).await;
    }

    pub async fn fetch(&self) -> JoinHandle<Result<(), FetchError>> {
        self.fetch_as(self.simulator.accounts().to_vec(), fetch::Config::default()).await
    }

    async fn fetch_as(&self, accounts: Vec<Account>, config: fetch::Config) -> JoinHandle<Result<(), FetchError>> {
        let group = self.groups.fetch(&self.source);
        let writer = KafkaWriter::open(&kafka(), &group).await.unwrap();
        let reader = reader(group, topics::apart(self.topics.every_request(&self.source)));
        let limits = vec![self.limit.clone(); accounts.len()];
        let source = serde_json::json!({"name": "ali1688", "kind": "ali1688", "url": self.simulator.url()});
        let timeouts = http::Timeouts { total: Duration::from_secs(5), connect: Duration::from_secs(2) };
        let caller = Caller::new(CallerParts {
            source: self.source.clone(),
            vendor: serde_json::from_value::<SourceConfig>(source).unwrap().vendor().unwrap(),
            client: http::Client::new(timeouts).unwrap(),
            accounts: accounts.into(),
            tokens: Arc::new(FileStore::new(self.folder.path().join(".weir/tokens.json"))),
            guard: Guard::new(&limits, None, &Clock::System),
            topics: self.topics.clone(),
            clock: Clock::System,
            rng: Dice::random(),
        });
        let quota = Arc::new(Memory::new(limits, Pacing::default()));
        let fetch = Fetch::new(reader, writer, caller, quota, config).with_breaker(self.breaker, None);
        tokio::spawn(fetch.run(self.stop.clone()))
    }

    pub async fn retry(&self, config: retry::Config) -> JoinHandle<Result<(), IntakeError>> {
        let group = self.groups.retry();
        let writer = KafkaWriter::open(&kafka(), &group).await.unwrap();
        let reader = reader(group, vec![vec![self.topics.failures()], self.topics.waiting()]);
        let (sources, topics) = ([self.source.clone()], self.topics.clone());
        let retry = Retry::new(reader, writer, sources, &topics, config, Clock::System, Dice::random());
        tokio::spawn(retry.run(self.stop.clone()))
    }

    /// How often each item has ended, read until `count` have.
    pub async fn ends(&self, count: usize) -> HashMap<String, Vec<String>> {
        let mut follower = Follower::of(&[self.topics.results(), self.topics.dead()]).await;
        let seen = follower.read_until(count).await;
        let mut ends: HashMap<String, Vec<String>> = HashMap::new();
        for record in seen {
            let json = record.json();
            let item = json["item"].as_str().or(json["request"]["item"].as_str()).unwrap_or("unreadable").to_owned();
            let end = json["status"].as_str().or(json["reason"].as_str()).unwrap().to_owned();
            ends.entry(item).or_default().push(end);
        }
        ends
    }
}

fn reader(group: String, topics: Vec<Vec<String>>) -> KafkaReader {
    let instance = format!("{group}.one");
    let group = GroupConfig { group, instance, topics, drain: Duration::from_secs(5) };
    KafkaReader::open(&kafka(), group).unwrap()
}

/// Everything goes wrong often; retries come back quickly.
fn troubled() -> Options {
    Options {
        accounts: 40,
        latency: Latency { from: Duration::from_millis(5), to: Duration::from_millis(40) },
        shares: Shares { absent: 0.1, off_shelf: 0.1, throttled: 0.0, failing: 0.1, broken: 0.05, hopeless: 0.02 },
        ..Options::default()
    }
}

pub fn quick_retries() -> retry::Config {
    let mut config = retry::Config::default();
    (config.policy.base, config.policy.cap) = (Duration::from_millis(100), Duration::from_secs(1));
    config
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_id_ends_exactly_once_without_a_single_call_over_the_quota() {
    let rig = Rig::new("ends", troubled()).await;
    let ids: Vec<String> = simulate::sample(7).take(1_000).map(|id| id.to_string()).collect();
    rig.request(ids.iter().cloned()).await;
    let (fetch, retry) = (rig.fetch().await, rig.retry(quick_retries()).await);
    let ends = rig.ends(ids.len()).await;
    rig.stop.cancel();
    fetch.await.unwrap().unwrap();
    retry.await.unwrap().unwrap();

    assert_eq!(ends.len(), ids.len());
    let doubled: Vec<_> = ends.iter().filter(|(_, ends)| ends.len() != 1).collect();
    assert!(doubled.is_empty(), "ended more than once: {doubled:?}");
    let count = |end: &str| ends.values().filter(|ends| ends[0] == end).count();
    assert!(count("found") > 600 && count("absent") > 50 && count("off_shelf") > 50, "{ends:?}");
    assert!(count("exhausted") > 0, "hopeless items end as dead letters");
    let stats = rig.simulator.stats();
    assert_eq!(stats.violations, 0);
    assert!(stats.injected_failures > 100, "the retries had something to do: {stats:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_input_becomes_dead_letters_and_harms_nothing_else() {
    let rig = Rig::new("bad", Options { quota: Quota::None, shares: Shares::NONE, ..troubled() }).await;
    let long = "9".repeat(5_000);
    let bad = ["", "  ", &long, r#"{"item":"#, r#"{"item":"1","source":"taobao"}"#, "12 34", r#"["1"]"#];
    let good = ["610000000001", r#"{"item":"610000000002","batch":"b","unknown":{"field":[1]}}"#];
    rig.request(bad.iter().chain(&good).map(ToString::to_string)).await;
    let fetch = rig.fetch().await;
    let ends = rig.ends(bad.len() + good.len()).await;
    rig.stop.cancel();
    fetch.await.unwrap().unwrap();

    assert_eq!(ends["unreadable"], vec!["invalid"; bad.len()]);
    assert_eq!(ends["610000000001"], ["found"]);
    assert_eq!(ends["610000000002"], ["found"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_slow_id_holds_nobody_back() {
    // A call takes up to two seconds: one after the other, or one batch after the other, 400 would take minutes.
    let options = Options {
        quota: Quota::None,
        latency: Latency { from: Duration::ZERO, to: Duration::from_secs(2) },
        shares: Shares::NONE,
        ..troubled()
    };
    let rig = Rig::new("slow", options).await;
    rig.request(simulate::sample(9).take(400).map(|id| id.to_string())).await;
    let (fetch, retry) = (rig.fetch().await, rig.retry(quick_retries()).await);
    assert_eq!(rig.ends(400).await.len(), 400);
    rig.stop.cancel();
    fetch.await.unwrap().unwrap();
    retry.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outcome_carries_cloudevents_headers_and_its_requests_trace() {
    let rig = Rig::new("headers", Options { quota: Quota::None, shares: Shares::NONE, ..troubled() }).await;
    let mut request = outgoing(&rig.topics.requests(&rig.source), "k", r#"{"item":"610000000001"}"#);
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let headers = [("ce_id", "mine-1"), ("traceparent", &format!("00-{trace}-b7ad6b7169203331-01"))];
    request.headers = headers.map(|(name, value)| (name.to_owned().into(), value.to_owned().into())).to_vec();
    Producer::new(&kafka()).unwrap().send(vec![request]).await.unwrap();
    let fetch = rig.fetch().await;
    let mut follower = Follower::of(&[rig.topics.results()]).await;
    let result = follower.read_until(1).await[0].clone();
    rig.stop.cancel();
    fetch.await.unwrap().unwrap();

    let expected = [
        ("content-type", "application/json"),
        ("ce_specversion", "1.0"),
        ("ce_id", "mine-1#1"),
        ("ce_type", "weir.result.v1"),
        ("ce_source", "weir/fetch/ali1688"),
    ];
    for (name, value) in expected {
        assert_eq!(result.headers[name], value, "{name}");
    }
    assert!(result.headers["traceparent"].contains(trace), "{:?}", result.headers);
    assert_eq!(result.json()["request_id"], "mine-1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_wait_for_room_and_go_on_when_outcomes_are_committed() {
    let rig = Rig::new("room", Options { quota: Quota::None, shares: Shares::NONE, ..troubled() }).await;
    rig.request(simulate::sample(5).take(100).map(|id| id.to_string())).await;
    // Less than one outcome: after each few calls all of them wait for the commit.
    let config =
        fetch::Config { outcomes_limit: bytesize::ByteSize::b(1), calls_in_flight: 7, ..fetch::Config::default() };
    let fetch = rig.fetch_as(rig.simulator.accounts().to_vec(), config).await;
    assert_eq!(rig.ends(100).await.len(), 100);
    rig.stop.cancel();
    fetch.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_account_is_disabled_and_the_others_carry_its_load() {
    let rig = Rig::new("denied", Options { accounts: 5, shares: Shares::NONE, ..troubled() }).await;
    let ids: Vec<String> = simulate::sample(3).take(60).map(|id| id.to_string()).collect();
    rig.request(ids.iter().cloned()).await;
    let mut accounts = rig.simulator.accounts().to_vec();
    accounts[0].app_secret = "wrong".into();
    accounts[1].access_token = Some("expired".into());
    accounts[1].refresh_token = None;
    let fetch = rig.fetch_as(accounts, fetch::Config::default()).await;
    let retry = rig.retry(quick_retries()).await;
    let ends = rig.ends(ids.len()).await;
    assert!(ends.values().all(|ends| ends == &["found"]), "{ends:?}");
    let stats =
        eventually("the calls have ended", async || Some(rig.simulator.stats()).filter(|s| s.in_flight == 0)).await;
    assert!(stats.unauthorised <= 10, "a refused account is not asked again and again: {stats:?}");
    rig.stop.cancel();
    fetch.await.unwrap().unwrap();
    retry.await.unwrap().unwrap();
}
