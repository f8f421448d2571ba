//! A topic that is deleted and made anew under its name: every role begins it anew, and the rows of both logs stay.

use std::time::Duration;

use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
};
use weir::{message::SourceName, simulate::Shares};

use crate::{
    replay::Scene,
    stack::{address, eventually, produce},
};

async fn make_anew(topic: &str, partitions: i32) {
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
    running.says("made anew").await;

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
