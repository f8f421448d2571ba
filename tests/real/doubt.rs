//! What the sink does about inserts in doubt, on a real ClickHouse: count, feed the views again, offer again.

use std::time::Duration;

use serde_json::json;
use weir::{
    message::envelope::Kind,
    sink::Insert,
    store::{ClickHouseConfig, Store, TroubleKind},
};

use crate::{
    proxy::{Mood, Proxy},
    sink::{Database, NOVEMBER, block, insert, result, seal, store_block, with},
    stack::eventually,
};

#[tokio::test]
async fn a_count_sees_its_own_range_and_nothing_else() {
    let database = Database::new().await;
    let store = database.store();
    let values = |count| (0..count).map(|id: u32| result(&id.to_string(), "b", "found").to_string());
    let large = seal(block("r", values(500)), Kind::Result).await;
    assert_eq!(store.count(&large).await.unwrap(), 0);
    store.insert(&large, "any").await.unwrap();
    assert_eq!(store.count(&large).await.unwrap(), 500);
    assert_eq!(store.count(&seal(block("r", values(20)), Kind::Result).await).await.unwrap(), 20, "a part of it");
    assert_eq!(store.count(&seal(block("other", values(20)), Kind::Result).await).await.unwrap(), 0);
    database
        .text("ALTER TABLE observations DELETE WHERE offset < 10 SETTINGS mutations_sync = 1", "TSV")
        .await
        .unwrap();
    assert_eq!(store.count(&large).await.unwrap(), 490);
    database.drop().await;
}

#[tokio::test]
async fn a_large_block_is_one_part_and_so_stored_as_a_whole_or_not_at_all() {
    let database = Database::new().await;
    database.text("SYSTEM STOP MERGES observations", "TSV").await.unwrap();
    let values = (0..80_000).map(|id: u32| result(&id.to_string(), "b", "found").to_string());
    store_block(&database.store(), block("r", values), Kind::Result).await.unwrap();
    let parts = "SELECT toUInt32(count()), toUInt32(sum(rows)) FROM system.parts \
        WHERE database = currentDatabase() AND table = 'observations' AND active";
    assert_eq!(database.rows(parts).await, [json!([1, 80_000])]);
    database.drop().await;
}

#[tokio::test]
async fn a_refill_brings_what_a_view_has_missed_and_doubles_nothing() {
    let database = Database::new().await;
    let store = database.store();
    let values = || (0..100).map(|id: u32| result(&id.to_string(), "b", "found").to_string());
    let block_of = async |topic: &str| seal(block(topic, values()), Kind::Result).await;
    store.insert(&block_of("r").await, "one").await.unwrap();
    // As a server leaves it that dies between the table and its views.
    for table in ["items_latest", "item_times"] {
        database.text(&format!("TRUNCATE TABLE {table}"), "TSV").await.unwrap();
    }
    let newer =
        (0..10).map(|id: u32| with(result(&id.to_string(), "b", "absent"), &json!({"fetched_at": NOVEMBER + 9_000})));
    insert(&store, "newer", Kind::Result, newer).await;
    for _ in 0..2 {
        store.refill(&block_of("r").await, None).await.unwrap();
    }
    let items =
        "SELECT status, toUInt32(count()), toUInt32(count(first_seen_at)) FROM items GROUP BY status ORDER BY status";
    let expected = [json!(["absent", 10, 10]), json!(["found", 90, 90])];
    assert_eq!(database.rows(items).await, expected);
    store.refill(&block_of("nothing of it is stored").await, None).await.unwrap();
    assert_eq!(database.rows(items).await, expected);
    database.drop().await;
}

#[tokio::test]
async fn a_view_whose_table_would_count_rows_twice_is_left_alone() {
    let database = Database::new().await;
    let store = database.store();
    for (name, engine) in [("plain", "MergeTree"), ("sums", "SummingMergeTree"), ("states", "AggregatingMergeTree")] {
        let column = if name == "states" { "SimpleAggregateFunction(sum, UInt64)" } else { "UInt64" };
        let table = format!("CREATE TABLE {name} (source String, seen {column}) ENGINE = {engine} ORDER BY source");
        database.text(&table, "TSV").await.unwrap();
        let view = format!(
            "CREATE MATERIALIZED VIEW {name}_view TO {name} AS SELECT source, toUInt64(count()) AS seen FROM observations GROUP BY source"
        );
        database.text(&view, "TSV").await.unwrap();
    }
    let block = seal(block("r", [result("1", "b", "found").to_string()]), Kind::Result).await;
    store.insert(&block, "one").await.unwrap();
    store.refill(&block, None).await.unwrap();
    for name in ["plain", "sums", "states"] {
        let seen = format!("SELECT toUInt32(sum(seen)) FROM {name}");
        assert_eq!(database.rows(&seen).await, [json!([1])], "{name}");
    }
    database.drop().await;
}

#[tokio::test]
async fn an_insert_that_arrives_after_its_block_was_stored_is_dropped() {
    let database = Database::new().await;
    let proxy = Proxy::start(database.0.url.trim_start_matches("http://")).await;
    let url = format!("http://{}", proxy.address);
    let config = ClickHouseConfig { url, timeout: Duration::from_secs(1), ..database.0.clone() };
    let store = Store::connect(&config).unwrap();
    // It has to know the table before, or it would ask for its columns, and send no insert.
    insert(&store, "before", Kind::Result, [result("1", "b", "found")]).await;
    let values = (0..50).map(|id: u32| result(&id.to_string(), "b", "found").to_string());
    let block = seal(block("r", values), Kind::Result).await;
    let token = block.intent.token(&block.partition, 1);
    proxy.set(Mood::Late);
    assert_eq!(store.insert(&block, &token).await.unwrap_err().kind, TroubleKind::Away);
    proxy.set(Mood::Fair);
    assert_eq!((proxy.late(), store.count(&block).await.unwrap()), (0, 0));
    store.insert(&block, &token).await.unwrap();
    assert_eq!(store.count(&block).await.unwrap(), 50);
    eventually("the late insert is executed", async || (proxy.late() > 0).then_some(())).await;
    assert_eq!(store.count(&block).await.unwrap(), 50);
    database.drop().await;
}
