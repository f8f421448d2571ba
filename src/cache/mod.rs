//! The cache of answers: in the memory of the process (L1), and in Redis for all processes (L2).
//!
//! Fetch looks a request up before it waits for a slot, and keeps what each call brings. What counts for how long is
//! decided in [`policy`], what an answer is kept under in `key`. Only answers are kept: a failed call is none. An answer
//! that is given again keeps the time at which the vendor gave it, so that nobody takes it for news.
//!
//! A request with a `max_age` of 0, from whatever producer, replaces the answer in Redis and drops it in the memory of
//! every process (an announcement in Redis). A process that misses the announcement goes on with the older answer until
//! its soft end at most: then it looks into Redis again. Without Redis each process has its own memory, and it is never an
//! error.

mod answer;
mod config;
mod key;
mod near;
pub mod policy;
mod redis;

use std::{collections::HashMap, pin::pin, sync::Arc, time::Duration};

use futures::{StreamExt as _, stream};
use tokio::{
    sync::OwnedSemaphorePermit,
    time::{Instant, sleep, timeout_at},
};

pub use answer::{Answer, Kept};
pub use config::{Config, Preset, SourceCache as SourceConfig};
pub use key::{CachedSource, Key, Keys};
pub use near::Near;
pub use redis::{Claim, Counts as RedisCounts, Far, InvalidUrl};

use self::{
    policy::{Habit, Rules, Verdict},
    redis::{Claimed, Found},
};
use crate::{
    message::Request,
    runtime::{
        backoff::Backoff,
        clock::{Clock, Dice, Timestamp},
        metrics::{Answered, METRICS},
    },
};

/// How soon Redis is asked again whether somebody else's call has ended.
const POLL: Backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(250));

/// How long to wait for the call of a live process that itself waits for a slot; then call alone.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// So many answers are recalled at once: what one trip to Redis brings.
const RECALLED_AT_ONCE: usize = 256;

/// As long as so many slow trips to Redis may recalling take: a source that is away is no reason to wait for long.
const RECALL_TRIPS: u32 = 5;

/// Where the answers of all sources of a process are kept. Clones share it.
#[derive(Clone, Debug)]
pub struct Cache {
    near: Near,
    far: Option<Far>,
}

impl Cache {
    /// As configured; `redis_url`: without it memory alone. Needs a tokio runtime, connects in the background.
    ///
    /// # Errors
    /// [`InvalidUrl`].
    pub fn open(config: &Config, redis_url: Option<&str>) -> Result<Self, InvalidUrl> {
        let near = Near::new(config.memory.as_u64());
        let url = redis_url.filter(|_| config.shared);
        let far = url.map(|url| Far::new(url, config, near.clone())).transpose()?;
        Ok(Self { near, far })
    }

    /// The cache of one source; `None` if its answers are not given again.
    #[must_use]
    pub fn source(&self, source: &impl CachedSource, clock: &Clock, dice: &Dice) -> Option<SourceCache> {
        // Values that are not allowed were refused when the configuration was read.
        let rules = source.cache()?.rules().ok()?;
        Some(SourceCache(Arc::new(Parts {
            cache: self.clone(),
            keys: Keys::new(source),
            rules,
            clock: clock.clone(),
            dice: dice.clone(),
            counts: METRICS.answered(source.name().as_str()),
        })))
    }

    /// The answers in Redis, if they are shared.
    #[must_use]
    pub fn far(&self) -> Option<&Far> {
        self.far.as_ref()
    }

    /// The answers in memory.
    #[must_use]
    pub fn near(&self) -> &Near {
        &self.near
    }
}

/// The cache of one source. Clones share it.
#[derive(Clone, Debug)]
pub struct SourceCache(Arc<Parts>);

#[derive(Debug)]
struct Parts {
    cache: Cache,
    keys: Keys,
    rules: Rules,
    clock: Clock,
    dice: Dice,
    counts: Answered,
}

/// What memory says of a request.
#[derive(Clone, Debug)]
pub enum Seen {
    /// Here is its answer.
    Hit(Kept),
    /// Here is one; a call would be better, if there is a slot to spare.
    Due(Kept),
    /// Nothing that counts.
    Miss,
}

/// What follows for a request that memory has not answered.
#[derive(Debug)]
pub enum Looked {
    /// Here is its answer.
    Hit(Kept),
    /// It has to be called for; the claim keeps others from doing so meanwhile.
    Call(Option<Claim>),
}

impl SourceCache {
    /// What the answer to a request is kept under; `None`: it is not kept.
    #[must_use]
    pub fn key(&self, request: &Request) -> Option<Key> {
        self.0.keys.key(request)
    }

    /// How requests were answered so far.
    #[must_use]
    pub fn counts(&self) -> &Answered {
        &self.0.counts
    }

    /// The rules.
    #[must_use]
    pub fn rules(&self) -> &Rules {
        &self.0.rules
    }

    /// Whether there is anybody to ask beyond memory: Redis is set, and answers.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.0.cache.far.as_ref().is_some_and(Far::is_up)
    }

    fn now(&self) -> Timestamp {
        self.0.clock.now()
    }

    fn judge(&self, kept: &Kept, max_age: Option<Duration>) -> Verdict {
        policy::judge(&kept.ends, self.now(), max_age, self.0.rules.early, self.0.dice.fraction())
    }

    /// Whether a request that allows `max_age` may be given this answer.
    #[must_use]
    pub fn may_give(&self, kept: &Kept, max_age: Option<Duration>) -> bool {
        self.judge(kept, max_age).is_usable()
    }

    /// Looks into memory.
    #[must_use]
    pub fn near(&self, key: &Key, max_age: Option<Duration>) -> Seen {
        let Some((kept, _)) = self.0.cache.near.get(key) else { return Seen::Miss };
        match self.judge(&kept, max_age) {
            Verdict::Fresh => {
                self.0.cache.near.count(key);
                Seen::Hit(kept)
            }
            Verdict::Due => {
                self.0.cache.near.count(key);
                Seen::Due(kept)
            }
            Verdict::TooOld | Verdict::Ended => Seen::Miss,
        }
    }

    /// Looks into Redis. `due`: what memory has and would do; `spare`: there is a slot to spare. A miss is claimed, so
    /// that of the whole fleet one calls; while another process has the claim, its answer is waited for, for `patience` at
    /// most, usually [`PATIENCE`]. Meanwhile `place`, which stands for what Redis may bring, is of use to others.
    ///
    /// # Cancellation
    /// Safe.
    pub async fn far(
        &self,
        key: &Key,
        max_age: Option<Duration>,
        (due, spare): (Option<Kept>, bool),
        patience: Duration,
        place: &mut Option<OwnedSemaphorePermit>,
    ) -> Looked {
        let Some(far) = &self.0.cache.far else {
            return self.without_redis(due, spare);
        };
        match far.get(key).await {
            Found::Answer(kept) => {
                self.0.cache.near.put(key, kept.clone());
                let is_newer = due.as_ref().is_none_or(|due| due.ends.fetched_at < kept.ends.fetched_at);
                if is_newer && self.may_give(&kept, max_age) {
                    self.0.counts.far.inc();
                    return Looked::Hit(kept);
                }
            }
            Found::Nothing => {}
            Found::Unknown => return self.without_redis(due, spare),
        }
        match due {
            Some(due) if !spare => self.near_after_all(due),
            due => self.claim(far, key, max_age, (due, patience), place).await,
        }
    }

    /// What memory has is given, unless there is a slot to spare for a call.
    fn without_redis(&self, due: Option<Kept>, spare: bool) -> Looked {
        due.filter(|_| !spare).map_or(Looked::Call(None), |due| self.near_after_all(due))
    }

    /// What memory had is given: there is nothing newer.
    fn near_after_all(&self, due: Kept) -> Looked {
        self.0.counts.near.inc();
        Looked::Hit(due)
    }

    /// Claims a key, or waits for the answer of the process that has the claim. `due` is returned instead of waiting.
    async fn claim(
        &self,
        far: &Far,
        key: &Key,
        max_age: Option<Duration>,
        (due, patience): (Option<Kept>, Duration),
        place: &mut Option<OwnedSemaphorePermit>,
    ) -> Looked {
        let (since, mut poll) = (Instant::now(), POLL);
        let oldest = due.as_ref().map(|due| due.ends.fetched_at);
        loop {
            let (claim, kept) = match far.claim(key).await {
                Claimed::Ours(claim, kept) => (Some(claim), kept),
                Claimed::Theirs(kept) => (None, kept),
                Claimed::Unknown => return Looked::Call(None),
            };
            let newer = kept.filter(|kept| oldest.is_none_or(|oldest| oldest < kept.ends.fetched_at));
            if let Some(kept) = newer.filter(|kept| self.may_give(kept, max_age)) {
                self.0.cache.near.put(key, kept.clone());
                self.0.counts.far.inc();
                return Looked::Hit(kept);
            }
            if claim.is_some() {
                return Looked::Call(claim);
            }
            if let Some(due) = due {
                return self.near_after_all(due);
            }
            if since.elapsed() >= patience {
                return Looked::Call(None);
            }
            drop(place.take());
            sleep(poll.failed()).await;
        }
    }

    /// Keeps what a call has brought. `announce`: what others have of it counts no more.
    #[must_use]
    pub fn keep(&self, key: &Key, answer: Answer, fetched_at: Timestamp, delta: Duration, announce: bool) -> Kept {
        let before = self.0.cache.near.get(key);
        let habit = match &before {
            None => Habit::default(),
            Some((before, hits)) => {
                let is_same = before.answer.fingerprint == answer.fingerprint;
                // Half of what was before: popularity that has passed is forgotten.
                Habit { hits: (before.habit.hits / 2).saturating_add(*hits), ..before.habit.after(is_same) }
            }
        };
        let luck = [self.0.dice.fraction(), self.0.dice.fraction()];
        let ends = self.0.rules.ends(answer.status, fetched_at, delta, habit, luck);
        let kept = Kept { answer: Arc::new(answer), ends, habit };
        self.put(key, kept.clone(), announce);
        kept
    }

    fn put(&self, key: &Key, kept: Kept, announce: bool) {
        if let Some(far) = &self.0.cache.far {
            far.put(key, &kept, self.now(), announce);
        }
        self.0.cache.near.put(key, kept);
    }

    /// Whether this answer may stand in for one to a request while the vendor is away: see [`Self::stale`].
    #[must_use]
    pub fn stands_in(&self, kept: &Kept, request: &Request) -> bool {
        self.0.rules.stale_if_error && policy::stands_in(&kept.ends, self.now(), request.oldest_answer())
    }

    /// What may stand in while the vendor is away, as far as this process knows: its answer is kept, within the hard
    /// end, and the request does not insist on a call. It is older than the request or the rules would have it: say so.
    #[must_use]
    pub fn stale(&self, request: &Request) -> Option<Kept> {
        let (kept, _) = self.0.cache.near.get(&self.key(request)?)?;
        self.stands_in(&kept, request).then_some(kept)
    }

    /// What Redis has for these keys, whether it counts or not: see [`Self::stands_in`]. Ends after a few times
    /// `cache.redis_timeout` at the latest, with what has come by then; at once while Redis is away.
    ///
    /// # Cancellation
    /// Safe.
    pub async fn recall(&self, keys: Vec<Key>) -> HashMap<Key, Kept> {
        let mut recalled = HashMap::new();
        let Some(far) = self.0.cache.far.as_ref().filter(|far| far.is_up()) else { return recalled };
        let get = async |key: Key| match far.get(&key).await {
            Found::Answer(kept) => Some((key, kept)),
            Found::Nothing | Found::Unknown => None,
        };
        let mut coming = pin!(stream::iter(keys).map(get).buffer_unordered(RECALLED_AT_ONCE));
        let until = Instant::now() + far.timeout() * RECALL_TRIPS;
        while let Ok(Some(found)) = timeout_at(until, coming.next()).await {
            recalled.extend(found);
        }
        recalled
    }

    /// Whether an answer is still within its hard end.
    #[must_use]
    pub fn counts_still(&self, kept: &Kept) -> bool {
        self.now() < kept.ends.hard_at
    }

    /// Waits until Redis is connected, if there is one, or for this long: for commands, which have only begun.
    pub async fn connected(&self, within: Duration) {
        let since = Instant::now();
        while self.0.cache.far.is_some() && !self.is_shared() && since.elapsed() < within {
            sleep(Duration::from_millis(2)).await;
        }
    }

    /// As [`Self::near`], in Redis, without a claim.
    pub async fn peek(&self, key: &Key, max_age: Option<Duration>) -> Seen {
        let Some(far) = &self.0.cache.far else { return Seen::Miss };
        let Found::Answer(kept) = far.get(key).await else { return Seen::Miss };
        self.0.cache.near.put(key, kept);
        self.near(key, max_age)
    }

    /// Caches another process' answer in memory only, since that process has written it to Redis.
    #[must_use]
    pub fn hear(&self, key: &Key, answer: Answer, fetched_at: Timestamp) -> Kept {
        let luck = [self.0.dice.fraction(), self.0.dice.fraction()];
        let ends = self.0.rules.ends(answer.status, fetched_at, Duration::ZERO, Habit::default(), luck);
        let kept = Kept { answer: Arc::new(answer), ends, habit: Habit::default() };
        self.0.cache.near.put(key, kept.clone());
        kept
    }

    /// What is kept for a key, whether it counts or not: in Redis, without one in memory.
    ///
    /// # Errors
    /// [`RedisAway`].
    pub async fn show(&self, key: &Key) -> Result<Option<Kept>, RedisAway> {
        if let Some(far) = &self.0.cache.far {
            return match far.get(key).await {
                Found::Answer(kept) => Ok(Some(kept)),
                Found::Nothing => Ok(None),
                Found::Unknown => Err(RedisAway),
            };
        }
        Ok(self.0.cache.near.get(key).map(|(kept, _)| kept))
    }

    /// Drops what is kept for a key, in every process.
    pub fn drop_all(&self, key: &Key) {
        let now = self.now();
        self.0.cache.near.drop_older(key, now);
        if let Some(far) = &self.0.cache.far {
            far.drop_all(key, now);
        }
    }

    /// Fills the cache with an answer that was fetched earlier, as from a table or a file.
    #[must_use]
    pub fn warm(&self, key: &Key, answer: Answer, fetched_at: Timestamp) -> Warmed {
        let luck = [self.0.dice.fraction(), self.0.dice.fraction()];
        let ends = self.0.rules.ends(answer.status, fetched_at, Duration::ZERO, Habit::default(), luck);
        if self.now() >= ends.hard_at {
            return Warmed::TooOld;
        }
        let before = self.0.cache.near.get(key).map(|(kept, _)| kept.ends.fetched_at);
        self.put(key, Kept { answer: Arc::new(answer), ends, habit: Habit::default() }, false);
        if before.is_some() { Warmed::Again } else { Warmed::Filled }
    }
}

/// What became of an answer that the cache was to be filled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Warmed {
    /// It is kept.
    Filled,
    /// This process has filled in one for the same already: the newer one is kept.
    Again,
    /// Its hard end has passed.
    TooOld,
}

/// Redis does not answer.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("Redis does not answer: look at redis.url, and whether it runs")]
pub struct RedisAway;
