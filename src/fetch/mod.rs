//! fetch: requests → results and failures, each call at the time of its slot.
//!
//! One [`Fetch`] per source. Records come from the [`Intake`], wait in the backlog for a slot of the
//! [`Quota`], and are handed to a task that makes the call; its outcomes go back to the intake, which
//! commits them. Nothing here waits for one request to finish before it begins another.

mod addresses;
mod backlog;
mod call;
mod cancelled;
mod config;
mod episode;
mod outcome;
mod penalty;
mod react;
mod spending;
mod spread;

use std::{collections::VecDeque, pin::pin, sync::Arc, time::Duration};

use tokio::{
    task::{JoinError, JoinSet},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

pub use call::{Caller, CallerParts};
pub use cancelled::Cancelled;
pub use config::Config;

use self::{
    addresses::Addresses,
    backlog::Backlog,
    call::{Contact, Ended, Job},
    episode::Episodes,
    penalty::Penalties,
    spending::{Spending, Spent},
    spread::Spread,
};
use crate::{
    kafka::{
        Outgoing, Partition, Reader, Record, Writer,
        intake::{Input, Intake, IntakeError},
        outbox::Position,
    },
    message::BatchId,
    platform::{Refusal, RefusalKind, address::HealthConfig},
    quota::{Cause, Hold, Lease, Quota, Scope, Slot, Tally, money::Budgets},
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

/// The fetch stage of one source.
pub struct Fetch<R, W> {
    config: Config,
    intake: Intake<R, W>,
    backlog: Backlog<Job>,
    /// Records that ended without a call, and wait for the window or for room among the outcomes.
    uncalled: Backlog<(Position, Vec<Outgoing>)>,
    quota: Arc<dyn Quota>,
    tally: Arc<Tally>,
    /// Slots leased and not yet used, in time order.
    slots: VecDeque<Slot>,
    caller: Arc<Caller>,
    calls: JoinSet<Ended>,
    penalties: Penalties,
    addresses: Addresses,
    spending: Spending,
    episodes: Episodes,
    spread: Spread,
    cancelled: Cancelled,
    /// When to try to call again; `None`: as soon as something changes.
    wake_at: Option<Instant>,
    stopping: bool,
    nobody_told: bool,
}

impl<R: Reader, W: Writer> Fetch<R, W> {
    /// Slots leased at once, at most: the longest that a source's accounts are asked about in one step.
    const LEASE: usize = 64;

    /// While nobody may call, the quota is asked this often: an operator may end a hold at any time.
    const LOOK_AGAIN: Duration = Duration::from_millis(500);

    /// A stage that reads by `reader`, calls by `caller` at the times of `quota`, and writes by `writer`.
    pub fn new(reader: R, writer: W, caller: Caller, quota: Arc<dyn Quota>, config: Config) -> Self {
        Self {
            tally: caller.tally(),
            intake: Intake::new(reader, writer, config.commit_every),
            backlog: Backlog::default(),
            uncalled: Backlog::default(),
            quota,
            slots: VecDeque::new(),
            addresses: Addresses::new(HealthConfig::default(), caller.addresses()),
            caller: Arc::new(caller),
            calls: JoinSet::new(),
            penalties: Penalties::default(),
            spending: Spending::default(),
            episodes: Episodes::default(),
            spread: Spread::new(Instant::now()),
            cancelled: Cancelled::none(),
            wake_at: None,
            stopping: false,
            nobody_told: false,
            config,
        }
    }

    /// What becomes of the slots, for reports.
    #[must_use]
    pub fn tally(&self) -> Arc<Tally> {
        Arc::clone(&self.tally)
    }

    /// The same with other rules for the addresses that calls leave from.
    #[must_use]
    pub fn with_address_health(mut self, config: HealthConfig) -> Self {
        self.addresses = Addresses::new(config, self.caller.addresses());
        self
    }

    /// The same with a budget for what its calls cost.
    #[must_use]
    pub fn with_budgets(mut self, budgets: Option<Budgets>) -> Self {
        self.spending = Spending::new(budgets);
        self
    }

    /// The same stage, which ends the requests of cancelled batches instead of calling for them.
    #[must_use]
    pub fn heeding(self, cancelled: Cancelled) -> Self {
        Self { cancelled, ..self }
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
                () = self.cancelled.changed() => self.sweep(),
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
            Ok(job) if self.cancelled.has(&job.request) => self.uncalled.push(&partition, self.caller.cancelled(job)),
            Ok(job) if !self.spending.may_call(job.request.batch.as_ref()) => {
                self.uncalled.push(&partition, self.caller.over_budget(job));
            }
            Ok(job) => self.backlog.push(&partition, job),
            Err(ended) => self.uncalled.push(&partition, ended),
        }
        self.regulate(&partition);
    }

    /// Ends what waits of a batch that has just been cancelled: at once, not at the pace of the quota.
    fn sweep(&mut self) {
        for job in self.backlog.clear() {
            let partition = job.position.partition.clone();
            if self.cancelled.has(&job.request) {
                self.uncalled.push(&partition, self.caller.cancelled(job));
            } else {
                self.backlog.push(&partition, job);
            }
        }
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
            self.use_slot(slot).await;
        }
        // Nobody to call for: others may use what is left of the lease.
        if !self.slots.is_empty() && self.backlog.is_empty() {
            self.return_slots().await;
        }
    }

    /// Makes a call in this slot, or renews its account's token.
    async fn use_slot(&mut self, slot: Slot) {
        let (account, now) = (slot.account, Instant::now());
        let (until, why) = match self.caller.tokens.purpose(account) {
            Purpose::Call => return self.make_call(slot).await,
            Purpose::Renewal => {
                self.probe(&slot).await;
                self.calls.spawn(Arc::clone(&self.caller).renew(slot));
                return;
            }
            Purpose::Wait(until) => {
                (until.clamp(now + TOKEN_WAIT[0], now + TOKEN_WAIT[1]), "its token is being renewed")
            }
            // It was disabled for that, and somebody has ended the hold.
            Purpose::Nothing => {
                (now + TOKEN_WAIT[1], "its token is refused: `weir account authorise` gives it another")
            }
        };
        // The slot is dropped. Without the hold an account that nothing limits would get one after the other.
        self.quota.ended(account);
        self.tally.returned(account);
        let cause = Cause::new(why, self.caller.now());
        self.quota.hold(Scope::Account(account), Hold::Until(until), &cause).await;
    }

    async fn make_call(&mut self, slot: Slot) {
        let jobs = self.take_jobs();
        if jobs.is_empty() {
            // The money of all that could start is spent.
            self.slots.push_front(slot);
            self.end_uncalled();
            return;
        }
        self.probe(&slot).await;
        self.charge(&jobs);
        for job in &jobs {
            self.regulate(&job.position.partition.clone());
        }
        self.calls.spawn(Arc::clone(&self.caller).call(slot, jobs));
    }

    /// If this is the first to leave from an address that was taken out, the others wait for what comes of it.
    async fn probe(&mut self, slot: &Slot) {
        let now = self.caller.now();
        if let Some(wait) = self.addresses.probe(slot.address, now) {
            let cause = Cause::new("one call tries it again", now);
            self.quota.hold(Scope::Address(slot.address), Hold::Until(Instant::now() + wait), &cause).await;
        }
    }

    /// Hands back what is left of the lease.
    async fn return_slots(&mut self) {
        self.slots.iter().for_each(|slot| self.tally.returned(slot.account));
        self.quota.give_back(self.slots.drain(..).collect()).await;
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
                if slot.is_late(Instant::now()) {
                    self.tally.missed(slot.account);
                } else {
                    self.tally.returned(slot.account);
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
                    self.wake_at = Some(at.min(Instant::now() + Self::LOOK_AGAIN));
                    return None;
                }
                Lease::Nobody => {
                    if !std::mem::replace(&mut self.nobody_told, true) {
                        let source = &self.caller.source;
                        error!(%source, "every account is disabled: requests wait on Kafka until an account is repaired: `weir account authorise` gives it a new token, `weir quota resume` ends its hold");
                    }
                    self.wake_at = Some(Instant::now() + Self::LOOK_AGAIN);
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
                Some(job) if self.spending.may_call(job.request.batch.as_ref()) => jobs.push(job),
                Some(job) => {
                    let partition = job.position.partition.clone();
                    self.uncalled.push(&partition, self.caller.over_budget(job));
                }
                None => break,
            }
        }
        jobs
    }

    /// Counts what a call costs: the price of one call for each batch that it serves.
    fn charge(&mut self, jobs: &[Job]) {
        let now = self.caller.now();
        for batch in batches(jobs) {
            for spent in self.spending.charge(batch, now) {
                let source = &self.caller.source;
                match spent {
                    Spent::Day(calls) => warn!(%source, calls, "the day's budget is spent; told to go on (on_budget)"),
                    Spent::Batch(batch, calls) => {
                        warn!(%source, %batch, calls, "the batch's budget is spent: with on_budget = \"stop\" the rest of it ends as dead letters with reason budget");
                    }
                }
            }
        }
    }

    /// Takes the outcomes of this call and of all others that have ended meanwhile.
    async fn end_calls(&mut self, first: Ended) -> Result<(), FetchError> {
        let mut next = Some(Ok(first));
        while let Some(ended) = next {
            let ended = ended?;
            self.quota.ended(ended.account);
            match &ended.contact {
                Contact::Called(_) => {
                    self.tally.called(ended.account, ended.refusal.as_ref().is_some_and(Refusal::is_no));
                }
                Contact::None => self.tally.missed(ended.account),
                // Neither late nor a call: the vendor knows nothing of it.
                Contact::NoWay(_) => {}
            }
            self.react_address(&ended).await;
            // What was not called for costs nothing.
            for batch in batches(&ended.missed) {
                self.spending.refund(batch);
            }
            for job in ended.missed.into_iter().rev() {
                if self.stopping || !self.intake.may_start(&job.position) {
                    self.intake.give_up(&job.position);
                } else if self.cancelled.has(&job.request) {
                    self.uncalled.push(&job.position.partition.clone(), self.caller.cancelled(job));
                } else {
                    self.backlog.push_first(&job.position.partition.clone(), job);
                }
            }
            if let Some(latency) = ended.latency {
                self.spread.note(latency, Instant::now());
            }
            match &ended.refusal {
                Some(refusal) => self.react((ended.account, ended.address), ended.left_at, refusal).await,
                None if ended.outcomes.is_empty() => {}
                None => self.penalties.forgive(ended.account, ended.left_at),
            }
            let is_throttled = matches!(&ended.refusal, Some(Refusal { kind: RefusalKind::Throttled { .. }, .. }));
            // A throttle's own wait overrides the other headers.
            if !is_throttled {
                self.heed((ended.account, ended.address), ended.advice).await;
            }
            if let Some(cause) = self.caller.tokens.death(ended.account).filter(|_| ended.is_dead) {
                self.quota.hold(Scope::Account(ended.account), Hold::Disabled, &cause).await;
            }
            for (position, records) in ended.outcomes {
                self.intake.complete(position, records);
            }
            next = self.calls.try_join_next();
        }
        Ok(())
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
        self.return_slots().await;
    }
}

/// The batches that a call serves, each once; `None` for requests of no batch.
fn batches(jobs: &[Job]) -> Vec<Option<&BatchId>> {
    let mut batches: Vec<_> = jobs.iter().map(|job| job.request.batch.as_ref()).collect();
    batches.sort_unstable();
    batches.dedup();
    batches
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod vendor_tests;
