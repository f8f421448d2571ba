//! The sink against a scripted reader and a store that can be away, in virtual time.

use std::sync::{Mutex, MutexGuard};

use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

use super::*;
use crate::{
    kafka::{Membership, Offsets, ReadError, WriteError},
    message::{SourceName, envelope::Kind},
    runtime::clock::Timestamp,
    sink::{Config, connection::Trouble, connection::TroubleKind},
    topics::Topic,
};

/// What the sink has done, and how the world treats it.
#[derive(Default)]
struct World {
    commits: Vec<(Partition, Epoch, i64)>,
    paused: Vec<Partition>,
    stored: Vec<(String, usize)>,
    attempts: usize,
    at_once: usize,
    at_once_max: usize,
    away: bool,
    refuse_commits: bool,
    insert_takes: Duration,
}

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<World>>);

impl Shared {
    fn get(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap()
    }
}

struct Scripted {
    events: mpsc::Receiver<Event>,
    world: Shared,
}

impl Reader for Scripted {
    async fn next(&mut self) -> Result<Event, ReadError> {
        match self.events.recv().await {
            Some(event) => Ok(event),
            None => std::future::pending().await,
        }
    }
    fn pause(&self, partition: &Partition) {
        self.world.get().paused.push(partition.clone());
    }
    fn resume(&self, partition: &Partition) {
        self.world.get().paused.retain(|paused| paused != partition);
    }
    fn membership(&self) -> Membership {
        unreachable!("the sink has no transactions")
    }
    async fn commit(&self, offsets: Offsets) -> Result<(), WriteError> {
        let mut world = self.world.get();
        if world.refuse_commits {
            return Err(WriteError::Commit { group: "g".to_owned(), reason: "rebalance".to_owned() });
        }
        world.commits.extend(offsets.into_iter().map(|(partition, epoch, to)| (partition, epoch, to.offset)));
        Ok(())
    }
}

#[derive(Clone)]
struct Fake(Shared);

impl Insert for Fake {
    async fn insert(&self, block: &Block, _: &Route) -> Result<Tally, Trouble> {
        let takes = {
            let mut world = self.0.get();
            world.attempts += 1;
            world.at_once += 1;
            world.at_once_max = world.at_once_max.max(world.at_once);
            world.insert_takes
        };
        tokio::time::sleep(takes).await;
        let mut world = self.0.get();
        world.at_once -= 1;
        if world.away {
            return Err(Trouble { kind: TroubleKind::Away, code: None, message: "gone".to_owned() });
        }
        world.stored.push((block.token(), block.records.len()));
        Ok(Tally { rows: block.records.len(), ..Tally::default() })
    }
}

/// A running sink.
struct Sink {
    events: mpsc::Sender<Event>,
    world: Shared,
    stop: CancellationToken,
    task: JoinHandle<Result<(), SinkError>>,
}

fn start(config: Config) -> Sink {
    let world = Shared::default();
    let (events, received) = mpsc::channel(100);
    let topics = vec![Topic {
        name: "t".to_owned(),
        kind: Kind::Request,
        source: Some(SourceName::new("s").unwrap()),
        partitions: 8,
        keep: Duration::ZERO,
        delay: None,
    }];
    let (reader, store) = (Scripted { events: received, world: world.clone() }, Fake(world.clone()));
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    #[allow(clippy::disallowed_methods, reason = "the handle is kept")]
    let task = tokio::spawn(async move { crate::sink::run(reader, store, &topics, config, stopped).await });
    Sink { events, world, stop, task }
}

impl Sink {
    async fn send(&self, event: Event) {
        self.events.send(event).await.unwrap();
    }

    async fn assign(&self, number: i32, epoch: u64) {
        let assignment = Assignment { partition: partition(number), epoch: Epoch(epoch), committed: None };
        self.send(Event::Assigned(vec![assignment])).await;
    }

    async fn records(&self, number: i32, epoch: u64, offsets: std::ops::Range<i64>) {
        let record = |offset| Record {
            offset,
            time: Timestamp::default(),
            key: None,
            value: Some(vec![b'1'; 1_000].into()),
            headers: Vec::new(),
        };
        let records = offsets.map(record).collect();
        self.send(Event::Records { partition: partition(number), epoch: Epoch(epoch), records }).await;
    }

    /// Asks for partition `number` back; the answer arrives when the sink lets it go.
    async fn revoke(&self, number: i32) -> oneshot::Receiver<()> {
        let (answer, released) = oneshot::channel();
        self.send(Event::Revoked(vec![partition(number)], Handover(Some(answer)))).await;
        released
    }

    async fn stop(self) -> Shared {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
        self.world
    }

    fn stored(&self) -> Vec<String> {
        self.world.get().stored.iter().map(|(token, _)| token.clone()).collect()
    }

    fn attempts(&self) -> usize {
        self.world.get().attempts
    }

    fn committed(&self) -> Vec<(i32, u64, i64)> {
        commits(&self.world)
    }
}

fn commits(world: &Shared) -> Vec<(i32, u64, i64)> {
    world.get().commits.iter().map(|(partition, epoch, offset)| (partition.number, epoch.0, *offset)).collect()
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
async fn a_full_block_is_stored_at_once_and_the_rest_when_it_is_old() {
    let sink = start(rows(10));
    sink.assign(0, 1).await;
    sink.records(0, 1, 100..115).await;
    wait(1).await;
    assert_eq!((sink.stored(), sink.committed()), (vec!["t:0:100-109".to_owned()], vec![(0, 1, 110)]));
    wait(1_000).await;
    assert_eq!(sink.stored(), ["t:0:100-109", "t:0:110-114"]);
    assert_eq!(sink.committed(), [(0, 1, 110), (0, 1, 115)]);
}

#[tokio::test(start_paused = true)]
async fn one_insert_per_partition_and_four_in_all() {
    let sink = start(rows(1));
    sink.world.get().insert_takes = Duration::from_secs(1);
    for number in 0..6 {
        sink.assign(number, 1).await;
        sink.records(number, 1, 0..3).await;
    }
    wait(500).await;
    assert_eq!(sink.world.get().at_once, 4);
    assert_eq!(sink.attempts(), 4);
    wait(10_000).await;
    assert_eq!(sink.world.get().at_once_max, 4);
    for number in 0..6 {
        let mine: Vec<_> = sink.committed().into_iter().filter(|(n, ..)| *n == number).map(|(.., to)| to).collect();
        assert_eq!(mine, [1, 2, 3], "partition {number}");
    }
}

#[tokio::test(start_paused = true)]
async fn while_the_store_is_away_nothing_is_committed_and_memory_is_bounded_and_then_all_of_it_is_stored() {
    let sink = start(Config { rows: 10, bytes: bytesize::ByteSize::kb(20), ..Config::default() });
    sink.world.get().away = true;
    sink.assign(0, 1).await;
    let mut read = 0;
    for _ in 0..100 {
        if !sink.world.get().paused.is_empty() {
            break;
        }
        sink.records(0, 1, read..read + 5).await;
        read += 5;
        wait(10).await;
    }
    assert!((25..60).contains(&read), "paused after {read} records of 1 kB, with blocks of 20 kB");
    wait(120_000).await;
    assert_eq!((sink.committed(), sink.stored()), (vec![], vec![]));
    sink.world.get().away = false;
    wait(31_000).await;
    assert_eq!(sink.world.get().stored.iter().map(|(_, rows)| *rows).sum::<usize>(), usize::try_from(read).unwrap());
    assert_eq!(sink.committed().last(), Some(&(0, 1, read)));
    assert!(sink.world.get().paused.is_empty(), "reading goes on");
}

#[tokio::test(start_paused = true)]
async fn many_partitions_together_stay_within_the_memory() {
    let sink = start(Config { memory: bytesize::ByteSize::kb(100), ..Config::default() });
    sink.world.get().away = true;
    for number in 0..5 {
        sink.assign(number, 1).await;
    }
    let (mut sent, mut round) = (0, 0);
    while sink.world.get().paused.len() < 5 && round < 100 {
        for number in 0..5 {
            if !sink.world.get().paused.contains(&partition(number)) {
                sink.records(number, 1, round..round + 1).await;
                sent += 1;
            }
        }
        round += 1;
        wait(1).await;
    }
    assert!((60..90).contains(&sent), "{sent} records of 1.3 kB for 100 kB");
}

#[tokio::test(start_paused = true)]
async fn a_revoked_partition_is_let_go_when_its_insert_is_stored_and_committed() {
    let sink = start(rows(10));
    sink.world.get().insert_takes = Duration::from_secs(2);
    sink.assign(0, 1).await;
    sink.records(0, 1, 0..15).await;
    wait(100).await;
    let mut released = sink.revoke(0).await;
    wait(1_000).await;
    assert!(released.try_recv().is_err(), "the insert is still in flight");
    wait(1_000).await;
    assert!(released.try_recv().is_ok());
    wait(5_000).await;
    assert_eq!((sink.stored(), sink.committed()), (vec!["t:0:0-9".to_owned()], vec![(0, 1, 10)]), "and no more");
}

#[tokio::test(start_paused = true)]
async fn an_idle_partition_is_let_go_at_once() {
    let sink = start(rows(10));
    sink.assign(0, 1).await;
    sink.records(0, 1, 0..3).await;
    let mut released = sink.revoke(0).await;
    wait(1).await;
    assert!(released.try_recv().is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_partition_is_let_go_although_the_store_is_away() {
    let sink = start(rows(1));
    sink.world.get().away = true;
    sink.assign(0, 1).await;
    sink.records(0, 1, 0..1).await;
    wait(5_000).await;
    let mut released = sink.revoke(0).await;
    wait(1).await;
    assert!(released.try_recv().is_ok());
    assert!(sink.committed().is_empty());
}

#[tokio::test(start_paused = true)]
async fn nothing_of_a_lost_partition_is_committed() {
    let sink = start(rows(1));
    sink.world.get().insert_takes = Duration::from_secs(1);
    sink.assign(0, 1).await;
    sink.records(0, 1, 0..3).await;
    wait(10).await;
    sink.send(Event::Lost(vec![partition(0)])).await;
    wait(5_000).await;
    assert_eq!((sink.attempts(), sink.committed()), (1, vec![]));
}

#[tokio::test(start_paused = true)]
async fn a_partition_that_comes_back_waits_for_its_old_insert_and_starts_under_its_new_epoch() {
    let sink = start(rows(1));
    sink.world.get().insert_takes = Duration::from_secs(1);
    sink.assign(0, 1).await;
    sink.records(0, 1, 0..1).await;
    wait(10).await;
    sink.send(Event::Lost(vec![partition(0)])).await;
    sink.assign(0, 2).await;
    sink.records(0, 1, 1..2).await; // on its way since before: of nobody's epoch
    sink.records(0, 2, 0..2).await;
    wait(500).await;
    assert_eq!(sink.attempts(), 1);
    wait(5_000).await;
    assert_eq!(sink.committed(), [(0, 2, 1), (0, 2, 2)]);
}

#[tokio::test(start_paused = true)]
async fn a_refused_commit_is_tried_again() {
    let sink = start(rows(1));
    sink.world.get().refuse_commits = true;
    sink.assign(0, 1).await;
    sink.records(0, 1, 0..1).await;
    wait(2_500).await;
    sink.world.get().refuse_commits = false;
    wait(1_000).await;
    assert_eq!((sink.committed(), sink.attempts()), (vec![(0, 1, 1)], 1), "committed without storing again");
}

#[tokio::test(start_paused = true)]
async fn a_stop_stores_and_commits_what_was_read() {
    let sink = start(rows(10));
    sink.assign(0, 1).await;
    sink.assign(1, 1).await;
    sink.records(0, 1, 0..25).await;
    sink.records(1, 1, 7..8).await;
    wait(1).await;
    let world = sink.stop().await;
    let mut last = commits(&world);
    last.retain(|(_, _, to)| [25, 8].contains(to));
    last.sort_unstable();
    assert_eq!(last, [(0, 1, 25), (1, 1, 8)]);
}

#[tokio::test(start_paused = true)]
async fn a_stop_does_not_wait_for_a_store_that_is_away_and_commits_nothing_over_the_gap() {
    let sink = start(rows(1));
    sink.world.get().away = true;
    sink.assign(0, 1).await;
    sink.records(0, 1, 0..5).await;
    wait(10_000).await;
    let before = Instant::now();
    let world = sink.stop().await;
    assert!(before.elapsed() <= STOP_WITHIN);
    assert!(commits(&world).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_topic_that_nobody_told_of_ends_the_sink() {
    let sink = start(rows(1));
    let stranger = Partition { topic: "other".into(), number: 0 };
    sink.send(Event::Assigned(vec![Assignment { partition: stranger, epoch: Epoch(1), committed: None }])).await;
    let error = sink.task.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("\"other\""), "{error}");
}
