//! What a worker knows between two calls to Redis: slots that it may hand out, and holds. No I/O.

mod express;
mod holds;
pub mod paces;

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use tokio::time::Instant;
use tracing::warn;

use self::{
    express::Express,
    holds::Change,
    paces::{Heard, NewPace},
};
use super::{
    offset::Offset,
    wire::{Ask, HoldAsk, HoldsAsk, PIECE, PaceAsk},
};
use crate::quota::{
    Lease, PaceBy, Scope, Share, Slot,
    limit::{Micros, micros},
    memory::HORIZON,
    state::Causes,
};

/// How long slots that came back may wait for the next call to Redis, if there will be one anyway …
const RETURN_LATER: Duration = Duration::from_millis(500);
/// … and if somebody else may want them.
const RETURN_SOON: Duration = Duration::from_millis(20);
/// The longest that a call can take with any time-out that is allowed, if nobody says how long it takes at most.
const CALL_MAX: Duration = Duration::from_secs(1_200);
/// What a slot that was granted ahead may still be away, and what clocks and machines may be late.
const GRACE: Duration = Duration::from_secs(10);
/// For so long a slot that was handed out is known, so that it can come back: a way to the vendor may take as long to fail.
const RETURNABLE: Duration = Duration::from_secs(60);
/// So many accounts that are not ours are named at each lease; of more some are granted now and then, and go back.
const FOREIGN: usize = 1_000;
/// When to ask again if nobody can say.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// Slots as Redis tells of them: the account's name, the time, the address's name.
pub type Slots = Vec<(String, Micros, String)>;

/// What is known of an account.
#[derive(Clone, Debug)]
pub struct Known {
    pub name: String,
    pub lateness: Duration,
    /// The index of its address, and of those where it goes while that one is held.
    pub home: usize,
    pub fallbacks: Vec<usize>,
    pub held_until: Option<Instant>,
    pub disabled: bool,
    /// Calls under way are counted, since there may be only so many.
    pub is_capped: bool,
    pub pace: Heard,
}

/// What is known of an address that calls leave from.
#[derive(Clone, Debug)]
pub struct KnownAddress {
    pub name: String,
    pub held_until: Option<Instant>,
    pub disabled: bool,
    pub pace: Heard,
}

/// What the driver does next.
#[derive(Debug)]
pub enum Step {
    /// Tell Redis of these holds.
    Hold(Vec<HoldAsk>),
    /// Tell Redis of these changes of pace.
    Pace(Vec<PaceAsk>),
    /// Ask for holds: some were missed.
    Holds(HoldsAsk),
    /// Ask for slots, or give some back.
    Lease(Box<Ask>),
    /// Nothing before this time.
    Wait(Option<Instant>),
}

/// A worker's side of a source's quota.
#[derive(Debug)]
pub struct Local {
    accounts: Vec<Known>,
    /// Their indexes: a source may have 10,000.
    by_name: HashMap<String, usize>,
    addresses: Vec<KnownAddress>,
    held_until: Option<Instant>,
    disabled: bool,
    /// Slots to hand out, by time, as Redis knows them.
    slots: VecDeque<(Slot, Micros)>,
    /// Slots handed out lately: they may come back.
    out: VecDeque<(Slot, Micros)>,
    /// Account, time and address.
    returned: Vec<(usize, Micros, usize)>,
    ended: Vec<usize>,
    /// Slots of accounts, or from addresses, that are not in this worker's lists: they go back for others.
    strays: Vec<(String, Micros, String)>,
    /// The names of those accounts, the latest last: this worker asks for no more slots of theirs.
    foreign: VecDeque<String>,
    /// When to tell Redis of what came back.
    return_at: Option<Instant>,
    /// How many slots there is work for, beyond those handed out.
    demand: usize,
    /// As many are kept ahead at most.
    depth: usize,
    /// As many are asked for at once: a lease takes Redis some 15 µs a slot, and all others wait meanwhile.
    most: usize,
    ahead: Micros,
    /// In so much time a lease's worth of slots comes free.
    gap: Duration,
    /// Not worth asking before.
    ask_at: Instant,
    outgoing: Vec<Change>,
    causes: Causes,
    paces: VecDeque<(Scope, NewPace)>,
    /// What was asked for: a state that is made anew does not know it.
    asked: HashMap<(Scope, PaceBy), Share>,
    /// The source's.
    pace: Heard,
    seq: u64,
    seq_known: u64,
    /// While holds are asked for piece by piece: of how many accounts they are known, and as of which `seq` at least.
    holds_heard: Option<(usize, u64)>,
    pub offset: Option<Offset>,
    /// When the state in Redis was made that this worker knows.
    pub birth: String,
    /// What this worker is called while its connection lasts: leases of an earlier one may never have arrived.
    pub worker: String,
    /// Slots that came too late to be used, as their reply took too long.
    pub discarded: u64,
    /// A worker that is not heard of for so long is gone, and its calls have ended.
    gone: Micros,
    express: Express,
    /// Since when Redis is away.
    pub cut_off_at: Option<Instant>,
}

impl Local {
    pub fn new(
        accounts: Vec<Known>,
        addresses: Vec<String>,
        (depth, most, gap): (usize, usize, Duration),
        ahead: Micros,
        longest_call: Option<Duration>,
    ) -> Self {
        let address = |name| KnownAddress { name, held_until: None, disabled: false, pace: Heard::default() };
        let by_name = accounts.iter().enumerate().map(|(index, account)| (account.name.clone(), index)).collect();
        Self {
            accounts,
            by_name,
            addresses: addresses.into_iter().map(address).collect(),
            held_until: None,
            disabled: false,
            slots: VecDeque::new(),
            out: VecDeque::new(),
            returned: Vec::new(),
            ended: Vec::new(),
            strays: Vec::new(),
            foreign: VecDeque::new(),
            return_at: None,
            demand: 0,
            depth,
            most,
            ahead,
            gap: gap.min(Duration::from_micros(ahead) / 4).max(Duration::from_millis(10)),
            ask_at: Instant::now(),
            outgoing: Vec::new(),
            causes: Causes::default(),
            paces: VecDeque::new(),
            asked: HashMap::new(),
            pace: Heard::default(),
            seq: 0,
            seq_known: 0,
            holds_heard: None,
            offset: None,
            birth: String::new(),
            worker: String::new(),
            discarded: 0,
            gone: micros(longest_call.unwrap_or(CALL_MAX) + GRACE),
            express: Express::default(),
            cut_off_at: None,
        }
    }

    /// How many slots are kept ahead at most.
    pub const fn depth(&self) -> usize {
        self.depth
    }

    /// Hands out what is at hand.
    pub fn lease(&mut self, wanted: usize, now: Instant) -> Lease {
        if self.disabled || self.accounts.iter().all(|account| account.disabled) {
            return Lease::Nobody;
        }
        self.drop_missed(now);
        let wanted = wanted.max(1);
        let mut leased = Vec::new();
        while leased.len() < wanted && self.slots.front().is_some_and(|(slot, _)| slot.at <= now + HORIZON) {
            let Some(slot) = self.slots.pop_front() else { break };
            leased.push(slot.0.clone());
            self.out.push_back(slot);
        }
        self.demand = wanted - leased.len();
        if leased.is_empty() {
            let next = self.slots.front().map(|(slot, _)| slot.at - HORIZON);
            return Lease::NotBefore(next.unwrap_or(self.ask_at).max(now + Duration::from_millis(2)));
        }
        Lease::Slots(leased)
    }

    /// Slots that nobody can use any more go back, since a budget may be charged with them.
    fn drop_missed(&mut self, now: Instant) {
        let (kept, gone): (VecDeque<_>, VecDeque<_>) = self
            .slots
            .drain(..)
            .partition(|(slot, _)| !slot.is_late(now) && !held(&self.accounts, &self.addresses, self.held_until, slot));
        self.slots = kept;
        self.return_at = self.return_at.or((!gone.is_empty()).then_some(now + RETURN_LATER));
        self.returned.extend(gone.into_iter().map(|(slot, at)| (slot.account, at, slot.address)));
        while self.out.front().is_some_and(|(slot, _)| slot.at + RETURNABLE < now) {
            self.out.pop_front();
        }
    }

    /// Takes back what will not be used. Who gives back what could still be used has nothing more to do: the rest goes back
    /// too.
    pub fn give_back(&mut self, slots: &[Slot], now: Instant) {
        let mut back = Vec::new();
        for slot in slots {
            back.extend(self.take_out(slot));
        }
        if slots.iter().any(|slot| !slot.is_late(now) && !self.is_held(slot)) {
            self.demand = 0;
            self.express.coming.clear();
            back.extend(self.slots.drain(..));
        }
        self.returned.extend(back.into_iter().map(|(slot, at)| (slot.account, at, slot.address)));
        let return_at = now + if self.demand == 0 { RETURN_SOON } else { RETURN_LATER };
        if !self.returned.is_empty() {
            self.return_at = Some(self.return_at.map_or(return_at, |at| at.min(return_at)));
        }
    }

    /// A slot that was handed out lately. Of the many of a minute it is nearly always one of the last.
    fn take_out(&mut self, slot: &Slot) -> Option<(Slot, Micros)> {
        let found = self.out.iter().rposition(|(out, _)| out == slot)?;
        self.out.remove(found)
    }

    /// Takes back what was not used by its time, for its budgets alone.
    pub fn drop_unused(&mut self, slot: &Slot, now: Instant) {
        if let Some((slot, at)) = self.take_out(slot) {
            self.returned.push((slot.account, at, slot.address));
            // Somebody may be waiting for its place under a cap.
            let is_capped = self.accounts.get(slot.account).is_some_and(|account| account.is_capped);
            let return_at = now + if is_capped { RETURN_SOON } else { RETURN_LATER };
            self.return_at = Some(self.return_at.map_or(return_at, |at| at.min(return_at)));
        }
    }

    /// A call has ended.
    pub fn end(&mut self, account: usize, now: Instant) {
        if self.accounts.get(account).is_some_and(|account| account.is_capped) {
            self.ended.push(account);
            // Somebody may be waiting for it.
            self.return_at = Some(self.return_at.unwrap_or(now + RETURN_SOON).min(now + RETURN_SOON));
        }
    }

    pub fn is_held(&self, slot: &Slot) -> bool {
        self.disabled || self.is_passed_on(slot) || held(&self.accounts, &self.addresses, self.held_until, slot)
    }

    fn index(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    fn address(&self, name: &str) -> Option<usize> {
        self.addresses.iter().position(|address| address.name == name)
    }

    /// What Redis calls an account, or an address; the source has no name.
    fn names_of(&self, scope: Scope) -> (Option<String>, Option<String>) {
        match scope {
            Scope::Source => (None, None),
            Scope::Address(index) => (None, self.addresses.get(index).map(|address| address.name.clone())),
            Scope::Account(index) => (self.accounts.get(index).map(|account| account.name.clone()), None),
        }
    }

    /// What to do next.
    pub fn step(&mut self, now: Instant) -> Step {
        if !self.outgoing.is_empty() {
            return Step::Hold(self.outgoing.iter().take(PIECE).map(|change| self.hold_ask(change, now)).collect());
        }
        if !self.paces.is_empty() {
            return Step::Pace(self.paces.iter().take(PIECE).map(|pace| self.pace_ask(*pace, now)).collect());
        }
        if self.seq != self.seq_known {
            return Step::Holds(self.holds_ask());
        }
        let wanted = self.demand.min(self.depth);
        let missing = wanted.saturating_sub(self.slots.len());
        let is_short = missing > 0 && missing * 2 >= wanted && !self.disabled;
        let express_at = self.express.due_at(now);
        let is_due = |at: Option<Instant>| at.is_some_and(|at| now >= at);
        let asks = is_short && now >= self.ask_at;
        if asks || is_due(self.return_at) || is_due(express_at) || !self.express.leaving.is_empty() {
            return Step::Lease(Box::new(self.ask(if asks { missing.min(self.most) } else { 0 }, now)));
        }
        let ask_at = is_short.then_some(self.ask_at);
        Step::Wait([ask_at, self.return_at, express_at].into_iter().flatten().min())
    }

    /// There is a connection, or there is none any more. Through a new one something is said at once: if the state is lost,
    /// others wait for what this worker knows of it.
    pub fn connected(&mut self, is_connected: bool, now: Instant) {
        self.holds_heard = None;
        self.cut_off_at = (!is_connected).then_some(self.cut_off_at.unwrap_or(now));
        if is_connected {
            self.return_at = Some(now);
        }
    }

    /// A state was made by somebody who knew nothing of the past: this worker may know more.
    pub fn born(&mut self, birth: &str, now: Instant) {
        if birth != self.birth {
            self.return_at = Some(now);
        }
    }

    /// Whether nobody here can call since Redis is away.
    pub fn has_stopped(&self, now: Instant) -> bool {
        let has_slots = self.slots.iter().any(|(slot, _)| !slot.is_late(now));
        self.cut_off_at.is_some() && !has_slots
    }

    fn ask(&mut self, count: usize, now: Instant) -> Ask {
        let slot = |(account, at, address): (usize, Micros, usize)| -> [serde_json::Value; 3] {
            [at.into(), self.accounts[account].name.clone().into(), self.addresses[address].name.clone().into()]
        };
        let strays = self.strays.drain(..).flat_map(|(name, at, from)| [at.into(), name.into(), from.into()]);
        let returned = self.returned.drain(..).flat_map(slot).chain(strays).collect();
        let leaving = self.express.leaving.drain(..);
        let passed = leaving.flat_map(|one| slot(one.slot).into_iter().chain([one.to.into()])).collect();
        let express = self.express.ask(now);
        self.return_at = None;
        let ended = self.ended.drain(..).map(|account| self.accounts[account].name.clone()).collect();
        let (worker, gone, birth) = (self.worker.clone(), self.gone, self.birth.clone());
        let (ahead, takes_part) = (self.ahead, self.express.takes_part());
        let foreign = self.foreign.iter().cloned().collect();
        Ask { count, ahead, birth, worker, gone, ended, returned, foreign, takes_part, passed, express }
    }

    /// Of a newer configuration than ours, as during a rolling upgrade: nobody here can use it, others can.
    fn leave_to_others(&mut self, (name, micros, address): (String, Micros, String), now: Instant) {
        if !self.foreign.contains(&name) {
            warn!(
                account = name,
                address,
                "other workers have an account or an address that this one does not know; its slots are left to them. \
                 Do all workers have the same configuration?"
            );
            if self.foreign.len() == FOREIGN {
                self.foreign.pop_front();
            }
            self.foreign.push_back(name.clone());
        }
        self.strays.push((name, micros, address));
        self.return_at = Some(self.return_at.unwrap_or(now).min(now + RETURN_SOON));
    }

    /// Slots have come.
    pub fn receive(&mut self, slots: Slots, next_at: Option<Micros>, seq: u64, now: Instant) {
        self.seq = seq;
        let Some(offset) = self.offset else { return };
        self.ask_at = if slots.is_empty() { now + ASK_AGAIN } else { now };
        if let Some(next_at) = next_at {
            let ahead = Duration::from_micros(self.ahead);
            let ask_at = offset.instants(next_at, now).0;
            // Everything that may be leased is leased: asking at once would bring one slot at a time.
            self.ask_at = ask_at.checked_sub(ahead).unwrap_or(now).max(now) + self.gap;
        }
        for slot in slots {
            self.keep(slot, now);
        }
    }

    /// Keeps a slot, to hand it out; when it leaves, if it has not come too late.
    fn keep(&mut self, (name, micros, address): (String, Micros, String), now: Instant) -> Option<Instant> {
        let known = self.index(&name).zip(self.address(&address));
        let Some((account, address)) = known else {
            self.leave_to_others((name, micros, address), now);
            return None;
        };
        // Never early by any reckoning, and not late by any.
        let (first, at) = self.offset?.instants(micros, now);
        let slot = Slot { account, address, at, latest: first + self.accounts[account].lateness };
        if slot.latest < slot.at || slot.is_late(now) {
            self.discarded += 1;
            self.returned.push((account, micros, address));
            self.return_at = self.return_at.or(Some(now + RETURN_LATER));
            return None;
        }
        let place = self.slots.partition_point(|(other, _)| other.at <= at);
        self.slots.insert(place, (slot, micros));
        Some(at)
    }
}

fn held(accounts: &[Known], addresses: &[KnownAddress], source: Option<Instant>, slot: &Slot) -> bool {
    let before = |held: Option<Instant>| held.is_some_and(|held| slot.at < held);
    before(source)
        || addresses.get(slot.address).is_none_or(|address| address.disabled || before(address.held_until))
        || accounts.get(slot.account).is_none_or(|account| account.disabled || before(account.held_until))
}
