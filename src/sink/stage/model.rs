//! The sink in a world that fails at every point, in virtual time: in the end each record is one row.
//!
//! The sink is dropped or replaced at any await: before and after the intent, in mid-insert, between insert and
//! commit. What was sent goes on without it: an insert can be executed long after its sink has gone. ClickHouse loses
//! parts whose token it has logged, stores rows without coming to the views, and refuses.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Mutex, MutexGuard},
};

use tokio::{sync::mpsc, task::JoinHandle};

use super::*;
use crate::{
    kafka::{
        Membership,
        scripted::{Log, Scripted},
    },
    message::{DeadLetter, envelope::Kind},
    runtime::{
        clock::{Dice, Timestamp},
        health::Health,
    },
    sink::Config,
    store::{Trouble, TroubleKind},
    topics::Topic,
};

/// What becomes of an insert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Done,
    Unheard,
    Late,
    Torn,
    Refused,
    WithoutView,
}

const FATES: [Fate; 10] = [
    Fate::Done,
    Fate::Done,
    Fate::Done,
    Fate::Done,
    Fate::Done,
    Fate::Unheard,
    Fate::Late,
    Fate::Torn,
    Fate::Refused,
    Fate::WithoutView,
];

/// An insert on its way to the table.
struct Delivery {
    at: Instant,
    token: String,
    rows: Vec<(i32, i64)>,
    fate: Fate,
}

#[derive(Default)]
struct Tables {
    rows: BTreeMap<(i32, i64), u32>,
    tokens: HashSet<String>,
    view: HashSet<(i32, i64)>,
    deliveries: Vec<Delivery>,
    is_fair: bool,
    doubts: u32,
    second_tokens: u32,
}

impl Tables {
    /// Executes what has arrived by now.
    fn arrive(&mut self, now: Instant) {
        self.deliveries.sort_by_key(|delivery| delivery.at);
        while self.deliveries.first().is_some_and(|first| first.at <= now) {
            let Delivery { token, rows, fate, .. } = self.deliveries.remove(0);
            if !self.tokens.insert(token) || fate == Fate::Torn {
                continue;
            }
            for row in rows {
                *self.rows.entry(row).or_default() += 1;
                if fate != Fate::WithoutView {
                    self.view.insert(row);
                }
            }
        }
    }
}

#[derive(Clone)]
struct House {
    tables: Arc<Mutex<Tables>>,
    dice: Dice,
    /// Where dead letters are written.
    log: Log,
}

impl House {
    fn tables(&self) -> MutexGuard<'_, Tables> {
        let mut tables = self.tables.lock().unwrap();
        tables.arrive(Instant::now());
        tables
    }

    fn may_be_away(&self) -> Result<(), Trouble> {
        if self.dice.fraction() < 0.8 || self.tables().is_fair {
            return Ok(());
        }
        Err(Trouble { kind: TroubleKind::Away, code: None, message: "away".to_owned(), view: None })
    }

    async fn a_while(&self, most: u64) {
        sleep(Duration::from_millis(most).mul_f64(self.dice.fraction())).await;
    }
}

fn rows_of(sealed: &Sealed) -> Vec<(i32, i64)> {
    sealed.rows.iter().map(|row| (sealed.partition.number, row.offset)).collect()
}

impl Insert for House {
    async fn insert(&self, sealed: &Sealed, token: &str) -> Result<(), Trouble> {
        let mut fate = FATES[index(&self.dice, FATES.len())];
        if self.tables().is_fair {
            fate = Fate::Done;
        } else if fate == Fate::Torn && token.contains('#') {
            // Torn four times in a row, a block is given to a person.
            fate = Fate::Unheard;
        }
        let within = Duration::from_millis(if fate == Fate::Late { 40_000 } else { 200 });
        let at = Instant::now() + within.mul_f64(self.dice.fraction());
        if fate != Fate::Refused {
            let mut tables = self.tables();
            tables.second_tokens += u32::from(token.contains('#'));
            tables.deliveries.push(Delivery { at, token: token.to_owned(), rows: rows_of(sealed), fate });
        }
        let (kind, code) = match fate {
            Fate::Done => {
                tokio::time::sleep_until(at).await;
                self.a_while(20).await;
                return Ok(());
            }
            Fate::Refused => (TroubleKind::Unable, Some([241, 252, 164][index(&self.dice, 3)])),
            Fate::WithoutView => {
                tokio::time::sleep_until(at).await;
                (TroubleKind::Unable, Some(241))
            }
            Fate::Unheard | Fate::Late | Fate::Torn => {
                self.a_while(2_000).await;
                (TroubleKind::Away, None)
            }
        };
        Err(Trouble { kind, code, message: format!("{fate:?}"), view: None })
    }

    async fn count(&self, sealed: &Sealed) -> Result<u64, Trouble> {
        self.a_while(20).await;
        let (partition, intent) = (sealed.partition.number, &sealed.intent);
        let mut tables = self.tables();
        tables.doubts += 1;
        let range = tables.rows.range((partition, intent.first)..(partition, intent.next));
        let ours = range.filter(|((_, offset), _)| !intent.is_rowless(*offset));
        Ok(ours.map(|(_, times)| u64::from(*times)).sum())
    }

    async fn refill(&self, sealed: &Sealed, _: Option<&Trouble>) -> Result<(), Trouble> {
        self.tables().view.extend(rows_of(sealed));
        Ok(())
    }

    async fn reaches(&self, _: Kind, partition: &Partition) -> Result<i64, Trouble> {
        self.a_while(20).await;
        self.may_be_away()?;
        let prefix = format!("r/{}/", partition.number);
        let dead = |letter: &Outgoing| {
            let letter: DeadLetter = serde_json::from_slice(&letter.value).unwrap();
            letter.request_id.as_str().strip_prefix(&prefix).map(|offset| offset.parse::<i64>().unwrap())
        };
        let dead = self.log.world().records.iter().filter_map(dead).max();
        let tables = self.tables();
        let mut rows = tables.rows.range((partition.number, 0)..(partition.number + 1, 0));
        let last = rows.next_back().map(|((_, offset), _)| *offset).max(dead);
        Ok(last.map_or(0, |last| last + 1))
    }

    async fn stored(&self, _: Kind, block: &Block) -> Result<HashSet<i64>, Trouble> {
        self.a_while(20).await;
        self.may_be_away()?;
        let number = block.partition.number;
        let mut tables = self.tables();
        let rows = tables.rows.range((number, block.first())..(number, block.next()));
        let found: Vec<(i32, i64)> = rows.map(|(row, _)| *row).collect();
        tables.view.extend(&found);
        Ok(found.into_iter().map(|(_, offset)| offset).collect())
    }
}

/// A log whose answers take time, and get lost.
struct Slow<T> {
    inner: T,
    house: House,
}

impl<T> Slow<T> {
    fn is_lost(&self) -> bool {
        self.house.dice.fraction() < 0.1 && !self.house.tables().is_fair
    }
}

impl Reader for Slow<Scripted> {
    async fn next(&mut self) -> Result<Event, ReadError> {
        self.inner.next().await
    }
    fn pause(&self, partition: &Partition) {
        self.inner.pause(partition);
    }
    fn resume(&self, partition: &Partition) {
        self.inner.resume(partition);
    }
    fn membership(&self) -> Membership {
        self.inner.membership()
    }
    async fn commit(&self, offsets: Offsets) -> Result<Vec<Partition>, WriteError> {
        let lost = || WriteError::Commit { group: "g".to_owned(), reason: "lost".to_owned() };
        self.house.a_while(10).await;
        if self.is_lost() {
            return Err(lost());
        }
        let answer = self.inner.commit(offsets).await;
        self.house.a_while(10).await;
        if self.is_lost() { Err(lost()) } else { answer }
    }
}

impl Writer for Slow<Log> {
    async fn transact(&self, records: Vec<Outgoing>, m: Membership, offsets: Offsets) -> Result<(), TransactError> {
        self.house.a_while(20).await;
        if self.is_lost() {
            return Err(TransactError::Aborted("lost".to_owned()));
        }
        let answer = self.inner.transact(records, m, offsets).await;
        self.house.a_while(20).await;
        if self.is_lost() { Err(TransactError::Rebuild("fate unknown".to_owned())) } else { answer }
    }
}

fn index(dice: &Dice, count: usize) -> usize {
    usize::try_from((dice.bits() >> 65) % count as u128).unwrap()
}

const PARTITIONS: i32 = 2;

fn partition(number: i32) -> Partition {
    Partition { topic: "r".into(), number }
}

const GOOD: &[u8] = br#"{"request_id":"r1","source":"s","item":"1","status":"absent","via":"call","calls":1,
    "requested_at":1,"fetched_at":2,"latency_ms":3}"#;

/// The records of a partition, with gaps in their offsets, some unreadable.
fn records(dice: &Dice, count: usize) -> Vec<Record> {
    let mut offset = 0;
    let record = |_| {
        offset += if dice.fraction() < 0.1 { 2 } else { 1 };
        let value = if dice.fraction() < 0.05 { b"{broken" } else { GOOD };
        let time = Timestamp::from_millis(1_795_824_000_000 + offset);
        let value = Some(bytes::Bytes::copy_from_slice(value));
        Record { offset, time, key: None, value, headers: Vec::new(), log: None }
    };
    (0..count).map(record).collect()
}

struct Scene {
    house: House,
    log: Log,
    dice: Dice,
    records: Vec<Vec<Record>>,
    epoch: u64,
    clock: Clock,
    resets: u32,
}

/// One sink, and where it has come to in feeding it.
struct Incarnation {
    events: mpsc::UnboundedSender<Event>,
    stop: CancellationToken,
    task: JoinHandle<Result<(), SinkError>>,
    fed: Vec<usize>,
    epoch: Epoch,
}

impl Scene {
    fn new(seed: u64) -> Self {
        let dice = Dice::seeded(seed);
        let log = Log::default();
        let house = House { tables: Arc::default(), dice: dice.clone(), log: log.clone() };
        let records = (0..PARTITIONS).map(|_| records(&dice, 150)).collect();
        let clock = Clock::simulated(Timestamp::from_millis(1_795_824_000_000));
        Self { house, log, dice, records, epoch: 0, clock, resets: 0 }
    }

    /// A sink to which all partitions are assigned; the one before owns nothing from now on.
    fn start(&mut self) -> Incarnation {
        self.epoch += 1;
        let epoch = Epoch(self.epoch);
        let (events, reader) = self.log.reader();
        let parts = Parts {
            reader: Slow { inner: reader, house: self.house.clone() },
            writer: Slow { inner: self.log.clone(), house: self.house.clone() },
            store: self.house.clone(),
            topics: vec![Topic {
                name: "r".to_owned(),
                kind: Kind::Result,
                source: None,
                partitions: PARTITIONS,
                keep: Duration::ZERO,
                delay: None,
            }],
            dead_topic: "d".into(),
            clock: self.clock.clone(),
            health: Health::default().role("sink"),
        };
        let config = Config { rows: 7, age: Duration::from_millis(300), ..Config::default() };
        let stop = CancellationToken::new();
        #[allow(clippy::disallowed_methods, reason = "the handle is kept")]
        let task = tokio::spawn(crate::sink::run(parts, config, stop.clone()));
        let (mut assignments, mut fed) = (Vec::new(), Vec::new());
        for number in 0..PARTITIONS {
            let mut world = self.log.world();
            world.epochs.insert(partition(number), epoch);
            let committed = world.committed.get(&partition(number)).cloned();
            let from = committed.as_ref().map_or(0, |committed| committed.offset);
            fed.push(self.records[usize::try_from(number).unwrap()].partition_point(|record| record.offset < from));
            assignments.push(Assignment { partition: partition(number), epoch, committed, log: None });
        }
        events.send(Event::Assigned(assignments)).unwrap();
        Incarnation { events, stop, task, fed, epoch }
    }

    /// Gives a sink some of what comes next.
    fn feed(&self, sink: &mut Incarnation, most: usize) {
        for number in 0..PARTITIONS {
            let at = usize::try_from(number).unwrap();
            let (all, from) = (&self.records[at], sink.fed[at]);
            let to = all.len().min(from + index(&self.dice, most + 1));
            if to > from {
                sink.fed[at] = to;
                let records = all[from..to].to_vec();
                let _ = sink.events.send(Event::Records { partition: partition(number), epoch: sink.epoch, records });
            }
        }
    }

    /// A sink's life, and how it ends; perhaps it goes on after its partitions have gone.
    async fn live(&mut self) -> Option<Incarnation> {
        let mut sink = self.start();
        for _ in 0..index(&self.dice, 12) {
            self.feed(&mut sink, 20);
            self.house.a_while(1_500).await;
        }
        match index(&self.dice, 4) {
            0 => {
                sink.stop.cancel();
                // It may have failed by itself before.
                let _ = sink.task.await.unwrap();
                None
            }
            1 => {
                let all = (0..PARTITIONS).map(partition).collect();
                let (answer, released) = tokio::sync::oneshot::channel();
                let _ = sink.events.send(Event::Revoked(all, Handover(Some(answer))));
                let _ = timeout(Duration::from_secs(5), released).await;
                Some(sink)
            }
            2 => Some(sink),
            _ => {
                sink.task.abort();
                None
            }
        }
    }

    /// Somebody sets the group's offsets back, or removes them, as Kafka lets him once nobody is in the group. He waits
    /// until nothing is on its way any more: an insert that comes later is known by no commit.
    async fn set_back(&mut self) {
        self.epoch += 1;
        for number in 0..PARTITIONS {
            self.log.world().epochs.insert(partition(number), Epoch(self.epoch));
        }
        sleep(Duration::from_secs(120)).await;
        drop(self.house.tables());
        for number in 0..PARTITIONS {
            let mut world = self.log.world();
            let Some(committed) = world.committed.remove(&partition(number)) else { continue };
            self.resets += 1;
            let offset = i64::try_from(index(&self.dice, 2 * usize::try_from(committed.offset).unwrap() + 1)).unwrap();
            if offset <= committed.offset {
                world.committed.insert(partition(number), Committed { offset, metadata: String::new() });
            }
        }
    }

    /// A world that is fair at last: a sink runs until it has stored everything, and what was late arrives.
    async fn end(&mut self) {
        self.house.tables().is_fair = true;
        let mut sink = self.start();
        let is_done = |scene: &Self| {
            let world = scene.log.world();
            (0..PARTITIONS).all(|number| {
                let last = scene.records[usize::try_from(number).unwrap()].last().unwrap().offset;
                let committed = world.committed.get(&partition(number));
                committed.is_some_and(|committed| committed.offset > last && committed.metadata == "B1:")
            })
        };
        for _ in 0..1_000 {
            self.feed(&mut sink, 50);
            sleep(Duration::from_millis(200)).await;
            if is_done(self) {
                break;
            }
        }
        assert!(is_done(self), "not all is committed: {:?}", self.log.world().committed);
        sleep(Duration::from_secs(60)).await;
        sink.stop.cancel();
        sink.task.await.unwrap().unwrap();
    }

    fn check(&self, seed: u64) {
        let tables = self.house.tables();
        let letters: Vec<DeadLetter> =
            self.log.world().records.iter().map(|letter| serde_json::from_slice(&letter.value).unwrap()).collect();
        for (number, records) in (0..).zip(&self.records) {
            for record in records {
                let (row, is_good) = ((number, record.offset), record.value.as_deref() == Some(GOOD));
                assert_eq!(tables.rows.get(&row).copied(), is_good.then_some(1), "seed {seed}: {row:?}");
                assert_eq!(tables.view.contains(&row), is_good, "seed {seed}: {row:?} in the view");
                let id = format!("r/{number}/{}", record.offset);
                let count = letters.iter().filter(|letter| letter.request_id.as_str() == id).count();
                assert_eq!(count, usize::from(!is_good), "seed {seed}: dead letters of {id}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn wherever_it_fails_each_record_ends_as_one_row_or_one_dead_letter() {
    let (mut doubts, mut second_tokens, mut resets) = (0, 0, 0);
    for seed in 0..100 {
        let mut scene = Scene::new(seed);
        let mut sleepers = Vec::new();
        for _ in 0..6 {
            sleepers.extend(scene.live().await);
            if seed % 2 == 0 && index(&scene.dice, 3) == 0 {
                scene.set_back().await;
            }
        }
        scene.end().await;
        for sleeper in sleepers {
            sleeper.task.abort();
        }
        scene.check(seed);
        let tables = scene.house.tables();
        doubts += tables.doubts;
        second_tokens += tables.second_tokens;
        resets += scene.resets;
    }
    // Else the world was too kind to prove anything.
    assert!(doubts > 1_000 && second_tokens > 30, "{doubts} counts, {second_tokens} second tokens");
    assert!(resets > 50, "{resets} partitions set back");
}
