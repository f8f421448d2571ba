//! fetch: requests → results and failures, each call at the time of its slot.
//!
//! One [`Fetch`] per source. Records come from the [`Intake`], wait in the backlog for a slot of the
//! [`Quota`], and are handed to a task that makes the call; its outcomes go back to the intake, which
//! commits them. Nothing here waits for one request to finish before it begins another.

mod addresses;
mod at_risk;
mod backlog;
mod breakers;
mod cached;
mod call;
mod carry;
mod config;
mod delays;
mod dispatch;
mod end;
mod ended;
mod episode;
mod exhaustion;
mod grouped;
mod hasten;
mod job;
mod lanes;
mod misfits;
mod outcome;
mod penalty;
mod react;
mod regroup;
mod room;
mod set_aside;
mod spending;
mod splits;
mod spread;
mod suspects;
mod unpaid;

use std::{collections::VecDeque, pin::pin, sync::Arc};

use tokio::{
    sync::watch,
    task::{JoinError, JoinSet},
    time::{Instant, sleep_until, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

pub use call::{Caller, CallerParts};
pub use carry::Carry;
pub use config::{AtRisk, Config};
pub use room::Room;

use self::{
    addresses::Addresses,
    at_risk::Gate,
    backlog::Backlog,
    breakers::{Breakers, Fallback},
    cached::Cached,
    call::Ended,
    delays::Delays,
    end::{Called, End, ReplySize},
    episode::Episodes,
    exhaustion::Exhaustion,
    hasten::Haste,
    job::Job,
    lanes::Lanes,
    misfits::Misfits,
    penalty::Penalties,
    room::Place,
    set_aside::Aside,
    spending::Spending,
    splits::Splits,
    spread::Spread,
    unpaid::Unpaid,
};
use crate::{
    breaker::BreakerConfig,
    cache::SourceCache,
    cancelled::Cancelled,
    kafka::{
        Partition, Reader, Record, Writer,
        intake::{Input, Intake, IntakeError},
        kept::{Answer, Kept},
        outbox::{Position, Risk},
    },
    message::{BatchId, Lane, SourceName},
    platform::{address::HealthConfig, http::BODY_LIMIT},
    quota::{Limit, Pacing, Pay, Purse, Quota, Share, Slot, Tally, money::Budgets, plan::Limits},
    runtime::metrics::{Fetching, METRICS},
    tokens::StoreError,
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

/// The fetch stage of one source.
pub struct Fetch<R, W> {
    config: Config,
    intake: Intake<R, W>,
    backlog: Lanes,
    /// Requests that wait for an answer without a call of their own.
    cached: Cached,
    express_share: watch::Receiver<f64>,
    /// Requests that wait until there is room for what the cache may have for them.
    arrivals: Backlog<Job>,
    /// Requests that ended without a call, and wait for the window or for room among the outcomes.
    uncalled: Backlog<(Position, End)>,
    /// Requests whose call has ended, and that wait for room among the outcomes.
    called: Backlog<(Position, Called)>,
    reply_size: ReplySize,
    /// Requests that were called for before the stage began anew, and wait for the window or for room.
    answered: Backlog<(Position, Answer)>,
    kept: Kept,
    /// Whether calls wait for a commit.
    gate: Gate,
    /// Requests that wait until it is known what is left of their batch's budget.
    unpaid: Unpaid,
    /// Requests whose call was refused for what may be one item's.
    splits: Splits<Job>,
    /// Calls that were refused for what all have in common, and that are called for again.
    misfits: Misfits<Aside>,
    quota: Arc<dyn Quota>,
    tally: Arc<Tally>,
    metrics: Fetching,
    /// When slots were last leased.
    leased_at: Instant,
    /// Slots leased and not yet used, in time order.
    slots: VecDeque<Slot>,
    caller: Arc<Caller>,
    calls: JoinSet<Ended>,
    /// Calls that have failed, and for whose requests an older answer is looked for.
    looking_up: JoinSet<Vec<(Position, End)>>,
    /// Where the next call has its place among those of all sources.
    place: Place,
    penalties: Penalties,
    breakers: Breakers,
    /// When the source's breaker was last opened.
    opened_at: Option<Instant>,
    /// Who is asked while it is open.
    fallback: Option<Fallback>,
    addresses: Addresses,
    spending: Spending,
    episodes: Episodes,
    exhaustion: Exhaustion,
    spread: Spread,
    /// If the pace follows them.
    delays: Option<Delays>,
    widened_at: Instant,
    /// The share of the pace that was asked for last, and when.
    widened: (Share, Instant),
    cancelled: Cancelled,
    /// When to try to call again; `None`: as soon as something changes.
    wake_at: Option<Instant>,
    stopping: bool,
    nobody_told: bool,
    haste: Haste,
}

impl<R: Reader, W: Writer> Fetch<R, W> {
    /// A stage that reads by `reader`, calls by `caller` at the times of `quota`, and writes by `writer`.
    pub fn new(reader: R, writer: W, caller: Caller, quota: Arc<dyn Quota>, config: Config) -> Self {
        Self {
            tally: caller.tally(),
            metrics: METRICS.fetching(caller.source.as_str()),
            intake: Intake::new(
                reader,
                writer,
                config.commit_every,
                caller.outcomes().when_too_large(),
                caller.clock(),
            ),
            express_share: watch::channel(Lane::express_share()).1,
            backlog: Lanes::new(Lane::express_share()),
            cached: Cached::default(),
            arrivals: Backlog::default(),
            uncalled: Backlog::default(),
            called: Backlog::default(),
            reply_size: ReplySize::unknown(BODY_LIMIT),
            answered: Backlog::default(),
            kept: Kept::default(),
            gate: Gate::default(),
            unpaid: Unpaid::default(),
            splits: Splits::default(),
            misfits: Misfits::default(),
            quota,
            leased_at: Instant::now(),
            slots: VecDeque::new(),
            addresses: Addresses::new(HealthConfig::default(), caller.addresses()),
            calls: JoinSet::new(),
            looking_up: JoinSet::new(),
            place: Place::new(Room::new(config.calls_in_flight_in_all)),
            penalties: Penalties::default(),
            breakers: Breakers::new(BreakerConfig::default(), caller.accounts()),
            opened_at: None,
            fallback: None,
            spending: Spending::default(),
            episodes: Episodes::default(),
            exhaustion: Exhaustion::default(),
            spread: Spread::new(Instant::now()),
            delays: None,
            widened_at: Instant::now(),
            widened: (Share::WHOLE, Instant::now()),
            cancelled: Cancelled::none(),
            wake_at: None,
            stopping: false,
            nobody_told: false,
            haste: Haste::default(),
            caller: Arc::new(caller),
            config,
        }
    }

    /// The same, going on with what an earlier life of the role has left.
    #[must_use]
    pub fn carrying(mut self, carry: &Carry) -> Self {
        self.kept = carry.kept.clone();
        self.tally = carry.tally(&self.tally);
        self.intake = self.intake.keeping(self.kept.clone());
        self
    }

    /// What becomes of the slots, for reports.
    #[must_use]
    pub fn tally(&self) -> Arc<Tally> {
        Arc::clone(&self.tally)
    }

    /// The same with a pace that is widened while calls under these limits leave late, or reach the vendor together.
    /// `is_alone`: no other process shares the quota, so that it begins softly.
    #[must_use]
    pub fn with_delays(mut self, limits: &Limits, pacing: Pacing, is_alone: bool) -> Self {
        let accounts = limits.accounts.iter().filter(|account| !account.is_guess);
        let accounts = accounts.flat_map(|account| &account.limits);
        let addresses = (0..limits.address_count()).flat_map(|index| limits.of_address(index));
        let mut all: Vec<Limit> = Vec::new();
        for limit in accounts.chain(addresses).chain(&limits.source) {
            if !all.contains(limit) {
                all.push(limit.clone());
            }
        }
        self.delays = Some(Delays::new(all, pacing, is_alone));
        self
    }

    /// The same with other rules for the addresses that calls leave from.
    #[must_use]
    pub fn with_address_health(mut self, config: HealthConfig) -> Self {
        self.addresses = Addresses::new(config, self.caller.addresses());
        self
    }

    /// The same with budgets for what its calls cost: those of batches come out of `purse`.
    #[must_use]
    pub fn with_budgets(mut self, budgets: Option<Budgets>, purse: Option<Arc<Purse>>) -> Self {
        self.spending = Spending::new(budgets, purse);
        self
    }

    /// The same with other rules for its breakers, and perhaps a source that is asked while this one does not answer.
    #[must_use]
    pub fn with_breaker(mut self, config: BreakerConfig, fallback: Option<SourceName>) -> Self {
        self.breakers = Breakers::new(config, self.caller.accounts());
        self.fallback = fallback.map(|source| Fallback::new(source, self.caller.topics().clone()));
        self
    }

    /// The same with answers that are given again, if there is a cache.
    #[must_use]
    pub fn with_cache(mut self, cache: Option<SourceCache>) -> Self {
        self.cached = Cached::new(cache);
        self
    }

    /// The same with its calls in a room that other sources use, too.
    #[must_use]
    pub fn with_room(self, room: Room) -> Self {
        Self { place: Place::new(room), ..self }
    }

    /// The same with another share of the slots for express requests while both lanes wait, as it is at the time.
    #[must_use]
    pub fn with_express_share(self, express_share: watch::Receiver<f64>) -> Self {
        Self { express_share, ..self }
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
        let outcome = Box::pin(self.work(stop)).await;
        // A role without its journal stops in good order, and begins anew.
        if outcome.is_err() || self.risk().calls > 0 || !self.called.is_empty() {
            self.salvage().await;
        }
        outcome
    }

    async fn work(&mut self, stop: CancellationToken) -> Result<(), FetchError> {
        let tokens = Arc::clone(&self.caller.tokens);
        tokens.load(&*self.quota).await?;
        let mut watch = JoinSet::new();
        watch.spawn(Arc::clone(&tokens).watch(Arc::clone(&self.quota)));
        let mut stopped = pin!(stop.cancelled_owned());
        while !(self.stopping && self.calls.is_empty() && self.looking_up.is_empty()) {
            self.dispatch().await;
            let wake_at = self.wake_at;
            tokio::select! {
                biased;
                () = &mut stopped, if !self.stopping => self.begin_to_stop().await,
                Some(ended) = self.calls.join_next() => self.end_calls(ended?).await?,
                Some(outcomes) = self.looking_up.join_next() => self.complete(outcomes?),
                () = self.cancelled.changed() => self.sweep(),
                () = self.spending.changed() => self.pay_again(),
                looked = self.cached.changed() => self.end_waiting(looked?),
                input = self.intake.next() => self.take(input?),
                // Accounts may be in use again.
                () = tokens.changed() => {}
                () = self.place.comes(), if self.place.is_awaited() => {}
                () = sleep_until(wake_at.unwrap_or_else(Instant::now)), if wake_at.is_some() => {}
            }
        }
        loop {
            self.end_called();
            self.intake.flush().await?;
            // Unless Kafka does not answer: then the next life of the role may have what is left.
            if self.called.is_empty() || self.intake.bytes() > 0 {
                return Ok(());
            }
        }
    }

    /// Counts the calls that have to be made again.
    fn tell_lost(&self) {
        let lost = self.kept.newly_lost();
        if lost > 0 {
            self.metrics.lost.inc_by(lost);
            self.tally.lost(lost);
        }
    }

    /// Keeps what is paid for, for the next life of the role: also what calls bring that are under way, for as long as
    /// a partition may take to leave.
    async fn salvage(&mut self) {
        self.stopping = true;
        let deadline = Instant::now() + self.config.drain;
        while let Ok(Some(ended)) = timeout_at(deadline, self.calls.join_next()).await {
            if let Ok(ended) = ended
                && let Err(error) = self.end_calls(ended).await
            {
                warn!(source = %self.caller.source, %error, "a call's answer is lost");
                self.kept.lose(1);
            }
        }
        while let Ok(Some(outcomes)) = timeout_at(deadline, self.looking_up.join_next()).await {
            self.complete(outcomes.unwrap_or_default());
        }
        let lost = self.calls.len() + self.looking_up.len();
        self.kept.lose(u32::try_from(lost).unwrap_or(u32::MAX));
        for (position, called) in self.called.clear() {
            self.give_up_called(position, called);
        }
        for (position, answer) in self.answered.clear() {
            self.intake.give_up_with(position, answer);
        }
        self.intake.keep_all();
        self.tell_lost();
        let kept = self.kept.len();
        if kept + lost > 0 {
            warn!(source = %self.caller.source, kept, lost, "answers that are not committed are kept; calls under way that do not end are made again");
        }
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
            Input::Leaving(partitions) => self.leave(&partitions),
            Input::Left(partitions) => {
                self.leave(&partitions);
                // While it was leaving its calls still ended here, and so did what they had brought.
                for partition in &partitions {
                    for (position, called) in self.called.remove(partition) {
                        self.give_up_called(position, called);
                    }
                }
            }
        }
    }

    /// Gives up what has not begun of partitions that leave, and what is to wait for the window.
    fn leave(&mut self, partitions: &[Partition]) {
        for partition in partitions {
            for job in self.arrivals.remove(partition) {
                self.intake.give_up(&job.position);
            }
            for job in self.backlog.remove(partition) {
                self.intake.give_up(&job.position);
            }
            for job in self.unpaid.remove(partition) {
                self.intake.give_up(&job.position);
            }
            for position in self.leave_refused(partition) {
                self.intake.give_up(&position);
            }
            for (position, _) in self.uncalled.remove(partition) {
                self.intake.give_up(&position);
            }
            for (position, answer) in self.answered.remove(partition) {
                self.intake.give_up_with(position, answer);
            }
            for position in self.cached.remove(partition) {
                self.intake.give_up(&position);
            }
        }
    }

    /// Puts a request into the backlog, or ends it at once if it cannot be called for.
    fn receive(&mut self, position: Position, record: &Record) {
        if self.stopping {
            return self.intake.give_up(&position);
        }
        let partition = position.partition.clone();
        if let Some(answer) = self.intake.kept(&position) {
            self.metrics.kept.inc();
            self.answered.push(&partition, (position, answer));
            return self.regulate(&partition);
        }
        match self.caller.receive(position, record) {
            Ok(job) => {
                if let Some(job) = self.unless_cancelled(job) {
                    self.arrivals.push(&partition, job);
                    self.admit_arrivals();
                }
            }
            Err((position, records)) => self.end(position, End::Made(records)),
        }
        self.regulate(&partition);
    }

    /// Admits what has come, as far as there is room for what the cache may have for it.
    fn admit_arrivals(&mut self) {
        loop {
            let (cached, uncalled, most) = (&self.cached, &self.uncalled, self.share_of_outcomes());
            let may = |job: &Job| cached.may_look() && uncalled.bytes_in(&job.position.partition) < most;
            let Some(job) = self.arrivals.pop(may) else {
                self.cached.is_awaited = !self.arrivals.is_empty() && !self.cached.may_look();
                return;
            };
            let partition = job.position.partition.clone();
            if let Some(job) = self.unless_cancelled(job) {
                self.admit(job);
            }
            self.regulate(&partition);
        }
    }

    /// How many bytes of answers may wait for one partition's window or for room, about: all together as much as there
    /// may be outcomes.
    fn share_of_outcomes(&self) -> usize {
        let limit = usize::try_from(self.config.outcomes_limit.as_u64()).unwrap_or(usize::MAX);
        (limit / self.intake.partitions().max(1)).max(1)
    }

    /// A request ends without a call of its own, as soon as there is room.
    fn end(&mut self, position: Position, end: End) {
        self.uncalled.push(&position.partition.clone(), (position, end));
    }

    /// Makes the records of a request's end. What cannot be answered from the cache after all is called for.
    fn finish(&mut self, position: Position, called: Called) {
        match called.answer(self.caller.outcomes(), self.caller.now()) {
            Ok(answer) => self.intake.complete_with(position, answer),
            Err(job) => self.enlist(*job),
        }
    }

    /// Keeps a request's end, in case the request comes back.
    fn give_up_called(&mut self, position: Position, called: Called) {
        match called.answer(self.caller.outcomes(), self.caller.now()) {
            Ok(answer) => self.intake.give_up_with(position, answer),
            Err(_) => self.intake.give_up(&position),
        }
    }

    /// Calls that have ended, and whose outcomes are not committed yet.
    fn risk(&self) -> Risk {
        self.called.iter().fold(self.intake.risk(), |risk, (_, called)| risk.and(called.risk()))
    }

    /// Puts a request that has to be called for into the backlog.
    fn enlist(&mut self, job: Job) {
        // Whoever waited for somebody else's answer was not in the backlog when that was swept.
        let Some(job) = self.unless_cancelled(job) else { return };
        match self.spending.expect(job.request.batch.as_ref()) {
            Pay::Go | Pay::Wait if self.travels_alone(&job) => self.splits.push_alone(job),
            Pay::Go | Pay::Wait => self.backlog.push(job),
            Pay::Spent => {
                let (position, records) = self.caller.over_budget(job);
                self.end(position, End::Made(records));
            }
        }
    }

    /// Ends what waits of a batch that has just been cancelled: at once, not at the pace of the quota.
    fn sweep(&mut self) {
        self.pay_again();
        self.sweep_refused();
        for job in self.backlog.clear() {
            if let Some(job) = self.unless_cancelled(job) {
                self.backlog.push(job);
            }
        }
    }

    /// Ends a request whose batch has been cancelled; any other comes back.
    fn unless_cancelled(&mut self, job: Job) -> Option<Job> {
        if !self.cancelled.has(&job.request) {
            return Some(job);
        }
        let (position, records) = self.caller.cancelled(job);
        self.end(position, End::Made(records));
        None
    }

    /// Completes what a call has brought, as far as there is room for its records.
    fn end_called(&mut self) {
        while self.has_room_for_outcomes()
            && let Some((position, called)) = self.called.pop(|_| true)
        {
            let partition = position.partition.clone();
            self.finish(position, called);
            self.regulate(&partition);
        }
    }

    /// Completes what has ended, as far as there is room for its records: first what was called for, then what was
    /// called for before the stage began anew, or ended without a call. These not beyond the window: the commit could
    /// not say that they are done.
    fn end_uncalled(&mut self) {
        self.end_called();
        while self.has_room_for_outcomes() {
            let intake = &self.intake;
            let Some((position, answer)) = self.answered.pop(|(position, _)| intake.may_start(position)) else { break };
            let partition = position.partition.clone();
            self.intake.complete_with(position, answer);
            self.regulate(&partition);
        }
        while self.has_room_for_outcomes() {
            let intake = &self.intake;
            let Some((position, end)) = self.uncalled.pop(|(position, _)| intake.may_start(position)) else {
                break;
            };
            let partition = position.partition.clone();
            self.finish(position, Called::none(end));
            self.regulate(&partition);
        }
        self.admit_arrivals();
    }

    /// Stops a partition whose backlog is full, and lets it flow again when half of that is done. Each lane has room of
    /// its own: a full backlog does not keep express requests out.
    fn regulate(&mut self, partition: &Partition) {
        let of_lane = self.intake.partitions_of(&partition.topic);
        let full = (self.config.backlog / of_lane.max(1)).max(64);
        let waiting = self.backlog.waiting_in(partition)
            + self.uncalled.waiting_in(partition)
            + self.called.waiting_in(partition)
            + self.answered.waiting_in(partition)
            + self.arrivals.waiting_in(partition)
            + self.unpaid.waiting_in(partition)
            + self.splits.waiting_in(partition)
            + self.misfits.waiting_in(partition)
            + self.cached.waiting_in(partition);
        if waiting >= full {
            self.intake.set_flowing(partition, false);
        } else if waiting <= full / 2 {
            self.intake.set_flowing(partition, true);
        }
    }

    fn has_room_for_outcomes(&self) -> bool {
        u64::try_from(self.intake.bytes()).unwrap_or(u64::MAX) < self.config.outcomes_limit.as_u64()
    }

    async fn begin_to_stop(&mut self) {
        self.stopping = true;
        self.pay_again();
        let mut waiting = self.backlog.clear();
        waiting.extend(Job::apart(self.splits.clear()));
        waiting.extend(self.misfits.clear().into_iter().flat_map(|aside| Job::apart(aside.call.jobs)));
        info!(source = %self.caller.source, in_flight = self.calls.len(), waiting = waiting.len(), "stopping: finishing the calls in flight");
        for job in waiting {
            self.intake.give_up(&job.position);
        }
        for (position, _) in self.uncalled.clear() {
            self.intake.give_up(&position);
        }
        for (position, answer) in self.answered.clear() {
            self.intake.give_up_with(position, answer);
        }
        for job in self.arrivals.clear() {
            self.intake.give_up(&job.position);
        }
        for position in self.cached.clear() {
            self.intake.give_up(&position);
        }
        self.return_slots().await;
    }
}

impl backlog::Placed for (Position, Answer) {
    fn offset(&self) -> i64 {
        self.0.offset
    }
}

/// The batches that a call serves, each once; `None` for requests of no batch.
fn batches(jobs: &[Job]) -> Vec<Option<&BatchId>> {
    let all = jobs.iter().flat_map(|job| job.twins.iter().chain([job]));
    let mut batches: Vec<_> = all.map(|job| job.request.batch.as_ref()).collect();
    batches.sort_unstable();
    batches.dedup();
    batches
}

#[cfg(test)]
mod again_tests;
#[cfg(test)]
mod breaker_tests;
#[cfg(test)]
mod cached_tests;
#[cfg(test)]
mod full_tests;
#[cfg(test)]
mod refusal_tests;
#[cfg(test)]
mod room_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod vendor_tests;
