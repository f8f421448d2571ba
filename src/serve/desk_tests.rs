//! The desk while Kafka does not answer, and while another source stands in.

use figment::providers::{Format, Toml};

use super::*;
use crate::{
    cache::{self, Cache},
    message::Columns,
    platform::SourceConfig,
    topics,
};

/// Less than the producer takes to give up, and more than a busy machine takes for anything.
const AT_ONCE: Duration = Duration::from_secs(20);

fn name(text: &str) -> SourceName {
    SourceName::new(text).unwrap()
}

fn cached() -> SourceCache {
    let text = "name = \"shop\"\nkind = \"ali1688\"\nunlimited = true\n[cache]\npreset = \"1688\"";
    let config = <Toml as Format>::from_str::<SourceConfig>(text).unwrap();
    let cache = Cache::open(&cache::Config::default(), None).unwrap();
    cache.source(&config, &Clock::System, &Dice::seeded(1)).unwrap()
}

/// A desk whose brokers do not listen.
fn desk(cache: &SourceCache, places: usize) -> Desk {
    let source = SourceParts { name: name("shop"), topic: "requests".into(), cache: Some(cache.clone()) };
    let topics = Topics::new(topics::Config::default());
    let kafka = client::Config { brokers: "127.0.0.1:1".to_owned(), ..client::Config::default() };
    Desk::new(vec![source], topics, &kafka, (Clock::System, Dice::seeded(2)), places).unwrap()
}

fn question(wait: Duration) -> Question {
    let (source, item) = (name("shop"), ItemId::new("7").unwrap());
    Question { source, item, params: BTreeMap::new(), max_age: None, wait }
}

fn answer() -> Answer {
    let columns = Columns { price: Some("9.90".to_owned()), ..Columns::default() };
    Answer { status: Status::Found, columns, fingerprint: "f".to_owned(), raw: None }
}

fn key(desk: &Desk, cache: &SourceCache) -> Key {
    cache.key(&desk.request(&question(Duration::ZERO))).unwrap()
}

#[tokio::test]
async fn an_answer_that_is_due_is_given_at_once_though_nobody_takes_the_request_for_a_newer_one() {
    let cache = cached();
    let desk = desk(&cache, 10);
    let long_ago = Timestamp::from_millis(desk.now().as_millis() - 1_000_000);
    let _ = cache.hear(&key(&desk, &cache), answer(), long_ago);
    let answered = timeout(AT_ONCE, desk.ask(&question(AT_ONCE))).await.expect("it is here").unwrap();
    assert!(matches!(answered, Answered::Item(Given { via: Via::Cache, .. })), "{answered:?}");
}

#[tokio::test]
async fn who_asks_while_kafka_is_away_waits_no_longer_than_it_wants_to() {
    let cache = cached();
    let asked = question(Duration::from_millis(200));
    let answered = timeout(AT_ONCE, desk(&cache, 10).ask(&asked)).await.expect("the wait is over").unwrap();
    assert!(matches!(&answered, Answered::Late(Some(why)) if why.contains("Kafka")), "{answered:?}");
}

#[tokio::test]
async fn whoever_waits_for_the_same_item_counts_as_waiting_too() {
    let cache = cached();
    let desk = desk(&cache, 2);
    let asked = question(Duration::from_millis(500));
    let all = futures::future::join_all((0..5).map(|_| desk.ask(&asked))).await;
    let busy = all.iter().filter(|answered| matches!(answered, Err(AskError::Busy(2)))).count();
    assert_eq!(busy, 3, "{all:?}");
}

#[tokio::test]
async fn what_another_source_says_in_its_stead_is_given_as_that_ones_and_kept_by_nobody() {
    let cache = cached();
    let desk = desk(&cache, 10);
    let key = key(&desk, &cache);
    let at = desk.now();
    let seen = |source: &str| Observation {
        request_id: RequestId::new("r").unwrap(),
        source: name(source),
        instead_of: (source != "shop").then(|| name("shop")),
        item: ItemId::new("7").unwrap(),
        batch: None,
        status: Status::Found,
        via: Via::Call,
        calls: 1,
        account: None,
        requested_at: at,
        fetched_at: at,
        latency_ms: 1,
        fingerprint: "f".to_owned(),
        columns: answer().columns,
        raw: None,
    };
    let given = answered(seen("other"), &name("shop"), Some((&cache, &key)));
    assert_eq!((given.source.as_str(), given.ends), ("other", None));
    assert!(matches!(cache.near(&key, None), Seen::Miss), "it is no answer of the shop's");
    let given = answered(seen("shop"), &name("shop"), Some((&cache, &key)));
    assert_eq!(given.source.as_str(), "shop");
    assert!(matches!(cache.near(&key, None), Seen::Hit(_) | Seen::Due(_)));
}
