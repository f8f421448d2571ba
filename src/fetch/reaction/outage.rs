//! A source or an account that does not answer: what opens its breaker, and what becomes of requests meanwhile.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{info, warn};

use super::{Reaction, breakers::Fallback};
use crate::{
    breaker::{Change, Shut, Verdict},
    fetch::{
        call::{Contact, Ended},
        end::End,
        job::Job,
        stale,
    },
    kafka::outbox::Position,
    message::{Lane, codec::shorten},
    platform::{Refusal, RefusalKind},
    quota::{Cause, Hold, Scope},
    runtime::clock::Timestamp,
};

/// What the reason of a hold begins with that is an open breaker's.
pub(super) const REASON: &str = "breaker open: ";

/// How much of the last reply's words is told, in bytes.
const LAST_REPLY: usize = 160;

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

impl Reaction {
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
                self.told_open(scope, until, &format!("{why}; last failure: {}", shorten(&last, LAST_REPLY))).await;
            }
            Some((scope, Change::Closed)) => {
                let source = &self.caller.source;
                info!(%source, scope = self.caller.scope_name(scope), "breaker closed: a probe was answered");
            }
        }
    }

    /// The vendor says that it is away for so long.
    pub(super) async fn open_for(&mut self, wait: Duration, why: &str) {
        if let Some(Change::Opened { until, why }) = self.breakers.open_until(Instant::now() + wait, why) {
            self.told_open(Scope::Source, until, &why).await;
        }
    }

    /// All calls are refused alike, and nobody calls for so long: of this process if it is about this process.
    pub(super) async fn hold_source(&mut self, wait: Duration, why: &str, is_local: bool) {
        let change = self.breakers.open_until(Instant::now() + wait, why);
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
                warn!(%source, %account, why, ?wait, "breaker opened: account paused, other accounts take over");
            }
            Scope::Source | Scope::Address(_) => {
                self.opened_at = Some(Instant::now());
                warn!(%source, why, ?wait, "breaker opened: calls to the source paused; requests wait on Kafka, express requests go to the delay topics");
            }
        }
        let cause = Cause::new(&format!("{REASON}{why}"), self.caller.now());
        self.quota.hold(scope, Hold::Until(until), &cause).await;
    }

    /// Whether the account's breaker takes no call now: then it is held, and its slot is to be given back.
    pub(in crate::fetch) async fn waits_for_breaker(&mut self, account: usize) -> bool {
        let now = Instant::now();
        let Some(shut) = self.breakers.account_shut(account, now) else { return false };
        let (until, why) = match shut {
            Shut::Until(until) => (until, "it did not answer"),
            Shut::Probing => (now + Self::PROBING, "its probes are in flight"),
        };
        let cause = Cause::new(&format!("{REASON}{why}"), self.caller.now());
        self.quota.hold(Scope::Account(account), Hold::Until(until), &cause).await;
        true
    }

    /// Another worker may have opened the breaker of the fleet.
    pub(in crate::fetch) fn heed_fleet(&mut self) {
        let now = self.caller.now();
        let Some(held) = self.quota.snapshot(0..0, now).whole.held else { return };
        let Some(until) = held.until.filter(|_| held.cause.reason.starts_with(REASON)) else { return };
        let why = held.cause.reason.trim_start_matches(REASON);
        let change = self.breakers.open_until(Instant::now() + until.since(now), why);
        if change.is_some() {
            self.opened_at = Some(Instant::now());
            warn!(source = %self.caller.source, why, %until, "another worker opened the breaker; calls to the source paused");
        }
    }

    /// While the source's breaker is open: whether somebody has ended its hold. Then it is tried at once.
    pub(in crate::fetch) fn is_released(&mut self, now: Instant) -> bool {
        let is_settled = !self.misfits.is_local && self.opened_at.is_none_or(|at| now - at > Self::SETTLED);
        if !is_settled || self.quota.snapshot(0..0, self.caller.now()).whole.held.is_some() {
            return false;
        }
        info!(source = %self.caller.source, "the hold was ended by an operator: the breaker probes now");
        self.breakers.try_now(now);
        self.misfits.try_now(now);
        true
    }

    /// The end of a request that need not wait for a source that is known not to answer from one time until the other:
    /// by an answer that was kept, or by being asked of the source that stands in; and a request that is in a hurry comes
    /// again later.
    ///
    /// # Errors
    /// The request, if it waits.
    pub(in crate::fetch) fn end_without_call(
        &self,
        job: Job,
        times: (Timestamp, Timestamp),
    ) -> Result<(Position, End), Box<Job>> {
        let outcomes = self.caller.outcomes();
        if job.single_flight.as_ref().is_some_and(|flight| flight.has_stale(&job.request)) {
            return Ok(stale::instead_of_call(outcomes, self.caller.alias(0), job, self.caller.now()));
        }
        let records = match &self.fallback {
            Some(fallback) if Fallback::takes(&job) => {
                outcomes.instead(&job, fallback.source(), &fallback.topic(job.lane).into(), times)
            }
            _ if job.lane == Lane::Express => outcomes.held_back(&job, times),
            _ => return Err(Box::new(job)),
        };
        Ok((job.position, End::Made(records)))
    }
}
