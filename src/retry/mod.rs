//! retry: failures → requests again when it is time, or a dead letter.
//!
//! What to do with a failure is decided by the pure [`policy`]. Requests that wait are held in memory, in the
//! order of their due times, and stay open in the ledger until they are released: a restart reads them again
//! and waits for the rest of their time. Memory is bounded: when `waiting` are held, a partition is read no
//! further.

mod config;
pub mod policy;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

pub use config::Config;

use self::policy::{Decision, decide};
use crate::{
    kafka::{
        Outgoing, Partition, Reader, Record, Writer,
        intake::{Input, Intake, IntakeError},
        outbox::Position,
    },
    message::{
        DeadLetter, Failure, Reason, Request, SourceName,
        codec::{self, Encoded},
        envelope::{Envelope, Kind},
        trace,
    },
    runtime::clock::{Clock, Dice, Timestamp},
    topics::Topics,
};

/// The name of this stage in `ce_source`.
const WRITER: &str = "weir/retry";

/// How often transactions are made, at most: a retry is not urgent to the millisecond.
const COMMIT_EVERY: Duration = Duration::from_millis(50);

/// How long a request that the ledger's window does not let go yet waits before it is looked at again.
const WINDOW_FULL: Duration = Duration::from_millis(100);

/// How many bytes of records may wait for their transaction before no more are released.
const OUTCOMES_LIMIT: usize = 16 * 1024 * 1024;

/// A record that waits for its time: a request, or a dead letter, whose time is now.
struct Waiting {
    position: Position,
    record: Outgoing,
}

/// The retry stage.
pub struct Retry<R, W> {
    config: Config,
    intake: Intake<R, W>,
    /// By due time; the second part keeps those of one millisecond apart.
    waiting: BTreeMap<(Timestamp, u64), Waiting>,
    waiting_in: HashMap<Partition, usize>,
    sequence: u64,
    sources: HashSet<SourceName>,
    topics: Topics,
    dead_topic: Arc<str>,
    clock: Clock,
    dice: Dice,
}

impl<R: Reader, W: Writer> Retry<R, W> {
    /// A stage that sends failed requests of `sources` back to their topics.
    pub fn new(
        reader: R,
        writer: W,
        sources: impl IntoIterator<Item = SourceName>,
        topics: Topics,
        config: Config,
        clock: Clock,
        dice: Dice,
    ) -> Self {
        Self {
            intake: Intake::new(reader, writer, COMMIT_EVERY),
            waiting: BTreeMap::new(),
            waiting_in: HashMap::new(),
            sequence: 0,
            sources: sources.into_iter().collect(),
            dead_topic: topics.dead().into(),
            topics,
            config,
            clock,
            dice,
        }
    }

    /// Works until `stop`, then commits what has been released and returns. What still waits is read again
    /// after the next start.
    ///
    /// # Errors
    /// [`IntakeError`]; nothing is lost.
    pub async fn run(mut self, stop: CancellationToken) -> Result<(), IntakeError> {
        let mut stopped = pin!(stop.cancelled_owned());
        loop {
            self.release();
            let wake_at = self.next_due();
            tokio::select! {
                biased;
                () = &mut stopped => break,
                input = self.intake.next() => self.take(input?),
                () = sleep_until(wake_at.unwrap_or_else(Instant::now)), if wake_at.is_some() => {}
            }
        }
        info!(waiting = self.waiting.len(), "stopping: what waits is read again after the next start");
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
            Input::Leaving(partitions) | Input::Left(partitions) => self.forget(&partitions),
        }
    }

    /// Decides about a failure: it waits, or it ends.
    fn receive(&mut self, position: Position, record: &Record) {
        let now = self.clock.now();
        let raw = record.raw(&position.partition);
        let traceparent = trace::continued(raw.traceparent(), &self.dice);
        let failure = match codec::read_failure(&raw) {
            Ok(failure) => failure,
            Err(why) => {
                // Its source is part of what could not be read.
                let dead = codec::dead_letter(&raw, &unknown_source(), &why, now);
                return self.end(position, &dead, &traceparent);
            }
        };
        let decision = if self.sources.contains(&failure.source) {
            decide(&failure, &self.config, now, self.dice.fraction())
        } else {
            let message = format!("source {} is not in this retry's configuration", failure.source);
            Decision::Dead { reason: Reason::Invalid, message, request: failure.request.clone() }
        };
        match decision {
            Decision::Again { at, request } => self.wait(position, at, &failure, &request, &traceparent),
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
                warn!(request = %dead.request_id, reason = dead.reason.as_str(), message = dead.message, "given up");
                self.end(position, &dead, &traceparent);
            }
        }
    }

    fn wait(&mut self, position: Position, at: Timestamp, failure: &Failure, request: &Request, traceparent: &str) {
        let id = failure.request_id.as_str();
        let envelope = Envelope { kind: Kind::Request, id, writer: WRITER, time: at, traceparent: Some(traceparent) };
        let Encoded { headers, value } = codec::encode(&envelope, request);
        let key = Some(Bytes::copy_from_slice(request.item.as_str().as_bytes()));
        let record = Outgoing { topic: self.topics.requests(&failure.source).into(), key, value, headers };
        self.hold(position, at, record);
    }

    /// Keeps a record until its time, and until the window and the memory let it go.
    fn hold(&mut self, position: Position, at: Timestamp, record: Outgoing) {
        let partition = position.partition.clone();
        self.sequence += 1;
        self.waiting.insert((at, self.sequence), Waiting { position, record });
        *self.waiting_in.entry(partition.clone()).or_default() += 1;
        self.regulate(&partition);
    }

    fn end(&mut self, position: Position, dead: &DeadLetter, traceparent: &str) {
        let id = dead.request_id.as_str();
        let envelope =
            Envelope { kind: Kind::DeadLetter, id, writer: WRITER, time: dead.died_at, traceparent: Some(traceparent) };
        let Encoded { headers, value } = codec::encode(&envelope, dead);
        let key = dead.request.as_ref().map(|request| Bytes::copy_from_slice(request.item.as_str().as_bytes()));
        let record = Outgoing { topic: Arc::clone(&self.dead_topic), key, value, headers };
        self.hold(position, dead.died_at, record);
    }

    /// Lets go every record whose time has come, never one before.
    fn release(&mut self) {
        let now = self.clock.now();
        while self.has_room() {
            let Some(first) = self.waiting.first_entry().filter(|first| first.key().0 <= now) else { return };
            let ((_, sequence), waiting) = first.remove_entry();
            if !self.intake.may_start(&waiting.position) {
                self.waiting.insert((now.after(WINDOW_FULL), sequence), waiting);
                continue;
            }
            let partition = waiting.position.partition.clone();
            self.intake.complete(waiting.position, vec![waiting.record]);
            if let Some(count) = self.waiting_in.get_mut(&partition) {
                *count = count.saturating_sub(1);
            }
            self.regulate(&partition);
        }
    }

    fn has_room(&self) -> bool {
        self.intake.bytes() < OUTCOMES_LIMIT
    }

    /// When to look again; `None`: as soon as something changes.
    fn next_due(&self) -> Option<Instant> {
        if !self.has_room() {
            return None;
        }
        let (due, _) = self.waiting.first_key_value()?.0;
        Some(Instant::now() + due.since(self.clock.now()))
    }

    /// Stops a partition of which too many wait, and lets it flow again when half of them have gone.
    fn regulate(&mut self, partition: &Partition) {
        let full = (self.config.waiting / self.intake.partitions().max(1)).max(1);
        let waiting = self.waiting_in.get(partition).copied().unwrap_or(0);
        if waiting >= full {
            self.intake.set_flowing(partition, false);
        } else if waiting <= full / 2 {
            self.intake.set_flowing(partition, true);
        }
    }

    fn forget(&mut self, partitions: &[Partition]) {
        let intake = &mut self.intake;
        self.waiting.retain(|_, waiting| {
            let leaves = partitions.contains(&waiting.position.partition);
            if leaves {
                intake.give_up(&waiting.position);
            }
            !leaves
        });
        for partition in partitions {
            self.waiting_in.remove(partition);
        }
    }
}

#[allow(clippy::expect_used, reason = "a constant that is a valid name")]
fn unknown_source() -> SourceName {
    SourceName::new("unknown").expect("a valid name")
}

#[cfg(test)]
mod tests;
