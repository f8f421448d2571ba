//! fetch: requests → results and failures, each call at the time of its slot.
//!
//! One [`Fetch`] per source. Records come from the [`Intake`], wait in the backlog for a slot of the
//! [`Quota`], and are handed to a task that makes the call; its outcomes go back to the intake, which
//! commits them. Nothing here waits for one request to finish before it begins another.

mod backlog;
mod call;
mod config;
mod outcome;
mod penalty;

use std::{collections::VecDeque, pin::pin, sync::Arc, time::Duration};

use tokio::{
    task::{JoinError, JoinSet},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

pub use call::{Caller, CallerParts};
pub use config::Config;

use self::{
    backlog::Backlog,
    call::{Ended, Job},
    penalty::Penalties,
};
use crate::{
    kafka::{
        Outgoing, Partition, Reader, Record, Writer,
        intake::{Input, Intake, IntakeError},
        outbox::Position,
    },
    platform::{Affected, Denial, Refusal, RefusalKind},
    quota::{Hold, Lease, Quota, Scope, Slot},
    tokens::{StoreError, keeper::Purpose},
};

/// Why fetch stopped.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Kafka.
    #[error(transparent)]
    Intake(#[from] IntakeError),
    /// A defect in a vendor's code: the request's place in the log is kept, and the next start tries it again.
    #[error("a call ended abnormally: {0}")]
    Call(#[from] JoinError),
    /// Without the tokens that were renewed since the configuration was written, nobody can call.
    #[error(transparent)]
    Tokens(#[from] StoreError),
}

/// A slot whose account has to wait for a token puts it off for at least and at most so long.
const TOKEN_WAIT: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(1)];

/// How often to ask whether an account is in use again when all are disabled.
const NOBODY_WAIT: Duration = Duration::from_secs(1);

/// The fetch stage of one source.
pub struct Fetch<R, W> {
    config: Config,
    intake: Intake<R, W>,
    backlog: Backlog<Job>,
    /// Records that ended without a call, and wait for the window or for room among the outcomes.
    uncalled: Backlog<(Position, Vec<Outgoing>)>,
    quota: Arc<dyn Quota>,
    /// Slots leased and not yet used, in time order.
    slots: VecDeque<Slot>,
    caller: Arc<Caller>,
    calls: JoinSet<Ended>,
    penalties: Penalties,
    /// When to try to call again; `None`: as soon as something changes.
    wake_at: Option<Instant>,
    stopping: bool,
    nobody_told: bool,
}

impl<R: Reader, W: Writer> Fetch<R, W> {
    /// Slots leased at once, at most: the longest that a source's accounts are asked about in one step.
    const LEASE: usize = 64;

    /// A stage that reads by `reader`, calls by `caller` at the times of `quota`, and writes by `writer`.
    pub fn new(reader: R, writer: W, caller: Caller, quota: Arc<dyn Quota>, config: Config) -> Self {
        Self {
            intake: Intake::new(reader, writer, config.commit_every),
            backlog: Backlog::default(),
            uncalled: Backlog::default(),
            quota,
            slots: VecDeque::new(),
            caller: Arc::new(caller),
            calls: JoinSet::new(),
            penalties: Penalties::default(),
            wake_at: None,
            stopping: false,
            nobody_told: false,
            config,
        }
    }

    /// Works until `stop`, then finishes the calls in flight, commits them and returns.
    ///
    /// # Errors
    /// [`FetchError`]; nothing is lost, the next start continues from the last commit.
    pub async fn run(mut self, stop: CancellationToken) -> Result<(), FetchError> {
        let tokens = Arc::clone(&self.caller.tokens);
        tokens.load(&*self.quota).await?;
        let mut watch = JoinSet::new();
        watch.spawn(Arc::clone(&tokens).watch(Arc::clone(&self.quota)));
        let mut stopped = pin!(stop.cancelled_owned());
        while !(self.stopping && self.calls.is_empty()) {
            self.dispatch().await;
            let wake_at = self.wake_at;
            tokio::select! {
                biased;
                () = &mut stopped, if !self.stopping => self.begin_to_stop().await,
                Some(ended) = self.calls.join_next() => self.end_calls(ended?).await?,
                input = self.intake.next() => self.take(input?),
                // Accounts may be in use again.
                () = tokens.changed() => {}
                () = sleep_until(wake_at.unwrap_or_else(Instant::now)), if wake_at.is_some() => {}
            }
        }
        self.intake.flush().await?;
        Ok(())
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Records(records) => {
                for (position, record) in records {
                    self.receive(position, &record);
                }
            }
            // Whoever waited for room is looked at again after each input.
            Input::Settled => {}
            Input::Leaving(partitions) | Input::Left(partitions) => {
                for partition in &partitions {
                    for job in self.backlog.remove(partition) {
                        self.intake.give_up(&job.position);
                    }
                    for (position, _) in self.uncalled.remove(partition) {
                        self.intake.give_up(&position);
                    }
                }
            }
        }
    }

    /// Puts a request into the backlog, or ends it at once if it cannot be called for.
    fn receive(&mut self, position: Position, record: &Record) {
        if self.stopping {
            return self.intake.give_up(&position);
        }
        let partition = position.partition.clone();
        match self.caller.receive(position, record) {
            Ok(job) => self.backlog.push(&partition, job),
            Err(ended) => self.uncalled.push(&partition, ended),
        }
        self.regulate(&partition);
    }

    /// Completes what ended without a call. Not beyond the window: the commit could not say that it is done.
    fn end_uncalled(&mut self) {
        while self.has_room_for_outcomes() {
            let intake = &self.intake;
            let Some((position, records)) = self.uncalled.pop(|(position, _)| intake.may_start(position)) else {
                return;
            };
            let partition = position.partition.clone();
            self.intake.complete(position, records);
            self.regulate(&partition);
        }
    }

    /// Stops a partition whose backlog is full, and lets it flow again when half of that is done.
    fn regulate(&mut self, partition: &Partition) {
        let full = (self.config.backlog / self.intake.partitions().max(1)).max(64);
        let waiting = self.backlog.waiting_in(partition) + self.uncalled.waiting_in(partition);
        if waiting >= full {
            self.intake.set_flowing(partition, false);
        } else if waiting <= full / 2 {
            self.intake.set_flowing(partition, true);
        }
    }

    /// Makes every call whose time has come, and sets when to look again.
    async fn dispatch(&mut self) {
        self.wake_at = None;
        self.end_uncalled();
        while self.has_room() && self.backlog.can_start(|job| self.intake.may_start(&job.position)) {
            let Some(slot) = self.next_slot().await else { return };
            if slot.at > Instant::now() {
                self.wake_at = Some(slot.at);
                self.slots.push_front(slot);
                return;
            }
            self.spend(slot).await;
        }
        // Nobody to call for: others may use what is left of the lease.
        if !self.slots.is_empty() && self.backlog.is_empty() {
            self.quota.give_back(self.slots.drain(..).collect()).await;
        }
    }

    /// Makes a call in this slot, or renews its account's token.
    async fn spend(&mut self, slot: Slot) {
        let (account, now) = (slot.account, Instant::now());
        let hold = match self.caller.tokens.purpose(account) {
            Purpose::Call => {
                let jobs = self.take_jobs();
                for job in &jobs {
                    self.regulate(&job.position.partition.clone());
                }
                self.calls.spawn(Arc::clone(&self.caller).call(slot, jobs));
                return;
            }
            Purpose::Renewal => {
                self.calls.spawn(Arc::clone(&self.caller).renew(slot));
                return;
            }
            Purpose::Wait(until) => Hold::Until(until.clamp(now + TOKEN_WAIT[0], now + TOKEN_WAIT[1])),
            Purpose::Nothing => Hold::Disabled,
        };
        // The slot is dropped. Without the hold an account that nothing limits would get one after the other.
        self.quota.ended(account);
        self.quota.hold(Scope::Account(account), hold).await;
    }

    fn has_room(&self) -> bool {
        self.calls.len() < self.config.calls_in_flight && self.has_room_for_outcomes()
    }

    fn has_room_for_outcomes(&self) -> bool {
        u64::try_from(self.intake.bytes()).unwrap_or(u64::MAX) < self.config.outcomes_limit.as_u64()
    }

    /// The next slot that is neither missed nor overtaken by a hold. Leases more if none is left.
    async fn next_slot(&mut self) -> Option<Slot> {
        loop {
            while let Some(slot) = self.slots.pop_front() {
                if !slot.is_late(Instant::now()) && !self.quota.is_held(&slot) {
                    return Some(slot);
                }
                self.quota.give_back(vec![slot]).await;
            }
            let room = self.config.calls_in_flight - self.calls.len();
            match self.quota.lease(self.backlog.len().min(room).min(Self::LEASE)).await {
                Lease::Slots(slots) => {
                    self.nobody_told = false;
                    self.slots.extend(slots);
                }
                Lease::NotBefore(at) => {
                    self.wake_at = Some(at);
                    return None;
                }
                Lease::Nobody => {
                    if !std::mem::replace(&mut self.nobody_told, true) {
                        let source = &self.caller.source;
                        error!(%source, "every account is disabled: requests wait on Kafka until an account is repaired: `weir account authorise` gives it a new token; with new credentials fetch has to be restarted");
                    }
                    self.wake_at = Some(Instant::now() + NOBODY_WAIT);
                    return None;
                }
            }
        }
    }

    /// The requests of one call: as many as the vendor takes and as go together.
    fn take_jobs(&mut self) -> Vec<Job> {
        let intake = &self.intake;
        let mut jobs: Vec<Job> = Vec::with_capacity(self.caller.batch_max());
        while jobs.len() < self.caller.batch_max() {
            let goes_along =
                |job: &Job| intake.may_start(&job.position) && jobs.first().is_none_or(|first| first.goes_with(job));
            match self.backlog.pop(goes_along) {
                Some(job) => jobs.push(job),
                None => break,
            }
        }
        jobs
    }

    /// Takes the outcomes of this call and of all others that have ended meanwhile.
    async fn end_calls(&mut self, first: Ended) -> Result<(), FetchError> {
        let mut next = Some(Ok(first));
        while let Some(ended) = next {
            let ended = ended?;
            self.quota.ended(ended.account);
            for job in ended.missed.into_iter().rev() {
                if self.stopping || !self.intake.may_start(&job.position) {
                    self.intake.give_up(&job.position);
                } else {
                    self.backlog.push_first(&job.position.partition.clone(), job);
                }
            }
            match ended.refusal {
                Some(refusal) => self.react(ended.account, &refusal).await,
                None if ended.outcomes.is_empty() => {}
                None => self.penalties.forgive(ended.account),
            }
            if ended.is_dead {
                self.quota.hold(Scope::Account(ended.account), Hold::Disabled).await;
            }
            for (position, records) in ended.outcomes {
                self.intake.complete(position, records);
            }
            next = self.calls.try_join_next();
        }
        Ok(())
    }

    /// What a refusal means for the calls to come.
    async fn react(&mut self, account: usize, refusal: &Refusal) {
        let source = &self.caller.source;
        let alias = self.caller.alias(account);
        match &refusal.kind {
            RefusalKind::Throttled { scope, wait } => {
                let wait = wait.unwrap_or_else(|| self.penalties.punish(account));
                warn!(%source, account = %alias, code = refusal.code, ?wait, ?scope, "the vendor says: too fast");
                let scope = match scope {
                    Affected::Account => Scope::Account(account),
                    Affected::Everyone => Scope::Source,
                };
                self.quota.hold(scope, Hold::Until(Instant::now() + wait)).await;
            }
            RefusalKind::Denied(Denial::Account) => {
                error!(%source, account = %alias, code = refusal.code, message = refusal.message, "the vendor refuses this account: it is disabled, the others carry its load");
                self.quota.hold(Scope::Account(account), Hold::Disabled).await;
            }
            // The keeper of the tokens has seen to the one.
            RefusalKind::Denied(Denial::Token) | RefusalKind::Outage | RefusalKind::Malformed | RefusalKind::Bug => {}
        }
    }

    async fn begin_to_stop(&mut self) {
        self.stopping = true;
        let waiting = self.backlog.clear();
        info!(source = %self.caller.source, in_flight = self.calls.len(), waiting = waiting.len(), "stopping: finishing the calls in flight");
        for job in waiting {
            self.intake.give_up(&job.position);
        }
        for (position, _) in self.uncalled.clear() {
            self.intake.give_up(&position);
        }
        self.quota.give_back(self.slots.drain(..).collect()).await;
    }
}

#[cfg(test)]
mod tests;
