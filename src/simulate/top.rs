//! Taobao's TOP as a decision: its checks in order, and the reply to each call. No I/O.

use std::time::Duration;

use secrecy::ExposeSecret;

use super::{
    aop::tokens::{TokenRules, Tokens},
    catalogue::{Mishap, OffShelf, Shelf},
    gate::{Call, Reply, Verdict},
    goods::Good,
    side::{Shut, Side, Whom},
    stats::{Outcome, Refused},
};
use crate::{
    platform::{
        Account,
        taobao::{
            Method,
            sign::{self, SignMethod},
        },
    },
    runtime::clock::Timestamp,
};

/// How far a caller's clock may be off.
const TOLERANCE: Duration = Duration::from_secs(600);
/// The method that renews a session.
const REFRESH: &str = "taobao.top.auth.token.refresh";

/// The platform and what it remembers.
#[derive(Debug)]
pub(super) struct Top {
    pub(super) side: Side,
    tokens: Tokens,
}

/// An error of the platform.
#[derive(Debug)]
struct Refusal {
    outcome: Outcome,
    code: u32,
    msg: &'static str,
    sub: Option<(&'static str, String)>,
}

/// What a call wants.
enum Wanted {
    Items(Method, Vec<u64>),
    Session(usize),
}

const fn refused(code: u32, msg: &'static str) -> Refusal {
    Refusal { outcome: Outcome::Refused(Refused::Other), code, msg, sub: None }
}

impl Refusal {
    fn sub(self, sub_code: &'static str, sub_msg: impl Into<String>) -> Self {
        Self { sub: Some((sub_code, sub_msg.into())), ..self }
    }

    fn ban(outcome: Outcome, sub_code: &'static str, seconds: u64) -> Self {
        let words = format!("This ban will last for {seconds} more seconds");
        Self { outcome, ..refused(7, "App Call Limited").sub(sub_code, words) }
    }
}

impl Top {
    pub(super) fn new(side: Side, rules: TokenRules) -> Self {
        let tokens = Tokens::new(&side.accounts, rules, side.setting.catalogue.seed ^ 0x7a0b);
        Self { side, tokens }
    }

    pub(super) fn accounts(&self) -> &[Account] {
        &self.side.accounts
    }

    /// The user of this account withdraws the authorisation; false if there is no such account.
    pub(super) fn revoke(&self, alias: &str) -> bool {
        let index = self.accounts().iter().position(|account| account.alias.as_str() == alias);
        index.inspect(|index| self.tokens.revoke(*index)).is_some()
    }

    /// Every session that was given since the start.
    pub(super) fn sessions(&self) -> Vec<String> {
        self.tokens.all()
    }

    /// Judges a call and makes the reply.
    pub(super) fn judge(&self, call: &Call<'_>) -> Verdict {
        let serial = self.side.serial();
        let mut verdict =
            Verdict { outcome: Outcome::Found, account: None, items: Vec::new(), reply: Reply::Cut, serial };
        let replied = self.checked(call, &mut verdict).and_then(|wanted| match wanted {
            Wanted::Session(account) => self.renewed(account, call),
            Wanted::Items(method, items) => {
                verdict.items.clone_from(&items);
                self.items(method, &items, serial)
            }
        });
        let (outcome, reply) = replied.unwrap_or_else(|refusal| (refusal.outcome, self.error(&refusal, serial)));
        Verdict { outcome, reply, ..verdict }
    }

    /// What the platform says when the service behind it is away.
    pub(super) fn unavailable(&self, serial: u64) -> Reply {
        let refusal = refused(15, "Remote service error").sub("isp.remote-service-error", "服务不可用");
        self.error(&refusal, serial)
    }

    /// Method, app key, time, signature, quota, session, parameters.
    fn checked(&self, call: &Call<'_>, verdict: &mut Verdict) -> Result<Wanted, Refusal> {
        let name = call.param("method").ok_or(refused(21, "Missing Method"))?;
        let method = Method::of_name(name);
        if method.is_none() && name != REFRESH {
            return Err(refused(22, "Invalid Method"));
        }
        let key = call.param("app_key").ok_or(refused(28, "Missing App Key"))?;
        let account = self.side.by_key(key).ok_or(refused(29, "Invalid App Key"))?;
        verdict.account = Some(self.side.among_all(account));
        self.check_time(call)?;
        if call.param("v") != Some("2.0") {
            return Err(refused(33, "Invalid Version"));
        }
        if call.param("format") != Some("json") {
            return Err(refused(23, "Invalid Format"));
        }
        self.check_signature(call, account)?;
        self.check_quota(call, account, verdict.serial)?;
        let Some(method) = method else { return Ok(Wanted::Session(account)) };
        // Affiliates call without a user's authorisation.
        if method != Method::TbkItemInfoGet {
            let session = call.param("session").ok_or(refused(26, "Missing Session"))?;
            if !self.tokens.accepts(account, Some(session), call.arrived) {
                let refusal = refused(27, "Invalid Session").sub("invalid-sessionkey", "SessionKey非法");
                return Err(Refusal { outcome: Outcome::Refused(Refused::Unauthorised), ..refusal });
            }
        }
        let items = ids(method, call)?;
        if self.side.throttles(&items) {
            verdict.items = items;
            let sub_code = "accesscontrol.limited-by-app-api-access-count";
            return Err(Refusal::ban(Outcome::InjectedThrottle, sub_code, 1));
        }
        Ok(Wanted::Items(method, items))
    }

    /// Text in the platform's own zone: whoever sends another zone's is hours off.
    fn check_time(&self, call: &Call<'_>) -> Result<(), Refusal> {
        let given = call.param("timestamp").ok_or(refused(30, "Missing Timestamp"))?;
        let given = jiff::Timestamp::strptime("%Y-%m-%d %H:%M:%S %z", format!("{given} +0800"));
        let given = given.map_err(|_| refused(31, "Invalid Timestamp"))?;
        let (given, now) = (Timestamp::from_millis(given.as_millisecond()), self.side.setting.clock.now());
        if now.as_millis().abs_diff(given.as_millis()) > u64::try_from(TOLERANCE.as_millis()).unwrap_or(u64::MAX) {
            return Err(refused(31, "Invalid Timestamp"));
        }
        Ok(())
    }

    fn check_signature(&self, call: &Call<'_>, account: usize) -> Result<(), Refusal> {
        let given = call.param(sign::SIGNATURE).ok_or(refused(24, "Missing Signature"))?;
        let named = call.param("sign_method").unwrap_or("md5");
        let method = SignMethod::ALL.into_iter().find(|method| method.name() == named);
        let secret = self.accounts()[account].app_secret.expose_secret();
        match method {
            Some(method) if sign::verify(method, call.params, secret, given) => Ok(()),
            Some(_) | None => Err(refused(25, "Invalid Signature")),
        }
    }

    fn check_quota(&self, call: &Call<'_>, account: usize, serial: u64) -> Result<(), Refusal> {
        self.side.admit(account, call, serial).map_err(|Shut { whom, seconds, is_over }| {
            let sub_code = match whom {
                Whom::Account => "accesscontrol.limited-by-app-access-count",
                Whom::Everyone => "accesscontrol.limited-by-api-access-count",
            };
            let outcome = if is_over { Refused::Violation } else { Refused::Banned };
            Refusal::ban(Outcome::Refused(outcome), sub_code, seconds)
        })
    }

    fn items(&self, method: Method, items: &[u64], serial: u64) -> Result<(Outcome, Reply), Refusal> {
        let good = || self.body(method, items, None, serial).1;
        match self.side.mishap(items) {
            None => {}
            Some(Mishap::Timeout) => return Ok((Outcome::InjectedFailure, self.unavailable(serial))),
            // A row that nobody asked for, and the one that somebody asked for is missing.
            Some(Mishap::WrongItem) => {
                let stranger = items.first().map(|item| item + 1);
                let body = self.body(method, items.get(1..).unwrap_or_default(), stranger, serial).1;
                return Ok((Outcome::InjectedFailure, Reply::ok(body)));
            }
            Some(mishap) => {
                return Ok((Outcome::InjectedFailure, Side::broken(mishap, good).unwrap_or(Reply::Cut)));
            }
        }
        if let (Method::ItemSellerGet, [item]) = (method, items) {
            self.check_single(*item)?;
        }
        let (outcome, body) = self.body(method, items, None, serial);
        Ok((outcome, Reply::ok(body)))
    }

    /// A single item that is not there is an error, in one of its spellings.
    fn check_single(&self, item: u64) -> Result<(), Refusal> {
        if self.side.shelf(item) != Shelf::Absent {
            return Ok(());
        }
        let refusal = match item % 3 {
            0 => {
                refused(15, "Remote service error").sub("isv.item-is-delete:invalid-numIid-or-iid-tmall", "商品已删除")
            }
            1 => refused(50, "Remote service error").sub("isv.item-get-service-error:ITEM_NOT_FOUND", "商品不存在"),
            _ => refused(50, "Remote service error").sub("isv.item-not-exist", "商品不存在"),
        };
        Err(Refusal { outcome: Outcome::Absent, ..refusal })
    }

    /// A good reply: ids without an article have no row.
    fn body(&self, method: Method, items: &[u64], stranger: Option<u64>, serial: u64) -> (Outcome, String) {
        let mut outcome = Outcome::Absent;
        let mut rows = Vec::with_capacity(items.len() + 1);
        let row = |good: &Good| match method {
            Method::TbkItemInfoGet => good.affiliate(),
            Method::ItemSellerGet | Method::ItemsSellerListGet | Method::MiniappItemsGet => good.top(true),
        };
        for &item in items {
            let status = match self.side.shelf(item) {
                Shelf::Absent => continue,
                Shelf::Found => "onsale",
                Shelf::OffShelf(OffShelf::Status(_) | OffShelf::Message) => "instock",
            };
            let is_found = status == "onsale";
            outcome = if is_found || outcome == Outcome::Found { Outcome::Found } else { Outcome::OffShelf };
            rows.push(row(&Good::new(self.side.showing(item, status))));
        }
        rows.extend(stranger.map(|item| row(&Good::new(self.side.showing(item, "onsale")))));
        let response = method.response();
        let rows_of = method.rows().trim_start_matches('/');
        let inside = match (rows_of.split_once('/'), rows.as_slice()) {
            // Nothing matched: the list is missing, or its wrapper too.
            (Some((outer, _)), []) if serial.is_multiple_of(2) => format!(r#""{outer}":{{}},"#),
            (Some(_) | None, []) => String::new(),
            (Some((outer, inner)), rows) => format!(r#""{outer}":{{"{inner}":[{}]}},"#, rows.join(",")),
            (None, [row, ..]) => format!(r#""{rows_of}":{row},"#),
        };
        (outcome, format!(r#"{{"{response}":{{{inside}"request_id":"{}"}}}}"#, self.side.request_id(serial)))
    }

    fn renewed(&self, account: usize, call: &Call<'_>) -> Result<(Outcome, Reply), Refusal> {
        let given = self.tokens.renew(account, call.param("refresh_token"), call.arrived).ok_or_else(|| Refusal {
            outcome: Outcome::Refused(Refused::Unauthorised),
            ..refused(27, "Invalid Session").sub("isv.invalid-refresh-token", "refresh token is invalid")
        })?;
        let life = self.tokens.rules.life.unwrap_or(Duration::from_secs(86_400));
        let until = self.side.setting.clock.now().after(Duration::from_secs(30 * 86_400));
        let result = serde_json::json!({
            "access_token": given.access,
            "refresh_token": given.refresh,
            "expires_in": life.as_secs(),
            "refresh_token_valid_time": until.as_millis(),
            "token_type": "Bearer",
        });
        let body = serde_json::json!({"top_auth_token_refresh_response": {"token_result": result.to_string()}});
        Ok((Outcome::Renewed { early: given.is_early }, Reply::ok(body.to_string())))
    }

    fn error(&self, refusal: &Refusal, serial: u64) -> Reply {
        let mut error = serde_json::json!({
            "code": refusal.code,
            "msg": refusal.msg,
            "request_id": self.side.request_id(serial),
        });
        if let Some((sub_code, sub_msg)) = &refusal.sub {
            error["sub_code"] = (*sub_code).into();
            error["sub_msg"] = sub_msg.as_str().into();
        }
        // Also what is no answer comes with HTTP 200.
        Reply::ok(serde_json::json!({"error_response": error}).to_string())
    }
}

/// The ids of a call, at most as many as its method takes.
fn ids(method: Method, call: &Call<'_>) -> Result<Vec<u64>, Refusal> {
    let missing = |name| refused(40, "Missing Required Arguments").sub("isv.missing-parameter", name);
    if method.fields().is_some() && call.param("fields").is_none() {
        return Err(missing("fields"));
    }
    let ids = call.param(method.item_param()).ok_or_else(|| missing(method.item_param()))?;
    let invalid = || refused(41, "Invalid Arguments").sub("isv.invalid-parameter", method.item_param());
    let ids: Vec<u64> = ids.split(',').map(str::parse).collect::<Result<_, _>>().map_err(|_| invalid())?;
    if ids.len() > method.batch_max() {
        return Err(Refusal { outcome: Outcome::Refused(Refused::TooMany), ..invalid() });
    }
    Ok(ids)
}
