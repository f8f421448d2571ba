//! What the readings of all vendors' replies have in common: refusals by HTTP status, texts and prices out of JSON.

use std::borrow::Cow;

use rust_decimal::Decimal;
use serde_json::value::RawValue;

use super::{Affected, HttpReply, Refusal, RefusalKind};
use crate::message::codec::shorten;

/// How much of the vendor's words is kept, in bytes.
const MESSAGE_LIMIT: usize = 300;
/// How much of the vendor's code is kept, in bytes.
const CODE_LIMIT: usize = 80;

/// A refusal with the vendor's words, shortened.
pub(super) fn refusal(kind: RefusalKind, code: &str, message: &str) -> Refusal {
    Refusal {
        kind,
        code: shorten(code.trim(), CODE_LIMIT).into_owned(),
        message: shorten(message.trim(), MESSAGE_LIMIT).into_owned(),
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

/// A reply that is no JSON: a proxy's page, or half of a body.
pub(super) fn not_json(reply: &HttpReply) -> Refusal {
    let text = String::from_utf8_lossy(reply.body.get(..2 * MESSAGE_LIMIT).unwrap_or(&reply.body));
    let start = text.split_whitespace().collect::<Vec<_>>().join(" ");
    by_status(reply, RefusalKind::Outage, &format!("not JSON ({} bytes): {start}", reply.body.len()))
}

/// How a reply begins, in one line.
pub(super) fn beginning(body: &[u8]) -> String {
    /// Leaves room for what is said with it.
    const LIMIT: usize = 160;
    let text = String::from_utf8_lossy(body.get(..4 * LIMIT).unwrap_or(body));
    let printed: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let line = printed.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.is_empty() { "(nothing)".to_owned() } else { shorten(&line, LIMIT).into_owned() }
}

/// A reply in which nothing but the status says anything.
pub(super) fn by_status(reply: &HttpReply, otherwise: RefusalKind, what: &str) -> Refusal {
    refusal(kind_of_status(reply).unwrap_or(otherwise), &format!("http {}", reply.status), what)
}

/// What the status alone means, if it means anything.
pub(super) fn kind_of_status(reply: &HttpReply) -> Option<RefusalKind> {
    match reply.status {
        429 => Some(RefusalKind::Throttled { scope: Affected::Account, wait: reply.retry_after }),
        500.. => Some(RefusalKind::Outage),
        _ => None,
    }
}

/// Whether the status is one of success: only then may a reply say anything about an item, so that no firewall's page
/// and no outage is ever stored as "there is no such product".
pub(super) const fn is_success(reply: &HttpReply) -> bool {
    matches!(reply.status, 200..300)
}

/// A decimal and the text it came as.
pub(super) struct Price {
    /// To compare by.
    pub(super) value: Decimal,
    /// To store.
    pub(super) text: String,
}

/// Reads a decimal, from a number or a string. Its text stays as it is (`10.00`), unless it has an exponent,
/// which columns of decimals do not take: Java writes 10,000,000 as `1.0E7`.
pub(super) fn price(raw: Option<&RawValue>) -> Option<Price> {
    let text = text(present(raw)?);
    let text = text.trim();
    if text.contains(['e', 'E']) {
        let value = Decimal::from_scientific(text).ok()?.normalize();
        return Some(Price { value, text: value.to_string() });
    }
    let plain = text.bytes().all(|byte| byte.is_ascii_digit() || b".-".contains(&byte));
    let value = text.parse().ok().filter(|_| plain)?;
    Some(Price { value, text: text.to_owned() })
}

/// A value that is not null.
pub(super) fn present(raw: Option<&RawValue>) -> Option<&RawValue> {
    raw.filter(|raw| raw.get() != "null")
}

/// A string's content, or the JSON itself.
pub(super) fn text(raw: &RawValue) -> Cow<'_, str> {
    let json = raw.get();
    let Some(inside) = json.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) else {
        return Cow::Borrowed(json);
    };
    if inside.contains('\\') {
        // A lone surrogate is JSON but no text: then what stands there is all that there is.
        return serde_json::from_str(json).map_or(Cow::Borrowed(inside), Cow::Owned);
    }
    Cow::Borrowed(inside)
}
