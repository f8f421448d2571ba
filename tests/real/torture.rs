//! The sink under random faults: in the end every record is one row, in every table.
//!
//! `deploy/local/torture sink --faults 200 --seed 7` runs the same for as long as one likes. The seed decides which
//! faults come in which order and when; how they fall together with the work decides the machine.

use std::{collections::BTreeMap, fmt, time::Duration};

use rdkafka::{
    ClientConfig,
    producer::{BaseRecord, DefaultProducerContext, Producer, ThreadedProducer},
};
use serde_json::json;
use tempfile::TempDir;
use tokio::time::sleep;
use weir::{
    message::SourceName,
    runtime::clock::{Clock, Dice},
    simulate::{self, Options, Simulator},
    store::{
        ClickHouseConfig,
        query::{Format, query},
        schema,
    },
    topics::Topics,
};

use crate::{
    outage::Servers,
    process::{Installation, Process},
    proxy::{Mood, Proxy},
    stack::{address, topics, unique},
};

/// How long the sink may take to come to the end after the last fault: its pauses are up to 30 s.
const CATCH_UP: Duration = Duration::from_secs(120);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    KillSink,
    SecondSinkJoins,
    SecondSinkLeaves,
    SecondSinkIsKilled,
    StopClickHouse,
    KillClickHouse,
    AnswersAreLost,
    ConnectionsAreCut,
    RequestsAreLate,
}

impl Fault {
    const ALL: [Self; 9] = [
        Self::KillSink,
        Self::SecondSinkJoins,
        Self::SecondSinkLeaves,
        Self::SecondSinkIsKilled,
        Self::StopClickHouse,
        Self::KillClickHouse,
        Self::AnswersAreLost,
        Self::ConnectionsAreCut,
        Self::RequestsAreLate,
    ];
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What was written to the topics, by what it must become.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Produced {
    results: u64,
    poison: u64,
    failures: u64,
    requests: u64,
}

/// A number from 0 to below `count`.
fn below(dice: &Dice, count: usize) -> usize {
    usize::try_from((dice.bits() >> 65) % count as u128).unwrap()
}

/// Writes to all topics, in transactions, some of which are rolled back: their marks leave gaps in the offsets.
struct Source {
    producer: ThreadedProducer<DefaultProducerContext>,
    topics: Topics,
    requests: String,
    dice: Dice,
    next: u64,
    produced: Produced,
}

impl Source {
    fn new(topics: Topics, requests: String, dice: Dice) -> Self {
        let producer: ThreadedProducer<DefaultProducerContext> = ClientConfig::new()
            .set("bootstrap.servers", address("WEIR_TEST_KAFKA"))
            .set("transactional.id", unique("torture"))
            .set("retry.backoff.ms", "10")
            .create()
            .unwrap();
        producer.init_transactions(Duration::from_secs(30)).unwrap();
        Self { producer, topics, requests, dice, next: 0, produced: Produced::default() }
    }

    /// One transaction of up to `most` records.
    fn write(&mut self, most: usize) {
        let before = self.produced;
        self.producer.begin_transaction().unwrap();
        for _ in 0..=below(&self.dice, most) {
            self.write_one();
        }
        if self.dice.fraction() < 0.1 {
            self.producer.flush(Duration::from_secs(10)).unwrap();
            self.producer.abort_transaction(Duration::from_secs(10)).unwrap();
            self.produced = before;
        } else {
            self.producer.commit_transaction(Duration::from_secs(10)).unwrap();
        }
    }

    fn write_one(&mut self) {
        self.next += 1;
        let (number, at) = (self.next, Clock::System.now().as_millis());
        // Most items come once: a row that is missing in `items` is not hidden by a newer one.
        let item = if self.dice.fraction() < 0.2 { number % 100 } else { 1_000_000 + number }.to_string();
        let id = format!("r{number}");
        let kind = self.dice.fraction();
        let produced = &mut self.produced;
        let (topic, value) = if kind < 0.01 {
            produced.poison += 1;
            (self.topics.results(), "{broken".to_owned())
        } else if kind < 0.7 {
            produced.results += 1;
            let value = json!({"request_id": id, "source": "ali1688", "item": item, "status": "found", "via": "call",
                "calls": 1, "requested_at": at, "latency_ms": 5,
                // Every observation has a time of its own, so that the newest of an item is one and no other.
                "fetched_at": 1_795_000_000_000_u64 + number, "columns": {"title": "x".repeat(300), "price": "1.50"}});
            (self.topics.results(), value.to_string())
        } else if kind < 0.8 {
            produced.failures += 1;
            let value = json!({"request_id": id, "source": "ali1688", "request": {"item": item, "requested_at": at},
                "attempt": {"at": at, "class": "outage", "code": "c", "message": "m", "latency_ms": 1}});
            (self.topics.failures(), value.to_string())
        } else {
            produced.requests += 1;
            (self.requests.clone(), item.clone())
        };
        let record = BaseRecord::to(&topic).key(&item).payload(&value);
        self.producer.send(record).map_err(|(error, _)| error).unwrap();
    }
}

/// The world of one run.
struct Scene {
    servers: Servers,
    proxy: Proxy,
    weir: Installation,
    source: Source,
    database: ClickHouseConfig,
    first: Option<Process>,
    second: Option<Process>,
    dice: Dice,
    done: BTreeMap<Fault, u32>,
    _simulator: Simulator,
    _folder: TempDir,
}

impl Scene {
    async fn new(seed: u64) -> Self {
        let dice = Dice::seeded(seed);
        let servers = Servers::start("torture", &["clickhouse"]).await;
        let url = servers.addresses["WEIR_CLICKHOUSE__URL"].clone();
        let proxy = Proxy::start(url.trim_start_matches("http://")).await;
        let folder = tempfile::tempdir().unwrap();
        let accounts = folder.path().join("accounts.toml");
        let options = Options { accounts: 1, accounts_file: Some(accounts.clone()), ..Options::default() };
        let simulator = simulate::start(options, Clock::System).await.unwrap();
        let source_name = SourceName::new("ali1688").unwrap();
        let topics = topics("torture", &source_name, 2).await;
        let prefix = topics.results().trim_end_matches(".results").to_owned();
        let more = format!(
            "[clickhouse]\nurl = \"http://{}\"\ntimeout = \"2s\"\n[sink]\nrows = 300\nage = \"200ms\"\n",
            proxy.address
        );
        let weir = Installation::new(&simulator, &accounts, &prefix, &unique("group"), &more);
        let database = ClickHouseConfig { url, ..ClickHouseConfig::default() };
        schema::apply(&database).await.unwrap();
        let source = Source::new(topics.clone(), topics.requests(&source_name), dice.clone());
        let first = Some(weir.start("first", &["sink"]));
        Self {
            servers,
            proxy,
            weir,
            source,
            database,
            first,
            second: None,
            dice,
            done: BTreeMap::new(),
            _simulator: simulator,
            _folder: folder,
        }
    }

    /// Writes for a random while, up to `most`.
    async fn work(&mut self, most: Duration) {
        let end = tokio::time::Instant::now() + most.mul_f64(self.dice.fraction());
        loop {
            self.source.write(200);
            if tokio::time::Instant::now() >= end {
                return;
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    fn next_fault(&mut self, among: &[Fault]) -> Fault {
        loop {
            let fault = among[below(&self.dice, among.len())];
            let is_possible = match fault {
                Fault::SecondSinkJoins => self.second.is_none(),
                Fault::SecondSinkLeaves | Fault::SecondSinkIsKilled => self.second.is_some(),
                _ => true,
            };
            if is_possible {
                return fault;
            }
        }
    }

    async fn suffer(&mut self, fault: Fault) {
        *self.done.entry(fault).or_default() += 1;
        match fault {
            Fault::KillSink => {
                self.first.take().unwrap().kill();
                self.work(Duration::from_millis(500)).await;
                self.first = Some(self.weir.start("first", &["sink"]));
            }
            Fault::SecondSinkJoins => self.second = Some(self.weir.start("second", &["sink"])),
            Fault::SecondSinkLeaves => {
                let second = self.second.take().unwrap();
                // Before that it knows no signals yet.
                second.says("not ready").await;
                assert!(second.stop().await.success());
            }
            Fault::SecondSinkIsKilled => self.second.take().unwrap().kill(),
            Fault::StopClickHouse => self.restart("stop").await,
            Fault::KillClickHouse => self.restart("kill").await,
            Fault::AnswersAreLost => self.proxy_is(Mood::Mute, Duration::from_millis(2_500)).await,
            Fault::ConnectionsAreCut => self.proxy_is(Mood::Cutting, Duration::from_millis(800)).await,
            Fault::RequestsAreLate => self.proxy_is(Mood::Late, Duration::from_millis(2_500)).await,
        }
    }

    async fn restart(&mut self, how: &str) {
        self.servers.control(how, "clickhouse").await;
        self.servers.control("start", "clickhouse").await;
    }

    async fn proxy_is(&mut self, mood: Mood, most: Duration) {
        self.proxy.set(mood);
        self.work(most).await;
        self.proxy.set(Mood::Fair);
    }

    async fn numbers(&self, sql: &str) -> Option<Vec<u64>> {
        let mut out = Vec::new();
        query(&self.database, sql, &Format::Named("TSV".to_owned()), &mut out).await.ok()?;
        let text = String::from_utf8(out).unwrap();
        Some(text.split_whitespace().map(|number| number.parse().unwrap()).collect())
    }

    /// Rows and distinct records of each table that holds records.
    async fn tables(&self) -> Option<Vec<(u64, u64)>> {
        let mut found = Vec::new();
        for table in ["observations", "failures", "requests", "dead_letters"] {
            let sql = format!("SELECT count(), uniqExact(topic, partition, offset) FROM {table}");
            let numbers = self.numbers(&sql).await?;
            found.push((numbers[0], numbers[1]));
        }
        Some(found)
    }

    /// Items that are missing, or are not the newest observation.
    async fn wrong_items(&self) -> Option<u64> {
        let sql = "SELECT count() FROM (SELECT item, max(fetched_at) AS newest FROM observations GROUP BY item) AS o \
            FULL JOIN (SELECT item, fetched_at FROM items) AS i ON o.item = i.item \
            WHERE o.item != i.item OR newest != i.fetched_at";
        Some(self.numbers(sql).await?[0])
    }

    /// Waits until there is nothing left to store, and says what was found.
    async fn result(&self) -> (Vec<(u64, u64)>, u64) {
        let Produced { results, poison, failures, requests } = self.source.produced;
        let expected = [results, failures, requests, poison];
        let since = std::time::Instant::now();
        loop {
            if let Some(tables) = self.tables().await {
                let is_all = tables.iter().zip(expected).all(|((_, distinct), expected)| *distinct >= expected);
                if is_all || since.elapsed() > CATCH_UP {
                    // What is doubled comes later than the first: late requests are delivered by now.
                    sleep(Duration::from_secs(4)).await;
                    return (self.tables().await.unwrap_or(tables), self.wrong_items().await.unwrap());
                }
            }
            sleep(Duration::from_millis(200)).await;
        }
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text:?} is no number")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_fails_each_record_is_one_row_in_every_table() {
    let (faults, seed) = (number("WEIR_TORTURE_FAULTS").unwrap_or(20), number("WEIR_TORTURE_SEED").unwrap_or(1));
    let only = std::env::var("WEIR_TORTURE_ONLY").unwrap_or_default();
    let among: Vec<Fault> = Fault::ALL
        .into_iter()
        .filter(|fault| only.is_empty() || only.split(',').any(|name| name == fault.to_string()))
        .collect();
    assert!(!among.is_empty(), "WEIR_TORTURE_ONLY={only:?}: there are {:?}", Fault::ALL);
    let since = std::time::Instant::now();
    let mut scene = Scene::new(seed).await;
    scene.first.as_ref().unwrap().says("assigned ").await;
    for count in 1..=faults {
        scene.work(Duration::from_millis(800)).await;
        let fault = scene.next_fault(&among);
        if faults > 20 {
            println!("{:>6.1} s  fault {count} of {faults}: {fault}", since.elapsed().as_secs_f64());
        }
        scene.suffer(fault).await;
    }
    scene.work(Duration::from_millis(100)).await;
    let (tables, wrong_items) = scene.result().await;
    let Produced { results, poison, failures, requests } = scene.source.produced;
    println!("{faults} faults, seed {seed}, in {:.0} s: {:?}", since.elapsed().as_secs_f64(), scene.done);
    let log = scene.first.as_ref().unwrap().log();
    let unknown = "insert outcome unknown; checked: ";
    let (absent, counted) = (log.matches(&format!("{unknown}0 of ")).count(), log.matches(unknown).count());
    println!(
        "{counted} counts of blocks in doubt, {absent} of them absent; {} requests delivered late",
        scene.proxy.late()
    );
    // Else the faults were too kind to prove anything.
    assert!(faults < 20 || counted > 0, "no insert was ever in doubt");
    println!("table          produced      rows  distinct");
    for (name, expected, (rows, distinct)) in [
        ("observations", results, tables[0]),
        ("failures", failures, tables[1]),
        ("requests", requests, tables[2]),
        ("dead_letters", poison, tables[3]),
    ] {
        println!("{name:<14} {expected:>8}  {rows:>8}  {distinct:>8}");
        assert_eq!((rows, distinct), (expected, expected), "{name}: rows, distinct records; seed {seed}");
    }
    println!("items that are missing or old: {wrong_items}");
    assert_eq!(wrong_items, 0, "seed {seed}");
    let process = scene.first.take().unwrap();
    assert!(process.stop().await.success());
}
