//! What a careless command line may not do: pour into the live tables beside the sink, ask for ids twice as often with
//! each run, write where it should read; and that verify sees what was written by hand.

use std::time::Duration;

use rdkafka::{
    ClientConfig,
    consumer::{BaseConsumer, Consumer},
};
use weir::{
    kafka::Producer,
    message::SourceName,
    simulate::{self, Shares},
    store::query::{Format, query, read},
};

use crate::{
    replay::{Scene, produce_results},
    stack::{address, eventually, kafka, outgoing},
};

fn requests(scene: &Scene) -> String {
    scene.topics.requests(&SourceName::new("ali1688").unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_live_database_by_its_name_gets_no_row_that_the_sink_has_still_to_store() {
    const COUNT: u64 = 3_000;
    let scene = Scene::new("byname", Shares::NONE, Duration::ZERO, "").await;
    produce_results(&scene.topics.results(), usize::try_from(COUNT).unwrap()).await;
    let table = format!("{}.observations", scene.database);
    for into in ["tables", &scene.database, &table] {
        let (code, text) = scene.installation.outcome(&["replay", "--topic", "results", "--into", into, "--yes"]).await;
        assert!(code == 0 && text.contains("3,000 offsets are left to the sink"), "{into}: {text}");
    }
    assert_eq!(scene.number("SELECT count() FROM observations").await, 0);
    let other = format!("{}.failures", scene.database);
    let (code, text) = scene.installation.outcome(&["replay", "--topic", "results", "--into", &other, "--yes"]).await;
    assert!(code == 64 && text.contains(&table), "{text}");

    let sink = scene.installation.start("only", &["sink"]);
    eventually("the sink has stored them", async || {
        (scene.number("SELECT count() FROM observations").await >= COUNT).then_some(())
    })
    .await;
    scene.expect_clean().await;
    assert!(sink.stop().await.success());
    assert_eq!(scene.number("SELECT count() FROM observations").await, COUNT);
}

/// How many records are on the topic, and transaction markers with them.
fn written(topic: &str) -> i64 {
    let consumer: BaseConsumer =
        ClientConfig::new().set("bootstrap.servers", address("WEIR_TEST_KAFKA")).create().unwrap();
    (0..2).map(|partition| consumer.fetch_watermarks(topic, partition, Duration::from_secs(10)).unwrap().1).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_run_to_requests_asks_once_for_each_id_also_when_it_is_killed() {
    const COUNT: i64 = 60_000;
    let scene = Scene::new("asked", Shares::NONE, Duration::ZERO, "").await;
    let topic = requests(&scene);
    let producer = Producer::new(&kafka()).unwrap();
    let ids: Vec<String> = (0..COUNT).map(|id| (600_000_000_000 + id).to_string()).collect();
    for some in ids.chunks(10_000) {
        producer.send(some.iter().map(|id| outgoing(&topic, id, id)).collect()).await.unwrap();
    }
    let arguments = ["replay", "--topic", "requests", "--into", "requests", "--yes"];
    let text = scene.installation.run(&arguments).await;
    assert!(text.contains("60,000 requests were sent"), "{text}");

    // Now each id stands there twice.
    let before = written(&topic);
    let killed = scene.installation.start("killed", &arguments);
    eventually("it has sent some", async || (written(&topic) > before).then_some(())).await;
    killed.kill();
    assert!(written(&topic) < before + COUNT, "killed before the end: else this test shows nothing");
    let (code, text) = scene.installation.outcome(&arguments).await;
    assert!(code == 0 && text.contains("Continuing an interrupted run"), "{text}");

    let sink = scene.installation.start("only", &["sink"]);
    eventually("the sink has stored them", async || {
        (scene.number("SELECT count() FROM requests").await >= 3 * u64::try_from(COUNT).unwrap()).then_some(())
    })
    .await;
    scene.expect_clean().await;
    assert!(sink.stop().await.success());
    let times = "SELECT groupUniqArray(times) FROM (SELECT count() AS times FROM requests GROUP BY request_id)";
    assert_eq!(scene.installation.query(times).await.unwrap().trim(), "[3]");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verify_names_rows_beyond_the_end_and_says_of_which_topics_it_knows_nothing() {
    let scene = Scene::new("strays", Shares::NONE, Duration::ZERO, "").await;
    let process = scene.run();
    let (code, text) = scene.collect("monday", simulate::sample(9).take(50)).await;
    assert_eq!(code, 0, "{text}");
    scene.expect_clean().await;
    assert!(process.stop().await.success());
    let results = scene.topics.results();
    let by_hand = |topic: &str, partition: u32, offset: u32| {
        format!(
            "INSERT INTO observations (topic, partition, offset, recorded_at, source, item, status) \
             VALUES ('{topic}', {partition}, {offset}, now(), 'ali1688', '1', 'absent')"
        )
    };
    for row in [by_hand(&results, 0, 1_000_000), by_hand(&results, 7, 3), by_hand("of-before", 0, 0)] {
        scene.execute(&row).await;
    }
    let (code, text) = scene.installation.outcome(&["verify"]).await;
    assert_eq!(code, 1, "{text}");
    for named in
        [&format!("{results}/0/1000000"), &format!("{results}/7/3"), "1 row of observations names the topic of-before"]
    {
        assert!(text.contains(named), "{named}: {text}");
    }
    // The command that it gives does what it says.
    let advice = text.lines().find_map(|line| line.trim().strip_prefix("weir query \"")).expect(&text);
    scene.execute(advice.trim_end_matches('"')).await;
    let (code, text) = scene.installation.outcome(&["verify"]).await;
    assert!(code == 0 && text.contains("1 row of observations names the topic of-before"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_can_be_followed_as_soon_as_it_was_enqueued_and_a_wrong_name_is_asked_about() {
    let scene = Scene::new("follow", Shares::NONE, Duration::ZERO, "").await;
    let process = scene.run();
    let (code, text) = scene.collect("first", simulate::sample(9).take(5)).await;
    assert_eq!(code, 0, "{text}");
    let file = scene.installation.file("more.txt", "600000000001\n600000000002\n");
    scene.installation.run(&["enqueue", &file, "--source", "ali1688", "--batch", "second"]).await;
    let (code, text) = scene.installation.outcome(&["batch", "second", "--follow"]).await;
    assert!(code == 0 && text.contains("All 2 finished"), "{text}");
    let (code, text) = scene.installation.outcome(&["batch", "secnod", "cancel"]).await;
    assert!(code == 0 && text.contains("Is the name right?"), "{text}");
    let (code, text) = scene.installation.outcome(&["batch", "second", "cancel"]).await;
    assert!(code == 0 && !text.contains("Is the name right?"), "{text}");
    assert!(process.stop().await.success());
}

#[tokio::test]
async fn an_export_only_reads_and_who_may_only_read_can_still_ask() {
    let url = address("WEIR_TEST_CLICKHOUSE");
    let all = weir::store::ClickHouseConfig { url, database: "default".to_owned(), ..Default::default() };
    let mut out = Vec::new();
    let format = Format::Named("TSV".to_owned());
    let write = "CREATE TABLE default.exported (a Int8) ENGINE = Memory";
    let error = read(&all, write, &format, &mut out).await.unwrap_err().to_string();
    assert!(error.contains("readonly"), "{error}");
    read(&all, "SELECT 7 SETTINGS max_threads = 1", &format, &mut out).await.unwrap();
    assert_eq!(out, b"7\n");

    let bi = weir::store::ClickHouseConfig { user: "bi".to_owned(), password: Some("reader".into()), ..all };
    for colour in [true, false] {
        let mut out = Vec::new();
        query(&bi, "SELECT 7 AS a", &Format::Table { colour }, &mut out).await.unwrap();
        assert!(String::from_utf8(out).unwrap().contains('7'));
    }
    let mut out = Vec::new();
    read(&bi, "SELECT 8", &format, &mut out).await.unwrap();
    assert_eq!(out, b"8\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_purged_from_kafka_is_known_by_its_rows_and_a_batch_that_nobody_knows_is_not_proved() {
    let shares = Shares { failing: 0.5, ..Shares::NONE };
    let scene = Scene::new("purged", shares, Duration::ZERO, "[retry]\nattempts = 1\n").await;
    let process = scene.run();
    let (code, text) = scene.collect("monday", simulate::sample(4).take(60)).await;
    assert_eq!(code, 0, "{text}");
    let dead = scene.number("SELECT dead FROM batches WHERE batch = 'monday'").await;
    assert!(dead > 5, "{text}");
    scene.expect_clean().await;
    assert!(process.stop().await.success());
    let text = scene.installation.run(&["dead", "purge", "--until", "0s", "--yes"]).await;
    assert!(text.contains(&format!("{dead} dead letters deleted")), "{text}");
    let (code, text) = scene.installation.outcome(&["verify", "--batch", "monday"]).await;
    assert!(code == 0 && text.contains(&format!(" + {dead} dead + 0 under way")), "{text}");
    let (code, text) = scene.installation.outcome(&["replay", "--topic", "dead", "--dry-run"]).await;
    assert!(code == 0 && text.contains("The range has no records"), "{text}");

    let (code, text) = scene.installation.outcome(&["verify", "--batch", "mondya"]).await;
    assert!(code == 1 && text.contains("no request of batch mondya is on Kafka"), "{text}");
    // Offsets are of one lane: without --express the one of the backlog.
    let piece = ["replay", "--topic", "requests", "--source", "ali1688", "--from", "0:0", "--dry-run"];
    let (code, text) = scene.installation.outcome(&piece).await;
    assert!(code == 0 && text.contains("are already in the tables; 0 would be inserted"), "{text}");
}
