//! What analysts ask: items, changes and the sample queries, on data with known answers.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use serde_json::{Value, json};
use weir::{
    kafka::{Outgoing, Producer},
    message::{SourceName, envelope::Kind},
    runtime::clock::{Clock, Dice},
    simulate::{self, Options},
    store::{ClickHouseConfig, query::samples, schema},
};

use crate::{
    process::Installation,
    sink::{Database, NOVEMBER, failure, insert, known_batch, result, with},
    stack::{Follower, Seen, address, eventually, kafka, outgoing, topics, unique},
};

const MINUTE: i64 = 60_000;
const DAY: i64 = 24 * 60 * MINUTE;

/// A found observation of `item`, so many milliseconds after `start`.
fn found(item: &str, fetched_at: i64, price: &str) -> Value {
    let columns = json!({"price": price, "currency": "CNY", "title": format!("title {item}"), "seller_nick": "shop"});
    with(result(item, "c", "found"), &json!({"fetched_at": fetched_at, "columns": columns}))
}

fn change(item: &str, field: &str, old: &str, new: &str, new_at: i64) -> Value {
    json!({"source": "ali1688", "item": item, "field": field, "old": old, "new": new, "currency": "CNY",
        "old_at": new_at - MINUTE, "new_at": new_at, "request_id": format!("r{new_at}")})
}

#[tokio::test]
async fn items_hold_the_newest_observation_whatever_the_order() {
    let database = Database::new().await;
    let store = database.store();
    let at = |minutes: i64, price: &str| found("1", NOVEMBER + minutes * MINUTE, price);
    insert(&store, "r1", Kind::Result, [at(5, "5"), at(1, "1")]).await;
    insert(&store, "r2", Kind::Result, [at(3, "3")]).await;
    assert_eq!(database.rows("SELECT item, toString(price) FROM items").await, [json!(["1", "5"])]);
    database.drop().await;
}

#[tokio::test]
async fn items_know_when_they_were_first_seen_last_seen_and_last_changed() {
    let database = Database::new().await;
    let store = database.store();
    let at = |minutes: i64| NOVEMBER + minutes * MINUTE;
    let gone = |item, minutes| with(result(item, "c", "absent"), &json!({"fetched_at": at(minutes)}));
    let seen = [gone("1", 0), found("1", at(1), "5"), found("1", at(7), "6"), gone("1", 9), gone("2", 3)];
    insert(&store, "r", Kind::Result, seen).await;
    let changes = [change("1", "price", "5", "6", at(7)), change("1", "status", "absent", "found", at(1))];
    for topic in ["c", "again"] {
        insert(&store, topic, Kind::Change, changes.clone()).await;
    }
    let minutes = "toMinute(fetched_at), toMinute(first_seen_at), toMinute(seen_at), toMinute(changed_at)";
    assert_eq!(
        database.rows(&format!("SELECT item, status, {minutes} FROM items ORDER BY item")).await,
        [json!(["1", "absent", 9, 1, 7, 7]), json!(["2", "absent", 3, null, null, null])]
    );
    database.drop().await;
}

#[tokio::test]
async fn a_day_begins_at_midnight_of_the_time_zone_that_is_asked_for() {
    let database = Database::new().await;
    let store = database.store();
    // 15:59 and 16:01 UTC are 23:59 and 00:01 in Shanghai.
    let evening = NOVEMBER + (15 * 60 + 59) * MINUTE;
    let seen = [found("1", evening, "5"), found("1", evening + 2 * MINUTE, "7")];
    insert(&store, "r", Kind::Result, seen).await;
    let days = |zone: &str| {
        format!(
            "SELECT toString(day), toUInt32(found), toString(cheapest) FROM daily(time_zone = '{zone}') ORDER BY day"
        )
    };
    assert_eq!(database.rows(&days("UTC")).await, [json!(["2026-11-20", 2, "5"])]);
    let shanghai = [json!(["2026-11-20", 1, "5"]), json!(["2026-11-21", 1, "7"])];
    assert_eq!(database.rows(&days("Asia/Shanghai")).await, shanghai);
    let last = "SELECT toString(day), toString(last_price) FROM daily_prices(time_zone = 'UTC') WHERE item = '1'";
    assert_eq!(database.rows(last).await, [json!(["2026-11-20", "7"])]);
    database.drop().await;
}

/// The answer of the sample whose title begins so.
async fn answer(database: &Database, title: &str) -> String {
    let sample = samples().find(|sample| sample.title.starts_with(title)).expect("a sample of this title");
    database.text(sample.sql, "TSV").await.unwrap_or_else(|error| panic!("{title}: {error}"))
}

#[tokio::test]
async fn each_sample_query_gives_the_known_answer() {
    let database = Database::new().await;
    let store = database.store();
    known_batch(&store).await;
    let now = Clock::System.now().as_millis();
    let priced = |id: &str, price: &str, latency: u32, age: i64| {
        let columns = json!({"price": price, "currency": "CNY"});
        let account = if latency > 400 { "slow" } else { "a2" };
        let changes = json!({"columns": columns, "latency_ms": latency, "account": account, "fetched_at": now - age});
        with(result(id, "c", "found"), &changes)
    };
    let seen = [priced("p1", "1.50", 500, 1_000), priced("p2", "2.5", 200, 7_200_000), priced("p3", "30", 200, 1_000)];
    insert(&store, "r9", Kind::Result, seen).await;
    assert_eq!(
        answer(&database, "Outcomes").await,
        "ali1688\tfound\t7\t63.6\nali1688\tabsent\t2\t18.2\nali1688\tdead: exhausted\t1\t9.1\nali1688\toff_shelf\t1\t9.1\n"
    );
    assert_eq!(answer(&database, "Prices").await, "ali1688\tCNY\t3\t1.5\tp1\t2.5\t30\tp3\n");
    let latency = answer(&database, "Latency").await;
    assert_eq!(latency.lines().last(), Some("ali1688\t2026-11-20 00:00:00\t12\t4\t100\t300\t300"));
    assert_eq!(
        answer(&database, "Failures").await,
        "ali1688\toutage\tcode\t3\t2\tno\nali1688\tthrottled\tcode\t1\t1\tno\n"
    );
    let accounts = answer(&database, "Accounts").await;
    assert_eq!(accounts.lines().next(), Some("ali1688\tslow\t1\t500\t500"));
    assert_eq!(accounts.lines().nth(1), Some("ali1688\ta2\t2\t200\t200"));
    let freshness = answer(&database, "Freshness").await;
    assert!(freshness.starts_with("ali1688\t1: under 10 minutes\t2\nali1688\t3: under a day\t1\n"), "{freshness}");
    let success = answer(&database, "Success").await;
    assert_eq!(success.lines().last(), Some("ali1688\t2026-11-20 00:00:00\t12\t8\t66.67\t1\t300"));
    database.drop().await;
}

#[tokio::test]
async fn the_queries_about_change_give_the_known_answers() {
    let database = Database::new().await;
    let store = database.store();
    let now = Clock::System.now().as_millis();
    let ago = |days: i64| now - days * DAY;
    let prices = [
        change("cup", "price", "10", "9", ago(20)),
        change("cup", "price", "9", "8", ago(3)),
        change("cup", "price", "8", "6.00", ago(1)),
        change("jug", "price", "10", "9.5", ago(2)),
        change("pot", "price", "5", "6", ago(2)), // dearer: no drop
        change("lid", "stock", "5", "1", ago(2)),
    ];
    insert(&store, "c", Kind::Change, prices).await;
    let seen = [
        found("cup", ago(20), "9"),
        found("cup", ago(1), "6"),
        found("jug", ago(40), "10"),
        found("jug", ago(2), "9.5"),
        found("fresh", ago(1), "1"),
        found("old", ago(30), "1"),
        with(result("old", "c", "absent"), &json!({"fetched_at": ago(1)})),
    ];
    insert(&store, "r", Kind::Result, seen).await;

    let drops = answer(&database, "Biggest drops").await;
    assert_eq!(drops, "ali1688\tcup\ttitle cup\tCNY\t9\t6\t-33.3\nali1688\tjug\ttitle jug\tCNY\t10\t9.5\t-5\n");
    let history = answer(&database, "Price history").await;
    let history: Vec<Vec<&str>> = history.lines().map(|line| line.split('\t').collect()).collect();
    let cup: Vec<_> = history.iter().filter(|row| row[1] == "cup").map(|row| (row[3], row[4])).collect();
    assert_eq!(cup, [("10", "9"), ("9", "8"), ("8", "6")]);
    let new = answer(&database, "New and vanished").await;
    let new: Vec<Vec<&str>> = new.lines().map(|line| line.split('\t').take(3).collect()).collect();
    assert_eq!(new, [["ali1688", "new", "fresh"], ["ali1688", "vanished", "old"]]);
    assert_eq!(answer(&database, "Sellers").await, "ali1688\tshop\t3\t100\t6\t\\N\n");
    let volatile = answer(&database, "Volatile").await;
    assert!(volatile.starts_with("ali1688\tcup\t3\t3\t0\t"), "{volatile}");
    database.drop().await;
}

/// Twelve prices of each item, some the same as before, some only written otherwise; and how often each changes.
fn price_series(items: usize) -> (Vec<(String, Value)>, usize) {
    let (mut series, mut expected) = (Vec::new(), 0);
    let dice = Dice::seeded(12);
    let mut last: HashMap<usize, u32> = HashMap::new();
    for step in 0..12 {
        for item in 0..items {
            let price = if dice.fraction() < 0.5 {
                1 + (dice.bits() % 3) as u32
            } else {
                last.get(&item).copied().unwrap_or(1)
            };
            if last.insert(item, price).is_some_and(|before| before != price) {
                expected += 1;
            }
            let zeros = if step % 2 == 0 { "" } else { ".00" };
            let id = format!("i{item}");
            let at = NOVEMBER + i64::from(step) * MINUTE;
            let value =
                with(found(&id, at, &format!("{price}{zeros}")), &json!({"request_id": format!("{id}-{step}")}));
            series.push((id, value));
        }
    }
    (series, expected)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_again_and_again_each_change_is_published_once_and_stored_once() {
    let database = Database::new().await;
    let source = SourceName::new("ali1688").unwrap();
    let topics = topics("changes", &source, 2).await;
    let results = topics.results();
    let prefix = results.trim_end_matches(".results");
    let accounts = tempfile::tempdir().unwrap();
    let file = accounts.path().join("accounts.toml");
    let options = Options { accounts: 1, accounts_file: Some(file.clone()), ..Options::default() };
    let simulator = simulate::start(options, Clock::System).await.unwrap();
    let more = format!(
        "[clickhouse]\nurl = \"{}\"\ndatabase = \"{}\"\n[changes]\nage = \"50ms\"\nrows = 200\n",
        address("WEIR_TEST_CLICKHOUSE"),
        database.0.database
    );
    let weir = Installation::new(&simulator, &file, prefix, &unique("group"), &more);
    let (series, expected) = price_series(100);
    let mut follower = Follower::of(&[topics.changes()]).await;
    let producer = Producer::new(&kafka()).unwrap();
    let mut process = weir.start("only", &["run", "--role", "changes,sink"]);
    let dice = Dice::seeded(5);
    for part in series.chunks(200) {
        let records: Vec<Outgoing> =
            part.iter().map(|(id, value)| outgoing(&results, id, &value.to_string())).collect();
        producer.send(records).await.unwrap();
        process.says("assigned ").await;
        tokio::time::sleep(Duration::from_millis(600).mul_f64(dice.fraction())).await;
        process.kill();
        process = weir.start("only", &["run", "--role", "changes,sink"]);
    }
    follower.read_until(expected).await;
    let stored = eventually("all changes are in ClickHouse", async || {
        let rows = database.rows("SELECT toUInt32(uniqExact(topic, partition, offset)) FROM item_changes").await;
        (rows == [json!([expected])]).then_some(rows)
    })
    .await;
    assert_eq!(stored.len(), 1);
    assert!(process.stop().await.success());
    let changes: Vec<Value> = follower.read().iter().map(Seen::json).collect();
    assert!(changes.iter().all(|change| change["old"] != change["new"]));
    let distinct: HashSet<String> =
        changes.iter().map(|change| format!("{} {}", change["item"], change["new_at"])).collect();
    assert_eq!((distinct.len(), changes.len()), (expected, expected), "each once");
    database.drop().await;
}

#[tokio::test]
async fn what_is_remembered_of_items_is_recalled() {
    use weir::message::{ItemId, Status, Watched};
    let database = Database::new().await;
    let store = database.store();
    let key = |item: &str| (SourceName::new("ali1688").unwrap(), ItemId::new(item).unwrap());
    let watched = |at: i64, price: &str| Watched {
        fetched_at: weir::runtime::clock::Timestamp::from_millis(at),
        status: Status::Found,
        fingerprint: "f".to_owned(),
        found_at: None,
        price: Some(price.to_owned()),
        title: Some("it's \\ a 玻璃杯".to_owned()),
        stock: None,
        rating: None,
    };
    assert_eq!(store.watched(&[key("1")]).await.unwrap(), HashMap::new());
    store.remember(&HashMap::from([(key("1"), watched(5, "5")), (key("2'"), watched(5, "5"))])).await.unwrap();
    store.remember(&HashMap::from([(key("1"), watched(4, "4"))])).await.unwrap();
    let items: Vec<_> = (0..2_500).map(|item| key(&item.to_string())).chain([key("2'")]).collect();
    let known = store.watched(&items).await.unwrap();
    assert_eq!(known, HashMap::from([(key("1"), watched(5, "5")), (key("2'"), watched(5, "5"))]));
    database.drop().await;
}

/// `deploy/config/clickhouse-users.xml` as the local server runs with it: its user sees database `weir` alone.
#[tokio::test]
async fn the_user_for_bi_reads_every_view_and_writes_nothing() {
    let database = Database::new().await;
    let weir = ClickHouseConfig { database: "weir".to_owned(), ..database.0.clone() };
    schema::apply(&weir).await.unwrap();
    let bi = Database(ClickHouseConfig { user: "bi".to_owned(), password: Some("reader".into()), ..weir });
    for view in ["items", "changes", "batches", "item_status", "source_health", "daily(time_zone = 'Asia/Shanghai')"] {
        bi.text(&format!("SELECT count() FROM {view}"), "TSV").await.unwrap_or_else(|error| panic!("{view}: {error}"));
    }
    let refused = [
        "INSERT INTO observations (item) VALUES ('1')",
        "DROP TABLE observations",
        "ALTER TABLE observations DELETE WHERE 1",
        "SELECT 1 SETTINGS max_execution_time = 0",
        &format!("SELECT count() FROM {}.observations", database.0.database),
    ];
    for sql in refused {
        let error = bi.text(sql, "TSV").await.expect_err(sql).to_string();
        assert!(error.contains("Not enough privileges") || error.contains("readonly mode"), "{sql}: {error}");
    }
    database.drop().await;
}

#[tokio::test]
async fn source_health_counts_calls_apart_from_what_needed_none() {
    let database = Database::new().await;
    let store = database.store();
    let by = |id: &str, via: &str| with(result(id, "c", "found"), &json!({"via": via}));
    insert(&store, "r", Kind::Result, [by("1", "call"), by("2", "cache"), by("3", "cache"), by("4", "stale")]).await;
    let failed = [failure("5", "c", "outage", "http.503"), failure("6", "c", "outage", "weir.held.breaker")];
    insert(&store, "f", Kind::Failure, failed).await;
    let sums = "sum(calls), sum(found), sum(outage), sum(cached), sum(stale), sum(held_back)";
    let row = database.text(&format!("SELECT {sums} FROM source_health"), "TSV").await.unwrap();
    assert_eq!(row.trim(), "2\t1\t1\t2\t1\t1");
    database.drop().await;
}

#[tokio::test]
async fn an_answer_of_a_source_that_stood_in_says_for_which_and_an_older_sink_writes_beside_it() {
    let database = Database::new().await;
    let store = database.store();
    let of = |id: &str, source: &str| with(result(id, "c", "found"), &json!({"source": source}));
    let stood_in = with(of("1", "taobao"), &json!({"instead_of": "ali1688"}));
    insert(&store, "r", Kind::Result, [stood_in, of("2", "taobao"), of("3", "ali1688")]).await;
    // What a sink names that knows nothing of the column.
    let older = "INSERT INTO observations (topic, partition, offset, recorded_at, request_id, source, item, batch, via, \
        status) VALUES ('r', 0, 3, now(), '4', 'ali1688', '4', 'c', 'call', 'found')";
    database.text(older, "TSV").await.unwrap();
    assert_eq!(
        database.rows("SELECT item, source, instead_of FROM observations ORDER BY item").await,
        [
            json!(["1", "taobao", "ali1688"]),
            json!(["2", "taobao", ""]),
            json!(["3", "ali1688", ""]),
            json!(["4", "ali1688", ""])
        ]
    );
    assert_eq!(
        database.rows("SELECT item, source, status, ended_by FROM item_status ORDER BY item LIMIT 2").await,
        [json!(["1", "ali1688", "found", "taobao"]), json!(["2", "taobao", "found", "taobao"])]
    );
    let sums =
        "SELECT source, toUInt32(sum(calls)), toUInt32(sum(stood_in)) FROM source_health GROUP BY source ORDER BY 1";
    assert_eq!(database.rows(sums).await, [json!(["ali1688", 2, 0]), json!(["taobao", 2, 1])]);
    let comment = "SELECT comment FROM system.columns WHERE database = currentDatabase() AND table = 'observations' \
        AND name = 'via'";
    let comment = database.text(comment, "TSV").await.unwrap();
    for via in ["call: ", "cache: ", "stale: "] {
        assert!(comment.contains(via), "{comment}");
    }
    database.drop().await;
}
