//! retry on a real broker: killed, stopped, joined by another, its topics grown or badly set.

use std::time::Duration;

use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier},
    client::DefaultClientContext,
};
use weir::kafka::admin;

use crate::{
    stack::{address, kafka},
    wheel::{Scene, Torture, now_ms, torture},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_every_few_seconds_loses_nothing_doubles_nothing_and_sends_nothing_early() {
    let mut scene = Scene::new("torture").await;
    let short = Torture {
        faults: 6,
        seed: 6,
        failures: 400,
        delay_max: Duration::from_secs(10),
        between: Duration::from_secs(2),
    };
    let account = torture(&mut scene, &short).await;
    eprintln!("{account}");
    assert!(account.is_clean(), "{account}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_survives_a_second_process_and_added_partitions() {
    let mut scene = Scene::new("grow").await;
    let first = scene.start("one");
    scene.fail((0..500).map(|n| now_ms() + 1_000 + n * 30)).await;
    let second = scene.start("two");
    second.says("partitions are ours now").await;
    let grow = |topic: weir::topics::Topic| weir::topics::Topic { partitions: topic.partitions + 3, ..topic };
    let mut topics = scene.topics.all(&[]);
    topics.retain(|topic| topic.name == scene.topics.failures());
    topics.extend(scene.topics.delays());
    admin::apply(&kafka(), &topics.into_iter().map(grow).collect::<Vec<_>>(), 1).await.unwrap();
    scene.fail((0..500).map(|n| now_ms() + 1_000 + n * 20)).await;
    assert!(first.stop().await.success());
    let account = scene.settle(Duration::from_secs(60)).await;
    assert!(account.is_clean(), "{account}");
    assert!(second.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retry_does_not_start_on_a_topic_that_would_lose_what_waits_and_starts_when_it_is_put_right() {
    let scene = Scene::new("unfit").await;
    let topics = scene.topics.delays();
    let client: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", address("WEIR_TEST_KAFKA")).create().unwrap();
    let alter = AlterConfig::new(ResourceSpecifier::Topic(&topics[3].name))
        .set("retention.ms", "60000")
        .set("message.timestamp.type", "LogAppendTime");
    client.alter_configs([&alter], &AdminOptions::new()).await.unwrap()[0].as_ref().unwrap();

    let process = scene.start("one");
    process.says("retention.ms is 60000, at least 256000 is needed").await;
    assert!(!process.log().contains("partitions are ours now"));
    admin::apply(&kafka(), &topics, 1).await.unwrap();
    process.says("partitions are ours now").await;
    assert!(process.stop().await.success());
}
