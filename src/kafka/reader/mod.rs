//! Membership in a consumer group: one thread polls, answers rebalances and commits.
//!
//! A revoked partition is let go only after the stage has answered (or its deadline has passed) *and* no
//! commit is under way; meanwhile the thread goes on serving the stage's commands, else both would wait for
//! each other.

mod anew;
mod pausing;
mod poll;
mod trouble;

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread::Thread,
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

use self::pausing::{Pauses, Wanted};
use super::{
    Assignment, Committed, Event, Handover, Membership, Offsets, Partition, ReadError, Reader, WriteError,
    client::Config,
    commit_mark,
    log_names::Names,
    logs::Noting,
    native::{offset_list, partitions},
    topic_ids::{self, TopicIds},
};

/// The most records that one poll gathers before they are handed over.
const GATHER: usize = 500;
/// How long a poll waits for the first record; also how long a command may wait.
const POLL: Duration = Duration::from_millis(5);
/// How many events may wait for the stage. When it is full the thread polls no further.
const EVENTS: usize = 64;
/// How many bytes of records may wait for the stage, about: 64 events of 500 records with their headers would be 60 MB.
const AHEAD: usize = 4 * 1024 * 1024;
/// How many commits may wait for the thread; more wait for room.
const COMMITS: usize = 64;
/// How long a commit may take that partitions wait for which are to leave: longer than its writer lets it.
const COMMIT_WITHIN: Duration = Duration::from_secs(30);
/// How long one question to the broker may take before it is asked again.
const ASK: Duration = Duration::from_secs(5);

/// What to read, as whom.
#[derive(Clone, Debug)]
pub struct GroupConfig {
    /// The consumer group.
    pub group: String,
    /// This process's stable name in it (`group.instance.id`).
    pub instance: String,
    /// The topics, in sets: the partitions of each set are spread evenly over the group by themselves.
    ///
    /// For each set the process has a member of its own in the same group, and the sets of all processes of a group
    /// should be the same. librdkafka's only cooperative strategy counts partitions without regard to their topics:
    /// with two topics in one subscription a joiner gets all of one and nothing of the other.
    pub topics: Vec<Vec<String>>,
    /// How long a stage may take to finish what is in flight of a revoked partition.
    pub drain: Duration,
}

impl GroupConfig {
    /// What this process's members are called. The first has the process's own name, as when there was only one.
    fn member(&self, number: usize) -> String {
        if number == 0 { self.instance.clone() } else { format!("{}.member-{number}", self.instance) }
    }
}

type Answer = oneshot::Sender<Result<Vec<Partition>, WriteError>>;

/// A [`Reader`] on Kafka.
pub struct KafkaReader {
    events: mpsc::Receiver<Result<Event, ReadError>>,
    commits: mpsc::Sender<(Offsets, Answer)>,
    wanted: Arc<Mutex<Wanted>>,
    /// Where commits and pauses are carried out.
    thread: Thread,
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
        let (commits, orders) = mpsc::channel(COMMITS);
        let membership = Membership::new();
        let failed = |reason: String| ReadError::Failed {
            topics: group.topics.concat().join(", "),
            group: group.group.clone(),
            reason,
        };
        let shared = Arc::new(Mutex::new(Shared {
            is_over: false,
            told_at: None,
            pending: VecDeque::new(),
            commits: orders,
            pauses: Pauses::default(),
            begun_at: HashMap::new(),
            known: TopicIds::new(),
            names: Names::default(),
        }));
        let (ahead, wanted) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Wanted::default())));
        let mut consumers = Vec::new();
        for (member, topics) in group.topics.iter().enumerate() {
            let context = Context {
                config: config.clone(),
                group: GroupConfig { instance: group.member(member), topics: vec![topics.clone()], ..group.clone() },
                member,
                headers,
                membership: membership.clone(),
                events: events.clone(),
                ahead: Arc::clone(&ahead),
                wanted: Arc::clone(&wanted),
                shared: Arc::clone(&shared),
            };
            let consumer: BaseConsumer<Context> = config
                .consumer(&group.group, &context.group.instance)
                .create_with_context(context)
                .map_err(|error| failed(format!("making a consumer: {error}")))?;
            let topics: Vec<&str> = topics.iter().map(String::as_str).collect();
            consumer.subscribe(&topics).map_err(|error| failed(format!("subscribing: {error}")))?;
            consumers.push(Arc::new(consumer));
        }
        membership.belongs_to(&consumers);
        let thread = std::thread::Builder::new()
            .name(format!("read {}", group.group))
            .spawn(move || poll::poll_until_dropped(consumers))
            .map_err(|error| failed(format!("starting its thread: {error}")))?;
        let thread = thread.thread().clone();
        Ok(Self { events: inbox, commits, wanted, thread, membership, group: group.group, ahead })
    }

    fn want(&self, change: impl FnOnce(&mut Wanted)) {
        change(&mut self.wanted.lock().unwrap_or_else(PoisonError::into_inner));
        self.thread.unpark();
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
            self.want(|wanted| assignments.iter().for_each(|assignment| wanted.flow(&assignment.partition)));
        }
        Ok(event)
    }

    fn pause(&self, partition: &Partition) {
        self.want(|wanted| wanted.pause(partition));
    }

    fn resume(&self, partition: &Partition) {
        self.want(|wanted| wanted.flow(partition));
    }

    fn membership(&self) -> Membership {
        self.membership.clone()
    }

    async fn commit(&self, offsets: Offsets) -> Result<Vec<Partition>, WriteError> {
        let ended = || WriteError::Commit { group: self.group.clone(), reason: "the reader's thread has ended".into() };
        let (answer, end) = oneshot::channel();
        self.commits.send((offsets, answer)).await.map_err(|_| ended())?;
        self.thread.unpark();
        end.await.map_err(|_| ended())?
    }
}

/// What the polling loop and the rebalance callbacks share; all run on the reader's thread.
struct Shared {
    /// Set when this consumer is of no more use.
    is_over: bool,
    /// When trouble with the brokers was last told.
    told_at: Option<Instant>,
    /// Events on their way to the stage, in order.
    pending: VecDeque<Result<Event, ReadError>>,
    /// Commits that the stage waits for.
    commits: mpsc::Receiver<(Offsets, Answer)>,
    /// What is paused in the clients.
    pauses: Pauses,
    /// Where reading of each assigned partition began, if that was an offset.
    begun_at: HashMap<Partition, i64>,
    /// The ids of topics, as last seen at an assignment.
    known: TopicIds,
    /// What the logs of the topics are called.
    names: Names,
}

/// Whether the stage still listens.
#[derive(PartialEq, Eq)]
enum Stage {
    Listening,
    Gone,
}

/// A member's callbacks.
pub(super) struct Context {
    config: Config,
    /// The group, with the name and the topics of this member.
    group: GroupConfig,
    /// Its number among the members of this process.
    member: usize,
    /// Which headers are wanted; `None`: all.
    headers: Option<&'static [&'static str]>,
    membership: Membership,
    events: mpsc::Sender<Result<Event, ReadError>>,
    /// Bytes of records that have been handed over, and that the stage has not taken yet.
    ahead: Arc<AtomicUsize>,
    /// What the stage wants to be paused.
    wanted: Arc<Mutex<Wanted>>,
    shared: Arc<Mutex<Shared>>,
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
            // A pause outlives the assignment that it was made under.
            let was_paused = self.shared().pauses.forget(assignments.iter().map(|assignment| &assignment.partition));
            consumer.resume(&list_of(&was_paused)).map_err(|error| self.failed(format!("resuming: {error}")))?;
            Ok((assignments, gone))
        });
        match result {
            Ok((assignments, _)) if assignments.is_empty() => {}
            Ok((assignments, gone)) => {
                let count = counted(assignments.len());
                info!(group = self.group.group, partitions = ?names(&assignments), "assigned {count}");
                for Assignment { partition, epoch, .. } in &assignments {
                    let id = self.shared().known.get(&*partition.topic).copied();
                    self.membership.add(partition.clone(), *epoch, self.member, id);
                }
                self.wanted().is_new = true;
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
        let ids = self.look_up(consumer, &commits)?;
        for element in commits.elements() {
            let partition = Partition { topic: element.topic().into(), number: element.partition() };
            let epoch = self.membership.new_epoch();
            // An error of this partition alone looks like a group that never committed, and would do all again.
            element.error().map_err(|error| self.failed(format!("reading the commit of {partition}: {error}")))?;
            self.shared().begun_at.remove(&partition);
            let committed = match element.offset() {
                Offset::Offset(offset) => Some(Committed { offset, metadata: element.metadata().to_owned() }),
                // Never committed: the group's first start.
                Offset::Beginning | Offset::End | Offset::Stored | Offset::Invalid | Offset::OffsetTail(_) => None,
            };
            let committed =
                committed.and_then(|committed| commit_mark::of_this_log(&partition.topic, &committed, &ids));
            let from = match &committed {
                Some(Committed { offset, .. }) => {
                    let offset = *offset;
                    let (low, _) = self.insist("reading the first offset", || {
                        consumer.fetch_watermarks(&partition.topic, partition.number, ASK)
                    })?;
                    if low > offset {
                        gone.push(Event::Gone { partition: partition.clone(), epoch, range: offset..low });
                    }
                    self.shared().begun_at.insert(partition.clone(), offset.max(low));
                    Offset::Offset(offset.max(low))
                }
                None => Offset::Beginning,
            };
            start
                .add_partition_offset(&partition.topic, partition.number, from)
                .map_err(|error| self.failed(format!("offset of {partition}: {error}")))?;
            let log = self.shared().names.of(&partition.topic).cloned();
            assignments.push(Assignment { partition, epoch, committed, log });
        }
        Ok((assignments, start, gone))
    }

    /// Asks again until the brokers answer: there is nothing else to do without an assignment's offsets.
    fn insist<T>(&self, what: &str, mut ask: impl FnMut() -> Result<T, KafkaError>) -> Result<T, ReadError> {
        loop {
            match ask() {
                Ok(answer) => return Ok(answer),
                Err(error) if self.events.is_closed() => return Err(self.failed(format!("{what}: {error}"))),
                Err(error) => warn!(group = self.group.group, %error, "{what} failed; trying again"),
            }
        }
    }

    fn revoke(&self, consumer: &BaseConsumer<Self>, list: &TopicPartitionList) {
        let partitions = partitions(list);
        if consumer.assignment_lost() {
            let count = counted(partitions.len());
            warn!(group = self.group.group, ?partitions, "lost {count} to another member");
            self.push(Ok(Event::Lost(partitions.clone())));
            // After an outage or a stall beyond the session a new consumer is on firmer ground than this one.
            self.push(Err(self.failed("removed from the consumer group: session timed out".to_owned())));
            self.shared().is_over = true;
        } else if !partitions.is_empty() {
            let count = counted(partitions.len());
            info!(group = self.group.group, ?partitions, "revoked {count}");
            self.hand_over(&partitions);
        }
        self.let_go(&partitions);
        if let Err(error) = consumer.incremental_unassign(list) {
            self.push(Err(self.failed(format!("giving up partitions: {error}"))));
        }
    }

    /// Takes partitions away from the stage's commits. Waits for one under way, since a late one would move the new owner's
    /// ledger back, but not for ever; meanwhile the stage is told what there is to tell: it may wait for that commit
    /// itself, and a new life of it ends a producer that is stuck.
    fn let_go(&self, partitions: &[Partition]) {
        let under_way = self.membership.remove(partitions);
        let deadline = Instant::now() + COMMIT_WITHIN;
        loop {
            self.flush();
            if self.membership.have_ended(under_way, POLL) {
                return;
            }
            if Instant::now() > deadline {
                break;
            }
            self.serve();
        }
        warn!(group = self.group.group, ?partitions, "partitions revoked while a commit had not finished");
        if !self.shared().is_over {
            self.push(Err(self.failed("a commit did not finish".to_owned())));
            self.shared().is_over = true;
        }
    }

    /// Waits for the stage to finish what is in flight, serving its commands meanwhile.
    fn hand_over(&self, partitions: &[Partition]) {
        let (answer, mut done) = oneshot::channel();
        self.push(Ok(Event::Revoked(partitions.to_vec(), Handover(Some(answer)))));
        let deadline = Instant::now() + self.group.drain;
        while Instant::now() < deadline {
            // A stage that has ended, as at a stop, has said itself what it left.
            if self.flush() == Stage::Gone {
                return;
            }
            match done.try_recv() {
                Err(oneshot::error::TryRecvError::Empty) => self.serve_for(POLL),
                Ok(()) | Err(oneshot::error::TryRecvError::Closed) => return,
            }
        }
        warn!(
            group = self.group.group,
            ?partitions,
            "partitions revoked with work in flight: their next owner does it again"
        );
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

    /// Does what the stage has asked for by now, without waiting.
    fn serve(&self) {
        self.reconcile();
        loop {
            let order = self.shared().commits.try_recv();
            let Ok((offsets, answer)) = order else { return };
            let _ = answer.send(self.commit(offsets));
        }
    }

    /// Waits a while for the stage to ask for something, and does it.
    fn serve_for(&self, wait: Duration) {
        std::thread::park_timeout(wait);
        self.serve();
    }

    /// Makes the clients pause what the stage wants to be paused, and nothing else. What a client refuses is tried again
    /// with the next look.
    fn reconcile(&self) {
        let steps = {
            let mut wanted = self.wanted();
            if !std::mem::take(&mut wanted.is_new) {
                return;
            }
            self.shared().pauses.steps(&wanted, |partition| self.membership.member(partition))
        };
        for step in steps {
            let Some(consumer) = self.membership.consumer(step.member) else { return };
            let list = list_of(&step.partitions);
            let result = if step.pause { consumer.pause(&list) } else { consumer.resume(&list) };
            match result {
                Ok(()) => self.shared().pauses.done(step),
                Err(error) => {
                    debug!(group = self.group.group, %error, "pausing or resuming partitions failed; trying again");
                    self.wanted().is_new = true;
                }
            }
        }
    }

    fn commit(&self, mut offsets: Offsets) -> Result<Vec<Partition>, WriteError> {
        offsets.retain(|(partition, epoch, _)| self.membership.epoch(partition) == Some(*epoch));
        let refused = |reason: String| WriteError::Commit { group: self.group.group.clone(), reason };
        let committed = offsets.iter().map(|(partition, ..)| partition.clone()).collect();
        let epochs: Vec<_> = offsets.iter().map(|(partition, epoch, _)| (partition.clone(), *epoch)).collect();
        let permit = self.membership.permit(epochs.iter().map(|(partition, epoch)| (partition, *epoch)));
        let permit =
            permit.map_err(|partition| refused(format!("{partition} was revoked and belongs to another member")))?;
        let parts = permit.by_member(offsets).ok_or_else(|| refused("the consumer has stopped".to_owned()))?;
        for (consumer, offsets) in parts {
            let list =
                offset_list(&offsets, |partition| permit.id(partition)).map_err(|error| refused(error.to_string()))?;
            consumer.commit(&list, CommitMode::Sync).map_err(|error| refused(error.to_string()))?;
        }
        Ok(committed)
    }

    fn wanted(&self) -> std::sync::MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shared(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, reason: String) -> ReadError {
        ReadError::Failed { topics: self.group.topics.concat().join(", "), group: self.group.group.clone(), reason }
    }
}

/// `3 partitions`
fn counted(partitions: usize) -> String {
    format!("{partitions} partition{}", if partitions == 1 { "" } else { "s" })
}

fn names(assignments: &[Assignment]) -> Vec<&Partition> {
    assignments.iter().map(|assignment| &assignment.partition).collect()
}

fn list_of(partitions: &[Partition]) -> TopicPartitionList {
    let mut list = TopicPartitionList::with_capacity(partitions.len());
    for partition in partitions {
        list.add_partition(&partition.topic, partition.number);
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kafka::Epoch;

    #[tokio::test]
    async fn a_stage_hears_that_its_partitions_are_lost_though_a_commit_never_ends() {
        let partition = Partition { topic: "t".into(), number: 0 };
        let group =
            GroupConfig { group: "g".to_owned(), instance: "i".to_owned(), topics: vec![], drain: Duration::ZERO };
        let (events, mut stage) = mpsc::channel(EVENTS);
        let shared = Shared {
            is_over: false,
            told_at: None,
            pending: VecDeque::new(),
            commits: mpsc::channel(COMMITS).1,
            pauses: Pauses::default(),
            begun_at: HashMap::new(),
            known: TopicIds::new(),
            names: Names::default(),
        };
        let membership = Membership::new();
        let epoch = membership.new_epoch();
        membership.add(partition.clone(), epoch, 0, None);
        let context = Context {
            config: Config::default(),
            group,
            member: 0,
            headers: None,
            membership: membership.clone(),
            events,
            ahead: Arc::default(),
            wanted: Arc::default(),
            shared: Arc::new(Mutex::new(shared)),
        };
        let stuck = membership.permit([(&partition, epoch)].into_iter()).ok().unwrap();
        let lost = vec![partition];
        let callback = std::thread::spawn(move || {
            context.push(Ok(Event::Lost(lost.clone())));
            context.let_go(&lost);
        });
        let heard = tokio::time::timeout(COMMIT_WITHIN / 2, stage.recv()).await;
        assert!(matches!(heard, Ok(Some(Ok(Event::Lost(_))))), "{heard:?}");
        assert!(!callback.is_finished(), "the commit under way is waited for");
        drop(stuck);
        callback.join().unwrap();
    }

    #[tokio::test]
    async fn whatever_number_of_pauses_is_asked_for_a_commit_is_answered() {
        let config = Config { brokers: "127.0.0.1:1".to_owned(), ..Config::default() };
        let group = GroupConfig {
            group: "g".to_owned(),
            instance: "i".to_owned(),
            topics: vec![vec!["t".to_owned()]],
            drain: Duration::from_secs(1),
        };
        let reader = KafkaReader::open(&config, group).unwrap();
        for number in 0..20_000 {
            reader.pause(&Partition { topic: "t".into(), number });
        }
        // None of it is ours.
        let offsets = vec![(
            Partition { topic: "t".into(), number: 0 },
            Epoch(1),
            Committed { offset: 0, metadata: String::new() },
        )];
        assert_eq!(reader.commit(offsets).await.unwrap(), []);
    }
}
