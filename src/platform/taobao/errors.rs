//! What the platform's errors mean: the sub-code decides first, the number second, since 15 is both an outage and "there
//! is no such item".

use std::time::Duration;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    message::json,
    platform::{
        Affected, Common, Denial, HttpReply, Refusal, RefusalKind,
        reading::{kind_of_status, present, refusal, text},
    },
};

/// How long a ban lasts of which nothing is said.
const BAN: Duration = Duration::from_secs(60);
/// No ban is believed to last longer: the longest that there are last until midnight.
const BAN_MAX: u64 = 24 * 60 * 60;

/// `error_response`
#[derive(Debug, Default)]
pub struct ErrorResponse {
    code: String,
    msg: String,
    sub_code: String,
    sub_msg: String,
}

/// What the vendor says with it.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    /// There is no such item.
    Absent,
    /// Anything else.
    Refused(RefusalKind),
}

#[derive(Clone, Copy)]
enum Meaning {
    /// For as long as the words say, else a minute.
    Banned(Affected),
    /// For one to five seconds.
    Busy,
    Denied(Denial),
    Absent,
    Outage,
    Unclear,
    Misconfigured(Common),
    Bug,
}

/// The numbers of the services behind the platform, beside 15 and 50.
const NUMBERED: [(&str, Meaning); 1] = [
    // "Invalid item id", for all of a batch.
    ("-4003", Meaning::Bug),
];

/// Beginnings of sub-codes, the first that fits counts; variants end in `-tmall` and the like.
const SUB_CODES: [(&str, Meaning); 13] = [
    ("accesscontrol.limited-by-app-access-count", Meaning::Banned(Affected::Account)),
    ("accesscontrol.limited-by-app-api-access-count", Meaning::Banned(Affected::Account)),
    // Of the API for all its callers: switching the account does not help.
    ("accesscontrol.limited-by-api-access-count", Meaning::Banned(Affected::Everyone)),
    ("accesscontrol.limited-by-dynamic-access-count", Meaning::Banned(Affected::Everyone)),
    ("isp.call-limited", Meaning::Busy),
    ("isp.system-busy", Meaning::Busy),
    ("invalid-sessionkey", Meaning::Denied(Denial::Token)),
    ("session-expired", Meaning::Denied(Denial::Token)),
    ("isv.permission-", Meaning::Denied(Denial::Account)),
    ("isv.item-not-exist", Meaning::Absent),
    ("isv.item-is-delete", Meaning::Absent),
    ("isv.item-get-service-error:ITEM_NOT_FOUND", Meaning::Absent),
    // The service behind the platform: try again later, says the manual.
    ("isp.", Meaning::Outage),
];

/// What a number means of which no sub-code says more.
fn of_number(code: &str) -> Option<Meaning> {
    Some(match code.parse().ok()? {
        // 4 to 6 and 8 are the older "Call Limited" codes: by user, session, partner and app.
        4..=8 => Meaning::Banned(Affected::Account),
        26 | 27 | 53 => Meaning::Denied(Denial::Token),
        // The permission for this API is missing, or signature or app key are wrong.
        11..=13 | 24 | 25 | 28 | 29 => Meaning::Denied(Denial::Account),
        30 | 31 => Meaning::Misconfigured(Common::Clock),
        // HTTP method, method, format, version: no request can change them.
        9 | 21..=23 | 32..=34 => Meaning::Misconfigured(Common::Form),
        40 | 41 | 43 => Meaning::Misconfigured(Common::Params),
        10 | 15 | 50 => Meaning::Outage,
        _ => return None,
    })
}

impl ErrorResponse {
    /// Reads it; nothing if it is no object.
    #[must_use]
    pub fn of(raw: &RawValue) -> Option<Self> {
        #[derive(Deserialize)]
        struct Body<'a> {
            #[serde(borrow, default)]
            code: Option<&'a RawValue>,
            #[serde(borrow, default)]
            msg: Option<&'a RawValue>,
            #[serde(borrow, default)]
            sub_code: Option<&'a RawValue>,
            #[serde(borrow, default)]
            sub_msg: Option<&'a RawValue>,
        }
        let body: Body<'_> = json::from_str(raw.get()).ok()?;
        let text = |raw: Option<&RawValue>| present(raw).map_or_else(String::new, |raw| text(raw).trim().to_owned());
        let (code, msg, sub_code, sub_msg) = (text(body.code), text(body.msg), text(body.sub_code), text(body.sub_msg));
        Some(Self { code, msg, sub_code, sub_msg })
    }

    /// The number, as text.
    #[must_use]
    pub fn code(&self) -> &str {
        &self.code
    }

    /// What the number means, whose sub-code is none of the platform's own. Those of the services behind it are theirs:
    /// they may be about an item or about the service.
    fn of_number(&self) -> Option<Meaning> {
        let meaning = of_number(&self.code)?;
        if !matches!(meaning, Meaning::Outage) || self.sub_code.is_empty() {
            return Some(meaning);
        }
        let numbered = NUMBERED.iter().find(|(sub_code, _)| *sub_code == self.sub_code);
        Some(numbered.map_or(Meaning::Unclear, |(_, meaning)| *meaning))
    }

    /// What the error means.
    #[must_use]
    pub fn meaning(&self, reply: &HttpReply) -> Said {
        let of_sub_code = SUB_CODES.iter().find(|(start, _)| self.sub_code.starts_with(start));
        let meaning = of_sub_code.map(|(_, meaning)| *meaning).or_else(|| self.of_number());
        let kind = match meaning {
            // A number that is an outage says less than a sub-code of our own mistakes.
            Some(Meaning::Outage | Meaning::Unclear) | None if self.sub_code.starts_with("isv.") => RefusalKind::Bug,
            Some(Meaning::Absent) => return Said::Absent,
            Some(Meaning::Banned(scope)) => RefusalKind::Throttled { scope, wait: Some(self.ban(reply)) },
            Some(Meaning::Busy) => {
                let wait = Duration::from_millis(1_000 + jitter(&reply.body, 4_000));
                RefusalKind::Throttled { scope: Affected::Everyone, wait: Some(reply.retry_after().unwrap_or(wait)) }
            }
            Some(Meaning::Denied(denial)) => RefusalKind::Denied(denial),
            Some(Meaning::Misconfigured(common)) => RefusalKind::Misconfigured(common),
            Some(Meaning::Bug) => RefusalKind::Bug,
            Some(Meaning::Outage) => RefusalKind::Outage,
            // The platform's codes grow: one that is not in the table is no answer.
            Some(Meaning::Unclear) | None => kind_of_status(reply).unwrap_or(RefusalKind::Unclear),
        };
        Said::Refused(kind)
    }

    /// The refusal with the platform's words.
    #[must_use]
    pub fn refusal(&self, kind: RefusalKind) -> Refusal {
        let code =
            if self.sub_code.is_empty() { self.code.clone() } else { format!("{}/{}", self.code, self.sub_code) };
        let words = if self.sub_msg.is_empty() { self.msg.clone() } else { format!("{}: {}", self.msg, self.sub_msg) };
        refusal(kind, &code, &words)
    }

    /// How long the ban lasts: one code is for a burst of a second and for the rest of a day.
    fn ban(&self, reply: &HttpReply) -> Duration {
        if let Some(wait) = reply.retry_after() {
            return wait;
        }
        let said = ban_seconds(&self.sub_msg).or_else(|| ban_seconds(&self.msg));
        let ban = said.map_or(BAN, |seconds| Duration::from_secs(seconds.clamp(1, BAN_MAX)));
        // The seconds that it names are rounded, and not everybody should be back at the same instant.
        ban + Duration::from_millis(250 + jitter(&reply.body, 1_000))
    }
}

/// `N` of "This ban will last for N more seconds".
#[must_use]
pub fn ban_seconds(words: &str) -> Option<u64> {
    let (_, rest) = words.split_once("ban will last for ")?;
    let (number, _) = rest.split_once(" more second")?;
    // More digits than any number has are still a long time.
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| number.parse().unwrap_or(u64::MAX))
}

/// From nothing to below `limit`, by the bytes of the reply (FNV-1a): each refusal has another request id in it.
#[must_use]
pub fn jitter(body: &[u8], limit: u64) -> u64 {
    let fold = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    body.iter().fold(0xcbf2_9ce4_8422_2325, fold) % limit.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::clock::Timestamp;

    fn said(code: u32, sub_code: &str, sub_msg: &str) -> Said {
        let json = serde_json::json!({"code": code, "msg": "?", "sub_code": sub_code, "sub_msg": sub_msg}).to_string();
        let reply = HttpReply::new(200, json.clone(), Timestamp::from_millis(0));
        ErrorResponse::of(&RawValue::from_string(json).unwrap()).unwrap().meaning(&reply)
    }

    fn wait(said: &Said) -> (Affected, Duration) {
        let Said::Refused(RefusalKind::Throttled { scope, wait: Some(wait) }) = *said else { panic!("{said:?}") };
        (scope, wait)
    }

    #[test]
    fn a_ban_is_of_whom_the_sub_code_says_and_lasts_as_long_as_the_words_say() {
        let words = |seconds: &str| format!("This ban will last for {seconds} more seconds");
        let table = [
            ("accesscontrol.limited-by-app-access-count", words("1"), Affected::Account, 1),
            ("accesscontrol.limited-by-app-api-access-count", words("71"), Affected::Account, 71),
            ("accesscontrol.limited-by-api-access-count", words("31062"), Affected::Everyone, 31_062),
            ("accesscontrol.limited-by-dynamic-access-count", words("2"), Affected::Everyone, 2),
            ("accesscontrol.limited-by-app-access-count", words("0"), Affected::Account, 1),
            ("accesscontrol.limited-by-app-access-count", words("99999999999999999999999"), Affected::Account, 86_400),
            ("accesscontrol.limited-by-app-access-count", "try later".to_owned(), Affected::Account, 60),
            ("", String::new(), Affected::Account, 60),
        ];
        for (sub_code, sub_msg, scope, seconds) in table {
            let (found, wait) = wait(&said(7, sub_code, &sub_msg));
            assert_eq!(found, scope, "{sub_code}");
            let jitter = wait.saturating_sub(Duration::from_secs(seconds));
            assert!((250..1_250).contains(&jitter.as_millis()), "{sub_code}, {sub_msg}: {wait:?}");
        }
        let (scope, wait) = wait(&said(15, "isp.call-limited", ""));
        assert_eq!(scope, Affected::Everyone);
        assert!((1_000..5_000).contains(&wait.as_millis()), "{wait:?}");
    }

    #[test]
    fn of_doubled_members_the_last_counts() {
        let json = r#"{"code":15,"code":7,"sub_code":null,"sub_code":"accesscontrol.limited-by-app-access-count"}"#;
        let error = ErrorResponse::of(&RawValue::from_string(json.to_owned()).unwrap()).unwrap();
        assert_eq!((error.code(), error.sub_code.as_str()), ("7", "accesscontrol.limited-by-app-access-count"));
    }

    #[test]
    fn two_who_are_banned_come_back_at_different_times() {
        let words = |n: u32| format!("request {n}. This ban will last for 1 more seconds");
        let waits: std::collections::HashSet<Duration> =
            (0..20).map(|n| wait(&said(7, "accesscontrol.limited-by-app-access-count", &words(n))).1).collect();
        assert!(waits.len() > 15, "{waits:?}");
    }

    #[test]
    fn the_sub_code_decides_before_the_number() {
        let refused = |kind| Said::Refused(kind);
        let table = [
            (15, "isv.item-not-exist", Said::Absent),
            (50, "isv.item-not-exist-tmall", Said::Absent),
            (15, "isv.item-is-delete:invalid-numIid-or-iid-tmall", Said::Absent),
            (50, "isv.item-get-service-error:ITEM_NOT_FOUND", Said::Absent),
            (50, "isv.item-get-service-error:TIMEOUT", refused(RefusalKind::Bug)),
            (15, "isv.invalid-parameter", refused(RefusalKind::Bug)),
            (15, "isp.remote-service-error", refused(RefusalKind::Outage)),
            (50, "isp.top-remote-connection-timeout", refused(RefusalKind::Outage)),
            (15, "isp.item-service-unavailable", refused(RefusalKind::Outage)),
            (15, "", refused(RefusalKind::Outage)),
            (10, "", refused(RefusalKind::Outage)),
            (27, "invalid-sessionkey", refused(RefusalKind::Denied(Denial::Token))),
            (27, "", refused(RefusalKind::Denied(Denial::Token))),
            (53, "", refused(RefusalKind::Denied(Denial::Token))),
            (27, "isv.something", refused(RefusalKind::Denied(Denial::Token))),
            (25, "", refused(RefusalKind::Denied(Denial::Account))),
            (29, "isv.appkey-not-exists", refused(RefusalKind::Denied(Denial::Account))),
            (11, "isv.permission-api-package-limit", refused(RefusalKind::Denied(Denial::Account))),
            (31, "", refused(RefusalKind::Misconfigured(Common::Clock))),
            (22, "", refused(RefusalKind::Misconfigured(Common::Form))),
            (41, "", refused(RefusalKind::Misconfigured(Common::Params))),
            (40, "isv.missing-parameter", refused(RefusalKind::Misconfigured(Common::Params))),
            (15, "-4003", refused(RefusalKind::Bug)),
            (15, "-1", refused(RefusalKind::Unclear)),
            (50, "SYSTEM_ERROR", refused(RefusalKind::Unclear)),
            (27, "-4003", refused(RefusalKind::Denied(Denial::Token))),
            (900, "", refused(RefusalKind::Unclear)),
            (900, "isv.new", refused(RefusalKind::Bug)),
        ];
        for (code, sub_code, expected) in table {
            assert_eq!(said(code, sub_code, ""), expected, "{code} {sub_code}");
        }
    }
}
