//! fetch: requests → results and failures, each call at the time of its slot.
//!
//! One [`Fetch`] per source. Nothing here waits for one request to finish before it begins another. A request goes
//! through three owners, each with a state that nobody else touches; [`Fetch`] itself holds the calls under way, and
//! carries requests from one to the next:
//!
//! ```text
//!  record ──► admission ──── has to be called for ──► departure ──── slot, permit ──► call
//!                 │ ▲                                     ▲                             │
//!    ends without │ │ ends by its call                    │ is called for again         │ has ended
//!          a call ▼ │                                     │                             ▼
//!             outcome ◄─────────────────────────────── reaction ◄───────────────────────┘
//! ```
//!
//! | owner | what it alone knows | what is asked of it |
//! |---|---|---|
//! | `admission` | the [`Intake`](crate::kafka::intake::Intake) and its window; what waits for the cache, for another request's call, for money or for room; how requests end; what is not committed | may this start, is it still wanted, is it paid for; here is an end |
//! | `departure` | the lanes; slots, permit and pace; how late and how long calls are | the next slot, the requests of one call; here is one more |
//! | `reaction` | breakers, rests, addresses, refusals; requests of refused calls until it is known what for | may the source be called, and how often; a call has ended |
//!
//! Departure and reaction ask admission, and nobody else asks anybody: what one of them has for another it returns.
//! Below all three are the request on its way (`job`), what it owes those that wait for its result
//! (`single_flight`), its ends (`end`, `outcome`) and the call itself (`call`).
//!
//! To read it from outside in: [`Fetch::run`], then `Fetch::turn`, which makes the calls whose time has come, and
//! `Fetch::end_call`.

mod admission;
mod backlog;
mod call;
mod call_facts;
mod carry;
mod config;
mod departure;
mod end;
mod error;
mod job;
mod outcome;
mod reaction;
mod single_flight;
mod stale;

use std::{pin::pin, sync::Arc};

use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::{
    admission::{Admission, Signal},
    backlog::fingerprint,
    call::{Contact, Ended, Travel, Unrecorded},
    departure::{Departure, Next, Use, delays::Delays},
    end::End,
    job::Job,
    reaction::{Aftermath, Obstacle, Reaction},
};
pub use self::{
    call::{Caller, CallerParts},
    carry::Carry,
    config::{AtRisk, Config},
    departure::limiter::CallLimiter,
    error::FetchError,
};
use crate::{
    breaker::BreakerConfig,
    cache::SourceCache,
    cancelled::Cancelled,
    kafka::{Partition, Reader, Writer, intake::Input, outbox::Position},
    message::{Lane, SourceName},
    platform::{address::HealthConfig, http::CallPermit},
    quota::{Limit, Pacing, Purse, Quota, Slot, Tally, money::Budgets, plan::Limits},
    runtime::metrics::{Fetching, METRICS},
};

/// The fetch stage of one source.
pub struct Fetch<R, W> {
    config: Config,
    caller: Arc<Caller>,
    quota: Arc<dyn Quota>,
    tally: Arc<Tally>,
    metrics: Fetching,
    admission: Admission<R, W>,
    departure: Departure,
    reaction: Reaction,
    calls: JoinSet<Ended>,
    /// Calls that have failed, and for whose requests an older answer is looked for.
    looking_up: JoinSet<Vec<(Position, End)>>,
}

impl<R: Reader, W: Writer> Fetch<R, W> {
    /// A stage that reads by `reader`, calls by `caller` at the times of `quota`, and writes by `writer`.
    pub fn new(reader: R, writer: W, caller: Caller, quota: Arc<dyn Quota>, config: Config) -> Self {
        let (tally, caller) = (caller.tally(), Arc::new(caller));
        Self {
            metrics: METRICS.fetching(caller.source.as_str(), Lane::ALL.map(Lane::as_str)),
            admission: Admission::new(reader, writer, Arc::clone(&caller), Arc::clone(&tally), config.clone()),
            departure: Departure::new(Arc::clone(&caller), Arc::clone(&quota), Arc::clone(&tally), &config),
            reaction: Reaction::new(Arc::clone(&caller), Arc::clone(&quota), config.heed_hints),
            calls: JoinSet::new(),
            looking_up: JoinSet::new(),
            tally,
            quota,
            caller,
            config,
        }
    }

    /// The same, going on with what an earlier life of the role has left.
    #[must_use]
    pub fn carrying(self, carry: &Carry) -> Self {
        let tally = carry.tally(&self.tally);
        let admission = self.admission.carrying(carry, Arc::clone(&tally));
        let departure = self.departure.with_tally(Arc::clone(&tally));
        Self { tally, admission, departure, ..self }
    }

    /// What becomes of the slots, for reports.
    #[must_use]
    pub fn tally(&self) -> Arc<Tally> {
        Arc::clone(&self.tally)
    }

    /// The same with a pace that is widened while calls under these limits leave late, or reach the vendor together.
    /// `is_alone`: no other process shares the quota, so that it begins softly.
    #[must_use]
    pub fn with_delays(self, limits: &Limits, pacing: Pacing, is_alone: bool) -> Self {
        let accounts = limits.accounts.iter().filter(|account| !account.is_guess);
        let accounts = accounts.flat_map(|account| &account.limits);
        let addresses = (0..limits.address_count()).flat_map(|index| limits.of_address(index));
        let mut all: Vec<Limit> = Vec::new();
        for limit in accounts.chain(addresses).chain(&limits.source) {
            if !all.contains(limit) {
                all.push(limit.clone());
            }
        }
        Self { departure: self.departure.with_delays(Delays::new(all, pacing, is_alone)), ..self }
    }

    /// The same with other rules for the addresses that calls leave from.
    #[must_use]
    pub fn with_address_health(self, config: HealthConfig) -> Self {
        Self { reaction: self.reaction.with_address_health(config), ..self }
    }

    /// The same with budgets for what its calls cost: those of batches come out of `purse`.
    #[must_use]
    pub fn with_budgets(self, budgets: Option<Budgets>, purse: Option<Arc<Purse>>) -> Self {
        Self { admission: self.admission.with_budgets(budgets, purse), ..self }
    }

    /// The same with other rules for its breakers, and perhaps a source that is asked while this one does not answer.
    #[must_use]
    pub fn with_breaker(self, config: BreakerConfig, fallback: Option<SourceName>) -> Self {
        Self { reaction: self.reaction.with_breaker(config, fallback), ..self }
    }

    /// The same with answers that are given again, if there is a cache.
    #[must_use]
    pub fn with_cache(self, cache: Option<SourceCache>) -> Self {
        Self { admission: self.admission.with_cache(cache), ..self }
    }

    /// The same with its calls under a limit that other sources share.
    #[must_use]
    pub fn with_limiter(self, limiter: CallLimiter) -> Self {
        Self { departure: self.departure.with_limiter(limiter), ..self }
    }

    /// The same with another share of the slots for express requests while both lanes wait, as it is at the time.
    #[must_use]
    pub fn with_express_share(self, express_share: watch::Receiver<f64>) -> Self {
        Self { departure: self.departure.with_express_share(express_share), ..self }
    }

    /// The same stage, which ends the requests of cancelled batches instead of calling for them.
    #[must_use]
    pub fn with_cancellations(self, cancelled: Cancelled) -> Self {
        Self { admission: self.admission.with_cancellations(cancelled), ..self }
    }

    /// Works until `stop`, then finishes the calls in flight, commits them and returns.
    ///
    /// # Errors
    /// [`FetchError`]; nothing is lost, the next start continues from the last commit.
    pub async fn run(mut self, stop: CancellationToken) -> Result<(), FetchError> {
        let outcome = Box::pin(self.work(stop)).await;
        // A role without its journal stops in good order, and begins anew.
        if outcome.is_err() || self.admission.owes_answers() {
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
        while !(self.admission.is_stopping() && self.under_way() == 0) {
            self.turn().await;
            tokio::select! {
                biased;
                () = &mut stopped, if !self.admission.is_stopping() => self.begin_to_stop().await,
                Some(ended) = self.calls.join_next() => self.end_calls(ended?).await?,
                Some(ends) = self.looking_up.join_next() => self.complete(ends?),
                event = self.admission.next() => self.take(event?),
                // Accounts may be in use again.
                () = tokens.changed() => {}
                () = self.departure.wakes() => {}
            }
        }
        self.admission.flush().await
    }

    /// Sees to what admission has to see to, and to what it means for the requests that others hold.
    fn take(&mut self, event: Signal) {
        match &event {
            Signal::Cancelled => self.sweep(),
            Signal::Input(Input::Leaving(partitions) | Input::Left(partitions)) => {
                for partition in partitions {
                    self.leave(partition);
                }
            }
            Signal::Paid | Signal::Looked(_) | Signal::Input(Input::Records(_) | Input::Settled) => {}
        }
        self.tell_spare();
        self.admission.take(event);
        self.enlist();
    }

    /// Ends what waits of a batch that has just been cancelled: at once, not at the pace of the quota.
    fn sweep(&mut self) {
        let free = self.reaction.sweep(&mut self.admission);
        self.call_again(free);
        for job in self.departure.clear() {
            if let Some(job) = self.admission.unless_cancelled(job) {
                self.departure.push(job);
            }
        }
    }

    /// Gives up what has not begun of a partition that leaves.
    fn leave(&mut self, partition: &Partition) {
        let (mut left, free) = self.reaction.leave(partition);
        left.extend(self.departure.remove(partition).into_iter().map(|job| job.position));
        for position in left {
            self.admission.give_up(&position);
        }
        self.call_again(free);
    }

    /// Takes over from admission what has to be called for.
    fn enlist(&mut self) {
        for job in self.admission.take_to_call() {
            if self.reaction.travels_alone(&job) {
                self.reaction.push_alone(job);
            } else {
                self.departure.push(job);
            }
        }
    }

    /// Puts requests that were held for a while among all others, unless there is no use in calling for them any more.
    fn call_again(&mut self, jobs: Vec<Job>) {
        for job in Job::apart(jobs) {
            if let Some(job) = self.admission.unless_over(job) {
                self.departure.push(job);
            }
        }
    }

    fn tell_spare(&mut self) {
        let has_spare = self.departure.is_empty() && self.calls.len() < self.config.calls_in_flight / 2;
        self.admission.tell_spare(has_spare);
    }

    /// Makes every call whose time has come, and sets when to look again.
    async fn turn(&mut self) {
        self.departure.begin_turn();
        let is_shut = self.reaction.is_shut(Instant::now());
        self.metrics.now(Lane::ALL.map(|lane| self.departure.waiting_of(lane)), self.calls.len(), is_shut);
        self.settle();
        self.admission.look_at_risk();
        self.admission.tell_lost();
        self.mind_aside().await;
        self.departure.widen().await;
        if !self.make_calls().await {
            self.departure.release_permit();
        }
        self.departure.look_soon();
        let (departure, reaction) = (&self.departure, &self.reaction);
        self.admission.regulate(|partition| departure.waiting_in(partition) + reaction.waiting_in(partition));
    }

    /// Completes what has ended, as far as there is room.
    fn settle(&mut self) {
        self.tell_spare();
        self.admission.settle();
        self.enlist();
    }

    /// Makes every call whose time has come; whether the next one wants a permit already.
    async fn make_calls(&mut self) -> bool {
        let mut full = 0;
        while self.has_room() && self.can_start() {
            if self.admission.look_at_risk() {
                self.departure.return_slots().await;
                return false;
            }
            match self.reaction.obstacle(Instant::now()) {
                None => {}
                Some(Obstacle::Shut(until)) => {
                    self.sit_out(until).await;
                    return false;
                }
                Some(Obstacle::Probing) => {
                    self.departure.return_slots().await;
                    return false;
                }
                Some(Obstacle::Exhausted(until)) => {
                    self.departure.return_slots().await;
                    self.departure.wake(until);
                    return false;
                }
            }
            if let Some(at) = self.waits_for_others() {
                self.departure.return_slots().await;
                self.departure.wake(at);
                return false;
            }
            if !self.departure.acquire_permit() {
                self.departure.return_slots().await;
                return true;
            }
            let late = self.departure.late_express_calls(self.calls_wanted(), |job| self.admission.may_start(job));
            self.departure.borrow_slots(late, self.calls_wanted()).await;
            match self.departure.next_slot(self.calls_wanted()).await {
                Next::Now(slot) => match self.caller.permit(slot.address) {
                    Some(permit) => self.use_slot(slot, permit).await,
                    None if full < Departure::LEASE => {
                        full += 1;
                        self.departure.pass_over(slot).await;
                    }
                    // Where nothing limits its accounts there would be one after the other; a call that ends wakes.
                    None => {
                        self.departure.pass_over(slot).await;
                        self.departure.return_slots().await;
                        return false;
                    }
                },
                Next::Later(keeps_permit) => return keeps_permit,
                Next::NotBefore => {
                    self.reaction.heed_fleet();
                    return false;
                }
                Next::Nobody => return false,
            }
        }
        if self.departure.is_empty() && self.reaction.calls() == 0 {
            self.departure.rest().await;
        }
        false
    }

    fn under_way(&self) -> usize {
        self.calls.len() + self.looking_up.len()
    }

    fn has_room(&self) -> bool {
        let is_free = !self.reaction.is_trying_one() || self.calls.is_empty();
        is_free && self.under_way() < self.departure.calls_allowed() && self.admission.has_room()
    }

    /// Whether anything that waits may be called for.
    fn can_start(&self) -> bool {
        let may_start = |job: &Job| self.admission.may_start(job);
        self.reaction.can_start(may_start) || self.departure.can_start(may_start)
    }

    /// How many calls slots are leased for at once, at most.
    fn calls_wanted(&self) -> usize {
        let room = self.departure.calls_allowed().saturating_sub(self.under_way()).min(self.departure.permits());
        let room = room.min(self.reaction.room(Instant::now()));
        (self.departure.calls() + self.reaction.calls()).min(room).min(Departure::LEASE)
    }

    /// Until when what waits waits for more to travel with it; requests of refused calls wait for nobody.
    fn waits_for_others(&self) -> Option<Instant> {
        let may_start = |job: &Job| self.admission.may_start(job);
        let at = self.departure.waits_for_others(may_start)?;
        (!self.reaction.can_start(may_start)).then_some(at)
    }

    /// Makes a call in this slot, or renews its account's token.
    async fn use_slot(&mut self, slot: Slot, permit: CallPermit) {
        match self.departure.use_of(slot.account) {
            Use::Call if self.reaction.waits_for_breaker(slot.account).await => {
                self.departure.leave_unused(slot).await;
            }
            Use::Call => self.make_call(slot, permit).await,
            Use::Renewal => {
                self.reaction.probe(&slot).await;
                let renewal = Arc::clone(&self.caller).renew(slot, permit);
                self.spawn(renewal);
            }
            Use::Wait(until, why) => self.departure.put_off(slot, until, why).await,
        }
    }

    async fn make_call(&mut self, slot: Slot, permit: CallPermit) {
        let waits = self.departure.lanes_can_start(|job| self.admission.may_start(job));
        let mut free = Vec::new();
        let split = self.reaction.take_split(waits, &mut self.admission, &mut free);
        self.call_again(free);
        let (group, jobs) = if let Some((group, jobs)) = split {
            (Some(group), jobs)
        } else {
            let rank = self.reaction.rank(slot.account);
            (None, self.departure.take_jobs(&mut self.admission, rank.as_ref()))
        };
        if jobs.is_empty() {
            self.departure.put_back(slot);
            return self.settle();
        }
        self.reaction.probe(&slot).await;
        let tickets = self.reaction.admit(slot.account, &jobs);
        self.admission.call_leaves(&jobs);
        let alone = (jobs.len() == 1 && self.caller.batch_max() > 1).then(|| fingerprint(&jobs[0]));
        let travel = Travel { group, alone };
        let call = Arc::clone(&self.caller).call(slot, permit, jobs, travel);
        self.spawn(async move { Ended { tickets, travel, ..call.await } });
    }

    /// Makes a call, under the permit among those of all sources.
    fn spawn(&mut self, call: impl Future<Output = Ended> + Send + 'static) {
        let permit = self.departure.take_permit();
        self.calls.spawn(async move {
            let _permit = permit;
            call.await
        });
    }

    /// If nothing else is left to call for, requests that were refused find out whether they still are.
    async fn mind_aside(&mut self) {
        if !self.reaction.has_aside() || !self.calls.is_empty() || self.can_start() {
            return;
        }
        let now = Instant::now();
        match self.reaction.obstacle(now) {
            Some(Obstacle::Shut(until)) => Box::pin(self.sit_out(until)).await,
            Some(Obstacle::Probing) => {}
            Some(Obstacle::Exhausted(_)) | None => match self.reaction.take_aside(now) {
                Ok(free) => self.call_again(free),
                Err(at) => self.departure.wake(at),
            },
        }
    }

    /// Nobody calls until then, unless somebody ends the hold.
    async fn sit_out(&mut self, until: Instant) {
        self.departure.return_slots().await;
        let free = self.reaction.free_splits();
        self.call_again(free);
        let now = Instant::now();
        if self.reaction.is_released(now) {
            return self.departure.wake(now);
        }
        let free = self.reaction.free_from_aside();
        self.call_again(free);
        self.end_without_calls(until).await;
        self.settle();
        self.departure.wake(until.min(now + Departure::LOOK_AGAIN));
    }

    /// Ends what need not wait for the source: what has an answer that was kept, all if another source stands in for it,
    /// and what is in a hurry.
    async fn end_without_calls(&mut self, until: Instant) {
        let at = self.caller.now();
        let until = at.after(until.saturating_duration_since(Instant::now()));
        for lane in Lane::ALL {
            let mut jobs = self.departure.take(lane);
            stale::recall(&mut jobs).await;
            for job in jobs {
                match self.reaction.end_without_call(job, (at, until)) {
                    Ok((position, end)) => self.admission.end(position, end),
                    Err(job) => self.departure.push(*job),
                }
            }
        }
    }

    /// Takes the outcomes of this call and of all others that have ended meanwhile, in the order of their replies.
    async fn end_calls(&mut self, first: Ended) -> Result<(), FetchError> {
        let mut all = vec![first];
        while let Some(next) = self.calls.try_join_next() {
            all.push(next?);
        }
        all.sort_by_key(|ended| ended.replied_at);
        for ended in all {
            self.end_call(ended).await;
        }
        Ok(())
    }

    async fn end_call(&mut self, mut ended: Ended) {
        self.departure.ended(&mut ended).await;
        self.count(&ended);
        let aftermath = self.reaction.ended(&mut ended, &mut self.admission).await;
        self.follow(aftermath);
        // What was not called for costs nothing.
        self.admission.refund(&ended.missed);
        self.call_again(ended.missed);
        self.complete(ended.outcomes);
        self.look_up(ended.to_look_up);
    }

    /// Does what becomes of requests whose call has come to nothing.
    fn follow(&mut self, Aftermath { again, over }: Aftermath) {
        self.call_again(again);
        for refused in over {
            let (ends, to_look_up) = self.caller.record_at_once(refused);
            self.complete(ends);
            self.look_up(to_look_up);
        }
    }

    fn look_up(&mut self, unrecorded: Option<Unrecorded>) {
        if let Some(unrecorded) = unrecorded {
            self.looking_up.spawn(Arc::clone(&self.caller).look_up(unrecorded));
        }
    }

    /// The requests of a call have come to their ends.
    fn complete(&mut self, ends: Vec<(Position, End)>) {
        self.admission.complete(ends);
        self.enlist();
    }

    fn count(&self, ended: &Ended) {
        let outcome = match (&ended.contact, &ended.refusal) {
            (Contact::None, _) => return,
            (Contact::NoWay(_), _) => "no_way",
            (Contact::Machine(_), _) => "machine",
            (Contact::Unprocessed(_), _) => "unprocessed",
            (Contact::Called(_), Some(refusal)) if !ended.has_answer => refusal.class().as_str(),
            (Contact::Called(_), _) => "answered",
        };
        let whose = (self.caller.source.as_str(), self.caller.alias(ended.account).as_str());
        METRICS.call(whose, outcome, ended.latency);
    }

    async fn begin_to_stop(&mut self) {
        let mut waiting = self.departure.clear();
        waiting.extend(self.reaction.clear());
        for job in &waiting {
            self.admission.give_up(&job.position);
        }
        let waiting = waiting.len() + self.admission.stop();
        info!(source = %self.caller.source, in_flight = self.calls.len(), waiting, "stopping: finishing the calls in flight");
        self.departure.return_slots().await;
    }

    /// Keeps what is paid for, for the next life of the role: also what calls bring that are under way, for as long as
    /// a partition may take to leave.
    async fn salvage(&mut self) {
        self.admission.begin_nothing_more();
        let deadline = Instant::now() + self.config.drain;
        while let Ok(Some(ended)) = timeout_at(deadline, self.calls.join_next()).await {
            if let Ok(ended) = ended
                && let Err(error) = self.end_calls(ended).await
            {
                warn!(source = %self.caller.source, %error, "a call's answer is lost");
                self.admission.lose(1);
            }
        }
        while let Ok(Some(ends)) = timeout_at(deadline, self.looking_up.join_next()).await {
            self.complete(ends.unwrap_or_default());
        }
        let lost = self.under_way();
        let kept = self.admission.keep_all(lost);
        if kept + lost > 0 {
            warn!(source = %self.caller.source, kept, lost, "rejoining the consumer group: answers not yet committed are kept; calls in flight that do not finish are made again");
        }
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod vendor_tests;
