//! What batches may cost: budgets of calls that all processes of a fleet spend together, and never more.
//!
//! ```text
//!  fetch ──charge──► [`own`]: what this process holds ──ask, return, tell──► ledger: [`register`] in this process,
//!         ◄─changed──                                ◄──block, news────────           `purse.lua` in Redis
//! ```
//!
//! The ledger grants blocks of calls, and a process spends its own without asking anybody. What it does not need goes
//! back; of one that was killed its block counts as spent. Everybody hears of every grant and keeps it ([`ledger`]):
//! when Redis has lost its state, or may have lost the end of it, nothing is granted until everybody who is there has
//! told what he knows. Reports take it to the topic, for the next start. Only if Redis' state and every process are lost
//! within the second between two reports, what was granted in it is forgotten.

pub mod ledger;
mod own;
pub mod register;

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, timeout_at},
};

use self::{
    ledger::Part,
    own::Own,
    register::{Input, Output, Register},
};
use super::{Past, limit::micros, money::Budgets};
use crate::{
    message::{BatchId, BatchReport},
    runtime::clock::sleep_until_due,
};

/// For so long after it began a process can say that nobody has called before, if somebody has looked.
const READ_LASTS: Duration = Duration::from_secs(10);

/// How long giving back may take when a process ends.
const CLOSE_WITHIN: Duration = Duration::from_secs(1);

/// Whether a call can be paid for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pay {
    /// It can.
    Go,
    /// Nobody knows before others have answered: [`Purse::changed`].
    Wait,
    /// Its batch's budget is spent.
    Spent,
}

/// What this process may spend for batches of one source.
#[derive(Debug)]
pub struct Purse {
    own: Mutex<Own>,
    /// Who grants, if nobody else does.
    alone: Mutex<Option<Register>>,
    began_at: Instant,
    changed: Notify,
    answered: Notify,
    /// There may be something to be said to the ledger.
    due: Notify,
}

impl Purse {
    /// The purse of a source whose batches have a budget, in the light of its past. As long as nobody else funds it
    /// ([`Purse::share`]), it is the only one.
    #[must_use]
    pub fn new(budgets: &Budgets, past: &Past) -> Option<Self> {
        let now = Instant::now();
        let read_until = (past.is_read && !past.is_known).then(|| now + READ_LASTS);
        let holder = uuid::Uuid::new_v4().simple().to_string().split_off(20);
        let rule = (budgets.per_batch?, budgets.on_budget);
        Some(Self {
            own: Mutex::new(Own::new(holder, rule, past.batches.clone(), read_until)),
            alone: Mutex::new(Some(Register::default())),
            began_at: now,
            changed: Notify::new(),
            answered: Notify::new(),
            due: Notify::new(),
        })
    }

    /// From now on somebody else grants blocks of so many calls, and has to serve [`Purse::say`].
    pub fn share(&self, block: u64) {
        *self.alone.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.own().set_block(block);
    }

    fn own(&self) -> MutexGuard<'_, Own> {
        // Every step leaves it whole, so a panic elsewhere under the lock has broken nothing.
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a call for this batch can be paid for, as far as is known now; it is not paid for yet.
    pub fn expect(&self, batch: &BatchId) -> Pay {
        self.with(|own, now| own.expect(batch, now))
    }

    /// Pays for one call, if it can be paid for.
    pub fn charge(&self, batch: &BatchId) -> Pay {
        match self.with(|own, now| own.charge(batch, now)) {
            // Who grants alone has answered meanwhile.
            Pay::Wait if self.is_alone() => self.with(|own, now| own.charge(batch, now)),
            pay @ (Pay::Go | Pay::Wait | Pay::Spent) => pay,
        }
    }

    /// A call that was paid for did not leave.
    pub fn refund(&self, batch: &BatchId) {
        self.with(|own, now| own.refund(batch, now));
    }

    /// Batches whose budget was found spent since this was asked last.
    pub fn newly_spent(&self) -> Vec<BatchId> {
        self.own().newly_spent()
    }

    /// What is known, for a report: of the batches that were called for last.
    pub fn reports(&self) -> Vec<BatchReport> {
        self.own().reports()
    }

    /// Waits until what was to wait can perhaps be paid for.
    ///
    /// # Cancellation
    /// Safe: a change that nobody has waited for is told to the next one who does.
    pub async fn changed(&self) {
        loop {
            let next_at = self.own().next_at().filter(|_| self.is_alone());
            tokio::select! {
                () = self.changed.notified() => return,
                () = sleep_until_due(next_at) => self.with(|_, _| ()),
            }
        }
    }

    /// No call leaves any more: gives back what is left, and waits for a moment until that is known.
    pub async fn close(&self) {
        let until = Instant::now() + CLOSE_WITHIN;
        self.with(|own, _| own.close());
        while !self.own().is_settled() && timeout_at(until, self.answered.notified()).await.is_ok() {}
    }

    fn is_alone(&self) -> bool {
        self.alone.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn with<T>(&self, step: impl FnOnce(&mut Own, Instant) -> T) -> T {
        let (mut own, now) = (self.own(), Instant::now());
        let done = step(&mut own, now);
        self.settle(&mut own, now);
        if own.is_due(now) {
            self.due.notify_one();
        }
        done
    }

    /// Serves what there is to be said, if nobody else does.
    fn settle(&self, own: &mut Own, now: Instant) {
        let mut alone = self.alone.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(register) = alone.as_mut() else { return };
        while let Some(input) = own.say(now) {
            // Nobody else can have called in a state of this process' own.
            let (output, _) = register.serve(micros(now - self.began_at), "", &Input { read: true, ..input });
            if own.take(output, now) {
                self.changed.notify_one();
            }
        }
    }

    /// What there is to be said to the ledger.
    pub fn say(&self) -> Option<Input> {
        self.own().say(Instant::now())
    }

    /// Waits until there may be something to be said.
    ///
    /// # Cancellation
    /// Safe.
    pub async fn due(&self) {
        let next_at = {
            let (own, now) = (self.own(), Instant::now());
            if own.is_due(now) { Some(now) } else { own.next_at() }
        };
        tokio::select! {
            () = self.due.notified() => {}
            () = sleep_until_due(next_at) => {}
        }
    }

    /// What the ledger has answered.
    pub fn take(&self, output: Output) {
        if self.own().take(output, Instant::now()) {
            self.changed.notify_one();
        }
        self.answered.notify_one();
    }

    /// The connection to the ledger is lost.
    pub fn lost(&self) {
        self.own().lost();
    }

    /// What another process holds now.
    pub fn heard(&self, batch: &BatchId, holder: &str, part: Part) {
        self.own().heard(batch, holder, part, Instant::now());
        self.due.notify_one();
    }

    /// What another process reports: it may be cut off from the ledger.
    pub fn read(&self, reports: &[BatchReport]) {
        self.own().read(reports);
    }

    /// A ledger was made anew.
    pub fn born(&self, birth: &str) {
        self.own().born(birth);
        self.due.notify_one();
    }
}

#[cfg(test)]
mod tests;
