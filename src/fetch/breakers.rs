//! The breakers of a source and of its accounts: what opens them, and what becomes of requests meanwhile.
//!
//! An open breaker is a hold of the quota, so the whole fleet keeps away and `weir quota` shows it; a worker that meets
//! the hold of another opens its own. The backlog stays where it is, most of it on Kafka: it costs nothing there, and
//! a million requests that went round through retry would. What has an answer that was kept gets it, marked as stale;
//! with a fallback all others are asked of that; and an express request is re-scheduled at once, without spending an
//! attempt.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;
use tracing::{info, warn};

use super::{
    Fetch, cached,
    call::{Contact, Ended},
    end::End,
    grouped::fingerprint,
    job::Job,
    suspects::Suspects,
};
use crate::{
    breaker::{Breaker, BreakerConfig, Change, Shut, Ticket, Verdict},
    kafka::{Reader, Writer},
    message::{Lane, SourceName, codec::shorten},
    platform::{Refusal, RefusalKind},
    quota::{Cause, Hold, Scope},
    topics::Topics,
};

/// What the reason of a hold begins with that is an open breaker's.
pub(super) const REASON: &str = "breaker open: ";

/// How much of the last reply's words is told, in bytes.
const LAST_REPLY: usize = 160;

/// What one call carries.
#[derive(Debug)]
pub(super) struct Tickets {
    account: usize,
    of_source: Ticket,
    of_account: Option<Ticket>,
    /// All that it asks for has failed before.
    again: bool,
    /// And others were answered after that: it says nothing of the source even as a probe.
    is_suspect: bool,
    /// The fingerprints of what it asks for.
    items: Vec<u64>,
}

/// How many calls for this request have failed by its history. A source that is away fails each request once before it
/// is shut; an item that it never answers fails each time, and not always in the same way.
fn failed_calls(job: &Job) -> u32 {
    job.request.attempts_spent()
}

/// The breaker of the source, and one of each account if there are several: one account that is worse off than the
/// others is that account's trouble, an only one is the source.
#[derive(Debug)]
pub(super) struct Breakers {
    source: Breaker,
    accounts: Vec<Breaker>,
    suspects: Suspects,
    open_max: Duration,
}

impl Breakers {
    pub(super) fn new(config: BreakerConfig, accounts: usize) -> Self {
        let accounts = if accounts > 1 { accounts } else { 0 };
        let accounts = (0..accounts).map(|_| Breaker::new(config)).collect();
        Self { source: Breaker::new(config), accounts, suspects: Suspects::default(), open_max: config.open_max }
    }

    /// For how long a vendor is believed that says that it is away.
    pub(super) const fn open_max(&self) -> Duration {
        self.open_max
    }

    /// Why nobody may call now, if so.
    pub(super) fn shut(&self, now: Instant) -> Option<Shut> {
        self.source.shut(now)
    }

    /// Why this account may not call now, if so.
    pub(super) fn account_shut(&self, account: usize, now: Instant) -> Option<Shut> {
        self.accounts.get(account)?.shut(now)
    }

    /// How many calls may leave now, at most.
    pub(super) fn room(&self, now: Instant) -> usize {
        self.source.room(now)
    }

    /// Whether the next call finds out if a breaker that concerns it may close.
    pub(super) fn is_trying(&self, account: usize) -> bool {
        self.source.is_trying() || self.accounts.get(account).is_some_and(Breaker::is_trying)
    }

    /// How often calls for it have failed, as far as is known: the less often, the more another call says of the source.
    pub(super) fn failures_of(&self, job: &Job) -> u32 {
        failed_calls(job).max(u32::from(self.suspects.has(fingerprint(job))))
    }

    /// A call leaves; for one that may not there are no tickets.
    pub(super) fn admit(&mut self, account: usize, jobs: &[Job], now: Instant) -> Option<Tickets> {
        if self.account_shut(account, now).is_some() {
            return None;
        }
        let of_source = self.source.admit(now).ok()?;
        let of_account = self.accounts.get_mut(account).and_then(|breaker| breaker.admit(now).ok());
        let items: Vec<u64> = jobs.iter().map(fingerprint).collect();
        // The last few of a million, which always fail, would else shut a source that answers everything else. Whatever
        // fails waits ever longer in retry, so a source that is away is not called more often for it.
        let again = !jobs.is_empty() && jobs.iter().all(|job| self.failures_of(job) > 0);
        let is_suspect = !jobs.is_empty() && items.iter().all(|item| self.suspects.has(*item));
        Some(Tickets { account, of_source, of_account, again, is_suspect, items })
    }

    /// What the end of a call, whose reply came `at` that time, has changed, of whom. While the source is to blame its
    /// accounts are not.
    pub(super) fn ended(&mut self, tickets: &Tickets, verdict: Verdict, at: Instant) -> Option<(Scope, Change)> {
        let Tickets { account, of_source, of_account, again, is_suspect, ref items } = *tickets;
        match verdict {
            Verdict::Good => self.suspects.answered(items),
            Verdict::Outage => self.suspects.failed(items),
            Verdict::Neither => {}
        }
        // While it is shut there may be nothing else to try it with.
        let is_known = |breaker: &Breaker| if breaker.is_trying() { is_suspect } else { again };
        let blameless = |breaker: &Breaker| verdict == Verdict::Outage && is_known(breaker);
        let of = |breaker: &Breaker| if blameless(breaker) { Verdict::Neither } else { verdict };
        let change = self.source.ended(of_source, of(&self.source), at);
        let of_account = of_account.and_then(|ticket| {
            let breaker = self.accounts.get_mut(account)?;
            // It may have been a probe of the account as well, whose place another one waits for.
            let verdict = match change {
                Some(Change::Opened { .. }) => Verdict::Neither,
                Some(Change::Closed) | None => of(breaker),
            };
            breaker.ended(ticket, verdict, at)
        });
        if change.is_some() {
            self.accounts.iter_mut().for_each(Breaker::forget);
        }
        let of_source = change.map(|change| (Scope::Source, change));
        of_source.or_else(|| of_account.map(|change| (Scope::Account(account), change)))
    }
}

/// Where requests go while the source does not answer.
#[derive(Clone, Debug)]
pub(super) struct Fallback {
    source: SourceName,
    topics: Topics,
}

impl Fallback {
    pub(super) fn new(source: SourceName, topics: Topics) -> Self {
        Self { source, topics }
    }

    /// Two sources that stand in for each other would send a request to and fro.
    fn takes(job: &Job) -> bool {
        job.request.instead_of.is_none()
    }
}

impl Ended {
    fn verdict(&self) -> Verdict {
        let Contact::Called(_) = self.contact else { return Verdict::Neither };
        match self.refusal.as_ref().map(|refusal| &refusal.kind) {
            // Of a batch some items may have been answered.
            None => Verdict::Good,
            Some(_) if self.has_answer => Verdict::Good,
            Some(RefusalKind::Unclear | RefusalKind::Malformed) if self.is_one_items => Verdict::Neither,
            // Nobody can read a notice of maintenance either, or what a firewall says instead of the vendor.
            Some(RefusalKind::Outage | RefusalKind::Unclear | RefusalKind::Malformed) => Verdict::Outage,
            Some(
                RefusalKind::Throttled { .. }
                | RefusalKind::Denied(_)
                | RefusalKind::Misconfigured(_)
                | RefusalKind::Bug,
            ) => Verdict::Neither,
        }
    }
}

impl<R: Reader, W: Writer> Fetch<R, W> {
    /// An account whose probes are under way waits so long for what comes of them.
    const PROBING: Duration = Duration::from_millis(250);

    /// How soon after opening a hold that is missing means that somebody has ended it.
    const SETTLED: Duration = Duration::from_secs(1);

    /// Counts how a call has ended. `is_of_address`: its failure says something of its address alone, which is seen to.
    pub(super) async fn judge(&mut self, ended: &Ended, is_of_address: bool) {
        let Some(tickets) = &ended.tickets else { return };
        let verdict = if is_of_address { Verdict::Neither } else { ended.verdict() };
        match self.breakers.ended(tickets, verdict, ended.replied_at) {
            None => {}
            Some((scope, Change::Opened { until, why })) => {
                let last = ended.refusal.as_ref().map(|Refusal { code, message, .. }| format!("{code}: {message}"));
                let last = last.unwrap_or_default();
                self.told_open(scope, until, &format!("{why}; the last one: {}", shorten(&last, LAST_REPLY))).await;
            }
            Some((scope, Change::Closed)) => {
                let source = &self.caller.source;
                info!(%source, ?scope, "the breaker closes: a probe was answered");
            }
        }
    }

    /// The vendor says that it is away for so long.
    pub(super) async fn open_for(&mut self, wait: Duration, why: &str) {
        if let Some(Change::Opened { until, why }) = self.breakers.source.open_until(Instant::now() + wait, why) {
            self.told_open(Scope::Source, until, &why).await;
        }
    }

    /// All calls are refused alike, and nobody calls for so long: of this process if it is about this process.
    pub(super) async fn hold_source(&mut self, wait: Duration, why: &str, is_local: bool) {
        let change = self.breakers.source.open_until(Instant::now() + wait, why);
        let Some(Change::Opened { until, why }) = change else { return };
        self.opened_at = Some(Instant::now());
        if !is_local {
            let cause = Cause::new(&format!("{REASON}{why}"), self.caller.now());
            self.quota.hold(Scope::Source, Hold::Until(until), &cause).await;
        }
    }

    async fn told_open(&mut self, scope: Scope, until: Instant, why: &str) {
        let (source, wait) = (&self.caller.source, until - Instant::now());
        match scope {
            Scope::Account(account) => {
                let account = self.caller.alias(account);
                warn!(%source, %account, why, ?wait, "the account's breaker opens: the others carry its load");
            }
            Scope::Source | Scope::Address(_) => {
                self.opened_at = Some(Instant::now());
                warn!(%source, why, ?wait, "the breaker opens: nobody calls; what waits stays where it is, express requests are put off");
            }
        }
        let cause = Cause::new(&format!("{REASON}{why}"), self.caller.now());
        self.quota.hold(scope, Hold::Until(until), &cause).await;
    }

    /// Whether the account's breaker takes no call now: then it is held, and its slot is to be given back.
    pub(super) async fn waits_for_breaker(&mut self, account: usize) -> bool {
        let now = Instant::now();
        let Some(shut) = self.breakers.account_shut(account, now) else { return false };
        let (until, why) = match shut {
            Shut::Until(until) => (until, "it did not answer"),
            Shut::Probing => (now + Self::PROBING, "its probes are under way"),
        };
        let cause = Cause::new(&format!("{REASON}{why}"), self.caller.now());
        self.quota.hold(Scope::Account(account), Hold::Until(until), &cause).await;
        true
    }

    /// Another worker may have opened the breaker of the fleet.
    pub(super) fn heed_fleet(&mut self) {
        let now = self.caller.now();
        let Some(held) = self.quota.snapshot(0..0, now).whole.held else { return };
        let Some(until) = held.until.filter(|_| held.cause.reason.starts_with(REASON)) else { return };
        let why = held.cause.reason.trim_start_matches(REASON);
        let change = self.breakers.source.open_until(Instant::now() + until.since(now), why);
        if change.is_some() {
            self.opened_at = Some(Instant::now());
            warn!(source = %self.caller.source, why, %until, "another worker has opened the breaker");
        }
    }

    /// Nobody calls until then, unless somebody ends the hold.
    pub(super) async fn sit_out(&mut self, until: Instant) {
        self.return_slots().await;
        // The source is to blame, and no item.
        let items = self.splits.free_waiting();
        self.free(items);
        let now = Instant::now();
        let is_settled = !self.misfits.is_local && self.opened_at.is_none_or(|at| now - at > Self::SETTLED);
        if is_settled && self.quota.snapshot(0..0, self.caller.now()).whole.held.is_none() {
            info!(source = %self.caller.source, "the hold has been ended: the breaker tries at once");
            self.breakers.source.try_now(now);
            self.misfits.try_now(now);
            self.wake_at = Some(now);
            return;
        }
        self.free_from_aside(self.fallback.is_some());
        self.end_without_calls(until).await;
        self.end_uncalled();
        self.wake_at = Some(until.min(now + Self::LOOK_AGAIN));
    }

    /// Ends what need not wait for the source: what has an answer that was kept, all if another source stands in for it,
    /// and what is in a hurry.
    async fn end_without_calls(&mut self, until: Instant) {
        let at = self.caller.now();
        let until = at.after(until.saturating_duration_since(Instant::now()));
        for lane in Lane::ALL {
            let mut jobs = self.backlog.take(lane);
            cached::recall(&mut jobs).await;
            for job in jobs {
                let partition = job.position.partition.clone();
                if job.flight.as_ref().is_some_and(|flight| flight.has_stale(&job)) {
                    let (position, end) = self.caller.stale_instead(job);
                    self.end(position, end);
                    self.regulate(&partition);
                    continue;
                }
                let records = match &self.fallback {
                    Some(fallback) if Fallback::takes(&job) => {
                        let topic: Arc<str> = fallback.topics.requests_by(&fallback.source, job.lane).into();
                        self.caller.outcomes().instead(&job, &fallback.source, &topic, (at, until))
                    }
                    _ if job.lane == Lane::Express => self.caller.outcomes().held_back(&job, (at, until)),
                    _ => {
                        self.backlog.push(job);
                        continue;
                    }
                };
                self.end(job.position, End::Made(records));
                self.regulate(&partition);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: Duration = Duration::from_secs(30);

    /// Two accounts; the first one's breaker opens, then the source's; a probe of the first account is what comes next.
    fn probe_by_an_account_whose_breaker_was_open_too(verdict: Verdict) -> Option<Shut> {
        let config = BreakerConfig { probes: 1, open: OPEN, sample: 1_000, ..BreakerConfig::default() };
        let (mut breakers, mut now) = (Breakers::new(config, 2), Instant::now());
        let call = |breakers: &mut Breakers, account, verdict, now| {
            let tickets = breakers.admit(account, &[], now).unwrap();
            breakers.ended(&tickets, verdict, now).map(|(scope, _)| scope)
        };
        for _ in 0..4 {
            assert_eq!(call(&mut breakers, 0, Verdict::Outage, now), None);
            assert_eq!(call(&mut breakers, 1, Verdict::Good, now), None);
        }
        assert_eq!(call(&mut breakers, 0, Verdict::Outage, now), Some(Scope::Account(0)));
        now += Duration::from_secs(1);
        let opened = (0..5).find_map(|_| call(&mut breakers, 1, Verdict::Outage, now));
        assert_eq!(opened, Some(Scope::Source));
        now += OPEN;
        assert_eq!(call(&mut breakers, 0, verdict, now), Some(Scope::Source));
        breakers.account_shut(0, now + 2 * OPEN)
    }

    #[test]
    fn a_probe_of_the_source_is_no_probe_of_its_account_for_ever() {
        for verdict in [Verdict::Good, Verdict::Outage] {
            assert_eq!(probe_by_an_account_whose_breaker_was_open_too(verdict), None, "{verdict:?}");
        }
    }
}
