//! The cache on real servers: one call for a fleet, answers that are replaced everywhere, a Redis that stands still.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use serde_json::Value;
use tempfile::TempDir;
use weir::{
    cache::{self, Answer, Cache, Key, Looked, Seen, SourceCache},
    kafka::Producer,
    message::{Columns, ItemId, Request, SourceName, Status},
    platform::SourceConfig,
    runtime::clock::{Clock, Dice, Timestamp},
    simulate::{self, Latency, Options, Quota, Shares, Simulator},
    topics::Topics,
};

use crate::{
    process::{Installation, Process},
    stack::{Follower, address, eventually, kafka, outgoing, topics, unique},
    workers::Server,
};

const FETCH: &[&str] = &["run", "--role", "fetch,retry"];

/// A vendor, weir's installation before it, and a reader of the outcomes.
struct Scene {
    simulator: Simulator,
    installation: Installation,
    topics: Topics,
    ends: Follower,
    ids: Vec<String>,
    asked: usize,
    _folder: TempDir,
}

impl Scene {
    async fn new(what: &str, latency: Duration, redis: &str, variable: (&str, &str)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let accounts: PathBuf = folder.path().join("accounts.toml");
        let options = Options {
            accounts: 8,
            accounts_file: Some(accounts.clone()),
            quota: Quota::None,
            latency: Latency { from: latency, to: latency },
            shares: Shares { absent: 0.1, ..Shares::NONE },
            ..Options::default()
        };
        let simulator = simulate::start(options, Clock::System).await.unwrap();
        let topics = topics(what, &SourceName::new("ali1688").unwrap(), 8).await;
        let results = topics.results();
        let sections = format!(
            "[redis]\nurl = \"{redis}\"\n[cache]\nprefix = \"{}\"\nclaim = \"2s\"\n[retry]\nbase = \"100ms\"\n",
            unique("cache")
        );
        let prefix = results.trim_end_matches(".results");
        let installation = Installation::new(&simulator, &accounts, prefix, &unique("group"), &sections);
        Self {
            simulator,
            installation: installation.with("[source.cache]\npreset = \"1688\"\nabsent = \"10m\"\n", variable),
            ends: Follower::of(&[topics.results(), topics.failures(), topics.dead()]).await,
            topics,
            ids: simulate::sample(21).take(2_000).map(|id| id.to_string()).collect(),
            asked: 0,
            _folder: folder,
        }
    }

    /// Asks for these items, each on any partition.
    async fn ask(&mut self, items: impl IntoIterator<Item = usize>, more: &str) {
        let topic = self.topics.requests(&SourceName::new("ali1688").unwrap());
        let record = |(number, item): (usize, usize)| {
            outgoing(&topic, &number.to_string(), &format!(r#"{{"item":"{}"{more}}}"#, self.ids[item]))
        };
        let records: Vec<_> = items.into_iter().enumerate().map(record).collect();
        self.asked += records.len();
        Producer::new(&kafka()).unwrap().send(records).await.unwrap();
    }

    /// Waits until all that was asked for has ended: how often by which way.
    async fn ended(&mut self) -> BTreeMap<String, usize> {
        let seen = self.ends.read_until(self.asked).await;
        let mut ends = BTreeMap::new();
        for record in seen {
            let json = record.json();
            *ends.entry(json["via"].as_str().unwrap_or("failed").to_owned()).or_default() += 1;
        }
        assert_eq!(seen.len(), self.asked, "each ends once: {ends:?}");
        ends
    }

    /// Processes that share the partitions.
    async fn fleet(&self, size: usize) -> Vec<Process> {
        let start = |_| self.installation.start(&unique("fetch"), FETCH);
        let fleet: Vec<_> = (0..size).map(start).collect();
        for process in &fleet {
            process.says("fetching").await;
            process.says("connected to Redis for the cache").await;
        }
        fleet
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn four_processes_make_one_call_for_one_item_whatever_its_partitions() {
    let none = ("WEIR_LOG__FILTER", "info");
    let mut scene = Scene::new("one", Duration::from_millis(1_500), &address("WEIR_TEST_REDIS"), none).await;
    // They are there before the fleet is, so that all of it begins at the same time.
    let fleet = scene.fleet(4).await;
    scene.ask(std::iter::repeat_n(0, 4_000), "").await;
    let ends = scene.ended().await;
    // Two at most: partitions may still move.
    let calls = scene.simulator.stats().served;
    assert!((1..=2).contains(&calls), "{calls} calls: {ends:?}");
    assert_eq!(ends["call"] + ends["cache"], 4_000);
    let busy = fleet.iter().filter(|process| process.log().contains("fetching")).count();
    assert_eq!(busy, 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeat_after_a_restart_makes_no_call_and_no_cache_makes_one_each() {
    let none = ("WEIR_LOG__FILTER", "info");
    let mut scene = Scene::new("repeat", Duration::from_millis(20), &address("WEIR_TEST_REDIS"), none).await;
    let fleet = scene.fleet(2).await;
    scene.ask(0..300, "").await;
    assert_eq!(scene.ended().await["call"], 300);
    for process in fleet {
        process.stop().await;
    }
    // What was in memory is gone.
    let _fleet = scene.fleet(2).await;
    scene.ask(0..300, "").await;
    scene.ask(0..300, r#","max_age":"1h""#).await;
    let ends = scene.ended().await;
    assert_eq!((ends["call"], ends["cache"], scene.simulator.stats().served), (300, 600, 300));
    scene.ask(0..300, r#","no_cache":true"#).await;
    let ends = scene.ended().await;
    assert_eq!((ends["call"], scene.simulator.stats().served), (600, 600));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_stands_still_or_dies_costs_no_record_and_no_error() {
    let mut redis = Server::start();
    let none = ("WEIR_LOG__FILTER", "info");
    let mut scene = Scene::new("still", Duration::from_millis(20), &redis.url(), none).await;
    let fleet = scene.fleet(2).await;
    scene.ask(0..100, "").await;
    scene.ended().await;
    redis.signal("-STOP");
    scene.ask(100..200, "").await;
    scene.ask(0..100, "").await;
    scene.ended().await;
    redis.signal("-CONT");
    redis.kill();
    scene.ask(200..300, "").await;
    scene.ask(0..200, "").await;
    let ends = scene.ended().await;
    assert!(!ends.contains_key("failed"), "{ends:?}");
    redis.restart().await;
    for process in &fleet {
        eventually("Redis is found again", async || {
            (process.log().matches("connected to Redis for the cache").count() > 1).then_some(())
        })
        .await;
    }
    scene.ask(300..400, "").await;
    scene.ask(300..400, r#","max_age":"1h""#).await;
    let ends = scene.ended().await;
    assert!(!ends.contains_key("failed"), "{ends:?}");
    assert!(scene.simulator.stats().served < 600, "each process goes on with its own memory: {ends:?}");
}

/// A source's cache as a process has it, with its own memory.
fn process(prefix: &str, redis: &str) -> (Cache, SourceCache, Key) {
    let config = cache::Config { prefix: prefix.to_owned(), claim: Duration::from_secs(1), ..Default::default() };
    let cache = Cache::open(&config, Some(redis)).unwrap();
    let source = serde_json::json!({"name": "ali1688", "kind": "ali1688", "cache": {"preset": "1688"}});
    let source: SourceConfig = serde_json::from_value(source).unwrap();
    let of_source = cache.source(&source, &Clock::System, &Dice::random()).unwrap();
    let key = of_source.key(&Request::new(ItemId::new("7").unwrap())).unwrap();
    (cache, of_source, key)
}

fn answer(price: &str) -> Answer {
    let columns = Columns { price: Some(price.to_owned()), ..Columns::default() };
    Answer { status: Status::Found, fingerprint: columns.fingerprint(Status::Found), columns, raw: None }
}

fn price(kept: &cache::Kept) -> &str {
    kept.answer.columns.price.as_deref().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_from_redis_fills_the_memory_and_a_change_drops_it_everywhere() {
    let (prefix, redis) = (unique("l2"), address("WEIR_TEST_REDIS"));
    let (_one, one, key) = process(&prefix, &redis);
    let (_two, two, _) = process(&prefix, &redis);
    for cache in [&one, &two] {
        cache.connected(Duration::from_secs(30)).await;
    }
    let fetched_at = Clock::System.now();
    let _ = one.keep(&key, answer("1.00"), fetched_at, Duration::ZERO, false);
    let kept = eventually("it is in Redis", async || {
        let looked = two.far(&key, None, (None, false), cache::PATIENCE, &mut None).await;
        if let Looked::Hit(kept) = looked { Some(kept) } else { None }
    })
    .await;
    assert_eq!((price(&kept), kept.ends.fetched_at), ("1.00", fetched_at));
    assert!(matches!(two.near(&key, None), Seen::Hit(_)), "it fills the memory");

    let _ = one.keep(&key, answer("2.00"), fetched_at.after(Duration::from_millis(1)), Duration::ZERO, true);
    eventually("the other process drops its own", async || matches!(two.near(&key, None), Seen::Miss).then_some(()))
        .await;
    let Looked::Hit(kept) = two.far(&key, None, (None, false), cache::PATIENCE, &mut None).await else {
        panic!("it is replaced in Redis")
    };
    assert_eq!(price(&kept), "2.00");
    // A call that began before and ends after replaces nothing.
    let _ = two.keep(&key, answer("1.50"), fetched_at, Duration::ZERO, false);
    let (_three, three, _) = process(&prefix, &redis);
    three.connected(Duration::from_secs(30)).await;
    let Looked::Hit(kept) = three.far(&key, None, (None, false), cache::PATIENCE, &mut None).await else {
        panic!("it is in Redis")
    };
    assert_eq!(price(&kept), "2.00", "the newest answer wins");

    one.drop_all(&key);
    eventually("all have dropped it", async || {
        let gone = [&two, &three].iter().all(|cache| matches!(cache.near(&key, None), Seen::Miss));
        (gone && one.show(&key).await.unwrap().is_none()).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_makes_others_wait_for_the_answer_and_a_dead_ones_ends_by_itself() {
    let (prefix, redis) = (unique("claim"), address("WEIR_TEST_REDIS"));
    let (whole, one, key) = process(&prefix, &redis);
    let (_two, two, _) = process(&prefix, &redis);
    for cache in [&one, &two] {
        cache.connected(Duration::from_secs(30)).await;
    }
    let Looked::Call(Some(claim)) = one.far(&key, None, (None, false), cache::PATIENCE, &mut None).await else {
        panic!("nobody has it")
    };
    let (waiter, wanted) = (two.clone(), key.clone());
    let waits = tokio::spawn(async move { waiter.far(&wanted, None, (None, false), cache::PATIENCE, &mut None).await });
    // Longer than the claim lives by itself: its owner keeps it alive.
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    assert!(!waits.is_finished(), "the claim is kept alive");
    let _ = one.keep(&key, answer("1.00"), Clock::System.now(), Duration::ZERO, false);
    drop(claim);
    assert!(matches!(waits.await.unwrap(), Looked::Hit(kept) if price(&kept) == "1.00"));

    one.drop_all(&key);
    assert!(whole.far().unwrap().flushed(Duration::from_secs(30)).await);
    let Looked::Call(Some(claim)) = one.far(&key, None, (None, false), cache::PATIENCE, &mut None).await else {
        panic!("it was dropped")
    };
    // As if it were killed: the connection ends, and nothing is given back.
    drop((whole, one));
    let Looked::Call(Some(_)) = two.far(&key, None, (None, false), cache::PATIENCE, &mut None).await else {
        panic!("the claim has ended")
    };
    drop(claim);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_memory_has_no_room_for_is_recalled_from_redis_and_a_redis_that_stands_still_costs_a_moment() {
    let server = Server::start();
    let prefix = unique("recall");
    let (_one, one, key) = process(&prefix, &server.url());
    let (_two, two, _) = process(&prefix, &server.url());
    for cache in [&one, &two] {
        cache.connected(Duration::from_secs(30)).await;
    }
    let a_while_ago = Timestamp::from_millis(Clock::System.now().as_millis() - 20 * 60_000);
    let (request, other) = (Request::new(ItemId::new("7").unwrap()), Request::new(ItemId::new("8").unwrap()));
    let _ = one.keep(&key, answer("1.00"), a_while_ago, Duration::ZERO, false);
    let keys = [key.clone(), two.key(&other).unwrap()];
    let recall = async || two.recall(keys.to_vec()).await;
    let found = eventually("it is in Redis", async || Some(recall().await).filter(|found| !found.is_empty())).await;
    assert!(two.stale(&request).is_none(), "memory knows nothing of it");
    assert_eq!((found.len(), price(&found[&key])), (1, "1.00"));
    let insists = Request { no_cache: true, ..request.clone() };
    assert!(two.stands_in(&found[&key], &request) && !two.stands_in(&found[&key], &insists));

    server.signal("-STOP");
    let since = std::time::Instant::now();
    let found = two.recall(keys.to_vec()).await;
    // Far longer than the second that it should be: the machine may be busy. For ever is what it must not be.
    assert!(found.is_empty() && since.elapsed() < Duration::from_secs(10), "{:?}", since.elapsed());
    server.signal("-CONT");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_is_answered_from_redis_where_memory_had_no_room() {
    // For some four hundred answers.
    let small = ("WEIR_CACHE__MEMORY", "1MiB");
    let scene = Scene::new("room", Duration::from_millis(20), &address("WEIR_TEST_REDIS"), small).await;
    // A busy machine is slow, too, and the answers would be given up for it.
    let patient = ("WEIR_CACHE__REDIS_TIMEOUT", "5s");
    let mut scene = Scene { installation: scene.installation.with("", patient), ..scene };
    let _fleet = scene.fleet(1).await;
    scene.ask(0..2_000, "").await;
    assert_eq!(scene.ended().await["call"], 2_000);
    let chaos = format!("{}/chaos", scene.simulator.url());
    let order = r#"{"mode":"outage"}"#;
    let told = reqwest::Client::new().post(chaos).body(order).send().await.unwrap();
    assert!(told.status().is_success());
    scene.ask(0..2_000, r#","max_age":"1ms""#).await;
    let ends = scene.ended().await;
    assert_eq!((ends["call"], ends["stale"], ends.get("failed")), (2_000, 2_000, None), "{ends:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cache_is_warmed_from_a_file_and_says_what_it_leaves_out() {
    let none = ("WEIR_LOG__FILTER", "info");
    let mut scene = Scene::new("warm", Duration::from_millis(20), &address("WEIR_TEST_REDIS"), none).await;
    let now = Clock::System.now().as_millis();
    let line = |item: &str, source: &str, price: &str, at: i64| {
        serde_json::json!({"request_id": "r", "source": source, "item": item, "status": "found", "via": "call",
            "calls": 1, "requested_at": at, "fetched_at": at, "latency_ms": 1, "columns": {"price": price}})
        .to_string()
    };
    let ids = scene.ids.clone();
    let good = |number: usize, price: &str, age: i64| line(&ids[number], "ali1688", price, now - age * 1_000);
    let (older, newer) = (good(1, "1.00", 60), good(1, "2.00", 30));
    let lines = [good(0, "9.90", 0), newer, older, good(2, "1", 7 * 86_400), line(&ids[3], "taobao", "1", now)];
    let weir = &scene.installation;
    let warm = async |file: &str| weir.outcome(&["cache", "warm", "ali1688", "--file", file]).await;
    let (code, text) = warm(&weir.file("good.jsonl", &(lines.join("\n") + "\n\n"))).await;
    assert!(code == 0 && text.contains("Filled the cache with 2 answers of ali1688"), "{text}");
    for left_out in ["1 answer of an item that had one", "1 answer skipped: too old", "1 answer skipped: of another"] {
        assert!(text.contains(left_out), "{left_out}: {text}");
    }
    let (code, text) = weir.outcome(&["cache", "show", "ali1688", &ids[1]]).await;
    assert!(code == 0 && text.contains("2.00"), "the newer one is kept: {text}");

    let torn = weir.file("torn.jsonl", &format!("{}\n{{\"item\":\"5\"}}\n{}\n", good(4, "1", 0), good(5, "1", 0)));
    let (code, text) = warm(&torn).await;
    assert!(code == 1 && text.contains("torn.jsonl line 2 is no result") && text.contains("with 1 answer"), "{text}");
    let (code, text) = warm("/nowhere/results.jsonl").await;
    assert!(code == 64 && text.contains("cannot read /nowhere/results.jsonl"), "{text}");
    let (code, text) = weir.outcome(&["cache", "warm", "ebay", "--file", &torn]).await;
    assert!(code == 64 && text.contains("ebay"), "{text}");

    let _fleet = scene.fleet(1).await;
    scene.ask([0, 1, 4, 5], "").await;
    let ends = scene.ended().await;
    assert_eq!((ends["cache"], ends["call"], scene.simulator.stats().served), (3, 1, 1), "{ends:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_item_is_got_shown_dropped_refreshed_and_served_with_an_etag() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let listen = ("WEIR_HTTP__LISTEN", &*format!("127.0.0.1:{port}"));
    let mut scene = Scene::new("get", Duration::from_millis(20), &address("WEIR_TEST_REDIS"), listen).await;
    let fetch = scene.installation.start("all", &["run", "--role", "fetch,retry,serve"]);
    fetch.says("fetching").await;
    scene.ask(1..60, "").await;
    scene.ended().await;
    let absent = scene.ends.seen.iter().map(crate::stack::Seen::json).find(|json| json["status"] == "absent").unwrap();
    let absent = absent["item"].as_str().unwrap();
    let (weir, served) = (&scene.installation, || scene.simulator.stats().served);
    let there = scene.ids[0].as_str();
    let get = async |arguments: &[&str]| weir.outcome(&[&["get", "ali1688"], arguments].concat()).await;

    let (code, text) = get(&[there, "--json"]).await;
    let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert_eq!((code, first["via"].as_str(), served()), (0, Some("call"), 60), "{text}");
    let (code, text) = get(&[there]).await;
    assert!(code == 0 && text.contains("the cache") && served() == 60, "{text}");
    let (code, text) = get(&[there, "--max-age", "0"]).await;
    assert!(code == 0 && text.contains("a call") && served() == 61, "{text}");
    assert_eq!(get(&[absent]).await.0, 1, "there is no such item");
    assert_eq!(weir.outcome(&["get", "ebay", "1"]).await.0, 64);

    let (code, text) = weir.outcome(&["cache", "show", "ali1688", there]).await;
    assert!(code == 0 && text.contains("found"), "{text}");
    let (code, text) = weir.outcome(&["cache", "drop", "ali1688", there]).await;
    assert!(code == 0 && text.contains("Dropped"), "{text}");
    let (code, text) = weir.outcome(&["cache", "show", "ali1688", there]).await;
    assert!(code == 1 && text.contains("not cached"), "{text}");
    let before = served();
    assert_eq!(weir.outcome(&["cache", "refresh", "ali1688", there]).await.0, 0);
    eventually("it is called for anew", async || (served() > before).then_some(())).await;

    let many: Vec<String> = simulate::sample(77).take(40_000).map(|id| id.to_string()).collect();
    let many = weir.file("many.txt", &many.join("\n"));
    let (code, text) = weir.outcome(&["cache", "drop", "ali1688", "--file", &many]).await;
    assert!(code == 0 && text.contains("40,000"), "{text}");

    let client = reqwest::Client::new();
    let url = format!("http://127.0.0.1:{port}/items/ali1688");
    fetch.says("role=\"serve\"").await;
    let reply = client.get(format!("{url}/{there}")).send().await.unwrap();
    assert_eq!(reply.status(), 200);
    let header = |reply: &reqwest::Response, name: &str| reply.headers()[name].to_str().unwrap().to_owned();
    let tag = header(&reply, "etag");
    assert!(header(&reply, "cache-control").contains("max-age="), "{reply:?}");
    let body: Value = serde_json::from_slice(&reply.bytes().await.unwrap()).unwrap();
    assert_eq!(body["item"], *there);
    let again = client.get(format!("{url}/{there}")).header("If-None-Match", tag).send().await.unwrap();
    assert_eq!((again.status().as_u16(), again.bytes().await.unwrap().len()), (304, 0));
    let other = client.get(format!("{url}/{}", scene.ids[100])).send().await.unwrap();
    assert_eq!((other.status().as_u16(), header(&other, "x-weir-via")), (200, "call".to_owned()));
    assert_eq!(client.get(format!("{url}/{absent}")).send().await.unwrap().status(), 404);
    assert_eq!(client.get(format!("{url}/1?max_age=soon")).send().await.unwrap().status(), 400);

    let metrics = client.get(format!("http://127.0.0.1:{port}/metrics")).send().await.unwrap();
    assert!(header(&metrics, "content-type").starts_with("application/openmetrics-text"));
    let metrics = metrics.text().await.unwrap();
    let value = |series: &str| {
        let line = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {series} in\n{metrics}")).parse::<u64>().unwrap()
    };
    let calls = metrics.lines().filter(|line| line.starts_with("weir_fetch_calls_total{"));
    let calls: u64 = calls.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum();
    assert_eq!(calls, served(), "{metrics}");
    let kept = |by: &str| value(&format!(r#"weir_cache_requests_total{{source="ali1688",by="{by}"}}"#));
    assert!(kept("memory") + kept("redis") > 0, "{metrics}");
    assert_eq!(value(r#"weir_role_ready{role="fetch/ali1688"}"#), 1);
    assert_eq!(value(r#"weir_fetch_breaker_open{source="ali1688"}"#), 0);
}
