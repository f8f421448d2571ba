//! Takes an account's secrets out of texts that others wrote.

use std::{borrow::Cow, ops::Range};

use secrecy::ExposeSecret;

use super::Account;

const MASK: &str = "[secret]";
/// A cut-off piece of a secret this long or longer is hidden too, in bytes.
const PIECE: usize = 4;
/// As long as the shortest signature in use (HMAC-MD5 in hex).
const SIGNATURE: usize = 32;
/// HMAC-SHA1 in Base64, without its padding.
const BASE64: usize = 27;

/// `text` without the account's secret, its tokens and anything that looks like a signature.
///
/// Secrets are found as they are and as a form carries them, and at the end of the text also the beginning of
/// one: texts arrive here shortened.
#[must_use]
pub fn redact<'t>(account: &Account, text: &'t str) -> Cow<'t, str> {
    let mut hidden = signatures(text);
    base64_signatures(text, &mut hidden);
    let secrets = [Some(&account.app_secret), account.access_token.as_ref(), account.refresh_token.as_ref()];
    for secret in secrets.into_iter().flatten().map(ExposeSecret::expose_secret).filter(|secret| !secret.is_empty()) {
        find(text, secret, &mut hidden);
        let in_a_form = form_urlencoded(secret);
        if in_a_form != secret {
            find(text, &in_a_form, &mut hidden);
        }
    }
    if hidden.is_empty() { Cow::Borrowed(text) } else { Cow::Owned(mask(text, hidden)) }
}

fn find(text: &str, secret: &str, hidden: &mut Vec<Range<usize>>) {
    hidden.extend(text.match_indices(secret).map(|(at, found)| at..at + found.len()));
    let end = text.trim_end_matches(['…', '\u{fffd}']).len();
    let piece = (PIECE..secret.len())
        .rev()
        .find(|&length| secret.is_char_boundary(length) && text[..end].ends_with(&secret[..length]));
    hidden.extend(piece.map(|length| end - length..end));
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

fn form_urlencoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b' ' => encoded.push('+'),
            b'*' | b'-' | b'.' | b'_' | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => encoded.push(char::from(byte)),
            _ => encoded.extend(["%", &hex::encode_upper([byte])]),
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
            refresh_token: Some("rt-0815".into()),
            limit: None,
            limits: Vec::new(),
            calls_in_flight: None,
            address: None,
        }
    }

    #[test]
    fn secrets_are_hidden_wherever_they_stand() {
        let account = account("test123", "at/00+1=");
        let table = [
            ("bad token at/00+1= for app", "bad token [secret] for app"),
            ("access_token=at%2F00%2B1%3D&x=1", "access_token=[secret]&x=1"),
            ("unknown token rt-0815", "unknown token [secret]"),
            ("test123test123", "[secret][secret]"),
            ("cut off: at/00…", "cut off: [secret]…"),
            ("cut off: tes…", "cut off: tes…"),
            ("sign D1C523F97E03FD206938AB605F5D5BB338BDAB1B is wrong", "sign [secret] is wrong"),
            ("sign D1C523F97E03…", "sign [secret]…"),
            ("sign 15G+wxpi5BfkjFebQAooV9mwkFA= is wrong", "sign [secret] is wrong"),
            ("?v=2.0&sign=15G%2Bwxpi5BfkjFebQAooV9mwkFA%3D&x=1", "?v=2.0&sign=[secret]&x=1"),
            ("?sign=15G%2Bwxpi5…", "?sign=[secret]…"),
            ("a%2F15G%2Bwxpi5 = 3", "a%2F15G%2Bwxpi5 = 3"),
            ("Request need user authorized", "Request need user authorized"),
            ("该商品已下架 test123", "该商品已下架 [secret]"),
        ];
        for (text, expected) in table {
            assert_eq!(redact(&account, text), expected);
        }
    }

    #[test]
    fn a_text_without_secrets_is_not_copied() {
        assert!(matches!(redact(&account("test123", "at-1"), "gw.ParamMissing"), Cow::Borrowed(_)));
    }

    proptest! {
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
