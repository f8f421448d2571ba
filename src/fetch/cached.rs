//! Requests that need no call of their own: their answer is kept, or somebody is calling for it already.
//!
//! A request whose key nobody calls for becomes the *leader*: it looks into Redis and, if nothing is there, waits for a
//! slot like any other. Requests for the same key that come meanwhile *follow* it, and end with what it brings. A leader
//! that ends without a call (cancelled, given up) leaves its followers to themselves; so does one that takes too long.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    task::{JoinError, JoinSet},
    time::{Instant, sleep_until},
};

use super::{
    Fetch,
    end::End,
    job::Job,
    outcome::{CallFacts, Outcomes},
};
use crate::{
    cache::{self, Answer, Claim, Kept, Key, Looked, Seen, SourceCache},
    kafka::{Partition, Reader, Writer, outbox::Position},
    message::{Lane, Request, Via},
    platform::Refusal,
};

/// A follower waits no longer: its leader's slot may be an hour away, or its partition's window in the way of this very
/// request.
const PATIENCE: Duration = Duration::from_secs(30);

/// An express request does not wait for somebody else's place in the backlog: for a call that has left, at most.
const EXPRESS_PATIENCE: Duration = Duration::from_millis(500);

/// Looks into Redis under way at once, at most: each may bring some megabytes. One that waits for somebody else's call
/// brings nothing, and counts no more.
const LOOKS: usize = 64;

/// The requests of a stage that wait for an answer without a call of their own.
#[derive(Debug, Default)]
pub(super) struct Cached {
    cache: Option<SourceCache>,
    waiting: HashMap<u64, Waiting>,
    /// The followers of each key that somebody leads, in the order in which they came.
    led: HashMap<Key, Led>,
    /// Until when followers wait, the first first.
    patience: VecDeque<(Instant, u64)>,
    /// How many wait, by partition.
    counts: HashMap<Partition, usize>,
    /// Leaders that look into Redis; each with its place among the looks, as long as it may bring something.
    looking: JoinSet<(u64, Looked, Option<OwnedSemaphorePermit>)>,
    looks: Looks,
    /// Somebody waits for a place among them.
    pub(super) is_awaited: bool,
    landing: Arc<Landing>,
    next: u64,
}

#[derive(Debug)]
struct Looks(Arc<Semaphore>);

impl Default for Looks {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(LOOKS)))
    }
}

#[derive(Debug)]
struct Led {
    lane: Lane,
    followers: Vec<u64>,
}

#[derive(Debug)]
struct Waiting {
    job: Job,
    key: Key,
    leads: bool,
    /// What it may be given if nothing better comes.
    due: Option<Kept>,
}

/// Where calls say what they have brought.
#[derive(Debug, Default)]
struct Landing {
    landed: Mutex<Vec<(Key, Landed)>>,
    notify: Notify,
}

/// What came of a leader.
#[derive(Debug)]
enum Landed {
    Answer(Kept),
    /// Nothing; with what Redis has that is older.
    Failed(Refusal, CallFacts, Option<Kept>),
    /// Nothing: it was not called for.
    Gone,
}

impl Landing {
    fn land(&self, key: Key, landed: Landed) {
        self.landed.lock().unwrap_or_else(PoisonError::into_inner).push((key, landed));
        self.notify.notify_one();
    }
}

/// What Redis has for a request that its call has brought nothing for.
#[derive(Debug)]
enum Older {
    Unasked,
    Nothing,
    Kept(Kept),
}

/// What a request that is called for owes the cache and its followers. Dropped with the request, whatever becomes of it,
/// it frees the key.
#[derive(Debug)]
pub(super) struct Flight {
    key: Key,
    cache: SourceCache,
    landing: Arc<Landing>,
    /// Requests follow it.
    leads: bool,
    /// What others have of the item counts no more.
    announce: bool,
    /// It was called for early, and this is its answer if the call fails.
    due: Option<Kept>,
    older: Older,
    /// Nobody else in the fleet calls; given back when this is dropped, after the answer is kept.
    _claim: Option<Claim>,
}

impl Drop for Flight {
    fn drop(&mut self) {
        if self.leads {
            self.landing.land(self.key.clone(), Landed::Gone);
        }
    }
}

impl Flight {
    /// The call has brought an answer: that of this request, or of another that asks for the same.
    pub(super) fn answered(mut self, answer: &Answer, facts: &CallFacts, via: &Via) {
        let kept = self.cache.keep(&self.key, answer.clone(), facts.ended_at, facts.latency, self.announce);
        let counts = self.cache.counts();
        if *via == Via::Call {
            counts.called.inc()
        } else {
            counts.shared.inc()
        };
        self.end(Landed::Answer(kept));
    }

    /// Whether Redis is to be asked before an outage leaves its request without an answer.
    fn is_to_recall(&self, request: &Request) -> bool {
        let insists = request.oldest_answer() == Some(Duration::ZERO);
        matches!(self.older, Older::Unasked) && !insists && self.due.is_none() && self.cache.stale(request).is_none()
    }

    /// Whether an outage would leave its request an answer.
    pub(super) fn has_stale(&self, job: &Job) -> bool {
        let has_older = match &self.older {
            Older::Kept(older) => self.cache.stands_in(older, &job.request),
            Older::Unasked | Older::Nothing => false,
        };
        let is_due = self.due.as_ref().is_some_and(|due| self.cache.counts_still(due));
        is_due || has_older || self.cache.stale(&job.request).is_some()
    }

    /// The call has failed; what its request is given all the same, if anything.
    pub(super) fn failed(mut self, job: &Job, refusal: &Refusal, facts: &CallFacts) -> Option<Kept> {
        let older = match std::mem::replace(&mut self.older, Older::Nothing) {
            Older::Kept(older) => Some(older),
            Older::Unasked | Older::Nothing => None,
        };
        let given = stand_in(&self.cache, job, refusal, (self.due.take(), older.clone()));
        self.end(Landed::Failed(refusal.clone(), facts.clone(), older));
        given
    }

    fn end(&mut self, landed: Landed) {
        if std::mem::take(&mut self.leads) {
            self.landing.land(self.key.clone(), landed);
        }
    }
}

/// What stands in for a call that has failed: any failure leaves the answer that would have been given without the call;
/// an outage is a reason for an older one.
fn stand_in(
    cache: &SourceCache,
    job: &Job,
    refusal: &Refusal,
    (due, older): (Option<Kept>, Option<Kept>),
) -> Option<Kept> {
    let due = due.filter(|due| cache.counts_still(due));
    let given = due.or_else(|| {
        let older = older.filter(|older| cache.stands_in(older, &job.request));
        refusal.is_outage().then(|| cache.stale(&job.request).or(older)).flatten()
    });
    if given.is_some() {
        cache.counts().stale.inc();
    }
    given
}

/// What a request comes to at once.
enum Admitted {
    /// Here is its answer.
    Answer(Job, Kept),
    /// It has to be called for.
    Call(Job),
    /// It waits.
    Waits,
}

impl Cached {
    pub(super) fn new(cache: Option<SourceCache>) -> Self {
        Self { cache, ..Self::default() }
    }

    /// Whether another request may be looked for: so many answers of Redis are on their way at once, at most.
    pub(super) fn may_look(&self) -> bool {
        self.looks.0.available_permits() > 0
    }

    pub(super) fn waiting_in(&self, partition: &Partition) -> usize {
        self.counts.get(partition).copied().unwrap_or_default()
    }

    /// Takes out what waits of a partition; leaders that look into Redis leave their followers to themselves.
    pub(super) fn remove(&mut self, partition: &Partition) -> Vec<Position> {
        let of = |waiting: &Waiting| waiting.job.position.partition == *partition;
        let tickets: Vec<u64> = self.waiting.iter().filter(|(_, waiting)| of(waiting)).map(|(t, _)| *t).collect();
        let removed: Vec<_> = tickets.into_iter().filter_map(|ticket| self.take(ticket)).collect();
        for Waiting { key, .. } in removed.iter().filter(|waiting| waiting.leads) {
            self.landing.land(key.clone(), Landed::Gone);
        }
        removed.into_iter().map(|waiting| waiting.job.position).collect()
    }

    /// Takes out all that waits.
    pub(super) fn clear(&mut self) -> Vec<Position> {
        self.looking.abort_all();
        self.led.clear();
        self.patience.clear();
        self.counts.clear();
        self.waiting.drain().map(|(_, waiting)| waiting.job.position).collect()
    }

    fn take(&mut self, ticket: u64) -> Option<Waiting> {
        let waiting = self.waiting.remove(&ticket)?;
        if let Some(count) = self.counts.get_mut(&waiting.job.position.partition) {
            *count -= 1;
        }
        Some(waiting)
    }

    fn wait(&mut self, job: Job, key: Key, leads: bool, due: Option<Kept>) -> u64 {
        let ticket = self.next;
        self.next += 1;
        *self.counts.entry(job.position.partition.clone()).or_default() += 1;
        if !leads {
            self.patience.push_back((Instant::now() + PATIENCE, ticket));
            if let Some(led) = self.led.get_mut(&key) {
                led.followers.push(ticket);
            }
        }
        self.waiting.insert(ticket, Waiting { job, key, leads, due });
        ticket
    }

    /// Looks for an answer. `spare`: a call now would delay nobody.
    fn admit(&mut self, mut job: Job, spare: bool) -> Admitted {
        let Some(cache) = self.cache.clone() else { return Admitted::Call(job) };
        let Some(key) = cache.key(&job.request) else { return Admitted::Call(job) };
        let max_age = job.request.oldest_answer();
        if max_age == Some(Duration::ZERO) {
            job.flight = Some(self.flight(cache, key, false, None, None));
            return Admitted::Call(job);
        }
        let leader = self.led.get(&key).map(|led| led.lane);
        let due = match cache.near(&key, max_age) {
            Seen::Hit(kept) => return Admitted::Answer(job, kept),
            Seen::Due(kept) if leader.is_some() => return Admitted::Answer(job, kept),
            Seen::Due(kept) => Some(kept),
            Seen::Miss => None,
        };
        match leader {
            Some(Lane::Bulk) if job.lane == Lane::Express => {
                job.flight = Some(self.flight(cache, key, false, None, None));
                return Admitted::Call(job);
            }
            Some(_) => {
                self.wait(job, key, false, None);
                return Admitted::Waits;
            }
            None => {}
        }
        let led = Led { lane: job.lane, followers: Vec::new() };
        let patience = if job.lane == Lane::Express { EXPRESS_PATIENCE } else { cache::PATIENCE };
        if !cache.is_shared() {
            return match due {
                Some(due) if !spare => Admitted::Answer(job, due),
                due => {
                    self.led.insert(key.clone(), led);
                    job.flight = Some(self.flight(cache, key, true, due, None));
                    Admitted::Call(job)
                }
            };
        }
        self.led.insert(key.clone(), led);
        let ticket = self.wait(job, key.clone(), true, due.clone());
        let mut place = Arc::clone(&self.looks.0).try_acquire_owned().ok();
        self.looking.spawn(async move {
            let looked = cache.far(&key, max_age, (due, spare), patience, &mut place).await;
            (ticket, looked, place)
        });
        Admitted::Waits
    }

    fn flight(&self, cache: SourceCache, key: Key, leads: bool, due: Option<Kept>, claim: Option<Claim>) -> Flight {
        // Who insists on a call has seen a reason to: what others have counts no more.
        let announce = !leads;
        Flight {
            key,
            cache,
            landing: Arc::clone(&self.landing),
            leads,
            announce,
            due,
            older: Older::Unasked,
            _claim: claim,
        }
    }

    /// Waits until there is something to do, see [`Fetch::end_waiting`].
    ///
    /// # Cancellation
    /// Safe.
    ///
    /// # Errors
    /// A defect: a look ended abnormally.
    pub(super) async fn changed(&mut self) -> Result<Option<(u64, Looked)>, JoinError> {
        let overdue = self.patience.front().map(|(at, _)| *at);
        tokio::select! {
            Some(looked) = self.looking.join_next(), if !self.looking.is_empty() => match looked {
                Ok((ticket, looked, _)) => Ok(Some((ticket, looked))),
                // By a stop.
                Err(error) if error.is_cancelled() => Ok(None),
                Err(error) => Err(error),
            },
            () = self.landing.notify.notified() => Ok(None),
            _ = self.looks.0.acquire(), if self.is_awaited => Ok(None),
            () = sleep_until(overdue.unwrap_or_else(Instant::now)), if overdue.is_some() => Ok(None),
        }
    }

    /// What has landed since.
    fn landed(&self) -> Vec<(Key, Landed)> {
        std::mem::take(&mut *self.landing.landed.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The followers of a key, which nobody leads any more.
    fn followers(&mut self, key: &Key) -> Vec<Job> {
        let tickets = self.led.remove(key).map(|led| led.followers).unwrap_or_default();
        tickets.into_iter().filter_map(|ticket| Some(self.take(ticket)?.job)).collect()
    }

    /// Followers that have waited long enough.
    fn impatient(&mut self) -> Vec<Job> {
        let (mut jobs, now) = (Vec::new(), Instant::now());
        // Those that were served need no time any more.
        let is_over = |(at, ticket): &(Instant, u64), waiting: &HashMap<u64, Waiting>| {
            *at <= now || !waiting.contains_key(ticket)
        };
        while self.patience.front().is_some_and(|first| is_over(first, &self.waiting)) {
            if let Some((_, ticket)) = self.patience.pop_front()
                && let Some(Waiting { job, key, .. }) = self.take(ticket)
            {
                if let Some(led) = self.led.get_mut(&key) {
                    led.followers.retain(|follower| *follower != ticket);
                }
                jobs.push(job);
            }
        }
        jobs
    }
}

impl<R: Reader, W: Writer> Fetch<R, W> {
    /// Answers a request without a call if that can be; else it waits for a slot, or for somebody else's call.
    pub(super) fn admit(&mut self, job: Job) {
        let spare = self.backlog.is_empty() && self.calls.len() < self.config.calls_in_flight / 2;
        match self.cached.admit(job, spare) {
            Admitted::Answer(job, kept) => {
                if let Some(cache) = &self.cached.cache {
                    cache.counts().near.inc();
                }
                self.answer(job, &kept);
            }
            Admitted::Call(job) => self.enlist(job),
            Admitted::Waits => {}
        }
    }

    /// Ends a request with an answer that was kept; it is called for if that makes no record.
    fn answer(&mut self, job: Job, kept: &Kept) {
        self.end(job.position.clone(), End::Again(Box::new(job), kept.clone()));
    }

    /// Does what follows from what [`Cached::changed`] has seen.
    pub(super) fn end_waiting(&mut self, looked: Option<(u64, Looked)>) {
        if let Some((ticket, looked)) = looked {
            self.end_look(ticket, looked);
        }
        for (key, landed) in self.cached.landed() {
            for job in self.cached.followers(&key) {
                self.end_follower(job, &landed);
            }
        }
        for job in self.cached.impatient() {
            let partition = job.position.partition.clone();
            self.enlist(job);
            self.regulate(&partition);
        }
    }

    fn end_look(&mut self, ticket: u64, looked: Looked) {
        // It may have been given up meanwhile; then a claim is given back here.
        let Some(Waiting { mut job, key, due, .. }) = self.cached.take(ticket) else { return };
        let Some(cache) = self.cached.cache.clone() else { return };
        let partition = job.position.partition.clone();
        match looked {
            Looked::Hit(kept) => {
                self.answer(job, &kept);
                for job in self.cached.followers(&key) {
                    self.end_follower(job, &Landed::Answer(kept.clone()));
                }
            }
            Looked::Call(claim) => {
                job.flight = Some(self.cached.flight(cache, key, true, due, claim));
                self.enlist(job);
            }
        }
        self.regulate(&partition);
    }

    /// One outcome for all who waited for it; who is not served by it begins anew.
    fn end_follower(&mut self, job: Job, landed: &Landed) {
        let Some(cache) = self.cached.cache.clone() else { return };
        let partition = job.position.partition.clone();
        match landed {
            _ if self.cancelled.has(&job.request) => {
                let (position, records) = self.caller.cancelled(job);
                self.end(position, End::Made(records));
            }
            Landed::Answer(kept) if cache.may_give(kept, job.request.oldest_answer()) => {
                cache.counts().shared.inc();
                self.answer(job, kept);
            }
            Landed::Failed(refusal, facts, older) => {
                if let Some(kept) = stand_in(&cache, &job, refusal, (None, older.clone())) {
                    let position = job.position.clone();
                    self.end(position, End::Stale(Box::new(job), kept, refusal.clone(), facts.clone()));
                } else {
                    let records = self.caller.outcomes().failure(&job, refusal, facts);
                    self.end(job.position, End::Made(records));
                }
            }
            Landed::Answer(_) | Landed::Gone => self.admit(job),
        }
        self.regulate(&partition);
    }
}

/// Whether [`recall`] would look for anything.
pub(super) fn is_to_recall(jobs: &[Job]) -> bool {
    jobs.iter().flat_map(|job| job.twins.iter().chain([job])).any(|job| {
        let flight = job.flight.as_ref();
        flight.is_some_and(|flight| flight.cache.is_shared() && flight.is_to_recall(&job.request))
    })
}

/// Looks into Redis for older answers to what is about to fail: memory may have had no room for them, or others may have
/// fetched them. Of each request once.
pub(super) async fn recall(jobs: &mut [Job]) {
    let mut wanted = BTreeSet::new();
    let mut cache = None;
    for job in jobs.iter().flat_map(|job| job.twins.iter().chain([job])) {
        if let Some(flight) = job.flight.as_ref().filter(|flight| flight.is_to_recall(&job.request)) {
            wanted.insert(flight.key.clone());
            cache.get_or_insert_with(|| flight.cache.clone());
        }
    }
    // All are of one source.
    let Some(cache) = cache else { return };
    let found = cache.recall(wanted.iter().cloned().collect()).await;
    for job in jobs.iter_mut() {
        for flight in job.twins.iter_mut().filter_map(|twin| twin.flight.as_mut()).chain(job.flight.as_mut()) {
            if wanted.contains(&flight.key) {
                flight.older = found.get(&flight.key).cloned().map_or(Older::Nothing, Older::Kept);
            }
        }
    }
}

/// The end of a request whose call has failed: the failure, or what stands in for it.
pub(super) fn failed(outcomes: &Outcomes, mut job: Job, refusal: &Refusal, facts: &CallFacts) -> (Position, End) {
    let flight = job.flight.take();
    let position = job.position.clone();
    match flight.and_then(|flight| flight.failed(&job, refusal, facts)) {
        Some(kept) => (position, End::Stale(Box::new(job), kept, refusal.clone(), facts.clone())),
        None => (position, End::Made(outcomes.failure(&job, refusal, facts))),
    }
}
