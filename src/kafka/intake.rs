//! A stage's consumer and producer as one: records in, outcomes out, each exactly once.
//!
//! Drives a [`Reader`], a [`Writer`] and the [`Outbox`] between them, so that a stage only processes records, in any
//! order, and completes each with its outcome. It runs at most one transaction at a time, not more often than
//! `commit_every`, and answers rebalances.

use std::{collections::HashSet, ops::Range, pin::Pin, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tracing::{debug, error, warn};

use super::{
    Event, Handover, Instead, Outgoing, Partition, ReadError, Reader, Record, TransactError, Writer,
    client::SESSION_TIMEOUT,
    kept::{Answer, Kept, Print},
    ledger::{Admit, LedgerError},
    outbox::{Outbox, Position, PublishId, Risk},
};
use crate::runtime::clock::Clock;
use crate::runtime::metrics::METRICS;

/// What [`Intake::next`] returns to a stage.
#[derive(Debug)]
pub enum Input {
    /// Records to process. Each has to be ended by [`Intake::complete`] or [`Intake::give_up`].
    Records(Vec<(Position, Record)>),
    /// A transaction has ended: there may be room for more outcomes, and the window may have moved.
    Settled,
    /// These partitions are being revoked: give up records not started, finish those in progress.
    Leaving(Vec<Partition>),
    /// These partitions are revoked: outcomes for them are ignored from now on.
    Left(Vec<Partition>),
}

/// Why a stage cannot go on. Its supervisor starts it again from the last commit, unless it is fenced.
#[derive(Debug, thiserror::Error)]
pub enum IntakeError {
    /// Reading ended.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Writing ended.
    #[error(transparent)]
    Transact(#[from] TransactError),
}

impl IntakeError {
    /// Whether another process has this instance's name: then a restart would only fence the other in turn.
    #[must_use]
    pub fn is_fenced(&self) -> bool {
        match self {
            Self::Read(ReadError::Fenced { .. }) | Self::Transact(TransactError::Fenced { .. }) => true,
            Self::Read(ReadError::Ledger { .. } | ReadError::Failed { .. })
            | Self::Transact(TransactError::Aborted(_) | TransactError::TooLarge(_) | TransactError::Rebuild(_)) => {
                false
            }
        }
    }
}

/// How long an orderly stop waits for Kafka.
const FLUSH_WITHIN: Duration = Duration::from_secs(10);

type Transaction = Pin<Box<dyn Future<Output = Result<(), TransactError>> + Send>>;

/// Records in, outcomes out.
pub struct Intake<R, W> {
    reader: R,
    writer: Arc<W>,
    outbox: Outbox,
    instead: Instead,
    clock: Clock,
    commit_every: Duration,
    next_commit_at: Instant,
    /// Consecutive aborted transactions: the next one waits longer each time.
    rolled_back: u32,
    transaction: Option<Transaction>,
    /// Partitions that another member waits for; a group of several sets of topics can ask for each of them.
    handovers: Vec<(Vec<Partition>, Handover)>,
    paused: HashSet<Partition>,
    owned: HashSet<Partition>,
    /// How many transactions have been committed.
    commits: u64,
    /// The brokers take no more of this producer; until when the group is listened to for the reason.
    fenced: Option<(TransactError, Instant)>,
}

impl<R: Reader, W: Writer> Intake<R, W> {
    /// Begins to read; transactions are at least `commit_every` apart. What is too large for its topic ends as `instead`
    /// says, at the time of `clock`.
    pub fn new(reader: R, writer: W, commit_every: Duration, instead: Instead, clock: Clock) -> Self {
        Self {
            reader,
            writer: Arc::new(writer),
            outbox: Outbox::default(),
            instead,
            clock,
            commit_every,
            next_commit_at: Instant::now(),
            rolled_back: 0,
            transaction: None,
            handovers: Vec::new(),
            paused: HashSet::new(),
            owned: HashSet::new(),
            commits: 0,
            fenced: None,
        }
    }

    /// The next thing to deal with; commits what has been completed meanwhile.
    ///
    /// # Cancellation
    /// Safe: nothing is lost by dropping the future.
    ///
    /// # Errors
    /// [`IntakeError`]; then the stage has to start again from what is committed.
    pub async fn next(&mut self) -> Result<Input, IntakeError> {
        loop {
            if self.fenced.is_some() {
                return Err(self.why_fenced().await);
            }
            if let Some(left) = self.settle_handover() {
                return Ok(Input::Left(left));
            }
            self.begin_when_due();
            let commit_is_due = self.transaction.is_none() && self.outbox.has_waiting();
            tokio::select! {
                biased;
                result = under_way(&mut self.transaction) => {
                    self.end_transaction(result)?;
                    return Ok(Input::Settled);
                }
                () = sleep_until(self.next_commit_at), if commit_is_due => {}
                event = self.reader.next() => if let Some(input) = self.handle(event?)? {
                    return Ok(input);
                },
            }
        }
    }

    /// The same with what was kept of an earlier life of the stage, and keeping what this one does not commit.
    #[must_use]
    pub fn keeping(self, kept: Kept) -> Self {
        Self { outbox: Outbox::keeping(kept), ..self }
    }

    /// A record has its outcome without a call: `records` become visible together with its offset.
    pub fn complete(&mut self, position: Position, records: Vec<Outgoing>) {
        self.outbox.complete(position, Answer { records, calls: 0, since: Instant::now() });
    }

    /// The same for one that was called for.
    pub fn complete_with(&mut self, position: Position, answer: Answer) {
        self.outbox.complete(position, answer);
    }

    /// Writes `records` for a record that is still worked on, without ending it, see [`Outbox::publish`]: it has to be
    /// completed or given up all the same. `None`: nothing is written, the record is not worked on here any more.
    pub fn publish(&mut self, position: &Position, records: Vec<Outgoing>) -> Option<PublishId> {
        self.outbox.publish(position, records)
    }

    /// Whether that is committed. It changes with [`Input::Settled`].
    #[must_use]
    pub fn is_published(&self, id: PublishId) -> bool {
        self.outbox.is_published(id)
    }

    /// What a record came to in an earlier life of the stage, see [`Kept`]: it is to be completed with that.
    #[must_use]
    pub fn kept(&self, position: &Position) -> Option<Answer> {
        self.outbox.kept(position, Instant::now())
    }

    /// Gives up a record that has come to something already: that is kept in case the record comes back.
    pub fn give_up_with(&mut self, position: Position, answer: Answer) {
        self.outbox.give_up_with(position, answer);
    }

    /// The stage ends by an error: whatever is not committed is kept for its next life.
    pub fn keep_all(&mut self) {
        self.outbox.keep_all();
    }

    /// Calls whose outcomes are not committed yet.
    #[must_use]
    pub fn risk(&self) -> Risk {
        self.outbox.risk()
    }

    /// How many transactions have been committed.
    #[must_use]
    pub fn commits(&self) -> u64 {
        self.commits
    }

    /// Gives up a record: the next owner of its partition reads it again.
    pub fn give_up(&mut self, position: &Position) {
        self.outbox.give_up(position);
    }

    /// Whether work on a record may begin, see [`Outbox::may_start`].
    #[must_use]
    pub fn may_start(&self, position: &Position) -> bool {
        self.outbox.may_start(position)
    }

    /// Whether the assignment under which a record was read goes on.
    #[must_use]
    pub fn is_current(&self, position: &Position) -> bool {
        self.outbox.is_current(position)
    }

    /// Bytes of outcomes that are not committed yet.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.outbox.bytes()
    }

    /// How many partitions of this topic are assigned to this process.
    #[must_use]
    pub fn partitions_of(&self, topic: &str) -> usize {
        self.owned.iter().filter(|partition| *partition.topic == *topic).count()
    }

    /// How many partitions are assigned to this process.
    #[must_use]
    pub fn partitions(&self) -> usize {
        self.owned.len()
    }

    /// Resumes or pauses a partition. Cheap to repeat.
    pub fn set_flowing(&mut self, partition: &Partition, flowing: bool) {
        if flowing && self.paused.remove(partition) {
            self.reader.resume(partition);
        } else if !flowing && self.owned.contains(partition) && self.paused.insert(partition.clone()) {
            self.reader.pause(partition);
        }
    }

    /// Commits all that is completed, for an orderly stop, unless Kafka does not answer for long. Records that
    /// come meanwhile are given up.
    ///
    /// # Errors
    /// [`IntakeError`]; what was not committed is done again after the next start.
    pub async fn flush(&mut self) -> Result<(), IntakeError> {
        timeout(FLUSH_WITHIN, self.commit_all()).await.unwrap_or_else(|_| {
            let calls = self.outbox.risk().calls;
            warn!(
                calls,
                "stopped before all outcomes were committed: Kafka does not answer; {calls} calls will be made again"
            );
            Ok(())
        })
    }

    async fn commit_all(&mut self) -> Result<(), IntakeError> {
        self.next_commit_at = Instant::now();
        while self.transaction.is_some() || self.outbox.has_waiting() {
            if self.fenced.is_some() {
                return Err(self.why_fenced().await);
            }
            self.begin_when_due();
            tokio::select! {
                biased;
                result = under_way(&mut self.transaction) => {
                    self.next_commit_at = Instant::now();
                    self.end_transaction(result)?;
                }
                () = sleep_until(self.next_commit_at), if self.transaction.is_none() => {}
                event = self.reader.next() => if let Some(Input::Records(records)) = self.handle(event?)? {
                    for (position, _) in &records {
                        self.give_up(position);
                    }
                },
            }
            while self.settle_handover().is_some() {}
        }
        Ok(())
    }

    fn begin_when_due(&mut self) {
        let now = Instant::now();
        if self.transaction.is_some() || now < self.next_commit_at {
            return;
        }
        if let Some(batch) = self.outbox.begin() {
            self.next_commit_at = now + self.commit_every;
            let (writer, membership) = (Arc::clone(&self.writer), self.reader.membership());
            self.transaction =
                Some(Box::pin(async move { writer.transact(batch.records, membership, batch.offsets).await }));
        }
    }

    fn end_transaction(&mut self, result: Result<(), TransactError>) -> Result<(), IntakeError> {
        self.transaction = None;
        match result {
            Ok(()) => {
                self.rolled_back = 0;
                self.commits += 1;
                self.outbox.committed();
            }
            Err(TransactError::Aborted(reason)) => {
                debug!(reason, "transaction aborted; sending the outcomes again");
                self.outbox.rolled_back();
                // At first soon, since a rebalance is a common reason; later up to a few seconds apart.
                self.next_commit_at = Instant::now() + self.commit_every * (1 << self.rolled_back.min(6));
                self.rolled_back += 1;
            }
            Err(TransactError::TooLarge(all)) => {
                let now = self.clock.now();
                for record in &all {
                    error!(%record, "a record is too large for Kafka; writing a dead letter instead");
                    self.outbox
                        .replace(record.index, |outgoing, origin| self.instead.of(outgoing, origin, record, now))?;
                }
                self.outbox.rolled_back();
                self.next_commit_at = Instant::now();
            }
            // Whoever waits for the next input may stop waiting at any time: the reason is looked for by the next call.
            Err(error @ TransactError::Fenced { .. }) => {
                self.fenced = Some((error, Instant::now() + SESSION_TIMEOUT));
            }
            Err(error @ TransactError::Rebuild(_)) => return Err(error.into()),
        }
        Ok(())
    }

    /// Whether another process has our name, or only a transaction was open for longer than the brokers allow:
    /// after an outage or a stall they fence its producer just the same. Another process would have taken our
    /// place in the group as well, and the group tells within a session.
    async fn why_fenced(&mut self) -> IntakeError {
        let deadline = self.fenced.as_ref().map_or_else(Instant::now, |(_, deadline)| *deadline);
        while let Ok(event) = timeout_at(deadline, self.reader.next()).await {
            if let Err(error) = event {
                return error.into();
            }
        }
        let reason = self.fenced.as_ref().map(|(error, _)| error.to_string()).unwrap_or_default();
        TransactError::Rebuild(format!("a transaction was open for too long ({reason})")).into()
    }

    fn handle(&mut self, event: Event) -> Result<Option<Input>, IntakeError> {
        match event {
            Event::Assigned(assignments) => {
                for assignment in assignments {
                    let partition = &assignment.partition;
                    self.outbox.assign(&assignment).map_err(|error| ledger_error(partition, &error))?;
                    self.paused.remove(partition);
                    self.owned.insert(partition.clone());
                }
                Ok(None)
            }
            Event::Records { partition, epoch, records } => {
                let position = |offset| Position { partition: partition.clone(), epoch, offset };
                let read = records.into_iter().map(|record| (position(record.offset), record));
                let is_new = |(position, record): &(Position, Record)| {
                    self.outbox.admit(position, Print::of(record)) == Admit::New
                };
                let new: Vec<_> = read.filter(is_new).collect();
                Ok((!new.is_empty()).then_some(Input::Records(new)))
            }
            Event::Gone { partition, epoch, range } => {
                METRICS.deleted_unread(&partition.topic, &range);
                let Range { start, end } = range;
                error!(%partition, start, end, "records were deleted by retention before they were read; requests among them have no outcome: `weir verify` names them, `weir verify --end-lost` ends them");
                self.outbox.gone(&partition, epoch, end);
                Ok(None)
            }
            Event::Revoked(partitions, handover) => {
                self.handovers.push((partitions.clone(), handover));
                Ok(Some(Input::Leaving(partitions)))
            }
            Event::Lost(partitions) => {
                // Perhaps after a revocation whose deadline has passed: then nobody waits any more.
                self.handovers.retain(|(leaving, _)| leaving.iter().any(|partition| !partitions.contains(partition)));
                self.forget(&partitions);
                Ok(Some(Input::Left(partitions)))
            }
        }
    }

    /// Lets revoked partitions go as soon as nothing of them is open or uncommitted.
    fn settle_handover(&mut self) -> Option<Vec<Partition>> {
        let is_settled = |(partitions, _): &(Vec<Partition>, _)| {
            partitions.iter().all(|partition| self.outbox.is_settled(partition))
        };
        let settled = self.handovers.iter().position(is_settled)?;
        let (partitions, handover) = self.handovers.swap_remove(settled);
        self.forget(&partitions);
        drop(handover);
        Some(partitions)
    }

    fn forget(&mut self, partitions: &[Partition]) {
        for partition in partitions {
            self.outbox.forget(partition);
            self.paused.remove(partition);
            self.owned.remove(partition);
        }
    }
}

/// The end of the transaction under way; never if there is none.
async fn under_way(transaction: &mut Option<Transaction>) -> Result<(), TransactError> {
    match transaction {
        Some(transaction) => transaction.await,
        None => std::future::pending().await,
    }
}

fn ledger_error(partition: &Partition, error: &LedgerError) -> ReadError {
    ReadError::Ledger { partition: partition.clone(), reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{
        kafka::scripted::{Log, assigned, partition, records},
        runtime::clock::Timestamp,
    };

    #[tokio::test(start_paused = true)]
    async fn what_is_published_is_on_the_log_while_its_record_is_still_worked_on() {
        let log = Log::default();
        let (events, reader) = log.reader();
        let (instead, clock) = (Instead::new("dead", "w"), Clock::simulated(Timestamp::from_millis(0)));
        let mut intake = Intake::new(reader, log.clone(), Duration::from_millis(50), instead, clock);
        events.send(assigned()).unwrap();
        events.send(records(0, [Bytes::from_static(b"1")])).unwrap();
        let Input::Records(read) = intake.next().await.unwrap() else { panic!("a record was sent") };
        let (position, _) = read.into_iter().next().unwrap();
        let record =
            |value| Outgoing { topic: "t".into(), key: None, value: Bytes::from_static(value), headers: vec![] };
        let id = intake.publish(&position, vec![record(b"intent")]).unwrap();
        assert!(!intake.is_published(id));
        let seen = || {
            let world = log.world();
            (world.records.clone(), world.committed.get(&partition()).map(|committed| committed.offset))
        };
        let Input::Settled = intake.next().await.unwrap() else { panic!("nothing else happens") };
        assert!(intake.is_published(id));
        assert_eq!(seen(), (vec![record(b"intent")], Some(0)));
        intake.complete(position, vec![record(b"end")]);
        let Input::Settled = intake.next().await.unwrap() else { panic!("nothing else happens") };
        assert_eq!(seen(), (vec![record(b"intent"), record(b"end")], Some(1)));
    }
}
