//! What the readings of all vendors' replies have in common: refusals by HTTP status, texts and prices out of JSON.

use std::borrow::Cow;

use serde_json::value::RawValue;

use super::{Affected, HttpReply, Refusal, RefusalKind, content};
use crate::message::{
    codec::{is_unquotable, printable, quotable, shorten},
    price::{self, Stated},
};

/// How much of the vendor's words is kept, in bytes.
const MESSAGE_LIMIT: usize = 300;
/// How much of the vendor's code is kept, in bytes.
const CODE_LIMIT: usize = 80;

/// A refusal with the vendor's words, shortened.
pub(super) fn refusal(kind: RefusalKind, code: &str, message: &str) -> Refusal {
    Refusal {
        kind,
        code: shorten(quotable(code).trim(), CODE_LIMIT).into_owned(),
        message: shorten(quotable(message).trim(), MESSAGE_LIMIT).into_owned(),
    }
}

/// A reply that contradicts itself or the request.
pub(super) fn malformed(code: &str, message: &str) -> Refusal {
    refusal(RefusalKind::Malformed, code, message)
}

/// Our own mistake.
pub(super) fn bug(code: &str, message: &str) -> Refusal {
    refusal(RefusalKind::Bug, code, message)
}

/// A reply that is no JSON: a proxy's page, or half of a body. It says what it is, and how it begins if that can be read.
pub(super) fn not_json(reply: &HttpReply) -> Refusal {
    let (what, bytes) = (content::name(&reply.body), reply.body.len());
    let start = std::str::from_utf8(&reply.body).map(|text| shorten(text, 2 * MESSAGE_LIMIT)).unwrap_or_default();
    let words = start.split(|c: char| c.is_whitespace() || is_unquotable(c)).filter(|word| !word.is_empty());
    let start =
        words.fold(String::new(), |all, word| if all.is_empty() { format!(": {word}") } else { all + " " + word });
    let but = if what.starts_with("JSON") { "" } else { "not JSON but " };
    by_status(reply, RefusalKind::Outage, &format!("{but}{what} ({bytes} bytes){start}"))
}

/// How a reply begins, in one line.
pub(super) fn beginning(body: &[u8]) -> String {
    /// Leaves room for what is said with it.
    const LIMIT: usize = 160;
    let text = String::from_utf8_lossy(body.get(..4 * LIMIT).unwrap_or(body));
    let printed: String = text.chars().map(|c| if is_unquotable(c) { ' ' } else { c }).collect();
    let line = printed.split_whitespace().collect::<Vec<_>>().join(" ");
    match shorten(&line, LIMIT) {
        line if line.is_empty() => "(nothing)".to_owned(),
        // Of a secret that is cut off here the rest is hidden only if that shows.
        line if body.len() > 4 * LIMIT && !line.ends_with('…') => format!("{line}…"),
        line => line.into_owned(),
    }
}

/// A reply in which nothing but the status says anything.
pub(super) fn by_status(reply: &HttpReply, otherwise: RefusalKind, what: &str) -> Refusal {
    refusal(kind_of_status(reply).unwrap_or(otherwise), &format!("http {}", reply.status), what)
}

/// What the status alone means, if it means anything.
pub(super) fn kind_of_status(reply: &HttpReply) -> Option<RefusalKind> {
    match reply.status {
        429 => Some(RefusalKind::Throttled { scope: Affected::Account, wait: reply.retry_after() }),
        500.. => Some(RefusalKind::Outage),
        _ => None,
    }
}

/// Whether the status is one of success: only then may a reply say anything about an item, so that no firewall's page
/// and no outage is ever stored as "there is no such product".
pub(super) const fn is_success(reply: &HttpReply) -> bool {
    matches!(reply.status, 200..300)
}

/// What a number or a text says of a price. Anything else in JSON says nothing.
pub(super) fn price(raw: Option<&RawValue>) -> Stated {
    match present(raw) {
        Some(raw) if !raw.get().starts_with(['{', '[', 't', 'f']) => price::stated(&text(raw)),
        Some(_) | None => Stated::default(),
    }
}

/// The first of these that is a number; else the first that says anything.
pub(super) fn first_price<'a>(all: impl IntoIterator<Item = Option<&'a RawValue>>) -> Stated {
    let mut words = Stated::default();
    for stated in all.into_iter().map(price) {
        if stated.number.is_some() {
            return stated;
        }
        if words == Stated::default() {
            words = stated;
        }
    }
    words
}

/// A value that is not null.
pub(super) fn present(raw: Option<&RawValue>) -> Option<&RawValue> {
    raw.filter(|raw| raw.get() != "null")
}

/// A string's content without control characters, or the JSON itself.
pub(super) fn text(raw: &RawValue) -> Cow<'_, str> {
    let json = raw.get();
    let Some(inside) = json.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) else {
        return Cow::Borrowed(json);
    };
    if inside.contains('\\') {
        // A lone surrogate is JSON but no text: then what stands there is all that there is.
        let Ok(text) = serde_json::from_str::<String>(json) else { return Cow::Borrowed(inside) };
        return Cow::Owned(match printable(&text) {
            Cow::Borrowed(_) => text,
            Cow::Owned(printable) => printable,
        });
    }
    printable(inside)
}
