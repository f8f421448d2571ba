//! batches: publishes the end of each batch to a webhook, a topic or both.
//!
//! Runs beside the sink, in one process of the fleet: the one that leads ([`Leadership`]), by the only partition of the
//! control topic in a group made for this. Which ends have been told stands in ClickHouse, so another process goes on where this one
//! was. An end is told at least once: a process that dies between the answer and its note tells it again. An end that
//! the webhook does not take is on the topic all the same.

mod behind;
mod topic;
mod webhook;

use std::{collections::HashMap, time::Duration};

use secrecy::SecretString;
use serde::Deserialize;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

pub use behind::Followed;
pub use topic::Herald;
pub use webhook::{Webhook, WebhookError};

use crate::{
    kafka::{ReadError, Reader, leadership::Leadership},
    message::{BatchEnd, BatchId},
    runtime::{
        clock::{Clock, Dice, Timestamp},
        health::RoleHealth,
    },
    store::{Store, Trouble},
};

/// How often the tables are asked.
const ROUND: Duration = Duration::from_secs(5);

/// How far back they are asked mostly, and how often from the beginning: a sink that was away for long stores records
/// that are older.
const RECENT: Duration = Duration::from_secs(2 * 60 * 60);
const ALL_EVERY: Duration = Duration::from_secs(10 * 60);

/// How long after a failed round the next one follows: doubled each time.
const PAUSE_FIRST: Duration = Duration::from_secs(5);
const PAUSE_MAX: Duration = Duration::from_secs(5 * 60);

/// After so many posts that failed in one round the webhook is left alone until the next.
const FAILURES_MAX: u32 = 3;

/// `[batches]`: who is told that a batch has ended.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where the end of each batch is posted to. A secret.
    pub webhook: Option<SecretString>,
    /// The header `Authorization` of the post, if it wants one. A secret.
    pub authorization: Option<SecretString>,
    /// Whether the end of each batch is also written to the topic of ends.
    pub topic: bool,
    /// How long nothing may have happened in a batch before it counts as ended: requests may still be on their way.
    #[serde(with = "humantime_serde")]
    pub settle: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self { webhook: None, authorization: None, topic: false, settle: Duration::from_secs(10) }
    }
}

/// What it works with.
pub struct Batches<R> {
    /// Whether this process tells.
    pub leadership: Leadership<R>,
    /// The tables.
    pub store: Store,
    /// What the tables follow from.
    pub followed: Followed,
    /// Who is told by a post.
    pub webhook: Option<Webhook>,
    /// Who is told by a record.
    pub herald: Option<Herald>,
    /// When a batch has ended.
    pub settle: Duration,
    /// The time.
    pub clock: Clock,
    /// Spreads repetitions.
    pub dice: Dice,
    /// Where it says how it is.
    pub health: RoleHealth,
}

/// What a round has come to.
enum Round {
    Done,
    /// Try again after a pause.
    Failed(String),
}

impl<R: Reader> Batches<R> {
    /// Tells the ends of batches until `stop`.
    ///
    /// # Errors
    /// [`ReadError`]: start again.
    pub async fn run(mut self, stop: CancellationToken) -> Result<(), ReadError> {
        let (mut next, mut pause) = (Instant::now(), PAUSE_FIRST);
        let (mut all_at, mut tries) = (Instant::now(), Tries::new());
        loop {
            let leads = self.leadership.leads();
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                changed = self.leadership.changed() => {
                    changed?;
                }
                () = sleep_until(next), if leads => {
                    let all = Instant::now() >= all_at;
                    // What was posted and not noted is posted again.
                    let round = tokio::select! {
                        () = stop.cancelled() => return Ok(()),
                        round = self.round(all, &mut tries) => round,
                    };
                    match round {
                        Round::Done => {
                            self.health.ready();
                            (next, pause) = (Instant::now() + ROUND, PAUSE_FIRST);
                            if all {
                                all_at = Instant::now() + ALL_EVERY;
                            }
                        }
                        Round::Failed(why) => {
                            tracing::warn!(again_in = ?pause, "cannot publish the end of a batch; trying again: {why}");
                            self.health.not_ready(why);
                            next = Instant::now() + pause.mul_f64(0.5 + self.dice.fraction() / 2.0);
                            pause = (pause * 2).min(PAUSE_MAX);
                        }
                    }
                }
            }
        }
    }

    async fn round(&mut self, all: bool, tries: &mut Tries) -> Round {
        let ends = match self.ends(all).await {
            Ok(ends) => ends,
            Err(why) => return Round::Failed(why),
        };
        if let Some(herald) = &mut self.herald
            && let Err(why) = herald.write(&ends).await
        {
            return Round::Failed(why);
        }
        let (mut failures, mut last) = (0, None);
        for end in in_turn(ends, tries) {
            match self.tell(&end).await {
                Ok(()) => tracing::info!(batch = %end.batch, requested = end.requested, "published the end of a batch"),
                Err(why) => {
                    failures += 1;
                    *tries.entry(end.batch.clone()).or_default() += 1;
                    last = Some(format!("batch {}: {why}", end.batch));
                }
            }
            if failures >= FAILURES_MAX {
                break;
            }
        }
        last.map_or(Round::Done, Round::Failed)
    }

    /// The ends that are to be told; none while the sink has not come to all that was written before.
    async fn ends(&self, all: bool) -> Result<Vec<BatchEnd>, String> {
        let words = |trouble: Trouble| trouble.to_string();
        let now = self.clock.now();
        self.store.begin_telling(now).await.map_err(words)?;
        let back = |span: Duration| {
            Timestamp::from_millis(now.as_millis().saturating_sub(i64::try_from(span.as_millis()).unwrap_or(i64::MAX)))
        };
        let (since, before) = (if all { Timestamp::from_millis(0) } else { back(RECENT) }, back(self.settle));
        if self.store.untold_ends(since, before).await.map_err(words)?.is_empty() {
            return Ok(Vec::new());
        }
        if self.followed.is_behind(before).await.map_err(|error| error.to_string())? {
            return Ok(Vec::new());
        }
        // Asked again: now all that was written before is counted.
        self.store.untold_ends(since, before).await.map_err(words)
    }

    /// Posts an end that is on the topic already, if it is to be there, and notes that it is told.
    async fn tell(&mut self, end: &BatchEnd) -> Result<(), String> {
        if let Some(webhook) = &self.webhook {
            webhook.post(end).await.map_err(|why| format!("batches.webhook: {why}"))?;
        }
        let noted = self.store.told(end.batch.as_str(), end.finished_at, self.clock.now()).await;
        noted.map_err(|trouble| trouble.to_string())?;
        if let Some(herald) = &mut self.herald {
            herald.told(end);
        }
        Ok(())
    }
}

/// How often the end of a batch was not taken.
type Tries = HashMap<BatchId, u32>;

/// The ends in the order in which they are told: those that were refused least often first, so that a few that the receiver
/// never takes do not keep all others waiting.
fn in_turn(mut ends: Vec<BatchEnd>, tries: &mut Tries) -> Vec<BatchEnd> {
    tries.retain(|batch, _| ends.iter().any(|end| end.batch == *batch));
    ends.sort_by_key(|end| tries.get(&end.batch).copied().unwrap_or_default());
    ends
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    pub fn end() -> BatchEnd {
        let (batch, finished_at) = ("monday".parse().unwrap(), Timestamp::from_millis(1_795_824_000_123));
        BatchEnd { batch, requested: 10, found: 6, absent: 2, off_shelf: 1, dead: 1, finished_at }
    }

    #[test]
    fn an_end_says_what_became_of_each_request() {
        let expected = json!({"batch": "monday", "requested": 10, "found": 6, "absent": 2, "off_shelf": 1, "dead": 1,
            "finished_at": "2026-11-28T00:00:00.123Z"});
        assert_eq!(serde_json::to_value(end()).unwrap(), expected);
    }
}
