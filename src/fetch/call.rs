//! One call, from signing to the records of its outcome.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;
use tracing::{Instrument as _, error, info_span};

use super::outcome::{CallFacts, Outcomes};
use crate::{
    kafka::{Outgoing, Record, outbox::Position},
    message::{
        AccountAlias, DeadLetter, Reason, Request, RequestId, SourceName,
        codec::{self, Received},
        trace,
    },
    platform::{Account, Answer, Denial, HttpReply, Refusal, RefusalKind, Reply, Vendor, http},
    quota::{Slot, guard::Guard},
    runtime::clock::{Clock, Dice, Timestamp},
    tokens::{
        TokenStore,
        keeper::{Keeper, Verdict},
    },
    topics::Topics,
};

/// A request on its way through fetch.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) position: Position,
    pub(super) id: RequestId,
    pub(super) request: Request,
    pub(super) traceparent: String,
}

impl Job {
    /// Whether both can travel in one call: all that changes the reply but the item is the same.
    pub(super) fn goes_with(&self, other: &Self) -> bool {
        self.request.params == other.request.params
    }
}

/// What came of one call.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) account: usize,
    /// The records of each request.
    pub(super) outcomes: Vec<(Position, Vec<Outgoing>)>,
    /// Requests that were not called for, since the slot had passed by the time that the call could leave.
    pub(super) missed: Vec<Job>,
    /// A refusal that concerns more than one request's retry.
    pub(super) refusal: Option<Refusal>,
    /// The account's token is refused for good.
    pub(super) is_dead: bool,
}

impl Ended {
    /// The slot was spent, and nobody's request with it.
    fn nothing(account: usize) -> Self {
        Self { account, outcomes: vec![], missed: vec![], refusal: None, is_dead: false }
    }
}

/// What a caller is made of.
pub struct CallerParts {
    /// The source.
    pub source: SourceName,
    /// Its protocol.
    pub vendor: Arc<dyn Vendor>,
    /// Its HTTP client.
    pub client: http::Client,
    /// Its accounts, in the order of the quota's.
    pub accounts: Arc<[Account]>,
    /// Where their renewed tokens are kept.
    pub tokens: Arc<dyn TokenStore>,
    /// The guard at the last door.
    pub guard: Guard,
    /// The topics' names.
    pub topics: Topics,
    /// The time of day.
    pub clock: Clock,
    /// Randomness for trace ids.
    pub dice: Dice,
}

/// Makes the calls of one source.
pub struct Caller {
    pub(super) source: SourceName,
    pub(super) tokens: Arc<Keeper>,
    parts: CallerParts,
    outcomes: Outcomes,
}

impl Caller {
    /// A caller made of these parts.
    #[must_use]
    pub fn new(parts: CallerParts) -> Self {
        let outcomes = Outcomes::new(parts.source.clone(), &parts.topics);
        let (source, store) = (parts.source.clone(), Arc::clone(&parts.tokens));
        let (clock, dice) = (parts.clock.clone(), parts.dice.clone());
        let tokens = Arc::new(Keeper::new(source, &parts.accounts, store, parts.client.timeout(), clock, dice));
        Self { source: parts.source.clone(), tokens, outcomes, parts }
    }

    pub(super) fn batch_max(&self) -> usize {
        self.parts.vendor.batch_max()
    }

    pub(super) fn alias(&self, account: usize) -> &AccountAlias {
        &self.parts.accounts[account].alias
    }

    /// Reads a record as a request to call for; else its dead letter.
    pub(super) fn receive(&self, position: Position, record: &Record) -> Result<Job, (Position, Vec<Outgoing>)> {
        let now = self.parts.clock.now();
        let raw = record.raw(&position.partition);
        let traceparent = trace::continued(raw.traceparent(), &self.parts.dice);
        let dead = match codec::read_request(&raw, &self.source) {
            Ok(received) if is_expired(&received.request, now) => expired(received, &raw, &self.source, now),
            Ok(Received { id, request }) => return Ok(Job { position, id, request, traceparent }),
            Err(why) => codec::dead_letter(&raw, &self.source, &why, now),
        };
        let records = self.outcomes.dead_letter(&dead, &traceparent);
        Err((position, records))
    }

    /// Makes one call for these requests in this slot. Always ends, at the latest with the client's time-out.
    pub(super) async fn call(self: Arc<Self>, slot: Slot, jobs: Vec<Job>) -> Ended {
        let account = slot.account;
        let first = &jobs[0];
        let attempt = first.request.calls.saturating_add(1);
        let span = info_span!(
            "call",
            source = %self.source, item = %first.request.item, request = %first.id, attempt,
            account = %self.alias(account), batch = first.request.batch.as_ref().map(tracing::field::display),
        );
        async {
            self.parts.guard.pass(account).await;
            // On a busy machine time has passed since the slot was taken: a late call is not made up for.
            if slot.is_late(Instant::now()) {
                tracing::debug!("the slot was missed");
                return Ended { missed: jobs, ..Ended::nothing(account) };
            }
            // The token of this moment: another one may be there when the reply comes.
            let (caller, generation) = self.tokens.account(account);
            let (reply, facts) = self.exchange(&caller, &jobs).await;
            let mut ended = self.conclude(account, &caller, jobs, reply, &facts);
            match &ended.refusal {
                None => self.tokens.accepted(account, generation),
                Some(refusal) if refusal.kind == RefusalKind::Denied(Denial::Token) => {
                    ended.is_dead = self.tokens.refused(account, generation, refusal).await == Verdict::Dead;
                }
                Some(_) => {}
            }
            ended
        }
        .instrument(span)
        .await
    }

    /// Spends the slot on a renewal of its account's token.
    pub(super) async fn renew(self: Arc<Self>, slot: Slot) -> Ended {
        let account = slot.account;
        self.parts.guard.pass(account).await;
        let Some(permit) = self.tokens.begin(account).await else { return Ended::nothing(account) };
        if slot.is_late(Instant::now()) {
            self.tokens.keep(permit);
            return Ended::nothing(account);
        }
        let caller = Arc::clone(&self);
        let renewal = async move {
            let now = caller.parts.clock.now();
            let renewed = if let Some(exchange) = caller.parts.vendor.prepare_renewal(&permit.account, now) {
                let reply = caller.parts.client.exchange(&exchange).await;
                reply.and_then(|reply| caller.parts.vendor.interpret_renewal(&reply))
            } else {
                let message = "this vendor's tokens cannot be renewed".to_owned();
                Err(Refusal { kind: RefusalKind::Bug, code: "token".to_owned(), message })
            };
            let refusal = renewed.as_ref().err().map(|refusal| refusal.clone().redacted(&permit.account));
            (caller.tokens.finish(permit, renewed).await, refusal)
        };
        // Once the vendor has renewed a token the old one may be dead: the new one is stored even if the stage ends.
        #[allow(clippy::disallowed_methods, reason = "awaited right here; it ends with the client's time-out")]
        let renewal = tokio::spawn(renewal);
        match renewal.await {
            Ok((verdict, refusal)) => {
                // Only a throttle concerns others; the rest is between the keeper and the vendor.
                let refusal = refusal.filter(|refusal| matches!(refusal.kind, RefusalKind::Throttled { .. }));
                Ended { refusal, is_dead: verdict == Verdict::Dead, ..Ended::nothing(account) }
            }
            Err(error) => {
                error!(source = %self.source, account = %self.alias(account), %error, "a renewal ended abnormally");
                self.tokens.give_up(account);
                Ended::nothing(account)
            }
        }
    }

    async fn exchange(&self, account: &Account, jobs: &[Job]) -> (Reply, CallFacts) {
        let requests: Vec<&Request> = jobs.iter().map(|job| &job.request).collect();
        // Signed here and not earlier: signatures and timestamps go stale.
        let exchange = self.parts.vendor.prepare(account, &requests, self.parts.clock.now());
        let started = Instant::now();
        let result = self.parts.client.exchange(&exchange).await;
        let mut facts = CallFacts {
            account: account.alias.clone(),
            ended_at: self.parts.clock.now(),
            latency: started.elapsed(),
            http_status: None,
        };
        let reply = match result {
            Ok(reply) => {
                facts.http_status = Some(reply.status);
                self.understand(&requests, &reply)
            }
            Err(refusal) => Reply::Refused(refusal),
        };
        tracing::debug!(latency = ?facts.latency, status = facts.http_status, "called");
        (reply, facts)
    }

    /// What the vendor's reply means: something for each request, whatever the vendor's code does.
    pub(super) fn understand(&self, requests: &[&Request], reply: &HttpReply) -> Reply {
        let refused = |kind, code: &str, message: &str| {
            Reply::Refused(Refusal { kind, code: code.to_owned(), message: message.to_owned() })
        };
        // Pure code without anything shared: a panic leaves nothing half done. One reply that it cannot stand
        // would else end the stage at every start.
        let understood = AssertUnwindSafe(|| self.parts.vendor.interpret(requests, reply));
        match catch_unwind(understood) {
            Ok(Reply::Each(answers)) if answers.len() != requests.len() => {
                refused(RefusalKind::Malformed, "reply.count", "the reply does not answer for each item of the call")
            }
            Ok(reply) => reply,
            Err(_) => refused(RefusalKind::Bug, "reply.panic", "weir's code for this vendor failed at the reply"),
        }
    }

    /// `caller` is the account with the tokens that the call carried.
    fn conclude(&self, account: usize, caller: &Account, jobs: Vec<Job>, reply: Reply, facts: &CallFacts) -> Ended {
        let mut worst = None;
        let mut conclude = |job: Job, answer: Result<Answer, Refusal>| {
            let records = match answer {
                Ok(answer) => self.outcomes.result(&job, answer, facts),
                Err(refusal) => {
                    let refusal = refusal.redacted(caller);
                    let records = self.outcomes.failure(&job, &refusal, facts);
                    worst = Some(refusal);
                    records
                }
            };
            (job.position, records)
        };
        let outcomes = match reply {
            Reply::Each(answers) => jobs.into_iter().zip(answers).map(|(job, answer)| conclude(job, answer)).collect(),
            Reply::Refused(refusal) => jobs.into_iter().map(|job| conclude(job, Err(refusal.clone()))).collect(),
        };
        Ended { outcomes, refusal: worst, ..Ended::nothing(account) }
    }
}

fn is_expired(request: &Request, now: Timestamp) -> bool {
    request.expires_at.is_some_and(|at| now.since(at) > Duration::ZERO)
}

fn expired(received: Received, raw: &codec::Raw<'_>, source: &SourceName, now: Timestamp) -> DeadLetter {
    DeadLetter {
        request_id: received.id,
        source: source.clone(),
        reason: Reason::Expired,
        message: "its expires_at had passed before it was called for".to_owned(),
        died_at: now,
        origin: raw.origin(),
        request: Some(received.request),
        original_base64: None,
    }
}
