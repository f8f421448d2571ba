//! What is written into Redis, as commands.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use ::redis::Pipeline;
use tokio::sync::oneshot;

use super::{Shared, announcement};
use crate::{
    cache::{answer, key::Key},
    runtime::clock::Timestamp,
};

/// KEYS: answer; ARGV: its stamp, its bytes, milliseconds to live, channel, announcement or nothing. A late answer does
/// not replace a newer one: the stamps that both begin with are ordered like texts.
const PUT: &str = "
if redis.call('GETRANGE', KEYS[1], 0, 15) <= ARGV[1] then redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) end
if ARGV[5] ~= '' then redis.call('PUBLISH', ARGV[4], ARGV[5]) end";

/// KEYS: answer; ARGV: stamp, channel, announcement. What was fetched since then stays.
const DROP: &str = "
if redis.call('GETRANGE', KEYS[1], 0, 15) < ARGV[1] then redis.call('DEL', KEYS[1]) end
redis.call('PUBLISH', ARGV[2], ARGV[3])";

/// KEYS: claim; ARGV: token.
const RELEASE: &str = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end";

/// KEYS: claim; ARGV: token, milliseconds to live.
const RENEW: &str = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end";

/// So many announcements are listed for those who could not hear them, about 1 MB.
const DROPS: i64 = 10_000;
/// For so long after the last one.
const DROPS_LAST: Duration = Duration::from_secs(24 * 60 * 60);

/// The bytes of an answer on their way into Redis, counted for as long as they wait.
#[derive(Debug)]
pub struct Parcel {
    bytes: Vec<u8>,
    waiting: Arc<AtomicUsize>,
}

impl Parcel {
    /// `None`: more than `limit` would wait, of which `waiting` says how much it is.
    pub fn within(limit: usize, bytes: Vec<u8>, waiting: &Arc<AtomicUsize>) -> Option<Self> {
        let more = |now: usize| now.checked_add(bytes.len()).filter(|all| *all <= limit);
        let fits = waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok();
        fits.then(|| Self { bytes, waiting: Arc::clone(waiting) })
    }
}

impl Drop for Parcel {
    fn drop(&mut self) {
        self.waiting.fetch_sub(self.bytes.len(), Ordering::Relaxed);
    }
}

/// One change. Each can be made twice.
#[derive(Debug)]
pub enum Write {
    Put {
        key: Key,
        parcel: Parcel,
        at: Timestamp,
        lives: Duration,
        announce: bool,
    },
    Drop {
        key: Key,
        at: Timestamp,
    },
    Release {
        key: Key,
        token: String,
    },
    Renew {
        key: Key,
        token: String,
    },
    /// All before it is written.
    Flush(oneshot::Sender<()>),
}

impl Write {
    /// Whether others go on with something old if it is lost; else it costs a call at most.
    pub const fn matters(&self) -> bool {
        match self {
            Self::Put { announce, .. } => *announce,
            Self::Drop { .. } => true,
            Self::Release { .. } | Self::Renew { .. } | Self::Flush(_) => false,
        }
    }

    /// What others have to hear of it.
    const fn announces(&self) -> Option<(&Key, Timestamp)> {
        match self {
            Self::Put { key, at, announce: true, .. } | Self::Drop { key, at } => Some((key, *at)),
            Self::Put { .. } | Self::Release { .. } | Self::Renew { .. } | Self::Flush(_) => None,
        }
    }

    /// Adds its commands.
    pub fn add_to(&self, pipeline: &mut Pipeline, shared: &Shared) {
        // Not in the script: a cluster may have it on another node.
        if let Some((key, at)) = self.announces() {
            let drops = shared.drops_key();
            pipeline.cmd("ZADD").arg(&drops).arg(at.as_millis()).arg(announcement(key, at)).ignore();
            pipeline.cmd("ZREMRANGEBYRANK").arg(&drops).arg(0).arg(-DROPS - 1).ignore();
            pipeline.cmd("PEXPIRE").arg(&drops).arg(DROPS_LAST.as_millis().to_string()).ignore();
        }
        let mut script = |text: &str, key: String, arguments: &[&[u8]]| {
            let command = pipeline.cmd("EVAL").arg(text).arg(1).arg(key);
            for argument in arguments {
                command.arg(*argument);
            }
            command.ignore();
        };
        let millis = |time: &Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1).to_string();
        match self {
            Self::Put { key, parcel, at, lives, announce } => {
                let (stamp, channel) = (answer::stamp(*at), shared.channel());
                let lives = millis(lives);
                let said = if *announce { announcement(key, *at) } else { String::new() };
                let arguments: [&[u8]; 5] =
                    [stamp.as_bytes(), &parcel.bytes, lives.as_bytes(), channel.as_bytes(), said.as_bytes()];
                script(PUT, shared.answer_key(key), &arguments);
            }
            Self::Drop { key, at } => {
                let (stamp, channel, said) = (answer::stamp(*at), shared.channel(), announcement(key, *at));
                script(DROP, shared.answer_key(key), &[stamp.as_bytes(), channel.as_bytes(), said.as_bytes()]);
            }
            Self::Release { key, token } => script(RELEASE, shared.claim_key(key), &[token.as_bytes()]),
            Self::Renew { key, token } => {
                script(RENEW, shared.claim_key(key), &[token.as_bytes(), millis(&shared.claim).as_bytes()]);
            }
            Self::Flush(_) => {}
        }
    }
}
