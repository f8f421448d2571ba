//! Membership in a consumer group: one thread polls, answers rebalances and commits.
//!
//! A revoked partition is let go only after the stage has answered (or its deadline has passed) *and* no
//! commit is under way; meanwhile the thread goes on serving the stage's commands, else both would wait for
//! each other.

mod poll;
mod trouble;

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel},
    },
    time::Duration,
};

use rdkafka::{
    ClientContext, Offset, TopicPartitionList,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext},
    error::KafkaError,
    types::RDKafkaRespErr,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use tracing::{debug, info, warn};

use super::{
    Assignment, Committed, Epoch, Event, Handover, Membership, Offsets, Partition, ReadError, Reader, WriteError,
    client::Config,
    native::{offset_list, partitions},
};

/// The most records that one poll gathers before they are handed over.
const GATHER: usize = 500;
/// How long a poll waits for the first record; also how long a command may wait.
const POLL: Duration = Duration::from_millis(5);
/// How many events may wait for the stage. When it is full the thread polls no further.
const EVENTS: usize = 64;
/// How many bytes of records may wait for the stage, about: 64 events of 500 records with their headers would be 60 MB.
const AHEAD: usize = 4 * 1024 * 1024;
/// How long one question to the broker may take before it is asked again.
const ASK: Duration = Duration::from_secs(5);

/// What to read, as whom.
#[derive(Clone, Debug)]
pub struct GroupConfig {
    /// The consumer group.
    pub group: String,
    /// This member's stable name (`group.instance.id`).
    pub instance: String,
    /// The topics.
    pub topics: Vec<String>,
    /// How long a stage may take to finish what is in flight of a revoked partition.
    pub drain: Duration,
}

enum Command {
    Pause(Partition),
    Resume(Partition),
    Commit(Offsets, oneshot::Sender<Result<Vec<Partition>, WriteError>>),
}

/// A [`Reader`] on Kafka.
pub struct KafkaReader {
    events: mpsc::Receiver<Result<Event, ReadError>>,
    commands: SyncSender<Command>,
    membership: Membership,
    group: String,
    ahead: Arc<AtomicUsize>,
}

impl KafkaReader {
    /// Joins the group on a thread of its own. Does not wait for a broker: as long as none answers there are
    /// no events.
    ///
    /// # Errors
    /// [`ReadError::Failed`] if the configuration is refused.
    pub fn open(config: &Config, group: GroupConfig) -> Result<Self, ReadError> {
        Self::start(config, group, None)
    }

    /// The same, with only these headers of each record.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_for(config: &Config, group: GroupConfig, headers: &'static [&'static str]) -> Result<Self, ReadError> {
        Self::start(config, group, Some(headers))
    }

    fn start(config: &Config, group: GroupConfig, headers: Option<&'static [&'static str]>) -> Result<Self, ReadError> {
        let (events, inbox) = mpsc::channel(EVENTS);
        let (commands, orders) = sync_channel(1_024);
        let membership = Membership::new();
        let failed =
            |reason: String| ReadError::Failed { topics: group.topics.join(", "), group: group.group.clone(), reason };
        let shared = Shared {
            is_over: false,
            told_at: None,
            pending: VecDeque::new(),
            orders,
            next_epoch: 0,
            begun_at: HashMap::new(),
        };
        let ahead = Arc::new(AtomicUsize::new(0));
        let context = Context {
            group: group.clone(),
            headers,
            membership: membership.clone(),
            events,
            ahead: Arc::clone(&ahead),
            shared: Mutex::new(shared),
        };
        let consumer: BaseConsumer<Context> = config
            .consumer(&group.group, &group.instance)
            .create_with_context(context)
            .map_err(|error| failed(format!("making a consumer: {error}")))?;
        let topics: Vec<&str> = group.topics.iter().map(String::as_str).collect();
        consumer.subscribe(&topics).map_err(|error| failed(format!("subscribing: {error}")))?;
        let consumer = Arc::new(consumer);
        membership.belongs_to(&consumer);
        std::thread::Builder::new()
            .name(format!("read {}", group.group))
            .spawn(move || poll::poll_until_dropped(consumer))
            .map_err(|error| failed(format!("starting its thread: {error}")))?;
        Ok(Self { events: inbox, commands, membership, group: group.group, ahead })
    }

    fn command(&self, command: Command) {
        // The thread serves commands at least every few milliseconds; a full queue means that it is gone or
        // stuck, and then `next` reports it.
        if self.commands.try_send(command).is_err() {
            debug!(group = self.group, "the reader's thread takes no commands");
        }
    }
}

impl Reader for KafkaReader {
    async fn next(&mut self) -> Result<Event, ReadError> {
        let ended = || ReadError::Failed {
            topics: "its topics".to_owned(),
            group: self.group.clone(),
            reason: "the reader's thread has ended".to_owned(),
        };
        let event = self.events.recv().await.ok_or_else(ended)??;
        self.ahead.fetch_sub(event.footprint(), Ordering::Relaxed);
        if let Event::Assigned(assignments) = &event {
            // A pause that the stage asked for under an earlier assignment may have come after this one began.
            for assignment in assignments {
                self.resume(&assignment.partition);
            }
        }
        Ok(event)
    }

    fn pause(&self, partition: &Partition) {
        self.command(Command::Pause(partition.clone()));
    }

    fn resume(&self, partition: &Partition) {
        self.command(Command::Resume(partition.clone()));
    }

    fn membership(&self) -> Membership {
        self.membership.clone()
    }

    async fn commit(&self, offsets: Offsets) -> Result<Vec<Partition>, WriteError> {
        let (answer, end) = oneshot::channel();
        self.command(Command::Commit(offsets, answer));
        let ended =
            |_| WriteError::Commit { group: self.group.clone(), reason: "the reader's thread has ended".into() };
        end.await.map_err(ended)?
    }
}

/// What the polling loop and the rebalance callback share; both run on the reader's thread.
struct Shared {
    /// Set when this consumer is of no more use.
    is_over: bool,
    /// When trouble with the brokers was last told.
    told_at: Option<Instant>,
    /// Events on their way to the stage, in order.
    pending: VecDeque<Result<Event, ReadError>>,
    orders: Receiver<Command>,
    next_epoch: u64,
    /// Where reading of each assigned partition began, if that was an offset.
    begun_at: HashMap<Partition, i64>,
}

/// Whether the stage still listens.
#[derive(PartialEq, Eq)]
enum Stage {
    Listening,
    Gone,
}

/// The consumer's callbacks.
pub(super) struct Context {
    group: GroupConfig,
    /// Which headers are wanted; `None`: all.
    headers: Option<&'static [&'static str]>,
    membership: Membership,
    events: mpsc::Sender<Result<Event, ReadError>>,
    /// Bytes of records that have been handed over, and that the stage has not taken yet.
    ahead: Arc<AtomicUsize>,
    shared: Mutex<Shared>,
}

impl ClientContext for Context {
    fn log(&self, _: RDKafkaLogLevel, facility: &str, message: &str) {
        debug!(target: "librdkafka", facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.tell(&error, reason);
    }
}

impl ConsumerContext for Context {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, what: RDKafkaRespErr, list: &mut TopicPartitionList) {
        if what == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS {
            self.assign(consumer, list);
        } else {
            self.revoke(consumer, list);
        }
    }
}

impl Context {
    fn assign(&self, consumer: &BaseConsumer<Self>, list: &TopicPartitionList) {
        let result = self.read_commits(consumer, list).and_then(|(assignments, start, gone)| {
            consumer.incremental_assign(&start).map_err(|error| self.failed(format!("assigning: {error}")))?;
            Ok((assignments, gone))
        });
        match result {
            Ok((assignments, _)) if assignments.is_empty() => {}
            Ok((assignments, gone)) => {
                info!(group = self.group.group, partitions = ?names(&assignments), "partitions are ours now");
                for assignment in &assignments {
                    self.membership.add(assignment.partition.clone(), assignment.epoch);
                }
                self.push(Ok(Event::Assigned(assignments)));
                for event in gone {
                    self.push(Ok(event));
                }
            }
            Err(error) => self.push(Err(error)),
        }
    }

    /// What the group has committed for these partitions, and so where reading begins. Offset and metadata
    /// come from one answer of the broker.
    fn read_commits(
        &self,
        consumer: &BaseConsumer<Self>,
        list: &TopicPartitionList,
    ) -> Result<(Vec<Assignment>, TopicPartitionList, Vec<Event>), ReadError> {
        let mut start = TopicPartitionList::new();
        let (mut assignments, mut gone) = (Vec::new(), Vec::new());
        if list.count() == 0 {
            return Ok((assignments, start, gone));
        }
        // With read_committed the broker answers only when no transaction is open on these offsets.
        let commits = self.insist("reading committed offsets", || consumer.committed_offsets(list.clone(), ASK))?;
        for element in commits.elements() {
            let partition = Partition { topic: element.topic().into(), number: element.partition() };
            let epoch = self.new_epoch();
            // An error of this partition alone looks like a group that never committed, and would do all again.
            element.error().map_err(|error| self.failed(format!("reading the commit of {partition}: {error}")))?;
            self.shared().begun_at.remove(&partition);
            let (committed, from) = match element.offset() {
                Offset::Offset(offset) => {
                    let (low, _) = self.insist("reading the first offset", || {
                        consumer.fetch_watermarks(&partition.topic, partition.number, ASK)
                    })?;
                    if low > offset {
                        gone.push(Event::Gone { partition: partition.clone(), epoch, range: offset..low });
                    }
                    self.shared().begun_at.insert(partition.clone(), offset.max(low));
                    let committed = Committed { offset, metadata: element.metadata().to_owned() };
                    (Some(committed), Offset::Offset(offset.max(low)))
                }
                // Never committed: the group's first start.
                Offset::Beginning | Offset::End | Offset::Stored | Offset::Invalid | Offset::OffsetTail(_) => {
                    (None, Offset::Beginning)
                }
            };
            start
                .add_partition_offset(&partition.topic, partition.number, from)
                .map_err(|error| self.failed(format!("offset of {partition}: {error}")))?;
            assignments.push(Assignment { partition, epoch, committed });
        }
        Ok((assignments, start, gone))
    }

    /// Asks again until the brokers answer: there is nothing else to do without an assignment's offsets.
    fn insist<T>(&self, what: &str, ask: impl Fn() -> Result<T, KafkaError>) -> Result<T, ReadError> {
        loop {
            match ask() {
                Ok(answer) => return Ok(answer),
                Err(error) if self.events.is_closed() => return Err(self.failed(format!("{what}: {error}"))),
                Err(error) => warn!(group = self.group.group, %error, "{what}; asking again"),
            }
        }
    }

    fn revoke(&self, consumer: &BaseConsumer<Self>, list: &TopicPartitionList) {
        let partitions = partitions(list);
        if consumer.assignment_lost() {
            warn!(group = self.group.group, ?partitions, "partitions were lost to another member");
            self.push(Ok(Event::Lost(partitions.clone())));
            // After an outage or a stall beyond the session a new consumer is on firmer ground than this one.
            self.push(Err(self.failed("the group has given up on us: no sign of life within a session".to_owned())));
            self.shared().is_over = true;
        } else if !partitions.is_empty() {
            info!(group = self.group.group, ?partitions, "partitions go to another member");
            self.hand_over(consumer, &partitions);
        }
        // Waits for a commit under way: a late one would move the new owner's ledger back.
        self.membership.remove(&partitions);
        if let Err(error) = consumer.incremental_unassign(list) {
            self.push(Err(self.failed(format!("giving up partitions: {error}"))));
        }
    }

    /// Waits for the stage to finish what is in flight, serving its commands meanwhile.
    fn hand_over(&self, consumer: &BaseConsumer<Self>, partitions: &[Partition]) {
        let (answer, mut done) = oneshot::channel();
        self.push(Ok(Event::Revoked(partitions.to_vec(), Handover(Some(answer)))));
        let deadline = Instant::now() + self.group.drain;
        while Instant::now() < deadline {
            // A stage that has ended, as at a stop, has said itself what it left.
            if self.flush() == Stage::Gone {
                return;
            }
            match done.try_recv() {
                Err(oneshot::error::TryRecvError::Empty) => self.serve_for(consumer, POLL),
                Ok(()) | Err(oneshot::error::TryRecvError::Closed) => return,
            }
        }
        warn!(group = self.group.group, ?partitions, "let go with work in flight: it will be done again");
        self.push(Ok(Event::Lost(partitions.to_vec())));
    }

    fn push(&self, event: Result<Event, ReadError>) {
        self.shared().pending.push_back(event);
    }

    /// Hands pending events to the stage, as many as it takes now.
    fn flush(&self) -> Stage {
        let mut shared = self.shared();
        while let Some(event) = shared.pending.pop_front() {
            let bytes = event.as_ref().map_or(0, Event::footprint);
            if bytes > 0 && self.ahead.load(Ordering::Relaxed) > AHEAD && !self.events.is_closed() {
                shared.pending.push_front(event);
                break;
            }
            self.ahead.fetch_add(bytes, Ordering::Relaxed);
            match self.events.try_send(event) {
                Ok(()) => {}
                Err(mpsc::error::TrySendError::Full(event)) => {
                    self.ahead.fetch_sub(bytes, Ordering::Relaxed);
                    shared.pending.push_front(event);
                    break;
                }
                Err(mpsc::error::TrySendError::Closed(_)) => return Stage::Gone,
            }
        }
        if self.events.is_closed() { Stage::Gone } else { Stage::Listening }
    }

    /// Serves the commands that have come, without waiting.
    fn serve(&self, consumer: &BaseConsumer<Self>) {
        loop {
            let order = self.shared().orders.try_recv();
            match order {
                Ok(command) => self.obey(consumer, command),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return,
            }
        }
    }

    /// Waits for a command for a while, and serves what has come.
    fn serve_for(&self, consumer: &BaseConsumer<Self>, wait: Duration) {
        let order = self.shared().orders.recv_timeout(wait);
        match order {
            Ok(command) => self.obey(consumer, command),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
        self.serve(consumer);
    }

    fn obey(&self, consumer: &BaseConsumer<Self>, command: Command) {
        let of = |partition: &Partition| {
            let mut list = TopicPartitionList::new();
            list.add_partition(&partition.topic, partition.number);
            list
        };
        let result = match &command {
            // Pausing what is not assigned can wedge a consumer (micronaut-kafka#610).
            Command::Pause(partition) | Command::Resume(partition) if self.membership.epoch(partition).is_none() => {
                Ok(())
            }
            Command::Pause(partition) => consumer.pause(&of(partition)),
            Command::Resume(partition) => consumer.resume(&of(partition)),
            Command::Commit(..) => Ok(()),
        };
        if let Err(error) = result {
            warn!(group = self.group.group, %error, "pausing or resuming a partition");
        }
        if let Command::Commit(offsets, answer) = command {
            let _ = answer.send(self.commit(consumer, offsets));
        }
    }

    fn commit(&self, consumer: &BaseConsumer<Self>, mut offsets: Offsets) -> Result<Vec<Partition>, WriteError> {
        offsets.retain(|(partition, epoch, _)| self.membership.epoch(partition) == Some(*epoch));
        if offsets.is_empty() {
            return Ok(Vec::new());
        }
        let refused = |reason: String| WriteError::Commit { group: self.group.group.clone(), reason };
        let list = offset_list(&offsets).map_err(|error| refused(error.to_string()))?;
        consumer.commit(&list, CommitMode::Sync).map_err(|error| refused(error.to_string()))?;
        Ok(offsets.into_iter().map(|(partition, ..)| partition).collect())
    }

    fn new_epoch(&self) -> Epoch {
        let mut shared = self.shared();
        shared.next_epoch += 1;
        Epoch(shared.next_epoch)
    }

    fn shared(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, reason: String) -> ReadError {
        ReadError::Failed { topics: self.group.topics.join(", "), group: self.group.group.clone(), reason }
    }
}

fn names(assignments: &[Assignment]) -> Vec<&Partition> {
    assignments.iter().map(|assignment| &assignment.partition).collect()
}
