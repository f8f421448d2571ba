//! Takes an account's secrets out of texts that others wrote.

use std::{borrow::Cow, ops::Range};

use secrecy::ExposeSecret;
use serde_json::value::RawValue;

use super::{Account, Body, Exchange};

const MASK: &str = "[secret]";
/// A secret shorter than this is never looked for in free text, in bytes: it may be part of any word. It is hidden where
/// it stands under its own name.
const SHORT: usize = 8;
/// A cut-off piece of a secret this long or longer is hidden too, in bytes.
const PIECE: usize = 4;
/// As long as the shortest signature in use (HMAC-MD5 in hex).
const SIGNATURE: usize = 32;
/// HMAC-SHA1 in Base64, without its padding.
const BASE64: usize = 27;

/// What nobody may see of an account, and of a call that it has made. There is no `Debug`.
pub struct Secrets(Vec<Secret>);

/// A value, and where it belongs.
struct Secret {
    value: String,
    /// The parameters that carry it.
    names: Vec<String>,
    /// How it stands in texts; none if it is short.
    forms: Vec<String>,
}

impl Secret {
    fn new(value: &str, names: &[&str]) -> Self {
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        let mut forms = Vec::new();
        if value.len() >= SHORT {
            let encoded = form_urlencoded(value, hex::encode_upper);
            let lower = form_urlencoded(value, hex::encode);
            // As it is, as PHP's JSON has it, and as a query carries it.
            forms.extend([value.to_owned(), value.replace('/', "\\/"), encoded.replace('+', "%20"), encoded, lower]);
            forms.sort_unstable();
            forms.dedup();
        }
        Self { value: value.to_owned(), names, forms }
    }

    fn belongs_to(&self, name: &str) -> bool {
        self.names.iter().any(|own| own.eq_ignore_ascii_case(name))
    }
}

impl Secrets {
    /// Those of an account, under the names that vendors give them.
    #[must_use]
    pub fn of(account: &Account) -> Self {
        let all: [(_, &[&str]); 3] = [
            (Some(&account.app_secret), &["app_secret", "appSecret", "client_secret", "secret"]),
            (account.access_token.as_ref(), &["access_token", "accessToken", "session"]),
            (account.refresh_token.as_ref(), &["refresh_token", "refreshToken"]),
        ];
        let all = all.into_iter().filter_map(|(secret, names)| Some((secret?.expose_secret(), names)));
        Self(all.filter(|(value, _)| !value.is_empty()).map(|(value, names)| Secret::new(value, names)).collect())
    }

    /// And what a call carries in its query, its headers and its body: a secret under whatever name, its signature, and
    /// credentials that were made of secrets.
    #[must_use]
    pub fn with_sent(mut self, exchange: &Exchange) -> Self {
        for (name, value) in exchange.params() {
            self.note(name, value, is_signature(name));
        }
        for (name, value) in &exchange.headers {
            let is_secret = is_credential(name) || is_signature(name);
            self.note(name, value, is_secret);
            // `Bearer …`, `Basic …`: vendors quote it with and without the word.
            if let Some((_, credential)) = value.split_once(' ')
                && self.note(name, credential, is_secret)
            {
                self.0.push(Secret::new(value, &[name, &name.to_ascii_lowercase()]));
            }
        }
        if let Body::Json(json) = &exchange.body {
            // What is no JSON is hidden by its value alone.
            self.note_leaves("", &serde_json::from_str(json).unwrap_or_default());
        }
        self
    }

    /// Learns that a value goes by a name, if it is one of them, or `is_secret` whatever it is. Whether it is one now.
    fn note(&mut self, name: &str, value: &str, is_secret: bool) -> bool {
        if let Some(known) = self.0.iter_mut().find(|secret| secret.value == value) {
            // A JSON text by itself has no name, and no name stands everywhere.
            known.names.extend((!name.is_empty()).then(|| name.to_owned()));
            return true;
        }
        let is_new = is_secret && !value.is_empty();
        if is_new {
            self.0.push(Secret::new(value, &[name]));
        }
        is_new
    }

    fn note_leaves(&mut self, name: &str, json: &serde_json::Value) {
        match json {
            serde_json::Value::Object(members) => {
                members.iter().for_each(|(name, inner)| self.note_leaves(name, inner));
            }
            serde_json::Value::Array(elements) => elements.iter().for_each(|inner| self.note_leaves(name, inner)),
            serde_json::Value::String(text) => {
                self.note(name, text, is_signature(name));
            }
            serde_json::Value::Null | serde_json::Value::Bool(_) | serde_json::Value::Number(_) => {}
        }
    }

    /// `text` without any of them, nor anything that looks like a signature.
    ///
    /// A text that ends in `…` was shortened: there the beginning of a secret is hidden too.
    #[must_use]
    pub fn hide<'t>(&self, text: &'t str) -> Cow<'t, str> {
        let mut hidden = signatures(text);
        base64_signatures(text, &mut hidden);
        for secret in &self.0 {
            secret.forms.iter().for_each(|form| find(text, form, &mut hidden));
            secret.names.iter().for_each(|name| find_under(text, name, &secret.value, &mut hidden));
        }
        if hidden.is_empty() { Cow::Borrowed(text) } else { Cow::Owned(mask(text, hidden)) }
    }

    /// A vendor's code without any of them. A code is no text: nothing is guessed in it.
    #[must_use]
    pub fn hide_in_code<'t>(&self, code: &'t str) -> Cow<'t, str> {
        let forms = || self.0.iter().flat_map(|secret| &secret.forms);
        let hidden: Vec<_> =
            forms().flat_map(|form| code.match_indices(form.as_str())).map(|(at, form)| at..at + form.len()).collect();
        if hidden.is_empty() { Cow::Borrowed(code) } else { Cow::Owned(mask(code, hidden)) }
    }

    /// A vendor's JSON without any of them; nothing if there are none in it. Everything else stays byte for byte, and
    /// what merely looks like a signature too: it may be an image's name.
    #[must_use]
    pub fn hide_in_json(&self, json: &RawValue) -> Option<Box<RawValue>> {
        let json = json.get();
        let mut clean = String::new();
        let (mut at, mut done) = (0, 0);
        // The name that the next value stands under, and the text before it: some write {"name":"session","value":"…"}.
        let (mut name, mut before) = (Cow::Borrowed(""), Cow::Borrowed(""));
        while let Some(byte) = json.as_bytes().get(at) {
            let end = match byte {
                b'"' => at + string_length(&json[at..]),
                b'0'..=b'9' | b'-' => at + json[at..].find(|c| "]}, \t\r\n".contains(c)).unwrap_or(json.len() - at),
                _ => {
                    at += 1;
                    continue;
                }
            };
            let token = &json[at..end];
            let is_text = *byte == b'"';
            let content = if is_text { content(token) } else { Cow::Borrowed(token) };
            if is_text && json[end..].trim_ascii_start().starts_with(':') {
                if let Some(hidden) = self.hide_name(&content) {
                    clean.push_str(&json[done..at]);
                    clean.push_str(&serde_json::Value::from(hidden).to_string());
                    done = end;
                }
                name = content;
            } else {
                if let Some(hidden) = self.hide_leaf(&content, &name, &before, is_text) {
                    clean.push_str(&json[done..at]);
                    clean.push_str(&serde_json::Value::from(hidden).to_string());
                    done = end;
                }
                before = content;
            }
            at = end;
        }
        if done == 0 {
            return None;
        }
        clean.push_str(&json[done..]);
        RawValue::from_string(clean).ok()
    }

    /// A member's name without secrets, as where a token is the key of what is known of it; nothing if it has none.
    fn hide_name(&self, name: &str) -> Option<String> {
        let mut hidden = Vec::new();
        self.0.iter().flat_map(|secret| &secret.forms).for_each(|form| find(name, form, &mut hidden));
        (!hidden.is_empty()).then(|| mask(name, hidden))
    }

    /// A leaf of a JSON without secrets; nothing if it has none.
    fn hide_leaf(&self, content: &str, name: &str, before: &str, is_text: bool) -> Option<String> {
        let belongs = |secret: &Secret| secret.belongs_to(name) || secret.belongs_to(before);
        if self.0.iter().any(|secret| secret.value == content && belongs(secret)) {
            return Some(MASK.to_owned());
        }
        let mut hidden = Vec::new();
        if is_text {
            for secret in &self.0 {
                secret.forms.iter().for_each(|form| find(content, form, &mut hidden));
                secret.names.iter().for_each(|name| find_under(content, name, &secret.value, &mut hidden));
            }
        } else if self.0.iter().any(|secret| !secret.forms.is_empty() && secret.value == content) {
            hidden.push(0..content.len());
        }
        (!hidden.is_empty()).then(|| mask(content, hidden))
    }
}

/// `text` without the account's secrets: [`Secrets::hide`].
#[must_use]
pub fn redact<'t>(account: &Account, text: &'t str) -> Cow<'t, str> {
    Secrets::of(account).hide(text)
}

/// Whether a parameter of this name carries a signature.
fn is_signature(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    matches!(name.as_str(), "sign" | "signature") || name.ends_with("_signature")
}

/// Whether a header of this name carries nothing but what proves who calls.
fn is_credential(name: &str) -> bool {
    ["authorization", "proxy-authorization", "cookie"].iter().any(|known| name.eq_ignore_ascii_case(known))
}

/// The length of the JSON string that a text begins with, quotes and all.
fn string_length(json: &str) -> usize {
    let mut is_escaped = false;
    let end = json.bytes().skip(1).position(|byte| {
        let ends = byte == b'"' && !is_escaped;
        is_escaped = byte == b'\\' && !is_escaped;
        ends
    });
    end.map_or(json.len(), |end| end + 2)
}

/// What is in a JSON string.
fn content(token: &str) -> Cow<'_, str> {
    let inside = token.get(1..token.len() - 1).unwrap_or_default();
    if !inside.contains('\\') {
        return Cow::Borrowed(inside);
    }
    serde_json::from_str(token).map_or(Cow::Borrowed(inside), Cow::Owned)
}

fn find(text: &str, secret: &str, hidden: &mut Vec<Range<usize>>) {
    hidden.extend(text.match_indices(secret).map(|(at, found)| at..at + found.len()));
    let end = text.trim_end_matches(['…', '\u{fffd}']).len();
    if end == text.len() {
        return;
    }
    let piece = (PIECE..secret.len())
        .rev()
        .find(|&length| secret.is_char_boundary(length) && text[..end].ends_with(&secret[..length]));
    hidden.extend(piece.map(|length| end - length..end));
}

/// A value of whatever length where it stands under its name: `name=value`, `name: "value"`.
fn find_under(text: &str, name: &str, value: &str, hidden: &mut Vec<Range<usize>>) {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    for (at, _) in text.match_indices(name) {
        let rest = &text[at + name.len()..];
        let opened = rest.trim_start_matches(['"', '\'', ' ', '=', ':', '\\']);
        let between = &rest[..rest.len() - opened.len()];
        let ends = !opened.get(value.len()..).is_some_and(|behind| behind.starts_with(is_word));
        if between.contains(['=', ':']) && opened.starts_with(value) && ends && !text[..at].ends_with(is_word) {
            let start = text.len() - opened.len();
            hidden.push(start..start + value.len());
        }
    }
}

/// Runs of hex digits as long as a signature, or cut off by the end of the text.
fn signatures(text: &str) -> Vec<Range<usize>> {
    let mut runs = Vec::new();
    let mut start = 0;
    for run in text.split(|c: char| !c.is_ascii_hexdigit()) {
        let end = start + run.len();
        let is_cut = text[end..].starts_with('…') && run.len() >= 2 * PIECE;
        if run.len() >= SIGNATURE || is_cut {
            runs.push(start..end);
        }
        start = end + text[end..].chars().next().map_or(0, char::len_utf8);
    }
    runs
}

/// HMAC-SHA1 in Base64, as it is and as a query carries it; and what stands behind `sign=`, also if it is cut off.
fn base64_signatures(text: &str, hidden: &mut Vec<Range<usize>>) {
    let mut start = 0;
    for run in text.split(|c: char| !(c.is_ascii_alphanumeric() || "+/%".contains(c))) {
        let end = start + run.len();
        let is_padded = text[end..].starts_with('=');
        // Each `%2B` is one character.
        let length = run.len().saturating_sub(2 * run.matches('%').count());
        let is_whole = (is_padded && length == BASE64) || (run.ends_with("%3D") && length == BASE64 + 1);
        if is_whole || (!run.is_empty() && text[..start].ends_with("sign=")) {
            hidden.push(start..end + usize::from(is_padded));
        }
        start = end + text[end..].chars().next().map_or(0, char::len_utf8);
    }
}

fn mask(text: &str, mut hidden: Vec<Range<usize>>) -> String {
    hidden.sort_unstable_by_key(|range| (range.start, range.end));
    let mut masked = String::with_capacity(text.len());
    let mut done = 0;
    for range in hidden {
        if range.start >= done {
            masked.push_str(&text[done..range.start]);
            masked.push_str(MASK);
        }
        done = done.max(range.end);
    }
    masked.push_str(&text[done..]);
    masked
}

fn form_urlencoded(text: &str, hex: impl Fn([u8; 1]) -> String) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b' ' => encoded.push('+'),
            b'*' | b'-' | b'.' | b'_' | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => encoded.push(char::from(byte)),
            _ => encoded.extend(["%", &hex([byte])]),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::message::{AccountAlias, codec::shorten};

    fn account(secret: &str, token: &str) -> Account {
        Account {
            alias: AccountAlias::new("one").unwrap(),
            app_key: "1000000".to_owned(),
            app_secret: secret.into(),
            access_token: Some(token.into()),
            refresh_token: Some("rt-08154711".into()),
            limit: None,
            limits: Vec::new(),
            calls_in_flight: None,
            address: None,
        }
    }

    #[test]
    fn secrets_are_hidden_wherever_they_stand() {
        let account = account("test1234", "at/00+1=");
        let table = [
            ("bad token at/00+1= for app", "bad token [secret] for app"),
            ("access_token=at%2F00%2B1%3D&x=1", "access_token=[secret]&x=1"),
            ("unknown token rt-08154711", "unknown token [secret]"),
            ("access_token=at%2f00%2b1%3d&x=1", "access_token=[secret]&x=1"),
            ("test1234test1234", "[secret][secret]"),
            ("cut off: at/00…", "cut off: [secret]…"),
            ("cut off: tes…", "cut off: tes…"),
            ("sign D1C523F97E03FD206938AB605F5D5BB338BDAB1B is wrong", "sign [secret] is wrong"),
            ("sign D1C523F97E03…", "sign [secret]…"),
            ("sign 15G+wxpi5BfkjFebQAooV9mwkFA= is wrong", "sign [secret] is wrong"),
            ("?v=2.0&sign=15G%2Bwxpi5BfkjFebQAooV9mwkFA%3D&x=1", "?v=2.0&sign=[secret]&x=1"),
            ("?sign=15G%2Bwxpi5…", "?sign=[secret]…"),
            ("a%2F15G%2Bwxpi5 = 3", "a%2F15G%2Bwxpi5 = 3"),
            ("Request need user authorized", "Request need user authorized"),
            ("该商品已下架 test1234", "该商品已下架 [secret]"),
            // PHP's JSON.
            (r#"the reply begins: {"session":"at\/00+1="}"#, r#"the reply begins: {"session":"[secret]"}"#),
        ];
        for (text, expected) in table {
            assert_eq!(redact(&account, text), expected);
        }
    }

    #[test]
    fn the_beginning_of_a_reply_that_ends_within_a_secret_shows_nothing_of_it() {
        let account = account("a-secret-of-the-app", "at-0000001");
        for spaces in 560..640 {
            let body = format!(r#"{{"secret":{}"a-secret-of-the-app"}}"#, " ".repeat(spaces));
            let text = super::super::reading::beginning(body.as_bytes());
            let shown = redact(&account, &text).into_owned();
            assert!(!shown.contains("a-se"), "{spaces}: {shown}");
        }
    }

    #[test]
    fn a_short_secret_mangles_no_words() {
        let short = account("tt", "1234");
        for text in ["http 503", "http://gw/ttt: 1234 items", "cut off: 1234…", "see the item-s"] {
            assert_eq!(redact(&short, text), text);
        }
        let long = account("item-secret-0001", "at-0000001");
        assert_eq!(redact(&long, "there is no such item"), "there is no such item");
    }

    #[test]
    fn a_short_secret_is_hidden_under_its_own_name_and_a_code_is_no_text() {
        let exchange = Exchange::get("http://gw/".to_owned(), vec![("key".to_owned(), "tt".to_owned())]);
        let secrets = Secrets::of(&account("tt", "1234")).with_sent(&exchange);
        let table = [
            ("GET /?key=tt&num=1", "GET /?key=[secret]&num=1"),
            (r#"bad {"session": "1234"}"#, r#"bad {"session": "[secret]"}"#),
            ("monkey=tt, key=ttt, key tt", "monkey=tt, key=ttt, key tt"),
            ("session=12345", "session=12345"),
        ];
        for (text, expected) in table {
            assert_eq!(secrets.hide(text), expected);
        }
        let signature = "D1C523F97E03FD206938AB605F5D5BB338BDAB1B";
        assert_eq!(secrets.hide_in_code(signature), signature);
        assert_eq!(Secrets::of(&account("a-long-secret", "1")).hide_in_code("isv.a-long-secret"), "isv.[secret]");
    }

    #[test]
    fn what_headers_and_a_json_body_carry_is_hidden_under_their_names_too() {
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let exchange = Exchange {
            headers: vec![pair("Authorization", "Bearer tt"), pair("X-Key", "1234"), pair("User-Agent", "weir")],
            body: Body::Json(r#"{"auth":{"code":["1234"]},"signature":"abc","n":1234,"agent":"weir"}"#.to_owned()),
            ..Exchange::post("http://gw/".to_owned(), Vec::new())
        };
        let secrets = Secrets::of(&account("tt", "1234")).with_sent(&exchange);
        let table = [
            ("sent Authorization: Bearer tt and X-Key: 1234.", "sent Authorization: [secret] and X-Key: [secret]."),
            ("authorization=Bearer tt", "authorization=[secret]"),
            (r#"{"code":"1234","signature":"abc"}"#, r#"{"code":"[secret]","signature":"[secret]"}"#),
            ("User-Agent: weir, agent=weir, n=1234", "User-Agent: weir, agent=weir, n=1234"),
        ];
        for (text, expected) in table {
            assert_eq!(secrets.hide(text), expected);
        }
        let basic = Exchange { headers: vec![pair("authorization", "Basic dHQ6dHQ=")], ..exchange };
        let secrets = Secrets::of(&account("tt", "1234")).with_sent(&basic);
        assert_eq!(secrets.hide("we got dHQ6dHQ= there"), "we got [secret] there");
    }

    #[test]
    fn in_json_secrets_are_hidden_by_value_or_by_place_and_the_rest_stays_byte_for_byte() {
        let form = vec![("key".to_owned(), "tt".to_owned()), ("_aop_signature".to_owned(), "SIGNED-BY-US".to_owned())];
        let exchange = Exchange::get("http://gw/".to_owned(), form);
        let secrets = Secrets::of(&account("tt", "at/00+1=")).with_sent(&exchange);
        let table = [
            (r#"{"title":"tt", "price" : 10.00,"key":"blue","md5":"D1C523F97E03FD206938AB605F5D5BB3"}"#, None),
            (r#"{"key":"tt","title":"tt"}"#, Some(r#"{"key":"[secret]","title":"tt"}"#)),
            (
                r#"{"n": 1.50, "args":[{"key":"session","value":"at\/00+1="}]}"#,
                Some(r#"{"n": 1.50, "args":[{"key":"session","value":"[secret]"}]}"#),
            ),
            (
                r#"{"u":"http://x/?access_token=at%2F00%2B1%3D\u0026key=tt"}"#,
                Some(r#"{"u":"http://x/?access_token=[secret]&key=[secret]"}"#),
            ),
            (r#"{"args":[{"name":"key","value":"tt"}]}"#, Some(r#"{"args":[{"name":"key","value":"[secret]"}]}"#)),
            (
                r#"{"left":{"at\/00+1=" : {"calls":5},"x":{"session":"at/00+1="}}}"#,
                Some(r#"{"left":{"[secret]" : {"calls":5},"x":{"session":"[secret]"}}}"#),
            ),
            (r#"["SIGNED-BY-US", "\"", -1]"#, Some(r#"["[secret]", "\"", -1]"#)),
            (r#""""#, None),
            ("7", None),
        ];
        for (json, expected) in table {
            let raw = RawValue::from_string(json.to_owned()).unwrap();
            assert_eq!(secrets.hide_in_json(&raw).as_deref().map(RawValue::get), expected, "{json}");
        }
        let number = Secrets::of(&account("12345678", "77"));
        let raw = RawValue::from_string(r#"{"app_secret":12345678,"item":123456789,"session":77,"n":77}"#.to_owned())
            .unwrap();
        let clean = number.hide_in_json(&raw).unwrap();
        assert_eq!(clean.get(), r#"{"app_secret":"[secret]","item":123456789,"session":"[secret]","n":77}"#);
    }

    #[test]
    fn a_text_without_secrets_is_not_copied() {
        assert!(matches!(redact(&account("test1234", "at-1"), "gw.ParamMissing"), Cow::Borrowed(_)));
    }

    proptest! {
        #[test]
        fn no_json_is_broken_and_none_keeps_a_secret(words in "[\"\\\\a-z0-9/{}:, \u{fc}]{0,12}", number in any::<i32>()) {
            let secrets = Secrets::of(&account("s3cr3t/Värde\"", "t0"));
            let json = serde_json::json!({
                "a": format!("{words}s3cr3t/Värde\"{words}"), &words: [number, {"session": "t0", "x": words}], "session": "t0",
                format!("k{words}s3cr3t/Värde\"{words}"): number,
            });
            let raw = RawValue::from_string(json.to_string()).unwrap();
            let clean = secrets.hide_in_json(&raw).unwrap();
            let value: serde_json::Value = serde_json::from_str(clean.get()).unwrap();
            let has = |text: &serde_json::Value| text.as_str().is_some_and(|text| text.contains("s3cr3t"));
            prop_assert!(!has(&value["a"]), "{}", clean);
            prop_assert!(value.as_object().unwrap().keys().all(|name| !name.contains("s3cr3t")), "{}", clean);
            prop_assert_eq!(&value["session"], "[secret]");
            prop_assert!(words == "session" || value[&words][0] == number || words == "a");
        }

        #[test]
        fn however_a_text_is_shortened_no_secret_is_left(before in ".{0,40}", after in ".{0,40}", limit in 0..120_usize) {
            let account = account("s3cr3t+Värde/42", "t0k3n~zzz");
            let text = format!("{before}s3cr3t+Värde/42{after}t0k3n~zzz");
            let clean = redact(&account, &shorten(&text, limit)).into_owned();
            prop_assert!(!clean.contains("s3cr3"), "{clean}");
            prop_assert!(!clean.contains("t0k3n"), "{clean}");
        }
    }
}
