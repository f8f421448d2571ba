//! L2: answers in Redis, shared by all processes, and claims that let one process call for an item at a time.
//!
//! Below `{prefix}:cache:` there is for each key `answer:{key}` with the bytes of [`super::answer`], and while somebody
//! calls for it `claim:{key}` with a token of theirs. A change is announced on the channel `{prefix}:cache:dropped`, and
//! the last of them are listed by time in `{prefix}:cache:drops`, for whoever was not connected then.
//!
//! A driver task owns the connection. It gathers what is asked for at about the same time into one `MGET`, so that a
//! thousand misses cost a few trips. When Redis does not answer in time, all that is asked is answered with "unknown" at
//! once, until a new connection has proved itself: without Redis everybody goes on with their own memory.

mod driver;
mod write;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::timeout,
};

use self::{
    driver::Driver,
    write::{Parcel, Write},
};
use super::{
    answer::{self, Kept},
    key::Key,
    near::Near,
};
use crate::{
    cache::Config,
    runtime::{clock::Timestamp, redis_server},
};

pub use crate::runtime::redis_server::InvalidUrl;

/// How much may wait for the driver; beyond it requests go on without Redis.
const QUEUE: usize = 16_384;

/// How many bytes of answers may wait to be written, also while Redis is away. Beyond it an answer is not kept there; what
/// others have of its item is dropped all the same.
const WAITING: usize = 32 * 1024 * 1024;

/// Answers in Redis. Clones share one connection, which ends with the last of them.
#[derive(Clone, Debug)]
pub struct Far {
    reads: mpsc::Sender<Read>,
    shared: Arc<Shared>,
    timeout: Duration,
    _driver: Arc<Owned>,
}

#[derive(Debug)]
struct Owned(JoinHandle<()>);

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What the driver and its users share.
#[derive(Debug)]
struct Shared {
    prefix: String,
    near: Near,
    is_up: AtomicBool,
    writes: mpsc::Sender<Write>,
    /// How many bytes of answers wait to be written.
    waiting: Arc<AtomicUsize>,
    /// The claims of this process, which the driver keeps alive.
    claims: Mutex<HashMap<Key, String>>,
    claim: Duration,
    counts: Counts,
}

/// What was asked of Redis so far.
#[derive(Debug, Default)]
pub struct Counts {
    /// Trips: an `MGET`, or a pipeline.
    pub trips: AtomicU64,
    /// Writes that were dropped since there was no room for them.
    pub unwritten: AtomicU64,
    /// Questions that Redis did not answer in time.
    pub unanswered: AtomicU64,
}

/// A question, and where its answer goes; dropped: unknown.
#[derive(Debug)]
enum Read {
    Get(Key, oneshot::Sender<Option<Vec<u8>>>),
    /// With the token to claim it with; true if it is ours now.
    Claim(Key, String, oneshot::Sender<(bool, Option<Vec<u8>>)>),
}

impl Shared {
    fn claims(&self) -> MutexGuard<'_, HashMap<Key, String>> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer_key(&self, key: &Key) -> String {
        format!("{}:cache:answer:{key}", self.prefix)
    }

    fn claim_key(&self, key: &Key) -> String {
        format!("{}:cache:claim:{key}", self.prefix)
    }

    fn channel(&self) -> String {
        format!("{}:cache:dropped", self.prefix)
    }

    fn drops_key(&self) -> String {
        format!("{}:cache:drops", self.prefix)
    }

    fn write(&self, write: Write) {
        if self.writes.try_send(write).is_err() {
            self.counts.unwritten.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The exclusive right in the fleet to call for a key. Released when dropped.
#[derive(Debug)]
pub struct Claim {
    key: Key,
    token: String,
    shared: Arc<Shared>,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claims = self.shared.claims();
        if claims.get(&self.key) == Some(&self.token) {
            claims.remove(&self.key);
        }
        drop(claims);
        self.shared.write(Write::Release { key: self.key.clone(), token: self.token.clone() });
    }
}

/// What Redis knows of a key.
#[derive(Debug)]
pub enum Found {
    /// An answer; whether it counts is for the asker.
    Answer(Kept),
    /// None.
    Nothing,
    /// Redis did not say.
    Unknown,
}

/// What came of the wish to call.
#[derive(Debug)]
pub enum Claimed {
    /// No other process is calling; with the entry by now.
    Ours(Claim, Option<Kept>),
    /// Another process is calling; with the entry by now.
    Theirs(Option<Kept>),
    /// Redis did not say.
    Unknown,
}

impl Far {
    /// Answers in the Redis at `url`; needs a tokio runtime. Connects in the background, and tells `near` of what others
    /// have dropped.
    ///
    /// # Errors
    /// [`InvalidUrl`].
    pub fn new(url: &str, config: &Config, near: Near) -> Result<Self, InvalidUrl> {
        let client = redis_server::client(url)?;
        let (reads, asked) = mpsc::channel(QUEUE);
        let (writes, written) = mpsc::channel(QUEUE);
        let shared = Arc::new(Shared {
            prefix: config.prefix.clone(),
            near,
            is_up: AtomicBool::new(false),
            writes,
            waiting: Arc::default(),
            claims: Mutex::default(),
            claim: config.claim,
            counts: Counts::default(),
        });
        let driver = Driver::new(client, Arc::clone(&shared), asked, written, config.redis_timeout);
        #[allow(clippy::disallowed_methods, reason = "the handle is kept, and dropping the last clone ends the task")]
        let driver = tokio::spawn(driver.run());
        Ok(Self { reads, shared, timeout: config.redis_timeout, _driver: Arc::new(Owned(driver)) })
    }

    /// Whether Redis answers.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.shared.is_up.load(Ordering::Relaxed)
    }

    /// How long a trip may take.
    #[must_use]
    pub const fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Writes that were dropped since there was no room for them.
    #[must_use]
    pub fn unwritten(&self) -> u64 {
        self.shared.counts.unwritten.load(Ordering::Relaxed)
    }

    /// What was asked so far.
    #[must_use]
    pub fn counts(&self) -> &Counts {
        &self.shared.counts
    }

    /// Looks a key up.
    pub async fn get(&self, key: &Key) -> Found {
        let (reply, answer) = oneshot::channel();
        match self.ask(Read::Get(key.clone(), reply), answer).await {
            Some(bytes) => bytes.as_deref().and_then(Kept::from_bytes).map_or(Found::Nothing, Found::Answer),
            None => Found::Unknown,
        }
    }

    /// Claims the right to call for a key.
    ///
    /// # Cancellation
    /// What was claimed meanwhile ends by itself.
    pub async fn claim(&self, key: &Key) -> Claimed {
        let token = uuid::Uuid::now_v7().simple().to_string();
        let (reply, answer) = oneshot::channel();
        let Some((is_ours, bytes)) = self.ask(Read::Claim(key.clone(), token.clone(), reply), answer).await else {
            return Claimed::Unknown;
        };
        let kept = bytes.as_deref().and_then(Kept::from_bytes);
        if !is_ours {
            return Claimed::Theirs(kept);
        }
        self.shared.claims().insert(key.clone(), token.clone());
        Claimed::Ours(Claim { key: key.clone(), token, shared: Arc::clone(&self.shared) }, kept)
    }

    /// The answer to a question; `None` = Redis is away, or slow.
    async fn ask<T>(&self, read: Read, answer: oneshot::Receiver<T>) -> Option<T> {
        if !self.is_up() {
            return None;
        }
        // Twice: it may wait for the trip before its own.
        let asked = self.reads.try_send(read).is_ok();
        let answer = if asked { timeout(self.timeout * 2, answer).await.ok().and_then(Result::ok) } else { None };
        if answer.is_none() {
            self.shared.counts.unanswered.fetch_add(1, Ordering::Relaxed);
        }
        answer
    }

    /// Keeps an answer until its hard end, unless a newer one is there. `announce`: others may have an older one that
    /// still counts, and drop it.
    pub fn put(&self, key: &Key, kept: &Kept, now: Timestamp, announce: bool) {
        let lives = kept.ends.hard_at.since(now);
        let Some(bytes) = kept.to_bytes().filter(|_| !lives.is_zero()) else { return };
        let (key, at) = (key.clone(), kept.ends.fetched_at);
        match Parcel::within(WAITING, bytes, &self.shared.waiting) {
            Some(parcel) => self.shared.write(Write::Put { key, parcel, at, lives, announce }),
            None if announce => self.shared.write(Write::Drop { key, at }),
            None => {
                self.shared.counts.unwritten.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Whether so much waits to be written that whoever has the time waits for it: [`Self::flushed`].
    #[must_use]
    pub fn is_crowded(&self) -> bool {
        self.shared.waiting.load(Ordering::Relaxed) > WAITING / 2
    }

    /// Drops what is there, here and in all processes.
    pub fn drop_all(&self, key: &Key, at: Timestamp) {
        self.shared.write(Write::Drop { key: key.clone(), at });
    }

    /// Waits until all that was written before is in Redis; false: it does not answer.
    pub async fn flushed(&self, within: Duration) -> bool {
        let (done, wait) = oneshot::channel();
        let sent = timeout(within, self.shared.writes.send(Write::Flush(done))).await;
        matches!(sent, Ok(Ok(()))) && matches!(timeout(within, wait).await, Ok(Ok(())))
    }
}

/// The announcement that nothing of a key counts that was fetched before a time.
fn announcement(key: &Key, at: Timestamp) -> String {
    format!("{} {key}", answer::stamp(at))
}

/// What an announcement says.
fn announced(text: &[u8]) -> Option<(Key, Timestamp)> {
    let (at, key) = std::str::from_utf8(text).ok()?.split_once(' ')?;
    Some((Key::from_text(key), answer::stamped(at)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cache::{
            Answer,
            policy::{Ends, Habit},
        },
        message::{Columns, Status},
    };

    /// An answer that no packing makes shorter than so many bytes.
    fn kept(bytes: usize) -> Kept {
        let dice = crate::runtime::clock::Dice::seeded(7);
        let noise: String = (0..bytes).map(|_| char::from(b'0' + u8::try_from(dice.bits() % 75).unwrap())).collect();
        let raw = serde_json::value::RawValue::from_string(serde_json::json!({ "noise": noise }).to_string()).unwrap();
        let answer =
            Answer { status: Status::Found, columns: Columns::default(), fingerprint: String::new(), raw: Some(raw) };
        let now = Timestamp::from_millis(1_000);
        let ends =
            Ends { fetched_at: now, soft_at: now, hard_at: now.after(Duration::from_secs(60)), delta: Duration::ZERO };
        Kept { answer: Arc::new(answer), ends, habit: Habit::default() }
    }

    #[tokio::test]
    async fn while_redis_is_away_so_many_bytes_wait_and_what_others_must_not_go_on_with_is_dropped_without_them() {
        let config = Config::default();
        let near = Near::new(1 << 20);
        let far = Far::new("redis://127.0.0.1:1/", &config, near).unwrap();
        let (kept, now) = (kept(1_000_000), Timestamp::from_millis(1_000));
        for number in 0..200 {
            far.put(&Key::from_text(&format!("a{number}")), &kept, now, false);
            tokio::task::yield_now().await;
        }
        let waiting = || far.shared.waiting.load(Ordering::Relaxed);
        assert!((WAITING / 2..=WAITING).contains(&waiting()) && far.is_crowded(), "{}", waiting());
        let lost = far.unwritten();
        assert!(lost > 100, "{lost}");
        far.put(&Key::from_text("b"), &kept, now, true);
        assert_eq!(far.unwritten(), lost, "it waits as a drop, which has no bytes");
        assert!(waiting() <= WAITING);
    }
}
