//! From a record to a request that has to be called for, or to an end without a call; and from ends to the log.
//!
//! Admission owns the [`Intake`], and with it all that is known of requests on the log's side: which may start, which
//! are still wanted, what is paid for them, how they end and how much of that is not yet safe. It calls nobody:
//!
//! - What has to be called for is handed out by [`Admission::take_to_call`].
//! - Whoever holds requests asks whether they [may start](Admission::may_start), are [still wanted](Admission::unless_over)
//!   and can be [paid for](Admission::pay), and brings their ends by [`Admission::complete`] or [`Admission::end`].

pub(super) mod at_risk;
mod cached;
mod requests;
mod spending;
mod unpaid;

use std::{collections::HashSet, sync::Arc};

use tokio::time::Instant;
use tracing::{info, warn};

use self::{
    at_risk::{Gate, Turn},
    cached::{Admitted, Cached, Waiting},
    requests::Requests,
    spending::Spending,
    unpaid::Unpaid,
};
use super::{
    backlog::{Backlog, Placed},
    call::Caller,
    carry::Carry,
    config::Config,
    end::{Called, End},
    error::FetchError,
    job::Job,
    single_flight::{LeaderResult, stand_in},
};
use crate::{
    cache::{Kept as CachedAnswer, Looked, SourceCache},
    cancelled::Cancelled,
    kafka::{
        Partition, Reader, Record, Writer,
        intake::{Input, Intake},
        kept::{Answer, Kept},
        outbox::{Position, Risk},
    },
    message::{BatchId, Lane},
    quota::{Pay, Purse, Tally, money::Budgets},
    runtime::metrics::{Fetching, METRICS},
};

/// Something that admission has to see to, see [`Admission::take`].
pub(super) enum Signal {
    /// A batch was cancelled: whoever holds requests looks through them.
    Cancelled,
    /// More may be known of what is left of budgets.
    Paid,
    /// Requests that wait for an answer without a call of their own may have one.
    Looked(Option<(u64, Looked)>),
    /// Of the log.
    Input(Input),
}

/// The requests of one source, on the log's side.
pub(super) struct Admission<R, W> {
    config: Config,
    caller: Arc<Caller>,
    requests: Requests,
    intake: Intake<R, W>,
    /// Requests that wait until there is room for what the cache may have for them.
    arrivals: Backlog<Job>,
    /// Requests that wait for an answer without a call of their own.
    cached: Cached,
    /// Whether one more call would delay nobody, but for what is in `to_call`.
    has_spare: bool,
    /// Requests that have to be called for, and that nobody has taken yet.
    to_call: Vec<Job>,
    /// Requests that wait until it is known what is left of their batch's budget.
    unpaid: Unpaid,
    spending: Spending,
    cancelled: Cancelled,
    /// Requests that ended without a call, and wait for the window or for room among the outcomes.
    uncalled: Backlog<(Position, End)>,
    /// Requests whose call has ended, and that wait for room among the outcomes.
    called: Backlog<(Position, Called)>,
    /// Requests that were called for before the stage began anew, and wait for the window or for room.
    answered: Backlog<(Position, Answer)>,
    kept: Kept,
    /// Whether calls wait for a commit.
    gate: Gate,
    /// Partitions of which something has come or gone since they were [regulated](Self::regulate) last.
    touched: HashSet<Partition>,
    is_stopping: bool,
    metrics: Fetching,
    tally: Arc<Tally>,
}

impl<R: Reader, W: Writer> Admission<R, W> {
    pub(super) fn new(reader: R, writer: W, caller: Arc<Caller>, tally: Arc<Tally>, config: Config) -> Self {
        let (instead, clock) = (caller.outcomes().when_too_large(), caller.clock());
        Self {
            requests: Requests::new(&caller),
            intake: Intake::new(reader, writer, config.commit_every, instead, clock),
            arrivals: Backlog::default(),
            cached: Cached::default(),
            has_spare: true,
            to_call: Vec::new(),
            unpaid: Unpaid::default(),
            spending: Spending::default(),
            cancelled: Cancelled::none(),
            uncalled: Backlog::default(),
            called: Backlog::default(),
            answered: Backlog::default(),
            kept: Kept::default(),
            gate: Gate::default(),
            touched: HashSet::new(),
            is_stopping: false,
            metrics: METRICS.fetching(caller.source.as_str(), Lane::ALL.map(Lane::as_str)),
            tally,
            caller,
            config,
        }
    }

    pub(super) fn carrying(mut self, carry: &Carry, tally: Arc<Tally>) -> Self {
        self.kept = carry.kept.clone();
        self.intake = self.intake.keeping(self.kept.clone());
        Self { tally, ..self }
    }

    pub(super) fn with_budgets(self, budgets: Option<Budgets>, purse: Option<Arc<Purse>>) -> Self {
        Self { spending: Spending::new(budgets, purse), ..self }
    }

    pub(super) fn with_cache(self, cache: Option<SourceCache>) -> Self {
        Self { cached: Cached::new(cache), ..self }
    }

    pub(super) fn with_cancellations(self, cancelled: Cancelled) -> Self {
        Self { cancelled, ..self }
    }

    /// The next thing to see to; commits meanwhile what has ended.
    ///
    /// # Cancellation
    /// Safe.
    ///
    /// # Errors
    /// As [`Intake::next`], or a defect.
    pub(super) async fn next(&mut self) -> Result<Signal, FetchError> {
        tokio::select! {
            biased;
            () = self.cancelled.changed() => Ok(Signal::Cancelled),
            () = self.spending.changed() => Ok(Signal::Paid),
            looked = self.cached.changed() => Ok(Signal::Looked(looked?)),
            input = self.intake.next() => Ok(Signal::Input(input?)),
        }
    }

    /// Sees to it, as far as it concerns what waits here.
    pub(super) fn take(&mut self, event: Signal) {
        match event {
            Signal::Cancelled | Signal::Paid => self.pay_again(),
            Signal::Looked(looked) => self.end_waiting(looked),
            Signal::Input(Input::Records(records)) => {
                for (position, record) in records {
                    self.receive(position, &record);
                }
            }
            // Whoever waited for room is looked at again in each turn.
            Signal::Input(Input::Settled) => {}
            Signal::Input(Input::Leaving(partitions)) => partitions.iter().for_each(|partition| self.leave(partition)),
            Signal::Input(Input::Left(partitions)) => {
                for partition in &partitions {
                    self.leave(partition);
                    // While it was leaving its calls still ended here, and so did what they had brought.
                    for (position, called) in self.called.remove(partition) {
                        self.give_up_called(position, called);
                    }
                }
            }
        }
    }

    /// Gives up what has not begun of a partition that leaves, and what is to wait for the window.
    fn leave(&mut self, partition: &Partition) {
        let jobs = self.arrivals.remove(partition).into_iter().chain(self.unpaid.remove(partition));
        let to_call = self.to_call.extract_if(.., |job| job.position.partition == *partition);
        let mut left: Vec<Position> = jobs.chain(to_call).map(|job| job.position).collect();
        left.extend(self.uncalled.remove(partition).into_iter().map(|(position, _)| position));
        left.extend(self.cached.remove(partition));
        for position in left {
            self.intake.give_up(&position);
        }
        for (position, answer) in self.answered.remove(partition) {
            self.intake.give_up_with(position, answer);
        }
    }

    /// One record more: it is to be called for, or ends at once if it cannot be.
    fn receive(&mut self, position: Position, record: &Record) {
        if self.is_stopping {
            return self.intake.give_up(&position);
        }
        let partition = position.partition.clone();
        if let Some(answer) = self.intake.kept(&position) {
            self.metrics.kept.inc();
            self.answered.push(&partition, (position, answer));
            return self.touch(&partition);
        }
        match self.requests.parse(position, record) {
            Ok(job) => {
                if let Some(job) = self.unless_cancelled(job) {
                    self.arrivals.push(&partition, job);
                    self.admit_arrivals();
                }
            }
            Err((position, records)) => self.end(position, End::Made(records)),
        }
        self.touch(&partition);
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
            self.touch(&partition);
        }
    }

    /// Answers a request without a call if that can be; else it waits for a slot, or for somebody else's call.
    fn admit(&mut self, job: Job) {
        let spare = self.has_spare && self.to_call.is_empty();
        match self.cached.admit(job, spare) {
            Admitted::Answer(job, kept) => self.answer(job, &kept),
            Admitted::Call(job) => self.enlist(job),
            Admitted::Waits => {}
        }
    }

    /// Ends a request with an answer that was kept; it is called for if that makes no record.
    fn answer(&mut self, job: Job, kept: &CachedAnswer) {
        self.end(job.position.clone(), End::Again(Box::new(job), kept.clone()));
    }

    /// Does what follows from what [`Cached::changed`] has seen.
    fn end_waiting(&mut self, looked: Option<(u64, Looked)>) {
        if let Some((ticket, looked)) = looked {
            self.end_look(ticket, looked);
        }
        for (key, result) in self.cached.results() {
            for job in self.cached.waiters(&key) {
                self.end_waiter(job, &result);
            }
        }
        for job in self.cached.overdue() {
            let partition = job.position.partition.clone();
            self.enlist(job);
            self.touch(&partition);
        }
    }

    fn end_look(&mut self, ticket: u64, looked: Looked) {
        // It may have been given up meanwhile; then a claim is given back here.
        let Some(Waiting { mut job, key, due, .. }) = self.cached.take(ticket) else { return };
        let partition = job.position.partition.clone();
        match looked {
            Looked::Hit(kept) => {
                self.answer(job, &kept);
                for job in self.cached.waiters(&key) {
                    self.end_waiter(job, &LeaderResult::Answer(kept.clone()));
                }
            }
            Looked::Call(claim) => {
                job.single_flight = self.cached.leading(key, due, claim);
                self.enlist(job);
            }
        }
        self.touch(&partition);
    }

    /// One outcome for all who waited for it; who is not served by it begins anew.
    fn end_waiter(&mut self, job: Job, result: &LeaderResult) {
        let Some(cache) = self.cached.cache().cloned() else { return };
        let partition = job.position.partition.clone();
        match result {
            _ if self.is_cancelled(&job) => {
                let (position, records) = self.requests.cancelled(job);
                self.end(position, End::Made(records));
            }
            LeaderResult::Answer(kept) if cache.may_give(kept, job.request.oldest_answer()) => {
                cache.counts().shared.inc();
                self.answer(job, kept);
            }
            LeaderResult::Failed(refusal, facts, older) => {
                if let Some(kept) = stand_in(&cache, &job.request, refusal, (None, older.clone())) {
                    let position = job.position.clone();
                    self.end(position, End::Stale(Box::new(job), kept, refusal.clone(), facts.clone()));
                } else {
                    let records = self.caller.outcomes().failure(&job, refusal, facts);
                    self.end(job.position, End::Made(records));
                }
            }
            LeaderResult::Answer(_) | LeaderResult::Gone => self.admit(job),
        }
        self.touch(&partition);
    }

    /// How many bytes of answers may wait for one partition's window or for room, about: all together as much as there
    /// may be outcomes.
    fn share_of_outcomes(&self) -> usize {
        let limit = usize::try_from(self.config.outcomes_limit.as_u64()).unwrap_or(usize::MAX);
        (limit / self.intake.partitions().max(1)).max(1)
    }

    /// This request has to be called for, unless there is no use in it.
    fn enlist(&mut self, job: Job) {
        // Whoever waited for somebody else's answer was nowhere when that was looked through.
        let Some(job) = self.unless_cancelled(job) else { return };
        match self.spending.expect(job.request.batch.as_ref()) {
            Pay::Go | Pay::Wait => self.to_call.push(job),
            Pay::Spent => {
                let (position, records) = self.requests.over_budget(job);
                self.end(position, End::Made(records));
            }
        }
    }

    /// The requests that have to be called for, of those that came since this was asked last.
    pub(super) fn take_to_call(&mut self) -> Vec<Job> {
        std::mem::take(&mut self.to_call)
    }

    /// Whether one more call would delay nobody: then an answer that is due soon is called for already.
    pub(super) fn tell_spare(&mut self, has_spare: bool) {
        self.has_spare = has_spare;
    }

    /// Whether work on the request may begin: its partition is here, and it fits into the window.
    pub(super) fn may_start(&self, job: &Job) -> bool {
        self.intake.may_start(&job.position)
    }

    /// A request whose call was for nothing, unless there is no use in another one: then it is given up, or ends.
    pub(super) fn unless_over(&mut self, job: Job) -> Option<Job> {
        if self.is_stopping || !self.may_start(&job) {
            self.intake.give_up(&job.position);
            return None;
        }
        self.unless_cancelled(job)
    }

    /// Ends a request whose batch has been cancelled; any other comes back.
    pub(super) fn unless_cancelled(&mut self, job: Job) -> Option<Job> {
        if !self.is_cancelled(&job) {
            return Some(job);
        }
        let (position, records) = self.requests.cancelled(job);
        self.end(position, End::Made(records));
        None
    }

    pub(super) fn is_cancelled(&self, job: &Job) -> bool {
        self.cancelled.has(&job.request)
    }

    /// A request will not be worked on here any more.
    pub(super) fn give_up(&mut self, position: &Position) {
        self.intake.give_up(position);
    }

    /// Pays for a call that serves this request too, unless its batch is among those that have `paid` for it; else the
    /// request stays here, and waits for money or [ends](Self::end_unpaid).
    pub(super) fn pay(&mut self, job: Job, paid: &mut Vec<BatchId>) -> Option<Job> {
        match self.spending.pay(job.request.batch.as_ref(), paid) {
            Pay::Go => Some(job),
            pay @ (Pay::Wait | Pay::Spent) => {
                self.unpaid.put(job, pay);
                None
            }
        }
    }

    /// Ends requests for which nothing will be paid any more.
    pub(super) fn end_unpaid(&mut self) {
        for job in self.unpaid.take_spent() {
            let (position, records) = self.requests.over_budget(job);
            self.end(position, End::Made(records));
        }
    }

    /// A call that was paid for by these requests has not left.
    pub(super) fn refund(&mut self, jobs: &[Job]) {
        self.spending.refund(&batches(jobs));
    }

    /// Looks again at those that wait for money.
    fn pay_again(&mut self) {
        self.tell_spent();
        for job in self.unpaid.clear() {
            self.enlist(job);
        }
    }

    /// A call for these requests leaves.
    pub(super) fn call_leaves(&mut self, jobs: &[Job]) {
        let (now, source) = (self.caller.now(), &self.caller.source);
        if let Some(calls) = self.spending.count_call(now) {
            warn!(%source, calls, "the day's budget is spent; calls go on (on_budget = \"warn\")");
        }
        self.tell_spent();
        self.gate.call();
        for job in jobs.iter().flat_map(Job::with_coalesced) {
            self.touch(&job.position.partition);
        }
    }

    fn tell_spent(&self) {
        let source = &self.caller.source;
        for batch in self.spending.newly_spent() {
            warn!(%source, %batch, "the batch's budget is spent: the rest of the batch ends as dead letters of reason budget (on_budget = \"stop\")");
        }
    }

    /// Looks at how much is called for and not committed, and says so where that stops calls or lets them go on. True while no
    /// call may leave; the end of a transaction wakes.
    pub(super) fn look_at_risk(&mut self) -> bool {
        let (most, risk) = (self.config.at_risk, self.risk());
        let turn = self.gate.look(most, risk, self.intake.commits(), Instant::now());
        let source = &self.caller.source;
        match turn {
            Some(Turn::Shut) => {
                warn!(%source, uncommitted = risk.calls, at_risk = %most, "calls paused until Kafka commits: too many outcomes are not committed (fetch.at_risk)");
            }
            Some(Turn::Opened) => info!(%source, "Kafka commits again; calls resume"),
            None => {}
        }
        self.metrics.risk(risk.calls, self.gate.is_shut());
        self.gate.is_shut()
    }

    /// Calls that have ended, and whose outcomes are not committed yet.
    fn risk(&self) -> Risk {
        self.called.iter().fold(self.intake.risk(), |risk, (_, called)| risk.and(called.risk()))
    }

    /// Whether answers that were paid for would be lost if the stage ended now.
    pub(super) fn owes_answers(&self) -> bool {
        self.risk().calls > 0 || !self.called.is_empty()
    }

    /// A request ends without a call of its own, as soon as there is room.
    pub(super) fn end(&mut self, position: Position, end: End) {
        let partition = position.partition.clone();
        self.uncalled.push(&partition, (position, end));
        self.touch(&partition);
    }

    /// The requests of a call have come to their ends. What is not ours any more is kept or lost at once: its partition may
    /// be here again, and the same request with it.
    pub(super) fn complete(&mut self, ends: Vec<(Position, End)>) {
        let (since, mut left) = (Instant::now(), ends.len());
        for (position, end) in ends {
            left -= 1;
            let called = Called { end, calls: u32::from(left == 0), since };
            if self.has_room() || !self.intake.is_current(&position) {
                self.finish(position, called);
            } else {
                self.called.push(&position.partition.clone(), (position, called));
            }
        }
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

    /// Completes what a call has brought, as far as there is room for its records.
    fn end_called(&mut self) {
        while self.has_room_for_outcomes()
            && let Some((position, called)) = self.called.pop(|_| true)
        {
            let partition = position.partition.clone();
            self.finish(position, called);
            self.touch(&partition);
        }
    }

    /// Completes what has ended, as far as there is room for its records: first what was called for, then what was
    /// called for before the stage began anew, or ended without a call. These not beyond the window: the commit could
    /// not say that they are done.
    pub(super) fn settle(&mut self) {
        self.end_called();
        while self.has_room_for_outcomes() {
            let intake = &self.intake;
            let Some((position, answer)) = self.answered.pop(|(position, _)| intake.may_start(position)) else { break };
            let partition = position.partition.clone();
            self.intake.complete_with(position, answer);
            self.touch(&partition);
        }
        while self.has_room_for_outcomes() {
            let intake = &self.intake;
            let Some((position, end)) = self.uncalled.pop(|(position, _)| intake.may_start(position)) else {
                break;
            };
            let partition = position.partition.clone();
            self.finish(position, Called::none(end));
            self.touch(&partition);
        }
        self.admit_arrivals();
    }

    /// Whether there is room for what one more call may bring.
    pub(super) fn has_room(&self) -> bool {
        self.called.is_empty() && self.has_room_for_outcomes()
    }

    fn has_room_for_outcomes(&self) -> bool {
        u64::try_from(self.intake.bytes()).unwrap_or(u64::MAX) < self.config.outcomes_limit.as_u64()
    }

    /// Something of this partition has come or gone.
    pub(super) fn touch(&mut self, partition: &Partition) {
        if !self.touched.contains(partition) {
            self.touched.insert(partition.clone());
        }
    }

    /// Stops partitions of which too much waits, and lets them flow again when half of that is done. `elsewhere`: how many
    /// requests of a partition wait with others. Each lane has room of its own: a full backlog does not keep express
    /// requests out.
    pub(super) fn regulate(&mut self, elsewhere: impl Fn(&Partition) -> usize) {
        let mut touched = std::mem::take(&mut self.touched);
        for partition in touched.drain() {
            let of_lane = self.intake.partitions_of(&partition.topic);
            let full = (self.config.backlog / of_lane.max(1)).max(64);
            let waiting = self.waiting_in(&partition) + elsewhere(&partition);
            if waiting >= full {
                self.intake.set_flowing(&partition, false);
            } else if waiting <= full / 2 {
                self.intake.set_flowing(&partition, true);
            }
        }
        self.touched = touched;
    }

    fn waiting_in(&self, partition: &Partition) -> usize {
        self.uncalled.waiting_in(partition)
            + self.called.waiting_in(partition)
            + self.answered.waiting_in(partition)
            + self.arrivals.waiting_in(partition)
            + self.unpaid.waiting_in(partition)
            + self.cached.waiting_in(partition)
    }

    /// From now on nothing begins any more: requests that come are given up.
    pub(super) fn begin_nothing_more(&mut self) {
        self.is_stopping = true;
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.is_stopping
    }

    /// Begins nothing more, and gives up what waits but for what was called for; how many requests that are.
    pub(super) fn stop(&mut self) -> usize {
        self.begin_nothing_more();
        self.tell_spent();
        let jobs = self.unpaid.clear().into_iter().chain(self.to_call.drain(..)).chain(self.arrivals.clear());
        let mut waiting: Vec<Position> = jobs.map(|job| job.position).collect();
        waiting.extend(self.uncalled.clear().into_iter().map(|(position, _)| position));
        waiting.extend(self.cached.clear());
        for position in &waiting {
            self.intake.give_up(position);
        }
        for (position, answer) in self.answered.clear() {
            self.intake.give_up_with(position, answer);
        }
        waiting.len()
    }

    /// Commits all that has ended, for an orderly stop. Unless Kafka does not answer: then the next life of the role may
    /// have what is left.
    ///
    /// # Errors
    /// As [`Intake::flush`].
    pub(super) async fn flush(&mut self) -> Result<(), FetchError> {
        loop {
            self.end_called();
            self.intake.flush().await?;
            if self.called.is_empty() || self.intake.bytes() > 0 {
                return Ok(());
            }
        }
    }

    /// Keeps what is paid for, for the next life of the role; `lost` calls are under way that nobody waits for. How many
    /// answers are kept.
    pub(super) fn keep_all(&mut self, lost: usize) -> usize {
        self.lose(lost);
        for (position, called) in self.called.clear() {
            self.give_up_called(position, called);
        }
        for (position, answer) in self.answered.clear() {
            self.intake.give_up_with(position, answer);
        }
        self.intake.keep_all();
        self.tell_lost();
        self.kept.len()
    }

    /// The answers of so many calls are lost.
    pub(super) fn lose(&self, calls: usize) {
        self.kept.lose(u32::try_from(calls).unwrap_or(u32::MAX));
    }

    /// Counts the calls that have to be made again.
    pub(super) fn tell_lost(&self) {
        let lost = self.kept.newly_lost();
        if lost > 0 {
            self.metrics.lost.inc_by(lost);
            self.tally.lost(lost);
        }
    }

    /// The next request that has ended without a call.
    #[cfg(test)]
    pub(super) fn pop_uncalled(&mut self) -> Option<(Position, End)> {
        self.uncalled.pop(|_| true)
    }
}

impl Placed for (Position, Answer) {
    fn offset(&self) -> i64 {
        self.0.offset
    }
}

/// The batches that a call serves, each once; `None` for requests of no batch.
fn batches(jobs: &[Job]) -> Vec<Option<&BatchId>> {
    let all = jobs.iter().flat_map(Job::with_coalesced);
    let mut batches: Vec<_> = all.map(|job| job.request.batch.as_ref()).collect();
    batches.sort_unstable();
    batches.dedup();
    batches
}

#[cfg(test)]
mod again_tests;
#[cfg(test)]
mod cached_tests;
#[cfg(test)]
mod full_tests;
#[cfg(test)]
mod tests;
