//! For tests of the stages: a reader that says what it is told to, and a writer that keeps what it is given.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::{
    Assignment, Committed, Epoch, Event, Membership, Offsets, Outgoing, Partition, ReadError, Reader, Record,
    TransactError, WriteError, Writer,
    oversized::{Limit, TooLarge},
};
use crate::runtime::clock::Timestamp;

/// What has become visible, and how the world treats the stage.
#[derive(Default)]
pub(crate) struct World {
    pub records: Vec<Outgoing>,
    pub committed: HashMap<Partition, Committed>,
    /// Every commit without a transaction, in order.
    pub commits: Vec<(Partition, Epoch, Committed)>,
    pub paused: Vec<Partition>,
    /// The most bytes of a record that is taken.
    pub record_limit: Option<usize>,
    /// Transactions do not end until this is over.
    pub is_away: bool,
    /// How the next transactions fail, the first first.
    pub failing: VecDeque<TransactError>,
    /// Commits without a transaction are refused.
    pub refuses_commits: bool,
    /// Whose commits are taken; those of a partition that is not here are taken from anybody.
    pub epochs: HashMap<Partition, Epoch>,
}

impl World {
    fn takes(&self, partition: &Partition, epoch: Epoch) -> bool {
        self.epochs.get(partition).is_none_or(|owner| *owner == epoch)
    }
}

#[derive(Clone, Default)]
pub(crate) struct Log(Arc<Mutex<World>>);

impl Log {
    pub fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap()
    }

    /// A reader on this log, and where its events come from.
    pub fn reader(&self) -> (mpsc::UnboundedSender<Event>, Scripted) {
        #[allow(clippy::disallowed_methods, reason = "a test's script is as long as the test")]
        let (sender, events) = mpsc::unbounded_channel();
        (sender, Scripted { events, log: self.clone() })
    }
}

pub(crate) struct Scripted {
    events: mpsc::UnboundedReceiver<Event>,
    log: Log,
}

impl Reader for Scripted {
    async fn next(&mut self) -> Result<Event, ReadError> {
        match self.events.recv().await {
            Some(event) => Ok(event),
            None => std::future::pending().await,
        }
    }
    fn pause(&self, partition: &Partition) {
        self.log.world().paused.push(partition.clone());
    }
    fn resume(&self, partition: &Partition) {
        self.log.world().paused.retain(|paused| paused != partition);
    }
    fn membership(&self) -> Membership {
        Membership::new()
    }
    async fn commit(&self, offsets: Offsets) -> Result<Vec<Partition>, WriteError> {
        let mut world = self.log.world();
        if world.refuses_commits {
            return Err(WriteError::Commit { group: "g".to_owned(), reason: "rebalance".to_owned() });
        }
        let mut taken = Vec::new();
        for (partition, epoch, committed) in offsets {
            if world.takes(&partition, epoch) {
                taken.push(partition.clone());
                world.committed.insert(partition.clone(), committed.clone());
                world.commits.push((partition, epoch, committed));
            }
        }
        Ok(taken)
    }
}

impl Writer for Log {
    async fn transact(&self, records: Vec<Outgoing>, _: Membership, offsets: Offsets) -> Result<(), TransactError> {
        while self.world().is_away {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        let mut world = self.world();
        if let Some(error) = world.failing.pop_front() {
            return Err(error);
        }
        if let Some((partition, ..)) = offsets.iter().find(|(partition, epoch, _)| !world.takes(partition, *epoch)) {
            return Err(TransactError::Aborted(format!("{partition} was revoked and belongs to another member")));
        }
        let is_too_large = |record: &Outgoing| world.record_limit.is_some_and(|limit| record.size() > limit);
        let too_large = records.iter().enumerate().filter(|(_, record)| is_too_large(record));
        let too_large = too_large.map(|(index, record)| {
            let (topic, size) = (Arc::clone(&record.topic), record.size());
            TooLarge { index, topic, size, limit: Limit::Topic(world.record_limit) }
        });
        let too_large: Vec<_> = too_large.collect();
        if !too_large.is_empty() {
            return Err(TransactError::TooLarge(too_large));
        }
        world.records.extend(records);
        world.committed.extend(offsets.into_iter().map(|(partition, _, committed)| (partition, committed)));
        Ok(())
    }
}

pub(crate) fn partition() -> Partition {
    Partition { topic: "t".into(), number: 0 }
}

/// The partition is assigned from its beginning.
pub(crate) fn assigned() -> Event {
    let committed = Some(Committed { offset: 0, metadata: String::new() });
    Event::Assigned(vec![Assignment { partition: partition(), epoch: Epoch(1), committed, log: None }])
}

/// Records of the partition, the first at `offset`.
pub(crate) fn records(offset: i64, values: impl IntoIterator<Item = Bytes>) -> Event {
    let record = |(offset, value)| Record {
        offset,
        time: Timestamp::from_millis(0),
        key: None,
        value: Some(value),
        headers: vec![],
        log: None,
    };
    let records = (offset..).zip(values).map(record).collect();
    Event::Records { partition: partition(), epoch: Epoch(1), records }
}
