//! Which requests leave now, in which slot.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;
use tracing::{error, warn};

use super::{Fetch, batches, call::Ended, job::Job, lanes::Departure, spending::Spent};
use crate::{
    breaker::Shut,
    kafka::{Reader, Writer},
    quota::{Cause, Hold, Lease, Scope, Slot},
    tokens::keeper::Purpose,
};

/// A slot whose account has to wait for a token puts it off for at least and at most so long.
const TOKEN_WAIT: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(1)];

impl<R: Reader, W: Writer> Fetch<R, W> {
    /// Slots leased at once, at most: the longest that a source's accounts are asked about in one step.
    const LEASE: usize = 64;

    /// How long a request waits for others to travel with while slots are free.
    const WINDOW: Duration = Duration::from_millis(10);

    /// How many requests end with the answer to one that asks for the same: their results are made at once.
    const TWINS: usize = 1_000;

    /// While nobody may call, the quota is asked this often: an operator may end a hold at any time.
    pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(500);

    /// Makes every call whose time has come, and sets when to look again.
    pub(super) async fn dispatch(&mut self) {
        self.wake_at = None;
        let is_shut = self.breakers.shut(Instant::now()).is_some();
        self.metrics.now(|lane| self.backlog.len_of(lane), self.calls.len(), is_shut);
        self.backlog.set_share(*self.express_share.borrow());
        self.end_uncalled();
        while self.has_room() && self.backlog.can_start(|job| self.intake.may_start(&job.position)) {
            match self.breakers.shut(Instant::now()) {
                None => {}
                Some(Shut::Until(until)) => return self.sit_out(until).await,
                // The end of a probe wakes.
                Some(Shut::Probing) => return self.return_slots().await,
            }
            if let Some(at) = self.waits_for_others() {
                self.return_slots().await;
                self.wake_at = Some(at);
                return;
            }
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

    /// Until when what waits waits for more to travel with it. Only while slots are free: one whose time is known ahead
    /// takes along what has come by then.
    fn waits_for_others(&self) -> Option<Instant> {
        let departure = self.departure();
        let is_free = self.slots.front().is_none_or(|slot| slot.at <= self.leased_at + Duration::from_millis(1));
        if departure.most <= 1 || !is_free {
            return None;
        }
        let at = self.backlog.departs_at(departure, |job| self.intake.may_start(&job.position));
        at.filter(|at| *at > departure.now)
    }

    fn departure(&self) -> Departure {
        Departure { most: self.caller.batch_max(), window: Self::WINDOW, now: Instant::now() }
    }

    /// Makes a call in this slot, or renews its account's token.
    async fn use_slot(&mut self, slot: Slot) {
        let (account, now) = (slot.account, Instant::now());
        let (until, why) = match self.caller.tokens.purpose(account) {
            Purpose::Call if self.waits_for_breaker(account).await => return,
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
        let tickets = self.breakers.admit(slot.account, &jobs, Instant::now());
        self.charge(&jobs);
        for job in jobs.iter().flat_map(|job| job.twins.iter().chain([job])) {
            self.regulate(&job.position.partition.clone());
        }
        let call = Arc::clone(&self.caller).call(slot, jobs);
        self.calls.spawn(async move { Ended { tickets, ..call.await } });
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

    fn has_room(&self) -> bool {
        self.calls.len() < self.config.calls_in_flight && self.has_room_for_outcomes()
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
            let room = (self.config.calls_in_flight - self.calls.len()).min(self.breakers.room(Instant::now()));
            match self.quota.lease(self.backlog.calls(self.caller.batch_max()).min(room).min(Self::LEASE)).await {
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

    /// The requests of one call: as many as the vendor takes and as go together.
    fn take_jobs(&mut self) -> Vec<Job> {
        let (intake, departure) = (&self.intake, self.departure());
        let mut jobs: Vec<Job> = Vec::with_capacity(self.caller.batch_max());
        while jobs.len() < self.caller.batch_max() {
            let may_start = |job: &Job| intake.may_start(&job.position);
            let next = match jobs.first() {
                None => self.backlog.pop(departure, may_start),
                Some(first) => self.backlog.pop_along(first, may_start),
            };
            match next {
                Some(mut job) if self.spending.may_call(job.request.batch.as_ref()) => {
                    job.twins = self.backlog.pop_alike(&job, Self::TWINS, |twin| {
                        may_start(twin) && self.spending.may_call(twin.request.batch.as_ref())
                    });
                    jobs.push(job);
                }
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
}
