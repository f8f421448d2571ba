//! One call, from signing to the records of its outcome.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;
use tracing::{Instrument as _, error, info_span};

use super::{
    call_facts::CallFacts,
    end::End,
    job::Job,
    outcome::Outcomes,
    reaction::{breakers::Tickets, splits::GroupId},
    stale,
};
use crate::{
    cache::Answer,
    kafka::outbox::Position,
    message::{AccountAlias, Request, SourceName, Via},
    platform::{
        Account, Common, Denial, HttpReply, Refusal, RefusalKind, Reply, Secrets, Vendor,
        http::{self, CallPermit, NoReply, Unprocessed},
        redact,
    },
    quota::{Scope, Slot, Tally, guard::Guard},
    runtime::{
        clock::{Clock, Dice, Timestamp},
        metrics::METRICS,
    },
    tokens::{
        TokenStore,
        keeper::{Keeper, Permit, Verdict},
    },
    topics::Topics,
};

/// What came of one call.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "facts of one call that have nothing to do with each other")]
pub(super) struct Ended {
    /// Its slot, if it is known that nothing left in it: nobody has paid for that.
    pub(super) unused: Option<Slot>,
    pub(super) account: usize,
    /// The address that it left from.
    pub(super) address: usize,
    /// How far it came.
    pub(super) contact: Contact,
    /// When its slot was.
    pub(super) left_at: Instant,
    /// When its reply came, or the end of the wait for one: outages are counted in this order, however long their
    /// records take.
    pub(super) replied_at: Instant,
    /// When it left, as exactly as can be known: what waited for a thread before it had run by then.
    pub(super) departed_at: Option<Instant>,
    /// How long the reply took, if there was one.
    pub(super) latency: Option<Duration>,
    /// What the reply's headers ask for.
    pub(super) advice: Advice,
    /// How many bytes the reply had.
    pub(super) bytes: usize,
    /// How each request ends.
    pub(super) outcomes: Vec<(Position, End)>,
    /// Or what they are made of, once older answers have been looked up for what has failed.
    pub(super) to_look_up: Option<Unrecorded>,
    /// Requests that were not called for: the slot had passed by the time that the call could leave, or there was
    /// no way to the vendor.
    pub(super) missed: Vec<Job>,
    /// A refusal that concerns more than one request's retry.
    pub(super) refusal: Option<Refusal>,
    /// Whether the vendor answered for any of its items.
    pub(super) has_answer: bool,
    /// The account's token is refused for good.
    pub(super) is_dead: bool,
    /// The account's credentials were replaced while the call was under way: that these are refused says nothing.
    pub(super) is_outdated: bool,
    /// What the breakers gave it.
    pub(super) tickets: Option<Tickets>,
    /// What it was made for.
    pub(super) travel: Travel,
    /// Its requests, if it was refused for what may be one item's or is every call's: nothing has become of them yet.
    pub(super) refused: Option<Unrecorded>,
    /// It was refused for what may be one item's, and there is no sign of more.
    pub(super) is_one_items: bool,
}

/// What a call was made for, beside what waits.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Travel {
    /// Its requests are of this group, that an earlier call has left.
    pub(super) group: Option<GroupId>,
    /// The fingerprint of the only request of a call that could have carried more.
    pub(super) alone: Option<u64>,
}

/// What the outcomes of a call are made of.
pub(super) struct Unrecorded {
    pub(super) jobs: Vec<Job>,
    pub(super) reply: Reply,
    pub(super) facts: CallFacts,
}

impl std::fmt::Debug for Unrecorded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unrecorded").field("jobs", &self.jobs).finish_non_exhaustive()
    }
}

/// The end of an exchange with the vendor.
struct Replied {
    reply: Reply,
    facts: CallFacts,
    advice: Advice,
    at: Instant,
    /// How long the body was.
    bytes: usize,
}

/// The end of one that counts as none.
struct Uncalled {
    contact: Contact,
    /// Requests that such a call was made for too often, which end by it.
    spent: Option<Unrecorded>,
}

impl From<Contact> for Uncalled {
    fn from(contact: Contact) -> Self {
        Self { contact, spent: None }
    }
}

/// How far a call came.
#[derive(Clone, Debug)]
pub(super) enum Contact {
    /// It did not leave.
    None,
    /// The address that it should have left from did not let it, for this reason. The vendor knows nothing of it.
    NoWay(String),
    /// This machine lacks something that a call needs.
    Machine(String),
    /// It left, and the peer has not acted on it.
    Unprocessed(String),
    /// It left; the HTTP status of the reply, if there was one.
    Called(Option<u16>),
}

impl Ended {
    /// Nothing has come of it yet.
    fn nothing(slot: &Slot, address: usize) -> Self {
        let (account, left_at, contact, replied_at) = (slot.account, slot.at, Contact::None, Instant::now());
        let (latency, advice, outcomes, missed, refusal) = (None, Advice::default(), vec![], vec![], None);
        let (to_look_up, has_answer, is_dead, tickets) = (None, false, false, None);
        let (travel, refused, is_one_items) = (Travel::default(), None, false);
        let departed_at = None;
        Self {
            unused: Some(slot.clone()),
            account,
            address,
            contact,
            left_at,
            replied_at,
            departed_at,
            latency,
            advice,
            bytes: 0,
            outcomes,
            to_look_up,
            missed,
            refusal,
            has_answer,
            is_dead,
            is_outdated: false,
            tickets,
            travel,
            refused,
            is_one_items,
        }
    }
}

/// What a reply's headers ask for, whatever else it says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Advice {
    /// The service is not there for so long, for nobody: 503 with `Retry-After`.
    pub(super) unavailable: Option<Duration>,
    /// The account has nothing left for so long.
    pub(super) used_up: Option<Duration>,
}

impl Advice {
    /// Headers count in whole seconds, rounded who knows how: one second may be none, and windows as short as that are
    /// what the pace is made for.
    const RESOLUTION: Duration = Duration::from_secs(1);

    pub(super) fn of(reply: &HttpReply) -> Self {
        Self {
            unavailable: if reply.status == 503 { reply.retry_after() } else { None },
            used_up: reply.used_up().filter(|wait| *wait > Self::RESOLUTION),
        }
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
    pub rng: Dice,
}

/// Makes the calls of one source.
pub struct Caller {
    pub(super) source: SourceName,
    pub(super) tokens: Arc<Keeper>,
    parts: CallerParts,
    outcomes: Arc<Outcomes>,
}

impl Caller {
    /// A caller made of these parts.
    #[must_use]
    pub fn new(parts: CallerParts) -> Self {
        let outcomes = Arc::new(Outcomes::new(parts.source.clone(), &parts.topics));
        let (source, store) = (parts.source.clone(), Arc::clone(&parts.tokens));
        let (clock, rng) = (parts.clock.clone(), parts.rng.clone());
        let tokens = Arc::new(Keeper::new(source, &parts.accounts, store, parts.client.timeout(), clock, rng));
        Self { source: parts.source.clone(), tokens, outcomes, parts }
    }

    #[cfg(test)]
    pub(super) fn guarded_by(self, guard: Guard) -> Self {
        Self::new(CallerParts { guard, ..self.parts })
    }

    /// What knows the credentials that its calls carry.
    #[must_use]
    pub fn keeper(&self) -> Arc<Keeper> {
        Arc::clone(&self.tokens)
    }

    pub(super) fn batch_max(&self) -> usize {
        self.parts.vendor.batch_max()
    }

    pub(super) fn accounts(&self) -> usize {
        self.parts.accounts.len()
    }

    pub(super) fn topics(&self) -> &Topics {
        &self.parts.topics
    }

    pub(super) fn outcomes(&self) -> &Arc<Outcomes> {
        &self.outcomes
    }

    pub(super) fn clock(&self) -> Clock {
        self.parts.clock.clone()
    }

    pub(super) fn rng(&self) -> Dice {
        self.parts.rng.clone()
    }

    pub(super) fn now(&self) -> Timestamp {
        self.parts.clock.now()
    }

    /// Counts for these accounts.
    pub(super) fn tally(&self) -> Arc<Tally> {
        let slots = |account: &Account| METRICS.slots(self.source.as_str(), account.alias.as_str());
        let tally = Tally::new(self.parts.accounts.len(), self.parts.clock.clone());
        Arc::new(tally.telling(self.parts.accounts.iter().map(slots).collect()))
    }

    pub(super) fn alias(&self, account: usize) -> &AccountAlias {
        &self.parts.accounts[account].alias
    }

    /// Makes one call for these requests in this slot. Always ends, at the latest with the client's time-out.
    pub(super) async fn call(
        self: Arc<Self>,
        slot: Slot,
        permit: CallPermit,
        mut jobs: Vec<Job>,
        travel: Travel,
    ) -> Ended {
        let (account, address) = (slot.account, slot.address);
        let first = &jobs[0];
        let attempt = first.request.calls.saturating_add(1);
        let span = info_span!(
            "call",
            source = %self.source, item = %first.request.item, request = %first.id, attempt,
            account = %self.alias(account), batch = first.request.batch.as_ref().map(tracing::field::display),
        );
        async {
            // On a busy machine time has passed since the slot was taken: a late call is not made up for.
            let Some(pass) = self.parts.guard.pass(&slot).await else {
                tracing::debug!("the slot was missed");
                return Ended { missed: Job::apart(jobs), ..Ended::nothing(&slot, address) };
            };
            // The token of this moment: another one may be there when the reply comes.
            let (caller, generation) = self.tokens.account(account);
            // The connection's task is woken by the call, and stands before what yields now in the queue for a thread.
            let departs = async {
                tokio::task::yield_now().await;
                Instant::now()
            };
            let (exchanged, departed_at) = tokio::join!(self.exchange(&caller, (address, &permit), &mut jobs), departs);
            match exchanged {
                Ok(Replied { reply, facts, advice, at, bytes }) => {
                    METRICS.call_items(self.source.as_str(), jobs.len());
                    let (refusal, has_answer) = sum_up(&reply);
                    let is_dead = self.judge_token(account, generation, refusal.as_ref()).await;
                    let is_outdated = self.tokens.is_outdated(account, generation);
                    let latency = facts.http_status.map(|_| facts.latency);
                    let contact = Contact::Called(facts.http_status);
                    let is_shared = jobs.len() > 1 || travel.group.is_some();
                    let is_open = matches!(&reply, Reply::Refused(refusal)
                        if refusal.common().is_some() || is_shared && refusal.may_be_one_items());
                    let unrecorded = Unrecorded { jobs, reply, facts };
                    let nothing = Ended {
                        unused: None,
                        replied_at: at,
                        departed_at: Some(departed_at),
                        is_outdated,
                        ..Ended::nothing(&slot, address)
                    };
                    if is_open {
                        let refused = Some(unrecorded);
                        return Ended { contact, latency, advice, bytes, refusal, is_dead, refused, ..nothing };
                    }
                    let (outcomes, to_look_up) = self.record_at_once(unrecorded);
                    Ended {
                        contact,
                        latency,
                        advice,
                        bytes,
                        outcomes,
                        to_look_up,
                        refusal,
                        has_answer,
                        is_dead,
                        ..nothing
                    }
                }
                Err(Uncalled { contact, spent }) => {
                    let nothing = Ended::nothing(&slot, address);
                    // What the peer has not acted on it may have counted all the same.
                    let unused = if matches!(contact, Contact::Unprocessed(_)) {
                        None
                    } else {
                        self.parts.guard.give_back(&slot, pass);
                        nothing.unused
                    };
                    let refusal = spent.as_ref().and_then(|spent| sum_up(&spent.reply).0);
                    let (outcomes, to_look_up) = spent.map(|spent| self.record_at_once(spent)).unwrap_or_default();
                    let missed = Job::apart(jobs);
                    Ended { unused, contact, outcomes, to_look_up, missed, refusal, ..Ended::nothing(&slot, address) }
                }
            }
        }
        .instrument(span)
        .await
    }

    /// What a reply says of the token that its call carried; whether the account is out of use with it.
    async fn judge_token(&self, account: usize, generation: u64, refusal: Option<&Refusal>) -> bool {
        match refusal {
            None => self.tokens.accepted(account, generation),
            Some(refusal) if refusal.kind == RefusalKind::Denied(Denial::Token) => {
                return self.tokens.refused(account, generation, refusal).await == Verdict::Dead;
            }
            Some(_) => {}
        }
        false
    }

    /// Spends the slot on a renewal of its account's token.
    pub(super) async fn renew(self: Arc<Self>, slot: Slot, room: CallPermit) -> Ended {
        let (account, nothing) = (slot.account, Ended::nothing(&slot, slot.address));
        let Some(permit) = self.tokens.begin(account).await else { return nothing };
        let caller = Arc::clone(&self);
        let renewal = async move { caller.renew_under(permit, &slot, &room).await };
        // Once the vendor has renewed a token the old one may be dead: the new one is stored even if the stage ends.
        #[allow(clippy::disallowed_methods, reason = "awaited right here; it ends with the client's time-out")]
        let renewal = tokio::spawn(renewal);
        renewal.await.unwrap_or_else(|error| {
            error!(source = %self.source, account = %self.alias(account), %error, "token renewal ended abnormally");
            self.tokens.give_up(account);
            // Perhaps it has left.
            Ended { unused: None, ..nothing }
        })
    }

    async fn renew_under(&self, permit: Permit, slot: &Slot, room: &CallPermit) -> Ended {
        let nothing = Ended::nothing(slot, slot.address);
        // Last, as for a call: the claim and the way into this task have taken their time.
        let Some(pass) = self.parts.guard.pass(slot).await else {
            self.tokens.keep(permit);
            return nothing;
        };
        let vendor = &self.parts.vendor;
        let Some(exchange) = vendor.prepare_renewal(&permit.account, self.parts.clock.now()) else {
            let message = "this vendor's tokens cannot be renewed".to_owned();
            let refusal = Refusal { kind: RefusalKind::Bug, code: "token".to_owned(), message };
            self.parts.guard.give_back(slot, pass);
            let is_dead = self.tokens.finish(permit, Err(refusal)).await == Verdict::Dead;
            return Ended { is_dead, ..nothing };
        };
        let (renewed, contact, advice) = match self.parts.client.exchange_within(room, slot.address, &exchange).await {
            Ok(reply) => (vendor.interpret_renewal(&reply), Contact::Called(Some(reply.status)), Advice::of(&reply)),
            Err(NoReply::Refused(refusal)) => (Err(refusal), Contact::Called(None), Advice::default()),
            Err(NoReply::Unprocessed(Unprocessed { refusal, is_certain: false })) => {
                (Err(refusal), Contact::Called(None), Advice::default())
            }
            Err(NoReply::Address(why)) => {
                let why = redact(&permit.account, &why).into_owned();
                self.parts.guard.give_back(slot, pass);
                self.tokens.put_back(permit).await;
                return Ended { contact: Contact::NoWay(why), ..nothing };
            }
            Err(NoReply::Machine(why)) => {
                self.parts.guard.give_back(slot, pass);
                self.tokens.put_back(permit).await;
                return Ended { contact: Contact::Machine(why), ..nothing };
            }
            Err(NoReply::Unprocessed(Unprocessed { refusal, is_certain: true })) => {
                let why = redact(&permit.account, &refusal.message).into_owned();
                self.tokens.put_back(permit).await;
                return Ended { unused: None, contact: Contact::Unprocessed(why), ..nothing };
            }
        };
        let refusal = renewed.as_ref().err().map(|refusal| refusal.clone().redacted(&permit.account));
        // What is denied is between the keeper and the vendor.
        let refusal = refusal.filter(|refusal| !matches!(refusal.kind, RefusalKind::Denied(_)));
        let is_dead = self.tokens.finish(permit, renewed).await == Verdict::Dead;
        Ended { unused: None, contact, advice, refusal, is_dead, ..nothing }
    }

    /// What a call is called that leaves from this address.
    pub(super) fn address_name(&self, address: usize) -> &str {
        self.parts.client.address_name(address)
    }

    /// What the log calls it.
    pub(super) fn scope_name(&self, scope: Scope) -> String {
        match scope {
            Scope::Account(account) => format!("account {}", self.alias(account)),
            Scope::Address(address) => format!("address {}", self.address_name(address)),
            Scope::Source => "the source".to_owned(),
        }
    }

    /// Room for one more call from this address, if there is any.
    pub(super) fn permit(&self, address: usize) -> Option<CallPermit> {
        self.parts.client.permit(address)
    }

    pub(super) fn addresses(&self) -> usize {
        self.parts.client.addresses()
    }

    /// A call that the peer says it has not acted on is made again so often, at other slots; then it counts as one that
    /// the source does not answer, if that is so for all that it asks for; else only those requests fail.
    const UNPROCESSED: u8 = 3;

    /// The same where only a connection was closed that had been idle.
    const IDLE_CLOSES: u8 = 1;

    /// The vendor's reply; or why the call counts as none.
    async fn exchange(
        &self,
        account: &Account,
        (address, permit): (usize, &CallPermit),
        jobs: &mut Vec<Job>,
    ) -> Result<Replied, Uncalled> {
        let requests: Vec<&Request> = jobs.iter().map(|job| &job.request).collect();
        // Signed here and not earlier: signatures and timestamps go stale.
        let exchange = self.parts.vendor.prepare(account, &requests, self.parts.clock.now());
        let started = Instant::now();
        let result = self.parts.client.exchange_within(permit, address, &exchange).await;
        let at = Instant::now();
        let mut facts = CallFacts {
            account: account.alias.clone(),
            ended_at: self.parts.clock.now(),
            latency: at - started,
            http_status: None,
        };
        let (mut advice, mut bytes) = (Advice::default(), 0);
        let reply = match result {
            Ok(reply) => {
                facts.http_status = Some(reply.status);
                advice = Advice::of(&reply);
                bytes = reply.body.len();
                with_clock(self.understand(&requests, &reply), facts.ended_at, reply.date())
            }
            Err(NoReply::Refused(refusal)) => Reply::Refused(refusal),
            Err(NoReply::Address(why)) => return Err(Contact::NoWay(redact(account, &why).into_owned()).into()),
            Err(NoReply::Machine(why)) => return Err(Contact::Machine(why).into()),
            Err(NoReply::Unprocessed(Unprocessed { refusal, is_certain })) => {
                let most = if is_certain { Self::UNPROCESSED } else { Self::IDLE_CLOSES };
                let is_spent = |job: &Job| job.unprocessed >= most;
                let all_spent = jobs.iter().all(|job| is_spent(job) && job.coalesced.iter().all(is_spent));
                if !all_spent {
                    let mut left = Job::apart(std::mem::take(jobs));
                    let spent: Vec<Job> = left.extract_if(.., |job| is_spent(job)).collect();
                    for job in &mut left {
                        job.unprocessed += 1;
                    }
                    *jobs = left;
                    let contact = Contact::Unprocessed(redact(account, &refusal.message).into_owned());
                    let reply = Reply::Refused(refusal).without(&Secrets::of(account).with_sent(&exchange));
                    let spent = (!spent.is_empty()).then_some(Unrecorded { jobs: spent, reply, facts });
                    return Err(Uncalled { contact, spent });
                }
                Reply::Refused(refusal)
            }
        };
        tracing::debug!(latency = ?facts.latency, status = facts.http_status, "called");
        let reply = reply.without(&Secrets::of(account).with_sent(&exchange));
        Ok(Replied { reply, facts, advice, at, bytes })
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
            Ok(understood) if !understood.is_for(requests.len()) => {
                refused(RefusalKind::Malformed, "reply.count", "the reply lacks items of the call")
            }
            Ok(mut understood) => {
                understood.quote(&reply.body);
                understood.at_once()
            }
            Err(_) => refused(
                RefusalKind::Bug,
                "reply.panic",
                "weir failed to read the reply: a defect in its code for this vendor",
            ),
        }
    }

    /// Looks up older answers for what has failed; then the records of each request.
    pub(super) async fn look_up(self: Arc<Self>, mut unrecorded: Unrecorded) -> Vec<(Position, End)> {
        stale::recall(&mut unrecorded.jobs).await;
        self.record(unrecorded)
    }

    /// How each request ends; or what they are made of, if older answers are to be looked up first.
    pub(super) fn record_at_once(&self, unrecorded: Unrecorded) -> (Vec<(Position, End)>, Option<Unrecorded>) {
        if has_outage(&unrecorded.reply) && stale::is_to_recall(&unrecorded.jobs) {
            return (Vec::new(), Some(unrecorded));
        }
        (self.record(unrecorded), None)
    }

    /// How each request ends.
    fn record(&self, Unrecorded { jobs, reply, facts }: Unrecorded) -> Vec<(Position, End)> {
        let record = |mut job: Job, answer: Result<Arc<Answer>, Refusal>, via: Via| match answer {
            Ok(answer) => {
                if let Some(flight) = job.single_flight.take() {
                    flight.answered(&answer, &facts, &via);
                }
                (job.position.clone(), End::Result(Box::new(job), answer, facts.clone(), via))
            }
            Err(refusal) => stale::failed(&self.outcomes, job, &refusal, &facts),
        };
        let answers = reply.each(jobs.len());
        let mut outcomes = Vec::with_capacity(jobs.len());
        for (mut job, answer) in jobs.into_iter().zip(answers) {
            let answer = answer.map(|answer| Arc::new(Answer::from(answer)));
            for other in std::mem::take(&mut job.coalesced) {
                outcomes.push(record(other, answer.clone(), Via::Cache));
            }
            outcomes.push(record(job, answer, Via::Call));
        }
        outcomes
    }
}

/// A refusal that may concern more than one request, and whether there is any answer.
fn sum_up(reply: &Reply) -> (Option<Refusal>, bool) {
    let has_answer = matches!(reply, Reply::Each(answers) if answers.iter().any(Result::is_ok));
    (reply.refusals().next_back().cloned(), has_answer)
}

fn has_outage(reply: &Reply) -> bool {
    reply.refusals().any(Refusal::is_outage)
}

/// A refusal of this machine's time says how its clock goes.
fn with_clock(mut reply: Reply, now: Timestamp, date: Option<Timestamp>) -> Reply {
    if let Reply::Refused(refusal) = &mut reply
        && refusal.common() == Some(Common::Clock)
    {
        refusal.message = format!("{}; {}", refusal.message, clock_words(now, date));
    }
    reply
}

/// How this machine's clock goes by the `Date` of a reply.
fn clock_words(now: Timestamp, date: Option<Timestamp>) -> String {
    let Some(date) = date else {
        return "the reply has no Date to compare this machine's clock with".to_owned();
    };
    let (ahead, behind) = (now.since(date), date.since(now));
    let whole = |time: Duration| humantime::format_duration(Duration::from_secs(time.as_secs()));
    if ahead.max(behind) < Duration::from_secs(2) {
        // It counts in whole seconds.
        "this machine's clock agrees with the reply's Date to within 2s: does the vendor expect another time zone?"
            .to_owned()
    } else if ahead > behind {
        format!("this machine's clock is {} ahead of the reply's Date", whole(ahead))
    } else {
        format!("this machine's clock is {} behind the reply's Date", whole(behind))
    }
}
