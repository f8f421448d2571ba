//! What a call came to, as records. Pure but for counting them.

use std::sync::Arc;

use bytes::Bytes;
use serde::Serialize;

use super::{call_facts::CallFacts, job::Job};
use crate::{
    cache::{Answer, Kept},
    kafka::{Instead, Outgoing, RECORD_LIMIT},
    message::{
        Attempt, Class, DeadLetter, Failure, Observation, SourceName, Via,
        codec::{self, Encoded},
        envelope::{Envelope, Kind},
    },
    platform::{Refusal, RefusalKind},
    runtime::{clock::Timestamp, metrics::METRICS},
    topics::Topics,
};

/// Makes the records of one source's outcomes.
pub(super) struct Outcomes {
    source: SourceName,
    writer: String,
    results: Arc<str>,
    failures: Arc<str>,
    dead: Arc<str>,
}

impl Outcomes {
    pub(super) fn new(source: SourceName, topics: &Topics) -> Self {
        let writer = format!("weir/fetch/{source}");
        let (results, failures, dead) = (topics.results().into(), topics.failures().into(), topics.dead().into());
        Self { source, writer, results, failures, dead }
    }

    /// How a record ends that its topic does not take.
    pub(super) fn when_too_large(&self) -> Instead {
        Instead::new(Arc::clone(&self.dead), self.writer.as_str())
    }

    /// What a call brought; `via` says whether it was made for this request or for another that asks for the same.
    pub(super) fn result(&self, job: &Job, answer: Answer, facts: &CallFacts, via: Via) -> Vec<Outgoing> {
        let raw_bytes = answer.raw.as_ref().map_or(0, |raw| raw.get().len());
        let observation = Observation {
            account: Some(facts.account.clone()),
            latency_ms: facts.latency_ms(),
            ..self.observation(job, answer, via, facts.ended_at, facts.ended_at)
        };
        self.fitting(job, &observation, facts.ended_at).unwrap_or_else(|| self.too_large(job, raw_bytes, facts))
    }

    /// The result of a request that is given an answer that was kept; `None` if that makes no record.
    pub(super) fn again(&self, job: &Job, kept: &Kept, via: Via, now: Timestamp) -> Option<Vec<Outgoing>> {
        let answer = Answer::clone(&kept.answer);
        self.fitting(job, &self.observation(job, answer, via, kept.ends.fetched_at, now), now)
    }

    /// What is known of an item, for this request; `now` is when that came to it.
    fn observation(&self, job: &Job, answer: Answer, via: Via, fetched_at: Timestamp, now: Timestamp) -> Observation {
        let request = &job.request;
        Observation {
            request_id: job.id.clone(),
            source: self.source.clone(),
            instead_of: request.instead_of.clone(),
            item: request.item.clone(),
            batch: request.batch.clone(),
            status: answer.status,
            calls: match via {
                // For one whose call failed there has been one all the same.
                Via::Call | Via::Stale | Via::Other(_) => calls(job),
                Via::Cache => request.calls,
            },
            via,
            account: None,
            requested_at: request.requested_at.unwrap_or(now),
            fetched_at,
            latency_ms: 0,
            fingerprint: answer.fingerprint,
            columns: answer.columns,
            raw: answer.raw,
        }
    }

    /// The result, if a topic takes it.
    fn fitting(&self, job: &Job, observation: &Observation, now: Timestamp) -> Option<Vec<Outgoing>> {
        let records = self.record(&self.results, Kind::Result, job, now, observation);
        let fits = records.iter().all(|record| record.size() <= RECORD_LIMIT);
        if fits {
            METRICS.outcome(self.source.as_str(), observation.status.as_str(), observation.via.as_str());
        }
        fits.then_some(records)
    }

    /// Calling again would bring the same.
    fn too_large(&self, job: &Job, bytes: usize, facts: &CallFacts) -> Vec<Outgoing> {
        let message =
            format!("the item's JSON has {bytes} bytes, more than fits into a Kafka record of {RECORD_LIMIT}");
        let refusal = Refusal { kind: RefusalKind::Bug, code: "reply.too_large".to_owned(), message };
        self.failure(job, &refusal, facts)
    }

    pub(super) fn failure(&self, job: &Job, refusal: &Refusal, facts: &CallFacts) -> Vec<Outgoing> {
        let attempt = Attempt {
            at: facts.ended_at,
            account: Some(facts.account.clone()),
            class: refusal.class(),
            code: codec::shorten(&refusal.code, 100).into_owned(),
            message: codec::shorten(&refusal.message, 300).into_owned(),
            http_status: facts.http_status,
            latency_ms: facts.latency_ms(),
            not_before: not_before(refusal, facts.ended_at),
        };
        self.failed(job, attempt)
    }

    fn failed(&self, job: &Job, attempt: Attempt) -> Vec<Outgoing> {
        let via = if attempt.account.is_some() { Via::Call.as_str() } else { "none" };
        METRICS.outcome(self.source.as_str(), "failed", via);
        let at = attempt.at;
        let failure = Failure {
            request_id: job.id.clone(),
            source: self.source.clone(),
            request: job.request.clone(),
            attempt,
            lane: job.lane,
        };
        self.record(&self.failures, Kind::Failure, job, at, &failure)
    }

    /// What happened to a request at `at` instead of a call.
    fn no_call((at, until): (Timestamp, Timestamp), message: String) -> Attempt {
        Attempt {
            at,
            account: None,
            class: Class::Outage,
            code: format!("{}breaker", Attempt::HELD_BACK),
            message,
            http_status: None,
            latency_ms: 0,
            not_before: Some(until),
        }
    }

    /// The source does not answer, and nobody calls it until then: the request is to come again.
    pub(super) fn held_back(&self, job: &Job, times: (Timestamp, Timestamp)) -> Vec<Outgoing> {
        let message = "the source's breaker is open: it does not answer; there was no call, and no attempt is spent";
        self.failed(job, Self::no_call(times, message.to_owned()))
    }

    /// The source does not answer: the request goes to another one, on the topic that it goes by there.
    pub(super) fn instead(
        &self,
        job: &Job,
        other: &SourceName,
        topic: &Arc<str>,
        times: (Timestamp, Timestamp),
    ) -> Vec<Outgoing> {
        METRICS.outcome(self.source.as_str(), "handed_on", "none");
        let mut request = job.request.clone();
        // What goes on a chain has a history: else it would count as asked for once more.
        let message = format!("the breaker of {} is open; {other} is called instead", self.source);
        request.history.push(Self::no_call(times, message));
        request.instead_of = Some(self.source.clone());
        request.source = Some(other.clone());
        let envelope = self.envelope(Kind::Request, job.id.as_str(), times.0, &job.traceparent);
        let key = Bytes::copy_from_slice(request.item.as_str().as_bytes());
        outgoing(topic, Some(key), codec::encode(&envelope, &request))
    }

    pub(super) fn dead_letter(&self, dead: &DeadLetter, traceparent: &str) -> Vec<Outgoing> {
        METRICS.outcome(self.source.as_str(), "dead", "none");
        let id = dead.request_id.as_str();
        let envelope = self.envelope(Kind::DeadLetter, id, dead.died_at, traceparent);
        let key = dead.request.as_ref().map(|request| Bytes::copy_from_slice(request.item.as_str().as_bytes()));
        outgoing(&self.dead, key, codec::encode(&envelope, dead))
    }

    fn record(
        &self,
        topic: &Arc<str>,
        kind: Kind,
        job: &Job,
        time: Timestamp,
        record: &impl Serialize,
    ) -> Vec<Outgoing> {
        let id = format!("{}#{}", job.id, calls(job));
        let envelope = self.envelope(kind, &id, time, &job.traceparent);
        let key = Bytes::copy_from_slice(job.request.item.as_str().as_bytes());
        outgoing(topic, Some(key), codec::encode(&envelope, record))
    }

    fn envelope<'a>(&'a self, kind: Kind, id: &'a str, time: Timestamp, traceparent: &'a str) -> Envelope<'a> {
        Envelope { kind, id, writer: &self.writer, time, traceparent: Some(traceparent) }
    }
}

/// How many calls the request has had, this one included.
fn calls(job: &Job) -> u32 {
    job.request.calls.saturating_add(1)
}

/// A throttle of one account leaves the request free for the others; only one that concerns everyone binds it.
fn not_before(refusal: &Refusal, now: Timestamp) -> Option<Timestamp> {
    match &refusal.kind {
        RefusalKind::Throttled { scope: crate::platform::Affected::Everyone, wait } => wait.map(|wait| now.after(wait)),
        RefusalKind::Throttled { .. }
        | RefusalKind::Denied(_)
        | RefusalKind::Outage
        | RefusalKind::Unclear
        | RefusalKind::Malformed
        | RefusalKind::Misconfigured(_)
        | RefusalKind::Bug => None,
    }
}

fn outgoing(topic: &Arc<str>, key: Option<Bytes>, Encoded { headers, value }: Encoded) -> Vec<Outgoing> {
    vec![Outgoing { topic: Arc::clone(topic), key, value, headers }]
}
