//! Requests that need no call of their own, against the simulated gateway.

use std::{path::Path, time::Duration};

use bytes::Bytes;
use figment::providers::{Format, Toml};
use tokio::task::JoinHandle;

use crate::{
    cache::{self, Cache},
    fetch::*,
    kafka::scripted::{Log, assigned, records},
    message::{Failure, Observation, Via},
    platform::{Source, SourceConfig},
    quota::{Pacing, guard::Guard, memory::Memory},
    runtime::clock::{Clock, Dice},
    simulate::{self, Latency, Options, Shares, Simulator},
    tokens::file::FileStore,
    topics::{self, Topics},
};

const DEADLINE: Duration = Duration::from_secs(60);

/// A vendor, a source with a cache in memory, and what comes of it.
struct Rig {
    simulator: Option<Simulator>,
    log: Log,
    events: tokio::sync::mpsc::UnboundedSender<crate::kafka::Event>,
    stage: JoinHandle<Result<(), FetchError>>,
    stop: CancellationToken,
    requested: usize,
    ids: Vec<String>,
}

impl Rig {
    /// `rules`: the keys of `[source.cache]`.
    async fn start(rules: &str, latency: Duration) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let accounts_file = folder.path().join("accounts.toml");
        let options = Options {
            accounts: 4,
            accounts_file: Some(accounts_file.clone()),
            latency: Latency { from: latency, to: latency },
            quota: simulate::Quota::None,
            shares: Shares::NONE,
            ..Options::default()
        };
        let simulator = simulate::start(options, Clock::System).await.unwrap();
        let text = format!(
            "name = \"ali1688\"\nkind = \"ali1688\"\nurl = {:?}\naccounts_file = {accounts_file:?}\n\
             unlimited = true\n[cache]\n{rules}",
            simulator.url()
        );
        let config = <Toml as Format>::from_str::<SourceConfig>(&text).unwrap();
        let source = Source::open(&config, Path::new("/"), &|_| None).unwrap();
        let caller = Caller::new(CallerParts {
            source: source.name.clone(),
            vendor: Arc::clone(&source.vendor),
            client: source.client.clone(),
            accounts: Arc::clone(&source.accounts),
            tokens: Arc::new(FileStore::new(folder.path().join("tokens.json"))),
            guard: Guard::of(&source.quota(), &Clock::System),
            topics: Topics::new(topics::Config::default()),
            clock: Clock::System,
            rng: Dice::random(),
        });
        let quota = Arc::new(Memory::with_limits(&source.quota(), &Pacing::default(), &Clock::System));
        let (log, stop) = (Log::default(), CancellationToken::new());
        let (events, reader) = log.reader();
        events.send(assigned()).unwrap();
        let cache = Cache::open(&cache::Config::default(), None).unwrap();
        let cache = cache.source(&config, &Clock::System, &Dice::seeded(5));
        let fetch = Fetch::new(reader, log.clone(), caller, quota, Config::default());
        #[allow(clippy::disallowed_methods, reason = "the handle is kept")]
        let stage = tokio::spawn(fetch.with_cache(cache).run(stop.clone()));
        let ids = simulate::sample(7).take(50).map(|id| id.to_string()).collect();
        Self { simulator: Some(simulator), log, events, stage, stop, requested: 0, ids }
    }

    /// Asks for these items, with more keys of a request; waits until all that was asked for has ended.
    async fn ask(&mut self, items: impl IntoIterator<Item = usize>, more: &str) {
        let json = |item| Bytes::from(format!(r#"{{"item":"{}"{more}}}"#, self.ids[item]));
        let values: Vec<Bytes> = items.into_iter().map(json).collect();
        let first = i64::try_from(self.requested).unwrap();
        self.requested += values.len();
        self.events.send(records(first, values)).unwrap();
        let since = Instant::now();
        while self.log.world().records.len() < self.requested {
            assert!(since.elapsed() < DEADLINE, "{} of {} ended", self.log.world().records.len(), self.requested);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The results, in the order in which they came.
    fn results(&self) -> Vec<Observation> {
        let topic = Topics::new(topics::Config::default()).results();
        let world = self.log.world();
        let results = world.records.iter().filter(|record| *record.topic == *topic);
        results.map(|record| serde_json::from_slice(&record.value).unwrap()).collect()
    }

    fn count(&self, via: &Via) -> usize {
        self.results().iter().filter(|result| result.via == *via).count()
    }

    /// How many calls the vendor has answered.
    fn served(&self) -> u64 {
        self.simulator.as_ref().unwrap().stats().served
    }

    /// The vendor is away from now on.
    async fn silence(&mut self) {
        self.simulator.take().unwrap().stop().await.unwrap();
    }

    async fn end(self) {
        self.stop.cancel();
        self.stage.await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_requests_for_one_key_are_one_call() {
    let mut rig = Rig::start("preset = \"1688\"", Duration::from_millis(300)).await;
    rig.ask(std::iter::repeat_n(0, 10_000), "").await;
    assert_eq!(rig.served(), 1);
    assert_eq!((rig.count(&Via::Call), rig.count(&Via::Cache)), (1, 9_999));
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeat_makes_no_call_and_its_results_say_when_the_vendor_answered() {
    let mut rig = Rig::start("preset = \"taobao\"", Duration::from_millis(10)).await;
    rig.ask(0..50, "").await;
    rig.ask(0..50, "").await;
    rig.ask(0..50, r#","max_age":"1m""#).await;
    assert_eq!(rig.served(), 50);
    let results = rig.results();
    for again in results.iter().filter(|result| result.via == Via::Cache) {
        let first = results.iter().find(|first| first.item == again.item && first.via == Via::Call).unwrap();
        assert_eq!((first.fetched_at, &first.fingerprint), (again.fetched_at, &again.fingerprint));
        assert_eq!(first.raw.as_ref().unwrap().get(), again.raw.as_ref().unwrap().get());
        assert_eq!((again.calls, &again.account), (0, &None));
    }
    assert_eq!(rig.count(&Via::Cache), 100);
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_insists_on_a_call_gets_one_and_the_others_get_what_it_brought() {
    let mut rig = Rig::start("preset = \"1688\"", Duration::from_millis(10)).await;
    rig.ask(0..5, "").await;
    rig.ask(0..5, r#","no_cache":true"#).await;
    rig.ask(0..5, r#","max_age":0"#).await;
    rig.ask(0..5, "").await;
    assert_eq!((rig.served(), rig.count(&Via::Call)), (15, 15));
    let results = rig.results();
    let newest = |item| results.iter().filter(|r| r.item == item && r.via == Via::Call).map(|r| r.fetched_at).max();
    for last in results.iter().filter(|result| result.via == Via::Cache) {
        assert_eq!(Some(last.fetched_at), newest(last.item.clone()));
    }
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_is_answered_with_what_is_kept_and_says_so_unless_a_call_is_insisted_on() {
    let mut rig = Rig::start("preset = \"1688\"", Duration::from_millis(10)).await;
    rig.ask(0..3, "").await;
    rig.silence().await;
    rig.ask(0..3, r#","max_age":"1ms""#).await;
    assert_eq!((rig.count(&Via::Call), rig.count(&Via::Stale)), (3, 3));
    rig.ask(0..3, r#","no_cache":true"#).await;
    rig.ask(3..5, "").await;
    assert_eq!(rig.results().len(), 6, "the other five are failures");
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_stands_in_can_be_switched_off() {
    let mut rig = Rig::start("preset = \"1688\"\nstale_if_error = false", Duration::from_millis(10)).await;
    rig.ask(0..3, "").await;
    rig.silence().await;
    rig.ask(0..3, r#","max_age":"1ms""#).await;
    assert_eq!(rig.results().len(), 3);
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_beyond_the_window_do_not_hold_up_the_one_that_the_window_waits_for() {
    let mut rig = Rig::start("preset = \"1688\"", Duration::from_secs(4)).await;
    rig.ask([1], "").await;
    // While the first is called for, the window fills with answers that are kept, and more wait beyond it; then the
    // second has its answer by the first one's call.
    let window = usize::try_from(crate::kafka::ledger::WINDOW).unwrap();
    rig.ask([0, 0].into_iter().chain(std::iter::repeat_n(1, window + 500)), "").await;
    assert_eq!((rig.served(), rig.count(&Via::Call)), (2, 2));
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_fails_is_a_failure_of_each_request_that_waited_for_it() {
    let mut rig = Rig::start("preset = \"1688\"", Duration::from_millis(10)).await;
    rig.silence().await;
    rig.ask(std::iter::repeat_n(0, 200), "").await;
    let failures: Vec<Failure> = {
        let world = rig.log.world();
        world.records.iter().map(|record| serde_json::from_slice(&record.value).unwrap()).collect()
    };
    let ids: std::collections::BTreeSet<_> = failures.iter().map(|failure| failure.request_id.as_str()).collect();
    assert_eq!(ids.len(), 200);
    // One call at a time, for all that came until it had failed: the records came in one piece.
    let calls: std::collections::BTreeSet<_> = failures.iter().map(|failure| failure.attempt.at).collect();
    assert!(calls.len() <= 3, "{} calls", calls.len());
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_past_its_soft_end_is_refreshed_by_one_request_and_given_to_the_others() {
    let mut rig = Rig::start("fresh = \"1s\"\nkept = \"10m\"\nstretch = 1.0", Duration::from_millis(200)).await;
    rig.ask([0], "").await;
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    rig.ask(std::iter::repeat_n(0, 100), "").await;
    assert_eq!((rig.served(), rig.count(&Via::Call), rig.count(&Via::Cache)), (2, 2, 99));
    rig.silence().await;
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    rig.ask([0], "").await;
    assert_eq!(rig.count(&Via::Stale), 1, "the vendor is away: the refresh costs nobody the answer");
    rig.end().await;
}
