//! What replies and refusals mean for the calls to come: holds, and a pace that gives way.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use super::{
    Fetch,
    addresses::Away,
    call::{Advice, Contact, Ended},
};
use crate::{
    kafka::{Reader, Writer},
    platform::{Affected, Denial, Refusal, RefusalKind},
    quota::{Cause, Hold, Scope, Slot},
};

impl<R: Reader, W: Writer> Fetch<R, W> {
    /// A vendor that names a longer wait has no more to give: a day's allowance, say.
    const BUDGET_SPENT: Duration = Duration::from_secs(600);

    /// What a reply's headers mean for the calls to come.
    pub(super) async fn heed(&mut self, (account, address): (usize, usize), Advice { used_up, .. }: Advice) {
        let (source, now) = (&self.caller.source, Instant::now());
        if let Some(wait) = used_up.filter(|_| self.config.heed_hints) {
            // Those under way say the same.
            if !self.quota.is_held(&Slot { account, address, at: now, latest: now }) {
                let account = self.caller.alias(account);
                info!(%source, %account, ?wait, "the vendor says that the account's quota is used up until then");
            }
            let cause = Cause::new("the vendor says that the quota is used up", self.caller.now());
            self.quota.hold(Scope::Account(account), Hold::Until(now + wait), &cause).await;
        }
    }

    /// A reply says that the service is away for so long; whether it is the source that is away, by all that is known. The
    /// wait is believed up to `breaker.open_max`: who says a day is asked again before.
    pub(super) async fn heed_absence(&mut self, address: usize, said: Duration) -> bool {
        let now = Instant::now();
        let wait = said.min(self.breakers.open_max());
        let mut why = format!("the reply said that the service is away for {} (HTTP 503)", whole(said));
        if wait < said {
            why = format!("{why}; it is asked again after {} (breaker.open_max)", whole(wait));
        }
        match self.addresses.away(address, wait, now) {
            Away::Source => {
                self.open_for(wait, &why).await;
                true
            }
            Away::Address(None) => false,
            Away::Address(Some(wait)) => {
                let (source, name) = (&self.caller.source, self.caller.address_name(address));
                warn!(%source, address = name, ?wait, why, "the address is taken out; if another one hears the same, the source is away");
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
            warn!(%source, %account, ?scope, refusals, ?rest, share, ?spread, "refused beyond the promise: the pace gives way, and is tried again slowly. Is the limit right, does somebody else use the account, is quota.jitter less than the way's?");
        }
    }

    /// What a refusal means for the calls to come.
    pub(super) async fn react(&mut self, (account, address): (usize, usize), left_at: Instant, refusal: &Refusal) {
        let source = &self.caller.source;
        let alias = self.caller.alias(account);
        let cause = Cause::new(&refusal.code, self.caller.now());
        match &refusal.kind {
            RefusalKind::Throttled { scope, wait } => {
                debug!(%source, account = %alias, code = refusal.code, ?wait, ?scope, "the vendor says: too fast");
                let scope = match scope {
                    Affected::Account => Scope::Account(account),
                    Affected::Address => Scope::Address(address),
                    Affected::Everyone => Scope::Source,
                };
                self.slow_down(scope, account, left_at, *wait, &cause).await;
            }
            RefusalKind::Denied(Denial::Account) => {
                error!(%source, account = %alias, code = refusal.code, message = refusal.message, "the vendor refuses this account: it is disabled until `weir quota resume`, the others carry its load");
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
    pub(super) fn react_machine(&mut self, contact: &Contact) {
        let (source, now) = (&self.caller.source, Instant::now());
        match contact {
            Contact::Machine(why) => {
                if let Some(pause) = self.exhaustion.noted(now) {
                    warn!(%source, why, ?pause, "calls pause: their requests wait and spend no attempt");
                }
            }
            Contact::Unprocessed(why) => {
                debug!(%source, why, "the peer has not acted on a call; its requests wait for another slot");
            }
            Contact::Called(_) => {
                if self.exhaustion.over(now) {
                    info!(%source, "calls leave this machine again");
                }
            }
            Contact::None | Contact::NoWay(_) => {}
        }
    }

    /// What the end of a call means for the others from the same address.
    pub(super) async fn react_address(&mut self, ended: &Ended) {
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
                (self.addresses.forbidden(address, ended.account, now), "the vendor forbids its accounts (HTTP 403)")
            }
            Contact::Called(Some(_)) => {
                let is_unanswered = matches!(
                    kind,
                    Some(RefusalKind::Outage | RefusalKind::Unclear | RefusalKind::Malformed) if !ended.has_answer
                ) && !ended.is_one_items;
                let rest = if is_unanswered { self.addresses.unanswered(address, now) } else { None };
                if let Some(rest) = rest {
                    let last = ended.refusal.as_ref().map_or("", |refusal| refusal.message.as_str());
                    let why = format!("nothing is answered from here while other addresses are: {last}");
                    return self.take_out(address, rest, &why).await;
                }
                let back =
                    if ended.has_answer { self.addresses.answered(address) } else { self.addresses.replied(address) };
                if let Some(back) = back {
                    let (source, name) = (&self.caller.source, self.caller.address_name(address));
                    info!(%source, address = name, "the address is used again");
                    if let Some(tried_at) = back.tried_at {
                        self.quota.release(Scope::Address(address), tried_at).await;
                    }
                }
                return;
            }
        };
        let (source, name) = (&self.caller.source, self.caller.address_name(address));
        let Some(rest) = rest else {
            debug!(%source, address = name, why, "no way to the vendor; the requests wait for another slot");
            return;
        };
        let why = why.to_owned();
        self.take_out(address, rest, &why).await;
    }

    async fn take_out(&mut self, address: usize, rest: Duration, why: &str) {
        let (source, name) = (&self.caller.source, self.caller.address_name(address));
        warn!(%source, address = name, ?rest, why, "the address is taken out; its requests wait and spend no attempt");
        let cause = Cause::new(why, self.caller.now());
        self.quota.hold(Scope::Address(address), Hold::Until(Instant::now() + rest), &cause).await;
    }
}

/// A time as people read it, in whole seconds.
fn whole(time: Duration) -> humantime::FormattedDuration {
    humantime::format_duration(Duration::from_secs(time.as_secs().max(1)))
}
