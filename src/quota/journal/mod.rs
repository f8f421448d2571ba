//! What outlives a worker: the compacted topic on which workers report and operators set.
//!
//! ```text
//!  start:  read all of it ──► Past: what is spent, what is held ──► the quota
//!  then:   every second, what has changed of our reports ──► topic
//!          what an operator sets ──► hold, release, pace     within a second, in every worker
//! ```
//!
//! [`known`] folds the records, [`super::past`] makes of them what a process takes for granted, [`report`] writes
//! ours, [`settings_diff`] says what a setting changes. A worker whose reports are not taken, and that has budgets, stops:
//! else nobody would know what it spends.

pub mod known;
pub mod report;
pub mod settings_diff;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use self::{
    known::{Changed, Known},
    report::{Reporter, Written},
    settings_diff::{Effect, effects},
};
use super::{Aliases, Hold, Limit, PaceBy, Past, Quota, Scope, past};
use crate::{
    kafka::{
        Outgoing, Producer, ReadError, WriteError,
        client::Config,
        follow::{Follower, Seen},
    },
    message::{AccountAlias, QuotaSetting, SourceName},
    runtime::clock::{Clock, Timestamp},
};

/// How long reading the whole topic may take.
const READ_WITHIN: Duration = Duration::from_secs(60);
/// How often reports are written, if anything has changed.
const EVERY: Duration = Duration::from_secs(1);
/// How often a worker shows that it lives, though nothing has changed.
pub const HEARTBEAT: Duration = Duration::from_secs(10);
/// How long writing a report may take.
const WRITE_WITHIN: Duration = Duration::from_secs(10);
/// After so long without a report being taken a worker with budgets stops; what is left of
/// [`past::UNREPORTED_MAX`] is for the parts that wait for their turn, and for stopping.
const UNREPORTED: Duration = Duration::from_secs(30);
/// In so many turns every part of the accounts is reported.
const TURNS: u32 = 15;
/// How long the last reports may take.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);
/// Reports of workers that have not been heard of for so long say nothing about any window of a vendor any more,
/// except windows that are longer still.
const FORGET_AFTER: Duration = Duration::from_secs(8 * 24 * 60 * 60);

/// Why there is no journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Kafka.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// It takes too long.
    #[error(
        "reading {topic} to its end took more than {READ_WITHIN:?}: the quota state is unknown, so no calls are made. \
         Do the brokers answer? Is the topic compacted (`weir topics apply`)?"
    )]
    Slow {
        /// The topic.
        topic: String,
    },
    /// No producer.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// Nobody would know what this worker spends.
    #[error("no quota report could be written to {topic} for {UNREPORTED:?}: {reason}; calls stop until one is")]
    Unreported {
        /// The topic.
        topic: String,
        /// What Kafka said last.
        reason: String,
    },
}

/// Reads the topic to its end as it is now; of all sources, or of one.
///
/// # Errors
/// [`JournalError`].
pub async fn read(config: &Config, topic: &str, only: Option<SourceName>) -> Result<(Known, Follower), JournalError> {
    let read = async {
        let mut follower = Follower::open(config, topic).await?;
        let mut known = Known::of(only);
        loop {
            match follower.next().await? {
                Seen::Record(record) => {
                    known.take(topic, &record);
                }
                Seen::CaughtUp => return Ok((known, follower)),
            }
        }
    };
    timeout(READ_WITHIN, read).await.map_err(|_| JournalError::Slow { topic: topic.to_owned() })?
}

/// What is done before an operator's `resume` lets calls go again.
#[async_trait]
pub trait BeforeResume: Send + Sync {
    /// Does it, in a time that the operator can wait for.
    async fn before_resume(&self);
}

/// One worker's side of the topic.
pub struct Journal {
    follower: Follower,
    producer: Producer,
    topic: Arc<str>,
    source: SourceName,
    clock: Clock,
    known: Known,
    before_resume: Option<Arc<dyn BeforeResume>>,
}

impl Journal {
    /// Reads all that is known of a source.
    ///
    /// # Errors
    /// [`JournalError`].
    pub async fn open(config: &Config, topic: &str, source: &SourceName, clock: Clock) -> Result<Self, JournalError> {
        let (known, follower) = read(config, topic, Some(source.clone())).await?;
        let producer = Producer::new(config)?;
        Ok(Self { follower, producer, topic: topic.into(), source: source.clone(), clock, known, before_resume: None })
    }

    /// The same, which does this before an operator's `resume` of the source or an account.
    #[must_use]
    pub fn with_before_resume(self, before_resume: Arc<dyn BeforeResume>) -> Self {
        Self { before_resume: Some(before_resume), ..self }
    }

    /// What is known of the past.
    #[must_use]
    pub fn past(&self) -> Past {
        past::merge(self.known.reports_of(&self.source), &self.known.settings_of(&self.source), self.clock.now())
    }

    /// Puts what is held and what is set into effect, before anybody calls.
    pub async fn restore(&self, past: &Past, quota: &dyn Quota, aliases: &Aliases) {
        let settings = self.known.settings_of(&self.source);
        for setting in settings.accounts.into_values().chain(settings.addresses.into_values()) {
            let account = setting.account.as_ref().map(tracing::field::display);
            debug!(source = %self.source, account, address = setting.address, "restoring an operator's setting");
            let changed = Changed { before: None, now: setting };
            put_into_effect(&changed, quota, aliases, &self.clock, None).await;
        }
        let accounts = past.accounts.iter().map(|(alias, known)| (Some(alias), known));
        let accounts = accounts.chain([(None, &past.whole)]);
        let accounts = accounts.map(|(account, known)| {
            let name = account.map_or_else(|| "all accounts".to_owned(), |alias| format!("account {alias}"));
            (self.scope(aliases, account), name, known)
        });
        let names = quota.snapshot(0..0, self.clock.now()).addresses.into_iter().map(|address| address.name);
        let addresses = names.enumerate().filter_map(|(index, name)| {
            let known = past.addresses.get(&name)?;
            Some((Some(Scope::Address(index)), format!("address {name}"), known))
        });
        for (scope, name, known) in accounts.chain(addresses) {
            let (Some(scope), Some(held)) = (scope, &known.held) else { continue };
            let until = held.until.map_or_else(|| "resumed".to_owned(), |until| until.to_string());
            info!(source = %self.source, until, reason = &*held.cause.reason, "{name} is still paused");
            let until = held.until.map_or(Hold::Disabled, |until| Hold::Until(self.instant(until)));
            quota.hold(scope, until, &held.cause).await;
        }
    }

    /// Reports and follows until fetch has `ended`; then says so in a last report.
    ///
    /// # Errors
    /// [`JournalError`]: then nobody may call any more.
    pub async fn run(
        mut self,
        reporter: Reporter,
        has_budgets: bool,
        ended: CancellationToken,
    ) -> Result<(), JournalError> {
        reporter.resume(self.known.reports_of(&self.source));
        self.forget(&reporter).await;
        let mut writing = Writing::new(Arc::new(reporter), self.producer.clone(), has_budgets);
        loop {
            tokio::select! {
                () = ended.cancelled() => break,
                seen = self.follower.next() => {
                    if let Seen::Record(record) = seen? && let Some(changed) = self.known.take(&self.topic, &record) {
                        let Reporter { quota, aliases, .. } = &*writing.reporter;
                        let before_resume = self.before_resume.as_deref();
                        put_into_effect(&changed, quota.as_ref(), aliases, &self.clock, before_resume).await;
                    }
                    // Beside settings only what others have spent for batches matters from now on.
                    if let Some(purse) = &writing.reporter.purse {
                        let wholes = self.known.reports_of(&self.source).filter_map(|report| report.whole.as_ref());
                        wholes.for_each(|whole| purse.read(&whole.batches));
                    }
                    self.known.forget_reports();
                }
                done = writing.step() => done?,
            }
        }
        writing.close().await;
        Ok(())
    }

    /// Takes away reports of workers that are long gone, and parts of ours that there are no more.
    async fn forget(&self, reporter: &Reporter) {
        let now = self.clock.now();
        let is_old = |report: &crate::message::QuotaReport| {
            let longest = report.accounts.iter().flat_map(|account| &account.spent);
            let longest = longest.map(|spent| spent.width.saturating_mul(spent.span)).max().unwrap_or_default();
            now.since(report.reported_at) > FORGET_AFTER.max(Duration::from_micros(longest))
        };
        let is_ours = |instance: &str, chunk: u32| instance == reporter.instance && chunk >= reporter.chunks();
        let gone = self.known.reports().filter(|(_, report)| is_ours(&report.instance, report.chunk) || is_old(report));
        let gone: Vec<Outgoing> = gone.map(|(key, _)| tombstone(&self.topic, key)).collect();
        if !gone.is_empty()
            && let Err(error) = self.producer.send(gone).await
        {
            debug!(%error, "cannot delete old quota reports; trying again at the next start");
        }
    }

    /// When a time of day comes; at most a year ahead.
    fn instant(&self, at: Timestamp) -> Instant {
        instant(&self.clock, at)
    }

    fn scope(&self, aliases: &Aliases, account: Option<&AccountAlias>) -> Option<Scope> {
        scope(&self.source, aliases, account)
    }
}

fn scope(source: &SourceName, aliases: &Aliases, account: Option<&AccountAlias>) -> Option<Scope> {
    let Some(alias) = account else { return Some(Scope::Source) };
    let index = aliases.iter().position(|known| known == alias);
    if index.is_none() {
        debug!(%source, account = %alias, "not an account of this worker");
    }
    index.map(Scope::Account)
}

fn address_scope(quota: &dyn Quota, name: &str, clock: &Clock) -> Option<Scope> {
    let addresses = quota.snapshot(0..0, clock.now()).addresses;
    addresses.iter().position(|address| address.name == name).map(Scope::Address)
}

fn instant(clock: &Clock, at: Timestamp) -> Instant {
    Instant::now() + at.since(clock.now()).min(Limit::PER_MAX)
}

/// Does what an operator's setting asks for.
async fn put_into_effect(
    changed: &Changed,
    quota: &dyn Quota,
    aliases: &Aliases,
    clock: &Clock,
    before_resume: Option<&dyn BeforeResume>,
) {
    let QuotaSetting { source, account, address, .. } = &changed.now;
    let scope = match address {
        Some(name) => address_scope(quota, name, clock),
        None => scope(source, aliases, account.as_ref()),
    };
    let Some(scope) = scope else { return };
    let (account, address) = (account.as_ref().map(tracing::field::display), address.as_deref());
    for effect in effects(changed, clock.now()) {
        info!(%source, account, address, "{effect}");
        match effect {
            Effect::Release(as_of) => {
                if let Some(before_resume) = before_resume.filter(|_| address.is_none()) {
                    before_resume.before_resume().await;
                }
                quota.release(scope, as_of).await;
            }
            Effect::Pause(until, cause) => {
                let until = until.map_or_else(|| Instant::now() + Limit::PER_MAX, |until| instant(clock, until));
                quota.hold(scope, Hold::Until(until), &cause).await;
            }
            Effect::Pace(share) => quota.set_pace(scope, PaceBy::Operator, share).await,
        }
    }
}

fn tombstone(topic: &Arc<str>, key: &str) -> Outgoing {
    Outgoing { topic: Arc::clone(topic), key: Some(key.to_owned().into()), value: bytes::Bytes::new(), headers: vec![] }
}

/// Our reports on their way.
struct Writing {
    reporter: Arc<Reporter>,
    producer: Producer,
    has_budgets: bool,
    /// What was written last, by part; `None` = write it in any case.
    prints: Vec<Option<u64>>,
    /// The part whose turn it is.
    turn: u32,
    next_at: Instant,
    alive_at: Instant,
    /// When a report was taken last.
    taken_at: Instant,
    /// Calls of today as the report on its way has them, and as the last one that was taken had them.
    sent: u64,
    taken: u64,
    under_way: JoinSet<Result<Vec<(u32, u64)>, WriteError>>,
}

impl Writing {
    fn new(reporter: Arc<Reporter>, producer: Producer, has_budgets: bool) -> Self {
        let (now, prints) = (Instant::now(), vec![None; usize::try_from(reporter.chunks()).unwrap_or_default()]);
        let under_way = JoinSet::new();
        let sent = reporter.calls();
        Self {
            reporter,
            producer,
            has_budgets,
            prints,
            turn: 0,
            next_at: now,
            alive_at: now,
            taken_at: now,
            sent,
            taken: sent,
            under_way,
        }
    }

    /// Waits for what comes next, and does it.
    ///
    /// # Cancellation
    /// Safe: reports are written by a task of their own.
    async fn step(&mut self) -> Result<(), JournalError> {
        tokio::select! {
            Some(done) = self.under_way.join_next() => {
                let done = done.unwrap_or_else(|error| Err(self.refused(error.to_string())));
                self.take(done)
            }
            () = sleep_until(self.next_at), if self.under_way.is_empty() => {
                self.begin();
                Ok(())
            }
        }
    }

    fn begin(&mut self) {
        let now = Instant::now();
        self.next_at = now + EVERY;
        self.sent = self.reporter.calls();
        if now >= self.alive_at {
            self.alive_at = now + HEARTBEAT;
            self.prints[0] = None;
        }
        let chunks = self.reporter.chunks();
        let count = chunks.div_ceil(TURNS).max(4).min(chunks);
        let turn = |n: u32| (self.turn + n) % chunks;
        let mut due: Vec<u32> = (0..count).map(turn).collect();
        if self.prints[0].is_none() && !due.contains(&0) {
            due.push(0);
        }
        self.turn = turn(count);
        let prints = self.prints.clone();
        let (reporter, producer) = (Arc::clone(&self.reporter), self.producer.clone());
        self.under_way.spawn(async move {
            let written = write(&reporter, due, false).await;
            let print = |written: &Written| usize::try_from(written.chunk).ok().and_then(|chunk| prints[chunk]);
            let changed: Vec<Written> =
                written.into_iter().filter(|written| print(written) != Some(written.print)).collect();
            let prints = changed.iter().map(|written| (written.chunk, written.print)).collect();
            let records = changed.into_iter().map(|written| written.record).collect();
            let late =
                |_| WriteError::Refused { topic: reporter.topic.to_string(), reason: "no answer in time".into() };
            timeout(WRITE_WITHIN, producer.send(records)).await.map_err(late)??;
            Ok(prints)
        });
    }

    fn take(&mut self, done: Result<Vec<(u32, u64)>, WriteError>) -> Result<(), JournalError> {
        match done {
            Ok(prints) => {
                self.taken_at = Instant::now();
                self.taken = self.sent;
                for (chunk, print) in prints {
                    self.prints[usize::try_from(chunk).unwrap_or_default()] = Some(print);
                }
                Ok(())
            }
            Err(error) if self.has_budgets && self.taken_at.elapsed() > UNREPORTED => {
                Err(JournalError::Unreported { topic: self.reporter.topic.to_string(), reason: error.to_string() })
            }
            Err(error) => {
                warn!(%error, "cannot write the quota report to Kafka; trying again");
                Ok(())
            }
        }
    }

    fn refused(&self, reason: String) -> WriteError {
        WriteError::Refused { topic: self.reporter.topic.to_string(), reason }
    }

    /// The last reports: from now on this worker does not call.
    async fn close(mut self) {
        self.under_way.shutdown().await;
        let calls = self.reporter.calls().saturating_sub(self.taken);
        let last = async {
            let all = (0..self.reporter.chunks()).collect();
            let written = write(&self.reporter, all, true).await;
            self.producer.send(written.into_iter().map(|written| written.record).collect()).await
        };
        match timeout(CLOSE_WITHIN, last).await {
            Ok(Ok(())) => debug!("wrote the last quota report"),
            Ok(Err(error)) => {
                warn!(%error, calls, "cannot write the last quota report: the next process does not know of so many calls of today, and assumes more than there were");
            }
            Err(_) => {
                warn!(
                    calls,
                    "the last quota report was not written in time: the next process does not know of so many calls of \
                     today, and assumes more than there were"
                );
            }
        }
    }
}

/// Makes records of these parts, away from the async threads: with thousands of accounts it takes milliseconds.
async fn write(reporter: &Arc<Reporter>, chunks: Vec<u32>, closed: bool) -> Vec<Written> {
    let reporter = Arc::clone(reporter);
    let write = move || chunks.into_iter().map(|chunk| reporter.write(chunk, closed)).collect();
    tokio::task::spawn_blocking(write).await.unwrap_or_default()
}

#[cfg(test)]
mod tests;
