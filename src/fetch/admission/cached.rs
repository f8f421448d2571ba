//! Requests that need no call of their own: their answer is kept, or somebody is calling for it already.
//!
//! A request whose key nobody calls for becomes the *leader*: it looks into Redis and, if nothing is there, waits for a
//! slot like any other. Requests for the same key that come meanwhile *wait* for it, and end with what it brings. If the
//! leader ends without a call (cancelled, given up), or takes too long, they begin anew.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::{JoinError, JoinSet},
    time::Instant,
};

use crate::{
    cache::{self, Claim, Kept, Key, Looked, Seen, SourceCache},
    fetch::{
        job::Job,
        single_flight::{LeaderResult, LeaderResults, SingleFlight},
    },
    kafka::{Partition, outbox::Position},
    message::Lane,
    runtime::clock::sleep_until_due,
};

/// Nobody waits longer for the result of another request: that one's slot may be an hour away, or the window of its
/// partition may be in the way of this very request.
const PATIENCE: Duration = Duration::from_secs(30);

/// An express request does not wait for another one that is still in the backlog: for a call that has left, at most.
const EXPRESS_PATIENCE: Duration = Duration::from_millis(500);

/// Looks into Redis under way at once, at most: each may bring some megabytes. One that waits for somebody else's call
/// brings nothing, and counts no more.
const LOOKS: usize = 64;

/// The requests of a stage that wait for an answer without a call of their own.
#[derive(Debug, Default)]
pub(super) struct Cached {
    cache: Option<SourceCache>,
    waiting: HashMap<u64, Waiting>,
    /// The requests that wait for each key that somebody leads, in the order in which they came.
    leaders: HashMap<Key, Leader>,
    /// Until when they wait, the first first.
    patience: VecDeque<(Instant, u64)>,
    /// How many wait, by partition.
    counts: HashMap<Partition, usize>,
    /// Leaders that look into Redis; each with its permit, as long as it may bring something.
    looking: JoinSet<(u64, Looked, Option<OwnedSemaphorePermit>)>,
    looks: Looks,
    /// Somebody waits for a permit to look.
    pub(super) is_awaited: bool,
    results: Arc<LeaderResults>,
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
struct Leader {
    lane: Lane,
    waiters: Vec<u64>,
}

#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) job: Job,
    pub(super) key: Key,
    leads: bool,
    /// What it may be given if nothing better comes.
    pub(super) due: Option<Kept>,
}

/// What a request comes to at once.
pub(super) enum Admitted {
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

    /// Takes out what waits of a partition; what waits for leaders that look into Redis begins anew.
    pub(super) fn remove(&mut self, partition: &Partition) -> Vec<Position> {
        let of = |waiting: &Waiting| waiting.job.position.partition == *partition;
        let tickets: Vec<u64> = self.waiting.iter().filter(|(_, waiting)| of(waiting)).map(|(t, _)| *t).collect();
        let removed: Vec<_> = tickets.into_iter().filter_map(|ticket| self.take(ticket)).collect();
        for Waiting { key, .. } in removed.iter().filter(|waiting| waiting.leads) {
            self.results.put(key.clone(), LeaderResult::Gone);
        }
        removed.into_iter().map(|waiting| waiting.job.position).collect()
    }

    /// Takes out all that waits.
    pub(super) fn clear(&mut self) -> Vec<Position> {
        self.looking.abort_all();
        self.leaders.clear();
        self.patience.clear();
        self.counts.clear();
        self.waiting.drain().map(|(_, waiting)| waiting.job.position).collect()
    }

    pub(super) fn take(&mut self, ticket: u64) -> Option<Waiting> {
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
            if let Some(leader) = self.leaders.get_mut(&key) {
                leader.waiters.push(ticket);
            }
        }
        self.waiting.insert(ticket, Waiting { job, key, leads, due });
        ticket
    }

    /// Looks for an answer. `spare`: a call now would delay nobody.
    pub(super) fn admit(&mut self, mut job: Job, spare: bool) -> Admitted {
        let Some(cache) = self.cache.clone() else { return Admitted::Call(job) };
        let Some(key) = cache.key(&job.request) else { return Admitted::Call(job) };
        let max_age = job.request.oldest_answer();
        if max_age == Some(Duration::ZERO) {
            job.single_flight = Some(SingleFlight::insisting((cache, key), Arc::clone(&self.results)));
            return Admitted::Call(job);
        }
        let leader = self.leaders.get(&key).map(|leader| leader.lane);
        let due = match cache.near(&key, max_age) {
            Seen::Hit(kept) => return Self::answered(&cache, job, kept),
            Seen::Due(kept) if leader.is_some() => return Self::answered(&cache, job, kept),
            Seen::Due(kept) => Some(kept),
            Seen::Miss => None,
        };
        match leader {
            Some(Lane::Bulk) if job.lane == Lane::Express => {
                job.single_flight = Some(SingleFlight::insisting((cache, key), Arc::clone(&self.results)));
                return Admitted::Call(job);
            }
            Some(_) => {
                self.wait(job, key, false, None);
                return Admitted::Waits;
            }
            None => {}
        }
        let leader = Leader { lane: job.lane, waiters: Vec::new() };
        let patience = if job.lane == Lane::Express { EXPRESS_PATIENCE } else { cache::PATIENCE };
        if !cache.is_shared() {
            return match due {
                Some(due) if !spare => Self::answered(&cache, job, due),
                due => {
                    self.leaders.insert(key.clone(), leader);
                    job.single_flight = self.leading(key, due, None);
                    Admitted::Call(job)
                }
            };
        }
        self.leaders.insert(key.clone(), leader);
        let ticket = self.wait(job, key.clone(), true, due.clone());
        let mut permit = Arc::clone(&self.looks.0).try_acquire_owned().ok();
        self.looking.spawn(async move {
            let looked = cache.far(&key, max_age, (due, spare), patience, &mut permit).await;
            (ticket, looked, permit)
        });
        Admitted::Waits
    }

    /// What a request is to have that is called for now, and that others may wait for.
    pub(super) fn leading(&self, key: Key, due: Option<Kept>, claim: Option<Claim>) -> Option<SingleFlight> {
        let cache = self.cache.clone()?;
        Some(SingleFlight::leading((cache, key), Arc::clone(&self.results), due, claim))
    }

    fn answered(cache: &SourceCache, job: Job, kept: Kept) -> Admitted {
        cache.counts().near.inc();
        Admitted::Answer(job, kept)
    }

    /// Waits until there is something to do: a look into Redis has ended, results of leaders are there, somebody has waited
    /// long enough, or there is room for another look.
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
            () = self.results.ready() => Ok(None),
            _ = self.looks.0.acquire(), if self.is_awaited => Ok(None),
            () = sleep_until_due(overdue) => Ok(None),
        }
    }

    pub(super) fn cache(&self) -> Option<&SourceCache> {
        self.cache.as_ref()
    }

    /// The results of leaders that have come since.
    pub(super) fn results(&self) -> Vec<(Key, LeaderResult)> {
        self.results.take()
    }

    /// The requests that wait for a key, which nobody leads any more.
    pub(super) fn waiters(&mut self, key: &Key) -> Vec<Job> {
        let tickets = self.leaders.remove(key).map(|leader| leader.waiters).unwrap_or_default();
        tickets.into_iter().filter_map(|ticket| Some(self.take(ticket)?.job)).collect()
    }

    /// Requests that have waited long enough for somebody else's call.
    pub(super) fn overdue(&mut self) -> Vec<Job> {
        let (mut jobs, now) = (Vec::new(), Instant::now());
        // Those that were served need no time any more.
        let is_over = |(at, ticket): &(Instant, u64), waiting: &HashMap<u64, Waiting>| {
            *at <= now || !waiting.contains_key(ticket)
        };
        while self.patience.front().is_some_and(|first| is_over(first, &self.waiting)) {
            if let Some((_, ticket)) = self.patience.pop_front()
                && let Some(Waiting { job, key, .. }) = self.take(ticket)
            {
                if let Some(leader) = self.leaders.get_mut(&key) {
                    leader.waiters.retain(|waiter| *waiter != ticket);
                }
                jobs.push(job);
            }
        }
        jobs
    }
}
