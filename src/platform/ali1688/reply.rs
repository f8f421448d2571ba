//! What a reply of the gateway means.
//!
//! The body decides before the status: errors of the gateway come with 400, a dead token also with 200. But
//! only a reply with a status of success may say anything about the item, so that no firewall's page and no
//! outage is ever stored as "there is no such product".

use std::borrow::Cow;

use serde_json::value::RawValue;

use super::{
    Dialect, article,
    columns::{Field, Found, Places},
    errors,
};
use crate::{
    message::{Columns, Request, Status, json},
    platform::{
        Answer, Denial, HttpReply, Refusal, RefusalKind,
        reading::{by_status, is_success, kind_of_status, malformed, not_json, refusal},
        taobao::errors::{ErrorResponse, Said as ArticleSaid},
    },
};

/// What the reply to a call for one request means: an answer, or a refusal.
///
/// # Errors
/// The refusal.
pub fn read(places: &Places, dialect: Dialect, request: &Request, reply: &HttpReply) -> Result<Answer, Refusal> {
    if dialect != Dialect::Aop {
        return read_article(places, request, reply);
    }
    let Ok(raw) = serde_json::from_slice::<Box<RawValue>>(&reply.body) else {
        return Err(not_json(reply));
    };
    let found = places.find(raw.get()).map_err(|_| not_json(reply))?;
    let (status, columns) = match error_of(&found) {
        Some(error) => match said_with(&error, reply) {
            Said::OffShelf => (Status::OffShelf, Columns::default()),
            Said::Refusal(kind) => return Err(refusal(kind, &error.code, &error.words)),
        },
        None => item(request, &found, reply)?,
    };
    Ok(Answer { status, columns, raw: Some(raw) })
}

/// The same for the articles' forms.
fn read_article(places: &Places, request: &Request, reply: &HttpReply) -> Result<Answer, Refusal> {
    let by_status =
        |what: &str| article::of_status(reply).map(|kind| refusal(kind, &format!("http {}", reply.status), what));
    let Ok(raw) = serde_json::from_slice::<Box<RawValue>>(&reply.body) else {
        return Err(by_status("no JSON").unwrap_or_else(|| not_json(reply)));
    };
    let found = places.find(raw.get()).map_err(|_| not_json(reply))?;
    let error = found.raw(Field::ErrorResponse).map(|raw| ErrorResponse::of(raw).unwrap_or_default());
    if let Some(refused) = by_status("no words") {
        return Err(error.map_or(refused.clone(), |error| error.refusal(refused.kind)));
    }
    let (status, columns) = match error {
        Some(error) => match article::of_error(&error, reply) {
            ArticleSaid::Absent if is_success(reply) => (Status::Absent, Columns::default()),
            ArticleSaid::Absent => return Err(error.refusal(RefusalKind::Malformed)),
            ArticleSaid::Refused(kind) => return Err(error.refusal(kind)),
        },
        // The article's code takes any reply for a product. One that says "none" is another matter than one without it.
        None if is_success(reply) && found.is_null(Field::Product) => (Status::Absent, Columns::default()),
        None if found.raw(Field::Product).is_none() => {
            return Err(malformed("shape", "neither a product nor an error in the reply"));
        }
        None => item(request, &found, reply)?,
    };
    Ok(Answer { status, columns, raw: Some(raw) })
}

/// The columns of a reply that was kept; `None` if there is no product in it.
pub fn columns(places: &Places, dialect: Dialect, raw: &RawValue) -> Option<Columns> {
    let found = places.find(raw.get()).ok()?;
    let is_error = match dialect {
        Dialect::Aop => error_of(&found).is_some(),
        Dialect::Router | Dialect::ItemGet => found.raw(Field::ErrorResponse).is_some(),
    };
    (!is_error && found.raw(Field::Product).is_some()).then(|| found.columns())
}

/// The gateway's error body.
struct GatewayError<'a> {
    code: String,
    /// `error_message`, or else `exception`.
    words: Cow<'a, str>,
    exception: Cow<'a, str>,
}

enum Said {
    OffShelf,
    Refusal(RefusalKind),
}

fn error_of<'a>(found: &Found<'a>) -> Option<GatewayError<'a>> {
    let text = |field| found.text(field).filter(|text| !text.trim().is_empty());
    let fields = (text(Field::ErrorCode), text(Field::ErrorMessage), text(Field::Exception));
    if let (None, None, None) = fields {
        return None;
    }
    let (code, message, exception) = fields;
    let exception = exception.unwrap_or_default();
    let code = code.map(Cow::into_owned).or_else(|| code_in(&exception)).unwrap_or_else(|| "no code".to_owned());
    let words = message.unwrap_or_else(|| exception.clone());
    Some(GatewayError { code: code.trim().to_owned(), words, exception })
}

/// The code inside `exception`, where some replies have it: `{"error_code":"401"}`, `401`, `401 Request …`,
/// `gw.X: …`.
fn code_in(exception: &str) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Inner {
        error_code: serde_json::Value,
    }
    if let Ok(Inner { error_code }) = json::from_str(exception) {
        return Some(error_code.as_str().map_or_else(|| error_code.to_string(), str::to_owned));
    }
    let first = exception.split([' ', ':', ',']).next().unwrap_or_default();
    let is_code = errors::known(first, None).is_some() || errors::is_of_the_gateway(first);
    is_code.then(|| first.to_owned())
}

fn said_with(error: &GatewayError<'_>, reply: &HttpReply) -> Said {
    let says = |what: fn(&str) -> bool| what(&error.words) || what(&error.exception);
    if let Some(kind) = errors::known(&error.code, reply.retry_after()) {
        Said::Refusal(kind)
    } else if says(errors::says_unauthorised) {
        Said::Refusal(RefusalKind::Denied(Denial::Token))
    } else if let Some(kind) = kind_of_status(reply) {
        Said::Refusal(kind)
    } else if says(errors::says_off_shelf) {
        Said::OffShelf
    } else if errors::is_of_the_gateway(&error.code) {
        Said::Refusal(RefusalKind::Outage)
    } else {
        Said::Refusal(RefusalKind::Malformed)
    }
}

/// A reply without an error of the gateway.
fn item(request: &Request, found: &Found<'_>, reply: &HttpReply) -> Result<(Status, Columns), Refusal> {
    if !is_success(reply) {
        return Err(by_status(reply, RefusalKind::Malformed, "JSON without an error code"));
    }
    let words = found.text(Field::Error).filter(|words| !words.trim().is_empty());
    let off_shelf = words.as_deref().is_some_and(errors::says_off_shelf);
    if found.raw(Field::Product).is_none() {
        return match words {
            Some(_) if off_shelf => Ok((Status::OffShelf, Columns::default())),
            Some(_) => Ok((Status::Absent, Columns::default())),
            None => Err(malformed("shape", "neither a product nor an error in the reply")),
        };
    }
    check_id(request, found)?;
    let columns = found.columns();
    let published = columns.vendor_status.as_deref().is_none_or(|status| status.eq_ignore_ascii_case("published"));
    Ok((if published && !off_shelf { Status::Found } else { Status::OffShelf }, columns))
}

/// Ids are compared as texts: they may come as number or string, and exceed 2^53.
fn check_id(request: &Request, found: &Found<'_>) -> Result<(), Refusal> {
    match found.text(Field::Item) {
        Some(id) if id.trim() == request.item.as_str() => Ok(()),
        Some(id) => Err(malformed("item", &format!("the reply is about item {id}, not {}", request.item))),
        None => Err(malformed("item", "the product in the reply has no id")),
    }
}
