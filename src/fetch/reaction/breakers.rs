//! The breakers of a source and of its accounts, and which calls count for them. Pure.
//!
//! An open breaker is a hold of the quota, so the whole fleet keeps away and `weir quota` shows it; a worker that meets
//! the hold of another opens its own. The backlog stays where it is, most of it on Kafka: it costs nothing there, and
//! a million requests that went round through retry would. What has an answer that was kept gets it, marked as stale;
//! with a fallback all others are asked of that; and an express request is re-scheduled at once, without spending an
//! attempt.

use std::time::Duration;

use tokio::time::Instant;

use super::suspects::Suspects;
use crate::{
    breaker::{Breaker, BreakerConfig, Change, Shut, Ticket, Verdict},
    fetch::{backlog::fingerprint, job::Job},
    message::{Lane, SourceName},
    quota::Scope,
    topics::Topics,
};

/// What one call carries.
#[derive(Debug)]
pub(in crate::fetch) struct Tickets {
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

    /// Nobody calls until then, for this reason, unless nobody does for as long already.
    pub(super) fn open_until(&mut self, until: Instant, why: &str) -> Option<Change> {
        self.source.open_until(until, why)
    }

    /// The source is tried at once.
    pub(super) fn try_now(&mut self, now: Instant) {
        self.source.try_now(now);
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
    pub(super) fn takes(job: &Job) -> bool {
        job.request.instead_of.is_none()
    }

    pub(super) fn source(&self) -> &SourceName {
        &self.source
    }

    /// Where requests of a lane are read there.
    pub(super) fn topic(&self, lane: Lane) -> String {
        self.topics.requests_by(&self.source, lane)
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
