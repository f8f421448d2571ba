//! What is said to Redis: the script, its arguments and its replies.

use std::time::Duration;

use ::redis::{RedisError, RedisResult, Script, Value, aio::MultiplexedConnection, from_redis_value};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use super::purse_wire::Books;
use crate::{
    quota::{
        Cause, PaceBy, Share,
        adapt::Basis,
        budget::Rule,
        limit::{Micros, micros, micros_since_1970},
        plan::{AccountPlan, Plan, Rules, interval},
        purse::register::{Input, Output},
    },
    runtime::{
        clock::{Clock, Timestamp},
        redis_server,
    },
};

/// The arithmetic, as Redis does it.
const SCRIPT: &str = include_str!("../lease.lua");

/// A reply, and when it was asked for and given.
#[derive(Debug)]
pub struct Reply {
    pub sent: Instant,
    pub received: Instant,
    /// What Redis' clock showed.
    pub shown: Micros,
    pub what: What,
}

/// What a reply says.
#[derive(Debug)]
pub enum What {
    /// There is no state, or not all of it, or one whose clock was so far ahead, in microseconds: configure.
    Unknown { ahead: Micros },
    /// Done.
    Done,
    /// Another worker writes its plan.
    Busy,
    /// The plan's accounts are wanted.
    Loading,
    /// The plan is written into a state of this birth.
    Configured(String),
    /// Slots by account name, each with the name of its address; when the next one comes, if that is known; how
    /// many holds there have been.
    Slots { slots: Vec<(String, Micros, String)>, next_at: Option<Micros>, seq: u64 },
    /// What is spent, of what was asked for, as JSON that only the script understands.
    Memory(String),
    /// The holds that matter, of what was asked for.
    Holds { holds: Vec<Told>, seq: u64 },
}

/// A lease's arguments.
#[derive(Debug, Serialize)]
pub struct Ask {
    pub count: usize,
    /// How far ahead slots may be, in microseconds.
    pub ahead: Micros,
    /// When the state was made that this worker knows.
    pub birth: String,
    /// This worker, as long as its connection lasts.
    pub worker: String,
    /// After how long without a word a worker's calls have surely ended, in microseconds.
    pub gone: Micros,
    /// The accounts whose calls have ended.
    pub ended: Vec<String>,
    /// Times, names of accounts and names of addresses in turn.
    pub returned: Vec<serde_json::Value>,
    /// Accounts of other workers, which this one cannot call with.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub foreign: Vec<String>,
    /// This worker passes slots on, if it is asked to.
    pub takes_part: bool,
    /// Slots that it has passed on: as those returned, each with the worker that they are for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub passed: Vec<serde_json::Value>,
    /// Of a worker where somebody waits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub express: Option<ExpressAsk>,
}

/// A worker waits for slots of others.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ExpressAsk {
    /// For how many calls.
    pub count: usize,
    /// Nearer ones would not arrive in time, in microseconds.
    pub lead: Micros,
    /// The share of the slots that may be for express requests while the backlog waits too.
    pub share: f64,
}

/// What a worker hears alone: see [`channel_of`].
#[derive(Debug)]
pub enum Word {
    /// It is to pass slots on.
    Pass(PassAsk),
    /// Others have passed these on to it: as in [`What::Slots`], but the times as text, since Lua's numbers lose digits.
    Passed { slots: Vec<(String, String, String)> },
}

/// Another worker waits for slots.
#[derive(Clone, Debug, Deserialize)]
pub struct PassAsk {
    /// Which one.
    pub to: String,
    /// For how many.
    pub count: usize,
    /// For none before this time of Redis.
    #[serde(deserialize_with = "from_text")]
    pub from: Micros,
    /// Which share of this worker's slots it may have.
    pub share: f64,
}

fn from_text<'de, D: serde::Deserializer<'de>>(text: D) -> Result<Micros, D::Error> {
    String::deserialize(text)?.parse().map_err(serde::de::Error::custom)
}

/// Where a worker hears what concerns it alone.
fn channel_of(key: &str, worker: &str) -> String {
    format!("{key}:express:{worker}")
}

/// A hold, or the end of one, as Redis tells of it.
#[derive(Clone, Debug)]
pub struct Told {
    /// Whom it concerns: see [`Named`].
    pub name: String,
    /// Until when; `Micros::MAX` = disabled, 0 = released.
    pub until: Micros,
    pub cause: Cause,
}

/// A hold's or a release's arguments.
#[derive(Clone, Debug, Serialize)]
pub struct HoldAsk {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// From now on, in microseconds.
    pub wait: Micros,
    pub disabled: bool,
    pub release: bool,
    pub why: String,
    /// Milliseconds since 1970: when the hold came to be, or as of when it is released.
    pub since: i64,
}

/// So many accounts a call is about at most: Redis does nothing else meanwhile.
pub const PIECE: usize = 40;

/// Which holds are asked for.
#[derive(Clone, Debug, Serialize)]
pub struct HoldsAsk {
    /// Of these accounts.
    pub names: Vec<String>,
    /// And those of the source and its addresses.
    pub whole: bool,
}

/// A plan on its way to Redis: what all accounts share, then the accounts in pieces.
#[derive(Debug)]
pub struct Writing {
    shared: serde_json::Value,
    accounts: Vec<serde_json::Value>,
    /// What is spent, by account.
    memory: serde_json::Map<String, serde_json::Value>,
}

impl Writing {
    /// `by`: who writes.
    pub fn new(
        (plan, names): (&Plan, &[String]),
        lease: Micros,
        Knowledge { is_known, is_read, is_quiet, memory }: Knowledge<'_>,
        by: &str,
    ) -> Self {
        let mut json = plan_json(plan, names, Clock::System.now());
        // Other windows of calendars make no other plan.
        let calendars = json["calendars"].take();
        let id = hex::encode(&Sha256::digest(json.to_string())[..8]);
        json["calendars"] = calendars;
        let accounts =
            if let serde_json::Value::Array(accounts) = json["accounts"].take() { accounts } else { Vec::new() };
        let hops = plan.accounts.iter().any(|account| !account.fallbacks.is_empty());
        let capped = plan.accounts.iter().any(|account| account.in_flight.is_some_and(|most| most > 0));
        let mut shared = serde_json::json!({
            "plan": json, "id": id, "by": by, "count": accounts.len(), "hops": hops, "capped": capped, "lease": lease,
            "known": is_known, "read": is_read, "quiet": is_quiet,
        });
        let mut spent = serde_json::Map::new();
        if let Some(mut memory) = memory.and_then(|memory| serde_json::from_str::<serde_json::Value>(memory).ok()) {
            if let serde_json::Value::Object(accounts) = memory["accounts"].take() {
                spent = accounts;
            }
            shared["memory"] = memory;
        }
        Self { shared, accounts, memory: spent }
    }

    /// How many accounts there are.
    pub const fn len(&self) -> usize {
        self.accounts.len()
    }

    fn piece(&self, first: usize) -> serde_json::Value {
        let accounts: Vec<_> = self.accounts.iter().skip(first).take(PIECE).collect();
        let spent = accounts.iter().filter_map(|account| {
            let name = account["name"].as_str()?;
            Some((name.to_owned(), self.memory.get(name)?.clone()))
        });
        let memory: serde_json::Map<_, _> = spent.collect();
        serde_json::json!({
            "by": self.shared["by"], "id": self.shared["id"], "first": first, "is_last": accounts.is_empty(),
            "memory": memory, "accounts": accounts,
        })
    }
}

/// What a worker tells of itself when it writes the plan.
#[derive(Clone, Copy, Debug)]
pub struct Knowledge<'a> {
    /// A fleet has called before: nothing may be taken for unspent, except what `memory` says.
    pub is_known: bool,
    /// Somebody has looked whether one has.
    pub is_read: bool,
    /// Nobody has called since `memory`.
    pub is_quiet: bool,
    /// What is spent, as JSON for the script.
    pub memory: Option<&'a str>,
}

/// A change of pace's arguments: a share that somebody asks for, or a refusal.
#[derive(Clone, Debug, Serialize)]
pub struct PaceAsk {
    /// The account; without it and an address, the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    #[serde(flatten)]
    pub what: PaceChange,
}

/// What happens to a pace.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum PaceChange {
    /// Somebody asks for a share.
    Asked { by: PaceBy, share: Share },
    /// The vendor refused a call that left so long ago, in microseconds.
    Refused { age: Micros },
}

/// An announcement of a pace.
#[derive(Debug, Deserialize)]
pub struct Paced {
    /// This and the address empty = the source.
    pub account: String,
    pub address: String,
    /// Of the planned rate, without what late calls leave of it.
    pub share: f64,
    pub refused: u64,
    /// The share that late calls leave of that, and until when by Redis' clock; a process of an earlier version says
    /// nothing of it.
    #[serde(default = "whole")]
    pub delays: f64,
    #[serde(default, deserialize_with = "from_text")]
    pub delays_til: Micros,
}

const fn whole() -> f64 {
    1.0
}

/// One connection, which knows the server that it goes to.
#[derive(Clone)]
pub struct Server {
    connection: MultiplexedConnection,
    script: Script,
    key: String,
    run_id: String,
    books: Books,
}

impl Server {
    /// Learns which run of a server this connection goes to.
    pub async fn new(mut connection: MultiplexedConnection, key: String) -> RedisResult<Self> {
        let run_id = redis_server::run_id(&mut connection).await?;
        let books = Books::new(key.clone(), run_id.clone());
        Ok(Self { connection, script: Script::new(SCRIPT), key, run_id, books })
    }

    /// Looks whether the connection still leads to the same run of the same server.
    pub async fn look(&mut self) -> RedisResult<()> {
        if redis_server::run_id(&mut self.connection).await? == self.run_id {
            return Ok(());
        }
        Err((::redis::ErrorKind::Io, "another server answers now").into())
    }

    /// Asks to be told of holds, and of what concerns this worker alone.
    pub async fn subscribe(&mut self, worker: &str) -> RedisResult<()> {
        self.connection.subscribe(format!("{}:hold", self.key)).await?;
        self.connection.subscribe(channel_of(&self.key, worker)).await
    }

    /// Begins to write the plan: [`What::Configured`] if it is there already, [`What::Loading`] if its accounts are wanted.
    pub async fn configure(&mut self, writing: &Writing) -> RedisResult<Reply> {
        self.call("configure", &writing.shared).await
    }

    /// Writes those accounts of the plan that come next; the last call has none.
    pub async fn write_accounts(&mut self, writing: &Writing, first: usize) -> RedisResult<Reply> {
        self.call("accounts", &writing.piece(first)).await
    }

    /// Asks what is spent by these accounts, and if this is the first piece by all, in a state of this birth.
    pub async fn remember(&mut self, birth: &str, names: &[String], is_first: bool) -> RedisResult<Reply> {
        self.call("remember", &serde_json::json!({ "birth": birth, "names": names, "whole": is_first })).await
    }

    /// Leases slots, and gives some back.
    pub async fn lease(&mut self, ask: &Ask) -> RedisResult<Reply> {
        self.call("lease", ask).await
    }

    /// Holds accounts or the source.
    pub async fn hold(&mut self, holds: &[HoldAsk]) -> RedisResult<Reply> {
        self.call("hold", &serde_json::json!({ "holds": holds })).await
    }

    /// Changes paces, as this worker asks for them.
    pub async fn pace(&mut self, worker: &str, paces: &[PaceAsk]) -> RedisResult<Reply> {
        self.call("pace", &serde_json::json!({ "from": worker, "paces": paces })).await
    }

    /// Says something to the ledger of batches' budgets.
    pub async fn purse(&mut self, input: &Input) -> RedisResult<Output> {
        self.books.say(&mut self.connection, input).await
    }

    /// Asks for holds.
    pub async fn holds(&mut self, ask: &HoldsAsk) -> RedisResult<Reply> {
        self.call("holds", ask).await
    }

    async fn call(&mut self, step: &str, input: &impl Serialize) -> RedisResult<Reply> {
        let input = serde_json::to_string(input).unwrap_or_default();
        let mut invocation = self.script.prepare_invoke();
        invocation.key(&self.key).arg(step).arg(&self.run_id).arg(input);
        let sent = Instant::now();
        let value: Vec<Value> = invocation.invoke_async(&mut self.connection).await?;
        let received = Instant::now();
        let (shown, what) = parse(value).map_err(|_| {
            RedisError::from((::redis::ErrorKind::UnexpectedReturnType, "the quota's script gave an unknown reply"))
        })?;
        Ok(Reply { sent, received, shown, what })
    }
}

fn parse(reply: Vec<Value>) -> Result<(Micros, What), ::redis::ParsingError> {
    let mut parts = reply.into_iter();
    let mut part = || parts.next().unwrap_or(Value::Nil);
    let kind: String = from_redis_value(part())?;
    let shown = from_redis_value(part())?;
    let what = match kind.as_str() {
        "unknown" => What::Unknown { ahead: from_redis_value::<Option<Micros>>(part())?.unwrap_or_default() },
        "slots" => {
            let seq = from_redis_value(part())?;
            let next_at: i64 = from_redis_value(part())?;
            let slots = from_redis_value::<Vec<(String, Micros, String)>>(part())?;
            What::Slots { slots, next_at: u64::try_from(next_at).ok(), seq }
        }
        "busy" => What::Busy,
        "loading" => What::Loading,
        "configured" => What::Configured(from_redis_value(part())?),
        "memory" => What::Memory(from_redis_value(part())?),
        "holds" => {
            let seq = from_redis_value(part())?;
            let holds = from_redis_value::<Vec<(String, String, String, String)>>(part())?;
            What::Holds { seq, holds: holds.into_iter().map(told).collect() }
        }
        _ => What::Done,
    };
    Ok((shown, what))
}

/// The time of a hold; what is none, like `+inf`, is for ever.
fn until_of(text: &str) -> Micros {
    text.parse().unwrap_or(Micros::MAX)
}

/// Whom a hold concerns, by the name that an announcement gives: empty for the source, behind a line's end for an
/// address (no account's name has one).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Named<'a> {
    Source,
    Address(&'a str),
    Account(&'a str),
}

impl<'a> Named<'a> {
    pub fn of(name: &'a str) -> Self {
        match name.strip_prefix('\n') {
            Some(address) => Self::Address(address),
            None if name.is_empty() => Self::Source,
            None => Self::Account(name),
        }
    }
}

fn told((name, until, why, since): (String, String, String, String)) -> Told {
    let since = Timestamp::from_millis(since.parse().unwrap_or_default());
    Told { name, until: until_of(&until), cause: Cause::new(&why, since) }
}

/// An announcement of a hold or of a release.
pub fn announced(payload: &[u8]) -> Option<Told> {
    serde_json::from_slice(payload).ok().map(told)
}

/// What this worker alone hears, if it is that.
pub fn word(payload: &[u8]) -> Option<Word> {
    #[derive(Deserialize)]
    struct Passed {
        slots: Vec<(String, String, String)>,
    }
    // Not an untagged enum: those read numbers wrongly while some crate switches serde_json's arbitrary_precision on.
    let pass = || serde_json::from_slice(payload).map(Word::Pass).ok();
    let passed = || serde_json::from_slice(payload).map(|Passed { slots }| Word::Passed { slots }).ok();
    pass().or_else(passed)
}

/// The birth of a state that was made without knowledge of the past, if that is what is announced.
pub fn born(payload: &[u8]) -> Option<String> {
    serde_json::from_slice::<serde_json::Value>(payload).ok()?["birth"].as_str().map(str::to_owned)
}

/// An announcement of a pace, if it is one.
pub fn paced(payload: &[u8]) -> Option<Paced> {
    serde_json::from_slice(payload).ok()
}

/// `now` tells which windows of calendars Redis needs to know.
fn plan_json(plan: &Plan, names: &[String], now: Timestamp) -> serde_json::Value {
    let fastest = plan.fastest();
    let account = |((account, name), fastest): ((&AccountPlan, &String), &Micros)| {
        serde_json::json!({
            "name": name, "address": account.address, "fallbacks": account.fallbacks,
            "cap": account.in_flight.unwrap_or(0), "rules": rules_json(&account.rules, *fastest),
            "basis": basis_name(account.basis),
        })
    };
    let address = |((rules, name), fastest): ((&Rules, &String), &Micros)| {
        let mut address = rules_json(rules, *fastest);
        address["name"] = name.as_str().into();
        address
    };
    let addresses = plan.addresses.iter().zip(&plan.address_names).zip(&fastest.addresses);
    serde_json::json!({
        "accounts": plan.accounts.iter().zip(names).zip(&fastest.accounts).map(account).collect::<Vec<_>>(),
        "addresses": addresses.map(address).collect::<Vec<_>>(),
        "source": rules_json(&plan.source, fastest.source),
        "calendars": calendars_json(plan, now),
        "interval": interval(plan.accounts.iter().map(|account| account.rules.spacing)),
    })
}

/// The windows that follow calendars, each calendar once: from the last weeks to years from now, when the last process that
/// said so has long been started again.
fn calendars_json(plan: &Plan, now: Timestamp) -> serde_json::Value {
    const AROUND: [Duration; 2] = [Duration::from_secs(400 * 86_400), Duration::from_secs(3 * 366 * 86_400)];
    let now = micros_since_1970(now);
    let accounts = plan.accounts.iter().map(|account| &account.rules);
    let rules = accounts.chain(&plan.addresses).chain([&plan.source]);
    let calendars = rules.flat_map(|rules| &rules.budgets).filter_map(|rule| rule.calendar.as_ref());
    let mut known = serde_json::Map::new();
    for calendar in calendars {
        if !known.contains_key(calendar.name()) {
            let steps = calendar.steps(now.saturating_sub(micros(AROUND[0])), now + micros(AROUND[1]));
            known.insert(calendar.name().to_owned(), steps.concat().into());
        }
    }
    known.into()
}

const fn basis_name(basis: Basis) -> &'static str {
    match basis {
        Basis::Known => "known",
        Basis::Guess => "guess",
        Basis::Free => "free",
    }
}

fn rules_json(rules: &Rules, fastest: Micros) -> serde_json::Value {
    let budget = |rule: &Rule| {
        serde_json::json!({
            "calls": rule.calls, "width": rule.width, "shift": rule.shift, "span": rule.span,
            "before": rule.before, "after": rule.after, "learns": rule.learns,
            "calendar": rule.calendar.as_ref().map(|calendar| calendar.name()),
        })
    };
    let budgets: Vec<_> = rules.budgets.iter().map(budget).collect();
    serde_json::json!({ "spacing": rules.spacing, "fastest": fastest, "budgets": budgets })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::{
        Pacing,
        plan::{AccountLimits, Limits},
    };

    #[test]
    fn a_plan_goes_in_pieces_each_account_once_with_what_it_has_spent() {
        const ACCOUNTS: usize = 100;
        let limits =
            Limits { accounts: vec![AccountLimits::default(); ACCOUNTS], unlimited: true, ..Limits::default() };
        let plan = Plan::new(&limits, &Pacing::default());
        let names: Vec<String> = (0..ACCOUNTS).map(|number| format!("a{number}")).collect();
        let writing = |is_known, memory, names| {
            let knowledge = Knowledge { is_known, is_read: true, is_quiet: false, memory };
            Writing::new((&plan, names), 4_000_000, knowledge, "w")
        };
        let memory = r#"{"at":"1","source":[],"addresses":[],"accounts":{"a0":[[1,2]],"a99":[[3,4]]}}"#;
        let with = writing(true, Some(memory), &names);
        let (mut first, mut written, mut spent) = (0, Vec::new(), Vec::new());
        loop {
            let piece = with.piece(first);
            assert_eq!(piece["first"], first);
            let accounts = piece["accounts"].as_array().unwrap();
            assert!(accounts.len() <= PIECE);
            written.extend(accounts.iter().map(|account| account["name"].as_str().unwrap().to_owned()));
            spent.extend(piece["memory"].as_object().unwrap().keys().cloned());
            if piece["is_last"] == true {
                assert!(accounts.is_empty());
                break;
            }
            first = (first + PIECE).min(with.len());
        }
        assert_eq!((written, spent), (names.clone(), vec!["a0".to_owned(), "a99".to_owned()]));
        assert_eq!(
            with.shared["memory"],
            serde_json::json!({"at": "1", "source": [], "addresses": [], "accounts": null})
        );
        // Whoever knows something else writes the same plan; who has other accounts another one.
        assert_eq!(with.shared["id"], writing(false, None, &names).shared["id"]);
        let others: Vec<String> = names.iter().map(|name| format!("b{name}")).collect();
        assert_ne!(with.shared["id"], writing(false, None, &others).shared["id"]);
    }

    #[test]
    fn a_pace_without_a_word_on_late_calls_is_slowed_by_none() {
        let before = paced(br#"{"account":"","address":"","share":0.5,"refused":1}"#).unwrap();
        assert_eq!((before.delays, before.delays_til), (1.0, 0));
        let late =
            paced(br#"{"account":"","address":"","share":1,"refused":0,"delays":0.8,"delays_til":"17"}"#).unwrap();
        assert_eq!((late.delays, late.delays_til), (0.8, 17));
    }

    #[test]
    fn what_a_worker_hears_alone_is_told_from_what_all_hear() {
        let pass = br#"{"share":0.5,"count":1,"to":"w1","from":"1795299772038463"}"#;
        let passed = br#"{"slots":[["sim-0001","1795299772038463","direct"]]}"#;
        assert!(matches!(word(pass), Some(Word::Pass(PassAsk { count: 1, from: 1_795_299_772_038_463, .. }))));
        assert!(matches!(word(passed), Some(Word::Passed { slots }) if slots.len() == 1));
        for other in [
            "[\"a\",\"0\",\"\",\"0\"]",
            "{\"birth\":\"1\"}",
            "{\"account\":\"\",\"address\":\"\",\"share\":1,\"refused\":0}",
        ] {
            assert!(word(other.as_bytes()).is_none(), "{other}");
        }
    }
}
