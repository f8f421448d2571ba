//! ClickHouse refuses for reasons of its own: the sink says so once, waits, and goes on by itself.

use std::time::Duration;

use weir::{simulate::Shares, store::ClickHouseConfig};

use crate::{
    process::Process,
    proxy::{Mood, Proxy},
    replay::{Scene, produce_results},
    sink::Database,
    stack::{address, eventually},
};

const PIECE: usize = 400;

/// How often a refusal is told.
fn told(log: &str, code: u32) -> usize {
    log.lines().filter(|line| line.contains("insert failed") && line.contains(&format!("error {code}"))).count()
}

/// Waits until there are so many rows, and none twice.
async fn expect_rows(database: &Database, expected: usize) {
    let counts = "SELECT toUInt32(count()), toUInt32(uniqExact(topic, partition, offset)) FROM observations";
    eventually("all are there, once", async || {
        (database.rows(counts).await == [serde_json::json!([expected, expected])]).then_some(())
    })
    .await;
}

/// More comes while ClickHouse refuses with `code`, which `end` ends.
async fn refused(sink: &Process, (results, database): (&str, &Database), code: u32, end: impl AsyncFnOnce()) {
    const COUNTED: &str = "insert refused; checked: ";
    const OVER: &str = "ClickHouse accepts inserts again";
    let before = database.rows("SELECT toUInt32(count()) FROM observations").await;
    let times = |text: &str| sink.log().matches(text).count();
    let (counted, over) = (times(COUNTED), times(OVER));
    produce_results(results, PIECE).await;
    sink.says(&format!("error {code}: ")).await;
    produce_results(results, PIECE).await;
    eventually("it is offered several times", async || (times(COUNTED) > counted + 2).then_some(())).await;
    assert_eq!(database.rows("SELECT toUInt32(count()) FROM observations").await, before, "error {code}");
    assert_eq!(told(&sink.log(), code), 2, "as an error, and as what /ready says, once each: {}", sink.log());
    end().await;
    eventually("it is over", async || (times(OVER) > over).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_a_user_who_may_only_read_and_too_many_parts_are_waited_out() {
    let server = address("WEIR_TEST_CLICKHOUSE");
    let proxy = Proxy::start(server.trim_start_matches("http://")).await;
    let mut scene = Scene::new("refusals", Shares::NONE, Duration::ZERO, "").await;
    let url = format!("http://{}", proxy.address);
    scene.installation = scene.installation.with("", ("WEIR_CLICKHOUSE__URL", &url));
    let database =
        Database(ClickHouseConfig { url: server, database: scene.database.clone(), ..ClickHouseConfig::default() });
    let (results, sink) = (scene.topics.results(), scene.installation.start("only", &["sink", "-v"]));
    produce_results(&results, PIECE).await;
    expect_rows(&database, PIECE).await;

    for (count, (mood, code)) in [(3, (Mood::Tight, 241)), (5, (Mood::ReadOnly, 164))] {
        proxy.set(mood);
        refused(&sink, (&results, &database), code, async || proxy.set(Mood::Fair)).await;
        expect_rows(&database, count * PIECE).await;
    }
    let alter = async |change: &str| {
        database.text(&format!("ALTER TABLE observations {change}"), "TSV").await.unwrap();
    };
    alter("MODIFY SETTING parts_to_throw_insert = 1, parts_to_delay_insert = 1000").await;
    let end = async || alter("RESET SETTING parts_to_throw_insert, parts_to_delay_insert").await;
    refused(&sink, (&results, &database), 252, end).await;
    expect_rows(&database, 7 * PIECE).await;
    assert!(sink.stop().await.success());
    scene.expect_clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_view_that_throws_keeps_nobody_waiting_and_what_each_lacks_is_named_with_what_fills_it() {
    let scene = Scene::new("views", Shares::NONE, Duration::ZERO, "").await;
    let url = address("WEIR_TEST_CLICKHOUSE");
    let database = Database(ClickHouseConfig { url, database: scene.database.clone(), ..ClickHouseConfig::default() });
    let (results, sink) = (scene.topics.results(), scene.installation.start("only", &["sink", "-v"]));
    a_view_that_throws(&sink, (&results, &database)).await;
    assert!(sink.stop().await.success());
    scene.expect_clean().await;
}

/// A view of the user's own cannot take one of the items, and so breaks the insert off before it comes to the others.
async fn a_view_that_throws(sink: &Process, (results, database): (&str, &Database)) {
    for (name, select) in [("others", "item"), ("throws", "toUInt8(replaceOne(item, '300', 'x'))")] {
        let view = format!(
            "CREATE MATERIALIZED VIEW {name} ENGINE = MergeTree ORDER BY item AS SELECT {select} AS item FROM observations"
        );
        database.text(&view, "TSV").await.unwrap();
    }
    produce_results(results, PIECE).await;
    expect_rows(database, PIECE).await;
    let of = |name: &str| format!("view=\"{}.{name}\"", database.0.database);
    let told = |log: &str, name: &str| -> Vec<String> {
        let of = of(name);
        let lines = log.lines().filter(|line| line.contains("may lack the rows") && line.contains(&of));
        lines.map(str::to_owned).collect()
    };
    sink.says(&of("throws")).await;
    sink.says(&of("others")).await;
    let log = sink.log();
    assert!(told(&log, "throws").iter().all(|line| line.contains("Cannot parse")), "{log}");
    assert!(!log.contains("insert failed"), "nobody waits: {log}");
    assert!(database.rows("SELECT item FROM others").await.len() < PIECE, "else there is nothing to fill");
    let told = told(&log, "others");
    let of_results: Vec<_> = told.iter().filter(|line| line.contains(&format!("block=\"{results}:"))).collect();
    for line in of_results {
        let (_, statement) = line.split_once("INSERT INTO ").unwrap();
        // What follows are the fields of the log line.
        let end = statement.find("'}").unwrap() + 2;
        database.text(&format!("INSERT INTO {}", &statement[..end]), "TSV").await.unwrap();
    }
    let counts = "SELECT toUInt32(count()) FROM others";
    assert_eq!(database.rows(counts).await, [serde_json::json!([PIECE])], "{told:?}");
    let items = "SELECT toUInt32(count()) FROM observations o LEFT ANTI JOIN items_latest l USING (source, item)";
    assert_eq!(database.rows(items).await, [serde_json::json!([0])], "weir's own views have what came");
    for name in ["others", "throws"] {
        database.text(&format!("DROP VIEW {name}"), "TSV").await.unwrap();
    }
}
