//! What `weir status` says of the records that wait.

use std::time::Duration;

use rdkafka::{
    ClientConfig,
    producer::{BaseRecord, Producer as _, ThreadedProducer},
};
use serde_json::Value;
use weir::simulate::Shares;

use crate::{
    replay::{Scene, commit},
    stack::{address, unique},
};

/// Writes records into one partition in a transaction, which is committed or rolled back.
pub async fn transact(topic: &str, partition: i32, records: u32, is_kept: bool) {
    let producer: ThreadedProducer<_> = ClientConfig::new()
        .set("bootstrap.servers", address("WEIR_TEST_KAFKA"))
        .set("transactional.id", unique("writer"))
        .create_with_context(rdkafka::producer::DefaultProducerContext)
        .unwrap();
    let (topic, limit) = (topic.to_owned(), Duration::from_secs(30));
    let done = tokio::task::spawn_blocking(move || {
        producer.init_transactions(limit).unwrap();
        producer.begin_transaction().unwrap();
        for _ in 0..records {
            let record = BaseRecord::<(), str>::to(&topic).partition(partition).payload("a record");
            producer.send(record).map_err(|(error, _)| error).unwrap();
        }
        producer.flush(limit).unwrap();
        if is_kept { producer.commit_transaction(limit) } else { producer.abort_transaction(limit) }.unwrap();
    });
    done.await.unwrap();
}

/// What waits for a stage on a topic, and whether it was counted.
async fn waiting(scene: &Scene, stage: &str, topic: &str) -> (i64, bool) {
    let status: Value = serde_json::from_str(&scene.installation.run(&["status", "--json"]).await).unwrap();
    let mut lines = status["lag"].as_array().unwrap().iter();
    let line = lines.find(|line| line["stage"] == stage && line["topic"] == topic).unwrap();
    (line["waiting"].as_i64().unwrap(), line["counted"].as_bool().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_records_wait_and_no_marks_of_transactions() {
    let scene = Scene::new("status", Shares::NONE, Duration::ZERO, "").await;
    let (results, sink) = (scene.topics.results(), format!("{}.sink", scene.group));
    // Offsets 0 to 2 and a mark; 4 and 5, rolled back, and a mark; 7 and a mark.
    for (records, is_kept) in [(3, true), (2, false), (1, true)] {
        transact(&results, 0, records, is_kept).await;
    }
    transact(&results, 1, 1, true).await;
    assert_eq!(waiting(&scene, "sink", &results).await, (5, true), "nothing is committed yet");
    commit(&sink, &results, 0, (2, "")).await;
    commit(&sink, &results, 1, (1, "")).await;
    assert_eq!(waiting(&scene, "sink", &results).await, (2, true));
    commit(&sink, &results, 0, (8, "")).await;
    assert_eq!(waiting(&scene, "sink", &results).await, (0, true), "only marks are left");
    assert_eq!(waiting(&scene, "changes", &results).await, (5, true), "each group has its own");
    let text = scene.installation.run(&["status"]).await;
    assert!(!text.contains("perhaps"), "{text}");
    transact(&results, 0, 300, true).await;
    assert_eq!(waiting(&scene, "sink", &results).await, (302, false), "many are not counted one by one");
}
