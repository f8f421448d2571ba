//! One call for all requests with the same cache key: what the one that is called for owes the cache, and the requests
//! that wait for its result.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::sync::Notify;

use super::call_facts::CallFacts;
use crate::{
    cache::{Answer, Claim, Kept, Key, SourceCache},
    message::{Request, Via},
    platform::Refusal,
};

/// What came of a leader, for those who waited for it.
#[derive(Debug)]
pub(super) enum LeaderResult {
    Answer(Kept),
    /// Nothing; with what Redis has that is older.
    Failed(Refusal, CallFacts, Option<Kept>),
    /// Nothing: it was not called for.
    Gone,
}

/// Where calls put the results of leaders. One per stage, shared with the tasks that make the calls.
#[derive(Debug, Default)]
pub(super) struct LeaderResults {
    results: Mutex<Vec<(Key, LeaderResult)>>,
    notify: Notify,
}

impl LeaderResults {
    pub(super) fn put(&self, key: Key, result: LeaderResult) {
        self.results.lock().unwrap_or_else(PoisonError::into_inner).push((key, result));
        self.notify.notify_one();
    }

    /// What was put since, in that order.
    pub(super) fn take(&self) -> Vec<(Key, LeaderResult)> {
        std::mem::take(&mut *self.results.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until there is something to take.
    ///
    /// # Cancellation
    /// Safe.
    pub(super) async fn ready(&self) {
        self.notify.notified().await;
    }
}

/// What Redis has for a request that its call has brought nothing for.
#[derive(Debug)]
enum Older {
    Unasked,
    Nothing,
    Kept(Kept),
}

/// What a request that is called for owes the cache and those who wait for its result. Dropped with the request,
/// whatever becomes of that, it frees the key.
#[derive(Debug)]
pub(super) struct SingleFlight {
    key: Key,
    cache: SourceCache,
    results: Arc<LeaderResults>,
    /// Requests may wait for it.
    leads: bool,
    /// What others have of the item counts no more.
    announce: bool,
    /// It was called for early, and this is its answer if the call fails.
    due: Option<Kept>,
    older: Older,
    /// Nobody else in the fleet calls; given back when this is dropped, after the answer is kept.
    _claim: Option<Claim>,
}

impl Drop for SingleFlight {
    fn drop(&mut self) {
        self.end(LeaderResult::Gone);
    }
}

impl SingleFlight {
    /// Of a request that others may wait for. `due`: its answer if the call fails.
    pub(super) fn leading(
        (cache, key): (SourceCache, Key),
        results: Arc<LeaderResults>,
        due: Option<Kept>,
        claim: Option<Claim>,
    ) -> Self {
        Self { key, cache, results, leads: true, announce: false, due, older: Older::Unasked, _claim: claim }
    }

    /// Of a request that insists on a call of its own. Whoever does so has seen a reason to: what others have of the item
    /// counts no more once it is answered.
    pub(super) fn insisting((cache, key): (SourceCache, Key), results: Arc<LeaderResults>) -> Self {
        Self { key, cache, results, leads: false, announce: true, due: None, older: Older::Unasked, _claim: None }
    }

    pub(super) fn key(&self) -> &Key {
        &self.key
    }

    pub(super) fn cache(&self) -> &SourceCache {
        &self.cache
    }

    /// The call has brought an answer: that of this request, or of another that asks for the same.
    pub(super) fn answered(mut self, answer: &Answer, facts: &CallFacts, via: &Via) {
        let kept = self.cache.keep(&self.key, answer.clone(), facts.ended_at, facts.latency, self.announce);
        let counts = self.cache.counts();
        if *via == Via::Call {
            counts.called.inc()
        } else {
            counts.shared.inc()
        };
        self.end(LeaderResult::Answer(kept));
    }

    /// Whether Redis is to be asked before an outage leaves its request without an answer.
    pub(super) fn is_to_recall(&self, request: &Request) -> bool {
        let insists = request.oldest_answer() == Some(Duration::ZERO);
        matches!(self.older, Older::Unasked) && !insists && self.due.is_none() && self.cache.stale(request).is_none()
    }

    /// What Redis had when it was asked.
    pub(super) fn recalled(&mut self, older: Option<Kept>) {
        self.older = older.map_or(Older::Nothing, Older::Kept);
    }

    /// Whether an outage would leave its request an answer.
    pub(super) fn has_stale(&self, request: &Request) -> bool {
        let has_older = match &self.older {
            Older::Kept(older) => self.cache.stands_in(older, request),
            Older::Unasked | Older::Nothing => false,
        };
        let is_due = self.due.as_ref().is_some_and(|due| self.cache.counts_still(due));
        is_due || has_older || self.cache.stale(request).is_some()
    }

    /// The call has failed; what its request is given all the same, if anything.
    pub(super) fn failed(mut self, request: &Request, refusal: &Refusal, facts: &CallFacts) -> Option<Kept> {
        let older = match std::mem::replace(&mut self.older, Older::Nothing) {
            Older::Kept(older) => Some(older),
            Older::Unasked | Older::Nothing => None,
        };
        let given = stand_in(&self.cache, request, refusal, (self.due.take(), older.clone()));
        self.end(LeaderResult::Failed(refusal.clone(), facts.clone(), older));
        given
    }

    fn end(&mut self, result: LeaderResult) {
        if std::mem::take(&mut self.leads) {
            self.results.put(self.key.clone(), result);
        }
    }
}

/// What stands in for a call that has failed: any failure leaves the answer that would have been given without the call;
/// an outage is a reason for an older one.
pub(super) fn stand_in(
    cache: &SourceCache,
    request: &Request,
    refusal: &Refusal,
    (due, older): (Option<Kept>, Option<Kept>),
) -> Option<Kept> {
    let due = due.filter(|due| cache.counts_still(due));
    let given = due.or_else(|| {
        let older = older.filter(|older| cache.stands_in(older, request));
        refusal.is_outage().then(|| cache.stale(request).or(older)).flatten()
    });
    if given.is_some() {
        cache.counts().stale.inc();
    }
    given
}
