//! A topic that is deleted and made anew under its name: every role begins it anew, and the rows of both logs stay.

use std::time::Duration;

use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
    producer::{BaseProducer, Producer as _},
};
use weir::{message::SourceName, simulate::Shares};

use crate::{
    replay::Scene,
    stack::{address, eventually, kafka, produce},
};

pub async fn make_anew(topic: &str, partitions: i32) {
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", address("WEIR_TEST_KAFKA")).create().unwrap();
    let options = AdminOptions::new().operation_timeout(Some(Duration::from_secs(10)));
    for deleted in admin.delete_topics(&[topic], &options).await.unwrap() {
        deleted.unwrap();
    }
    let new = NewTopic::new(topic, partitions, TopicReplication::Fixed(1));
    eventually("the topic is there again", async || {
        let made = admin.create_topics([&new], &options).await.unwrap();
        made.into_iter().all(|topic| topic.is_ok()).then_some(())
    })
    .await;
}

fn ids(from: u64, count: u64) -> impl Iterator<Item = String> {
    (from..from + count).map(|id| id.to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_made_anew_is_begun_anew_by_every_role_and_no_row_is_taken_for_another() {
    let scene = Scene::new("anew", Shares::NONE, Duration::ZERO, "").await;
    let requests = scene.topics.requests(&SourceName::new("ali1688").unwrap());
    // Without ids of their own: the place of each is its id.
    let answered = async |items: u64| {
        eventually("each request has its answer, and its row", async || {
            let found = scene.number("SELECT uniqExact(item) FROM observations").await;
            let asked = scene.number("SELECT uniqExact(item) FROM requests").await;
            (found == items && asked == items).then_some(())
        })
        .await;
        scene.expect_clean().await;
    };
    let running = scene.run();
    produce(&requests, ids(610_000_000_000, 200)).await;
    answered(200).await;

    // Under running roles, and with more records than before, so that no position is out of range.
    make_anew(&requests, 2).await;
    produce(&requests, ids(620_000_000_000, 500)).await;
    answered(700).await;
    running.says("re-created").await;

    // With fewer than before.
    make_anew(&requests, 2).await;
    produce(&requests, ids(630_000_000_000, 50)).await;
    answered(750).await;

    // While nobody looks; and what is said of rows to come stands in the same offsets of another log.
    assert!(running.stop().await.success());
    make_anew(&requests, 2).await;
    make_anew(&scene.topics.results(), 2).await;
    produce(&requests, ids(640_000_000_000, 100)).await;
    let running = scene.run();
    answered(850).await;
    assert!(running.stop().await.success());

    let logs = "SELECT uniqExact(topic) FROM requests";
    assert_eq!(scene.number(logs).await, 4, "each log has a name of its own");
    let same = "SELECT count() - uniqExact(topic, partition, offset) FROM requests";
    assert_eq!(scene.number(same).await, 0);
    let ended_twice = "SELECT count() FROM (SELECT request_id, uniqExact(item) AS items FROM observations \
        GROUP BY request_id HAVING items > 1)";
    assert_eq!(scene.number(ended_twice).await, 0, "no id is of two requests");
    let (_, text) = scene.installation.outcome(&["verify"]).await;
    assert!(!text.contains("DELETE"), "{text}");
}

async fn forget(group: &str) {
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", address("WEIR_TEST_KAFKA")).create().unwrap();
    // A member that has just left is one until its session ends.
    eventually("the group is deleted", async || {
        let deleted = admin.delete_groups(&[group], &AdminOptions::new()).await.unwrap();
        deleted.into_iter().all(|group| group.is_ok()).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_has_lost_its_offsets_stops_with_a_sentence_and_goes_on_as_told() {
    let scene = Scene::new("forgotten", Shares::NONE, Duration::ZERO, "").await;
    let requests = scene.topics.requests(&SourceName::new("ali1688").unwrap());
    let answers = "SELECT count() FROM observations";
    // A first start ever, on a filled topic: the sink has stored the requests already.
    produce(&requests, ids(610_000_000_000, 40)).await;
    let sink = scene.installation.start("sink", &["sink"]);
    eventually("the requests are stored", async || {
        (scene.number("SELECT count() FROM requests").await == 40).then_some(())
    })
    .await;
    let fetch = scene.installation.start("fetch", &["fetch"]);
    eventually("the first start works", async || (scene.number(answers).await == 40).then_some(())).await;
    assert!(fetch.stop().await.success());

    forget(&format!("{}.fetch.ali1688", scene.group)).await;
    let fetch = scene.installation.start("fetch", &["fetch"]);
    fetch.says("has no offsets for").await;
    assert!(fetch.log().contains("--from latest"), "{}", fetch.log());
    assert!(fetch.stop().await.success());

    let fetch = scene.installation.start("fetch", &["run", "--role", "fetch", "--from", "latest"]);
    fetch.says("starting at the end").await;
    fetch.says("fetching source").await;
    produce(&requests, ids(620_000_000_000, 10)).await;
    eventually("what comes now is called for", async || (scene.number(answers).await == 50).then_some(())).await;
    scene.expect_clean().await;
    assert_eq!(scene.number(answers).await, 50, "nothing is called for twice");
    assert!(fetch.stop().await.success());
    assert!(sink.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_retention_has_deleted_unread_are_named_and_end_and_can_be_asked_for_again() {
    let scene = Scene::new("deleted", Shares::NONE, Duration::ZERO, "").await;
    let requests = scene.topics.requests(&SourceName::new("ali1688").unwrap());
    let sink = scene.installation.start("sink", &["sink"]);
    let file = scene.installation.file("ids.txt", &ids(610_000_000_000, 60).collect::<Vec<_>>().join("\n"));
    scene.installation.run(&["enqueue", &file, "--source", "ali1688", "--batch", "late"]).await;
    eventually("the requests are stored", async || {
        (scene.number("SELECT count() FROM requests").await == 60).then_some(())
    })
    .await;
    // What retention does when its time has come.
    let partitions = [0, 1].map(|number| weir::kafka::Partition { topic: requests.as_str().into(), number });
    let bounds = weir::kafka::scan::bounds(&kafka(), std::slice::from_ref(&requests)).await.unwrap();
    let ends = partitions.iter().map(|partition| {
        let end = bounds.iter().find(|bounds| bounds.partition == *partition).unwrap().end;
        (partition.clone(), end)
    });
    let all: Vec<_> = ends.collect();
    weir::kafka::admin::delete_before(&kafka(), &all).await.unwrap();
    let (code, text) = scene.installation.outcome(&["verify", "--all", "--batch", "late"]).await;
    assert!(code == 1 && text.contains("60 requested = ") && text.contains(" + 60 LOST"), "{text}");
    assert!(text.contains("lost: item 610000000000, request late/610000000000, asked for at"), "{text}");
    assert!(text.contains("--end-lost"), "{text}");

    let (_, text) = scene.installation.outcome(&["verify", "--end-lost"]).await;
    assert!(text.contains("Ended 60 lost requests as dead letters"), "{text}");
    scene.expect_clean().await;
    assert_eq!(scene.number("SELECT dead FROM batches WHERE batch = 'late' AND under_way = 0").await, 60);
    let running = scene.installation.start("fetch", &["fetch"]);
    scene.installation.run(&["replay", "--topic", "dead", "--into", "requests", "--yes"]).await;
    eventually("they are answered after all", async || {
        (scene.number("SELECT found FROM batches WHERE batch = 'late'").await == 60).then_some(())
    })
    .await;
    assert!(running.stop().await.success() && sink.stop().await.success());
}

/// What a worker leaves behind that was killed in the midst of a transaction: here one that the brokers leave open for ten
/// minutes.
fn leave_open(name: &str, group: &str, topic: &str) {
    let client = || {
        let mut client = ClientConfig::new();
        client.set("bootstrap.servers", address("WEIR_TEST_KAFKA"));
        client
    };
    let within = Duration::from_secs(10);
    let producer: BaseProducer =
        client().set("transactional.id", name).set("transaction.timeout.ms", "600000").create().unwrap();
    let consumer: BaseConsumer = client().set("group.id", group).create().unwrap();
    producer.init_transactions(within).unwrap();
    producer.begin_transaction().unwrap();
    let mut offsets = TopicPartitionList::new();
    offsets.add_partition_offset(topic, 0, Offset::Offset(0)).unwrap();
    producer.send_offsets_to_transaction(&offsets, &consumer.group_metadata().unwrap(), within).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_a_killed_fetch_left_open_does_not_hold_up_the_next_one() {
    let scene = Scene::new("open", Shares::NONE, Duration::ZERO, "").await;
    let requests = scene.topics.requests(&SourceName::new("ali1688").unwrap());
    produce(&requests, ids(610_000_000_000, 10)).await;
    let group = format!("{}.fetch.ali1688", scene.group);
    leave_open(&format!("{group}.fetch"), &group, &requests);
    let fetch = scene.installation.start("fetch", &["fetch"]);
    fetch.says("fetching source").await;
    assert!(fetch.stop().await.success());
}
