//! Long answers out of a warm cache: what a process holds of them is bounded by bytes, however many are known.

#![allow(clippy::print_stdout, reason = "the numbers are part of what the test is for")]

use std::{
    fmt::Write as _,
    time::{Duration, Instant},
};

use weir::{
    cache::{self, Answer, Cache, SourceCache},
    kafka::{Producer, admin},
    message::{Columns, ItemId, Request, SourceName, Status},
    platform::SourceConfig,
    runtime::clock::{Clock, Dice},
    simulate::{self, Options},
};

use crate::{
    process::{Installation, Process},
    stack::{address, eventually, kafka, outgoing, topics, unique},
};

/// What the vendor said of each item, in bytes.
const LONG: usize = 300_000;
/// What the process may take, in bytes.
const RESIDENT: u64 = 300_000_000;

fn id(number: usize) -> ItemId {
    ItemId::new((610_000_000_000 + number as u64).to_string()).unwrap()
}

/// Some JSON that repeats itself no more than a product does; its columns are `seed`'s.
fn answer(seed: usize) -> Answer {
    let dice = Dice::seeded(seed as u64);
    let mut raw = String::with_capacity(LONG + 200);
    raw.push_str("{\"productInfo\":{\"attributes\":[");
    while raw.len() < LONG {
        let separator = if raw.ends_with('[') { "" } else { "," };
        let (id, value) = (dice.bits() % 100_000, dice.bits());
        write!(raw, "{separator}{{\"attributeID\":{id},\"attributeName\":\"材质\",\"value\":\"{value:x}\"}}").unwrap();
    }
    raw.push_str("]}}");
    let columns = Columns { title: Some(format!("cup {seed}")), ..Columns::default() };
    let raw = Some(serde_json::value::RawValue::from_string(raw).unwrap());
    Answer { status: Status::Found, fingerprint: columns.fingerprint(Status::Found), columns, raw }
}

/// Fills Redis as another process that calls this vendor would have.
async fn fill(prefix: &str, url: &str, count: usize) {
    let config = cache::Config { prefix: prefix.to_owned(), ..Default::default() };
    let source = serde_json::json!({"name": "ali1688", "kind": "ali1688", "url": url, "cache": {"preset": "1688"}});
    let source: SourceConfig = serde_json::from_value(source).unwrap();
    let whole = Cache::open(&config, Some(&address("WEIR_TEST_REDIS"))).unwrap();
    let cache: SourceCache = whole.source(&source, &Clock::System, &Dice::random()).unwrap();
    cache.connected(Duration::from_secs(10)).await;
    for number in 0..count {
        let key = cache.key(&Request::new(id(number))).unwrap();
        let _ = cache.keep(&key, answer(number), Clock::System.now(), Duration::from_millis(200), false);
        if number % 100 == 99 {
            assert!(whole.far().unwrap().flushed(Duration::from_secs(30)).await);
        }
    }
    assert!(whole.far().unwrap().flushed(Duration::from_secs(30)).await);
}

/// The most that a process has been resident, in bytes.
fn peak(process: &Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

async fn known_ids(count: usize) {
    let folder = tempfile::tempdir().unwrap();
    let accounts = folder.path().join("accounts.toml");
    let options = Options { accounts: 1, accounts_file: Some(accounts.clone()), ..Options::default() };
    let simulator = simulate::start(options, Clock::System).await.unwrap();
    let source = SourceName::new("ali1688").unwrap();
    let topics = topics("large", &source, 8).await;
    let (results, prefix, group) = (topics.results(), unique("cache"), unique("group"));
    fill(&prefix, &simulator.url(), count).await;
    let sections = format!("[redis]\nurl = \"{}\"\n[cache]\nprefix = \"{prefix}\"\n", address("WEIR_TEST_REDIS"));
    let installation =
        Installation::new(&simulator, &accounts, results.trim_end_matches(".results"), &group, &sections)
            .with("[source.cache]\npreset = \"1688\"\n", ("WEIR_LOG__FILTER", "info"));
    let requests = topics.requests(&source);
    let records = (0..count).map(|number| outgoing(&requests, &number.to_string(), id(number).as_str())).collect();
    Producer::new(&kafka()).unwrap().send(records).await.unwrap();

    let process = installation.start("only", &["run", "--role", "fetch"]);
    let since = Instant::now();
    let group = format!("{group}.fetch.ali1688");
    eventually("it works", async || process.log().contains("fetching").then_some(())).await;
    let mut before = (Instant::now(), i64::MAX);
    loop {
        let lag = admin::lag(&kafka(), &group, std::slice::from_ref(&requests)).await.unwrap();
        let waiting: i64 = lag.iter().map(|lag| lag.end - lag.committed.unwrap_or(lag.low)).sum();
        if waiting == 0 {
            break;
        }
        if waiting < before.1 {
            before = (Instant::now(), waiting);
        }
        assert!(before.0.elapsed() < Duration::from_secs(60), "{waiting} of {count} wait, and it does not go on");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let (took, peak) = (since.elapsed(), peak(&process));
    println!("{count} known IDs with answers of {LONG} bytes: {peak} bytes resident at most, in {took:?}");
    assert_eq!(simulator.stats().served, 0, "all of them were known");
    assert!(peak < RESIDENT, "{peak} bytes resident");
    assert!(process.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "fails: so many long answers in Redis time out, the cache counts as lost, and the vendor is called"]
async fn long_answers_of_a_warm_cache_take_no_more_memory_than_they_may() {
    known_ids(2_500).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "minutes, and gigabytes in Redis and Kafka: the same with as many as an issue asked for"]
async fn fifty_thousand_long_answers_of_a_warm_cache_take_no_more_memory_either() {
    known_ids(50_000).await;
}
