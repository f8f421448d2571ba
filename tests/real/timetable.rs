//! The arithmetic of slots exists twice, in Rust and in Lua: whatever is asked of both, in whatever order, they answer the
//! same. The Rust one generates, step by step, what the script in a real Redis must reproduce.

#![allow(clippy::print_stdout, reason = "the numbers are part of what the test is for")]

use redis::{Value, aio::MultiplexedConnection, from_redis_value};
use serde_json::json;
use weir::{
    quota::{
        Counting, Limit, Micros, PaceBy, Pacing, Scope, Share,
        adapt::Basis,
        budget::Rule,
        plan::{AccountLimits, AddressLimits, Limits, Plan, Rules, interval},
        timetable::{Granted, Timetable},
    },
    runtime::clock::Dice,
};

use crate::{stack::eventually, workers::Server};

const MILLI: Micros = 1_000;
const SECOND: Micros = 1_000_000;
const START: Micros = 1_700_000_000 * SECOND;
/// How far ahead slots may be leased; a state that is made anew grants nothing nearer.
const LEASE: Micros = 4 * SECOND;
const CASES: u64 = 240;
const STEPS: usize = 80;

/// What a case is about; what only one side does at once is kept out of the others' way.
#[derive(Clone, Copy, Debug, PartialEq)]
enum About {
    Budgets,
    Holds,
    Addresses,
    Caps,
}

struct Slot {
    account: usize,
    at: Micros,
    address: usize,
}

/// One source, in both.
struct Case {
    about: About,
    dice: Dice,
    plan: Plan,
    table: Timetable,
    now: Micros,
    /// Leased, and neither returned nor ended.
    out: Vec<Slot>,
    connection: MultiplexedConnection,
    script: redis::Script,
    key: String,
    /// When holds and releases were said: each later than the one before.
    said: i64,
    leased: usize,
    last_at: Micros,
}

fn below(dice: &Dice, most: u64) -> u64 {
    u64::try_from(dice.bits() % u128::from(most.max(1))).unwrap()
}

fn limits(about: About, dice: &Dice) -> Limits {
    let second = std::time::Duration::from_secs(1);
    let bucket = |calls: u64| {
        let burst = 2 + u32::try_from(below(dice, 7)).unwrap();
        Limit::new(u32::try_from(calls).unwrap(), second, burst).unwrap()
    };
    // Longer than what a state that is made anew takes for spent.
    let budget = || {
        let per = second * (130 + u32::try_from(below(dice, 4_000)).unwrap());
        Limit::window(20 + u32::try_from(below(dice, 300)).unwrap(), per, Counting::Sliding).unwrap()
    };
    let accounts = (0..=below(dice, 8)).map(|index| {
        let mut limits = vec![bucket(2 + index + below(dice, 20))];
        if about == About::Budgets && below(dice, 2) == 0 {
            limits.push(budget());
        }
        let address = if about == About::Addresses { usize::try_from(below(dice, 2)).unwrap() } else { 0 };
        AccountLimits {
            limits,
            address,
            fallbacks: if about == About::Addresses && below(dice, 3) > 0 { vec![1 - address] } else { Vec::new() },
            in_flight: (about == About::Caps && below(dice, 2) == 0)
                .then(|| 1 + u32::try_from(below(dice, 6)).unwrap()),
            is_guess: about == About::Holds && below(dice, 4) == 0,
        }
    });
    let accounts = accounts.collect();
    let mut source = Vec::new();
    if below(dice, 2) == 0 {
        source.push(bucket(10 + below(dice, 60)));
    }
    if about == About::Budgets && below(dice, 2) == 0 {
        source.push(budget());
    }
    let address = if below(dice, 2) == 0 { vec![bucket(8 + below(dice, 40))] } else { Vec::new() };
    let count = if about == About::Addresses { 2 } else { 1 };
    let addresses = (0..count).map(|number| AddressLimits { name: format!("way{number}"), own: None }).collect();
    Limits { accounts, addresses, address, source, ..Limits::default() }
}

fn name(account: usize) -> String {
    format!("a{account}")
}

fn rules_json(rules: &Rules, fastest: Micros) -> serde_json::Value {
    let budget = |rule: &Rule| {
        json!({
            "calls": rule.calls, "width": rule.width, "shift": rule.shift, "span": rule.span,
            "before": rule.before, "after": rule.after, "learns": rule.learns,
        })
    };
    json!({ "spacing": rules.spacing, "fastest": fastest, "budgets": rules.budgets.iter().map(budget).collect::<Vec<_>>() })
}

impl Case {
    async fn new(seed: u64, connection: MultiplexedConnection, script: redis::Script) -> Self {
        let dice = Dice::seeded(seed);
        let about = [About::Budgets, About::Holds, About::Addresses, About::Caps][usize::try_from(seed % 4).unwrap()];
        let plan = Plan::new(&limits(about, &dice), &Pacing::default());
        let table = Timetable::new(&plan, START + LEASE);
        let (key, said, out) = (format!("test:quota:{{{seed}}}"), 1, Vec::new());
        let mut case =
            Self { about, dice, plan, table, now: START, out, connection, script, key, said, leased: 0, last_at: 0 };
        case.configure().await;
        case
    }

    async fn configure(&mut self) {
        let fastest = self.plan.fastest();
        let addresses = self.plan.addresses.iter().zip(&self.plan.address_names).zip(&fastest.addresses);
        let addresses = addresses.map(|((rules, name), fastest)| {
            let mut address = rules_json(rules, *fastest);
            address["name"] = name.as_str().into();
            address
        });
        let plan = json!({
            "addresses": addresses.collect::<Vec<_>>(), "source": rules_json(&self.plan.source, fastest.source),
            "calendars": {}, "interval": interval(self.plan.accounts.iter().map(|account| account.rules.spacing)),
        });
        let hops = self.plan.accounts.iter().any(|account| !account.fallbacks.is_empty());
        let capped = self.plan.accounts.iter().any(|account| account.in_flight.is_some());
        let begin = json!({
            "plan": plan, "id": "plan", "by": "w", "count": self.plan.accounts.len(), "hops": hops, "capped": capped,
            "lease": LEASE, "known": false, "read": true, "quiet": false,
        });
        assert_eq!(kind(&self.say("configure", &begin).await), "loading");
        let account = |(index, account): (usize, &weir::quota::plan::AccountPlan)| {
            let basis = match account.basis {
                Basis::Known => "known",
                Basis::Guess => "guess",
                Basis::Free => "free",
            };
            json!({
                "name": name(index), "address": account.address, "fallbacks": account.fallbacks, "basis": basis,
                "cap": account.in_flight.unwrap_or(0), "rules": rules_json(&account.rules, fastest.accounts[index]),
            })
        };
        let accounts: Vec<_> = self.plan.accounts.iter().enumerate().map(account).collect();
        for (accounts, is_last, expected) in [(accounts, false, "loading"), (Vec::new(), true, "configured")] {
            let piece = json!({
                "by": "w", "id": "plan", "first": 0, "is_last": is_last, "memory": {}, "accounts": accounts,
            });
            assert_eq!(kind(&self.say("accounts", &piece).await), expected);
        }
    }

    async fn say(&mut self, step: &str, input: &serde_json::Value) -> Vec<Value> {
        let (seconds, micros) = (self.now / SECOND, self.now % SECOND);
        let mut invocation = self.script.prepare_invoke();
        invocation.key(&self.key).arg(step).arg("run").arg(input.to_string()).arg(seconds).arg(micros);
        invocation.invoke_async(&mut self.connection).await.unwrap()
    }

    fn below(&self, most: u64) -> u64 {
        below(&self.dice, most)
    }

    fn account(&self) -> usize {
        usize::try_from(self.below(self.plan.accounts.len() as u64)).unwrap()
    }

    fn scope(&self) -> Scope {
        match self.below(4) {
            0 => Scope::Source,
            1 if self.about == About::Addresses => Scope::Address(usize::try_from(self.below(2)).unwrap()),
            _ => Scope::Account(self.account()),
        }
    }

    fn named(&self, scope: Scope, mut what: serde_json::Value) -> serde_json::Value {
        match scope {
            Scope::Source => {}
            Scope::Address(index) => what["address"] = self.plan.address_names[index].as_str().into(),
            Scope::Account(index) => what["name"] = name(index).into(),
        }
        what
    }

    /// Whether there is anything to compare from here on: of two accounts whose time comes in the same microsecond each
    /// side takes another one first.
    async fn step(&mut self) -> bool {
        // Mostly the calls of a busy fleet, now and then a lull.
        self.now += if self.below(30) == 0 { self.below(20 * SECOND) } else { self.below(300 * MILLI) };
        match self.below(10) {
            0 if matches!(self.about, About::Holds | About::Addresses) => self.hold().await,
            1 => self.set_pace().await,
            2 => self.refuse().await,
            _ => return self.lease().await,
        }
        true
    }

    async fn hold(&mut self) {
        let (scope, wait, release) = (self.scope(), self.below(3 * SECOND), self.below(4) == 0);
        self.said += 1;
        let hold = json!({ "wait": wait, "disabled": false, "release": release, "why": "test", "since": self.said });
        let hold = self.named(scope, hold);
        self.say("hold", &json!({ "holds": [hold] })).await;
        let (table, until) = (&mut self.table, self.now + wait);
        match (scope, release) {
            (Scope::Source, false) => table.hold_source(until),
            (Scope::Source, true) => table.release_source(),
            (Scope::Address(index), false) => table.hold_address(index, until, self.now),
            (Scope::Address(index), true) => table.release_address(index, self.now),
            (Scope::Account(index), false) => table.hold_account(index, until),
            (Scope::Account(index), true) => table.release_account(index),
        }
    }

    async fn set_pace(&mut self) {
        let (by, word) =
            if self.below(2) == 0 { (PaceBy::Operator, "operator") } else { (PaceBy::Calendar, "calendar") };
        let share = [1.0, 0.5, 0.25, 0.8][usize::try_from(self.below(4)).unwrap()];
        let scope = self.scope();
        let pace = self.named(scope, json!({ "by": word, "share": share }));
        self.say("pace", &json!({ "from": "w", "paces": [pace] })).await;
        self.table.set_pace(scope, by, Share::new(share).unwrap());
    }

    async fn refuse(&mut self) {
        let (scope, age) = (self.scope(), self.below(400 * MILLI));
        let pace = self.named(scope, json!({ "age": age }));
        self.say("pace", &json!({ "from": "w", "paces": [pace] })).await;
        self.table.refused(scope, self.now - age, self.now);
    }

    /// Some slots come back, some calls end, and others are leased.
    async fn lease(&mut self) -> bool {
        let (mut returned, mut ended, mut kept) = (Vec::new(), Vec::new(), Vec::new());
        for slot in std::mem::take(&mut self.out) {
            match self.below(6) {
                0 => returned.push(slot),
                1 | 2 if slot.at <= self.now => ended.push(slot),
                _ => kept.push(slot),
            }
        }
        self.out = kept;
        let back = returned.iter().flat_map(|slot| {
            [slot.at.into(), name(slot.account).into(), self.plan.address_names[slot.address].as_str().into()]
        });
        let back: Vec<serde_json::Value> = back.collect();
        let (count, ahead) = (1 + self.below(24), 100 * MILLI + self.below(LEASE - 100 * MILLI));
        let ask = json!({
            "count": count, "ahead": ahead, "birth": "", "worker": "w", "gone": 1_000_000 * SECOND,
            "ended": ended.iter().map(|slot| name(slot.account)).collect::<Vec<_>>(), "returned": back, "takes_part": false,
        });
        let reply = self.say("lease", &ask).await;
        assert_eq!(kind(&reply), "slots");

        for slot in returned {
            if slot.address == self.table.address_of(slot.account) {
                self.table.give_back([(slot.account, slot.at)]);
            } else {
                self.table.give_up(slot.account, slot.at, slot.address);
            }
        }
        for slot in &ended {
            self.table.ended(slot.account);
        }
        let (granted, next_at) = match self.table.lease(usize::try_from(count).unwrap(), self.now, self.now + ahead) {
            Granted::Slots(slots) => (slots, None),
            Granted::NotBefore(at) => (Vec::new(), Some(at)),
            Granted::Nobody => panic!("nobody is disabled"),
        };
        let leased: Vec<(String, Micros, String)> = from_redis_value(reply[4].clone()).unwrap();
        let first_other = granted.iter().zip(&leased).find(|(slot, leased)| name(slot.0) != leased.0);
        if first_other.is_some_and(|(slot, leased)| slot.1 == leased.1) {
            return false;
        }
        let times = granted.iter().map(|slot| slot.1);
        if std::iter::once(self.last_at).chain(times.clone()).zip(times).any(|(one, next)| next == one) {
            return false;
        }
        self.last_at = granted.last().map_or(self.last_at, |slot| slot.1);
        let of = |(account, at): (usize, Micros)| {
            (name(account), at, self.plan.address_names[self.table.address_of(account)].clone())
        };
        let granted_by_name: Vec<_> = granted.iter().copied().map(of).collect();
        assert_eq!(leased, granted_by_name, "at {} µs, {ask}", self.now - START);
        if let Some(next_at) = next_at {
            let told: i64 = from_redis_value(reply[3].clone()).unwrap();
            assert_eq!(u64::try_from(told).unwrap_or(Micros::MAX), next_at, "at {} µs, {ask}", self.now - START);
        }
        self.leased += granted.len();
        let slot = |(account, at)| Slot { account, at, address: self.table.address_of(account) };
        self.out.extend(granted.into_iter().map(slot));
        true
    }
}

fn kind(reply: &[Value]) -> String {
    from_redis_value(reply[0].clone()).unwrap()
}

#[tokio::test]
async fn the_script_and_the_timetable_grant_the_same_slots() {
    let server = Server::start();
    let client = redis::Client::open(server.url()).unwrap();
    let connection = eventually("Redis answers", async || client.get_multiplexed_async_connection().await.ok()).await;
    // The same script, by the test's clock.
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/quota/lease.lua");
    let text = std::fs::read_to_string(path).unwrap();
    let by_clock = text.replace("redis.call('TIME')", "{ ARGV[4], ARGV[5] }");
    assert_ne!(text, by_clock);
    let (mut leased, mut ties) = ([0; 4], 0);
    for seed in 0..CASES {
        let mut case = Case::new(seed, connection.clone(), redis::Script::new(&by_clock)).await;
        println!("seed {seed}: {:?}, {} accounts", case.about, case.plan.accounts.len());
        for _ in 0..STEPS {
            if !case.step().await {
                ties += 1;
                break;
            }
        }
        leased[usize::try_from(seed % 4).unwrap()] += case.leased;
    }
    println!("slots by what the cases are about: {leased:?}; {ties} of {CASES} cases ended early");
    assert!(leased.iter().all(|slots| *slots > 10_000) && ties * 4 < CASES, "{leased:?}, {ties} ties");
}
