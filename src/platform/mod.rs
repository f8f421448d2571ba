//! The vendors behind one trait: what to send for a request, and what a reply means. All of it pure.
//!
//! [`Vendor::prepare`] and [`Vendor::interpret`] do no I/O, so every rule of a vendor's protocol can be tested
//! with a table; [`http`] is the only user of the HTTP client. A call serves one or many requests: a vendor
//! with a batch API says so in [`Vendor::batch_max`].

pub mod accounts;
pub mod address;
pub mod ali1688;
pub mod config;
mod content;
pub mod credentials;
pub mod exchange;
pub mod headers;
pub mod hints;
pub mod http;
mod limits;
mod names;
mod params;
pub mod pick;
pub mod preset;
pub mod private;
mod problem;
pub mod protocol;
#[cfg(test)]
pub(crate) mod proxies;
mod reading;
mod redact;
pub mod reseller;
pub mod route;
pub mod secrets;
mod shortage;
mod structured;
pub mod taobao;

use std::time::Duration;

use secrecy::SecretString;
use serde_json::value::RawValue;

pub use accounts::Account;
pub use config::{OpenError, Source, SourceConfig};
pub use exchange::{Body, Exchange, HttpReply, Method};
pub use headers::Headers;
pub use problem::Problem;
pub use protocol::Protocol;
pub use redact::{Secrets, redact};

use crate::{
    cache,
    message::{Class, Columns, Request, Status},
    runtime::clock::Timestamp,
};

/// What the vendor said about one request.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Found, absent or off the shelf.
    pub status: Status,
    /// What could be read into columns.
    pub columns: Columns,
    /// The vendor's JSON for the item, byte for byte; once [`Answer::without`] has been there, but for secrets.
    pub raw: Option<Box<RawValue>>,
}

/// The vendor's refusal, or our failure to understand it, for one request or for all of a call alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What kind, and what follows from it.
    pub kind: RefusalKind,
    /// The vendor's code, or ours for transport.
    pub code: String,
    /// The vendor's words, shortened.
    pub message: String,
}

/// What follows from a refusal. The exhaustive counterpart of `vendors.md` section 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RefusalKind {
    /// Too fast: nobody within `scope` calls for `wait`; `None` = the vendor gave no time, back off by doubling.
    Throttled {
        /// Who has to wait.
        scope: Affected,
        /// For how long.
        wait: Option<Duration>,
    },
    /// The account is refused; others may serve.
    Denied(Denial),
    /// The vendor or the way to it is broken.
    Outage,
    /// An error of which it is not known whether what was asked for is to blame for it, or the vendor.
    Unclear,
    /// A reply that makes no sense.
    Malformed,
    /// What all calls of the source have in common is refused, whatever they ask for: repeating helps once that is mended.
    Misconfigured(Common),
    /// Our request is wrong; repeating it cannot help.
    Bug,
}

/// Whom a throttle concerns.
///
/// A source is one API of a vendor, and its accounts are used for nothing else here. So what the vendor bans per account
/// (TOP's `limited-by-app-access-count`, `gw.QosAppFrequencyLimit`, Pangolin's 4029) and what it bans per account *and*
/// API (`limited-by-app-api-access-count`) are both [`Self::Account`]: the other accounts go on. What it bans per API for
/// all its callers (`limited-by-api-access-count`, `gw.QosAPIFrequencyLimit`, an overloaded service's 503) is
/// [`Self::Everyone`]. The same credentials under two sources are two accounts: a ban of one says nothing of the other,
/// which learns of it by a refusal of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Affected {
    /// The account that called.
    Account,
    /// Every account that calls from the same address.
    Address,
    /// Every account: switching does not help.
    Everyone,
}

/// What all calls of a source have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Common {
    /// This machine's clock, by which calls are signed.
    Clock,
    /// The form: protocol, method, version.
    Form,
    /// The parameters. One of them is the item's, and requests may have some of their own: it takes other calls to tell
    /// whether all are refused.
    Params,
    /// When the answer comes: later, and this source is not set up to take it. Some vendors do so to slow calls alone: it
    /// takes other calls to tell.
    Later,
}

/// Why an account was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denial {
    /// Its token has to be renewed.
    Token,
    /// Its key or secret is wrong, or it lacks the permission for this API.
    Account,
}

impl Refusal {
    /// The refusal without anything secret of the account that called: vendors echo what they were sent.
    ///
    /// [`Vendor::interpret`] does not know the account, so whoever called does this before the refusal goes
    /// anywhere.
    #[must_use]
    pub fn redacted(self, account: &Account) -> Self {
        self.without(&Secrets::of(account))
    }

    /// The refusal without any of these.
    #[must_use]
    pub fn without(self, secrets: &Secrets) -> Self {
        let code = secrets.hide_in_code(&self.code).into_owned();
        Self { kind: self.kind, code, message: secrets.hide(&self.message).into_owned() }
    }

    /// Whether the vendor would not serve the account, rather than could not.
    #[must_use]
    pub const fn is_no(&self) -> bool {
        matches!(self.kind, RefusalKind::Throttled { .. } | RefusalKind::Denied(_))
    }

    /// Whether it can be for one of several items of a call, the others of which would be answered without it.
    #[must_use]
    pub const fn may_be_one_items(&self) -> bool {
        match self.kind {
            RefusalKind::Unclear | RefusalKind::Malformed | RefusalKind::Bug => true,
            RefusalKind::Throttled { .. }
            | RefusalKind::Denied(_)
            | RefusalKind::Outage
            | RefusalKind::Misconfigured(_) => false,
        }
    }

    /// What of all calls is refused, if that is said.
    #[must_use]
    pub const fn common(&self) -> Option<Common> {
        if let RefusalKind::Misconfigured(common) = self.kind { Some(common) } else { None }
    }

    /// Whether an older answer is better than this.
    #[must_use]
    pub const fn is_outage(&self) -> bool {
        matches!(self.kind, RefusalKind::Outage | RefusalKind::Unclear)
    }

    /// The class for records.
    #[must_use]
    pub const fn class(&self) -> Class {
        match self.kind {
            RefusalKind::Throttled { .. } => Class::Throttled,
            RefusalKind::Denied(_) => Class::Denied,
            RefusalKind::Outage | RefusalKind::Unclear => Class::Outage,
            RefusalKind::Malformed => Class::Malformed,
            RefusalKind::Misconfigured(_) | RefusalKind::Bug => Class::Bug,
        }
    }
}

impl Answer {
    /// The answer without any of these: vendors echo what they were sent, with good answers too.
    #[must_use]
    pub fn without(self, secrets: &Secrets) -> Self {
        let clean = self.raw.as_deref().and_then(|raw| secrets.hide_in_json(raw));
        Self { raw: clean.or(self.raw), ..self }
    }
}

impl From<Answer> for cache::Answer {
    fn from(Answer { status, columns, raw }: Answer) -> Self {
        let fingerprint = columns.fingerprint(status);
        Self { status, columns, fingerprint, raw }
    }
}

impl Reply {
    /// The reply without any of these.
    #[must_use]
    pub fn without(self, secrets: &Secrets) -> Self {
        let refused = |refusal: Refusal| refusal.without(secrets);
        let each = |answer: Result<Answer, Refusal>| answer.map(|answer| answer.without(secrets)).map_err(refused);
        match self {
            Self::Each(answers) => Self::Each(answers.into_iter().map(each).collect()),
            Self::Pending(tasks) => Self::Pending(tasks.into_iter().map(|task| task.map_err(refused)).collect()),
            Self::Refused(refusal) => Self::Refused(refusal.without(secrets)),
        }
    }

    /// Whether it says something of each of so many requests.
    #[must_use]
    pub fn is_for(&self, requests: usize) -> bool {
        match self {
            Self::Each(answers) => answers.len() == requests,
            Self::Pending(tasks) => tasks.len() == requests,
            Self::Refused(_) => true,
        }
    }

    /// The refusals in it.
    pub fn refusals(&self) -> impl DoubleEndedIterator<Item = &Refusal> {
        let (answers, tasks, whole) = match self {
            Self::Each(answers) => (answers.as_slice(), [].as_slice(), None),
            Self::Pending(tasks) => ([].as_slice(), tasks.as_slice(), None),
            Self::Refused(refusal) => ([].as_slice(), [].as_slice(), Some(refusal)),
        };
        let answers = answers.iter().filter_map(|answer| answer.as_ref().err());
        answers.chain(tasks.iter().filter_map(|task| task.as_ref().err())).chain(whole)
    }

    /// What it means to whoever takes no later answers: what the vendor would answer later is refused, as
    /// [`Common::Later`].
    #[must_use]
    pub fn at_once(self) -> Self {
        let Self::Pending(tasks) = self else { return self };
        if !tasks.is_empty() && tasks.iter().all(Result::is_ok) {
            let names: Vec<_> = tasks.iter().flatten().map(|Task(name)| name.as_str()).collect();
            return Self::Refused(later(&names.join(", ")));
        }
        let refused = |task: Result<Task, Refusal>| match task {
            Ok(Task(name)) => Err(later(&name)),
            Err(refusal) => Err(refusal),
        };
        Self::Each(tasks.into_iter().map(refused).collect())
    }

    /// What each of so many requests gets at once.
    #[must_use]
    pub fn each(self, requests: usize) -> Vec<Result<Answer, Refusal>> {
        match self.at_once() {
            Self::Each(answers) => answers,
            Self::Refused(refusal) => vec![Err(refusal); requests],
            Self::Pending(_) => Vec::new(),
        }
    }
}

/// The refusal of what the vendor answers later.
fn later(tasks: &str) -> Refusal {
    let message = format!("the vendor answers later (as {tasks}), which this source is not set up for");
    reading::refusal(RefusalKind::Misconfigured(Common::Later), "pending", &message)
}

/// What a call came to, request by request.
#[derive(Clone, Debug)]
pub enum Reply {
    /// One entry per request of the call, in the same order.
    Each(Vec<Result<Answer, Refusal>>),
    /// The vendor has taken the requests on and answers later: what it calls each, in the same order. Several may be one
    /// task.
    Pending(Vec<Result<Task, Refusal>>),
    /// The whole call was refused: all of its requests alike.
    Refused(Refusal),
}

impl Reply {
    /// Lets each refusal of what makes no sense say how the reply begins: who reads it may know what it is.
    pub fn quote(&mut self, body: &[u8]) {
        let refusals: Vec<&mut Refusal> = match self {
            Self::Refused(refusal) => vec![refusal],
            Self::Each(answers) => answers.iter_mut().filter_map(|answer| answer.as_mut().err()).collect(),
            Self::Pending(tasks) => tasks.iter_mut().filter_map(|task| task.as_mut().err()).collect(),
        };
        for refusal in refusals.into_iter().filter(|refusal| refusal.kind == RefusalKind::Malformed) {
            refusal.message = format!("{}; the reply begins: {}", refusal.message, reading::beginning(body));
        }
    }
}

/// What a vendor calls the work that it has taken on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task(pub String);

/// What a vendor gave for a refresh token, or for the code of a user who authorised the app.
#[derive(Clone, Debug)]
pub struct Tokens {
    /// Proves the user's authorisation (1688: access token, TOP: session).
    pub access_token: SecretString,
    /// For how long from now, if the vendor says so.
    pub lives: Option<Duration>,
    /// Renews it; nothing: the one that was sent still counts.
    pub refresh_token: Option<SecretString>,
    /// When that one expires, if the vendor says so.
    pub refresh_until: Option<Timestamp>,
}

/// A vendor API.
pub trait Vendor: Send + Sync {
    /// The most requests that one call can carry.
    fn batch_max(&self) -> usize;

    /// The exchange for these requests, signed for `account` at `now`. Made anew for every attempt, since
    /// signatures and timestamps go stale.
    fn prepare(&self, account: &Account, requests: &[&Request], now: Timestamp) -> Exchange;

    /// What the reply means. Never fails: what cannot be understood is [`RefusalKind::Malformed`].
    fn interpret(&self, requests: &[&Request], reply: &HttpReply) -> Reply;

    /// The columns of an item from the JSON that was kept of it ([`Answer::raw`]), as they are read today; `None` if
    /// it holds no product, or this vendor's code cannot tell.
    fn columns(&self, _raw: &RawValue) -> Option<Columns> {
        None
    }

    /// The exchange that renews the account's token; nothing if the vendor has none, or the account nothing to renew
    /// it with.
    fn prepare_renewal(&self, account: &Account, now: Timestamp) -> Option<Exchange> {
        let _ = (account, now);
        None
    }

    /// What the reply to that exchange means, or to [`Vendor::prepare_authorisation`]'s.
    ///
    /// # Errors
    /// The refusal. [`RefusalKind::Denied`]: only a new authorisation can help.
    fn interpret_renewal(&self, reply: &HttpReply) -> Result<Tokens, Refusal> {
        let _ = reply;
        let message = "this vendor has no tokens that are renewed".to_owned();
        Err(Refusal { kind: RefusalKind::Bug, code: "token".to_owned(), message })
    }

    /// The address at which a user authorises the app, signed; the vendor sends the user on to `redirect_uri` with
    /// `state` and a code.
    fn authorise_link(&self, account: &Account, redirect_uri: &str, state: &str) -> Option<String> {
        let _ = (account, redirect_uri, state);
        None
    }

    /// The exchange that makes tokens of that code.
    fn prepare_authorisation(&self, account: &Account, code: &str, redirect_uri: &str) -> Option<Exchange> {
        let _ = (account, code, redirect_uri);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused() -> Refusal {
        Refusal { kind: RefusalKind::Bug, code: "15".to_owned(), message: "no such item".to_owned() }
    }

    #[test]
    fn what_comes_later_is_refused_where_nobody_waits_for_it() {
        let task = |name: &str| Ok(Task(name.to_owned()));
        let Reply::Refused(refusal) = Reply::Pending(vec![task("s_1"), task("s_2")]).at_once() else { panic!() };
        assert_eq!((refusal.common(), refusal.class()), (Some(Common::Later), Class::Bug));
        assert_eq!(refusal.message, "the vendor answers later (as s_1, s_2), which this source is not set up for");
        let each = Reply::Pending(vec![task("s_1"), Err(refused())]).each(2);
        assert_eq!(each.iter().map(|each| &*each.as_ref().unwrap_err().code).collect::<Vec<_>>(), ["pending", "15"]);
        assert!(matches!(Reply::Pending(vec![]).at_once(), Reply::Each(none) if none.is_empty()));
    }

    #[test]
    fn the_refusals_of_a_reply_are_those_of_its_requests_or_of_the_call() {
        let pending = Reply::Pending(vec![Ok(Task("s_1".to_owned())), Err(refused())]);
        assert_eq!((pending.refusals().count(), pending.is_for(2), pending.is_for(1)), (1, true, false));
        assert_eq!(Reply::Refused(refused()).refusals().count(), 1);
        assert_eq!(Reply::Refused(refused()).each(3).len(), 3);
    }
}
