//! Older answers that stand in for a call that has failed.

use std::{collections::BTreeSet, time::Duration};

use super::{call_facts::CallFacts, end::End, job::Job, outcome::Outcomes};
use crate::{
    kafka::outbox::Position,
    message::AccountAlias,
    platform::{Refusal, RefusalKind},
    runtime::clock::Timestamp,
};

/// Whether [`recall`] would look for anything.
pub(super) fn is_to_recall(jobs: &[Job]) -> bool {
    jobs.iter().flat_map(Job::with_coalesced).any(|job| {
        let flight = job.single_flight.as_ref();
        flight.is_some_and(|flight| flight.cache().is_shared() && flight.is_to_recall(&job.request))
    })
}

/// Looks into Redis for older answers to what is about to fail: memory may have had no room for them, or others may have
/// fetched them. Of each request once.
pub(super) async fn recall(jobs: &mut [Job]) {
    let mut wanted = BTreeSet::new();
    let mut cache = None;
    for job in jobs.iter().flat_map(Job::with_coalesced) {
        if let Some(flight) = job.single_flight.as_ref().filter(|flight| flight.is_to_recall(&job.request)) {
            wanted.insert(flight.key().clone());
            cache.get_or_insert_with(|| flight.cache().clone());
        }
    }
    // All are of one source.
    let Some(cache) = cache else { return };
    let found = cache.recall(wanted.iter().cloned().collect()).await;
    for job in jobs.iter_mut() {
        let coalesced = job.coalesced.iter_mut().filter_map(|other| other.single_flight.as_mut());
        for flight in coalesced.chain(job.single_flight.as_mut()) {
            if wanted.contains(flight.key()) {
                flight.recalled(found.get(flight.key()).cloned());
            }
        }
    }
}

/// The end of a request whose call has failed: the failure, or what stands in for it.
pub(super) fn failed(outcomes: &Outcomes, mut job: Job, refusal: &Refusal, facts: &CallFacts) -> (Position, End) {
    let flight = job.single_flight.take();
    let position = job.position.clone();
    match flight.and_then(|flight| flight.failed(&job.request, refusal, facts)) {
        Some(kept) => (position, End::Stale(Box::new(job), kept, refusal.clone(), facts.clone())),
        None => (position, End::Made(outcomes.failure(&job, refusal, facts))),
    }
}

/// The end of a request that gets an older answer since the source does not answer.
pub(super) fn instead_of_call(
    outcomes: &Outcomes,
    account: &AccountAlias,
    job: Job,
    now: Timestamp,
) -> (Position, End) {
    let facts = CallFacts { account: account.clone(), ended_at: now, latency: Duration::ZERO, http_status: None };
    let message = "the source's breaker is open: it does not answer".to_owned();
    let refusal = Refusal { kind: RefusalKind::Outage, code: "weir.held.breaker".to_owned(), message };
    failed(outcomes, job, &refusal, &facts)
}
