//! Records as requests: how one is read, and how those end that nobody calls for.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use crate::{
    fetch::{call::Caller, job::Job, outcome::Outcomes},
    kafka::{Outgoing, Partition, Record, outbox::Position},
    message::{
        DeadLetter, Lane, Origin, Reason, Request, SourceName,
        codec::{self, Received},
        trace,
    },
    runtime::clock::{Clock, Dice, Timestamp},
};

/// The requests of one source.
pub(super) struct Requests {
    source: SourceName,
    express_topic: String,
    outcomes: Arc<Outcomes>,
    clock: Clock,
    /// For trace ids.
    rng: Dice,
}

impl Requests {
    /// Of the source that `caller` calls.
    pub(super) fn new(caller: &Caller) -> Self {
        Self {
            source: caller.source.clone(),
            express_topic: caller.topics().express(&caller.source),
            outcomes: Arc::clone(caller.outcomes()),
            clock: caller.clock(),
            rng: caller.rng(),
        }
    }

    /// Reads a record as a request to call for.
    ///
    /// # Errors
    /// The dead letter that it ends by: nobody can read it, or its time is over.
    pub(super) fn parse(&self, position: Position, record: &Record) -> Result<Job, (Position, Vec<Outgoing>)> {
        let now = self.clock.now();
        let raw = record.raw(&position.partition);
        let traceparent = trace::continued(raw.traceparent(), &self.rng);
        let dead = match codec::read_request(&raw, &self.source) {
            Ok(received) if is_expired(&received.request, now) => expired(received, &raw, &self.source, now),
            Ok(Received { id, request }) => {
                let lane = self.lane(&position.partition);
                return Ok(Job {
                    position,
                    id,
                    request,
                    lane,
                    traceparent,
                    since: Instant::now(),
                    coalesced: Vec::new(),
                    single_flight: None,
                    unprocessed: 0,
                });
            }
            Err(why) => codec::dead_letter(&raw, &self.source, &why, now),
        };
        let records = self.outcomes.dead_letter(&dead, &traceparent);
        Err((position, records))
    }

    fn lane(&self, partition: &Partition) -> Lane {
        if *partition.topic == *self.express_topic { Lane::Express } else { Lane::Bulk }
    }

    /// The end of a request whose batch has spent its money.
    pub(super) fn over_budget(&self, job: Job) -> (Position, Vec<Outgoing>) {
        self.uncalled(job, Reason::Budget, "the batch's budget is spent: raise budget.per_batch and redrive it")
    }

    /// The end of a request whose batch has been cancelled.
    pub(super) fn cancelled(&self, job: Job) -> (Position, Vec<Outgoing>) {
        self.uncalled(job, Reason::Cancelled, "the batch was cancelled before the call")
    }

    fn uncalled(&self, job: Job, reason: Reason, message: &str) -> (Position, Vec<Outgoing>) {
        let Partition { topic, number } = &job.position.partition;
        let dead = DeadLetter {
            request_id: job.id,
            source: self.source.clone(),
            reason,
            message: message.to_owned(),
            died_at: self.clock.now(),
            origin: Origin { topic: topic.to_string(), partition: *number, offset: job.position.offset },
            request: Some(job.request),
            original_base64: None,
        };
        let records = self.outcomes.dead_letter(&dead, &job.traceparent);
        (job.position, records)
    }
}

fn is_expired(request: &Request, now: Timestamp) -> bool {
    request.expires_at.is_some_and(|at| now.since(at) > Duration::ZERO)
}

fn expired(received: Received, raw: &codec::Raw<'_>, source: &SourceName, now: Timestamp) -> DeadLetter {
    DeadLetter {
        request_id: received.id,
        source: source.clone(),
        reason: Reason::Expired,
        message: "expired: expires_at passed before the call".to_owned(),
        died_at: now,
        origin: raw.origin(),
        request: Some(received.request),
        original_base64: None,
    }
}
