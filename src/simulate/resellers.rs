//! The reseller of the Taobao article, and `OneBound`, as decisions. No I/O.

use secrecy::ExposeSecret;

use super::{
    catalogue::{Mishap, Shelf},
    gate::{Call, Front, Reply, Verdict},
    goods::Good,
    side::{Shut, Side},
    stats::{Outcome, Refused},
};

/// The most ids that the article's reseller takes.
const BATCH_MAX: usize = 40;

/// A reseller and what it remembers.
#[derive(Debug)]
pub(super) struct Reseller {
    pub(super) side: Side,
}

struct Refusal {
    outcome: Outcome,
    code: &'static str,
    reason: &'static str,
}

const fn refused(outcome: Refused, code: &'static str, reason: &'static str) -> Refusal {
    Refusal { outcome: Outcome::Refused(outcome), code, reason }
}

impl Reseller {
    /// Judges a call and makes the reply.
    pub(super) fn judge(&self, call: &Call<'_>) -> Verdict {
        let serial = self.side.serial();
        let mut verdict =
            Verdict { outcome: Outcome::Found, account: None, items: Vec::new(), reply: Reply::Cut, serial };
        let (outcome, reply) = match self.checked(call, &mut verdict) {
            Ok(()) => self.business(&verdict.items),
            Err(refusal) => (refusal.outcome, self.error(refusal.code, refusal.reason)),
        };
        Verdict { outcome, reply, ..verdict }
    }

    /// What the reseller says when it cannot reach Taobao.
    pub(super) fn unavailable(&self) -> Reply {
        self.error("5000", "upstream error")
    }

    fn is_pool(&self) -> bool {
        self.side.front == Front::Reseller
    }

    fn checked(&self, call: &Call<'_>, verdict: &mut Verdict) -> Result<(), Refusal> {
        let account = self.account(call).ok_or(refused(Refused::Unauthorised, "4005", "key or secret is wrong"))?;
        verdict.account = Some(self.side.among_all(account));
        self.side.admit(account, call, verdict.serial).map_err(|Shut { is_over, .. }| {
            let outcome = if is_over { Refused::Violation } else { Refused::Banned };
            let code = if self.is_pool() { "7" } else { "4008" };
            refused(outcome, code, "too many calls a second")
        })?;
        let name = if self.is_pool() { "num_iids" } else { "num_iid" };
        let ids = call.param(name).ok_or(refused(Refused::Other, "4003", "ids are missing"))?;
        let ids: Result<Vec<u64>, _> = ids.split(',').map(str::parse).collect();
        let ids = ids.map_err(|_| refused(Refused::Other, "4003", "an id is no number"))?;
        if ids.len() > if self.is_pool() { BATCH_MAX } else { 1 } {
            return Err(refused(Refused::TooMany, "4003", "too many ids"));
        }
        verdict.items = ids;
        if self.side.throttles(&verdict.items) {
            let code = if self.is_pool() { "7" } else { "4008" };
            return Err(Refusal { outcome: Outcome::InjectedThrottle, code, reason: "too many calls a second" });
        }
        Ok(())
    }

    /// The pool's key is the secret alone.
    fn account(&self, call: &Call<'_>) -> Option<usize> {
        let (key, accounts) = (call.param("key")?, &self.side.accounts);
        if self.is_pool() {
            return accounts.iter().position(|account| account.app_secret.expose_secret() == key);
        }
        let account = self.side.by_key(key)?;
        (call.param("secret") == Some(accounts[account].app_secret.expose_secret())).then_some(account)
    }

    fn business(&self, items: &[u64]) -> (Outcome, Reply) {
        match self.side.mishap(items) {
            None => {
                let (outcome, body) = self.body(items, None);
                (outcome, Reply::ok(body))
            }
            Some(Mishap::Timeout) => (Outcome::InjectedFailure, self.error("4017", "time-out")),
            Some(Mishap::WrongItem) => {
                let stranger = items.first().map(|item| item + 1);
                let body = self.body(items.get(1..).unwrap_or_default(), stranger).1;
                (Outcome::InjectedFailure, Reply::ok(body))
            }
            Some(mishap) => {
                let broken = Side::broken(mishap, || self.body(items, None).1);
                (Outcome::InjectedFailure, broken.unwrap_or(Reply::Cut))
            }
        }
    }

    fn body(&self, items: &[u64], stranger: Option<u64>) -> (Outcome, String) {
        let show = |item: u64| Good::new(self.side.showing(item, "onsale"));
        // What is off the shelf cannot be bought: the resellers do not have it.
        let goods: Vec<Good> =
            items.iter().filter(|item| self.side.shelf(**item) == Shelf::Found).map(|item| show(*item)).collect();
        let outcome = if goods.is_empty() { Outcome::Absent } else { Outcome::Found };
        let goods = goods.into_iter().chain(stranger.map(show));
        if self.is_pool() {
            let rows: Vec<String> = goods.map(|good| good.pool()).collect();
            return (outcome, format!(r#"{{"items":[{}]}}"#, rows.join(",")));
        }
        let item: Option<String> = goods.map(|good| good.onebound()).next();
        let body = match item {
            Some(item) => format!(
                r#"{{"item":{item},"error":"","reason":"","error_code":"0000","cache":0,"api_info":"today:1 max:10000"}}"#
            ),
            None => r#"{"error":"item-not-found","reason":"no result","error_code":"2000"}"#.to_owned(),
        };
        (outcome, body)
    }

    fn error(&self, code: &str, reason: &str) -> Reply {
        let body = if self.is_pool() {
            serde_json::json!({"code": code.parse::<u32>().unwrap_or_default(), "msg": reason})
        } else {
            serde_json::json!({"error": reason, "reason": reason, "error_code": code})
        };
        Reply::ok(body.to_string())
    }
}
