//! The platform's sessions, and how one is renewed: `taobao.top.auth.token.refresh`, a signed call like any other.
//!
//! The method's manual says that it is for apps of the service market alone; those of others have sessions of a fixed
//! life, and are refused here. The reply has a JSON text in its JSON: times in seconds from now or in milliseconds since
//! 1970.

use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    errors::{ErrorResponse, Said},
    request::Template,
};
use crate::{
    message::json,
    platform::{
        Account, Common, Denial, Exchange, HttpReply, Refusal, RefusalKind, Tokens,
        reading::{by_status, malformed, text},
    },
    runtime::clock::Timestamp,
};

/// The method.
pub const METHOD: &str = "taobao.top.auth.token.refresh";

/// No session is believed to live longer.
const LIFE_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// The exchange that renews an account's session; nothing without a refresh token.
pub fn renewal(template: &Template, account: &Account, now: Timestamp) -> Option<Exchange> {
    let refresh_token = account.refresh_token.as_ref()?.expose_secret().to_owned();
    let mut form = template.head(METHOD, account, now);
    form.push(("refresh_token".to_owned(), refresh_token));
    Some(template.signed(account, form))
}

#[derive(Deserialize)]
struct Body<'a> {
    #[serde(borrow, default)]
    top_auth_token_refresh_response: Option<Response<'a>>,
    #[serde(borrow, default)]
    error_response: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Response<'a> {
    #[serde(borrow)]
    token_result: &'a RawValue,
}

#[derive(Deserialize)]
struct Session {
    access_token: Option<SecretString>,
    expires_in: Option<serde_json::Value>,
    refresh_token: Option<SecretString>,
    refresh_token_valid_time: Option<serde_json::Value>,
}

/// What the reply means. No message repeats the body, which may have tokens in it.
///
/// # Errors
/// The refusal: [`RefusalKind::Denied`] if only a new authorisation can help.
pub fn read(reply: &HttpReply) -> Result<Tokens, Refusal> {
    let nothing = |what| by_status(reply, RefusalKind::Outage, what);
    let body: Body<'_> = json::from_slice(&reply.body).map_err(|_| nothing("no session in the reply"))?;
    if let Some(error) = body.error_response {
        return Err(refused(error, reply));
    }
    let response = body.top_auth_token_refresh_response.ok_or_else(|| nothing("no session in the reply"))?;
    let result: Session = json::from_str(&text(response.token_result))
        .map_err(|_| malformed("token_result", "the session in the reply is no JSON"))?;
    let is_there = |token: &SecretString| !token.expose_secret().trim().is_empty();
    let access_token = result.access_token.filter(is_there);
    Ok(Tokens {
        access_token: access_token.ok_or_else(|| malformed("token_result", "no session in the reply"))?,
        lives: result.expires_in.as_ref().and_then(number).map(Duration::from_secs).map(|life| life.min(LIFE_MAX)),
        refresh_token: result.refresh_token.filter(is_there),
        refresh_until: result
            .refresh_token_valid_time
            .as_ref()
            .and_then(number)
            .and_then(|millis| i64::try_from(millis).ok())
            .map(Timestamp::from_millis),
    })
}

fn refused(error: &RawValue, reply: &HttpReply) -> Refusal {
    let Some(error) = ErrorResponse::of(error) else { return malformed("shape", "error_response is no object") };
    let kind = match error.meaning(reply) {
        // Whatever is wrong with what was sent is wrong with the refresh token: there is nothing else in it.
        Said::Absent | Said::Refused(RefusalKind::Bug | RefusalKind::Misconfigured(Common::Params)) => {
            RefusalKind::Denied(Denial::Token)
        }
        Said::Refused(kind) => kind,
    };
    error.refusal(kind)
}

/// A number above 0, as such or as text.
fn number(value: &serde_json::Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_str()?.trim().parse().ok()).filter(|number| *number > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(body: &str) -> HttpReply {
        HttpReply::new(200, body.to_owned(), Timestamp::from_millis(0))
    }

    #[test]
    fn a_session_is_read_out_of_the_text_in_the_reply() {
        let body = r#"{"top_auth_token_refresh_response":{"token_result":"{\"access_token\":\"s-2\",\"expires_in\":86400,
            \"refresh_token\":\"r-2\",\"refresh_token_valid_time\":1900000000000,\"taobao_user_nick\":\"shop\"}"}}"#;
        let tokens = read(&reply(&body.replace("\n            ", ""))).unwrap();
        assert_eq!(tokens.access_token.expose_secret(), "s-2");
        assert_eq!(tokens.lives, Some(Duration::from_secs(86_400)));
        assert_eq!(tokens.refresh_token.as_ref().map(ExposeSecret::expose_secret), Some("r-2"));
        assert_eq!(tokens.refresh_until, Some(Timestamp::from_millis(1_900_000_000_000)));
    }

    #[test]
    fn a_refusal_says_whether_a_new_authorisation_is_needed() {
        let table = [
            (r#"{"error_response":{"code":27,"msg":"Invalid session"}}"#, RefusalKind::Denied(Denial::Token)),
            (r#"{"error_response":{"code":41,"sub_code":"isv.invalid-token"}}"#, RefusalKind::Denied(Denial::Token)),
            (r#"{"error_response":{"code":25,"msg":"Invalid signature"}}"#, RefusalKind::Denied(Denial::Account)),
            (r#"{"error_response":{"code":15,"sub_code":"isp.unavailable"}}"#, RefusalKind::Outage),
            (r#"{"error_response":7}"#, RefusalKind::Malformed),
            (r#"{"top_auth_token_refresh_response":{"token_result":"{}"}}"#, RefusalKind::Malformed),
            ("<html>r-1</html>", RefusalKind::Outage),
            ("{}", RefusalKind::Outage),
        ];
        for (body, kind) in table {
            let refusal = read(&reply(body)).unwrap_err();
            assert_eq!(refusal.kind, kind, "{body}");
            assert!(!refusal.message.contains("r-1"), "{refusal:?}");
        }
    }
}
