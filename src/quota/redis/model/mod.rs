//! A fleet that shares a quota and passes slots on, in virtual time: the real worker's side, and what `lease.lua` does.
//! Tests only.

#![allow(clippy::cast_precision_loss, reason = "counts far below 2^52")]

mod server;
mod tests;

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    time::Duration,
};

use tokio::time::Instant;

use self::server::{Delivery, Server};
use super::{
    AHEAD, block,
    local::{Known, Local, Step, paces::Heard},
    offset::Offset,
    wire::{Ask, Word},
};
use crate::{
    quota::{
        Lease, Pacing, Passed, Slot,
        limit::{Micros, micros},
        plan::{Limits, Plan},
        turn::Arbiter,
    },
    runtime::clock::Dice,
};

const MILLI: Micros = 1_000;
const SECOND: Micros = 1_000_000;
/// What the day's clock shows at the start.
const START: Micros = 1_700_000_000 * SECOND;
/// What is seen before is not counted, except by the vendor.
const WARM_UP: Micros = 10 * SECOND;
/// As fetch has it: a slot so near is waited for.
const SOON: Duration = Duration::from_millis(20);
/// What fetch leases at once.
const LEASE: usize = 64;

/// What happens next; the numbers are workers'.
enum Event {
    /// A request comes, by the express lane.
    Express(usize),
    /// Its stage looks what may leave.
    Stage(usize),
    /// Its driver looks what to ask Redis.
    Driver(usize),
    /// Redis is asked, and was asked at that time.
    Asked(usize, Box<Ask>, Micros),
    /// It hears from Redis.
    Hears(usize, Delivery),
}

struct Worker {
    local: Local,
    /// Slots that its stage has leased.
    slots: VecDeque<Slot>,
    has_backlog: bool,
    /// When its express requests came.
    express: VecDeque<Micros>,
    arbiter: Arbiter,
    hastens: bool,
    is_asking: bool,
    /// Stands still until then.
    stalled_until: Micros,
    stage_at: Micros,
    driver_at: Micros,
}

/// The fleet, its surroundings, and what is asked of it.
struct Fleet {
    limits: Limits,
    workers: usize,
    /// Which of them have a backlog.
    backlog: fn(usize) -> bool,
    /// Express requests a second, and who gets them.
    express: f64,
    express_to: fn(&Dice) -> usize,
    share: f64,
    /// What a word between a worker and Redis takes at most.
    hop: Micros,
    /// Each worker stands still for 200 ms, every so often.
    stalls: Option<Micros>,
    /// Slots are passed on.
    passes: bool,
    /// How many slots a worker keeps ahead; `None` = as many as the plan says.
    depth: Option<usize>,
    span: Micros,
}

/// What was seen.
#[derive(Default)]
struct Seen {
    /// Account, and when its call left; the first so many before anything was counted.
    sent: Vec<(usize, Micros)>,
    before: usize,
    /// How long express requests waited.
    waits: Vec<Micros>,
    operations: usize,
    missed: usize,
}

struct World<'a> {
    fleet: &'a Fleet,
    epoch: Instant,
    server: Server,
    workers: Vec<Worker>,
    events: BTreeMap<(Micros, u64), Event>,
    number: u64,
    dice: Dice,
    /// Whatever was used, by account and time: nothing twice.
    used: HashSet<(usize, Instant)>,
    seen: Seen,
}

impl Fleet {
    fn new(limits: Limits, workers: usize) -> Self {
        Self {
            limits,
            workers,
            backlog: |_| true,
            express: 8.0,
            express_to: |dice| usize::try_from(below(dice, 16)).unwrap(),
            share: 0.5,
            hop: 2 * MILLI,
            stalls: None,
            passes: true,
            depth: None,
            span: 120 * SECOND,
        }
    }

    fn run(&self) -> Seen {
        let mut world = World::new(self);
        // At the start nobody has slots yet.
        world.run_until(START + WARM_UP);
        world.seen = Seen { before: world.seen.sent.len(), sent: world.seen.sent, ..Seen::default() };
        world.run_until(START + WARM_UP + self.span);
        world.seen
    }
}

impl<'a> World<'a> {
    fn new(fleet: &'a Fleet) -> Self {
        let plan = Plan::new(&fleet.limits, &Pacing::default());
        let epoch = Instant::now() + Duration::from_secs(60);
        let mut world = Self {
            fleet,
            epoch,
            server: Server::new(&plan, fleet.passes),
            workers: (0..fleet.workers).map(|number| Worker::new(number, fleet, &plan, epoch)).collect(),
            events: BTreeMap::new(),
            number: 0,
            dice: Dice::seeded(5),
            used: HashSet::new(),
            seen: Seen::default(),
        };
        for worker in 0..fleet.workers {
            world.wake_stage(worker, START + worker as u64 * 3 * MILLI);
        }
        world.expect_express(START);
        world
    }

    fn at(&mut self, at: Micros, event: Event) {
        self.number += 1;
        self.events.insert((at, self.number), event);
    }

    fn instant(&self, at: Micros) -> Instant {
        self.epoch + Duration::from_micros(at - START)
    }

    fn micros(&self, at: Instant) -> Micros {
        START + micros(at.saturating_duration_since(self.epoch))
    }

    fn hop(&self) -> Micros {
        self.fleet.hop / 10 + below(&self.dice, self.fleet.hop)
    }

    fn run_until(&mut self, end: Micros) {
        while let Some(first) = self.events.first_entry().filter(|first| first.key().0 <= end) {
            let ((at, _), event) = first.remove_entry();
            self.happen(at, event);
        }
    }

    fn happen(&mut self, now: Micros, event: Event) {
        match event {
            Event::Express(index) => {
                self.workers[index].express.push_back(now);
                self.expect_express(now);
                self.wake_stage(index, now);
            }
            Event::Asked(index, ask, sent) => self.answer(index, &ask, sent, now),
            Event::Stage(index) | Event::Driver(index) | Event::Hears(index, _)
                if self.workers[index].stalled_until > now =>
            {
                self.at(self.workers[index].stalled_until, event);
            }
            Event::Stage(index) if self.workers[index].stage_at == now => {
                if let Some(every) = self.fleet.stalls
                    && below(&self.dice, every) < 2 * MILLI
                {
                    self.workers[index].stalled_until = now + 200 * MILLI;
                }
                self.work(index, now);
            }
            Event::Driver(index) if self.workers[index].driver_at <= now => self.drive(index, now),
            // Another time was set meanwhile.
            Event::Stage(_) | Event::Driver(_) => {}
            Event::Hears(index, delivery) => self.hear(index, delivery, now),
        }
    }

    fn expect_express(&mut self, now: Micros) {
        if self.fleet.express > 0.0 {
            let gap = micros(Duration::from_secs_f64(-(1.0 - self.dice.fraction()).ln() / self.fleet.express));
            let to = (self.fleet.express_to)(&self.dice).min(self.fleet.workers - 1);
            self.at(now + gap, Event::Express(to));
        }
    }

    fn wake_stage(&mut self, index: usize, at: Micros) {
        self.workers[index].stage_at = at;
        self.at(at, Event::Stage(index));
    }

    fn wake_driver(&mut self, index: usize, at: Micros) {
        self.workers[index].driver_at = at;
        self.at(at, Event::Driver(index));
    }

    /// What a stage does when it wakes.
    fn work(&mut self, index: usize, now: Micros) {
        let at = self.instant(now);
        let (calls, express, missed, wake_at) = self.workers[index].dispatch(at, self.fleet);
        for slot in calls {
            assert!(self.used.insert((slot.account, slot.at)), "a slot is one worker's only: {slot:?}");
            assert!(slot.at <= at && !slot.is_late(at), "never early, never late: {slot:?}");
            self.seen.sent.push((slot.account, now));
        }
        self.seen.waits.extend(express.into_iter().map(|since| now - since));
        self.seen.missed += missed;
        let slop = below(&self.dice, MILLI);
        if let Some(wake_at) = wake_at {
            let next = self.micros(wake_at).max(now + 100);
            self.wake_stage(index, next + slop);
        }
        self.wake_driver(index, now + below(&self.dice, 200));
    }

    fn drive(&mut self, index: usize, now: Micros) {
        if self.workers[index].is_asking {
            return;
        }
        let at = self.instant(now);
        match self.workers[index].local.step(at) {
            Step::Lease(ask) => {
                self.seen.operations += 1;
                self.workers[index].is_asking = true;
                let hop = self.hop();
                self.at(now + hop, Event::Asked(index, ask, now));
            }
            Step::Wait(until) => {
                if let Some(until) = until {
                    let until = self.micros(until).max(now + 100);
                    self.wake_driver(index, until);
                }
            }
            Step::Hold(_) | Step::Pace(_) | Step::Holds(_) => unreachable!("nobody holds anything"),
        }
    }

    fn answer(&mut self, index: usize, ask: &Ask, sent: Micros, now: Micros) {
        for (to, delivery) in self.server.lease(index, ask, (sent, now)) {
            let hop = self.hop();
            self.at(now + hop, Event::Hears(to, delivery));
        }
    }

    fn hear(&mut self, index: usize, delivery: Delivery, now: Micros) {
        let at = self.instant(now);
        match delivery {
            Delivery::Reply { slots, next_at, sent, shown } => {
                let sent = self.instant(sent);
                let worker = &mut self.workers[index];
                worker.is_asking = false;
                match &mut worker.local.offset {
                    Some(offset) => offset.learn(sent, at, shown),
                    None => worker.local.offset = Some(Offset::new(sent, at, shown)),
                }
                worker.local.receive(slots, next_at, 0, at);
            }
            Delivery::Word(Word::Pass(asked)) => self.workers[index].local.pass(&asked, at),
            Delivery::Word(Word::Passed { slots }) => {
                let slots = slots.into_iter().map(|(name, at, address)| (name, at.parse().unwrap(), address));
                self.workers[index].local.receive_passed(slots.collect(), at);
            }
        }
        self.wake_driver(index, now);
    }
}

impl Worker {
    fn new(number: usize, fleet: &Fleet, plan: &Plan, epoch: Instant) -> Self {
        let known = |(index, account): (usize, &crate::quota::plan::AccountPlan)| Known {
            name: format!("a{index}"),
            lateness: account.lateness,
            home: account.address,
            fallbacks: Vec::new(),
            held_until: None,
            disabled: false,
            is_capped: false,
            pace: Heard::default(),
        };
        let accounts = plan.accounts.iter().enumerate().map(known).collect();
        let mut block = block(plan);
        if let Some(depth) = fleet.depth {
            let half = u32::try_from(depth / 2).unwrap();
            block = (depth, depth, block.2 * half / u32::try_from(block.0 / 2).unwrap());
        }
        let mut local = Local::new(accounts, plan.address_names.clone(), block, micros(AHEAD), None);
        local.worker = number.to_string();
        local.connected(true, epoch);
        Self {
            local,
            slots: VecDeque::new(),
            has_backlog: (fleet.backlog)(number),
            express: VecDeque::new(),
            arbiter: Arbiter::new(fleet.share),
            hastens: false,
            is_asking: false,
            stalled_until: 0,
            stage_at: 0,
            driver_at: 0,
        }
    }

    /// As fetch does it: the calls that leave, when the express requests among them came, how many slots were missed, and
    /// when to look again.
    fn dispatch(&mut self, now: Instant, fleet: &Fleet) -> (Vec<Slot>, Vec<Micros>, usize, Option<Instant>) {
        let (mut calls, mut express, mut missed) = (Vec::new(), Vec::new(), 0);
        while self.has_backlog || !self.express.is_empty() {
            let waiting = self.late_express(now, fleet.share);
            let Passed { come, look_at } =
                if fleet.passes { self.local.hurry(waiting, fleet.share, now) } else { Passed::default() };
            self.arbiter.lend(come);
            self.hastens |= waiting > 0;
            let wanted = if self.has_backlog { LEASE } else { self.express.len().min(LEASE) };
            if (waiting > 0 || come > 0) && !self.slots.is_empty() {
                self.lease(wanted.saturating_sub(self.slots.len()).max(come), now);
            }
            let wait = |at: Instant| Some(look_at.map_or(at, |soon| at.min(soon)));
            let Some(slot) = self.slots.pop_front() else {
                if let Some(at) = self.lease(wanted, now) {
                    return (calls, express, missed, wait(at));
                }
                continue;
            };
            if self.local.is_passed_on(&slot) {
                continue;
            }
            if slot.is_late(now) {
                missed += 1;
                self.local.give_back(&[slot], now);
                continue;
            }
            if slot.at > now {
                let at = slot.at;
                self.slots.push_front(slot);
                return (calls, express, missed, wait(at));
            }
            let waits =
                |lane: crate::message::Lane| if lane.is_bulk() { self.has_backlog } else { !self.express.is_empty() };
            let Some(lane) = self.arbiter.next(waits) else { break };
            let other_waits = waits(lane.other());
            self.arbiter.served(lane, other_waits);
            if !lane.is_bulk() {
                express.extend(self.express.pop_front());
            }
            calls.push(slot);
        }
        if !self.slots.is_empty() {
            let slots: Vec<_> = self.slots.drain(..).collect();
            self.local.give_back(&slots, now);
        }
        if std::mem::take(&mut self.hastens) {
            self.local.rest(now);
        }
        (calls, express, missed, None)
    }

    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "some ten")]
    fn late_express(&self, now: Instant, share: f64) -> usize {
        let near = self.slots.iter().filter(|slot| slot.at <= now + SOON && !self.local.is_passed_on(slot)).count();
        let near = if self.has_backlog { (near as f64 * share).ceil() as usize } else { near };
        self.express.len().min(LEASE).saturating_sub(near)
    }

    /// Leases, and if nothing is to be had, when to ask again.
    fn lease(&mut self, wanted: usize, now: Instant) -> Option<Instant> {
        match self.local.lease(wanted, now) {
            Lease::Slots(slots) => {
                self.slots.extend(slots);
                self.slots.make_contiguous().sort_by_key(|slot| slot.at);
                None
            }
            Lease::NotBefore(at) => Some(at),
            Lease::Nobody => panic!("nobody is disabled"),
        }
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small")]
fn below(dice: &Dice, most: Micros) -> Micros {
    (most as f64 * dice.fraction()) as Micros
}
