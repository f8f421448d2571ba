//! The sink's group set back by hand, as `kafka-consumer-groups --reset-offsets` does it: nothing is stored twice.

use std::time::Duration;

use weir::{kafka::Producer, simulate::Shares};

use crate::{
    replay::{Scene, commit, produce_results},
    stack::{eventually, kafka, outgoing},
};

const COUNT: usize = 6_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_the_group_was_set_back_what_is_there_stays_and_what_is_missing_is_inserted() {
    // Small blocks, so that a kill comes between them.
    let scene = Scene::new("set-back", Shares::NONE, Duration::ZERO, "[sink]\nrows = 100\n").await;
    let topic = scene.topics.results();
    produce_results(&topic, COUNT).await;
    // Unreadable, in the middle and at the end: each has one dead letter, which is stored as well.
    let broken = || vec![outgoing(&topic, "k", "{broken"), outgoing(&topic, "another", "{broken")];
    Producer::new(&kafka()).unwrap().send(broken()).await.unwrap();
    produce_results(&topic, 100).await;
    Producer::new(&kafka()).unwrap().send(broken()).await.unwrap();
    let all = COUNT as u64 + 100;
    let stored = async |rows: u64| {
        eventually("all is stored", async || {
            let found = scene.number("SELECT count() FROM observations").await;
            let dead = scene.number("SELECT count() FROM dead_letters").await;
            assert!(found <= rows && dead <= 4, "{found} of {rows} rows, {dead} dead letters");
            (found == rows && dead == 4).then_some(())
        })
        .await;
        scene.expect_clean().await;
    };
    let sink = scene.installation.start("only", &["sink"]);
    stored(all).await;
    assert!(sink.stop().await.success());

    // One partition from its beginning, one from the middle; and rows have been deleted meanwhile.
    let delete =
        "ALTER TABLE observations DELETE WHERE partition = 0 AND (offset % 500 = 7 OR offset BETWEEN 900 AND 999)";
    scene.execute(&format!("{delete} SETTINGS mutations_sync = 2")).await;
    scene.execute("TRUNCATE TABLE items_latest").await;
    assert!(scene.number("SELECT count() FROM observations").await < all - 100);
    let group = format!("{}.sink", scene.group);
    commit(&group, &topic, 0, (0, "")).await;
    commit(&group, &topic, 1, (1_000, "")).await;
    produce_results(&topic, 200).await;

    let sink = scene.installation.start("only", &["sink"]);
    sink.says("was moved by someone else").await;
    // What is known of the table has to outlive the process.
    sink.kill();
    let sink = scene.installation.start("only", &["sink"]);
    stored(all + 200).await;
    let items =
        "SELECT count() FROM items_latest FINAL WHERE item IN (SELECT item FROM observations WHERE partition = 0)";
    let expected = "SELECT uniqExact(item) FROM observations WHERE partition = 0";
    assert_eq!(scene.number(items).await, scene.number(expected).await, "the views are fed too");
    assert!(sink.stop().await.success());

    // Forgotten altogether: the same, from the beginning.
    let topics =
        [(topic.as_str(), 2), (scene.topics.dead().as_str(), 2)].map(|(topic, count)| (topic.to_owned(), count));
    for (topic, count) in topics {
        for partition in 0..count {
            commit(&group, &topic, partition, (0, "")).await;
        }
    }
    let sink = scene.installation.start("only", &["sink"]);
    sink.says("was moved by someone else").await;
    stored(all + 200).await;
    assert!(sink.stop().await.success());
}
