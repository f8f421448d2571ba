//! The sink's tables, inserts and queries on a real ClickHouse.

#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weir::{
    kafka::{
        Assignment, Epoch, Event, Membership, Offsets, Outgoing, Partition, ReadError, Reader, Record, TransactError,
        WriteError, Writer,
    },
    message::{BatchId, SourceName, envelope::Kind},
    runtime::{
        clock::{Clock, Timestamp},
        health::Health,
    },
    sink::{
        Config, Insert, Parts,
        block::{Block, Blocks, Cut, Limits},
        guard::Known,
        run,
        sealed::{self, Grave, Sealed},
    },
    store::{
        ClickHouseConfig, Route, Store, Trouble, TroubleKind,
        query::{Format, Progress, QueryError, format_of, query},
        schema,
    },
    topics::Topic,
};

use crate::{process::Installation, stack::address};

/// 2026-11-20T00:00:00Z
pub const NOVEMBER: i64 = 1_795_132_800_000;

/// A database of this test's own.
pub struct Database(pub ClickHouseConfig);

impl Database {
    pub async fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        #[allow(clippy::disallowed_methods, reason = "a test has no configuration file")]
        let url = std::env::var("WEIR_TEST_CLICKHOUSE")
            .expect("WEIR_TEST_CLICKHOUSE is not set: run deploy/local/test, which starts a ClickHouse");
        let (process, number) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let millis = Clock::System.now().as_millis();
        let database = format!("weir_test_{millis}_{process}_{number}");
        let new = Self(ClickHouseConfig { url, database, ..ClickHouseConfig::default() });
        schema::apply(&new.0).await.unwrap();
        new
    }

    pub fn store(&self) -> Store {
        Store::connect(&self.0).unwrap()
    }

    /// The rows of an answer, each as a list of texts and numbers.
    pub async fn rows(&self, sql: &str) -> Vec<Value> {
        let text = self.text(sql, "JSONCompactEachRow").await.unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    pub async fn text(&self, sql: &str, format: &str) -> Result<String, QueryError> {
        let mut out = Vec::new();
        query(&self.0, sql, &Format::Named(format.to_owned()), &mut out).await?;
        Ok(String::from_utf8(out).unwrap())
    }

    pub async fn drop(self) {
        self.text(&format!("DROP DATABASE {} SYNC", self.0.database), "TSV").await.unwrap();
    }
}

fn limits() -> Limits {
    Limits { rows: 1_000_000, bytes: usize::MAX, age: Duration::ZERO }
}

/// One block of these values, from offset 0.
pub fn block(topic: &str, values: impl IntoIterator<Item = String>) -> Block {
    let partition = Partition { topic: topic.into(), number: 3 };
    let mut blocks = Blocks::new(partition, limits(), Vec::new());
    for (offset, value) in (0..).zip(values) {
        let time = Timestamp::from_millis(NOVEMBER + offset);
        let record = Record { offset, time, key: None, value: Some(value.into()), headers: Vec::new(), log: None };
        blocks.push(record, Instant::now());
    }
    cut(&mut blocks)
}

fn cut(blocks: &mut Blocks) -> Block {
    match blocks.take(Instant::now()) {
        Some(Cut::New(block)) => block,
        other => panic!("a block, not {other:?}"),
    }
}

/// The block as it is inserted.
pub async fn seal(block: Block, kind: Kind) -> Sealed {
    let grave = Grave { topic: "dead".into(), now: Timestamp::from_millis(NOVEMBER) };
    sealed::read(block, &route(kind), &grave, &Known::default()).await.sealed
}

/// Inserts a block under its first token; the rows that it made.
pub async fn store_block(store: &Store, block: Block, kind: Kind) -> Result<usize, Trouble> {
    let sealed = seal(block, kind).await;
    store.insert(&sealed, &sealed.intent.token(&sealed.partition, 1)).await.map(|()| sealed.rows.len())
}

pub fn route(kind: Kind) -> Route {
    Route { kind, source: (kind == Kind::Request).then(|| SourceName::new("ali1688").unwrap()) }
}

pub async fn insert(store: &Store, topic: &str, kind: Kind, values: impl IntoIterator<Item = Value>) -> usize {
    let values = values.into_iter().map(|value| value.to_string());
    store_block(store, block(topic, values), kind).await.unwrap()
}

fn request(id: &str, batch: &str, calls: usize) -> (String, Value) {
    let attempt = json!({"at": NOVEMBER, "class": "outage", "code": "timeout", "message": "", "latency_ms": 1});
    (id.to_owned(), json!({"item": id, "batch": batch, "requested_at": NOVEMBER, "history": vec![attempt; calls]}))
}

/// Requests carry their ids in a header.
async fn insert_requests(store: &Store, topic: &str, requests: impl IntoIterator<Item = (String, Value)>) {
    let mut blocks = Blocks::new(Partition { topic: topic.into(), number: 0 }, limits(), Vec::new());
    for (offset, (id, value)) in (0..).zip(requests) {
        let headers = vec![("ce_id".into(), id.into())];
        let time = Timestamp::from_millis(NOVEMBER);
        let record = Record { offset, time, key: None, value: Some(value.to_string().into()), headers, log: None };
        blocks.push(record, Instant::now());
    }
    store_block(store, cut(&mut blocks), Kind::Request).await.unwrap();
}

pub fn result(id: &str, batch: &str, status: &str) -> Value {
    json!({"request_id": id, "source": "ali1688", "item": id, "batch": batch, "status": status, "via": "call",
        "calls": 1, "account": "a1", "requested_at": NOVEMBER, "fetched_at": NOVEMBER + 1_000, "latency_ms": 100})
}

/// `base` with the fields of `changes`.
pub fn with(mut base: Value, changes: &Value) -> Value {
    for (name, value) in changes.as_object().unwrap() {
        base[name] = value.clone();
    }
    base
}

pub fn failure(id: &str, batch: &str, class: &str, code: &str) -> Value {
    json!({"request_id": id, "source": "ali1688", "request": request(id, batch, 0).1,
        "attempt": {"at": NOVEMBER + 2_000, "account": "a1", "class": class, "code": code, "message": "no", "latency_ms": 300}})
}

pub fn dead(id: &str, batch: &str, reason: &str) -> Value {
    json!({"request_id": id, "source": "ali1688", "reason": reason, "message": "m", "died_at": NOVEMBER + 3_000,
        "origin": {"topic": "f", "partition": 0, "offset": 9}, "request": request(id, batch, 1).1})
}

#[tokio::test]
async fn what_was_dropped_of_the_schema_is_named_and_made_again_as_a_new_database_has_it() {
    let (database, fresh) = (Database::new().await, Database::new().await);
    insert(&database.store(), "r", Kind::Result, [result("1", "b", "found"), result("2", "b", "absent")]).await;
    let everything = "SELECT table, name, type, default_expression, compression_codec, comment FROM system.columns \
        WHERE database = currentDatabase() AND table != 'schema_migrations' ORDER BY table, position";
    let items = "SELECT item, status, first_seen_at FROM items ORDER BY item";
    let (whole, rows) = (database.rows(everything).await, database.rows(items).await);
    assert_eq!(schema::standing(&database.0).await.unwrap().differences, []);

    let mut dropped = 0;
    for row in &whole {
        let (table, column) = (row[0].as_str().unwrap(), row[1].as_str().unwrap());
        // Keys, and what a view or projection reads, ClickHouse keeps.
        dropped += u32::from(database.text(&format!("ALTER TABLE {table} DROP COLUMN {column}"), "TSV").await.is_ok());
    }
    assert!(dropped > 30, "{dropped}");
    for (kind, name) in [
        ("VIEW", "batches"),
        ("VIEW", "item_times_from_observations"),
        ("TABLE", "items_latest"),
        ("TABLE", "failures"),
    ] {
        database.text(&format!("DROP {kind} {name} SYNC"), "TSV").await.unwrap();
    }
    let found = schema::standing(&database.0).await.unwrap();
    let told = |text: &str| found.differences.iter().any(|difference| difference.to_string() == text);
    assert_eq!(found.applied, schema::MIGRATIONS.len());
    for text in ["table failures is missing", "view batches is missing", "column observations.latency_ms is missing"] {
        assert!(told(text), "{text}: {:?}", found.differences);
    }

    let applied = schema::apply(&database.0).await.unwrap();
    assert_eq!(applied.mended, found.differences);
    assert!(applied.now.is_empty() && applied.left.is_empty(), "{applied:?}");
    assert_eq!(database.rows(everything).await, fresh.rows(everything).await);
    assert_eq!(database.rows(items).await, rows, "what views feed is fed again");
    assert_eq!(schema::standing(&database.0).await.unwrap().differences, []);
    assert!(schema::apply(&database.0).await.unwrap().mended.is_empty());

    // What a newer weir has dropped is not made again; and the list itself may be lost.
    database.text("INSERT INTO schema_migrations (version, name) VALUES (999, 'later')", "TSV").await.unwrap();
    database.text("DROP VIEW batches", "TSV").await.unwrap();
    assert!(schema::apply(&database.0).await.unwrap().mended.is_empty());
    database.text("DROP TABLE schema_migrations SYNC", "TSV").await.unwrap();
    assert_eq!(schema::apply(&database.0).await.unwrap().now.len(), schema::MIGRATIONS.len());
    assert_eq!(database.rows(everything).await, fresh.rows(everything).await);
    assert_eq!(database.rows(items).await, rows);
    database.drop().await;
    fresh.drop().await;
}

#[tokio::test]
async fn the_schema_can_be_applied_again_and_by_several_at_once() {
    let database = Database::new().await;
    let again = schema::apply(&database.0).await.unwrap();
    assert_eq!((again.now.len(), again.before.len()), (0, schema::MIGRATIONS.len()));
    database.text("INSERT INTO schema_migrations (version, name) VALUES (999, 'later')", "TSV").await.unwrap();
    assert_eq!(schema::apply(&database.0).await.unwrap().unknown, [999]);

    let fresh = ClickHouseConfig { database: format!("{}_b", database.0.database), ..database.0.clone() };
    let all = futures::future::join_all((0..4).map(|_| schema::apply(&fresh))).await;
    assert!(all.iter().all(Result::is_ok), "{all:?}");
    let fresh = Database(fresh);
    assert_eq!(
        fresh.rows("SELECT version FROM schema_migrations FINAL ORDER BY version").await.len(),
        schema::MIGRATIONS.len()
    );
    fresh.drop().await;
    database.drop().await;
}

#[tokio::test]
async fn rows_land_with_exact_decimals_times_and_bytes() {
    let database = Database::new().await;
    let store = database.store();
    let columns = [
        json!({"price": "99999999999999.9999", "stock": "12", "rating": "4.95", "reviews": "31"}),
        json!({"price": "0.1", "title": "玻璃杯", "further": {"brand": "it's \\ a", "sizes": "[\"S\",\"M\"]"}}),
        json!({"price": "10.00-12.00"}),
    ];
    let seen = ["1", "2", "3"]
        .iter()
        .zip(columns)
        .map(|(id, columns)| with(result(id, "b", "found"), &json!({"columns": columns, "raw": {"price": id}})));
    assert_eq!(insert(&store, "r", Kind::Result, seen).await, 3);
    assert_eq!(
        database
            .rows("SELECT partition, offset, recorded_at, item, toString(price), price_text, title, toString(stock), raw FROM observations ORDER BY offset")
            .await,
        [
            json!([3, "0", "2026-11-20 00:00:00.000", "1", "99999999999999.9999", "", "", "12", "{\"price\":\"1\"}"]),
            json!([3, "1", "2026-11-20 00:00:00.001", "2", "0.1", "", "玻璃杯", null, "{\"price\":\"2\"}"]),
            json!([3, "2", "2026-11-20 00:00:00.002", "3", "10", "10.00-12.00", "", null, "{\"price\":\"3\"}"]),
        ]
        .map(as_numbers)
    );
    for table in ["observations", "items"] {
        assert_eq!(
            database
                .rows(&format!(
                    "SELECT item, further['brand'], further['sizes'], toString(length(further)) FROM {table} ORDER BY item"
                ))
                .await,
            [json!(["1", "", "", "0"]), json!(["2", "it's \\ a", "[\"S\",\"M\"]", "2"]), json!(["3", "", "", "0"])],
            "{table}"
        );
    }
    database.drop().await;
}

/// Whether 64-bit numbers are quoted in JSON depends on the server's version.
fn as_numbers(mut row: Value) -> Value {
    if let Some(number) = row[1].as_str().and_then(|text| text.parse::<i64>().ok()) {
        row[1] = number.into();
    }
    row
}

#[tokio::test]
async fn all_kinds_land_and_an_unreadable_dead_letter_lands_as_its_bytes() {
    let database = Database::new().await;
    let store = database.store();
    insert(&store, "f", Kind::Failure, [failure("1", "b", "throttled", "busy")]).await;
    insert(&store, "d", Kind::DeadLetter, [dead("1", "b", "exhausted")]).await;
    let mixed = [result("1", "b", "found").to_string(), "{broken".to_owned(), result("2", "b", "absent").to_string()];
    assert_eq!(store_block(&store, block("r", mixed), Kind::Result).await.unwrap(), 2);
    let broken = || block("d2", ["{broken".to_owned()]);
    assert_eq!(store_block(&store, broken(), Kind::DeadLetter).await.unwrap(), 1);
    let requests = block("q", ["1".to_owned(), String::new()]);
    assert_eq!(store_block(&store, requests, Kind::Request).await.unwrap(), 1);
    assert_eq!(store_block(&store, block("q2", [String::new()]), Kind::Request).await.unwrap(), 0);
    let rows =
        database.rows("SELECT topic, reason, request_id, original, last_class FROM dead_letters ORDER BY topic").await;
    assert_eq!(rows, [json!(["d", "exhausted", "1", "", "outage"]), json!(["d2", "invalid", "d2/3/0", "{broken", ""])]);
    assert_eq!(database.rows("SELECT request_id, class FROM failures").await, [json!(["1", "throttled"])]);
    assert_eq!(database.rows("SELECT request_id FROM requests").await, [json!(["q/3/0"])]);
    database.drop().await;
}

#[tokio::test]
async fn a_block_that_is_inserted_again_is_there_once_also_in_items() {
    let database = Database::new().await;
    let store = database.store();
    // Without merging, a doubled row of items would stay visible.
    database.text("SYSTEM STOP MERGES items_latest", "TSV").await.unwrap();
    let values = || (0..500).map(|id| result(&id.to_string(), "b", "found").to_string());
    for _ in 0..3 {
        store_block(&store, block("r", values()), Kind::Result).await.unwrap();
    }
    for table in ["observations", "items_latest"] {
        assert_eq!(database.rows(&format!("SELECT toUInt32(count()) FROM {table}")).await, [json!([500])], "{table}");
    }
    // The proof that it was the token: the same rows of another partition are others.
    store_block(&store, block("r2", values()), Kind::Result).await.unwrap();
    assert_eq!(database.rows("SELECT toUInt32(count()) FROM observations").await, [json!([1_000])]);
    database.drop().await;
}

/// Ten requests of batch `b`: 4 found, 2 absent, 1 off the shelf, 1 dead, 2 under way; one was tried again.
pub async fn known_batch(store: &Store) {
    let id = |number: i32| number.to_string();
    insert_requests(store, "q1", (0..10).map(|number| request(&id(number), "b", 0))).await;
    insert_requests(store, "q2", [request("3", "b", 1), request("7", "b", 1), request("7", "b", 2)]).await;
    insert_requests(store, "q3", [request("100", "other", 0)]).await;
    let status = |number: i32| match number {
        0..4 => "found",
        4 | 5 => "absent",
        _ => "off_shelf",
    };
    insert(store, "r1", Kind::Result, (0..7).map(|number| result(&id(number), "b", status(number)))).await;
    insert(store, "r2", Kind::Result, [result("0", "b", "found")]).await; // stored twice by a sink that died
    let failures = [("3", "outage"), ("7", "outage"), ("7", "throttled"), ("7", "outage")];
    insert(store, "f1", Kind::Failure, failures.map(|(id, class)| failure(id, "b", class, "code"))).await;
    insert(store, "d1", Kind::DeadLetter, [dead("7", "b", "exhausted")]).await;
    insert(store, "d2", Kind::DeadLetter, [dead("7", "b", "exhausted")]).await;
}

#[tokio::test]
async fn a_batch_counts_requests_not_rows() {
    let database = Database::new().await;
    let store = database.store();
    let batch = BatchId::new("b").unwrap();
    assert_eq!(store.batch_progress(&batch).await.unwrap(), Progress::default());
    known_batch(&store).await;
    let progress = store.batch_progress(&batch).await.unwrap();
    let expected = Progress { requested: 10, found: 4, absent: 2, off_shelf: 1, dead: 1, failed: 4, retried: 2 };
    assert_eq!(progress, expected);
    assert_eq!(progress.ended(), 8);
    let rows =
        database.rows("SELECT batch, toUInt32(requested), toUInt32(under_way) FROM batches ORDER BY batch").await;
    assert_eq!(rows, [json!(["b", 10, 2]), json!(["other", 1, 1])]);
    database.drop().await;
}

#[tokio::test]
async fn the_progress_of_a_large_batch_is_cheap() {
    let database = Database::new().await;
    let store = database.store();
    let ids = || (0..10_000).map(|id: u32| id.to_string());
    insert_requests(&store, "q", ids().map(|id| request(&id, "b", 0))).await;
    insert(&store, "r", Kind::Result, ids().map(|id| result(&id, "b", "found"))).await;
    insert(&store, "r2", Kind::Result, (0..30_000).map(|id| result(&format!("x{id}"), "other", "found"))).await;
    let batch = BatchId::new("b").unwrap();
    assert_eq!(store.batch_progress(&batch).await.unwrap().found, 10_000);
    let plan = database
        .text("EXPLAIN indexes = 1, projections = 1 SELECT found FROM batches WHERE batch = 'nobody'", "TSV")
        .await
        .unwrap();
    assert!(plan.contains("by_batch"), "the projection serves: {plan}");
    let started = Instant::now();
    for _ in 0..5 {
        store.batch_progress(&batch).await.unwrap();
    }
    // A bound with room for a busy machine: alone it takes a few milliseconds each.
    assert!(started.elapsed() < Duration::from_secs(5), "{:?} for 5 polls", started.elapsed());
    database.drop().await;
}

#[tokio::test]
async fn a_query_is_a_table_for_people_or_any_format_and_its_errors_are_readable() {
    let database = Database::new().await;
    let mut out = Vec::new();
    query(&database.0, "SELECT 1 AS one;\n", &Format::Table { colour: false }, &mut out).await.unwrap();
    let table = String::from_utf8(out).unwrap();
    assert!(table.contains("┌─one─┐") && !table.contains('\u{1b}'), "{table}");
    assert_eq!(database.text("SELECT 'a?', 2", "CSV").await.unwrap(), "\"a?\",2\n");
    assert_eq!(database.text("SELECT 1 FORMAT TSV", "CSV").await.unwrap(), "1\n");
    let error = database.text("SELECT nonsense FROM items", "CSV").await.unwrap_err().to_string();
    assert!(error.contains("error 47") && error.contains("nonsense") && error.lines().count() == 1, "{error}");
    let late = "SELECT throwIf(number = 3000000, 'too far') FROM numbers(4000000)";
    let error = database.text(late, "TSV").await.unwrap_err().to_string();
    assert!(error.contains("too far"), "an error in mid-stream is an error: {error}");
    database.drop().await;
}

#[tokio::test]
async fn a_format_at_the_end_of_a_query_is_found_and_the_word_elsewhere_is_none() {
    let database = Database::new().await;
    for sql in [
        "SELECT 1 FORMAT JSON",
        "select * format JSON ;\n",
        "SELECT count() FROM items\nFORMAT\nJSON -- as a document",
        "SELECT a FROM items LIMIT 5 FORMAT JSON SETTINGS max_threads = 1",
        "SELECT a FROM items LIMIT 5 SETTINGS max_threads = 1 FORMAT JSON",
        "SELECT 'FORMAT CSV' AS format FORMAT JSON",
        "SELECT format('{}', a) FROM items WHERE a = 'it''s' /* FORMAT CSV */ FORMAT JSON",
        "SELECT [1] FORMAT JSON",
        "SELECT $$ FORMAT CSV $$ FORMAT JSON",
    ] {
        assert_eq!(format_of(&database.0, sql).await.as_deref(), Some("JSON"), "{sql}");
    }
    for sql in [
        "",
        "FORMAT",
        "SELECT 1",
        "SELECT 'x FORMAT JSON'",
        "SELECT 'it\\'s FORMAT JSON'",
        "SELECT 1 -- FORMAT JSON",
        "SELECT 1 # FORMAT JSON",
        "SELECT 1 /* FORMAT JSON */",
        "SELECT a AS \"x FORMAT JSON\", `b FORMAT JSON`",
        "SELECT $x$ 1 FORMAT JSON $x$",
        "SELECT a FROM t ORDER BY format DESC",
        "SELECT a FROM t ORDER BY a, format DESC",
        "SELECT format f",
        "SELECT * FROM format f",
        "SELECT format FROM t",
        "SELECT a.format f",
        "SELECT format('{} {}', a, b)",
        "SELECT 1 AS format",
        "INSERT INTO t FORMAT CSV 1,2",
        "is this SQL? FORMAT JSON",
    ] {
        assert_eq!(format_of(&database.0, sql).await, None, "{sql}");
    }
    database.drop().await;
}

/// weir with the server alone: no database of its own.
fn with_clickhouse() -> Installation {
    let url = address("WEIR_TEST_CLICKHOUSE");
    Installation::of(&format!("[clickhouse]\nurl = {url:?}\ndatabase = \"default\"\n"))
}

#[tokio::test]
async fn two_formats_are_refused_and_one_said_twice_is_not() {
    let weir = with_clickhouse();
    let export = async |sql: &str| weir.outcome(&["export", sql, "--csv", "-"]).await;
    let (code, said) = export("SELECT 1 FORMAT JSON").await;
    assert_eq!(code, 64, "{said}");
    assert!(said.contains("the SQL says FORMAT JSON, but --csv asks for CSVWithNames: remove one of them"), "{said}");
    let one = (0, "\"1\"\n1\n".to_owned());
    assert_eq!(export("SELECT 1 FORMAT CSVWithNames").await, one);
    assert_eq!(export("SELECT 1").await, one);
    let (code, said) = weir.outcome(&["query", "SELECT 1 FORMAT TSV", "--format", "JSON"]).await;
    assert_eq!(code, 64, "{said}");
}

#[tokio::test]
async fn a_terminal_that_wants_no_colours_gets_none() {
    let weir = with_clickhouse();
    let on_a_terminal = async |variable| weir.on_a_terminal(&["query", "\"SELECT 1 AS one\""], variable).await;
    let coloured = on_a_terminal(("TERM", "xterm")).await;
    assert!(coloured.contains('\u{1b}') && coloured.contains("one"), "{coloured:?}");
    let plain = on_a_terminal(("NO_COLOR", "1")).await;
    assert!(!plain.contains('\u{1b}') && plain.contains("┌─one─┐"), "{plain:?}");
}

#[tokio::test]
async fn trouble_is_told_apart() {
    let database = Database::new().await;
    let values = || [result("1", "b", "found").to_string()];
    let kind = async |config: &ClickHouseConfig| {
        let store = Store::connect(config).unwrap();
        store_block(&store, block("r", values()), Kind::Result).await.unwrap_err()
    };
    let away = kind(&ClickHouseConfig { url: "http://127.0.0.1:9".to_owned(), ..database.0.clone() }).await;
    assert_eq!(away.kind, TroubleKind::Away);
    assert!(away.to_string().contains("Is it running"), "{away}");
    let missing = kind(&ClickHouseConfig { database: "weir_test_not_there".to_owned(), ..database.0.clone() }).await;
    assert_eq!(missing.kind, TroubleKind::Schema, "{missing}");
    assert!(missing.to_string().contains("weir schema apply"), "{missing}");
    let stranger = kind(&ClickHouseConfig { user: "nobody".to_owned(), ..database.0.clone() }).await;
    assert_eq!(stranger.kind, TroubleKind::Login, "{stranger}");
    assert!(database.store().ping().await.is_ok());
    database.drop().await;
}

#[tokio::test]
async fn a_missing_column_is_a_matter_of_the_schema_and_the_same_store_goes_on_when_it_is_mended() {
    let database = Database::new().await;
    let store = database.store();
    let one = || block("r", [result("1", "b", "found").to_string()]);
    database.text("ALTER TABLE observations DROP COLUMN traceparent", "TSV").await.unwrap();
    let trouble = store_block(&store, one(), Kind::Result).await.unwrap_err();
    assert_eq!(trouble.kind, TroubleKind::Schema, "{trouble}");
    database.text("ALTER TABLE observations ADD COLUMN traceparent String", "TSV").await.unwrap();
    database.text("ALTER TABLE observations ADD COLUMN later String DEFAULT ''", "TSV").await.unwrap();
    store_block(&store, one(), Kind::Result).await.unwrap();
    database.drop().await;
}

/// Gives these events, then nothing; keeps the commits.
struct Scripted {
    events: VecDeque<Event>,
    commits: Arc<Mutex<Vec<i64>>>,
}

impl Reader for Scripted {
    async fn next(&mut self) -> Result<Event, ReadError> {
        match self.events.pop_front() {
            Some(event) => Ok(event),
            None => std::future::pending().await,
        }
    }
    fn pause(&self, _: &Partition) {}
    fn resume(&self, _: &Partition) {}
    fn membership(&self) -> Membership {
        unreachable!("no record is poison")
    }
    async fn commit(&self, offsets: Offsets) -> Result<Vec<Partition>, WriteError> {
        self.commits.lock().unwrap().extend(offsets.iter().map(|(.., committed)| committed.offset));
        Ok(offsets.into_iter().map(|(partition, ..)| partition).collect())
    }
}

struct NoWriter;

impl Writer for NoWriter {
    async fn transact(&self, _: Vec<Outgoing>, _: Membership, _: Offsets) -> Result<(), TransactError> {
        unreachable!("no record is poison")
    }
}

#[tokio::test]
async fn the_sink_waits_for_the_schema_and_then_stores_and_commits_everything() {
    let database = Database::new().await;
    let late = ClickHouseConfig { database: format!("{}_late", database.0.database), ..database.0.clone() };
    let partition = Partition { topic: "weir.results".into(), number: 3 };
    let epoch = Epoch(1);
    let values = (0..25).map(|id| result(&id.to_string(), "b", "found").to_string());
    let records = block("weir.results", values).records;
    let assignment = Assignment { partition: partition.clone(), epoch, committed: None, log: None };
    let events = [Event::Assigned(vec![assignment]), Event::Records { partition, epoch, records }];
    let commits = Arc::default();
    let reader = Scripted { events: events.into(), commits: Arc::clone(&commits) };
    let topics = [Topic {
        name: "weir.results".to_owned(),
        kind: Kind::Result,
        source: None,
        partitions: 8,
        keep: Duration::ZERO,
        delay: None,
    }];
    let (store, stop) = (Store::connect(&late).unwrap(), CancellationToken::new());
    let config = Config { rows: 10, age: Duration::from_millis(50), ..Config::default() };
    let (dead_topic, clock, health) = ("weir.dead".into(), Clock::System, Health::default().role("sink"));
    let parts = Parts { reader, writer: NoWriter, store, topics: topics.to_vec(), dead_topic, clock, health };
    let sink = run(parts, config, stop.clone());
    let meanwhile = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(commits.lock().unwrap().iter().all(|done| *done == 0), "nothing advances while nothing is stored");
        schema::apply(&late).await.unwrap();
        tokio::time::timeout(Duration::from_secs(30), async {
            while commits.lock().unwrap().last() != Some(&25) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
        .expect("stored and committed soon after");
        stop.cancel();
    };
    let (ended, ()) = tokio::join!(sink, meanwhile);
    ended.unwrap();
    let late = Database(late);
    assert_eq!(
        late.rows("SELECT toUInt32(count()), toUInt32(uniqExact(offset)) FROM observations").await,
        [json!([25, 25])]
    );
    late.drop().await;
    database.drop().await;
}
