//! retry: failures → requests again when their delay is over, or dead letters.
//!
//! What to do with a failure is decided by the pure [`policy`]. A request that has to wait leaves the failures topic
//! at once, for the largest delay topic not longer than its time; from there it hops to shorter ones, and for the
//! last second it is held in memory ([`crate::timer`]), still open in the ledger. Each step is in a transaction with the
//! offset that it ends, so a restart goes on where it was; nobody waits behind somebody who has to wait longer, and
//! memory does not grow with what waits.

mod config;
mod history;
mod lateness;
pub mod policy;

use std::{collections::HashMap, pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

pub use config::{Config, Jitter, Policy, Preset, Rule};

use self::{
    lateness::Lateness,
    policy::{Decision, decide},
};
use crate::{
    cancelled::Cancelled,
    kafka::{
        Instead, Outgoing, Reader, Record, Writer, client,
        intake::{Input, Intake, IntakeError},
        log_names::topic_of,
        outbox::Position,
    },
    message::{
        DeadLetter, Failure, Lane, Reason, Request, SourceName,
        codec::{self, Encoded, Raw},
        envelope::{Envelope, Kind},
        trace,
    },
    runtime::{
        clock::{Clock, Dice, Timestamp, sleep_until_due},
        metrics::METRICS,
    },
    timer::{
        Entry, Item, Waiting, Weight, Wheel,
        wheel::{goes_on_at, tier},
    },
    topics::Topics,
};

/// The name of this stage in `ce_source`.
const WRITER: &str = "weir/retry";

/// Why a request of a cancelled batch has ended here.
const CANCELLED: &str = "the batch was cancelled before the retry";

/// How often transactions are made, at most: a retry is not urgent to the millisecond.
const COMMIT_EVERY: Duration = Duration::from_millis(50);

/// How long a request that the ledger's window does not let go yet waits before it is looked at again.
const WINDOW_FULL: Duration = Duration::from_millis(100);

/// How many bytes of records may wait for their transaction before no more are released: two thousand or so, which
/// at 10,000/s leaves a transaction 200 ms.
const OUTCOMES_LIMIT: usize = 2 * 1024 * 1024;

/// How long to sleep at most while something waits: the machine's clock may be set meanwhile.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// How many requests are released before the log is looked after again.
const RELEASE_MAX: usize = 1_000;

/// How long a request whose source this process does not know waits until the next one looks at it: while processes are
/// replaced by newer ones, one by one, the older ones meet sources that they do not know.
const UNKNOWN_AGAIN: Duration = Duration::from_secs(60);

/// How long it waits for one that knows it. Then the source has been taken out of the configuration.
const UNKNOWN_FOR: Duration = Duration::from_secs(24 * 60 * 60);

/// How often it is told how late requests were sent.
const TELL_EVERY: Duration = Duration::from_secs(60);

/// What is in memory.
#[derive(Debug)]
enum Held {
    /// A request that is on its way through the delay topics.
    Waiting(Box<Waiting>),
    /// A dead letter, which only waits for room.
    Ended(Outgoing),
}

impl Weight for Held {
    fn bytes(&self) -> usize {
        match self {
            Self::Waiting(waiting) => waiting.bytes(),
            Self::Ended(record) => record.size() + size_of::<Outgoing>() + 64 * record.headers.len(),
        }
    }
}

/// The retry stage.
pub struct Retry<R, W> {
    config: Config,
    intake: Intake<R, W>,
    wheel: Wheel<Held>,
    /// Whose requests go to which topic, by `Lane as usize`.
    sources: HashMap<SourceName, [Arc<str>; 2]>,
    cancelled: Cancelled,
    lateness: Lateness,
    /// Requests deferred because their source is not in this configuration.
    unknown: HashMap<SourceName, u64>,
    tell_at: Instant,
    failures_topic: Arc<str>,
    dead_topic: Arc<str>,
    /// Ascending.
    delays: Vec<Duration>,
    /// In the order of `delays`.
    delay_topics: Vec<Arc<str>>,
    /// Which topic has which of the delays.
    tiers: HashMap<Arc<str>, usize>,
    clock: Clock,
    dice: Dice,
}

impl<R: Reader, W: Writer> Retry<R, W> {
    /// A stage that sends failed requests of `sources` back to their topics. The reader has to read the failures and
    /// all delay topics.
    pub fn new(
        reader: R,
        writer: W,
        sources: impl IntoIterator<Item = SourceName>,
        topics: &Topics,
        config: Config,
        clock: Clock,
        dice: Dice,
    ) -> Self {
        let delays = topics.delays();
        let delay_topics: Vec<Arc<str>> = delays.iter().map(|topic| topic.name.as_str().into()).collect();
        Self {
            intake: Intake::new(reader, writer, COMMIT_EVERY, Instead::new(topics.dead(), WRITER), clock.clone()),
            wheel: Wheel::new(usize::try_from(config.memory.as_u64()).unwrap_or(usize::MAX)),
            sources: sources
                .into_iter()
                .map(|source| {
                    (source.clone(), [Lane::Bulk, Lane::Express].map(|lane| topics.requests_by(&source, lane).into()))
                })
                .collect(),
            cancelled: Cancelled::none(),
            lateness: Lateness::default(),
            unknown: HashMap::new(),
            tell_at: Instant::now() + TELL_EVERY,
            failures_topic: topics.failures().into(),
            dead_topic: topics.dead().into(),
            delays: delays.iter().filter_map(|topic| topic.delay).collect(),
            tiers: delay_topics.iter().cloned().zip(0..).collect(),
            delay_topics,
            config,
            clock,
            dice,
        }
    }

    /// The same stage, which ends the requests of cancelled batches instead of sending them back.
    #[must_use]
    pub fn with_cancellations(self, cancelled: Cancelled) -> Self {
        Self { cancelled, ..self }
    }

    /// Works until `stop`, then commits what has been released and returns. What is held in memory is read again
    /// after the next start.
    ///
    /// # Errors
    /// [`IntakeError`]; nothing is lost.
    pub async fn run(mut self, stop: CancellationToken) -> Result<(), IntakeError> {
        let mut stopped = pin!(stop.cancelled_owned());
        loop {
            self.release();
            self.regulate();
            self.tell();
            let wake_at = self.next_due();
            tokio::select! {
                biased;
                () = &mut stopped => break,
                input = self.intake.next() => self.take(input?),
                () = sleep_until_due(wake_at) => {}
            }
        }
        info!(held = self.wheel.len(), "stopping: failures held in memory are read again at the next start");
        self.intake.flush().await
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Records(records) => {
                for (position, record) in records {
                    self.receive(position, &record);
                }
            }
            // Whoever waited for room is looked at again after each input.
            Input::Settled => {}
            Input::Leaving(partitions) | Input::Left(partitions) => {
                for position in self.wheel.forget(&partitions) {
                    self.intake.give_up(&position);
                }
            }
        }
    }

    fn receive(&mut self, position: Position, record: &Record) {
        let partition = position.partition.clone();
        let raw = record.raw(&partition);
        let now = self.clock.now();
        let (at, held) = if partition.topic == self.failures_topic {
            (now, self.judged(&raw, now))
        } else {
            self.on_the_way(record, &raw, now)
        };
        self.wheel.hold(at, Item { position, held });
    }

    /// What becomes of a failure: it waits, or it ends.
    fn judged(&self, raw: &Raw<'_>, now: Timestamp) -> Held {
        let traceparent = trace::continued(raw.traceparent(), &self.dice);
        let failure = match codec::read_failure(raw) {
            Ok(failure) => failure,
            Err(why) => return self.unreadable(raw, &why, now),
        };
        match self.decided(&failure, now) {
            Decision::Again { at, request } => {
                Held::Waiting(Box::new(waiting(&failure, &request, at, raw, traceparent)))
            }
            Decision::Dead { reason, message, request } => {
                let Failure { request_id, source, .. } = failure;
                let origin = raw.origin();
                let request = Some(request);
                let dead = DeadLetter {
                    request_id,
                    source,
                    reason,
                    message,
                    died_at: now,
                    origin,
                    request,
                    original_base64: None,
                };
                warn!(request = %dead.request_id, reason = dead.reason.as_str(), message = dead.message, "request given up; writing a dead letter");
                Held::Ended(self.letter(&dead, &traceparent))
            }
        }
    }

    fn decided(&self, failure: &Failure, now: Timestamp) -> Decision {
        if self.cancelled.has(&failure.request) {
            let request = history::extended(&failure.request, &failure.attempt);
            return Decision::Dead { reason: Reason::Cancelled, message: CANCELLED.to_owned(), request };
        }
        match decide(failure, &self.config, now, self.dice.fraction()) {
            // The source's own rules may allow more than those that are known here.
            Decision::Dead { reason: Reason::Exhausted | Reason::Expired, request, .. }
                if !self.knows(&failure.source) =>
            {
                Decision::Again { at: now, request }
            }
            decision @ (Decision::Again { .. } | Decision::Dead { .. }) => decision,
        }
    }

    fn knows(&self, source: &SourceName) -> bool {
        self.sources.contains_key(source)
    }

    /// A record of a delay topic, and when it goes on.
    fn on_the_way(&self, record: &Record, raw: &Raw<'_>, now: Timestamp) -> (Timestamp, Held) {
        let waiting = match Waiting::read(record, raw, WRITER) {
            Ok(waiting) => waiting,
            Err(why) => return (now, self.unreadable(raw, &why, now)),
        };
        if self.is_cancelled(&waiting) {
            return (now, Held::Waiting(Box::new(waiting)));
        }
        let delay = self.tiers.get(topic_of(raw.topic)).map_or(Duration::ZERO, |&tier| self.delays[tier]);
        let at = goes_on_at(waiting.due_at, delay, record.time, Waiting::hopped_at(raw), now);
        (at, Held::Waiting(Box::new(waiting)))
    }

    fn is_cancelled(&self, waiting: &Waiting) -> bool {
        !self.cancelled.is_empty() && {
            let (batch, asked_at) = waiting.asked();
            self.cancelled.covers(batch.as_ref(), asked_at)
        }
    }

    /// The end of a request that has waited in vain.
    fn given_up(
        &self,
        raw: &Raw<'_>,
        source: &SourceName,
        reason: Reason,
        message: String,
        now: Timestamp,
    ) -> Outgoing {
        let traceparent = trace::continued(raw.traceparent(), &self.dice);
        let received = match codec::read_request(raw, source) {
            Ok(received) => received,
            Err(why) => return self.letter(&codec::dead_letter(raw, source, &why, now), &traceparent),
        };
        let dead = DeadLetter {
            request_id: received.id,
            source: source.clone(),
            reason,
            message,
            died_at: now,
            origin: raw.origin(),
            request: Some(received.request),
            original_base64: None,
        };
        self.letter(&dead, &traceparent)
    }

    fn unreadable(&self, raw: &Raw<'_>, why: &codec::Unreadable, now: Timestamp) -> Held {
        // Its source is part of what could not be read.
        let dead = codec::dead_letter(raw, &SourceName::unknown(), why, now);
        Held::Ended(self.letter(&dead, &trace::continued(raw.traceparent(), &self.dice)))
    }

    fn letter(&self, dead: &DeadLetter, traceparent: &str) -> Outgoing {
        let id = dead.request_id.as_str();
        let envelope =
            Envelope { kind: Kind::DeadLetter, id, writer: WRITER, time: dead.died_at, traceparent: Some(traceparent) };
        let Encoded { headers, value } = codec::encode(&envelope, dead);
        let key = dead.request.as_ref().map(|request| Bytes::copy_from_slice(request.item.as_str().as_bytes()));
        Outgoing { topic: Arc::clone(&self.dead_topic), key, value, headers }
    }

    /// Moves on everything whose time has come; a request never before it is due.
    fn release(&mut self) {
        let now = self.clock.now();
        for _ in 0..RELEASE_MAX {
            if !self.has_room() {
                return;
            }
            let Some(item) = self.wheel.take(now) else { return };
            if self.intake.may_start(&item.position) {
                self.move_on(item, now);
            } else {
                self.wheel.hold(now.after(WINDOW_FULL), item);
            }
        }
    }

    fn move_on(&mut self, item: Item<Held>, now: Timestamp) {
        let Item { position, held } = item;
        let (outcome, record) = match held {
            Held::Ended(record) => ("dead", record),
            Held::Waiting(waiting) if self.is_cancelled(&waiting) => {
                let given_up =
                    |raw: &Raw<'_>| self.given_up(raw, &waiting.source, Reason::Cancelled, CANCELLED.to_owned(), now);
                ("dead", waiting.with_raw(&position, given_up))
            }
            Held::Waiting(waiting) if waiting.due_at <= now && self.knows(&waiting.source) => {
                let late = now.since(waiting.due_at);
                self.lateness.note(late);
                METRICS.retry_late(late);
                let Some(topics) = self.sources.get(&waiting.source) else { return };
                let topic = Arc::clone(&topics[waiting.lane as usize]);
                ("again", waiting.into_request(topic))
            }
            Held::Waiting(mut waiting) if waiting.due_at <= now => {
                let since = *waiting.unknown_since.get_or_insert(now);
                if now.since(since) > UNKNOWN_FOR {
                    let message = format!(
                        "no retry process has had source {} in its configuration for a day: configure it again and \
                         redrive",
                        waiting.source
                    );
                    let given_up = |raw: &Raw<'_>| self.given_up(raw, &waiting.source, Reason::Invalid, message, now);
                    ("dead", waiting.with_raw(&position, given_up))
                } else {
                    *self.unknown.entry(waiting.source.clone()).or_default() += 1;
                    waiting.due_at = now.after(UNKNOWN_AGAIN);
                    return self.move_on(Item { position, held: Held::Waiting(waiting) }, now);
                }
            }
            Held::Waiting(waiting) => match tier(&self.delays, waiting.due_at.since(now)) {
                Some(tier) => ("later", waiting.into_hop(Arc::clone(&self.delay_topics[tier]), now)),
                None => return self.wheel.hold(waiting.due_at, Item { position, held: Held::Waiting(waiting) }),
            },
        };
        METRICS.retried(outcome);
        self.intake.complete(position, vec![record]);
    }

    fn has_room(&self) -> bool {
        self.intake.bytes() < OUTCOMES_LIMIT
    }

    /// When to look again; `None`: as soon as something changes.
    fn next_due(&self) -> Option<Instant> {
        let due = self.wheel.next()?;
        let wait = due.since(self.clock.now()).min(LOOK_AGAIN);
        // Without room the end of a transaction wakes; only the flow of the partitions has to be looked at.
        Some(Instant::now() + if self.has_room() { wait } else { LOOK_AGAIN })
    }

    fn tell(&mut self) {
        let now = Instant::now();
        if now >= self.tell_at {
            self.tell_at = now + TELL_EVERY;
            if let Some(told) = self.lateness.take() {
                let (sent, median, late_ms_p99) = (told.count, told.half, told.nearly_all);
                info!(sent, late_ms_p50 = median, late_ms_p99, "retries sent: {sent}, median {median} ms late");
            }
            for (source, count) in self.unknown.drain() {
                warn!(%source, count, "requests wait: their source is not in this configuration, and needs a retry process that has it");
            }
        }
    }

    fn regulate(&mut self) {
        METRICS.retry_waiting(self.wheel.len());
        for (partition, flows) in self.wheel.regulate(self.clock.now()) {
            debug!(%partition, flows, "reading ahead paused or resumed");
            self.intake.set_flowing(&partition, flows);
        }
    }
}

/// `request`, which is `failure`'s with its history extended, waits until `due_at`. `raw` is the failure's record.
fn waiting(failure: &Failure, request: &Request, due_at: Timestamp, raw: &Raw<'_>, traceparent: String) -> Waiting {
    let first = request.history.first().unwrap_or(&failure.attempt);
    let remarks = [
        request.calls.to_string(),
        failure.attempt.class.as_str().to_owned(),
        first.at.as_millis().to_string(),
        raw.position_id().to_string(),
    ];
    let entry = Entry {
        writer: WRITER,
        id: &failure.request_id,
        source: &failure.source,
        lane: failure.lane,
        request,
        traceparent,
        remarks: remarks.map(Some),
    };
    Waiting::new(entry, due_at)
}

/// The settings of clients that hold little: what waits is to wait on the brokers, of dozens of partitions.
const FRUGAL: [(&str, &str); 5] = [
    // Of each partition a fetch brings so much, compressed to about a quarter; by default a megabyte, of all 50.
    ("fetch.message.max.bytes", "65536"),
    ("fetch.max.bytes", "1048576"),
    ("queued.min.messages", "200"),
    ("queued.max.messages.kbytes", "256"),
    // A batch is unpacked as a whole by who reads it, which is ourselves.
    ("batch.size", "131072"),
];

/// The brokers as retry's clients see them.
#[must_use]
pub fn frugal(kafka: &client::Config) -> client::Config {
    let mut kafka = kafka.clone();
    for (property, value) in FRUGAL {
        kafka.properties.entry(property.to_owned()).or_insert_with(|| value.to_owned());
    }
    kafka
}

#[cfg(test)]
mod tests;
