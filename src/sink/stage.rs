//! What the sink does with each event: fill blocks, insert, commit, pause, hand over.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    SinkError,
    block::{Block, Blocks, Limits},
    insert::{Insert, Tally},
    patience::{self, Troubles},
    row::Route,
};
use crate::kafka::{Assignment, Committed, Epoch, Event, Handover, Partition, Reader, Record};

/// Inserts at once. Each makes a part in ClickHouse, so more would only make more to merge.
const INSERTS_MAX: usize = 4;

/// How soon a refused commit is tried again.
const COMMIT_AGAIN: Duration = Duration::from_secs(1);

/// How long a stop waits for what is in flight and buffered.
const STOP_WITHIN: Duration = Duration::from_secs(10);

/// The sink at work. `run` is its only task beside the inserts, so nothing here is shared.
pub(super) struct Stage<R, I> {
    reader: R,
    store: Arc<I>,
    routes: HashMap<Arc<str>, Arc<Route>>,
    limits: Limits,
    memory: usize,
    owned: BTreeMap<Partition, Owned>,
    inserts: JoinSet<Inserted>,
    /// Partitions with an insert in flight, perhaps from before a rebalance: one at a time for each.
    busy: HashMap<Partition, Epoch>,
    /// Revoked partitions whose last insert is in flight.
    leaving: Vec<(Vec<Partition>, Handover)>,
    /// Stored, but not yet committed.
    stored: BTreeMap<Partition, (Epoch, i64)>,
    commit_again: Option<Instant>,
    troubles: Arc<Troubles>,
    patience: CancellationToken,
}

/// A partition that is ours.
struct Owned {
    epoch: Epoch,
    route: Arc<Route>,
    blocks: Blocks,
    in_flight: usize,
    paused: bool,
    patience: CancellationToken,
}

impl Owned {
    fn bytes(&self) -> usize {
        self.blocks.bytes() + self.in_flight
    }
}

/// The end of an insert.
struct Inserted {
    block: Block,
    epoch: Epoch,
    /// `None`: nobody waited for ClickHouse any longer.
    tally: Option<Tally>,
}

impl<R: Reader, I: Insert> Stage<R, I> {
    pub(super) fn new(
        reader: R,
        store: I,
        routes: HashMap<Arc<str>, Arc<Route>>,
        limits: Limits,
        memory: usize,
    ) -> Self {
        Self {
            reader,
            store: Arc::new(store),
            routes,
            limits,
            memory,
            owned: BTreeMap::new(),
            inserts: JoinSet::new(),
            busy: HashMap::new(),
            leaving: Vec::new(),
            stored: BTreeMap::new(),
            commit_again: None,
            troubles: Arc::default(),
            patience: CancellationToken::new(),
        }
    }

    pub(super) async fn run(mut self, stop: CancellationToken) -> Result<(), SinkError> {
        loop {
            let due = self.due();
            let wake = async {
                match due {
                    Some(due) => sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => return self.finish().await,
                Some(inserted) = self.inserts.join_next() => self.inserted(inserted?),
                () = wake => {}
                event = self.reader.next() => self.take(event?)?,
            }
            self.advance().await;
        }
    }

    /// What follows from any change.
    async fn advance(&mut self) {
        self.commit().await;
        self.release();
        self.start_inserts();
        self.balance();
    }

    /// When something has to happen without an event.
    fn due(&self) -> Option<Instant> {
        let idle = self.owned.iter().filter(|(partition, _)| !self.busy.contains_key(partition));
        let block = idle.filter_map(|(_, owned)| owned.blocks.due()).min();
        // With all inserts busy the next end of one is what to wait for.
        let block = block.filter(|_| self.inserts.len() < INSERTS_MAX);
        block.into_iter().chain(self.commit_again).min()
    }

    fn take(&mut self, event: Event) -> Result<(), SinkError> {
        match event {
            Event::Assigned(assignments) => {
                assignments.into_iter().try_for_each(|assignment| self.assigned(assignment))
            }
            Event::Records { partition, epoch, records } => {
                self.records(&partition, epoch, records);
                Ok(())
            }
            Event::Gone { partition, range, .. } => {
                let count = range.end.saturating_sub(range.start);
                tracing::error!(
                    %partition, first = range.start, last = range.end - 1,
                    "up to {count} records were deleted by the topic's retention before they were stored: they are not in ClickHouse"
                );
                Ok(())
            }
            Event::Revoked(partitions, handover) => {
                for partition in &partitions {
                    self.forget(partition);
                }
                self.leaving.push((partitions, handover));
                Ok(())
            }
            Event::Lost(partitions) => {
                for partition in &partitions {
                    self.forget(partition);
                    self.stored.remove(partition);
                }
                Ok(())
            }
        }
    }

    fn assigned(&mut self, assignment: Assignment) -> Result<(), SinkError> {
        let Assignment { partition, epoch, .. } = assignment;
        let Some(route) = self.routes.get(&partition.topic).cloned() else {
            return Err(SinkError::Topic { topic: partition.topic });
        };
        let owned = Owned {
            epoch,
            route,
            blocks: Blocks::new(partition.clone(), self.limits),
            in_flight: 0,
            paused: false,
            patience: self.patience.child_token(),
        };
        self.forget(&partition);
        self.owned.insert(partition, owned);
        Ok(())
    }

    fn records(&mut self, partition: &Partition, epoch: Epoch, records: Vec<Record>) {
        let Some(owned) = self.owned.get_mut(partition).filter(|owned| owned.epoch == epoch) else { return };
        let now = Instant::now();
        for record in records {
            owned.blocks.push(record, now);
        }
    }

    /// Drops what is buffered: its new owner reads it again. An attempt in flight is awaited, but not repeated.
    fn forget(&mut self, partition: &Partition) {
        if let Some(owned) = self.owned.remove(partition) {
            owned.patience.cancel();
        }
    }

    fn inserted(&mut self, inserted: Inserted) {
        let Inserted { block, epoch, tally } = inserted;
        let (partition, next) = (block.partition.clone(), block.last() + 1);
        self.busy.remove(&partition);
        if let Some(owned) = self.owned.get_mut(&partition).filter(|owned| owned.epoch == epoch) {
            owned.in_flight -= block.bytes;
        }
        let Some(Tally { rows, invalid, skipped }) = tally else { return };
        tracing::debug!(block = %block.token(), rows, invalid, skipped, "stored");
        if invalid > 0 {
            tracing::warn!(block = %block.token(), invalid, "unreadable records: they are in dead_letters, reason invalid");
        }
        if self.may_commit(&partition, epoch) {
            self.stored.insert(partition, (epoch, next));
        }
    }

    /// Ours, or about to leave us in good order; not lost, and not assigned anew in the meantime.
    fn may_commit(&self, partition: &Partition, epoch: Epoch) -> bool {
        match self.owned.get(partition) {
            Some(owned) => owned.epoch == epoch,
            None => self.leaving.iter().any(|(partitions, _)| partitions.contains(partition)),
        }
    }

    async fn commit(&mut self) {
        if self.stored.is_empty() || self.commit_again.is_some_and(|again| again > Instant::now()) {
            return;
        }
        let offset = |(partition, (epoch, next)): (&Partition, &(Epoch, i64))| {
            (partition.clone(), *epoch, Committed { offset: *next, metadata: String::new() })
        };
        match self.reader.commit(self.stored.iter().map(offset).collect()).await {
            Ok(()) => {
                self.stored.clear();
                self.commit_again = None;
            }
            Err(error) => {
                tracing::warn!(%error, "stored, but not committed; tried again");
                self.stored.retain(|partition, _| self.owned.contains_key(partition));
                self.commit_again = (!self.stored.is_empty()).then(|| Instant::now() + COMMIT_AGAIN);
            }
        }
    }

    /// Lets revoked partitions go when nothing of them is in flight or waits for its commit.
    fn release(&mut self) {
        let (busy, stored) = (&self.busy, &self.stored);
        self.leaving.retain(|(partitions, _)| {
            partitions.iter().any(|partition| busy.contains_key(partition) || stored.contains_key(partition))
        });
    }

    fn start_inserts(&mut self) {
        let now = Instant::now();
        while self.inserts.len() < INSERTS_MAX {
            // The oldest first, so that no partition waits for ever behind busier ones.
            let idle = self.owned.iter_mut().filter(|(partition, _)| !self.busy.contains_key(partition));
            let due = idle.filter_map(|(partition, owned)| owned.blocks.due().map(|due| (due, partition, owned)));
            let Some((due, partition, owned)) = due.min_by_key(|(due, ..)| *due) else { return };
            if due > now {
                return;
            }
            let Some(block) = owned.blocks.take(now) else { return };
            owned.in_flight += block.bytes;
            self.busy.insert(partition.clone(), owned.epoch);
            let (store, route, troubles) = (self.store.clone(), owned.route.clone(), self.troubles.clone());
            let (epoch, patience) = (owned.epoch, owned.patience.clone());
            self.inserts.spawn(async move {
                let tally = patience::insert(&*store, &block, &route, &troubles, &patience).await;
                Inserted { block, epoch, tally }
            });
        }
    }

    /// Pauses partitions that hold too much, and lets them flow again when they hold little: a pause costs what
    /// Kafka's client has read ahead, so not at every block.
    fn balance(&mut self) {
        let total: usize = self.owned.values().map(Owned::bytes).sum();
        let share = self.memory / self.owned.len().max(1);
        let (most, crowded) = (self.limits.bytes.saturating_mul(2), total >= self.memory);
        for (partition, owned) in &mut self.owned {
            let bytes = owned.bytes();
            let full = bytes >= most || (crowded && bytes >= share);
            if full && !owned.paused {
                self.reader.pause(partition);
                owned.paused = true;
            } else if owned.paused && bytes <= most / 2 && (bytes <= share / 2 || total <= self.memory / 2) {
                self.reader.resume(partition);
                owned.paused = false;
            }
        }
    }

    /// Stores and commits what has been read, as far as ClickHouse takes it at the first offer.
    async fn finish(mut self) -> Result<(), SinkError> {
        self.patience.cancel();
        for owned in self.owned.values_mut() {
            owned.blocks.seal();
        }
        timeout(STOP_WITHIN, self.flush()).await.unwrap_or_else(|_| {
            tracing::warn!("stopped before everything that was read is stored; it will be read again");
            Ok(())
        })
    }

    async fn flush(&mut self) -> Result<(), SinkError> {
        self.start_inserts();
        while let Some(inserted) = self.inserts.join_next().await {
            let inserted = inserted?;
            if inserted.tally.is_none() {
                // What follows in this partition must not be committed over a gap.
                self.owned.remove(&inserted.block.partition);
            }
            self.inserted(inserted);
            self.commit().await;
            self.start_inserts();
        }
        self.commit_again = None;
        self.commit().await;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
