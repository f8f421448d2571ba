//! 1688 as two articles have it, as decisions: "seed-compat", not what the real gateway does. No I/O.

use std::time::Duration;

use secrecy::ExposeSecret;

use super::{
    catalogue::{Mishap, Shelf},
    gate::{Call, Front, Reply, Verdict},
    goods::Good,
    side::{Shut, Side},
    stats::{Outcome, Refused},
};
use crate::platform::ali1688::{Dialect, article};

/// How far a caller's clock may be off.
const TOLERANCE: Duration = Duration::from_secs(600);

/// One of the two and what it remembers.
#[derive(Debug)]
pub(super) struct Article {
    pub(super) side: Side,
}

struct Refusal {
    outcome: Outcome,
    status: u16,
    code: u32,
    msg: &'static str,
}

const fn refused(code: u32, msg: &'static str) -> Refusal {
    Refusal { outcome: Outcome::Refused(Refused::Other), status: 200, code, msg }
}

impl Article {
    /// Judges a call and makes the reply.
    pub(super) fn judge(&self, call: &Call<'_>) -> Verdict {
        let serial = self.side.serial();
        let mut verdict =
            Verdict { outcome: Outcome::Found, account: None, items: Vec::new(), reply: Reply::Cut, serial };
        let (outcome, reply) = match self.checked(call, &mut verdict) {
            Ok(item) => self.business(item),
            Err(refusal) => (refusal.outcome, error(refusal.status, refusal.code, refusal.msg)),
        };
        Verdict { outcome, reply, ..verdict }
    }

    /// What it says when it is out of order.
    pub(super) fn unavailable() -> Reply {
        error(500, 500, "Internal Server Error")
    }

    fn dialect(&self) -> Dialect {
        if self.side.front == Front::Router { Dialect::Router } else { Dialect::ItemGet }
    }

    fn checked(&self, call: &Call<'_>, verdict: &mut Verdict) -> Result<u64, Refusal> {
        let (method, version, id) = match self.dialect() {
            Dialect::Router => ("alibaba.product.get", "1.0", "product_id"),
            Dialect::ItemGet | Dialect::Aop => ("alibaba.item.get", "2.0", "item_id"),
        };
        if call.param("method") != Some(method) || call.param("v") != Some(version) {
            return Err(refused(22, "Invalid Method"));
        }
        let key = call.param("app_key").ok_or(refused(28, "Missing App Key"))?;
        let account = self.side.by_key(key).ok_or(refused(29, "Invalid App Key"))?;
        verdict.account = Some(self.side.among_all(account));
        self.check_credentials(call, account)?;
        self.side.admit(account, call, verdict.serial).map_err(|Shut { is_over, .. }| {
            let outcome = Outcome::Refused(if is_over { Refused::Violation } else { Refused::Banned });
            self.limited(outcome)
        })?;
        let item = call.param(id).and_then(|id| id.parse().ok()).ok_or(refused(40, "Missing Required Arguments"))?;
        verdict.items = vec![item];
        if self.side.throttles(&[item]) {
            return Err(self.limited(Outcome::InjectedThrottle));
        }
        Ok(item)
    }

    /// Over the limit: HTTP 429 of the one, 403 of the other.
    fn limited(&self, outcome: Outcome) -> Refusal {
        match self.dialect() {
            Dialect::Router => Refusal { outcome, status: 429, code: 100_001, msg: "call limited" },
            Dialect::ItemGet | Dialect::Aop => Refusal { outcome, status: 403, code: 403, msg: "Forbidden" },
        }
    }

    fn check_credentials(&self, call: &Call<'_>, account: usize) -> Result<(), Refusal> {
        let given = call.param("timestamp").ok_or(refused(30, "Missing Timestamp"))?;
        let given = jiff::Timestamp::strptime("%Y-%m-%d %H:%M:%S %z", format!("{given} +0800"));
        let off = given.map(|given| self.side.setting.clock.now().as_millis().abs_diff(given.as_millisecond()));
        if !off.is_ok_and(|off| u128::from(off) <= TOLERANCE.as_millis()) {
            return Err(refused(31, "Invalid Timestamp"));
        }
        let (account, dialect) = (&self.side.accounts[account], self.dialect());
        let right = article::signature(dialect, call.params, account.app_secret.expose_secret());
        if call.param("sign") != Some(&right) {
            return Err(refused(25, "Invalid Signature"));
        }
        let token = account.access_token.as_ref().map(ExposeSecret::expose_secret);
        if dialect == Dialect::Router && call.param("access_token") != token {
            let outcome = Outcome::Refused(Refused::Unauthorised);
            return Err(Refusal { outcome, ..refused(27, "Invalid Session") });
        }
        Ok(())
    }

    fn business(&self, item: u64) -> (Outcome, Reply) {
        match self.side.mishap(&[item]) {
            None => {}
            Some(Mishap::Timeout) => return (Outcome::InjectedFailure, Self::unavailable()),
            Some(Mishap::WrongItem) => return (Outcome::InjectedFailure, Reply::ok(self.body(item + 1))),
            Some(mishap) => {
                let broken = Side::broken(mishap, || self.body(item));
                return (Outcome::InjectedFailure, broken.unwrap_or(Reply::Cut));
            }
        }
        if self.side.shelf(item) == Shelf::Found {
            return (Outcome::Found, Reply::ok(self.body(item)));
        }
        // Neither article says how; a null, or TOP's way.
        let name = if self.dialect() == Dialect::Router { "product" } else { "item" };
        let reply = if item.is_multiple_of(2) {
            Reply::ok(format!(r#"{{"{name}":null}}"#))
        } else {
            let error = serde_json::json!({"code": 15, "msg": "商品不存在", "sub_code": "isv.item-not-exist"});
            Reply::ok(serde_json::json!({"error_response": error}).to_string())
        };
        (Outcome::Absent, reply)
    }

    fn body(&self, item: u64) -> String {
        let good = Good::new(self.side.showing(item, "onsale"));
        match self.dialect() {
            Dialect::Router => format!(r#"{{"product":{}}}"#, good.router()),
            Dialect::ItemGet | Dialect::Aop => format!(r#"{{"item":{}}}"#, good.item_get()),
        }
    }
}

fn error(status: u16, code: u32, msg: &str) -> Reply {
    Reply::json(status, serde_json::json!({"error_response": {"code": code, "msg": msg}}).to_string())
}
