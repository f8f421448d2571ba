//! A fleet and a vendor that answers it, in virtual time: what refusals and hints do to the pace. Tests only.

#![allow(clippy::cast_precision_loss, reason = "counts far below 2^52")]

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    time::Duration,
};

use super::{
    Limit, PaceBy, Pacing, Scope, Share,
    limit::Micros,
    plan::{AccountLimits, Limits, Plan},
    timetable::{Granted, Timetable},
};
use crate::{
    runtime::clock::Dice,
    simulate::limiter::{Limiter, Quota},
};

const MILLI: Micros = 1_000;
const SECOND: Micros = 1_000_000;
const MINUTE: Micros = 60 * SECOND;
const HOUR: Micros = 60 * MINUTE;
const START: Micros = 1_700_000_000 * SECOND;
const HORIZON: Micros = 100 * MILLI;
const JITTER: Micros = 10 * MILLI;
/// From the vendor's judgement to the worker that knows of it.
const REPLY: Micros = 200 * MILLI;

/// What happens next; the numbers are a worker's, or an account's and the time its call left.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Wake(usize),
    Arrive(usize, Micros),
    Served,
    Refused(usize, Micros),
}

struct World {
    table: Timetable,
    lateness: Vec<Micros>,
    vendors: Vec<Limiter>,
    /// Nothing is served before, by account: the vendor's punishment.
    banned_until: Vec<Micros>,
    /// How long that is, and whether the vendor says so.
    ban: Option<Micros>,
    /// From then on, this is what it allows.
    turns_at: Micros,
    turns_to: Option<Quota>,
    workers: Vec<VecDeque<(usize, Micros)>>,
    events: BinaryHeap<Reverse<(Micros, u64, Event)>>,
    number: u64,
    dice: Dice,
    seen: Seen,
}

/// What happened, by time.
#[derive(Default)]
struct Seen {
    sent: Vec<(Micros, usize)>,
    served: Vec<Micros>,
    refused: Vec<Micros>,
    /// Account, when a worker learned of a ban, and its end.
    bans: Vec<(usize, Micros, Micros)>,
}

fn limit(calls: u32, burst: u32) -> Limit {
    Limit::new(calls, Duration::from_secs(1), burst).unwrap()
}

fn within(times: &[Micros], from: Micros, until: Micros) -> usize {
    times.iter().filter(|at| (START + from..START + until).contains(*at)).count()
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small")]
fn fraction(dice: &Dice, of: Micros) -> Micros {
    (of as f64 * dice.fraction()) as Micros
}

impl World {
    /// `told` is what the fleet believes of each account, `vendor` the truth.
    fn new(told: &AccountLimits, vendor: Quota, accounts: usize, workers: usize) -> Self {
        let limits = Limits { accounts: vec![told.clone(); accounts], ..Limits::default() };
        let plan = Plan::new(&limits, &Pacing::default());
        let lateness = |account: &super::plan::AccountPlan| Micros::try_from(account.lateness.as_micros()).unwrap();
        let mut world = Self {
            table: Timetable::new(&plan, START),
            lateness: plan.accounts.iter().map(lateness).collect(),
            vendors: vec![Limiter::new(vendor, Duration::ZERO); accounts],
            banned_until: vec![0; accounts],
            ban: None,
            turns_at: Micros::MAX,
            turns_to: None,
            workers: vec![VecDeque::new(); workers],
            events: BinaryHeap::new(),
            number: 0,
            dice: Dice::seeded(11),
            seen: Seen::default(),
        };
        for worker in 0..workers {
            world.at(START + worker as u64 * 7 * MILLI, Event::Wake(worker));
        }
        world
    }

    fn at(&mut self, at: Micros, event: Event) {
        self.number += 1;
        self.events.push(Reverse((at, self.number, event)));
    }

    fn run(mut self, span: Micros) -> (Seen, Timetable) {
        while let Some(Reverse((now, _, event))) = self.events.pop() {
            if now > START + span {
                break;
            }
            match event {
                Event::Wake(worker) => self.wake(worker, now),
                Event::Arrive(account, left_at) => self.judge(account, left_at, now),
                Event::Served => self.seen.served.push(now),
                Event::Refused(account, left_at) => self.react(account, left_at, now),
            }
        }
        (self.seen, self.table)
    }

    /// A worker sends what is due and asks for more.
    fn wake(&mut self, worker: usize, now: Micros) {
        while let Some(&(account, at)) = self.workers[worker].front().filter(|slot| slot.1 <= now) {
            self.workers[worker].pop_front();
            if now > at + self.lateness[account] || self.table.is_held(account, at) {
                self.table.give_back([(account, at)]);
                continue;
            }
            self.seen.sent.push((now, account));
            let way = fraction(&self.dice, JITTER);
            self.at(now + way, Event::Arrive(account, now));
        }
        let mut asks_at = now + 50 * MILLI;
        if self.workers[worker].len() < 5 {
            match self.table.lease(10, now, now + HORIZON) {
                Granted::Slots(slots) => self.workers[worker].extend(slots),
                Granted::NotBefore(at) => asks_at = at.saturating_sub(HORIZON).max(now + 5 * MILLI),
                Granted::Nobody => panic!("nobody is disabled"),
            }
        }
        let next = self.workers[worker].front().map_or(asks_at, |slot| slot.1).max(now + 100);
        self.at(next, Event::Wake(worker));
    }

    fn judge(&mut self, account: usize, left_at: Micros, now: Micros) {
        if now >= self.turns_at
            && let Some(quota) = self.turns_to.take()
        {
            self.vendors.fill(Limiter::new(quota, Duration::ZERO));
        }
        let is_served =
            now >= self.banned_until[account] && self.vendors[account].admit(Duration::from_micros(now - START));
        if is_served {
            self.at(now + REPLY, Event::Served);
        } else {
            self.banned_until[account] = self.banned_until[account].max(now + self.ban.unwrap_or_default());
            self.at(now + REPLY, Event::Refused(account, left_at));
        }
    }

    fn react(&mut self, account: usize, left_at: Micros, now: Micros) {
        self.seen.refused.push(now);
        self.table.refused(Scope::Account(account), left_at, now);
        // Without a hint, the first rest for a vendor that names no time.
        let until = self.ban.map_or(now + 10 * SECOND, |ban| now - REPLY + ban);
        self.table.hold_account(account, until);
        self.seen.bans.push((account, now, until));
    }
}

fn known(limits: &[Limit]) -> AccountLimits {
    AccountLimits { limits: limits.to_vec(), ..AccountLimits::default() }
}

#[test]
fn a_vendor_that_secretly_halves_its_limit_refuses_a_few_calls_and_then_hardly_any() {
    for ban in [Some(SECOND), None] {
        let mut world = World::new(&known(&[limit(20, 5)]), Quota::Bucket { rate: 20.0, burst: 5 }, 1, 4);
        (world.ban, world.turns_at) = (ban, START + 10 * MINUTE);
        world.turns_to = Some(Quota::Bucket { rate: 10.0, burst: 5 });
        let (seen, _) = world.run(5 * HOUR);
        let by_hour: Vec<_> = (0..5).map(|hour| within(&seen.refused, hour * HOUR, (hour + 1) * HOUR)).collect();
        let rate = |hour: u64| within(&seen.served, hour * HOUR, (hour + 1) * HOUR) as f64 / 3_600.0;
        println!("ban {ban:?}: refused by hour {by_hour:?}; served {:.2}/s, then {:.2}/s", rate(1), rate(4));
        assert_eq!(within(&seen.refused, 0, 10 * MINUTE), 0);
        assert!((15..=120).contains(&by_hour[0]), "15 steps of a round trip each: {by_hour:?}");
        assert!(by_hour[1..].iter().all(|refused| *refused <= 12), "{by_hour:?}");
        assert!(by_hour[1..].iter().sum::<usize>() > 0, "it tries for more: {by_hour:?}");
        assert!((1..5).all(|hour| (9.4..10.0).contains(&rate(hour))), "{:?}", (1..5).map(rate).collect::<Vec<_>>());
    }
}

#[test]
fn without_giving_way_the_halved_limit_is_refused_for_ever_so_these_tests_can_fail() {
    let mut world = World::new(&known(&[limit(20, 5)]), Quota::Bucket { rate: 10.0, burst: 5 }, 1, 4);
    world.ban = Some(SECOND);
    // As if nobody told the arithmetic: the same fleet, which only obeys the hint.
    let mut refused = 0;
    while let Some(Reverse((now, _, event))) = world.events.pop() {
        if now > START + HOUR {
            break;
        }
        match event {
            Event::Wake(worker) => world.wake(worker, now),
            Event::Arrive(account, left_at) => world.judge(account, left_at, now),
            Event::Served => {}
            Event::Refused(account, _) => {
                refused += 1;
                world.table.hold_account(account, now - REPLY + SECOND);
            }
        }
    }
    assert!(refused > 2_000, "{refused}");
}

#[test]
fn a_vendor_that_names_a_time_gets_no_call_before_it_from_any_worker() {
    // It allows less than it says, and bans for 30 s whoever exceeds it.
    let mut world = World::new(&known(&[limit(20, 5)]), Quota::Bucket { rate: 15.0, burst: 5 }, 5, 4);
    world.ban = Some(30 * SECOND);
    let (seen, _) = world.run(HOUR);
    assert!(seen.bans.len() > 20, "{}", seen.bans.len());
    for &(account, from, until) in &seen.bans {
        let early = seen.sent.iter().filter(|(at, of)| *of == account && *at >= from && *at < until).count();
        assert_eq!(early, 0, "account {account} was called {early} times in its ban");
    }
    let others = seen.bans.iter().filter(|(account, from, until)| {
        seen.sent.iter().any(|(at, of)| of != account && (*from..*until).contains(at))
    });
    assert!(others.count() > 20, "the other accounts go on");
}

#[test]
fn an_unknown_limit_is_found_within_minutes() {
    let guess = AccountLimits { is_guess: true, ..known(&[limit(1, 1)]) };
    let mut world = World::new(&guess, Quota::Sliding { calls: 16, window: Duration::from_secs(1) }, 1, 4);
    world.ban = Some(SECOND);
    let (seen, _) = world.run(3 * HOUR);
    let rate = |from, until| within(&seen.served, from, until) as f64 / ((until - from) / SECOND) as f64;
    let first = seen.refused[0] - START;
    println!(
        "first refusal after {} s, {} in the first hour, {} in the third; {:.1}/s of 16 after 10 min, {:.1}/s in the third hour",
        first / SECOND,
        within(&seen.refused, 0, HOUR),
        within(&seen.refused, 2 * HOUR, 3 * HOUR),
        rate(10 * MINUTE, 20 * MINUTE),
        rate(2 * HOUR, 3 * HOUR),
    );
    assert!((3 * MINUTE..6 * MINUTE).contains(&first), "1/s to 16/s are four doublings: {first}");
    assert!(rate(10 * MINUTE, 20 * MINUTE) >= 14.0 && rate(2 * HOUR, 3 * HOUR) >= 15.0);
    assert!(within(&seen.refused, 2 * HOUR, 3 * HOUR) <= 30);
}

#[test]
fn shares_of_operator_calendar_and_refusals_multiply() {
    let rate = |shared: u32, prepare: fn(&mut Timetable)| {
        let (accounts, source) = (vec![known(&[limit(20, 5)]); 2], vec![limit(shared, 5)]);
        let limits = Limits { accounts, source, ..Limits::default() };
        let mut table = Timetable::new(&Plan::new(&limits, &Pacing::default()), START);
        prepare(&mut table);
        let mut taken = [0.0_f64; 2];
        let mut now = START + 5 * SECOND;
        while now < START + 65 * SECOND {
            if let Granted::Slots(slots) = table.lease(64, now, now + HORIZON) {
                for (account, _) in slots {
                    taken[account] += 1.0 / 60.0;
                }
            }
            now += 50 * MILLI;
        }
        (taken[0], taken[0] + taken[1])
    };
    let half = |table: &mut Timetable| table.set_pace(Scope::Source, PaceBy::Calendar, Share::new(0.5).unwrap());
    let near = |found: f64, expected: f64| (found - expected).abs() < 0.02 * expected;
    assert!(near(rate(30, |_| ()).1, 30.0));
    assert!(near(rate(30, half).1, 15.0), "the shared limit counts as half too: {:?}", rate(30, half));
    let both = |table: &mut Timetable| {
        table.set_pace(Scope::Source, PaceBy::Calendar, Share::new(0.5).unwrap());
        table.set_pace(Scope::Account(0), PaceBy::Operator, Share::new(0.2).unwrap());
        (0..3).for_each(|round| {
            assert!(table.refused(Scope::Account(0), START + round * SECOND, START + round * SECOND));
        });
    };
    let (first, all) = rate(500, both);
    assert!(near(first, 20.0 * 0.5 * 0.2 / 1.05_f64.powi(3)), "{first}");
    assert!(near(all - first, 10.0), "the other account: {}", all - first);
    let back = |table: &mut Timetable| {
        table.set_pace(Scope::Source, PaceBy::Calendar, Share::new(0.5).unwrap());
        table.set_pace(Scope::Source, PaceBy::Calendar, Share::WHOLE);
    };
    assert!(near(rate(30, back).1, 30.0));
}
