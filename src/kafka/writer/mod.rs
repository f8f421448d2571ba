//! Kafka transactions: records and consumer offsets, committed together or not at all.
//!
//! A transaction runs from begin to commit on the producer's own thread, so no dropped future can leave one
//! open: an open transaction holds back every `read_committed` reader of its topics.

mod open_ends;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    time::Duration,
};

use rdkafka::{
    ClientContext, TopicPartitionList,
    config::RDKafkaLogLevel,
    consumer::ConsumerGroupMetadata,
    error::KafkaError,
    message::{DeliveryResult, ToBytes},
    producer::{BaseProducer, BaseRecord, Producer as _, ProducerContext},
    types::RDKafkaErrorCode,
};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::{
    Membership, Offsets, Outgoing, TransactError, Writer, admin,
    client::{BROKER_PAUSES, Config, TRANSACTION_TIMEOUT},
    native::{headers, offset_list},
    oversized::{self, Limit, TooLarge},
};

/// How long one step of a transaction waits before it is asked for again.
const STEP: Duration = Duration::from_secs(5);
/// How long a transaction may take before its producer is given up. The brokers roll back what is open for longer than
/// [`TRANSACTION_TIMEOUT`], and look for that every 10 s: what has not come through by now has been decided without this
/// producer. The next one of its name waits for that decision before the group's commits are read.
const GIVE_UP: Duration = TRANSACTION_TIMEOUT.saturating_mul(2);
/// How often a transaction looks for delivery reports.
const REPORTS: Duration = Duration::from_millis(1);
/// How many bytes of records travel together where a topic has refused more than that at once: a broker judges what
/// comes in one batch as a whole. A larger record travels alone.
const PORTION: usize = 64 * 1024;

/// What a producer's transactions can touch.
#[derive(Clone, Debug)]
pub struct Reach {
    /// The group whose offsets they carry.
    pub group: String,
    /// What the group reads.
    pub reads: Vec<String>,
    /// Every topic that they write to.
    pub writes: Vec<String>,
}

/// One whole transaction, to be run on the producer's thread.
struct Job {
    records: Vec<Outgoing>,
    membership: Membership,
    offsets: Offsets,
    answer: oneshot::Sender<Result<(), TransactError>>,
}

/// A [`Writer`] on Kafka.
pub struct KafkaWriter {
    jobs: SyncSender<Job>,
}

impl KafkaWriter {
    /// Starts the producer under `name` (its `transactional.id`) and waits until the brokers know it; a
    /// transaction that a killed predecessor left open is rolled back by that. Waits as long as no broker
    /// answers.
    ///
    /// # Errors
    /// [`TransactError`] if the configuration or the cluster refuses the name for good.
    pub async fn open(config: &Config, name: &str) -> Result<Self, TransactError> {
        Self::start(config, name, None).await
    }

    /// The same, and sees to it that the group can read its commits: an outage of the brokers can have left a
    /// transaction half closed. The group's reader has to be opened after this.
    ///
    /// # Errors
    /// As [`Self::open`], or the brokers went away meanwhile.
    pub async fn open_for(config: &Config, name: &str, reach: Reach) -> Result<Self, TransactError> {
        Self::start(config, name, Some(reach)).await
    }

    async fn start(config: &Config, name: &str, reach: Option<Reach>) -> Result<Self, TransactError> {
        let (jobs, inbox) = sync_channel(1);
        let (ready, answer) = oneshot::channel();
        let config = config.clone();
        let thread_name = format!("write {name}");
        let name = name.to_owned();
        std::thread::Builder::new()
            .name(thread_name)
            .spawn(move || match Transactions::start(&config, name, reach.as_ref()) {
                Ok(transactions) => {
                    let _ = ready.send(Ok(()));
                    transactions.serve(&inbox);
                }
                Err(error) => drop(ready.send(Err(error))),
            })
            .map_err(|error| TransactError::Rebuild(format!("starting the producer's thread: {error}")))?;
        answer.await.map_err(|_| TransactError::Rebuild("the producer's thread has ended".to_owned()))??;
        Ok(Self { jobs })
    }
}

impl Writer for KafkaWriter {
    async fn transact(
        &self,
        records: Vec<Outgoing>,
        membership: Membership,
        offsets: Offsets,
    ) -> Result<(), TransactError> {
        let ended = |_| TransactError::Rebuild("the producer's thread has ended".to_owned());
        let (answer, end) = oneshot::channel();
        // One transaction at a time: the stage waits for the answer before it sends the next.
        let job = Job { records, membership, offsets, answer };
        self.jobs
            .try_send(job)
            .map_err(|error| TransactError::Rebuild(format!("two transactions at once: {error}")))?;
        end.await.map_err(ended)?
    }
}

/// Counts deliveries that failed since the transaction began.
#[derive(Default)]
struct Deliveries {
    failed: AtomicUsize,
    /// Those of them that were refused for their size, perhaps for that of what travelled with them.
    too_large: AtomicUsize,
}

impl Deliveries {
    fn begin(&self) {
        self.failed.store(0, Ordering::Relaxed);
        self.too_large.store(0, Ordering::Relaxed);
    }

    fn are_too_large(&self) -> bool {
        self.too_large.load(Ordering::Relaxed) > 0
    }
}

impl ClientContext for Deliveries {
    /// What matters of it comes as an error of the operation that failed.
    fn log(&self, _: RDKafkaLogLevel, facility: &str, message: &str) {
        debug!(target: "librdkafka", facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        debug!(%error, reason, "Kafka client error");
    }
}

impl ProducerContext for Deliveries {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Err((error, _)) = result {
            debug!(%error, "a record of the transaction was not delivered");
            self.failed.fetch_add(1, Ordering::Relaxed);
            if is_too_large(error) {
                self.too_large.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// A transactional producer, to be used from one thread.
pub(super) struct Transactions {
    producer: BaseProducer<Deliveries>,
    name: String,
    config: Config,
    /// How many bytes of records travel together, at most.
    portion: AtomicUsize,
}

impl Transactions {
    pub(super) fn start(config: &Config, name: String, reach: Option<&Reach>) -> Result<Self, TransactError> {
        let made = config.transactional(&name).create_with_context(Deliveries::default());
        let producer: BaseProducer<Deliveries> =
            made.map_err(|error| TransactError::Rebuild(format!("making a producer: {error}")))?;
        let transactions = Self { producer, name, config: config.clone(), portion: AtomicUsize::new(usize::MAX) };
        let mut told = false;
        transactions.insist(None, |producer| {
            let result = producer.init_transactions(STEP);
            if result.is_err() && !std::mem::replace(&mut told, true) {
                info!(name = transactions.name, brokers = config.brokers, "initialising Kafka transactions");
            }
            result
        })?;
        if let Some(reach) = reach {
            transactions.close_open_ends(config, reach)?;
        }
        Ok(transactions)
    }

    fn serve(&self, inbox: &Receiver<Job>) {
        loop {
            match inbox.recv_timeout(Duration::from_millis(100)) {
                Ok(job) => {
                    let result = self.run(&job);
                    let ended = matches!(result, Err(TransactError::Fenced { .. } | TransactError::Rebuild(_)));
                    // Nobody waits for the answer if the stage has stopped; the outcome stands all the same.
                    let _ = job.answer.send(result);
                    if ended {
                        return;
                    }
                }
                // Events (fatal errors, statistics) are served by polling only.
                Err(RecvTimeoutError::Timeout) => self.producer.poll(Duration::ZERO),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn run(&self, job: &Job) -> Result<(), TransactError> {
        let epochs = job.offsets.iter().map(|(partition, epoch, _)| (partition, *epoch));
        let permit = job.membership.permit(epochs).map_err(|partition| {
            TransactError::Aborted(format!("{partition} was revoked and belongs to another member"))
        })?;
        let ended = || TransactError::Aborted("the consumer has stopped".to_owned());
        let parts = permit.generations(job.offsets.clone()).ok_or_else(ended)?.into_iter();
        let parts: Result<Vec<_>, _> = parts
            .map(|(generation, offsets)| {
                Ok::<_, TransactError>((offset_list(&offsets, |partition| permit.id(partition))?, generation))
            })
            .collect();
        self.transact(&job.records, &parts?)
    }

    /// One whole transaction: records, and offsets with the generation that each part of them was made under. Without
    /// offsets it commits records alone.
    pub(super) fn transact(
        &self,
        records: &[Outgoing],
        offsets: &[(TopicPartitionList, ConsumerGroupMetadata)],
    ) -> Result<(), TransactError> {
        let mut most = self.portion.load(Ordering::Relaxed);
        loop {
            let result = self.attempt(records, offsets, most);
            if let Err(TransactError::TooLarge(found)) = result {
                return Err(self.with_all_too_large(records, found));
            }
            let is_unclear =
                matches!(result, Err(TransactError::Aborted(_))) && self.producer.context().are_too_large();
            if !is_unclear || most == 1 {
                return result;
            }
            // It may have been only what travelled together: that is kept smaller from now on, and if that is not
            // enough each record is judged by itself.
            most = if most > PORTION { PORTION } else { 1 };
            self.portion.store(PORTION, Ordering::Relaxed);
        }
    }

    /// Which other records are too large, beside the one that was `found`: what stands behind it is tried in transactions
    /// that are rolled back, each record by itself. So all of them cost one pass, and not one each.
    fn with_all_too_large(&self, records: &[Outgoing], mut found: Vec<TooLarge>) -> TransactError {
        while let Some(behind) = found.last().map(|last| last.index + 1).filter(|behind| *behind < records.len()) {
            match self.try_each(&records[behind..]) {
                // What is not found now, since the transaction failed, is found by the next one.
                Ok(()) | Err(TransactError::Aborted(_)) => break,
                Err(TransactError::TooLarge(more)) => {
                    found.extend(more.into_iter().map(|why| TooLarge { index: why.index + behind, ..why }));
                }
                Err(worse @ (TransactError::Fenced { .. } | TransactError::Rebuild(_))) => return worse,
            }
        }
        TransactError::TooLarge(found)
    }

    /// Offers records one by one up to the first that is too large, and rolls all of it back.
    fn try_each(&self, records: &[Outgoing]) -> Result<(), TransactError> {
        self.producer.begin_transaction().map_err(|error| self.classify(&error))?;
        let deadline = Instant::now() + GIVE_UP;
        match self.write(records, 1, deadline) {
            Ok(()) => self.insist(Some(deadline), |producer| producer.abort_transaction(STEP)),
            Err(error) => Err(self.roll_back(error, deadline)),
        }
    }

    fn attempt(
        &self,
        records: &[Outgoing],
        offsets: &[(TopicPartitionList, ConsumerGroupMetadata)],
        most: usize,
    ) -> Result<(), TransactError> {
        self.producer.begin_transaction().map_err(|error| self.classify(&error))?;
        let deadline = Instant::now() + GIVE_UP;
        self.write_and_commit(records, offsets, most, deadline).map_err(|error| self.roll_back(error, deadline))
    }

    fn write_and_commit(
        &self,
        records: &[Outgoing],
        offsets: &[(TopicPartitionList, ConsumerGroupMetadata)],
        most: usize,
        deadline: Instant,
    ) -> Result<(), TransactError> {
        self.write(records, most, deadline)?;
        for (offsets, generation) in offsets.iter().filter(|(offsets, _)| offsets.count() > 0) {
            self.insist(Some(deadline), |producer| producer.send_offsets_to_transaction(offsets, generation, STEP))?;
        }
        self.insist(Some(deadline), |producer| producer.commit_transaction(STEP))
    }

    /// Writes records into the open transaction, portion by portion, and waits until the brokers have each.
    fn write(&self, records: &[Outgoing], most: usize, deadline: Instant) -> Result<(), TransactError> {
        self.producer.context().begin();
        let mut from = 0;
        while from < records.len() {
            let portion = portion(&records[from..], most);
            for (index, record) in portion.iter().enumerate() {
                self.send(record, from + index)?;
            }
            self.wait_for_reports(deadline)?;
            let failed = self.producer.context().failed.load(Ordering::Relaxed);
            if let [record] = portion
                && self.producer.context().are_too_large()
            {
                return Err(TransactError::TooLarge(vec![self.too_large(record, from)]));
            }
            if failed > 0 {
                return Err(TransactError::Aborted(format!(
                    "{failed} of {} records were not delivered",
                    records.len()
                )));
            }
            from += portion.len();
        }
        Ok(())
    }

    /// Returns when every record has its delivery report.
    ///
    /// `commit_transaction` would wait too, but by a flush that sleeps in steps of 100 ms. And rdkafka's `poll`
    /// does not sleep through the last millisecond of its time-out, it spins: that was a tenth of fetch's CPU.
    fn wait_for_reports(&self, deadline: Instant) -> Result<(), TransactError> {
        let mut left = self.producer.in_flight_count();
        while left > 0 {
            self.producer.poll(Duration::ZERO);
            if Instant::now() > deadline {
                return Err(self.given_up(&format!("{left} records without a delivery report")));
            }
            let now = self.producer.in_flight_count();
            if now == left {
                std::thread::park_timeout(REPORTS);
            }
            left = now;
        }
        Ok(())
    }

    fn given_up(&self, what: &str) -> TransactError {
        warn!(name = self.name, what, after = ?GIVE_UP, "a transaction does not finish; giving up its producer");
        TransactError::Rebuild(format!("a transaction did not finish within {GIVE_UP:?}: {what}"))
    }

    /// What a record was too large for that travelled alone.
    fn too_large(&self, record: &Outgoing, index: usize) -> TooLarge {
        let (size, topic) = (record.size(), Arc::clone(&record.topic));
        // Whoever may write may perhaps not ask.
        let asked = futures::executor::block_on(admin::record_limits(&self.config, &[topic.to_string()]));
        let limit = asked.ok().and_then(|limits| limits.into_values().next());
        TooLarge { index, topic, size, limit: Limit::Topic(limit) }
    }

    fn send(&self, outgoing: &Outgoing, index: usize) -> Result<(), TransactError> {
        let mut record: BaseRecord<'_, [u8], [u8]> =
            BaseRecord::to(&outgoing.topic).payload(outgoing.value.as_ref()).headers(headers(outgoing));
        if let Some(key) = &outgoing.key {
            record = record.key(key.as_ref());
        }
        self.offer(record).map_err(|error| match error {
            Offer::TooLarge => TransactError::TooLarge(vec![TooLarge {
                index,
                topic: Arc::clone(&outgoing.topic),
                size: outgoing.size(),
                limit: Limit::Own(self.config.record_limit()),
            }]),
            Offer::Failed(error) => error,
        })
    }

    /// Gives a record to librdkafka, as soon as there is room for it.
    fn offer<K: ToBytes + ?Sized>(&self, mut record: BaseRecord<'_, K, [u8]>) -> Result<(), Offer> {
        loop {
            match self.producer.send(record) {
                Ok(()) => return Ok(()),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), again)) => {
                    self.producer.poll(Duration::from_millis(10));
                    record = again;
                }
                Err((error, _)) if is_too_large(&error) => return Err(Offer::TooLarge),
                Err((error, _)) => return Err(Offer::Failed(self.classify(&error))),
            }
        }
    }

    /// Asks for the same step again as long as Kafka says that this is right. After an `EndTxn` of unknown fate
    /// only the same `EndTxn` may follow: an abort could roll back what has been committed, or the reverse. After the
    /// deadline, if there is one, the producer is given up.
    fn insist(
        &self,
        deadline: Option<Instant>,
        mut step: impl FnMut(&BaseProducer<Deliveries>) -> Result<(), KafkaError>,
    ) -> Result<(), TransactError> {
        let since = Instant::now();
        let mut pauses = BROKER_PAUSES;
        loop {
            match step(&self.producer) {
                Ok(()) => return Ok(()),
                Err(KafkaError::Transaction(error)) if error.is_retriable() => {
                    if since.elapsed() > STEP {
                        warn!(name = self.name, %error, waited = ?since.elapsed(), "Kafka does not answer; trying again");
                    }
                    if deadline.is_some_and(|deadline| Instant::now() > deadline) {
                        return Err(self.given_up(&error.string()));
                    }
                }
                Err(error) => return Err(self.classify(&error)),
            }
            // What is answered at once, and not by yes or no, would else be asked thousands of times a second.
            self.producer.poll(pauses.failed());
        }
    }

    /// Ends a transaction that cannot be committed. What is aborted may be sent again; the rest is for good.
    fn roll_back(&self, error: TransactError, deadline: Instant) -> TransactError {
        let reason = match &error {
            TransactError::Aborted(reason) => reason.clone(),
            TransactError::TooLarge(records) => oversized::words(records),
            TransactError::Fenced { .. } | TransactError::Rebuild(_) => return error,
        };
        warn!(name = self.name, reason, "transaction aborted");
        match self.insist(Some(deadline), |producer| producer.abort_transaction(STEP)) {
            Ok(()) => error,
            Err(TransactError::Aborted(error)) => {
                TransactError::Rebuild(format!("{reason}; the abort failed: {error}"))
            }
            Err(worse) => worse,
        }
    }

    #[allow(
        clippy::wildcard_enum_match_arm,
        reason = "whatever is neither fatal nor abortable leaves the fate unknown"
    )]
    fn classify(&self, error: &KafkaError) -> TransactError {
        if let Some((code, reason)) = self.producer.client().fatal_error() {
            if is_fenced(code) {
                return TransactError::Fenced { name: self.name.clone(), reason };
            }
            return TransactError::Rebuild(format!("{code}: {reason}"));
        }
        match error {
            KafkaError::Transaction(error) if error.txn_requires_abort() => TransactError::Aborted(error.string()),
            error => TransactError::Rebuild(error.to_string()),
        }
    }
}

/// Why librdkafka does not take a record.
enum Offer {
    /// It is larger than the producer sends.
    TooLarge,
    Failed(TransactError),
}

/// As many of these records as travel together: at least one.
fn portion(records: &[Outgoing], most: usize) -> &[Outgoing] {
    let mut bytes = 0_usize;
    let fits = |record: &&Outgoing| {
        bytes = bytes.saturating_add(record.size());
        bytes <= most
    };
    let count = records.iter().take_while(fits).count();
    &records[..count.max(1).min(records.len())]
}

/// Larger than `max.message.bytes`, or than `segment.bytes`, of which the brokers say that the batch is too large.
fn is_too_large(error: &KafkaError) -> bool {
    use RDKafkaErrorCode::{MessageBatchTooLarge, MessageSizeTooLarge};
    matches!(error, KafkaError::MessageProduction(MessageSizeTooLarge | MessageBatchTooLarge))
}

/// A fatal error with one of these codes means that another process has the name now, or that this process was
/// stalled for longer than the transaction time-out: the broker bumps the epoch in both cases.
fn is_fenced(code: RDKafkaErrorCode) -> bool {
    use RDKafkaErrorCode as Code;
    matches!(code, Code::Fenced | Code::ProducerFenced | Code::InvalidProducerEpoch | Code::FencedInstanceId)
}
