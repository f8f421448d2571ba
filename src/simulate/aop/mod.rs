//! The AOP gateway as a decision: its checks in its order, and the reply to each call. No I/O.

pub(super) mod tokens;

use std::{
    collections::HashMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use secrecy::ExposeSecret;

pub use self::tokens::TokenRules;
use self::tokens::Tokens;
use super::{
    catalogue::{Askings, Catalogue, Mishap, OffShelf, Shelf},
    dice::{Question, roll},
    gate::{Call, HTML, JSON, Reply, Verdict, param},
    limiter::{Limiter, Quota},
    product::{self, Showing},
    stats::{Outcome, Refused},
};
use crate::{
    platform::{Account, ali1688::sign},
    runtime::clock::{Clock, Timestamp},
};

/// The only API that is served.
pub(super) const API: &str = "param2/1/com.alibaba.product/alibaba.product.get";

/// How many troubled items are remembered: by default those of 15 million ids.
const ASKINGS_LIMIT: usize = 262_144;

/// The gateway and what it remembers.
#[derive(Debug)]
pub(super) struct Gateway {
    accounts: Vec<Account>,
    limiters: Vec<Mutex<Limiter>>,
    by_key: HashMap<String, usize>,
    tokens: Tokens,
    catalogue: Catalogue,
    askings: Mutex<Askings>,
    drift: Option<Duration>,
    clock: Clock,
    calls: AtomicU64,
}

/// A refusal by the gateway itself.
struct Refusal {
    outcome: Outcome,
    status: u16,
    code: &'static str,
    message: String,
}

impl Refusal {
    fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { outcome: Outcome::Refused(Refused::Other), status: 400, code, message: message.into() }
    }

    fn throttle(outcome: Outcome) -> Self {
        Self { outcome, ..Self::new("gw.QosAppFrequencyLimit", "App call exceeds limited frequency") }
    }
}

impl Gateway {
    pub(super) fn new(
        accounts: Vec<Account>,
        quota: Quota,
        tokens: TokenRules,
        catalogue: Catalogue,
        drift: Option<Duration>,
        clock: Clock,
    ) -> Self {
        let limiter = |index| {
            let phase = roll(catalogue.seed, Question::Phase, index);
            Mutex::new(Limiter::new(quota, Duration::from_nanos(phase)))
        };
        Self {
            limiters: (0..accounts.len() as u64).map(limiter).collect(),
            by_key: accounts.iter().enumerate().map(|(index, account)| (account.app_key.clone(), index)).collect(),
            tokens: Tokens::new(&accounts, tokens, catalogue.seed),
            accounts,
            catalogue,
            askings: Mutex::new(Askings::new(ASKINGS_LIMIT)),
            drift,
            clock,
            calls: AtomicU64::new(0),
        }
    }

    pub(super) fn accounts(&self) -> &[Account] {
        &self.accounts
    }

    /// Judges a call and makes the reply.
    pub(super) fn judge(&self, call: &Call<'_>) -> Verdict {
        let serial = self.calls.fetch_add(1, Relaxed);
        if let Some(key) = tokens::app_key(call.path) {
            return self.judge_token(key, call, serial);
        }
        let mut verdict =
            Verdict { outcome: Outcome::Found, account: None, items: Vec::new(), reply: Reply::Cut, serial };
        let (outcome, reply) = match self.checked(call, &mut verdict) {
            Ok(item) => self.business(item),
            Err(refusal) => (refusal.outcome, self.refusal_body(serial, &refusal)),
        };
        Verdict { outcome, reply, ..verdict }
    }

    /// The gateway's checks, in the order that the real one was seen to use: API, app key, signature, frequency,
    /// token, parameters. Where frequency stands is an assumption.
    fn checked(&self, call: &Call<'_>, verdict: &mut Verdict) -> Result<u64, Refusal> {
        let key = app_key(call.path)?;
        let index = *self
            .by_key
            .get(key)
            .ok_or_else(|| Refusal::new("gw.AppKeyNotFound", format!("The request app key {key} is not found")))?;
        verdict.account = Some(index);
        let account = &self.accounts[index];
        check_signature(call, account)?;
        let item = param(call.params, "productID").and_then(|text| text.parse().ok());
        if !call.is_address_within {
            return Err(Refusal::throttle(Outcome::Refused(Refused::Violation)));
        }
        self.check_frequency(call.arrived, index, item, verdict)?;
        self.check_token(call, index, verdict.serial)?;
        let item = check_params(call.params, item)?;
        verdict.items = vec![item];
        Ok(item)
    }

    fn check_frequency(
        &self,
        arrived: Duration,
        account: usize,
        item: Option<u64>,
        verdict: &mut Verdict,
    ) -> Result<(), Refusal> {
        if !self.limiters[account].lock().unwrap_or_else(PoisonError::into_inner).admit(arrived) {
            return Err(Refusal::throttle(Outcome::Refused(Refused::Violation)));
        }
        if let Some(item) = item
            && self.catalogue.may_throttle(item)
            && self.catalogue.throttles(item, self.ask(item))
        {
            verdict.items = vec![item];
            return Err(Refusal::throttle(Outcome::InjectedThrottle));
        }
        Ok(())
    }

    fn check_token(&self, call: &Call<'_>, account: usize, serial: u64) -> Result<(), Refusal> {
        if self.tokens.accepts(account, param(call.params, "access_token"), call.arrived) {
            return Ok(());
        }
        Err(self.unauthorised(serial))
    }

    /// Behind the gateway: the product service, and what befalls it.
    fn business(&self, item: u64) -> (Outcome, Reply) {
        let now = self.clock.now();
        let asked = if self.catalogue.may_fail(item) { self.ask(item) } else { 0 };
        if let Some(mishap) = self.catalogue.mishap(item, asked) {
            return (Outcome::InjectedFailure, self.mishap(item, mishap, now));
        }
        let ok = |body| Reply::Http { status: 200, content_type: JSON, body };
        match self.catalogue.shelf(item) {
            Shelf::Found => (Outcome::Found, ok(self.product(item, "published", now))),
            Shelf::OffShelf(OffShelf::Status(status)) => (Outcome::OffShelf, ok(self.product(item, status, now))),
            Shelf::OffShelf(OffShelf::Message) => (Outcome::OffShelf, ok(product::nothing("商品已下架"))),
            Shelf::Absent => (Outcome::Absent, ok(product::nothing("商品不存在"))),
        }
    }

    fn mishap(&self, item: u64, mishap: Mishap, now: Timestamp) -> Reply {
        let http = |status, content_type, body| Reply::Http { status, content_type, body };
        match mishap {
            Mishap::Timeout => {
                let refusal = Refusal::new("gw.ISPInvokeTimeout", "Invoke ISP service timeout");
                self.refusal_body(roll(self.catalogue.seed, Question::Mishap, item), &refusal)
            }
            Mishap::InternalError => {
                http(500, JSON, r#"{"status":500,"error":"Internal Server Error","path":"/openapi"}"#.into())
            }
            Mishap::BadGateway => Reply::bad_gateway(),
            Mishap::Cut => Reply::Cut,
            Mishap::Truncated => {
                let mut body = self.product(item, "published", now);
                // Before the first Chinese character: the cut is between characters.
                body.truncate(60);
                http(200, JSON, body)
            }
            Mishap::Page => http(200, HTML, "<!DOCTYPE html><html><body>系统繁忙，请稍后再试</body></html>".into()),
            Mishap::Empty => http(200, JSON, String::new()),
            Mishap::WrongItem => http(200, JSON, self.product(item + 1, "published", now)),
        }
    }

    /// What the gateway says when the service behind it is away.
    pub(super) fn unavailable(&self, serial: u64) -> Reply {
        self.refusal_body(serial, &Refusal::new("gw.ISPInvokeError", "Invoke ISP service error"))
    }

    fn product(&self, id: u64, status: &'static str, now: Timestamp) -> String {
        product::reply(Showing { seed: self.catalogue.seed, id, status, now, drift: self.drift })
    }

    fn refusal_body(&self, serial: u64, refusal: &Refusal) -> Reply {
        let (code, message) = (refusal.code, &refusal.message);
        let request_id = roll(self.catalogue.seed, Question::RequestId, serial);
        // `exception` repeats the message on the real gateway too.
        let body = serde_json::json!({
            "error_code": code,
            "error_message": message,
            "exception": message,
            "request_id": format!("{request_id:016x}{serial:08x}"),
        });
        Reply::Http { status: refusal.status, content_type: JSON, body: body.to_string() }
    }

    fn ask(&self, item: u64) -> u32 {
        self.askings.lock().unwrap_or_else(PoisonError::into_inner).ask(item)
    }
}

/// The app key at the end of a path of [`API`].
fn app_key(path: &str) -> Result<&str, Refusal> {
    let unsupported = || Refusal::new("gw.APIUnsupported", "The request API is not supported");
    let key = match path.strip_prefix(API).ok_or_else(unsupported)? {
        "" => "",
        rest => rest.strip_prefix('/').ok_or_else(unsupported)?,
    };
    if key.is_empty() {
        return Err(Refusal::new("gw.AppKeyMissing", "The request app key is missing"));
    }
    Ok(key)
}

fn check_signature(call: &Call<'_>, account: &Account) -> Result<(), Refusal> {
    let given = param(call.params, sign::SIGNATURE)
        .filter(|given| !given.is_empty())
        .ok_or_else(|| Refusal::new("gw.SignatureMissing", "The request signature is missing"))?;
    if sign::verify(call.path, call.params, account.app_secret.expose_secret(), given) {
        Ok(())
    } else {
        Err(Refusal::new("gw.SignatureInvalid", "The request signature is invalid"))
    }
}

/// `item` is `productID` if that is a number.
fn check_params(params: &[(String, String)], item: Option<u64>) -> Result<u64, Refusal> {
    let missing = |name| Refusal::new("gw.ParamMissing", format!("Required argument {name}"));
    param(params, "webSite").filter(|site| !site.is_empty()).ok_or_else(|| missing("webSite"))?;
    item.ok_or_else(|| missing("productID"))
}

#[cfg(test)]
mod reading;
#[cfg(test)]
mod tests;
