//! Which requests leave now, in which slot.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use super::{
    Fetch,
    at_risk::Turn,
    call::{Ended, Travel},
    delays::Measured,
    end::End,
    grouped::fingerprint,
    job::Job,
    lanes::Departure,
    splits::GroupId,
};
use crate::{
    breaker::Shut,
    kafka::{Reader, Writer},
    platform::http::CallPermit,
    quota::{Cause, Hold, Lease, PaceBy, Pay, Scope, Share, Slot, tally::Delayed},
    tokens::keeper::Purpose,
};

/// A slot whose account has to wait for a token puts it off for at least and at most so long.
const TOKEN_WAIT: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(1)];

impl<R: Reader, W: Writer> Fetch<R, W> {
    /// Slots leased at once, at most: the longest that a source's accounts are asked about in one step.
    const LEASE: usize = 64;

    /// How long a request waits for others to travel with while slots are free.
    const WINDOW: Duration = Duration::from_millis(10);

    /// How many requests end with the answer to one that asks for the same: their results are made as there is room.
    const TWINS: usize = 1_000;

    /// How often the pace follows the delays.
    const WIDEN_EVERY: Duration = Duration::from_millis(100);

    /// The replies of all calls under way may have so many times `outcomes_limit` bytes: most of them are still to come.
    const REPLIES: u64 = 4;

    /// While nobody may call, the quota is asked this often: an operator may end a hold at any time.
    pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(500);

    /// A call's place among those of all sources is kept for it so long before it leaves: with many calls under way it
    /// may take a moment until there is one.
    const AHEAD: Duration = Duration::from_millis(100);

    /// Makes every call whose time has come, and sets when to look again.
    pub(super) async fn dispatch(&mut self) {
        self.wake_at = None;
        let is_shut = self.breakers.shut(Instant::now()).is_some();
        self.metrics.now(|lane| self.backlog.len_of(lane), self.calls.len(), is_shut);
        self.backlog.set_share(*self.express_share.borrow());
        self.end_uncalled();
        self.look_at_risk();
        self.tell_lost();
        self.mind_aside().await;
        self.widen().await;
        if !self.make_calls().await {
            self.place.leave();
        }
        self.look_soon();
    }

    /// Lets the pace follow what is measured of the calls' delays.
    async fn widen(&mut self) {
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
        debug!(%source, ?late, ?bunched, share = share.get(), "how late calls leave, and what pace covers it");
        self.quota.set_pace(Scope::Source, PaceBy::Delays, share).await;
    }

    /// Makes every call whose time has come; whether the next one wants a place already.
    async fn make_calls(&mut self) -> bool {
        let mut full = 0;
        while self.has_room() && self.can_start() {
            self.look_at_risk();
            if self.gate.is_shut() {
                // The end of a transaction wakes.
                self.return_slots().await;
                return false;
            }
            match self.breakers.shut(Instant::now()) {
                None => {}
                Some(Shut::Until(until)) => {
                    self.sit_out(until).await;
                    return false;
                }
                // The end of a probe wakes.
                Some(Shut::Probing) => {
                    self.return_slots().await;
                    return false;
                }
            }
            if let Some(at) = self.exhaustion.pauses_until(Instant::now()) {
                self.return_slots().await;
                self.wake_at = Some(at);
                return false;
            }
            if let Some(at) = self.waits_for_others() {
                self.return_slots().await;
                self.wake_at = Some(at);
                return false;
            }
            if !self.place.is_ours() {
                self.return_slots().await;
                return true;
            }
            self.hasten().await;
            match self.next_slot().await {
                Some((slot, true)) => match self.caller.permit(slot.address) {
                    Some(permit) => self.use_slot(slot, permit).await,
                    None if full < Self::LEASE => {
                        full += 1;
                        self.pass_over(slot).await;
                    }
                    // Where nothing limits its accounts there would be one after the other; a call that ends wakes.
                    None => {
                        self.pass_over(slot).await;
                        self.return_slots().await;
                        return false;
                    }
                },
                Some((slot, false)) => return self.wait_for(slot),
                None => return false,
            }
        }
        if self.backlog.is_empty() && self.splits.calls() == 0 {
            self.rest().await;
        }
        false
    }

    /// The calls under way from the slot's address are as many as may be: it is dropped, and costs nobody's budget. A call
    /// that waited for its turn would leave beyond its slot, together with others.
    async fn pass_over(&mut self, slot: Slot) {
        self.tally.missed(slot.account);
        self.quota.drop_unused(slot).await;
    }

    /// Looks whether too much is called for and not committed.
    fn look_at_risk(&mut self) {
        let (most, risk) = (self.config.at_risk, self.risk());
        let turn = self.gate.look(most, risk, self.intake.commits(), Instant::now());
        let source = &self.caller.source;
        match turn {
            Some(Turn::Shut) => {
                warn!(%source, uncommitted = risk.calls, at_risk = %most, "calls wait: Kafka does not commit what they bring (fetch.at_risk)");
            }
            Some(Turn::Opened) => info!(%source, "Kafka commits again: calls go on"),
            None => {}
        }
        self.metrics.risk(risk.calls, self.gate.is_shut());
    }

    /// Comes back for this slot; whether its place is to be kept until then.
    fn wait_for(&mut self, slot: Slot) -> bool {
        let is_soon = slot.at <= Instant::now() + Self::AHEAD;
        self.wake_at = Some(if is_soon { slot.at } else { slot.at - Self::AHEAD });
        self.slots.push_front(slot);
        is_soon
    }

    /// Until when what waits waits for more to travel with it. Only while slots are free: one whose time is known ahead
    /// takes along what has come by then.
    fn waits_for_others(&self) -> Option<Instant> {
        let departure = self.departure();
        let is_free = self.slots.front().is_none_or(|slot| slot.at <= self.leased_at + Duration::from_millis(1));
        if departure.most <= 1 || !is_free || self.splits.can_start(|job| self.intake.may_start(&job.position)) {
            return None;
        }
        let at = self.backlog.departs_at(departure, |job| self.intake.may_start(&job.position));
        at.filter(|at| *at > departure.now)
    }

    fn departure(&self) -> Departure {
        Departure { most: self.caller.batch_max(), window: Self::WINDOW, now: Instant::now() }
    }

    /// Makes a call in this slot, or renews its account's token.
    async fn use_slot(&mut self, slot: Slot, permit: CallPermit) {
        let (account, now) = (slot.account, Instant::now());
        let (until, why) = match self.caller.tokens.purpose(account) {
            Purpose::Call if self.waits_for_breaker(account).await => return self.leave_unused(slot).await,
            Purpose::Call => return self.make_call(slot, permit).await,
            Purpose::Renewal => {
                self.probe(&slot).await;
                let (place, renewal) = (self.place.take(), Arc::clone(&self.caller).renew(slot, permit));
                self.calls.spawn(async move {
                    let _place = place;
                    renewal.await
                });
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
        // Without the hold an account that nothing limits would get one slot after the other.
        let cause = Cause::new(why, self.caller.now());
        self.quota.hold(Scope::Account(account), Hold::Until(until), &cause).await;
        self.leave_unused(slot).await;
    }

    /// Gives the slot of an account back that is held by now: nobody else can use it, but it costs nobody's budget.
    async fn leave_unused(&mut self, slot: Slot) {
        self.tally.returned(slot.account);
        self.quota.drop_unused(slot).await;
    }

    async fn make_call(&mut self, slot: Slot, permit: CallPermit) {
        let (jobs, group) = self.take_jobs(slot.account);
        if jobs.is_empty() {
            // The money of all that could start is spent, or others have to say first what is left.
            self.slots.push_front(slot);
            self.end_uncalled();
            return;
        }
        self.probe(&slot).await;
        let tickets = self.breakers.admit(slot.account, &jobs, Instant::now());
        self.count_call();
        self.gate.call();
        for job in jobs.iter().flat_map(|job| job.twins.iter().chain([job])) {
            self.regulate(&job.position.partition.clone());
        }
        let alone = (jobs.len() == 1 && self.caller.batch_max() > 1).then(|| fingerprint(&jobs[0]));
        let travel = Travel { group, alone };
        let (place, call) = (self.place.take(), Arc::clone(&self.caller).call(slot, permit, jobs, travel));
        self.calls.spawn(async move {
            let _place = place;
            Ended { tickets, travel, ..call.await }
        });
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
    pub(super) async fn return_slots(&mut self) {
        self.slots.iter().for_each(|slot| self.tally.returned(slot.account));
        self.quota.give_back(self.slots.drain(..).collect()).await;
    }

    /// Whether anything that waits may be called for.
    pub(super) fn can_start(&self) -> bool {
        let may_start = |job: &Job| self.intake.may_start(&job.position);
        self.splits.can_start(may_start) || self.backlog.can_start(may_start)
    }

    fn has_room(&self) -> bool {
        let under_way = self.calls.len() + self.looking_up.len();
        let is_free = !self.misfits.is_trying() || self.calls.is_empty();
        is_free && under_way < self.calls_allowed() && self.called.is_empty() && self.has_room_for_outcomes()
    }

    /// How many calls may be under way at once: no more than their replies have room.
    fn calls_allowed(&self) -> usize {
        let room = self.config.outcomes_limit.as_u64().saturating_mul(Self::REPLIES);
        self.config.calls_in_flight.min(self.reply_size.calls(usize::try_from(room).unwrap_or(usize::MAX)))
    }

    /// How many calls slots are leased for at once, at most.
    pub(super) fn calls_wanted(&self) -> usize {
        let under_way = self.calls.len() + self.looking_up.len();
        let room = self.calls_allowed().saturating_sub(under_way).min(self.place.free());
        let room = room.min(self.breakers.room(Instant::now()));
        let room = if self.misfits.is_trying() { room.min(1) } else { room };
        (self.backlog.calls(self.caller.batch_max()) + self.splits.calls()).min(room).min(Self::LEASE)
    }

    /// The next slot that is neither missed nor overtaken by a hold, and whether its time has come. Leases more if none
    /// is left.
    async fn next_slot(&mut self) -> Option<(Slot, bool)> {
        loop {
            while let Some(slot) = self.slots.pop_front() {
                // Looked at first: nobody passes on a slot whose time has come.
                let is_due = slot.at <= Instant::now();
                if self.quota.is_passed_on(&slot) {
                    self.tally.returned(slot.account);
                    self.haste.has_passed = true;
                    continue;
                }
                if !slot.is_late(Instant::now()) && !self.quota.is_held(&slot) {
                    return Some((slot, is_due));
                }
                if slot.is_late(Instant::now()) {
                    self.tally.missed(slot.account);
                } else {
                    self.tally.returned(slot.account);
                }
                self.quota.give_back(vec![slot]).await;
            }
            match self.quota.lease(self.calls_wanted()).await {
                Lease::Slots(slots) => {
                    self.nobody_told = false;
                    self.leased_at = Instant::now();
                    self.slots.extend(slots);
                }
                Lease::NotBefore(at) => {
                    self.heed_fleet();
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

    /// The requests of one call, and the group that they are of: as many as the vendor takes and as go together. It is paid for once for each batch that
    /// it serves. What finds out whether a breaker may close has failed the fewest times: else one sick item after the other
    /// would keep a source shut that answers all others.
    fn take_jobs(&mut self, account: usize) -> (Vec<Job>, Option<GroupId>) {
        if let Some((group, jobs)) = self.take_split() {
            return (jobs, Some(group));
        }
        let (intake, departure) = (&self.intake, self.departure());
        let mut jobs: Vec<Job> = Vec::with_capacity(self.caller.batch_max());
        let mut paid = Vec::new();
        while jobs.len() < self.caller.batch_max() {
            let may_start = |job: &Job| intake.may_start(&job.position);
            let next = match jobs.first() {
                None if self.breakers.is_trying(account) => {
                    self.backlog.pop_least(|job| self.breakers.failures_of(job), may_start)
                }
                None => self.backlog.pop(departure, may_start),
                Some(first) => self.backlog.pop_along(first, may_start),
            };
            let Some(mut job) = next else { break };
            let pay = self.spending.pay(job.request.batch.as_ref(), &mut paid);
            if pay == Pay::Go {
                for twin in self.backlog.pop_alike(&job, Self::TWINS, may_start) {
                    match self.spending.pay(twin.request.batch.as_ref(), &mut paid) {
                        Pay::Go => job.twins.push(twin),
                        pay @ (Pay::Wait | Pay::Spent) => self.unpaid.put(twin, pay),
                    }
                }
                jobs.push(job);
            } else {
                self.unpaid.put(job, pay);
            }
        }
        self.end_unpaid();
        (jobs, None)
    }

    /// Ends requests for which nothing will be paid any more.
    pub(super) fn end_unpaid(&mut self) {
        for job in self.unpaid.take_spent() {
            let (position, records) = self.caller.over_budget(job);
            self.end(position, End::Made(records));
        }
    }

    /// Looks again at those that wait for money.
    pub(super) fn pay_again(&mut self) {
        self.tell_spent();
        for job in self.unpaid.clear() {
            self.enlist(job);
        }
    }

    /// Counts a call, and says which budgets are spent.
    fn count_call(&mut self) {
        let (now, source) = (self.caller.now(), &self.caller.source);
        if let Some(calls) = self.spending.count_call(now) {
            warn!(%source, calls, "the day's budget is spent; told to go on (on_budget)");
        }
        self.tell_spent();
    }

    fn tell_spent(&self) {
        let source = &self.caller.source;
        for batch in self.spending.newly_spent() {
            warn!(%source, %batch, "the batch's budget is spent: with on_budget = \"stop\" the rest of it ends as dead letters with reason budget");
        }
    }
}
