//! The loop of the sink: read blocks, commit intents, insert, commit, pause, hand over.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Parts, SinkError,
    block::{Block, Cut, Limits},
    doubt::Doubt,
    insert::{self, Insert},
    intent::IntentError,
    lane::{self, INSERTS_MAX, Lane},
    patience::{Pressure, Troubles},
    sealed::{self, Grave, Reading, Sealed},
    settle::{End, Terms, Told, settle},
};
use crate::{
    kafka::{
        Assignment, Committed, Epoch, Event, Handover, Instead, Offsets, Outgoing, Partition, ReadError, Reader,
        Record, TransactError, WriteError, Writer, outbox::Position,
    },
    runtime::{
        clock::{Clock, sleep_until_due},
        health::RoleHealth,
        metrics::METRICS,
    },
    store::{Route, Trouble},
};

/// How soon a refused commit is tried again.
const COMMIT_AGAIN: Duration = Duration::from_secs(1);

/// How long a stop waits for what is in flight and buffered.
const STOP_WITHIN: Duration = Duration::from_secs(10);

/// The sink at work. `run` is its only task beside the readings and inserts, so nothing here is shared.
pub(super) struct Stage<R, W, I> {
    reader: R,
    writer: W,
    store: Arc<I>,
    dead_topic: Arc<str>,
    clock: Clock,
    health: RoleHealth,
    routes: HashMap<Arc<str>, Arc<Route>>,
    base: Limits,
    memory: usize,
    lanes: BTreeMap<Partition, Lane>,
    tasks: JoinSet<Done>,
    /// Partitions with an insert in flight, perhaps from before a rebalance: one at a time for each.
    busy: HashMap<Partition, Epoch>,
    commit_again: Option<Instant>,
    troubles: Troubles,
    pressure: Pressure,
    stop: CancellationToken,
}

/// The end of something that took a while.
struct Done {
    partition: Partition,
    epoch: Epoch,
    what: What,
}

enum What {
    Read(Box<Reading>, Instant),
    Unread(Block, Trouble),
    Tried(Box<Sealed>, Doubt, End),
}

impl<R: Reader, W: Writer, I: Insert> Stage<R, W, I> {
    pub fn new(
        parts: Parts<R, W, I>,
        routes: HashMap<Arc<str>, Arc<Route>>,
        (base, memory): (Limits, usize),
        stop: CancellationToken,
    ) -> Self {
        let Parts { reader, writer, store, dead_topic, clock, health, .. } = parts;
        Self {
            reader,
            writer,
            store: Arc::new(store),
            dead_topic,
            clock,
            health,
            routes,
            base,
            memory,
            lanes: BTreeMap::new(),
            tasks: JoinSet::new(),
            busy: HashMap::new(),
            commit_again: None,
            troubles: Troubles::default(),
            pressure: Pressure::none(Instant::now()),
            stop,
        }
    }

    pub async fn run(mut self) -> Result<(), SinkError> {
        loop {
            let wake_at = self.due();
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return self.finish().await,
                Some(done) = self.tasks.join_next() => self.done(done?),
                () = sleep_until_due(wake_at) => {}
                event = self.reader.next() => self.take(event?)?,
            }
            self.advance().await?;
        }
    }

    /// What follows from any change.
    async fn advance(&mut self) -> Result<(), SinkError> {
        self.read_blocks();
        // A block without rows is done with its announcement, and that is progress in its turn.
        while self.commit().await? {}
        self.release();
        self.start_inserts();
        self.balance();
        self.report();
        Ok(())
    }

    /// When something has to happen without an event.
    fn due(&self) -> Option<Instant> {
        let now = Instant::now();
        let inserts = self.inserts(now);
        let lanes = self.lanes.values().filter_map(|lane| lane.due(now, inserts));
        lanes.chain(self.commit_again).min()
    }

    fn take(&mut self, event: Event) -> Result<(), SinkError> {
        let now = Instant::now();
        match event {
            Event::Assigned(assignments) => {
                return assignments.into_iter().try_for_each(|assignment| self.assigned(assignment));
            }
            Event::Records { partition, epoch, records } => self.records(&partition, epoch, records, now),
            Event::Gone { partition, epoch, range } => {
                METRICS.deleted_unread(&partition.topic, &range);
                let count = range.end.saturating_sub(range.start);
                tracing::error!(
                    %partition, first = range.start, last = range.end - 1,
                    "records were deleted by the topic's retention before they were stored, up to {count}: they are not \
                     in ClickHouse, unless they were being inserted when the sink stopped"
                );
                if let Some(lane) = self.lanes.get_mut(&partition).filter(|lane| lane.epoch == epoch) {
                    lane.gone(range.end, now);
                }
            }
            Event::Revoked(partitions, handover) => self.revoked(&partitions, handover),
            Event::Lost(partitions) => self.lanes.retain(|partition, _| !partitions.contains(partition)),
        }
        Ok(())
    }

    fn assigned(&mut self, assignment: Assignment) -> Result<(), SinkError> {
        let partition = assignment.partition.clone();
        let Some(route) = self.routes.get(&partition.topic).cloned() else {
            return Err(SinkError::Topic { topic: partition.topic });
        };
        let refused =
            |error: IntentError| ReadError::Ledger { partition: partition.clone(), reason: error.to_string() };
        let lane = Lane::new(assignment, route, self.pressure.limits(self.base)).map_err(refused)?;
        self.lanes.insert(partition, lane);
        Ok(())
    }

    fn records(&mut self, partition: &Partition, epoch: Epoch, records: Vec<Record>, now: Instant) {
        let lane = self.lanes.get_mut(partition).filter(|lane| lane.epoch == epoch && lane.leaving.is_none());
        if let Some(lane) = lane {
            lane.push(records, now);
        }
    }

    /// The partitions go when nothing of them is under way. What is only buffered is read again by their new owner.
    fn revoked(&mut self, partitions: &[Partition], handover: Handover) {
        let handover = Arc::new(handover);
        for partition in partitions {
            if let Some(lane) = self.lanes.get_mut(partition) {
                lane.leaving = Some(Arc::clone(&handover));
            }
        }
    }

    /// How many inserts are under way, or begin as soon as their blocks are read and announced.
    fn inserts(&self, now: Instant) -> usize {
        self.busy.len() + self.lanes.values().filter(|lane| lane.is_about_to_insert(now)).count()
    }

    /// Starts to read what is full or old enough.
    fn read_blocks(&mut self) {
        let now = Instant::now();
        let mut inserts = self.inserts(now);
        let grave = Grave { topic: Arc::clone(&self.dead_topic), now: self.clock.now() };
        let lanes = self.lanes.iter_mut();
        let mut due: Vec<_> = lanes.filter_map(|(name, lane)| Some((lane.due_since(now)?, name, lane))).collect();
        due.sort_by_key(|(since, ..)| *since);
        for (_, partition, lane) in due {
            let Some((cut, guard)) = lane.cut(now, inserts) else { continue };
            inserts += usize::from(lane.is_about_to_insert(now));
            let (partition, epoch) = (partition.clone(), lane.epoch);
            let (route, grave, store) = (Arc::clone(&lane.route), grave.clone(), Arc::clone(&self.store));
            self.tasks.spawn(async move {
                let reading = match cut {
                    Cut::New(block) => match insert::look(&*store, &block, &route, guard).await {
                        Ok((guard, known)) => {
                            Reading { guard: Some(guard), ..sealed::read(block, &route, &grave, &known).await }
                        }
                        Err(trouble) => return Done { partition, epoch, what: What::Unread(block, trouble) },
                    },
                    Cut::Rebuilt(block, intent) => sealed::read_again(block, intent, &route).await,
                    Cut::Lost(intent) => {
                        let sealed = sealed::lost(partition.clone(), intent, route.kind);
                        Reading { sealed, letters: Vec::new(), rest: None, guard: None }
                    }
                };
                Done { partition, epoch, what: What::Read(Box::new(reading), now) }
            });
        }
    }

    fn done(&mut self, done: Done) {
        let Done { partition, epoch, what } = done;
        let lane = self.lanes.get_mut(&partition).filter(|lane| lane.epoch == epoch);
        match what {
            What::Read(reading, came_at) => {
                if let Some(lane) = lane {
                    lane.read(*reading, came_at);
                }
            }
            What::Unread(block, trouble) => {
                if let Some(lane) = lane {
                    self.troubles.meet(
                        lane.route.kind,
                        &trouble,
                        &format!("{partition} from offset {}", block.first()),
                    );
                    lane.unread(block, Instant::now());
                }
            }
            What::Tried(sealed, doubt, end) => {
                self.busy.remove(&partition);
                if let Some(lane) = lane {
                    lane.ended(*sealed, doubt, end.clone(), Instant::now());
                    self.told(&partition, &end);
                }
            }
        }
    }

    /// Says what an end means, and draws the consequences for all partitions.
    fn told(&mut self, partition: &Partition, end: &End) {
        let Some(lane) = self.lanes.get(partition) else { return };
        match end {
            End::Stored => {
                self.troubles.over(lane.route.kind);
            }
            End::Refused(trouble) => {
                let from = lane.wanted().map_or(0, |(wanted, _)| wanted.offset);
                self.troubles.meet(lane.route.kind, trouble, &format!("{partition} from offset {from}"));
                if trouble.is_too_often() && self.pressure.rise(Instant::now(), self.base.age) {
                    self.set_limits();
                }
            }
            End::Halted(_) => {
                if let Some((halt, sealed)) = lane.halt() {
                    tracing::error!("{}", Told(halt, sealed));
                }
            }
            End::Stale | End::Split => {}
        }
    }

    fn set_limits(&mut self) {
        let limits = self.pressure.limits(self.base);
        tracing::info!(rows = limits.rows, age = ?limits.age, "block size changed");
        for lane in self.lanes.values_mut() {
            lane.limit(limits);
        }
    }

    /// Commits progress and intents; those with dead letters in a transaction with them. True if all was taken, and
    /// there was something.
    async fn commit(&mut self) -> Result<bool, SinkError> {
        let (now, sent_at) = (Instant::now(), self.clock.uptime());
        if self.commit_again.is_some_and(|again| again > now) {
            return Ok(false);
        }
        let (mut plain, mut with, mut letters) = (Offsets::new(), Offsets::new(), Vec::<(Outgoing, Position)>::new());
        for (partition, lane) in &self.lanes {
            let Some(committed) = lane.due_commit(now, sent_at) else { continue };
            let before = letters.len();
            letters.extend(lane.letters().cloned().zip(std::iter::repeat(Position {
                partition: partition.clone(),
                epoch: lane.epoch,
                offset: committed.offset,
            })));
            let offsets = if letters.len() > before { &mut with } else { &mut plain };
            offsets.push((partition.clone(), lane.epoch, committed));
        }
        self.commit_again = None;
        let is_something = !(plain.is_empty() && with.is_empty());
        if !plain.is_empty() {
            let answer = tokio::select! {
                answer = self.reader.commit(plain.clone()) => answer,
                () = overdue(&self.stop) => return Ok(false),
            };
            self.plain(answer, plain, sent_at);
        }
        if !with.is_empty() {
            let answer = tokio::select! {
                answer = self.write(letters, with.clone()) => answer,
                // It may still be committed: what it holds must not be written again by this process.
                () = overdue(&self.stop) => return Err(SinkError::Stopped),
            };
            self.transacted(answer, with, sent_at)?;
        }
        Ok(is_something && self.commit_again.is_none())
    }

    /// Writes dead letters with their commit; one that is too large for its topic says less.
    async fn write(&self, letters: Vec<(Outgoing, Position)>, offsets: Offsets) -> Result<(), TransactError> {
        let (mut letters, origins): (Vec<Outgoing>, Vec<Position>) = letters.into_iter().unzip();
        let instead = Instead::new(Arc::clone(&self.dead_topic), sealed::WRITER);
        loop {
            let membership = self.reader.membership();
            match self.writer.transact(letters.clone(), membership, offsets.clone()).await {
                Err(TransactError::TooLarge(all)) => {
                    for why in &all {
                        tracing::error!(record = %why, "a dead letter is too large for Kafka; writing it shortened");
                    }
                    instead.replace(&mut letters, &origins, &all, self.clock.now())?;
                }
                ended => return ended,
            }
        }
    }

    fn plain(&mut self, answer: Result<Vec<Partition>, WriteError>, offsets: Offsets, sent_at: Duration) {
        match answer {
            Ok(taken) => {
                for (partition, epoch, committed) in offsets {
                    if taken.contains(&partition) {
                        self.committed(&partition, epoch, committed, sent_at);
                    } else {
                        // It has gone; the event that says so is on its way.
                        self.lanes.remove(&partition);
                    }
                }
            }
            Err(error) => {
                tracing::warn!(%error, "commit failed; trying again");
                self.refused(&offsets);
            }
        }
    }

    fn transacted(
        &mut self,
        answer: Result<(), TransactError>,
        offsets: Offsets,
        sent_at: Duration,
    ) -> Result<(), SinkError> {
        match answer {
            Ok(()) => {
                for (partition, epoch, committed) in offsets {
                    self.committed(&partition, epoch, committed, sent_at);
                }
                Ok(())
            }
            Err(TransactError::Aborted(reason)) => {
                tracing::warn!(reason, "transaction of dead letters aborted; trying again");
                self.refused(&offsets);
                Ok(())
            }
            Err(error @ (TransactError::Fenced { .. } | TransactError::TooLarge(_) | TransactError::Rebuild(_))) => {
                Err(error.into())
            }
        }
    }

    fn committed(&mut self, partition: &Partition, epoch: Epoch, committed: Committed, sent_at: Duration) {
        if let Some(lane) = self.lanes.get_mut(partition).filter(|lane| lane.epoch == epoch) {
            lane.committed(committed, sent_at);
        }
    }

    /// A partition that is about to leave is not held back by it: its new owner counts.
    fn refused(&mut self, offsets: &Offsets) {
        self.lanes.retain(|partition, lane| {
            lane.leaving.is_none() || !offsets.iter().any(|(refused, ..)| refused == partition)
        });
        self.commit_again = Some(Instant::now() + COMMIT_AGAIN);
    }

    /// Lets revoked partitions go when nothing of them is in flight or waits for its commit.
    fn release(&mut self) {
        let (now, uptime) = (Instant::now(), self.clock.uptime());
        self.lanes.retain(|_, lane| lane.leaving.is_none() || lane.is_busy() || lane.due_commit(now, uptime).is_some());
    }

    fn start_inserts(&mut self) {
        let (now, uptime) = (Instant::now(), self.clock.uptime());
        while self.busy.len() < INSERTS_MAX {
            // The oldest first, so that no partition waits for ever behind busier ones.
            let idle = self.lanes.iter_mut().filter(|(partition, _)| !self.busy.contains_key(partition));
            let ready = idle.filter_map(|(partition, lane)| Some((lane.ready_since(now, uptime)?, partition, lane)));
            let Some((_, partition, lane)) = ready.min_by_key(|(since, ..)| *since) else { return };
            let Some(lane::Job { sealed, mut doubt, announced_at, split }) = lane.start() else { return };
            let (partition, epoch) = (partition.clone(), lane.epoch);
            self.busy.insert(partition.clone(), epoch);
            let (store, clock) = (Arc::clone(&self.store), self.clock.clone());
            self.tasks.spawn(async move {
                let is_fresh = || lane::is_fresh(announced_at, clock.uptime());
                let end = settle(&*store, &sealed, &mut doubt, Terms { is_fresh, split }).await;
                Done { partition, epoch, what: What::Tried(Box::new(sealed), doubt, end) }
            });
        }
    }

    /// Pauses partitions that hold too much, and lets them flow again when they hold little: a pause costs what
    /// Kafka's client has read ahead, so not at every block.
    fn balance(&mut self) {
        if self.pressure.fall(Instant::now()) {
            self.set_limits();
        }
        let total: usize = self.lanes.values().map(Lane::bytes).sum();
        METRICS.sink_waiting(total);
        // Of those that hold anything: most topics are quiet while results pour in.
        let share = self.memory / self.lanes.values().filter(|lane| lane.bytes() > 0).count().max(1);
        let (most, crowded) = (self.base.bytes.saturating_mul(2), total >= self.memory);
        for (partition, lane) in &mut self.lanes {
            let bytes = lane.bytes();
            let is_needed = lane.needs_records();
            let full = bytes >= most || (crowded && bytes >= share);
            let low = bytes <= most / 2 && (bytes <= share / 2 || total <= self.memory / 2);
            if full && !is_needed && !lane.is_paused {
                self.reader.pause(partition);
                lane.is_paused = true;
            } else if lane.is_paused && (is_needed || low) {
                self.reader.resume(partition);
                lane.is_paused = false;
            }
        }
    }

    /// Says on `/ready` what the rows wait for.
    fn report(&self) {
        let health: &RoleHealth = &self.health;
        let mut halted = self.lanes.values().filter_map(Lane::halt);
        match (halted.next(), self.troubles.text()) {
            (Some((halt, sealed)), _) => health.not_ready(Told(halt, sealed).to_string()),
            (None, Some(trouble)) => health.not_ready(trouble),
            (None, None) => health.ready(),
        }
    }

    /// Stores and commits what has been read, as far as ClickHouse takes it at the first offer.
    async fn finish(mut self) -> Result<(), SinkError> {
        for lane in self.lanes.values_mut() {
            lane.seal();
        }
        self.commit_again = None;
        timeout(STOP_WITHIN, self.flush()).await.unwrap_or_else(|_| {
            tracing::warn!("stopped before everything that was read was stored; it is read again at the next start");
            Ok(())
        })
    }

    async fn flush(&mut self) -> Result<(), SinkError> {
        self.advance().await?;
        while let Some(done) = self.tasks.join_next().await {
            self.done(done?);
            self.advance().await?;
        }
        Ok(())
    }
}

/// Ends when a stop has been asked for, and nothing may wait for it any longer.
async fn overdue(stop: &CancellationToken) {
    stop.cancelled().await;
    sleep(STOP_WITHIN).await;
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
