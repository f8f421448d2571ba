//! The view of `weir quota`, merged from the workers' reports and the operator's settings. Pure.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
    time::Duration,
};

use serde::Serialize;

mod batches;

use self::batches::Batch;
use super::{Configured, change::Wish};
use crate::{
    cli::terminal::{agree, counted, grouped, spoken, table},
    message::{
        AccountAlias, CutOffReport, DelayReport, HoldReport, QuotaReport, QuotaSetting, SourceName, UsedUpReport,
    },
    quota::{
        journal::{HEARTBEAT, known::Known},
        past::Settings,
        tally::midnight,
    },
    runtime::clock::Timestamp,
};

/// A worker that has not reported for so long does not run, or cannot reach Kafka.
const SILENT_AFTER: Duration = Duration::from_secs(3 * HEARTBEAT.as_secs());

/// One source.
#[derive(Debug, Serialize)]
pub struct View {
    pub source: SourceName,
    pub workers: Vec<Worker>,
    /// The source as a whole.
    #[serde(flatten)]
    pub whole: Standing,
    /// The addresses that calls leave from, if there are several or one is held.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<Address>,
    pub accounts: Vec<Account>,
    /// Calls of today whose answers were lost before they were committed: they were made again.
    pub calls_again_today: u64,
    /// How often today a worker stopped without a last report: its uncommitted calls were repeated and are not counted.
    pub silent_ends_today: u64,
    /// Those that were called for last, if batches have a budget.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub batches: Vec<Batch>,
}

/// One address that calls leave from.
#[derive(Debug, Serialize)]
pub struct Address {
    #[serde(rename = "address")]
    pub name: String,
    #[serde(flatten)]
    pub standing: Standing,
    /// How many accounts call from it now.
    pub accounts: usize,
}

/// One worker.
#[derive(Debug, Serialize)]
pub struct Worker {
    pub instance: String,
    pub reported_at: Timestamp,
    pub runs: bool,
    /// It is cut off from Redis.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cut_off: Option<CutOffReport>,
    /// Its calls are delayed, so that the pace is widened.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delays: Option<DelayReport>,
}

/// Whether calls are made, and if not why.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Standing {
    pub state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// The share of the pace that is set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pace: Option<f64>,
}

/// One account.
#[derive(Debug, Serialize)]
pub struct Account {
    #[serde(rename = "account")]
    pub alias: AccountAlias,
    pub allowed: String,
    pub calls_today: u64,
    pub calls_last_minute: u64,
    pub refused_today: u64,
    pub late_today: u64,
    pub returned_today: u64,
    #[serde(flatten)]
    pub standing: Standing,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_at: Option<Timestamp>,
    /// The address that its calls leave from, if there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// It waits for its address, and is not held itself.
    #[serde(skip)]
    waits: bool,
}

/// Every source that is configured here or that a worker has reported.
pub fn views(known: &Known, configured: &Configured, now: Timestamp) -> Vec<View> {
    let mut names: Vec<&SourceName> = configured.iter().map(|(name, _)| name).collect();
    let reported = known.reports().map(|(_, report)| &report.source);
    let mut others: Vec<&SourceName> = reported.filter(|name| !names.contains(name)).collect();
    others.sort();
    others.dedup();
    names.extend(others);
    let accounts = |name| configured.iter().find(|(source, _)| source == name).map_or(&[][..], |(_, of)| of.as_slice());
    names.into_iter().map(|name| view(name, known, accounts(name), now)).collect()
}

fn view(source: &SourceName, known: &Known, configured: &[(AccountAlias, String)], now: Timestamp) -> View {
    let settings = known.settings_of(source);
    let mut workers: BTreeMap<&str, Worker> = BTreeMap::new();
    let mut accounts: BTreeMap<AccountAlias, Account> =
        configured.iter().map(|(alias, allowed)| (alias.clone(), Account::new(alias, allowed))).collect();
    let (mut held, mut used_up) = (None, Told::default());
    let (mut calls_again_today, mut silent_ends_today) = (0, 0);
    let mut held_accounts: HashMap<&AccountAlias, &HoldReport> = HashMap::new();
    let mut used_up_accounts: HashMap<&AccountAlias, Told<'_>> = HashMap::new();
    for report in known.reports_of(source) {
        let runs = !report.closed && now.since(report.reported_at) < SILENT_AFTER;
        let worker = workers.entry(&report.instance).or_insert_with(|| Worker {
            instance: report.instance.clone(),
            reported_at: report.reported_at,
            runs,
            cut_off: None,
            delays: None,
        });
        worker.runs |= runs;
        worker.reported_at = worker.reported_at.max(report.reported_at);
        if let Some(whole) = report.whole.as_ref().filter(|_| runs) {
            worker.cut_off.clone_from(&whole.cut_off);
            worker.delays.clone_from(&whole.delays);
        }
        if let Some(whole) = report.whole.as_ref().filter(|_| report.day_at == midnight(now)) {
            calls_again_today += whole.calls_again;
            silent_ends_today += whole.silent_ends;
        }
        held = longer(held, report.whole.as_ref().and_then(|whole| whole.held.as_ref()));
        if let Some(whole) = &report.whole {
            used_up = used_up.newer(report, whole.used_up.as_ref());
        }
        for of in &report.accounts {
            let account = accounts.entry(of.alias.clone()).or_insert_with(|| Account::new(&of.alias, &of.allowed));
            account.learn(report, of, now);
            if let Some(held) = longer(held_accounts.get(&of.alias).copied(), of.held.as_ref()) {
                held_accounts.insert(&of.alias, held);
            }
            let used_up = used_up_accounts.entry(&of.alias).or_default();
            *used_up = used_up.newer(report, of.used_up.as_ref());
        }
    }
    let runs = workers.values().any(|worker| worker.runs);
    let stopped_at = all_stopped(workers.values());
    let addresses = addresses(known.reports_of(source), &settings, accounts.values(), now);
    for (alias, account) in &mut accounts {
        let held = held_accounts.get(alias).copied();
        account.standing = standing(settings.accounts.get(&Some(alias.clone())), held, now)
            .or_spent(used_up_accounts.get(alias).copied().unwrap_or_default(), now);
        account.wait_for(&addresses);
        account.waits |= account.standing.stop(stopped_at);
        if account.standing.state == READY && account.calls_last_minute > 0 && runs {
            account.standing.state = "calling";
        }
    }
    let mut whole = standing(settings.accounts.get(&None), held, now).or_spent(used_up, now);
    whole.stop(stopped_at);
    View {
        source: source.clone(),
        workers: workers.into_values().collect(),
        whole,
        addresses,
        accounts: accounts.into_values().collect(),
        calls_again_today,
        silent_ends_today,
        batches: batches::batches(known.reports_of(source)),
    }
}

/// The addresses of all reports.
fn addresses<'a>(
    reports: impl Iterator<Item = &'a QuotaReport>,
    settings: &Settings,
    accounts: impl Iterator<Item = &'a Account>,
    now: Timestamp,
) -> Vec<Address> {
    let mut held: BTreeMap<&str, (Option<&HoldReport>, Told<'_>)> = BTreeMap::new();
    for (report, whole) in reports.filter_map(|report| Some((report, report.whole.as_ref()?))) {
        for address in &whole.addresses {
            let known = held.entry(&address.name).or_default();
            *known = (longer(known.0, address.held.as_ref()), known.1.newer(report, address.used_up.as_ref()));
        }
    }
    let only = held.len() == 1;
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for account in accounts {
        // An account of a single address does not name it.
        let first = held.keys().next().copied().filter(|_| only);
        if let Some(name) = account.address.as_deref().or(first) {
            *counts.entry(name).or_default() += 1;
        }
    }
    let address = |(name, (held, used_up)): (&str, (Option<&HoldReport>, Told<'_>))| Address {
        name: name.to_owned(),
        standing: standing(settings.addresses.get(name), held, now).or_spent(used_up, now),
        accounts: counts.get(name).copied().unwrap_or_default(),
    };
    let addresses = held.into_iter().map(address);
    addresses.filter(|address| !only || address.standing.state != READY).collect()
}

const READY: &str = "ready";
/// Not held, but Redis is unreachable and no worker may call without it.
const STOPPED: &str = "stopped";

/// Since when no worker calls, as all that run are cut off from Redis.
fn all_stopped<'a>(workers: impl Iterator<Item = &'a Worker>) -> Option<Timestamp> {
    let since = |worker: &Worker| worker.cut_off.as_ref().filter(|cut_off| cut_off.stopped).map(|away| away.since_at);
    let since: Option<Vec<_>> = workers.filter(|worker| worker.runs).map(since).collect();
    since?.into_iter().max()
}

/// A budget is spent.
const SPENT: &str = "spent";

/// What the newest report says of a budget: what is allowed may have been raised since another.
#[derive(Clone, Copy, Default)]
struct Told<'a> {
    reported_at: Timestamp,
    used_up: Option<&'a UsedUpReport>,
}

impl<'a> Told<'a> {
    fn newer(self, report: &QuotaReport, used_up: Option<&'a UsedUpReport>) -> Self {
        let told = Self { reported_at: report.reported_at, used_up };
        let key = |told: &Self| (told.reported_at, told.used_up.map(|used_up| used_up.until_at));
        if key(&told) > key(&self) { told } else { self }
    }
}

fn longer<'a>(one: Option<&'a HoldReport>, other: Option<&'a HoldReport>) -> Option<&'a HoldReport> {
    let lasts = |held: &&HoldReport| held.until_at.unwrap_or(Timestamp::from_millis(i64::MAX));
    one.into_iter().chain(other).max_by_key(lasts)
}

fn standing(setting: Option<&QuotaSetting>, held: Option<&HoldReport>, now: Timestamp) -> Standing {
    let pace = setting.and_then(|setting| setting.pace);
    if let Some(pause) = setting.and_then(|setting| setting.paused_at(now)) {
        let (until_at, since_at, reason) = (pause.until_at, Some(pause.since_at), pause.reason.clone());
        return Standing { state: "paused", until_at, since_at, reason, pace };
    }
    let resumed_at = setting.and_then(|setting| setting.resumed_at);
    let holds = |held: &&HoldReport| {
        held.until_at.is_none_or(|until| until > now) && resumed_at.is_none_or(|resumed| held.since_at > resumed)
    };
    match held.filter(holds) {
        Some(held) => Standing {
            state: if held.until_at.is_some() { "held" } else { "disabled" },
            until_at: held.until_at,
            since_at: Some(held.since_at),
            reason: held.reason.clone(),
            pace,
        },
        None => Standing { state: READY, pace, ..Standing::default() },
    }
}

impl Account {
    fn new(alias: &AccountAlias, allowed: &str) -> Self {
        Self {
            alias: alias.clone(),
            allowed: allowed.to_owned(),
            calls_today: 0,
            calls_last_minute: 0,
            refused_today: 0,
            late_today: 0,
            returned_today: 0,
            standing: Standing::default(),
            next_at: None,
            address: None,
            waits: false,
        }
    }

    /// Who may call but for its address waits for that.
    fn wait_for(&mut self, addresses: &[Address]) {
        let is_its =
            |address: &&Address| self.address.as_ref().map_or(addresses.len() == 1, |own| *own == address.name);
        let held = addresses.iter().filter(is_its).find(|address| address.standing.state != READY);
        if let Some(Address { name, standing, .. }) = held.filter(|_| self.standing.state == READY) {
            let reason = format!("address {name}: {}", standing.reason);
            self.standing = Standing { reason, pace: self.standing.pace, ..standing.clone() };
            self.waits = true;
        }
    }

    fn learn(&mut self, report: &QuotaReport, of: &crate::message::AccountReport, now: Timestamp) {
        if !of.allowed.is_empty() {
            self.allowed.clone_from(&of.allowed);
        }
        if report.day_at == midnight(now) {
            self.calls_today += of.calls;
            self.refused_today += of.refused;
            self.late_today += of.late;
            self.returned_today += of.returned;
        }
        if now.since(report.reported_at) < Duration::from_secs(60) {
            self.calls_last_minute += of.calls_last_minute;
        }
        if of.address.is_some() && !report.closed {
            self.address.clone_from(&of.address);
        }
        let next_at = of.next_at.filter(|at| *at > now && !report.closed);
        self.next_at = [self.next_at, next_at].into_iter().flatten().min();
    }
}

impl View {
    /// Whether there is such an account; else which there are.
    pub fn has(&self, alias: &AccountAlias) -> Result<(), String> {
        if self.accounts.iter().any(|account| account.alias == *alias) {
            return Ok(());
        }
        let names: Vec<&str> = self.accounts.iter().map(|account| account.alias.as_str()).take(10).collect();
        let more = self.accounts.len().saturating_sub(names.len());
        let more =
            if more > 0 { format!(" and {more} more: `weir quota --source {}`", self.source) } else { String::new() };
        let none = "none known: its accounts are configured elsewhere, and no worker has reported yet";
        Err(if names.is_empty() { none.to_owned() } else { format!("known: {}{more}", names.join(", ")) })
    }

    /// Whether there is such an address; else which are held, or that there is none to be resumed.
    pub fn has_address(&self, name: &str) -> Result<(), String> {
        if self.addresses.iter().any(|address| address.name == name) {
            return Ok(());
        }
        let held = self.addresses.iter().filter(|address| address.standing.state != READY);
        let held: Vec<&str> = held.map(|address| address.name.as_str()).take(10).collect();
        let none = "none of its addresses is held".to_owned();
        Err(if held.is_empty() { none } else { format!("held: {}", held.join(", ")) })
    }

    /// A time after everything that holds anybody here, whatever the clocks of the workers say.
    pub fn after_all_holds(&self, now: Timestamp) -> Timestamp {
        let accounts = self.accounts.iter().map(|account| &account.standing);
        let addresses = self.addresses.iter().map(|address| &address.standing);
        let since = accounts.chain(addresses).chain([&self.whole]).filter_map(|standing| standing.since_at).max();
        since.map_or(now, |since| now.max(since.after(Duration::from_millis(1))))
    }

    /// Who follows what is set.
    pub fn followers(&self, now: Timestamp) -> String {
        let running: Vec<&str> =
            self.workers.iter().filter(|worker| worker.runs).map(|worker| worker.instance.as_str()).collect();
        if !running.is_empty() {
            return format!("takes effect within about a second in: {}", running.join(", "));
        }
        format!("{}; it takes effect when one starts", self.silence(now))
    }

    fn silence(&self, now: Timestamp) -> String {
        match self.workers.iter().map(|worker| worker.reported_at).max() {
            Some(last) => format!("no worker reports since {last} ({} ago)", spoken(now.since(last))),
            None => "no worker has ever reported".to_owned(),
        }
    }

    /// What else prevents calls after a resume.
    pub fn still_held(&self, account: Option<&AccountAlias>, wish: &Wish, now: Timestamp) -> Vec<String> {
        if *wish != Wish::Resume {
            return Vec::new();
        }
        let source = &self.source;
        // What is spent is not there, whoever resumes.
        let is_held = |standing: &Standing| !matches!(standing.state, READY | SPENT | STOPPED | "calling");
        let spent = |standing: &Standing| {
            let words = format!("but {}: it can be raised, not resumed", standing.words(now));
            (standing.state == SPENT).then_some(words)
        };
        if let Some(alias) = account {
            let line = format!("but source {source} is {}: weir quota resume {source}", self.whole.words(now));
            let waits = self.accounts.iter().find(|account| account.alias == *alias && account.waits);
            let waits = waits.map(|account| format!("but it is {}", account.standing.words(now)));
            let own = self.accounts.iter().find(|account| account.alias == *alias).and_then(|own| spent(&own.standing));
            let whole = is_held(&self.whole).then_some(line);
            return whole.into_iter().chain(waits).chain(spent(&self.whole)).chain(own).collect();
        }
        let held = self.accounts.iter().filter(|account| is_held(&account.standing) && !account.waits);
        let held: Vec<&str> = held.map(|account| account.alias.as_str()).collect();
        let few = held.iter().take(5).copied().collect::<Vec<_>>().join(", ");
        let line = format!(
            "{} of its accounts stay held ({few}{}); resume them with: weir quota resume {source} ACCOUNT",
            held.len(),
            if held.len() > 5 { ", …" } else { "" }
        );
        (!held.is_empty()).then_some(line).into_iter().chain(spent(&self.whole)).collect()
    }
}

impl Standing {
    /// Who could call but for Redis has stopped; whether that is so.
    fn stop(&mut self, since_at: Option<Timestamp>) -> bool {
        let has_stopped = since_at.is_some() && self.state == READY;
        if has_stopped {
            (self.state, self.since_at, self.reason) = (STOPPED, since_at, "Redis unreachable".to_owned());
        }
        has_stopped
    }

    /// Whoever could call has perhaps nothing left to spend.
    fn or_spent(self, told: Told<'_>, now: Timestamp) -> Self {
        let used_up = told.used_up.filter(|used_up| self.state == READY && used_up.until_at > now);
        let Some(UsedUpReport { reason, until_at }) = used_up else { return self };
        Self { state: SPENT, until_at: Some(*until_at), reason: reason.clone(), ..self }
    }

    fn words(&self, now: Timestamp) -> String {
        let mut words = self.state.to_owned();
        if let Some(until) = self.until_at.filter(|_| self.state == SPENT) {
            return format!("{}, resumes {} ({})", self.reason, time_of_day(until), spoken(until.since(now)));
        }
        if let Some(until) = self.until_at {
            let _ = write!(words, " until {} ({})", time_of_day(until), spoken(until.since(now)));
        } else if let Some(since) = self.since_at {
            let _ = write!(words, " since {}", time_of_day(since));
        }
        if !self.reason.is_empty() {
            let _ = write!(words, ": {}", self.reason);
        }
        if let Some(pace) = self.pace {
            let _ = write!(words, "; pace {}%", (pace * 1_000.0).round() / 10.0);
        }
        words
    }
}

/// Without milliseconds.
fn time_of_day(at: Timestamp) -> String {
    let text = at.to_string();
    text.split_once('.').map_or(text.clone(), |(seconds, _)| format!("{seconds}Z"))
}

const HEAD: [&str; 7] = ["source", "account", "allowed", "today", "last minute", "refused", "state"];

/// Tables for a terminal.
pub fn text(views: &[View], now: Timestamp) -> String {
    if views.is_empty() {
        return "no [[source]] is configured, and no worker has ever reported".to_owned();
    }
    let mut rows = Vec::new();
    let mut notes = Vec::new();
    for view in views {
        let sum = |of: fn(&Account) -> u64| grouped(view.accounts.iter().map(of).sum());
        let all = format!("({})", counted(view.accounts.len() as u64, "account"));
        let sums = [sum(|a| a.calls_today), sum(|a| a.calls_last_minute), sum(|a| a.refused_today)];
        let [today, minute, refused] = sums;
        rows.push(vec![view.source.to_string(), all, String::new(), today, minute, refused, view.whole.words(now)]);
        let held = view.addresses.iter().filter(|address| address.standing.state != READY);
        rows.extend(held.map(|address| address_row(address, now)));
        rows.extend(view.accounts.iter().map(|account| row(account, now)));
        let running = view.workers.iter().filter(|worker| worker.runs).count();
        let reports = agree(running as u64, "reports", "report");
        notes.push(if running == 0 {
            format!("{}: {}", view.source, view.silence(now))
        } else {
            format!("{}: {} {reports}", view.source, counted(running as u64, "worker"))
        });
        notes.extend(view.workers.iter().filter_map(|worker| cut_off(worker, now)));
        notes.extend(made_again(view));
        notes.extend(view.workers.iter().filter_map(delays));
    }
    let mut tables = table(&HEAD, &rows);
    if let Some(batches) = batches::text(views) {
        let _ = write!(tables, "\n\n{batches}");
    }
    format!("{tables}\n\n{}", notes.join("\n"))
}

/// What was paid for twice today, as far as anybody knows.
pub fn made_again(view: &View) -> Vec<String> {
    let (source, calls, ends) = (&view.source, view.calls_again_today, view.silent_ends_today);
    let mut words = Vec::new();
    if calls > 0 {
        let (calls, were) = (counted(calls, "call"), agree(calls, "was", "were"));
        words.push(format!(
            "{source}: {calls} of today {were} repeated: the answer was lost before it was committed to Kafka"
        ));
    }
    if ends > 0 {
        let times = if ends == 1 { "once".to_owned() } else { format!("{} times", grouped(ends)) };
        words.push(format!(
            "{source}: {times} today a worker stopped without a last report (kill -9, power loss): its uncommitted \
             calls were repeated and are not counted; each time at most fetch.at_risk plus the calls in flight"
        ));
    }
    words
}

/// What a worker does without Redis.
fn cut_off(worker: &Worker, now: Timestamp) -> Option<String> {
    let CutOffReport { since_at, stopped } = worker.cut_off.as_ref().filter(|_| worker.runs)?;
    let (name, time) = (&worker.instance, spoken(now.since(*since_at)));
    if *stopped {
        return Some(format!("{name}: disconnected from Redis for {time}; calls stopped until it is back"));
    }
    Some(format!("{name}: disconnected from Redis for {time}, uses up the slots that it has"))
}

/// What is measured of a worker's calls, if the pace is widened for it.
fn delays(worker: &Worker) -> Option<String> {
    let DelayReport { late_ms, bunched_ms, pace } = worker.delays.as_ref().filter(|_| worker.runs)?;
    let (name, percent) = (&worker.instance, (pace * 100.0).round());
    Some(format!(
        "{name}: calls leave up to {late_ms} ms late, replies arrive up to {bunched_ms} ms late together: pace lowered \
         to {percent}% for some seconds"
    ))
}

fn address_row(address: &Address, now: Timestamp) -> Vec<String> {
    let accounts = counted(address.accounts as u64, "account");
    let name = format!("(address {}, {accounts})", address.name);
    let empty = || String::new();
    vec![empty(), name, empty(), empty(), empty(), empty(), address.standing.words(now)]
}

fn row(account: &Account, now: Timestamp) -> Vec<String> {
    let mut state = account.standing.words(now);
    let next_at =
        account.next_at.filter(|at| account.standing.state != SPENT && at.since(now) > Duration::from_secs(2));
    if let Some(next_at) = next_at {
        let _ = write!(state, ", next call {}", time_of_day(next_at));
    }
    vec![
        String::new(),
        account.alias.to_string(),
        account.allowed.clone(),
        grouped(account.calls_today),
        grouped(account.calls_last_minute),
        grouped(account.refused_today),
        state,
    ]
}

#[cfg(test)]
mod tests;
