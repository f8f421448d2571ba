//! retry on a real broker: killed, stopped, joined by another, its topics grown or badly set.

use std::time::Duration;

use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier},
    client::DefaultClientContext,
};
use weir::kafka::admin;

use crate::{
    stack::{address, eventually, kafka},
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
    second.says("assigned ").await;
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
    assert!(!process.log().contains("assigned "));
    admin::apply(&kafka(), &topics, 1).await.unwrap();
    process.says("assigned ").await;
    assert!(process.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_that_stand_for_longer_than_the_poll_interval_cost_nobody_the_membership() {
    // Every client has them, and librdkafka takes no poll interval below the session of any.
    let properties = "\"max.poll.interval.ms\" = \"7000\"\n\"session.timeout.ms\" = \"6000\"\n";
    let mut scene = Scene::with("poll", properties).await;
    let process = scene.start("one");
    // It is two members: of the failures, and of the delay topics.
    for topic in [scene.topics.failures(), scene.topics.delay(16)] {
        process.says(&format!("{topic}/1")).await;
    }
    // More than is read ahead: sixteen seconds on one topic, then a little in memory.
    let due = now_ms() + 17_000;
    scene.fail((0..1_000).map(|n| due + n)).await;
    let stands = |number: i32| format!("partition={}/{number} flows=false", scene.topics.delay(16));
    for number in 0..2 {
        process.says(&stands(number)).await;
    }
    let left = due - now_ms();
    assert!(left > 10_000, "they stood too late to stand for longer than the interval: {left} ms are left");
    let account = scene.settle(Duration::from_secs(60)).await;
    assert!(account.is_clean(), "{account}");
    let log = process.log();
    assert_eq!(log.matches("assigned ").count(), 2, "it has lost a membership");
    for wrong in ["role failed", "lost to another member", "MAXPOLL", "maximum poll interval"] {
        assert!(!log.contains(wrong), "{wrong}");
    }
    assert!(process.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn others_that_join_leave_and_die_while_requests_wait_change_nothing_for_them() {
    let mut scene = Scene::new("rebalance").await;
    let first = scene.start("one");
    first.says("assigned ").await;
    scene.fail((0..3_000).map(|n| now_ms() + 1_000 + n * 8)).await;
    for (name, seen, dies) in [("two", 500, false), ("three", 1_200, true), ("four", 1_900, false)] {
        let other = scene.start(name);
        other.says("assigned ").await;
        eventually("some have come with two at work", async || (scene.seen() > seen).then_some(())).await;
        if dies {
            other.kill();
        } else {
            assert!(other.stop().await.success());
        }
    }
    let account = scene.settle(Duration::from_secs(60)).await;
    assert!(account.is_clean(), "{account}");
    assert!(first.log().contains("revoked "), "nobody has joined");
    assert!(first.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_of_a_cancelled_batch_ends_as_dead_letters_and_never_goes_back() {
    let mut scene = Scene::new("cancelled").await;
    let process = scene.start("one");
    let due = now_ms() + 12_000;
    scene.fail_of(Some("monday"), (0..300).map(|n| due + n)).await;
    scene.fail_of(Some("tuesday"), (0..100).map(|n| due + n)).await;
    eventually("all wait", async || (scene.behind().await <= 16).then_some(())).await;
    assert!(now_ms() < due - 1_000, "too slow to be cancelled in time");
    scene.cancel("monday").await;
    eventually("all have their end", async || (scene.seen() >= 400).then_some(())).await;
    let mut counts = [0, 0];
    for seen in scene.come() {
        let json = seen.json();
        if seen.headers["ce_type"] == "weir.dead_letter.v1" {
            assert_eq!((&json["reason"], &json["request"]["batch"]), (&"cancelled".into(), &"monday".into()), "{json}");
            assert_eq!(json["request"]["history"].as_array().map(Vec::len), Some(1), "{json}");
            counts[0] += 1;
        } else {
            assert_eq!(json["batch"], "tuesday");
            counts[1] += 1;
        }
    }
    assert_eq!(counts, [300, 100]);
    // After a new start it is still cancelled.
    assert!(process.stop().await.success());
    scene.fail_of(Some("friday"), [now_ms() + 10_000_000]).await;
    scene.cancel("friday").await;
    let process = scene.start("one");
    eventually("it ends", async || (scene.seen() > 400).then_some(())).await;
    assert_eq!(scene.come()[400].json()["reason"], "cancelled");
    assert!(process.stop().await.success());
}
