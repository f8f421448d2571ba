//! A worker's side of passing slots on: who holds an express request gets the next slots of others. No I/O.
//!
//! Slots are leased seconds ahead, so that the fleet's next one is mostly another worker's. Who waits asks by Redis, which
//! knows about whose turn it is soon; that one takes slots out of its own hands, as many as the express share allows, and
//! then leaves them to whoever waits. So a slot is one worker's or nobody's, never two workers': what is lost on the way,
//! or comes too late, is not used.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

use super::{
    super::wire::{ExpressAsk, PassAsk},
    Local, RETURN_SOON, Slots, held,
};
use crate::{
    message::Lane,
    quota::{
        Passed, Slot,
        limit::{Micros, micros},
        turn::Arbiter,
    },
};

/// Nearer slots are not passed on: they could not arrive in time.
const NEAREST: Duration = Duration::from_millis(3);
/// What is wanted has to be said again within so long, or nobody waits any more.
const FRESH: Duration = Duration::from_millis(100);
/// The first guess how long it takes until slots come that were asked for, and the most that is counted on.
const TURN: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(100)];
/// Whoever waits for slots that may come looks so often.
const LOOK: Duration = Duration::from_millis(2);
/// What comes on top of it, since whoever waits has to look, and then to wake up.
const MARGIN: Duration = Duration::from_millis(3);
/// Who has asked and got nothing asks again so much later, at first, and later on for each that waits, but as for so many
/// at most: a crowd waits for its share anyway.
const PATIENCE: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(40)];
const CROWD: u32 = 32;
/// For so long slots are known that were passed on: longer than anybody can look at them late.
const REMEMBERED: Duration = Duration::from_secs(5);

/// A slot on its way to another worker.
#[derive(Debug)]
pub(super) struct Leaving {
    pub(super) slot: (usize, Micros, usize),
    pub(super) to: String,
}

/// What is asked for, what has come and what has gone.
#[derive(Debug)]
pub(super) struct Express {
    /// This worker's user looks before each call whether its slot was passed on.
    takes_part: bool,
    /// For how many calls slots are wanted that leave soon, and when that was said.
    wanted: usize,
    said_at: Option<Instant>,
    share: f64,
    /// When it was asked for, if nothing has come since.
    asked_at: Option<Instant>,
    ask_at: Option<Instant>,
    /// How long it took lately from asking to having.
    turn: Duration,
    patience: Duration,
    /// When slots leave that have come.
    pub(super) coming: VecDeque<Instant>,
    /// How many have come that this worker's user was not told of.
    news: usize,
    pub(super) leaving: Vec<Leaving>,
    passed: VecDeque<Slot>,
    turns: Arbiter,
    /// Up to here it is decided who uses which slot.
    decided_until: Option<Instant>,
}

impl Default for Express {
    fn default() -> Self {
        Self {
            takes_part: false,
            wanted: 0,
            said_at: None,
            share: Lane::express_share(),
            asked_at: None,
            ask_at: None,
            turn: TURN[0],
            patience: PATIENCE[0],
            coming: VecDeque::new(),
            news: 0,
            leaving: Vec::new(),
            passed: VecDeque::new(),
            turns: Arbiter::new(Lane::express_share()),
            decided_until: None,
        }
    }
}

impl Express {
    pub(super) const fn takes_part(&self) -> bool {
        self.takes_part
    }

    /// For how many calls slots are still to be asked for.
    fn missing(&self, now: Instant) -> usize {
        let is_fresh = self.said_at.is_some_and(|at| now.saturating_duration_since(at) < FRESH);
        let missing = self.wanted.saturating_sub(self.coming.iter().filter(|at| **at > now).count());
        // Those of a crowd are asked for by halves.
        if is_fresh && missing * 2 >= self.wanted { missing } else { 0 }
    }

    /// When to ask, if anything is to be asked for.
    pub(super) fn due_at(&self, now: Instant) -> Option<Instant> {
        (self.missing(now) > 0).then(|| self.ask_at.unwrap_or(now))
    }

    /// What to ask for now.
    pub(super) fn ask(&mut self, now: Instant) -> Option<ExpressAsk> {
        if self.due_at(now).is_none_or(|at| at > now) {
            return None;
        }
        if self.asked_at.is_some() {
            // Nothing has come: perhaps there was not time enough, perhaps others have given what they may.
            self.turn = (self.turn * 3 / 2).min(TURN[1]);
            let waiting = u32::try_from(self.wanted).unwrap_or(CROWD).clamp(1, CROWD);
            self.patience = (self.patience * 2).min(PATIENCE[1] * waiting);
        }
        self.asked_at = Some(now);
        self.ask_at = Some(now + self.patience.max(2 * self.turn));
        let lead = micros(self.turn + MARGIN);
        Some(ExpressAsk { count: self.missing(now), lead, share: self.share })
    }

    /// When whoever waits looks again: soon while something may come, and when it is asked for again.
    fn look_at(&self, now: Instant) -> Option<Instant> {
        let due_at = self.due_at(now)?;
        let may_come = self.asked_at.is_none_or(|at| now < at + 4 * self.turn.max(TURN[0] * 2));
        let soon = now + LOOK;
        Some(if may_come { soon } else { due_at.max(soon) }.min(now + FRESH / 2))
    }

    /// Slots have come; of those that can be used, when they leave.
    fn came(&mut self, usable: &[Instant], now: Instant) {
        if let Some(asked_at) = self.asked_at.take() {
            // The longest of late counts: who is late once has waited for nothing.
            self.turn = (now - asked_at).max(self.turn.mul_f64(0.8)).clamp(TURN[0], TURN[1]);
            self.patience = PATIENCE[0];
        }
        self.ask_at = None;
        self.news += usable.len();
        self.coming.extend(usable);
        self.coming.retain(|at| *at > now);
    }

    fn is_passed_on(&self, slot: &Slot) -> bool {
        self.passed.contains(slot)
    }
}

impl Local {
    /// For so many calls, which somebody waits for, slots are wanted that leave soon; what has come of it. Whoever says
    /// this, if only of no call, looks before each call whether its slot was passed on.
    pub fn hurry(&mut self, calls: usize, share: f64, now: Instant) -> Passed {
        let express = &mut self.express;
        (express.takes_part, express.wanted, express.said_at, express.share) = (true, calls, Some(now), share);
        if calls == 0 {
            // Whoever comes next knows nothing of how the others stand.
            (express.asked_at, express.ask_at, express.patience) = (None, None, PATIENCE[0]);
        }
        Passed { come: std::mem::take(&mut express.news), look_at: express.look_at(now) }
    }

    /// Whether a slot that was handed out is another worker's now. It does not change any more once its time has come.
    pub fn is_passed_on(&self, slot: &Slot) -> bool {
        self.express.is_passed_on(slot)
    }

    /// Nothing waits here: what is leased ahead goes back.
    pub fn rest(&mut self, now: Instant) {
        self.demand = 0;
        self.express.coming.clear();
        self.returned.extend(self.slots.drain(..).map(|(slot, at)| (slot.account, at, slot.address)));
        if !self.returned.is_empty() {
            let soon = now + RETURN_SOON;
            self.return_at = Some(self.return_at.map_or(soon, |at| at.min(soon)));
        }
    }

    /// Another worker waits: takes slots out of this one's hands, from the next on, but not more of them than the express
    /// share, nor those that this worker wants for express requests of its own.
    pub fn pass(&mut self, asked: &PassAsk, now: Instant) {
        if !self.express.takes_part {
            return;
        }
        let mut own = self.express.missing(now);
        let (express, mut left) = (&mut self.express, asked.count);
        express.turns.set_share(asked.share);
        let undecided = |slot: &Slot| express.decided_until.is_none_or(|until| slot.at > until);
        let mut slots: Vec<_> =
            self.out.iter().chain(&self.slots).filter(|(slot, _)| undecided(slot)).cloned().collect();
        slots.sort_by_key(|(slot, _)| slot.at);
        let mut passed = Vec::new();
        for (slot, at) in slots {
            if left == 0 {
                break;
            }
            express.decided_until = Some(slot.at);
            let is_gone = held(&self.accounts, &self.addresses, self.held_until, &slot);
            if at < asked.from || slot.at < now + NEAREST || is_gone || own > 0 {
                own -= usize::from(own > 0 && slot.at > now);
                express.turns.served(Lane::Bulk, false);
            } else if express.turns.next(|_| true) == Some(Lane::Express) {
                express.turns.served(Lane::Express, true);
                left -= 1;
                passed.push(slot.clone());
                express.leaving.push(Leaving { slot: (slot.account, at, slot.address), to: asked.to.clone() });
            } else {
                express.turns.served(Lane::Bulk, true);
            }
        }
        for held in [&mut self.out, &mut self.slots] {
            // What was handed out in the last minute is not among them.
            held.retain(|(slot, _)| slot.at < now || !passed.contains(slot));
        }
        express.passed.extend(passed);
        express.passed.retain(|slot| slot.at + REMEMBERED > now);
    }

    /// Others have passed slots on to this worker.
    pub fn receive_passed(&mut self, slots: Slots, now: Instant) {
        let usable: Vec<_> = slots.into_iter().filter_map(|slot| self.keep(slot, now)).collect();
        self.express.came(&usable, now);
        if self.demand == 0 && self.express.wanted == 0 {
            self.rest(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::{
        Lease,
        redis::{
            local::{Known, Step, paces::Heard},
            offset::Offset,
        },
    };

    const SHOWN: Micros = 1_700_000_000_000_000;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// A worker with a slot every 10 ms from now on, and what the day's clock shows now.
    fn worker(slots: u64, now: Instant) -> Local {
        let known = Known {
            name: "a".to_owned(),
            lateness: ms(5),
            home: 0,
            fallbacks: Vec::new(),
            held_until: None,
            disabled: false,
            is_capped: false,
            pace: Heard::default(),
        };
        let mut local = Local::new(vec![known], vec!["0".to_owned()], (24, 24, ms(120)), 4_000_000, None);
        local.offset = Some(Offset::new(now, now, SHOWN));
        let slot = |number: u64| ("a".to_owned(), SHOWN + number * 10_000, "0".to_owned());
        local.receive((0..slots).map(slot).collect(), None, 0, now);
        local
    }

    fn asked(count: usize, share: f64) -> PassAsk {
        PassAsk { to: "other".to_owned(), count, from: SHOWN + 5_000, share }
    }

    /// The numbers of the slots that leave for others.
    fn leaving(local: &mut Local) -> Vec<Micros> {
        local.express.leaving.drain(..).map(|one| (one.slot.1 - SHOWN) / 10_000).collect()
    }

    #[test]
    fn a_slot_in_which_no_call_left_goes_back_alone_and_soon() {
        let now = Instant::now();
        let mut local = worker(12, now);
        let Lease::Slots(slots) = local.lease(1, now) else { panic!("the first has come") };
        local.drop_unused(&slots[0], now);
        local.drop_unused(&slots[0], now);
        let Step::Lease(ask) = local.step(now + ms(500)) else { panic!("nothing is said of it") };
        assert_eq!((ask.returned.len(), local.slots.len()), (3, 11), "once, and what is leased ahead stays");
    }

    #[test]
    fn the_next_slots_are_passed_on_but_no_more_of_them_than_the_share_however_often_somebody_asks() {
        let now = Instant::now();
        let passed = |share: f64, counts: &[usize]| {
            let mut local = worker(12, now);
            local.hurry(0, share, now);
            for count in counts {
                local.pass(&asked(*count, share), now);
            }
            leaving(&mut local)
        };
        assert_eq!(passed(0.5, &[1]), [1], "not the one whose time has come");
        assert_eq!(passed(0.5, &[3]), [1, 3, 5]);
        assert_eq!(passed(0.5, &[1, 1, 1, 20, 20]), [1, 3, 5, 7, 9, 11]);
        assert_eq!(passed(0.25, &[1, 2, 20]), [1, 5, 9]);
        assert_eq!(passed(1.0, &[2, 1]), [1, 2, 3]);
    }

    #[test]
    fn what_was_handed_out_is_passed_on_too_and_nobody_uses_it_here_any_more() {
        let now = Instant::now();
        let mut local = worker(6, now);
        local.hurry(0, 0.5, now);
        let Lease::Slots(slots) = local.lease(4, now) else { panic!("there are slots") };
        local.pass(&asked(1, 0.5), now);
        assert_eq!(leaving(&mut local), [1]);
        let gone: Vec<bool> = slots.iter().map(|slot| local.is_passed_on(slot) && local.is_held(slot)).collect();
        assert_eq!(gone, [false, true, false, false]);
        local.give_back(&slots[1..2], now);
        assert!(local.returned.is_empty() && local.slots.len() == 2, "it is not given back, and the others stay");
        // Whoever comes late finds the rest due.
        let late = now + ms(29);
        local.pass(&asked(4, 1.0), late);
        assert_eq!(leaving(&mut local), [4, 5], "the third leaves in a millisecond: {late:?}");
    }

    #[test]
    fn who_has_never_said_that_it_looks_passes_nothing_on_and_who_waits_itself_keeps_what_it_needs() {
        let now = Instant::now();
        let mut local = worker(6, now);
        local.pass(&asked(2, 0.5), now);
        assert!(leaving(&mut local).is_empty());
        local.hurry(2, 0.5, now);
        local.pass(&asked(2, 1.0), now);
        assert_eq!(leaving(&mut local), [3, 4], "two of its own first");
    }

    #[test]
    fn who_waits_asks_once_until_slots_have_come_and_then_less_and_less_often() {
        let now = Instant::now();
        let mut local = worker(0, now);
        assert_eq!(local.hurry(1, 0.5, now), Passed { come: 0, look_at: Some(now + LOOK) });
        let mut asks = |at: Instant, says: bool| {
            if says {
                local.hurry(1, 0.5, at);
            }
            match local.step(at) {
                Step::Lease(ask) => ask.express,
                Step::Hold(_) | Step::Pace(_) | Step::Holds(_) | Step::Wait(_) => None,
            }
        };
        let first = asks(now, false).unwrap();
        assert_eq!((first.count, first.lead), (1, 8_000));
        assert_eq!(asks(now + ms(10), true), None);
        let second = asks(now + ms(20), true).unwrap();
        assert_eq!(second.lead, 10_500, "nothing came in time");
        assert_eq!(asks(now + ms(50), true), None);
        assert_eq!(asks(now + ms(190), false), None, "nobody has said for long that he waits");
        assert!(asks(now + ms(200), true).is_some());
        local.receive_passed(vec![("a".to_owned(), SHOWN + 300_000, "0".to_owned())], now + ms(212));
        assert_eq!(local.hurry(1, 0.5, now + ms(213)), Passed { come: 1, look_at: None }, "its user is told");
        assert!(matches!(local.step(now + ms(213)), Step::Wait(_)), "and waits for it");
        let Lease::Slots(slots) = local.lease(1, now + ms(213)) else { panic!("one has come") };
        assert!(slots[0].at >= now + ms(300) && slots[0].at < now + ms(301));
    }
}
