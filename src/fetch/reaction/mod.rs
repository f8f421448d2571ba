//! What the ends of calls say of the vendor, the accounts, the addresses and this machine, and what follows for the
//! calls to come: holds, and a pace that gives way.
//!
//! The reaction owns all that is learned from replies: the breakers and who stands in while they are open, rests after
//! throttles, the health of addresses, what this machine lacks; and the requests whose call was refused for what may be
//! one item's ([`splits`]) or is every call's ([`misfits`]), until it is known which. It makes no call. Which requests
//! are to be called for again, and which end by the reply that they have, it hands back as an [`Aftermath`].

mod addresses;
pub(super) mod breakers;
mod episode;
mod exhaustion;
mod misfits;
mod outage;
mod penalty;
mod regroup;
mod set_aside;
pub(super) mod splits;
mod spread;
mod suspects;

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use self::{
    addresses::{Addresses, Away},
    breakers::{Breakers, Fallback, Tickets},
    episode::Episodes,
    exhaustion::Exhaustion,
    misfits::{Misfits, Parts},
    penalty::Penalties,
    splits::{GroupId, Splits},
    spread::Spread,
};
use super::{
    admission::Admission,
    call::{Advice, Caller, Contact, Ended, Unrecorded},
    job::Job,
};
use crate::{
    breaker::{BreakerConfig, Shut},
    kafka::{Partition, Reader, Writer},
    message::SourceName,
    platform::{Affected, Denial, Refusal, RefusalKind, address::HealthConfig},
    quota::{Cause, Hold, Quota, Scope, Slot},
};

/// Why no call leaves now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Obstacle {
    /// The source is known not to answer, and is tried again then.
    Shut(Instant),
    /// Calls find out whether it does: the end of one wakes.
    Probing,
    /// This machine lacks what a call needs, and looks again then.
    Exhausted(Instant),
}

/// What becomes of requests whose call has come to nothing.
#[derive(Debug, Default)]
pub(super) struct Aftermath {
    /// They are called for again, with what was coalesced with them, if there is still use in it.
    pub(super) again: Vec<Job>,
    /// They end by what their call was told.
    pub(super) over: Vec<Unrecorded>,
}

/// A refused call that waits until it is known whether it is about it alone.
#[derive(Debug)]
struct Aside {
    call: Unrecorded,
    refusal: Refusal,
    /// Its requests are of this group.
    group: Option<GroupId>,
}

impl Parts for Aside {
    fn partitions(&self) -> impl Iterator<Item = &Partition> {
        self.call.jobs.iter().map(|job| &job.position.partition)
    }
}

/// What was learned from the ends of a source's calls.
pub(super) struct Reaction {
    caller: Arc<Caller>,
    quota: Arc<dyn Quota>,
    /// Whether headers that say that a quota is used up hold the account.
    heeds_hints: bool,
    breakers: Breakers,
    /// When the source's breaker was last opened.
    opened_at: Option<Instant>,
    /// Who is asked while it is open.
    fallback: Option<Fallback>,
    penalties: Penalties,
    addresses: Addresses,
    episodes: Episodes,
    exhaustion: Exhaustion,
    spread: Spread,
    /// Requests whose call was refused for what may be one item's.
    splits: Splits<Job>,
    /// Calls that were refused for what all have in common, and that are called for again.
    misfits: Misfits<Aside>,
}

impl Reaction {
    /// A vendor that names a longer wait has no more to give: a day's allowance, say.
    const BUDGET_SPENT: Duration = Duration::from_secs(600);

    pub(super) fn new(caller: Arc<Caller>, quota: Arc<dyn Quota>, heeds_hints: bool) -> Self {
        Self {
            heeds_hints,
            breakers: Breakers::new(BreakerConfig::default(), caller.accounts()),
            opened_at: None,
            fallback: None,
            penalties: Penalties::default(),
            addresses: Addresses::new(HealthConfig::default(), caller.addresses()),
            episodes: Episodes::default(),
            exhaustion: Exhaustion::default(),
            spread: Spread::new(Instant::now()),
            splits: Splits::default(),
            misfits: Misfits::default(),
            caller,
            quota,
        }
    }

    pub(super) fn with_address_health(self, config: HealthConfig) -> Self {
        Self { addresses: Addresses::new(config, self.caller.addresses()), ..self }
    }

    pub(super) fn with_breaker(self, config: BreakerConfig, fallback: Option<SourceName>) -> Self {
        let fallback = fallback.map(|source| Fallback::new(source, self.caller.topics().clone()));
        Self { breakers: Breakers::new(config, self.caller.accounts()), fallback, ..self }
    }

    /// Why no call leaves now, if so.
    pub(super) fn obstacle(&self, now: Instant) -> Option<Obstacle> {
        match self.breakers.shut(now) {
            Some(Shut::Until(until)) => Some(Obstacle::Shut(until)),
            Some(Shut::Probing) => Some(Obstacle::Probing),
            None => self.exhaustion.pauses_until(now).map(Obstacle::Exhausted),
        }
    }

    /// Whether the source is known not to answer.
    pub(super) fn is_shut(&self, now: Instant) -> bool {
        self.breakers.shut(now).is_some()
    }

    /// How many calls may leave now, at most: while it is found out whether the source answers, few.
    pub(super) fn room(&self, now: Instant) -> usize {
        let room = self.breakers.room(now);
        if self.misfits.is_trying() { room.min(1) } else { room }
    }

    /// Whether one call at a time finds out if the source takes calls again.
    pub(super) fn is_trying_one(&self) -> bool {
        self.misfits.is_trying()
    }

    /// If the next call of the account finds out whether a breaker may close: by what rank its request is chosen, which is
    /// how often calls for it have failed. Else one sick item after the other would keep a source shut that answers all
    /// others.
    pub(super) fn rank(&self, account: usize) -> Option<impl Fn(&Job) -> u32> {
        self.breakers.is_trying(account).then_some(|job: &Job| self.breakers.failures_of(job))
    }

    /// A call for these leaves: what it carries for the breakers.
    pub(super) fn admit(&mut self, account: usize, jobs: &[Job]) -> Option<Tickets> {
        self.breakers.admit(account, jobs, Instant::now())
    }

    /// If this is the first to leave from an address that was taken out, the others wait for what comes of it.
    pub(super) async fn probe(&mut self, slot: &Slot) {
        let now = self.caller.now();
        if let Some(wait) = self.addresses.probe(slot.address, now) {
            let cause = Cause::new("probed by one call", now);
            self.quota.hold(Scope::Address(slot.address), Hold::Until(Instant::now() + wait), &cause).await;
        }
    }

    /// A call has ended. What was not called for stays in `ended`, but for what is put back into its group; `admission`
    /// is asked which requests are still wanted.
    pub(super) async fn ended<R: Reader, W: Writer>(
        &mut self,
        ended: &mut Ended,
        admission: &mut Admission<R, W>,
    ) -> Aftermath {
        self.react_machine(&ended.contact);
        self.note_split(ended);
        self.react_address(ended).await;
        // A throttle's own wait overrides the other headers.
        let is_throttled = matches!(&ended.refusal, Some(Refusal { kind: RefusalKind::Throttled { .. }, .. }));
        let absence = ended.advice.unavailable.filter(|_| !is_throttled);
        let is_of_address = match absence {
            Some(wait) => !self.heed_absence(ended.address, wait).await,
            None => false,
        };
        self.judge(ended, is_of_address).await;
        let aftermath = self.regroup(ended, admission).await;
        if let Some(latency) = ended.latency {
            self.spread.note(latency, Instant::now());
        }
        match &ended.refusal {
            Some(Refusal { kind: RefusalKind::Denied(_), .. }) if ended.is_outdated => {}
            Some(refusal) => self.react((ended.account, ended.address), ended.left_at, refusal).await,
            None if ended.outcomes.is_empty() => {}
            None => self.penalties.forgive(ended.account, ended.left_at),
        }
        if !is_throttled {
            self.heed((ended.account, ended.address), ended.advice).await;
        }
        if let Some(cause) = self.caller.tokens.death(ended.account).filter(|_| ended.is_dead) {
            self.quota.hold(Scope::Account(ended.account), Hold::Disabled, &cause).await;
        }
        aftermath
    }

    /// What a reply's headers mean for the calls to come.
    async fn heed(&mut self, (account, address): (usize, usize), Advice { used_up, .. }: Advice) {
        let (source, now) = (&self.caller.source, Instant::now());
        if let Some(wait) = used_up.filter(|_| self.heeds_hints) {
            // Those under way say the same.
            if !self.quota.is_held(&Slot { account, address, at: now, latest: now }) {
                let account = self.caller.alias(account);
                info!(%source, %account, ?wait, "vendor reports the account's quota used up; its calls wait");
            }
            let cause = Cause::new("vendor reports the quota used up", self.caller.now());
            self.quota.hold(Scope::Account(account), Hold::Until(now + wait), &cause).await;
        }
    }

    /// A reply says that the service is away for so long; whether it is the source that is away, by all that is known. The
    /// wait is believed up to `breaker.open_max`: who says a day is asked again before.
    async fn heed_absence(&mut self, address: usize, said: Duration) -> bool {
        let now = Instant::now();
        let wait = said.min(self.breakers.open_max());
        let mut why = format!("vendor announced an outage of {} (HTTP 503)", whole(said));
        if wait < said {
            why = format!("{why}; calls are tried again after {} (breaker.open_max)", whole(wait));
        }
        match self.addresses.away(address, wait, now) {
            Away::Source => {
                self.open_for(wait, &why).await;
                true
            }
            Away::Address(None) => false,
            Away::Address(Some(wait)) => {
                let (source, name) = (&self.caller.source, self.caller.address_name(address));
                warn!(%source, address = name, ?wait, why, "address taken out of rotation; if another address gets the same reply, the whole source pauses");
                let cause = Cause::new(&why, self.caller.now());
                self.quota.hold(Scope::Address(address), Hold::Until(now + wait), &cause).await;
                false
            }
        }
    }

    /// The vendor says: too fast. The shared time moves first, then the pace gives way.
    async fn slow_down(
        &mut self,
        scope: Scope,
        account: usize,
        left_at: Instant,
        wait: Option<Duration>,
        cause: &Cause,
    ) {
        let now = Instant::now();
        let until = wait.map_or_else(|| self.penalties.punish(account, left_at, now), |wait| now + wait);
        self.quota.hold(scope, Hold::Until(until), cause).await;
        // So long is a budget spent, and no sign of a wrong pace.
        if wait.is_some_and(|wait| wait > Self::BUDGET_SPENT) {
            return;
        }
        self.quota.refused(scope, left_at).await;
        if let Some(refusals) = self.episodes.refused(scope, now) {
            let (source, account) = (&self.caller.source, self.caller.alias(account));
            let (rest, share, spread) = (until - now, self.quota.pace(scope).share, self.spread.width());
            let scope = self.caller.scope_name(scope);
            warn!(%source, %account, scope, refusals, ?rest, share, ?spread, "vendor refused a call within our limit; slowing down. Check the limit, other users of the account, quota.jitter");
        }
    }

    /// What a refusal means for the calls to come.
    async fn react(&mut self, (account, address): (usize, usize), left_at: Instant, refusal: &Refusal) {
        let source = &self.caller.source;
        let alias = self.caller.alias(account);
        let cause = Cause::new(&refusal.code, self.caller.now());
        match &refusal.kind {
            RefusalKind::Throttled { scope, wait } => {
                let scope = match scope {
                    Affected::Account => Scope::Account(account),
                    Affected::Address => Scope::Address(address),
                    Affected::Everyone => Scope::Source,
                };
                let name = self.caller.scope_name(scope);
                debug!(%source, account = %alias, code = refusal.code, ?wait, scope = name, "vendor throttled the call");
                self.slow_down(scope, account, left_at, *wait, &cause).await;
            }
            RefusalKind::Denied(Denial::Account) => {
                error!(%source, account = %alias, code = refusal.code, message = refusal.message, "vendor refused the account: disabled until `weir quota resume`, other accounts take over");
                self.quota.hold(Scope::Account(account), Hold::Disabled, &cause).await;
            }
            // The keeper of the tokens has seen to the one.
            RefusalKind::Denied(Denial::Token)
            | RefusalKind::Outage
            | RefusalKind::Unclear
            | RefusalKind::Malformed
            | RefusalKind::Misconfigured(_)
            | RefusalKind::Bug => {}
        }
    }

    /// What the end of a call says of this machine: while it lacks what a call needs, calls of this process wait, and those
    /// of others go on.
    fn react_machine(&mut self, contact: &Contact) {
        let (source, now) = (&self.caller.source, Instant::now());
        match contact {
            Contact::Machine(why) => {
                if let Some(pause) = self.exhaustion.noted(now) {
                    warn!(%source, why, ?pause, "calls paused: this machine lacks what they need; requests wait and spend no attempt");
                }
            }
            Contact::Unprocessed(why) => {
                debug!(%source, why, "the server did not process the call; its requests wait for another slot");
            }
            Contact::Called(_) => {
                if self.exhaustion.over(now) {
                    info!(%source, "this machine can make calls again; calls resume");
                }
            }
            Contact::None | Contact::NoWay(_) => {}
        }
    }

    /// What the end of a call means for the others from the same address.
    async fn react_address(&mut self, ended: &Ended) {
        // That was no answer through this address.
        if ended.advice.unavailable.is_some() {
            return;
        }
        let (address, now) = (ended.address, Instant::now());
        let kind = ended.refusal.as_ref().map(|refusal| &refusal.kind);
        let (rest, why) = match &ended.contact {
            Contact::None | Contact::Machine(_) | Contact::Unprocessed(_) | Contact::Called(None) => return,
            Contact::NoWay(why) => (self.addresses.failed(address, now), why.as_str()),
            // Said without a code of the vendor's that would explain it.
            Contact::Called(Some(403)) if matches!(kind, Some(RefusalKind::Outage | RefusalKind::Malformed)) => {
                (self.addresses.forbidden(address, ended.account, now), "vendor answers HTTP 403 to its accounts")
            }
            Contact::Called(Some(_)) => {
                let is_unanswered = matches!(
                    kind,
                    Some(RefusalKind::Outage | RefusalKind::Unclear | RefusalKind::Malformed) if !ended.has_answer
                ) && !ended.is_one_items;
                let rest = if is_unanswered { self.addresses.unanswered(address, now) } else { None };
                if let Some(rest) = rest {
                    let last = ended.refusal.as_ref().map_or("", |refusal| refusal.message.as_str());
                    let why = format!("calls from this address are not answered while those from others are: {last}");
                    return self.take_out(address, rest, &why).await;
                }
                let back =
                    if ended.has_answer { self.addresses.answered(address) } else { self.addresses.replied(address) };
                if let Some(back) = back {
                    let (source, name) = (&self.caller.source, self.caller.address_name(address));
                    info!(%source, address = name, "address back in rotation");
                    if let Some(tried_at) = back.tried_at {
                        self.quota.release(Scope::Address(address), tried_at).await;
                    }
                }
                return;
            }
        };
        let (source, name) = (&self.caller.source, self.caller.address_name(address));
        let Some(rest) = rest else {
            debug!(%source, address = name, why, "cannot reach the vendor from this address; the requests wait for another slot");
            return;
        };
        let why = why.to_owned();
        self.take_out(address, rest, &why).await;
    }

    async fn take_out(&mut self, address: usize, rest: Duration, why: &str) {
        let (source, name) = (&self.caller.source, self.caller.address_name(address));
        warn!(%source, address = name, ?rest, why, "address taken out of rotation; its requests wait and spend no attempt");
        let cause = Cause::new(why, self.caller.now());
        self.quota.hold(Scope::Address(address), Hold::Until(Instant::now() + rest), &cause).await;
    }
}

/// A time as people read it, in whole seconds.
fn whole(time: Duration) -> humantime::FormattedDuration {
    humantime::format_duration(Duration::from_secs(time.as_secs().max(1)))
}

#[cfg(test)]
mod breaker_tests;
#[cfg(test)]
mod refusal_tests;
#[cfg(test)]
mod tests;
