//! When calls leave: which requests, in which slot, and how many at once.
//!
//! Departure owns what waits for a call and what a call needs to leave: the lanes, the slots that are leased from the
//! [`Quota`], the permit among the calls of all sources, and what is measured of how late and how long calls are, by
//! which the pace and their number follow. It neither knows whether a request is still wanted or paid for, which it asks
//! admission for each that it takes, nor whether the source may be called, which is the reaction's to say.

mod borrowing;
pub(super) mod delays;
mod grouped;
mod lanes;
pub(super) mod limiter;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use tokio::{
    sync::{OwnedSemaphorePermit, watch},
    time::Instant,
};
use tracing::{debug, error};

use self::{
    delays::{Delays, Measured},
    lanes::{Batching, Lanes},
    limiter::{CallLimiter, NextPermit},
};
use super::{
    admission::Admission,
    call::{Caller, Contact, Ended},
    config::Config,
    end::ReplySize,
    job::Job,
};
use crate::{
    kafka::{Partition, Reader, Writer},
    message::Lane,
    platform::{Refusal, http::BODY_LIMIT},
    quota::{Cause, Hold, Lease, PaceBy, Quota, Scope, Share, Slot, Tally, tally::Delayed},
    runtime::clock::sleep_until_due,
    tokens::keeper::Purpose,
};

/// What the next slot is for.
#[derive(Debug)]
pub(super) enum Next {
    /// A call leaves in it now.
    Now(Slot),
    /// It comes later; whether the permit is to be kept until then.
    Later(bool),
    /// There is none before the time that [`Departure::wakes`] waits for: a hold may be the reason.
    NotBefore,
    /// Every account is disabled.
    Nobody,
}

/// What the slot of an account is used for.
#[derive(Debug)]
pub(super) enum Use {
    Call,
    /// Its token is renewed.
    Renewal,
    /// Nothing: it has to wait for its token until then.
    Wait(Instant, &'static str),
}

/// What waits for a call, and what it leaves by.
pub(super) struct Departure {
    caller: Arc<Caller>,
    quota: Arc<dyn Quota>,
    tally: Arc<Tally>,
    calls_in_flight: usize,
    /// How many bytes the replies of all calls under way may have.
    replies_limit: usize,
    lanes: Lanes,
    express_share: watch::Receiver<f64>,
    /// When slots were last leased.
    leased_at: Instant,
    /// Slots leased and not yet used, in time order.
    slots: VecDeque<Slot>,
    /// For the next call, among those of all sources.
    permit: NextPermit,
    reply_size: ReplySize,
    /// If the pace follows them.
    delays: Option<Delays>,
    widened_at: Instant,
    /// The share of the pace that was asked for last, and when.
    widened: (Share, Instant),
    /// When to try to call again; `None`: as soon as something changes.
    wake_at: Option<Instant>,
    /// It was told that every account is disabled.
    is_nobody_told: bool,
    /// When to look what other processes have passed on.
    look_at: Option<Instant>,
    /// Since everything was done last, slots were asked of others or passed on to them.
    has_passed: bool,
}

impl Departure {
    /// Slots leased at once, at most: the longest that a source's accounts are asked about in one step.
    pub(super) const LEASE: usize = 64;

    /// How long a request waits for others to travel with while slots are free.
    const WINDOW: Duration = Duration::from_millis(10);

    /// How many requests end with the answer to one that asks for the same: their results are made as there is room.
    const COALESCED_MAX: usize = 1_000;

    /// How often the pace follows the delays.
    const WIDEN_EVERY: Duration = Duration::from_millis(100);

    /// The replies of all calls under way may have so many times `outcomes_limit` bytes: most of them are still to come.
    const REPLIES: u64 = 4;

    /// While nobody may call, the quota is asked this often: an operator may end a hold at any time.
    pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(500);

    /// A call's permit among those of all sources is kept for it so long before it leaves: with many calls under way it
    /// may take a moment until there is one.
    const AHEAD: Duration = Duration::from_millis(100);

    /// A slot whose account has to wait for a token puts it off for at least and at most so long.
    const TOKEN_WAIT: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(1)];

    pub(super) fn new(caller: Arc<Caller>, quota: Arc<dyn Quota>, tally: Arc<Tally>, config: &Config) -> Self {
        let replies = config.outcomes_limit.as_u64().saturating_mul(Self::REPLIES);
        Self {
            caller,
            quota,
            tally,
            calls_in_flight: config.calls_in_flight,
            replies_limit: usize::try_from(replies).unwrap_or(usize::MAX),
            lanes: Lanes::new(Lane::express_share()),
            express_share: watch::channel(Lane::express_share()).1,
            leased_at: Instant::now(),
            slots: VecDeque::new(),
            permit: NextPermit::new(CallLimiter::new(config.calls_in_flight_in_all)),
            reply_size: ReplySize::unknown(BODY_LIMIT),
            delays: None,
            widened_at: Instant::now(),
            widened: (Share::WHOLE, Instant::now()),
            wake_at: None,
            is_nobody_told: false,
            look_at: None,
            has_passed: false,
        }
    }

    pub(super) fn with_tally(self, tally: Arc<Tally>) -> Self {
        Self { tally, ..self }
    }

    pub(super) fn with_delays(self, delays: Delays) -> Self {
        Self { delays: Some(delays), ..self }
    }

    pub(super) fn with_limiter(self, limiter: CallLimiter) -> Self {
        Self { permit: NextPermit::new(limiter), ..self }
    }

    pub(super) fn with_express_share(self, express_share: watch::Receiver<f64>) -> Self {
        Self { express_share, ..self }
    }

    /// Adds a request; one that was taken out before comes back to its place.
    pub(super) fn push(&mut self, job: Job) {
        self.lanes.push(job);
    }

    /// Takes a partition out, with all that waits in it.
    pub(super) fn remove(&mut self, partition: &Partition) -> Vec<Job> {
        self.lanes.remove(partition)
    }

    /// Takes all that waits in a lane.
    pub(super) fn take(&mut self, lane: Lane) -> Vec<Job> {
        self.lanes.take(lane)
    }

    /// Takes all that waits.
    pub(super) fn clear(&mut self) -> Vec<Job> {
        self.lanes.clear()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lanes.is_empty()
    }

    pub(super) fn waiting_in(&self, partition: &Partition) -> usize {
        self.lanes.waiting_in(partition)
    }

    pub(super) fn waiting_of(&self, lane: Lane) -> usize {
        self.lanes.len_of(lane)
    }

    /// About how many calls all that waits needs.
    pub(super) fn calls(&self) -> usize {
        self.lanes.calls(self.caller.batch_max())
    }

    /// Whether anything that waits may start.
    pub(super) fn can_start(&self, may_start: impl Fn(&Job) -> bool) -> bool {
        self.lanes.can_start(may_start)
    }

    /// Whether an express request that waits may start, and whether a bulk one may.
    pub(super) fn lanes_can_start(&self, may_start: impl Fn(&Job) -> bool) -> (bool, bool) {
        (self.lanes.waits(Lane::Express, &may_start), self.lanes.waits(Lane::Bulk, &may_start))
    }

    /// How many calls may be under way at once: no more than their replies have room.
    pub(super) fn calls_allowed(&self) -> usize {
        self.calls_in_flight.min(self.reply_size.calls(self.replies_limit))
    }

    /// A turn begins: nothing is known yet of when to look again.
    pub(super) fn begin_turn(&mut self) {
        self.wake_at = None;
        self.lanes.set_share(*self.express_share.borrow());
    }

    /// Looks again at that time.
    pub(super) fn wake(&mut self, at: Instant) {
        self.wake_at = Some(at);
    }

    /// Waits until it is time to look again, or the permit that was waited for has come; for ever if only something else
    /// can change anything.
    ///
    /// # Cancellation
    /// Safe.
    pub(super) async fn wakes(&mut self) {
        let wake_at = self.wake_at;
        tokio::select! {
            biased;
            () = self.permit.acquired(), if self.permit.is_awaited() => {}
            () = sleep_until_due(wake_at) => {}
            else => std::future::pending().await,
        }
    }

    /// Lets the pace follow what is measured of the calls' delays.
    pub(super) async fn widen(&mut self) {
        let now = Instant::now();
        let Some(delays) = self.delays.as_ref().filter(|_| now >= self.widened_at + Self::WIDEN_EVERY) else { return };
        self.widened_at = now;
        let (share, Measured { late, bunched }) = (delays.share(now), delays.measured(now));
        let (told, told_at) = self.widened;
        // It is said again while it is so: in Redis it ends by itself.
        let is_due = (share.get() - told.get()).abs() > 0.02
            || (share == Share::WHOLE && told != share)
            || (share != Share::WHOLE && now >= told_at + Duration::from_secs(2));
        if !is_due {
            return;
        }
        let is_widened = share != Share::WHOLE;
        self.widened = (share, now);
        self.tally.set_delayed(is_widened.then(|| Delayed { late, bunched, share: share.get() }));
        let source = &self.caller.source;
        debug!(%source, ?late, ?bunched, share = share.get(), "measured how late calls leave; widened the pace by it");
        self.quota.set_pace(Scope::Source, PaceBy::Delays, share).await;
    }

    /// Until when what waits waits for more to travel with it. Only while slots are free: one whose time is known ahead
    /// takes along what has come by then.
    pub(super) fn waits_for_others(&self, may_start: impl Fn(&Job) -> bool) -> Option<Instant> {
        let batching = self.batching();
        let is_free = self.slots.front().is_none_or(|slot| slot.at <= self.leased_at + Duration::from_millis(1));
        if batching.most <= 1 || !is_free {
            return None;
        }
        let at = self.lanes.departs_at(batching, may_start);
        at.filter(|at| *at > batching.now)
    }

    fn batching(&self) -> Batching {
        Batching { most: self.caller.batch_max(), window: Self::WINDOW, now: Instant::now() }
    }

    /// Whether the next call has its permit; else it is waited for from now on, see [`Self::wakes`].
    pub(super) fn acquire_permit(&mut self) -> bool {
        self.permit.acquire()
    }

    /// The permit for a call that leaves now.
    pub(super) fn take_permit(&mut self) -> Option<OwnedSemaphorePermit> {
        self.permit.take()
    }

    /// There is no call to come soon.
    pub(super) fn release_permit(&mut self) {
        self.permit.release();
    }

    /// How many calls the limiter of all sources would let leave now.
    pub(super) fn permits(&self) -> usize {
        self.permit.available()
    }

    /// The next slot that is neither missed nor overtaken by a hold. Leases up to `wanted` more if none is left.
    pub(super) async fn next_slot(&mut self, wanted: usize) -> Next {
        loop {
            while let Some(slot) = self.slots.pop_front() {
                // Looked at first: nobody passes on a slot whose time has come.
                let is_due = slot.at <= Instant::now();
                if self.quota.is_passed_on(&slot) {
                    self.tally.returned(slot.account);
                    self.has_passed = true;
                    continue;
                }
                if !slot.is_late(Instant::now()) && !self.quota.is_held(&slot) {
                    return if is_due { Next::Now(slot) } else { Next::Later(self.wait_for(slot)) };
                }
                if slot.is_late(Instant::now()) {
                    self.tally.missed(slot.account);
                } else {
                    self.tally.returned(slot.account);
                }
                self.quota.give_back(vec![slot]).await;
            }
            match self.quota.lease(wanted).await {
                Lease::Slots(slots) => {
                    self.is_nobody_told = false;
                    self.leased_at = Instant::now();
                    self.slots.extend(slots);
                }
                Lease::NotBefore(at) => {
                    self.wake_at = Some(at.min(Instant::now() + Self::LOOK_AGAIN));
                    return Next::NotBefore;
                }
                Lease::Nobody => {
                    if !std::mem::replace(&mut self.is_nobody_told, true) {
                        let source = &self.caller.source;
                        error!(%source, "every account is disabled: calls paused, requests wait on Kafka. Repair an account: `weir account authorise` gives it a new token, `weir quota resume` enables it again");
                    }
                    self.wake_at = Some(Instant::now() + Self::LOOK_AGAIN);
                    return Next::Nobody;
                }
            }
        }
    }

    /// Comes back for this slot; whether its permit is to be kept until then.
    fn wait_for(&mut self, slot: Slot) -> bool {
        let is_soon = slot.at <= Instant::now() + Self::AHEAD;
        self.wake_at = Some(if is_soon { slot.at } else { slot.at - Self::AHEAD });
        self.slots.push_front(slot);
        is_soon
    }

    /// This slot is used next.
    pub(super) fn put_back(&mut self, slot: Slot) {
        self.slots.push_front(slot);
    }

    /// The calls under way from the slot's address are as many as may be: it is dropped, and costs nobody's budget. A call
    /// that waited for its turn would leave beyond its slot, together with others.
    pub(super) async fn pass_over(&mut self, slot: Slot) {
        self.tally.missed(slot.account);
        self.quota.drop_unused(slot).await;
    }

    /// What a slot of this account is used for, by the state of its token.
    pub(super) fn use_of(&self, account: usize) -> Use {
        let (now, [least, most]) = (Instant::now(), Self::TOKEN_WAIT);
        match self.caller.tokens.purpose(account) {
            Purpose::Call => Use::Call,
            Purpose::Renewal => Use::Renewal,
            Purpose::Wait(until) => Use::Wait(until.clamp(now + least, now + most), "its token is being renewed"),
            // It was disabled for that, and somebody has ended the hold.
            Purpose::Nothing => {
                Use::Wait(now + most, "its token was rejected: `weir account authorise` gives it a new one")
            }
        }
    }

    /// The slot's account has to wait for that reason. Without the hold an account that nothing limits would get one slot
    /// after the other.
    pub(super) async fn put_off(&mut self, slot: Slot, until: Instant, why: &str) {
        let cause = Cause::new(why, self.caller.now());
        self.quota.hold(Scope::Account(slot.account), Hold::Until(until), &cause).await;
        self.leave_unused(slot).await;
    }

    /// Gives the slot of an account back that is held by now: nobody else can use it, but it costs nobody's budget.
    pub(super) async fn leave_unused(&mut self, slot: Slot) {
        self.tally.returned(slot.account);
        self.quota.drop_unused(slot).await;
    }

    /// Hands back what is left of the lease.
    pub(super) async fn return_slots(&mut self) {
        self.slots.iter().for_each(|slot| self.tally.returned(slot.account));
        self.quota.give_back(self.slots.drain(..).collect()).await;
    }

    /// The requests of one call: as many as the vendor takes and as go together, each with those that ask for the same. It
    /// is paid for once for each batch that it serves; empty if the money of all that could start is spent, or others have
    /// to say first what is left. `rank`: those of the lowest one go first, if anything depends on it.
    pub(super) fn take_jobs<R: Reader, W: Writer>(
        &mut self,
        admission: &mut Admission<R, W>,
        rank: Option<&impl Fn(&Job) -> u32>,
    ) -> Vec<Job> {
        let (most, batching) = (self.caller.batch_max(), self.batching());
        let mut jobs: Vec<Job> = Vec::with_capacity(most);
        let mut paid = Vec::new();
        while jobs.len() < most {
            let may_start = |job: &Job| admission.may_start(job);
            let next = match (jobs.first(), rank) {
                (None, Some(rank)) => self.lanes.pop_least(rank, may_start),
                (None, None) => self.lanes.pop(batching, may_start),
                (Some(first), _) => self.lanes.pop_along(first, may_start),
            };
            let Some(job) = next else { break };
            let Some(mut job) = admission.pay(job, &mut paid) else { continue };
            let alike = self.lanes.pop_alike(&job, Self::COALESCED_MAX, |job| admission.may_start(job));
            job.coalesced.extend(alike.into_iter().filter_map(|other| admission.pay(other, &mut paid)));
            jobs.push(job);
        }
        admission.end_unpaid();
        jobs
    }

    /// A call has ended: its slot is accounted for, and what it took is noted.
    pub(super) async fn ended(&mut self, ended: &mut Ended) {
        match ended.unused.take() {
            // With its budget, which others may spend.
            Some(slot) => self.quota.drop_unused(slot).await,
            None => self.quota.ended(ended.account),
        }
        match &ended.contact {
            Contact::Called(_) => {
                self.tally.called(ended.account, ended.refusal.as_ref().is_some_and(Refusal::is_no));
            }
            Contact::None => self.tally.missed(ended.account),
            // Neither late nor a call: the vendor knows nothing of it.
            Contact::NoWay(_) | Contact::Machine(_) | Contact::Unprocessed(_) => {}
        }
        if let (Some(delays), Some(departed_at)) = (&mut self.delays, ended.departed_at) {
            delays.note(ended.left_at, departed_at, ended.latency, Instant::now());
        }
        if matches!(ended.contact, Contact::Called(Some(_))) {
            self.reply_size.note(ended.bytes);
        }
    }
}

#[cfg(test)]
pub(super) mod limiter_tests;
#[cfg(test)]
mod tests;
