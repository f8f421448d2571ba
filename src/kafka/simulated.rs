//! For models of stages in virtual time: brokers in memory, with partitions, transactions and one consumer group whose
//! members come, go and die.
//!
//! Deterministic for a seed on tokio's paused clock. What it takes over from Kafka: a transaction is visible with its
//! offsets or not at all, leaves a marker in each partition, and is refused when a partition has changed hands; a
//! member that dies in mid-transaction does not learn whether it was committed; partitions move only after their
//! owner has answered, or its time is over.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::{
    sync::{Notify, oneshot},
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    Assignment, Committed, Epoch, Event, Handover, Membership, Offsets, Outgoing, Partition, ReadError, Reader, Record,
    TransactError, WriteError, Writer,
};
use crate::runtime::clock::{Clock, Dice, Timestamp};

/// How long a member may take to let a partition go.
const DRAIN: Duration = Duration::from_secs(5);

/// The most records that one event brings.
const GATHER: f64 = 500.0;

#[derive(Default)]
struct Member {
    /// Epoch, and the next offset to read.
    owned: BTreeMap<Partition, (Epoch, i64)>,
    paused: HashSet<Partition>,
    events: VecDeque<Event>,
}

/// Everything that the brokers know.
pub(crate) struct World {
    /// The records of each partition, by offset; a marker is a gap.
    pub partitions: BTreeMap<Partition, BTreeMap<i64, Record>>,
    /// The offset that the next record gets.
    ends: HashMap<Partition, i64>,
    pub committed: HashMap<Partition, Committed>,
    members: BTreeMap<u32, Member>,
    /// How often each partition has been paused.
    pub pauses: HashMap<Partition, u32>,
    next: u64,
    /// The share of transactions that the brokers roll back.
    pub rolled_back: f64,
}

/// Brokers in memory.
#[derive(Clone)]
pub(crate) struct Brokers {
    world: Arc<Mutex<World>>,
    clock: Clock,
    dice: Dice,
    changed: Arc<Notify>,
}

impl Brokers {
    /// Brokers with these topics, whose `clock` is written into the records.
    pub fn new(topics: impl IntoIterator<Item = (String, i32)>, clock: Clock, dice: Dice) -> Self {
        let partitions = topics.into_iter().flat_map(|(topic, count)| {
            let topic: Arc<str> = topic.into();
            (0..count).map(move |number| (Partition { topic: Arc::clone(&topic), number }, BTreeMap::new()))
        });
        let world = World {
            partitions: partitions.collect(),
            ends: HashMap::new(),
            committed: HashMap::new(),
            members: BTreeMap::new(),
            pauses: HashMap::new(),
            next: 0,
            rolled_back: 0.0,
        };
        Self { world: Arc::new(Mutex::new(world)), clock, dice, changed: Arc::default() }
    }

    pub fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    /// Adds partitions to a topic.
    pub fn grow(&self, topic: &str, count: i32) {
        let topic: Arc<str> = topic.into();
        let mut world = self.world();
        for number in 0..count {
            world.partitions.entry(Partition { topic: Arc::clone(&topic), number }).or_default();
        }
    }

    /// Appends records outside any transaction.
    pub fn produce(&self, records: impl IntoIterator<Item = Outgoing>) {
        self.world().append(records, self.clock.now());
        self.changed.notify_waiters();
    }

    /// All records of a topic.
    pub fn records(&self, topic: &str) -> Vec<Record> {
        let world = self.world();
        let of_it = world.partitions.iter().filter(|(partition, _)| *partition.topic == *topic);
        of_it.flat_map(|(_, records)| records.values().cloned()).collect()
    }

    /// A new member `number`, which gets its partitions by the next [`Self::rebalance`], and its writer.
    pub fn join(&self, number: u32) -> (SimulatedReader, SimulatedWriter) {
        self.world().members.insert(number, Member::default());
        (SimulatedReader { brokers: self.clone(), number, fetched_at: None }, SimulatedWriter(self.clone()))
    }

    /// A member dies: whatever it owned is free.
    pub fn bury(&self, number: u32) {
        self.world().members.remove(&number);
    }

    /// Spreads the partitions of these topics evenly; those that move leave their owner first.
    pub async fn rebalance(&self, topics: &[String]) {
        let leaving = self.world().revoke(topics);
        for (number, partitions, answer) in leaving {
            self.changed.notify_waiters();
            let answered = timeout(DRAIN, answer).await.is_ok();
            let mut world = self.world();
            if let Some(member) = world.members.get_mut(&number) {
                member.owned.retain(|partition, _| !partitions.contains(partition));
                if !answered {
                    member.events.push_back(Event::Lost(partitions));
                }
            }
        }
        self.world().assign(topics);
        self.changed.notify_waiters();
    }

    async fn lag(&self, most: Duration) {
        sleep(most.mul_f64(self.dice.fraction())).await;
    }

    /// The next event for a member: what the group says before what the log brings.
    fn next(&self, number: u32) -> Option<Event> {
        let mut world = self.world();
        let World { partitions, members, .. } = &mut *world;
        let member = members.get_mut(&number)?;
        if let Some(event) = member.events.pop_front() {
            return Some(event);
        }
        let Member { owned, paused, .. } = member;
        let flowing = owned.iter_mut().filter(|(partition, _)| !paused.contains(*partition));
        let mut ready: Vec<_> =
            flowing.filter(|(p, (_, from))| partitions[*p].range(*from..).next().is_some()).collect();
        if ready.is_empty() {
            return None;
        }
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "small"
        )]
        let (chosen, count) =
            ((self.dice.fraction() * ready.len() as f64) as usize, 1 + (self.dice.fraction() * GATHER) as usize);
        let (partition, (epoch, from)) = ready.swap_remove(chosen);
        let records: Vec<_> =
            partitions[partition].range(*from..).take(count).map(|(_, record)| record.clone()).collect();
        *from = records.last()?.offset + 1;
        Some(Event::Records { partition: partition.clone(), epoch: *epoch, records })
    }
}

impl World {
    /// Writes records and, behind them, what a transaction leaves.
    fn append(&mut self, records: impl IntoIterator<Item = Outgoing>, time: Timestamp) {
        let mut touched = HashSet::new();
        for Outgoing { topic, key, value, headers } in records {
            let count = self.partitions.keys().filter(|partition| partition.topic == topic).count();
            let mut hasher = DefaultHasher::new();
            key.hash(&mut hasher);
            let number = i32::try_from(hasher.finish() % u64::try_from(count).unwrap()).unwrap();
            let partition = Partition { topic, number };
            let offset = self.ends.entry(partition.clone()).or_default();
            let record = Record { offset: *offset, time, key, value: Some(value), headers, log: None };
            self.partitions.get_mut(&partition).unwrap().insert(*offset, record);
            *offset += 1;
            touched.insert(partition);
        }
        for partition in touched {
            *self.ends.entry(partition).or_default() += 1;
        }
    }

    fn wanted(&self, topics: &[String]) -> Vec<(Partition, u32)> {
        let of_topics = |partition: &&Partition| topics.iter().any(|topic| **topic == *partition.topic);
        let partitions: Vec<_> = self.partitions.keys().filter(of_topics).cloned().collect();
        partitions.into_iter().zip(self.members.keys().copied().cycle()).collect()
    }

    /// Tells those that own a partition that another is to have.
    fn revoke(&mut self, topics: &[String]) -> Vec<(u32, Vec<Partition>, oneshot::Receiver<()>)> {
        let wanted: HashMap<_, _> = self.wanted(topics).into_iter().collect();
        let mut answers = Vec::new();
        for (number, member) in &mut self.members {
            let leaving: Vec<_> = member.owned.keys().filter(|p| wanted.get(*p) != Some(number)).cloned().collect();
            if !leaving.is_empty() {
                let (answer, answered) = oneshot::channel();
                member.events.push_back(Event::Revoked(leaving.clone(), Handover(Some(answer))));
                answers.push((*number, leaving, answered));
            }
        }
        answers
    }

    fn assign(&mut self, topics: &[String]) {
        let mut new: BTreeMap<u32, Vec<Assignment>> = BTreeMap::new();
        for (partition, number) in self.wanted(topics) {
            let is_owned = self.members.values().any(|member| member.owned.contains_key(&partition));
            let Some(member) = self.members.get_mut(&number).filter(|_| !is_owned) else { continue };
            self.next += 1;
            let (epoch, committed) = (Epoch(self.next), self.committed.get(&partition).cloned());
            let from = committed.as_ref().map_or(0, |committed| committed.offset);
            member.owned.insert(partition.clone(), (epoch, from));
            member.paused.remove(&partition);
            new.entry(number).or_default().push(Assignment { partition, epoch, committed, log: None });
        }
        for (number, assignments) in new {
            if let Some(member) = self.members.get_mut(&number) {
                member.events.push_back(Event::Assigned(assignments));
            }
        }
    }

    /// Commits, unless a partition has changed hands.
    fn commit(&mut self, records: Vec<Outgoing>, offsets: Offsets, time: Timestamp) -> Result<(), TransactError> {
        let is_ours = |partition: &Partition, epoch: Epoch| {
            self.members.values().any(|member| member.owned.get(partition).is_some_and(|(own, _)| *own == epoch))
        };
        if let Some((partition, ..)) = offsets.iter().find(|(partition, epoch, _)| !is_ours(partition, *epoch)) {
            return Err(TransactError::Aborted(format!("{partition} has changed hands")));
        }
        self.append(records, time);
        self.committed.extend(offsets.into_iter().map(|(partition, _, committed)| (partition, committed)));
        Ok(())
    }
}

pub(crate) struct SimulatedReader {
    brokers: Brokers,
    number: u32,
    /// When what is there now has come over the wire.
    fetched_at: Option<Instant>,
}

impl Reader for SimulatedReader {
    async fn next(&mut self) -> Result<Event, ReadError> {
        loop {
            let changed = self.brokers.changed.notified();
            if let Some(at) = self.fetched_at {
                sleep_until(at).await;
                self.fetched_at = None;
            }
            if let Some(event) = self.brokers.next(self.number) {
                return Ok(event);
            }
            changed.await;
            let wait = Duration::from_millis(20).mul_f64(self.brokers.dice.fraction());
            self.fetched_at = Some(Instant::now() + wait);
        }
    }

    fn pause(&self, partition: &Partition) {
        let mut world = self.brokers.world();
        *world.pauses.entry(partition.clone()).or_default() += 1;
        if let Some(member) = world.members.get_mut(&self.number) {
            member.paused.insert(partition.clone());
        }
    }

    fn resume(&self, partition: &Partition) {
        if let Some(member) = self.brokers.world().members.get_mut(&self.number) {
            member.paused.remove(partition);
        }
        self.brokers.changed.notify_waiters();
    }

    fn membership(&self) -> Membership {
        Membership::new()
    }

    async fn commit(&self, _: Offsets) -> Result<Vec<Partition>, WriteError> {
        unreachable!("these stages commit by transactions")
    }
}

pub(crate) struct SimulatedWriter(Brokers);

impl Writer for SimulatedWriter {
    async fn transact(&self, records: Vec<Outgoing>, _: Membership, offsets: Offsets) -> Result<(), TransactError> {
        let Self(brokers) = self;
        if brokers.dice.fraction() < brokers.world().rolled_back {
            brokers.lag(Duration::from_millis(40)).await;
            return Err(TransactError::Aborted("the dice say so".to_owned()));
        }
        // Who dies in between does not learn whether it was committed.
        let lags = [Duration::from_millis(20), Duration::from_millis(20)];
        brokers.lag(lags[0]).await;
        let result = brokers.world().commit(records, offsets, brokers.clock.now());
        brokers.changed.notify_waiters();
        brokers.lag(lags[1]).await;
        result
    }
}
