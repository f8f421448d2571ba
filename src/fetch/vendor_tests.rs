//! fetch against the simulated gateway over the loopback: through real proxies, and with a budget.

use std::{collections::BTreeMap, net::SocketAddr, path::Path, time::Duration};

use bytes::Bytes;
use figment::providers::{Format, Toml};
use tokio::task::JoinHandle;

use super::*;
use crate::{
    kafka::scripted::{Log, assigned, records},
    message::Observation,
    platform::{
        Source, SourceConfig,
        proxies::{Mood, Proxy},
    },
    quota::{Pacing, Past, Purse, guard::Guard, memory::Memory},
    runtime::clock::{Clock, Dice},
    simulate::{self, Latency, Options, Shares, Simulator},
    tokens::file::FileStore,
    topics::{self, Topics},
};

/// How long anything may take.
const DEADLINE: Duration = Duration::from_secs(30);
const WINDOW: Duration = Duration::from_secs(1);

/// A vendor, a source that calls it, and what comes of it.
struct Rig {
    simulator: Simulator,
    log: Log,
    events: tokio::sync::mpsc::UnboundedSender<crate::kafka::Event>,
    stage: JoinHandle<Result<(), FetchError>>,
    stop: CancellationToken,
    requested: usize,
    /// Account aliases by the name of their address.
    homes: BTreeMap<String, Vec<String>>,
}

impl Rig {
    /// `more`: the addresses and their settings, as in a configuration.
    async fn start(accounts: usize, address_quota: simulate::Quota, more: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let accounts_file = folder.path().join("accounts.toml");
        let options = Options {
            accounts,
            accounts_file: Some(accounts_file.clone()),
            address_quota,
            latency: Latency { from: Duration::from_millis(5), to: Duration::from_millis(20) },
            shares: Shares::NONE,
            ..Options::default()
        };
        let simulator = simulate::start(options, Clock::System).await.unwrap();
        let text = format!(
            "name = \"ali1688\"\nkind = \"ali1688\"\nurl = {:?}\naccounts_file = {accounts_file:?}\n\
             limit = {{ calls = 10, per = \"1s\", burst = 5 }}\n{more}",
            simulator.url()
        );
        let config = <Toml as Format>::from_str::<SourceConfig>(&text).unwrap();
        let source = Source::open(&config, Path::new("/"), &|_| Some("user:hunter22".to_owned())).unwrap();
        let limits = source.quota();
        let mut homes = BTreeMap::<String, Vec<String>>::new();
        for (account, limits) in source.accounts.iter().zip(&limits.accounts) {
            let name = source.addresses[limits.address].name.clone();
            homes.entry(name).or_default().push(account.alias.to_string());
        }
        let caller = Caller::new(CallerParts {
            source: source.name.clone(),
            vendor: Arc::clone(&source.vendor),
            client: source.client.clone(),
            accounts: Arc::clone(&source.accounts),
            // Those of this vendor live for ever.
            tokens: Arc::new(FileStore::new(folder.path().join("tokens.json"))),
            guard: Guard::of(&limits, &Clock::System),
            topics: Topics::new(topics::Config::default()),
            clock: Clock::System,
            rng: Dice::random(),
        });
        // A machine that is busy with other tests delays a call by far more than a network does.
        let pacing = Pacing { jitter: Duration::from_secs(1), ..Pacing::default() };
        let quota = Arc::new(Memory::with_limits(&limits, &pacing, &Clock::System));
        let (log, stop) = (Log::default(), CancellationToken::new());
        let (events, reader) = log.reader();
        events.send(assigned()).unwrap();
        let fetch = Fetch::new(reader, log.clone(), caller, quota, Config::default());
        let purse = source.budgets.as_ref().and_then(|budgets| Purse::new(budgets, &Past::default()));
        let purse = purse.map(Arc::new);
        let fetch = fetch
            .with_address_health(source.address_health)
            .with_budgets(source.budgets.clone(), purse)
            .run(stop.clone());
        #[allow(clippy::disallowed_methods, reason = "the handle is kept")]
        let stage = tokio::spawn(fetch);
        Self { simulator, log, events, stage, stop, requested: 0, homes }
    }

    fn request(&mut self, count: usize) {
        let ids = simulate::sample(7).skip(self.requested).take(count);
        let offset = i64::try_from(self.requested).unwrap();
        self.events.send(records(offset, ids.map(|id| Bytes::from(id.to_string())))).unwrap();
        self.requested += count;
    }

    fn request_as(&mut self, batch: &str, count: usize) {
        let ids = simulate::sample(7).skip(self.requested).take(count);
        let json = ids.map(|id| Bytes::from(format!(r#"{{"item":"{id}","batch":"{batch}"}}"#)));
        self.events.send(records(i64::try_from(self.requested).unwrap(), json)).unwrap();
        self.requested += count;
    }

    fn ended(&self) -> usize {
        self.log.world().records.len()
    }

    /// Waits until everything that was requested has ended, each as a result of its first call.
    async fn all_found_at_once(&self) {
        until("all requests end", || self.ended() >= self.requested).await;
        let (world, results) = (self.log.world(), Topics::new(topics::Config::default()).results());
        assert_eq!(world.records.len(), self.requested);
        for record in &world.records {
            assert_eq!(*record.topic, *results, "{:?}", String::from_utf8_lossy(&record.value));
            let result: Observation = serde_json::from_slice(&record.value).unwrap();
            assert_eq!(result.calls, 1, "no attempt is spent on a proxy that fails");
        }
    }

    /// The accounts that called from an address, as the vendor saw them.
    fn callers(&self, address: &str) -> Vec<String> {
        let report = self.simulator.stats().addresses.into_iter();
        report.filter(|seen| seen.address.to_string() == address).flat_map(|seen| seen.accounts).collect()
    }

    async fn end(self) {
        self.stop.cancel();
        self.stage.await.unwrap().unwrap();
        assert_eq!(self.simulator.stats().violations, 0);
    }
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let since = Instant::now();
    while !condition() {
        assert!(since.elapsed() < DEADLINE, "waited {DEADLINE:?} in vain: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A port at which nobody listens.
async fn nobody() -> SocketAddr {
    tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_account_calls_from_its_address_and_the_limit_of_an_address_holds() {
    let http = Proxy::http([127, 0, 0, 11], Some("user:hunter22")).await;
    let socks = Proxy::socks([127, 0, 0, 12], Some("user:hunter22")).await;
    let more = format!(
        r#"address_limit = {{ calls = 20, per = "1s", kind = "sliding" }}
           [[address]]
           name = "http"
           url = "{}"
           credentials = {{ env = "P" }}
           [[address]]
           name = "socks"
           url = "{}"
           credentials = {{ env = "P" }}
           [[address]]
           name = "local"
           local = "127.0.0.13"
           [[address]]
           name = "direct""#,
        http.url, socks.url
    );
    let quota = simulate::Quota::Sliding { calls: 20, window: WINDOW };
    let mut rig = Rig::start(24, quota, &more).await;
    rig.request(120);
    rig.all_found_at_once().await;
    for (name, address) in
        [("http", "127.0.0.11"), ("socks", "127.0.0.12"), ("local", "127.0.0.13"), ("direct", "127.0.0.1")]
    {
        assert!(rig.homes[name].len() > 1, "{name}: {:?}", rig.homes);
        assert_eq!(rig.callers(address), rig.homes[name], "{name}");
    }
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_fails_is_taken_out_and_comes_back_and_no_attempt_is_spent() {
    let proxy = Proxy::http([127, 0, 0, 21], None).await;
    proxy.set(Mood::Denies);
    let more = format!(
        r#"address_health = {{ failures = 2, rest = "300ms", rest_max = "600ms" }}
           address = [{{ name = "proxy", url = "{}" }}]"#,
        proxy.url
    );
    let mut rig = Rig::start(10, simulate::Quota::None, &more).await;
    rig.request(60);
    until("the proxy is asked and probed", || proxy.connections() >= 4).await;
    let (before, since) = (proxy.connections(), Instant::now());
    tokio::time::sleep(Duration::from_millis(1_800)).await;
    let probes = proxy.connections() - before;
    // At 100 calls/s it would be about 180.
    assert!(probes <= 8, "{probes} connections in {:?} to a proxy that was taken out", since.elapsed());
    assert_eq!(rig.ended(), 0);
    proxy.set(Mood::Works);
    rig.all_found_at_once().await;
    assert!(!rig.callers("127.0.0.21").is_empty());
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_accounts_of_a_dead_proxy_wait_for_it_while_the_others_carry_the_load() {
    let dead = nobody().await;
    let more = format!(
        r#"address_health = {{ failures = 1, rest = "200ms", rest_max = "200ms" }}
           address = [{{ name = "proxy", url = "socks5://{dead}" }}, {{ name = "direct" }}]"#
    );
    let mut rig = Rig::start(12, simulate::Quota::None, &more).await;
    rig.request(100);
    rig.all_found_at_once().await;
    assert_eq!(rig.callers("127.0.0.1"), rig.homes["direct"], "nobody hops");
    let proxy = Proxy::listen("socks5", dead, [127, 0, 0, 31], None).await;
    until("it is used again", || {
        if rig.ended() == rig.requested {
            rig.request(5);
        }
        proxy.connections() > 0 && !rig.callers("127.0.0.31").is_empty()
    })
    .await;
    rig.all_found_at_once().await;
    assert!(rig.callers("127.0.0.31").iter().all(|alias| rig.homes["proxy"].contains(alias)));
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_failover_they_call_from_another_address_and_come_home() {
    let dead = nobody().await;
    let more = format!(
        r#"address_health = {{ failures = 1, rest = "1s", rest_max = "1s", failover = true }}
           address_limit = {{ calls = 60, per = "1s", kind = "sliding" }}
           address = [{{ name = "proxy", url = "http://{dead}" }}, {{ name = "direct" }}]"#
    );
    let quota = simulate::Quota::Sliding { calls: 60, window: WINDOW };
    let mut rig = Rig::start(12, quota, &more).await;
    until("everybody calls from the other one", || {
        if rig.ended() == rig.requested {
            rig.request(50);
        }
        rig.callers("127.0.0.1").len() == 12
    })
    .await;
    rig.all_found_at_once().await;
    let _proxy = Proxy::listen("http", dead, [127, 0, 0, 41], None).await;
    until("they are home again", || {
        if rig.ended() == rig.requested {
            rig.request(50);
        }
        rig.callers("127.0.0.41") == rig.homes["proxy"]
    })
    .await;
    rig.all_found_at_once().await;
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_from_which_the_vendor_forbids_several_accounts_is_taken_out() {
    let proxy = Proxy::http([127, 0, 0, 51], None).await;
    proxy.set(Mood::Forbids);
    let more = format!(
        r#"address_health = {{ rest = "10m", rest_max = "10m" }}
           address = [{{ name = "proxy", url = "{}" }}, {{ name = "direct" }}]"#,
        proxy.url
    );
    let mut rig = Rig::start(12, simulate::Quota::None, &more).await;
    rig.request(200);
    until("all requests end", || rig.ended() >= rig.requested).await;
    let failures = Topics::new(topics::Config::default()).failures();
    let failed = rig.log.world().records.iter().filter(|record| *record.topic == *failures).count();
    // 6 accounts × 10/s for three seconds would be about 180; some are under way when the second one is refused.
    assert!((2..=20).contains(&failed), "{failed} calls were forbidden");
    assert_eq!(rig.callers("127.0.0.1"), rig.homes["direct"]);
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_is_banned_by_a_notice_with_http_200_is_taken_out() {
    let proxy = Proxy::http([127, 0, 0, 61], None).await;
    proxy.set(Mood::Notice);
    let more = format!(
        r#"address_health = {{ rest = "10m", rest_max = "10m" }}
           address = [{{ name = "proxy", url = "{}" }}, {{ name = "local", local = "127.0.0.62" }}, {{ name = "direct" }}]"#,
        proxy.url
    );
    let mut rig = Rig::start(12, simulate::Quota::None, &more).await;
    rig.request(300);
    until("all requests end", || rig.ended() >= rig.requested).await;
    let failures = Topics::new(topics::Config::default()).failures();
    let failed: Vec<crate::kafka::Outgoing> = {
        let world = rig.log.world();
        world.records.iter().filter(|record| *record.topic == *failures).cloned().collect()
    };
    // A third of the accounts call from there, at 10/s each; some are under way when the fifth reply comes.
    assert!((5..=20).contains(&failed.len()), "{} calls were answered with the notice", failed.len());
    for record in failed {
        let failure: crate::message::Failure = serde_json::from_slice(&record.value).unwrap();
        assert!(failure.attempt.message.contains("rgv587_flag"), "{failure:?}");
    }
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_stops_at_its_budget_and_the_rest_of_it_ends_as_dead_letters() {
    let more = r#"cost_per_call = "0.02"
                  budget = { per_batch = "0.50" }"#;
    let mut rig = Rig::start(20, simulate::Quota::None, more).await;
    rig.request_as("rich", 20);
    rig.request_as("poor", 60);
    rig.request_as("rich", 5);
    until("all requests end", || rig.ended() >= rig.requested).await;
    // Whoever comes later is told at once.
    rig.request_as("poor", 10);
    rig.request(10);
    until("all requests end", || rig.ended() >= rig.requested).await;
    let mut ends = BTreeMap::<(Option<String>, String), usize>::new();
    for record in &rig.log.world().records {
        let json: serde_json::Value = serde_json::from_slice(&record.value).unwrap();
        let batch = json["batch"].as_str().or(json["request"]["batch"].as_str()).map(str::to_owned);
        let end = json["status"].as_str().or(json["reason"].as_str()).unwrap().to_owned();
        *ends.entry((batch, end)).or_default() += 1;
    }
    let count = |batch: Option<&str>, end: &str| {
        ends.get(&(batch.map(str::to_owned), end.to_owned())).copied().unwrap_or_default()
    };
    assert_eq!((count(Some("poor"), "found"), count(Some("poor"), "budget")), (25, 45), "{ends:?}");
    assert_eq!((count(Some("rich"), "found"), count(None, "found")), (25, 10), "{ends:?}");
    assert_eq!(rig.simulator.stats().served, 60);
    rig.end().await;
}
