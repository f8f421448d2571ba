//! changes against a scripted log and a memory that can fail.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    kafka::{
        Assignment, Committed, Epoch, Event, Instead, Partition,
        scripted::{Log, assigned, partition, records},
    },
    message::{Change, Columns, DeadLetter, Observation, RequestId, Status, Via},
    runtime::clock::{Clock, Dice, Timestamp},
};

/// A memory that fails the next so many times.
#[derive(Clone, Default)]
struct Forgetful(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    known: HashMap<Key, Watched>,
    recalls_failing: u32,
    remembers_failing: u32,
    /// It takes a minute to say anything, as a ClickHouse that hangs until its time-out.
    hangs: bool,
}

impl Forgetful {
    async fn answer(&self) -> Result<(), &'static str> {
        if self.0.lock().unwrap().hangs {
            tokio::time::sleep(std::time::Duration::from_secs(60)).await;
            return Err("timed out");
        }
        Ok(())
    }
}

impl Memory for Forgetful {
    type Error = &'static str;

    async fn recall(&self, items: &[Key]) -> Result<HashMap<Key, Watched>, Self::Error> {
        self.answer().await?;
        let mut inner = self.0.lock().unwrap();
        if inner.recalls_failing > 0 {
            inner.recalls_failing -= 1;
            return Err("away");
        }
        Ok(items.iter().filter_map(|key| Some((key.clone(), inner.known.get(key)?.clone()))).collect())
    }

    async fn remember(&self, items: &HashMap<Key, Watched>) -> Result<(), Self::Error> {
        self.answer().await?;
        let mut inner = self.0.lock().unwrap();
        if inner.remembers_failing > 0 {
            inner.remembers_failing -= 1;
            return Err("away");
        }
        inner.known.extend(items.clone());
        Ok(())
    }
}

fn result(at: i64, item: &str, price: &str) -> Bytes {
    let columns = Columns { price: Some(price.to_owned()), ..Columns::default() };
    let observation = Observation {
        request_id: RequestId::new(format!("r{at}")).unwrap(),
        source: SourceName::new("s").unwrap(),
        instead_of: None,
        item: ItemId::new(item).unwrap(),
        batch: None,
        status: Status::Found,
        via: Via::Call,
        calls: 1,
        account: None,
        requested_at: Timestamp::from_millis(at),
        fetched_at: Timestamp::from_millis(at),
        latency_ms: 1,
        fingerprint: columns.fingerprint(Status::Found),
        columns,
        raw: None,
    };
    serde_json::to_vec(&observation).unwrap().into()
}

/// Runs the stage over these events until all of them are dealt with, then stops it.
async fn run(log: &Log, memory: &Forgetful, script: Vec<Event>) {
    let (events, reader) = log.reader();
    let parts = ChangesParts {
        reader,
        writer: log.clone(),
        memory: memory.clone(),
        topic: "weir.changes".into(),
        instead: Instead::new("weir.dead", WRITER),
        config: Config::default(),
        clock: Clock::System,
        dice: Dice::seeded(1),
    };
    let stop = CancellationToken::new();
    for event in script {
        events.send(event).unwrap();
    }
    let (ended, ()) = tokio::join!(Changes::new(parts).run(stop.clone()), async {
        tokio::time::sleep(std::time::Duration::from_secs(30)).await;
        stop.cancel();
    });
    ended.unwrap();
}

fn again_from(committed: Committed) -> Event {
    Event::Assigned(vec![Assignment { partition: partition(), epoch: Epoch(1), committed: Some(committed), log: None }])
}

/// Old and new of all changes that are visible.
fn visible(log: &Log) -> Vec<(String, String)> {
    let read = |record: &crate::kafka::Outgoing| {
        let change: Change = serde_json::from_slice(&record.value).unwrap();
        (change.old.unwrap(), change.new.unwrap())
    };
    log.world().records.iter().map(read).collect()
}

fn change(old: &str, new: &str) -> (String, String) {
    (old.to_owned(), new.to_owned())
}

#[tokio::test(start_paused = true)]
async fn each_result_is_compared_with_the_one_before_within_a_round_and_over_rounds() {
    let (log, memory) = (Log::default(), Forgetful::default());
    let first = records(0, [result(1, "1", "10"), result(2, "2", "5"), result(3, "1", "9")]);
    run(&log, &memory, vec![assigned(), first]).await;
    assert_eq!(visible(&log), [change("10", "9")]);
    let committed = log.world().committed[&partition()].clone();
    assert_eq!((committed.offset, committed.metadata.as_str()), (3, "C1:3"));

    run(&log, &memory, vec![again_from(committed), records(3, [result(4, "2", "5.0"), result(5, "1", "8")])]).await;
    assert_eq!(visible(&log), [change("10", "9"), change("9", "8")]);
}

#[tokio::test(start_paused = true)]
async fn a_memory_that_is_away_delays_changes_but_neither_loses_nor_doubles_them() {
    let (log, memory) = (Log::default(), Forgetful::default());
    memory.0.lock().unwrap().recalls_failing = 3;
    memory.0.lock().unwrap().remembers_failing = 3;
    let row = ["10", "9", "8"].into_iter().zip(1..).map(|(price, at)| result(at, "1", price));
    run(&log, &memory, vec![assigned(), records(0, row)]).await;
    assert_eq!(visible(&log), [change("10", "9"), change("9", "8")]);
    assert_eq!(memory.0.lock().unwrap().known.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn killed_between_publishing_and_remembering_it_only_remembers_the_second_time() {
    let (log, memory) = (Log::default(), Forgetful::default());
    memory.0.lock().unwrap().remembers_failing = u32::MAX;
    let row = || records(0, [result(1, "1", "10"), result(2, "1", "9")]);
    run(&log, &memory, vec![assigned(), row()]).await;
    let committed = log.world().committed[&partition()].clone();
    assert_eq!((committed.offset, committed.metadata.as_str()), (0, "C1:2"), "the round will be read again");
    assert_eq!(visible(&log), [change("10", "9")]);

    memory.0.lock().unwrap().remembers_failing = 0;
    run(&log, &memory, vec![again_from(committed), row(), records(2, [result(3, "1", "8")])]).await;
    assert_eq!(visible(&log), [change("10", "9"), change("9", "8")]);
}

#[tokio::test(start_paused = true)]
async fn a_change_that_its_topic_does_not_take_ends_alone_as_a_dead_letter() {
    let (log, memory) = (Log::default(), Forgetful::default());
    log.world().record_limit = Some(20_000);
    let large = "9".repeat(30_000);
    let row = ["10", "9", &large, "8"].into_iter().zip(1..).map(|(price, at)| result(at, "1", price));
    run(&log, &memory, vec![assigned(), records(0, row)]).await;
    let written = std::mem::take(&mut log.world().records);
    let (dead, changes): (Vec<_>, Vec<_>) = written.into_iter().partition(|record| *record.topic == *"weir.dead");
    // To the long one and back.
    assert_eq!((changes.len(), dead.len()), (1, 2));
    let dead: DeadLetter = serde_json::from_slice(&dead[0].value).unwrap();
    assert!(dead.message.contains("at most 20000") && dead.message.contains("of item 1"), "{}", dead.message);
    assert_eq!(log.world().committed[&partition()].offset, 4);
}

/// Runs the stage over these events while nothing can be remembered; which partitions are stopped then.
async fn stopped(script: Vec<Event>) -> Vec<Partition> {
    let (log, memory) = (Log::default(), Forgetful::default());
    memory.0.lock().unwrap().recalls_failing = u32::MAX;
    let (events, reader) = log.reader();
    let parts = ChangesParts {
        reader,
        writer: log.clone(),
        memory,
        topic: "weir.changes".into(),
        instead: Instead::new("weir.dead", WRITER),
        config: Config { rows: 1_000, ..Config::default() },
        clock: Clock::System,
        dice: Dice::seeded(1),
    };
    let stop = CancellationToken::new();
    for event in script {
        events.send(event).unwrap();
    }
    let (ended, paused) = tokio::join!(Changes::new(parts).run(stop.clone()), async {
        tokio::time::sleep(std::time::Duration::from_secs(3)).await;
        let mut paused = log.world().paused.clone();
        paused.sort();
        stop.cancel();
        paused
    });
    ended.unwrap();
    paused
}

#[tokio::test(start_paused = true)]
async fn a_partition_that_comes_while_all_is_full_is_stopped_too() {
    let second = Partition { topic: "t".into(), number: 1 };
    let joined =
        Event::Assigned(vec![Assignment { partition: second.clone(), epoch: Epoch(2), committed: None, log: None }]);
    let row = || records(0, (0..2_000).map(|at| result(at, "1", "5")));
    assert_eq!(stopped(vec![assigned(), row(), joined]).await, [partition(), second]);
    // One that has left and comes back flows, and is stopped again.
    let left = Event::Lost(vec![partition()]);
    let again = stopped(vec![assigned(), row(), left, assigned(), row()]).await;
    assert_eq!(again, [partition(), partition()]);
}

#[tokio::test(start_paused = true)]
async fn a_round_is_full_by_its_bytes_too() {
    let long = "9".repeat(1_000_000);
    let row = |count: i64| records(0, (0..count).map(|at| result(at, "1", &long)));
    assert_eq!(stopped(vec![assigned(), row(70)]).await, [partition()]);
    assert_eq!(stopped(vec![assigned(), row(60)]).await, []);
}

#[tokio::test(start_paused = true)]
async fn a_stop_does_not_wait_for_a_memory_that_hangs_and_nothing_is_published_twice() {
    let (log, memory) = (Log::default(), Forgetful::default());
    let (events, reader) = log.reader();
    memory.0.lock().unwrap().hangs = true;
    let parts = ChangesParts {
        reader,
        writer: log.clone(),
        memory: memory.clone(),
        topic: "weir.changes".into(),
        instead: Instead::new("weir.dead", WRITER),
        config: Config::default(),
        clock: Clock::System,
        dice: Dice::seeded(1),
    };
    let stop = CancellationToken::new();
    events.send(assigned()).unwrap();
    let row = || records(0, [result(1, "1", "10"), result(2, "1", "9")]);
    events.send(row()).unwrap();
    let (ended, stopped_at) = tokio::join!(Changes::new(parts).run(stop.clone()), async {
        // In the middle of the first round.
        tokio::time::sleep(std::time::Duration::from_secs(5)).await;
        stop.cancel();
        tokio::time::Instant::now()
    });
    ended.unwrap();
    assert!(stopped_at.elapsed().as_secs() <= 20, "{:?}", stopped_at.elapsed());

    memory.0.lock().unwrap().hangs = false;
    run(&log, &memory, vec![assigned(), row()]).await;
    assert_eq!(visible(&log), [change("10", "9")]);
}

#[tokio::test(start_paused = true)]
async fn what_is_no_result_is_passed_over() {
    let (log, memory) = (Log::default(), Forgetful::default());
    let row = [result(1, "1", "10"), Bytes::from_static(b"?"), result(3, "1", "9")];
    run(&log, &memory, vec![assigned(), records(0, row)]).await;
    assert_eq!(visible(&log), [change("10", "9")]);
}

#[tokio::test(start_paused = true)]
async fn the_commit_of_another_kind_is_refused() {
    let (log, memory) = (Log::default(), Forgetful::default());
    let (events, reader) = log.reader();
    events.send(again_from(Committed { offset: 5, metadata: "L1:AAAA".to_owned() })).unwrap();
    let parts = ChangesParts {
        reader,
        writer: log.clone(),
        memory,
        topic: "t".into(),
        instead: Instead::new("weir.dead", WRITER),
        config: Config::default(),
        clock: Clock::System,
        dice: Dice::seeded(1),
    };
    let error = Changes::new(parts).run(CancellationToken::new()).await.unwrap_err();
    assert!(error.to_string().contains("\"L1:AAAA\""), "{error}");
}
