//! The sink against a scripted reader and a store that can be away, in virtual time.

mod load;
mod trouble;

use std::{
    collections::HashSet,
    sync::{Mutex, MutexGuard},
};

use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

use super::*;
use crate::{
    kafka::scripted::Log,
    message::{SourceName, envelope::Kind},
    runtime::{clock::Timestamp, health::Health},
    sink::Config,
    store::{Trouble, TroubleKind},
    topics::Topic,
};

/// What ClickHouse has, and how it treats the sink.
#[derive(Default)]
struct Tables {
    stored: Vec<(String, usize)>,
    attempts: usize,
    counts: usize,
    at_once: usize,
    at_once_max: usize,
    away: bool,
    /// Says this code instead of taking a block of more rows than that.
    refuse: Option<(u32, usize)>,
    /// What a count finds, if it is not what was stored.
    found: Option<u64>,
    insert_takes: Duration,
}

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Tables>>);

impl Fake {
    fn get(&self) -> MutexGuard<'_, Tables> {
        self.0.lock().unwrap()
    }

    fn refusal(&self, rows: usize) -> Option<Trouble> {
        let tables = self.get();
        let code = tables.refuse.filter(|(_, most)| rows > *most).map(|(code, _)| code);
        let trouble = |kind, code| Trouble { kind, code, message: "no".to_owned(), view: None };
        if tables.away {
            Some(trouble(TroubleKind::Away, None))
        } else {
            code.map(|code| trouble(TroubleKind::Unable, Some(code)))
        }
    }
}

impl Insert for Fake {
    async fn insert(&self, sealed: &Sealed, token: &str) -> Result<(), Trouble> {
        let takes = {
            let mut tables = self.get();
            tables.attempts += 1;
            tables.at_once += 1;
            tables.at_once_max = tables.at_once_max.max(tables.at_once);
            tables.insert_takes
        };
        tokio::time::sleep(takes).await;
        self.get().at_once -= 1;
        if let Some(trouble) = self.refusal(sealed.rows.len()) {
            return Err(trouble);
        }
        // What is there of the token already is recognised; the rest is stored.
        let mut tables = self.get();
        tables.stored.retain(|(stored, _)| stored != token);
        tables.stored.push((token.to_owned(), sealed.rows.len()));
        Ok(())
    }

    async fn count(&self, sealed: &Sealed) -> Result<u64, Trouble> {
        if let Some(trouble) = self.refusal(0) {
            return Err(trouble);
        }
        let mut tables = self.get();
        tables.counts += 1;
        let prefix = sealed.intent.token(&sealed.partition, 1);
        let stored: usize =
            tables.stored.iter().filter(|(token, _)| token.starts_with(&prefix)).map(|(_, rows)| rows).sum();
        Ok(tables.found.unwrap_or(stored as u64))
    }

    async fn refill(&self, _: &Sealed, _: Option<&Trouble>) -> Result<(), Trouble> {
        Ok(())
    }

    async fn reaches(&self, _: Kind, _: &Partition) -> Result<i64, Trouble> {
        self.refusal(0).map_or(Ok(0), Err)
    }

    async fn stored(&self, _: Kind, _: &Block) -> Result<HashSet<i64>, Trouble> {
        Ok(HashSet::new())
    }
}

/// A running sink.
struct Sink {
    events: mpsc::UnboundedSender<Event>,
    log: Log,
    tables: Fake,
    health: Health,
    stop: CancellationToken,
    task: JoinHandle<Result<(), SinkError>>,
}

fn start(config: Config) -> Sink {
    let (log, tables, health) = (Log::default(), Fake::default(), Health::default());
    let (events, reader) = log.reader();
    let topic = |name: &str, kind| Topic {
        name: name.to_owned(),
        kind,
        source: Some(SourceName::new("s").unwrap()),
        partitions: 8,
        keep: Duration::ZERO,
        delay: None,
    };
    let parts = Parts {
        reader,
        writer: log.clone(),
        store: tables.clone(),
        topics: vec![topic("t", Kind::Request), topic("r", Kind::Result), topic("d", Kind::DeadLetter)],
        dead_topic: "d".into(),
        clock: Clock::simulated(Timestamp::from_millis(0)),
        health: health.role("sink"),
    };
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    #[allow(clippy::disallowed_methods, reason = "the handle is kept")]
    let task = tokio::spawn(async move { crate::sink::run(parts, config, stopped).await });
    Sink { events, log, tables, health, stop, task }
}

fn record(offset: i64, value: &[u8]) -> Record {
    Record {
        log: None,
        offset,
        time: Timestamp::default(),
        key: None,
        value: Some(bytes::Bytes::copy_from_slice(value)),
        headers: Vec::new(),
    }
}

impl Sink {
    fn send(&self, event: Event) {
        self.events.send(event).unwrap();
    }

    fn assign(&self, number: i32, epoch: u64) {
        self.assign_at(partition(number), epoch, None);
    }

    fn assign_at(&self, partition: Partition, epoch: u64, committed: Option<(i64, &str)>) {
        let committed = committed.map(|(offset, metadata)| Committed { offset, metadata: metadata.to_owned() });
        self.send(Event::Assigned(vec![Assignment { partition, epoch: Epoch(epoch), committed, log: None }]));
    }

    fn records(&self, number: i32, epoch: u64, offsets: std::ops::Range<i64>) {
        let records = offsets.map(|offset| record(offset, &[b'1'; 200])).collect();
        self.send(Event::Records { partition: partition(number), epoch: Epoch(epoch), records });
    }

    /// Asks for partition `number` back; the answer arrives when the sink lets it go.
    fn revoke(&self, number: i32) -> oneshot::Receiver<()> {
        let (answer, released) = oneshot::channel();
        self.send(Event::Revoked(vec![partition(number)], Handover(Some(answer))));
        released
    }

    async fn stop(self) -> (Log, Fake) {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
        (self.log, self.tables)
    }

    fn stored(&self) -> Vec<String> {
        self.tables.get().stored.iter().map(|(token, _)| token.clone()).collect()
    }

    fn attempts(&self) -> usize {
        self.tables.get().attempts
    }

    fn commits(&self) -> Vec<(i32, u64, i64, String)> {
        commits(&self.log)
    }

    fn condition(&self) -> String {
        self.health.report().roles["sink"].reason.clone().unwrap_or_default()
    }
}

fn commits(log: &Log) -> Vec<(i32, u64, i64, String)> {
    let world = log.world();
    let commit = |(partition, epoch, to): &(Partition, Epoch, Committed)| {
        (partition.number, epoch.0, to.offset, to.metadata.clone())
    };
    world.commits.iter().map(commit).collect()
}

fn commit(number: i32, epoch: u64, offset: i64, metadata: &str) -> (i32, u64, i64, String) {
    (number, epoch, offset, metadata.to_owned())
}

fn partition(number: i32) -> Partition {
    Partition { topic: "t".into(), number }
}

fn rows(rows: usize) -> Config {
    Config { rows, ..Config::default() }
}

async fn wait(millis: u64) {
    tokio::time::sleep(Duration::from_millis(millis)).await;
}

#[tokio::test(start_paused = true)]
async fn the_rows_of_a_topic_made_anew_are_named_by_its_log() {
    let sink = start(rows(10));
    let log: Option<Arc<str>> = Some("t@0011aabb".into());
    let assignment = Assignment { partition: partition(0), epoch: Epoch(1), committed: None, log: log.clone() };
    sink.send(Event::Assigned(vec![assignment]));
    let records = (0..10).map(|offset| Record { log: log.clone(), ..record(offset, &[b'1'; 200]) }).collect();
    sink.send(Event::Records { partition: partition(0), epoch: Epoch(1), records });
    wait(1).await;
    assert_eq!(sink.stored(), ["t@0011aabb:0:0-9"]);
    assert_eq!(sink.commits().last(), Some(&commit(0, 1, 10, "B1:")));
}

#[tokio::test(start_paused = true)]
async fn a_full_block_is_announced_and_stored_at_once_and_the_rest_when_it_is_old() {
    let sink = start(rows(10));
    sink.assign(0, 1);
    sink.records(0, 1, 100..110);
    wait(1).await;
    sink.records(0, 1, 110..115);
    wait(1).await;
    assert_eq!(sink.stored(), ["t:0:100-109"]);
    assert_eq!(sink.commits(), [commit(0, 1, 100, "B1:100-110/10"), commit(0, 1, 110, "B1:")]);
    wait(1_000).await;
    assert_eq!(sink.stored(), ["t:0:100-109", "t:0:110-114"]);
    assert_eq!(sink.commits()[2..], [commit(0, 1, 110, "B1:110-115/5"), commit(0, 1, 115, "B1:")]);
    assert_eq!(sink.tables.get().counts, 0, "nothing was in doubt");
}

#[tokio::test(start_paused = true)]
async fn no_insert_begins_before_its_intent_is_acknowledged() {
    let sink = start(rows(1));
    sink.log.world().refuses_commits = true;
    sink.assign(0, 1);
    sink.records(0, 1, 0..1);
    wait(60_000).await;
    assert_eq!(sink.attempts(), 0);
    sink.log.world().refuses_commits = false;
    wait(1_100).await;
    assert_eq!((sink.attempts(), sink.stored().len()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn while_the_store_is_away_nothing_advances_and_memory_is_bounded_and_then_all_of_it_is_stored() {
    let sink = start(Config { rows: 10, bytes: bytesize::ByteSize::kb(20), ..Config::default() });
    sink.tables.get().away = true;
    sink.assign(0, 1);
    let mut read = 0;
    for _ in 0..1_000 {
        if !sink.log.world().paused.is_empty() {
            break;
        }
        sink.records(0, 1, read..read + 5);
        read += 5;
        wait(10).await;
    }
    assert!((50..120).contains(&read), "paused after {read} records of 0.5 kB, with blocks of 20 kB");
    wait(120_000).await;
    assert!(sink.commits().iter().all(|(_, _, offset, _)| *offset == 0) && sink.stored().is_empty());
    assert!(sink.condition().contains("unreachable"), "{}", sink.condition());
    sink.tables.get().away = false;
    wait(31_000).await;
    assert_eq!(sink.tables.get().stored.iter().map(|(_, rows)| *rows).sum::<usize>(), usize::try_from(read).unwrap());
    assert_eq!(sink.commits().last(), Some(&commit(0, 1, read, "B1:")));
    assert!(sink.log.world().paused.is_empty(), "reading goes on");
    assert_eq!(sink.condition(), "");
}

#[tokio::test(start_paused = true)]
async fn a_revoked_partition_is_let_go_when_its_insert_is_stored_and_committed() {
    let sink = start(rows(10));
    sink.tables.get().insert_takes = Duration::from_secs(2);
    sink.assign(0, 1);
    sink.records(0, 1, 0..10);
    wait(100).await;
    sink.records(0, 1, 10..15);
    let mut released = sink.revoke(0);
    wait(1_000).await;
    assert!(released.try_recv().is_err(), "the insert is still in flight");
    wait(1_000).await;
    assert!(released.try_recv().is_ok());
    wait(5_000).await;
    assert_eq!(sink.stored(), ["t:0:0-9"], "and no more");
    assert_eq!(sink.commits().last(), Some(&commit(0, 1, 10, "B1:")));
}

#[tokio::test(start_paused = true)]
async fn an_idle_partition_is_let_go_at_once() {
    let sink = start(rows(10));
    sink.assign(0, 1);
    sink.records(0, 1, 0..3);
    let mut released = sink.revoke(0);
    wait(1).await;
    assert!(released.try_recv().is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_partition_is_let_go_with_its_intent_although_the_store_is_away() {
    let sink = start(rows(1));
    sink.tables.get().away = true;
    sink.assign_at(partition(0), 1, Some((0, "B1:")));
    sink.records(0, 1, 0..1);
    wait(5_000).await;
    let mut released = sink.revoke(0);
    wait(1).await;
    assert!(released.try_recv().is_ok());
    assert_eq!(sink.commits().last(), Some(&commit(0, 1, 0, "B1:0-1/1")), "its new owner has to count");
}

#[tokio::test(start_paused = true)]
async fn nothing_of_a_lost_partition_is_committed() {
    let sink = start(rows(1));
    sink.tables.get().insert_takes = Duration::from_secs(1);
    sink.assign(0, 1);
    sink.records(0, 1, 0..1);
    wait(10).await;
    sink.send(Event::Lost(vec![partition(0)]));
    wait(5_000).await;
    assert_eq!((sink.attempts(), sink.commits().len()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_partition_that_has_gone_unnoticed_begins_no_insert() {
    let sink = start(rows(1));
    sink.assign(0, 1);
    sink.log.world().epochs.insert(partition(0), Epoch(2));
    sink.records(0, 1, 0..1);
    wait(60_000).await;
    assert_eq!((sink.attempts(), sink.commits().len()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_partition_that_comes_back_waits_for_its_old_insert_and_starts_under_its_new_epoch() {
    let sink = start(rows(1));
    sink.tables.get().insert_takes = Duration::from_secs(1);
    sink.assign(0, 1);
    sink.records(0, 1, 0..1);
    wait(10).await;
    sink.send(Event::Lost(vec![partition(0)]));
    sink.assign_at(partition(0), 2, Some((0, "B1:0-1/1")));
    sink.records(0, 1, 1..2); // on its way since before: of nobody's epoch
    sink.records(0, 2, 0..2);
    wait(500).await;
    assert_eq!(sink.attempts(), 1);
    wait(5_000).await;
    assert_eq!(sink.stored(), ["t:0:0-0", "t:0:1-1"], "the first was counted and found");
    assert_eq!(sink.commits().last(), Some(&commit(0, 2, 2, "B1:")));
}

#[tokio::test(start_paused = true)]
async fn progress_whose_commit_is_refused_is_committed_later_without_storing_again() {
    let sink = start(rows(1));
    sink.tables.get().insert_takes = Duration::from_secs(1);
    sink.assign(0, 1);
    sink.records(0, 1, 0..1);
    wait(500).await;
    sink.log.world().refuses_commits = true;
    wait(2_500).await;
    sink.log.world().refuses_commits = false;
    wait(1_000).await;
    assert_eq!((sink.commits().last(), sink.attempts()), (Some(&commit(0, 1, 1, "B1:")), 1));
}

#[tokio::test(start_paused = true)]
async fn a_stop_stores_and_commits_what_was_read() {
    let sink = start(rows(10));
    sink.assign(0, 1);
    sink.assign(1, 1);
    sink.records(0, 1, 0..25);
    sink.records(1, 1, 7..8);
    wait(1).await;
    let (log, _) = sink.stop().await;
    for (number, done) in [(0, 25), (1, 8)] {
        assert_eq!(log.world().committed[&partition(number)], Committed { offset: done, metadata: "B1:".to_owned() });
    }
}

#[tokio::test(start_paused = true)]
async fn a_stop_does_not_wait_for_a_store_that_is_away() {
    let sink = start(rows(1));
    sink.tables.get().away = true;
    sink.assign_at(partition(0), 1, Some((0, "B1:")));
    sink.records(0, 1, 0..5);
    wait(10_000).await;
    let before = Instant::now();
    let (log, _) = sink.stop().await;
    assert!(before.elapsed() <= STOP_WITHIN);
    assert_eq!(log.world().committed[&partition(0)].offset, 0);
}

#[tokio::test(start_paused = true)]
async fn a_stop_does_not_wait_for_a_long_insert_whose_intent_stays() {
    let sink = start(rows(1));
    sink.tables.get().insert_takes = Duration::from_secs(50);
    sink.assign(0, 1);
    sink.records(0, 1, 0..1);
    wait(100).await;
    let before = Instant::now();
    let (log, _) = sink.stop().await;
    assert!(before.elapsed() <= STOP_WITHIN + Duration::from_millis(10));
    assert_eq!(log.world().committed[&partition(0)], Committed { offset: 0, metadata: "B1:0-1/1".to_owned() });
}

#[tokio::test(start_paused = true)]
async fn a_topic_that_nobody_told_of_ends_the_sink() {
    let sink = start(rows(1));
    sink.assign_at(Partition { topic: "other".into(), number: 0 }, 1, None);
    let error = sink.task.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("\"other\""), "{error}");
}
