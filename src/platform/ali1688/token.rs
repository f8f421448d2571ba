//! The gateway's tokens: the page where a user authorises an app, and the endpoint that gives and renews them.
//!
//! From the platform's manual of web authorisation, as public copies of it have it: an access token lives ten hours, a
//! refresh token about half a year; a reply to a renewal may bring another refresh token, which then counts. The
//! endpoint takes no signature, since the form has the app's secret in it.

use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

use super::{
    errors,
    sign::{SIGNATURE, signature},
};
use crate::{
    message::json,
    platform::{
        Account, Denial, Exchange, HttpReply, Refusal, RefusalKind, Tokens,
        reading::{kind_of_status, refusal},
    },
    runtime::clock::Timestamp,
};

/// `{url}/openapi/` + this + the app key.
pub const PATH: &str = "http/1/system.oauth2/getToken/";

/// No token is believed to live longer.
const LIFE_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// The exchange that renews an account's access token; nothing without a refresh token.
pub fn renewal(url: &str, account: &Account) -> Option<Exchange> {
    let refresh_token = account.refresh_token.as_ref()?.expose_secret();
    Some(exchange(url, account, "refresh_token", &[("refresh_token", refresh_token)]))
}

/// The exchange that makes tokens of the code that a user brought back from the page.
pub fn authorisation(url: &str, account: &Account, code: &str, redirect_uri: &str) -> Exchange {
    let more = [("need_refresh_token", "true"), ("redirect_uri", redirect_uri), ("code", code)];
    exchange(url, account, "authorization_code", &more)
}

fn exchange(url: &str, account: &Account, grant_type: &str, more: &[(&str, &str)]) -> Exchange {
    let secret = account.app_secret.expose_secret();
    let all = [("grant_type", grant_type), ("client_id", &account.app_key), ("client_secret", secret)];
    let form = all.iter().chain(more).map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Exchange::post(format!("{url}/openapi/{PATH}{}", account.app_key), form)
}

/// The signed address of the page where a user authorises the app: signed over the parameters alone.
pub fn link(page: &str, account: &Account, redirect_uri: &str, state: &str) -> Option<String> {
    let mut params = vec![
        ("client_id", account.app_key.as_str()),
        ("site", "1688"),
        ("redirect_uri", redirect_uri),
        ("state", state),
    ];
    let signature = signature("", &params, account.app_secret.expose_secret());
    params.push((SIGNATURE, &signature));
    crate::platform::http::with_query(page, &params)
}

#[derive(Deserialize)]
struct Body {
    access_token: Option<SecretString>,
    expires_in: Option<serde_json::Value>,
    refresh_token: Option<SecretString>,
    refresh_token_timeout: Option<String>,
    error_code: Option<serde_json::Value>,
    error_message: Option<String>,
    exception: Option<String>,
    error: Option<String>,
    error_description: Option<String>,
}

/// What the endpoint's reply means. No message repeats the body, which may have tokens in it.
///
/// # Errors
/// The refusal: [`RefusalKind::Denied`] if only a new authorisation can help.
pub fn read(reply: &HttpReply) -> Result<Tokens, Refusal> {
    let Ok(body) = json::from_slice::<Body>(&reply.body) else {
        let kind = kind_of_status(reply).unwrap_or(RefusalKind::Outage);
        let bytes = reply.body.len();
        return Err(refusal(kind, &format!("http {}", reply.status), &format!("no token in a reply of {bytes} bytes")));
    };
    match &body.access_token {
        Some(token) if !token.expose_secret().trim().is_empty() => Ok(Tokens {
            access_token: token.clone(),
            lives: body.expires_in.as_ref().and_then(seconds),
            refresh_token: body.refresh_token.filter(|token| !token.expose_secret().trim().is_empty()),
            refresh_until: body.refresh_token_timeout.as_deref().and_then(time),
        }),
        _ => Err(refused(&body, reply)),
    }
}

fn refused(body: &Body, reply: &HttpReply) -> Refusal {
    let code = body.error_code.as_ref().map(|code| code.as_str().map_or_else(|| code.to_string(), str::to_owned));
    let code = code.or_else(|| body.error.clone()).unwrap_or_else(|| format!("http {}", reply.status));
    let words = [&body.error_message, &body.error_description, &body.exception];
    let words = words.into_iter().flatten().find(|words| !words.trim().is_empty());
    let words = words.map_or("no token in the reply", String::as_str);
    let kind = errors::known(&code, reply.retry_after())
        .or_else(|| errors::says_unauthorised(words).then_some(RefusalKind::Denied(Denial::Token)))
        .or_else(|| oauth(&code))
        .or_else(|| kind_of_status(reply))
        .unwrap_or_else(|| if errors::is_of_the_gateway(&code) { RefusalKind::Outage } else { RefusalKind::Malformed });
    refusal(kind, &code, words)
}

/// The codes of RFC 6749, section 5.2.
fn oauth(code: &str) -> Option<RefusalKind> {
    match code {
        "invalid_grant" => Some(RefusalKind::Denied(Denial::Token)),
        "invalid_client" | "unauthorized_client" | "invalid_scope" => Some(RefusalKind::Denied(Denial::Account)),
        "invalid_request" | "unsupported_grant_type" => Some(RefusalKind::Bug),
        _ => None,
    }
}

/// Seconds as the text that the gateway sends, or as a number; nothing if that makes no sense.
fn seconds(value: &serde_json::Value) -> Option<Duration> {
    let seconds = value.as_u64().or_else(|| value.as_str()?.trim().parse().ok())?;
    (seconds > 0).then(|| Duration::from_secs(seconds).min(LIFE_MAX))
}

/// `20261121124343+0800`, with or without milliseconds before the zone.
fn time(text: &str) -> Option<Timestamp> {
    let (digits, zone) = text.trim().split_at_checked(text.trim().find(['+', '-'])?)?;
    let at = jiff::Timestamp::strptime("%Y%m%d%H%M%S%z", format!("{}{zone}", digits.get(..14)?)).ok()?;
    Some(Timestamp::from_millis(at.as_millisecond()))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::message::AccountAlias;

    fn account(refresh_token: Option<&str>) -> Account {
        Account {
            app_key: "1000000".to_owned(),
            app_secret: "test123".into(),
            refresh_token: refresh_token.map(Into::into),
            ..Account::named(AccountAlias::new("one").unwrap())
        }
    }

    fn reply(status: u16, body: &str) -> HttpReply {
        HttpReply::new(status, Bytes::copy_from_slice(body.as_bytes()), Timestamp::from_millis(0))
    }

    fn pairs(exchange: &Exchange) -> Vec<(&str, &str)> {
        exchange.params().collect()
    }

    #[test]
    fn a_renewal_posts_the_refresh_token_and_the_secret_and_signs_nothing() {
        let exchange = renewal("https://gw.open.1688.com", &account(Some("rt-1"))).unwrap();
        assert_eq!(exchange.url, "https://gw.open.1688.com/openapi/http/1/system.oauth2/getToken/1000000");
        let expected = [
            ("grant_type", "refresh_token"),
            ("client_id", "1000000"),
            ("client_secret", "test123"),
            ("refresh_token", "rt-1"),
        ];
        assert_eq!(pairs(&exchange), expected);
        assert!(renewal("https://gw.open.1688.com", &account(None)).is_none());
    }

    #[test]
    fn a_code_is_exchanged_for_tokens_with_a_refresh_token_among_them() {
        let exchange = authorisation("http://gw", &account(None), "c-1", "https://shop/back");
        let expected = [
            ("grant_type", "authorization_code"),
            ("client_id", "1000000"),
            ("client_secret", "test123"),
            ("need_refresh_token", "true"),
            ("redirect_uri", "https://shop/back"),
            ("code", "c-1"),
        ];
        assert_eq!(pairs(&exchange), expected);
    }

    #[test]
    fn the_link_is_signed_over_its_parameters_alone() {
        let link = link("https://auth.1688.com/oauth/authorize", &account(None), "https://shop/back?a=1&b=ö", "s t");
        // HMAC-SHA1 of "client_id1000000redirect_urihttps://shop/back?a=1&b=ösite1688states t" under "test123",
        // computed apart from this code.
        let expected = "https://auth.1688.com/oauth/authorize?client_id=1000000&site=1688\
                        &redirect_uri=https%3A%2F%2Fshop%2Fback%3Fa%3D1%26b%3D%C3%B6&state=s+t\
                        &_aop_signature=2ED56CF98CEBFC5A90918C19C0671C586867E899";
        assert_eq!(link.as_deref(), Some(expected));
    }

    #[test]
    fn the_gateways_reply_is_read_with_its_times_as_text() {
        let body = r#"{"aliId":"8888888888","resource_owner":"shop","memberId":"b2b-1","expires_in":"36000",
            "refresh_token":"rt-2","access_token":"at-2","refresh_token_timeout":"20261121124343000+0800"}"#;
        let tokens = read(&reply(200, body)).unwrap();
        assert_eq!(tokens.access_token.expose_secret(), "at-2");
        assert_eq!(tokens.lives, Some(Duration::from_secs(36_000)));
        assert_eq!(tokens.refresh_token.as_ref().map(ExposeSecret::expose_secret), Some("rt-2"));
        assert_eq!(tokens.refresh_until.unwrap().to_string(), "2026-11-21T04:43:43.000Z");
        assert!(!format!("{tokens:?}").contains("t-2"), "{tokens:?}");
    }

    #[test]
    fn what_is_left_out_or_makes_no_sense_is_unknown() {
        for rest in
            ["", r#","expires_in":"soon""#, r#","expires_in":"0""#, r#","expires_in":-5"#, r#","refresh_token":" ""#]
        {
            let tokens = read(&reply(200, &format!(r#"{{"access_token":"at-2"{rest}}}"#))).unwrap();
            assert!(tokens.lives.is_none() && tokens.refresh_token.is_none(), "{rest}");
        }
        let tokens =
            read(&reply(200, r#"{"access_token":"a","expires_in":60,"refresh_token_timeout":"never"}"#)).unwrap();
        assert_eq!((tokens.lives, tokens.refresh_until), (Some(Duration::from_secs(60)), None));
        let long = read(&reply(200, r#"{"access_token":"a","expires_in":"99999999999999"}"#)).unwrap();
        assert_eq!(long.lives, Some(LIFE_MAX));
    }

    #[test]
    fn a_refusal_says_whether_a_new_authorisation_is_needed() {
        let token = RefusalKind::Denied(Denial::Token);
        let account = RefusalKind::Denied(Denial::Account);
        let table = [
            (200, r#"{"error_code":"401","error_message":"Request need user authorized"}"#, token.clone(), "401"),
            (400, r#"{"error_code":401,"exception":"Request need user authorized"}"#, token.clone(), "401"),
            (
                400,
                r#"{"error":"invalid_grant","error_description":"refresh token expired"}"#,
                token.clone(),
                "invalid_grant",
            ),
            (401, r#"{"error_code":"x","error_message":"Request need user authorized"}"#, token, "x"),
            (400, r#"{"error":"invalid_client"}"#, account.clone(), "invalid_client"),
            (400, r#"{"error_code":"gw.AppKeyNotFound"}"#, account, "gw.AppKeyNotFound"),
            (400, r#"{"error_code":"gw.NeverSeen"}"#, RefusalKind::Outage, "gw.NeverSeen"),
            (502, "<html>rt-1</html>", RefusalKind::Outage, "http 502"),
            (200, r#"{"access_token":"#, RefusalKind::Outage, "http 200"),
            (200, r#"{"access_token":""}"#, RefusalKind::Malformed, "http 200"),
            (500, r#"{"status":500}"#, RefusalKind::Outage, "http 500"),
        ];
        for (status, body, kind, code) in table {
            let refusal = read(&reply(status, body)).unwrap_err();
            assert_eq!((&refusal.kind, refusal.code.as_str()), (&kind, code), "{body}");
            assert!(!refusal.message.contains("rt-1"), "{refusal:?}");
        }
    }
}
