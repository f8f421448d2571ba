//! What a reseller's reply means.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    Dialect,
    errors::{self, Said},
};
use crate::{
    message::{Columns, Request, Status},
    platform::{
        Answer, HttpReply, Refusal, RefusalKind, Reply,
        reading::{by_status, is_success, malformed, not_json, refusal, text},
        taobao::{
            errors::{ErrorResponse, Said as TopSaid},
            is_item_id,
            item::assign,
            list,
        },
    },
};

/// The members that are read; what the resellers say of errors has several spellings.
#[derive(Deserialize)]
struct Body<'a> {
    #[serde(borrow, default)]
    items: Option<&'a RawValue>,
    #[serde(borrow, default)]
    item: Option<&'a RawValue>,
    #[serde(borrow, default)]
    error_code: Option<&'a RawValue>,
    #[serde(borrow, default)]
    code: Option<&'a RawValue>,
    #[serde(borrow, default)]
    error: Option<&'a RawValue>,
    #[serde(borrow, default)]
    reason: Option<&'a RawValue>,
    #[serde(borrow, default)]
    msg: Option<&'a RawValue>,
    #[serde(borrow, default)]
    error_response: Option<&'a RawValue>,
}

/// What the reply to a call for these requests means.
pub fn read(dialect: Dialect, requests: &[&Request], reply: &HttpReply) -> Reply {
    // Such a call carried no id, and was refused for that.
    if !requests.iter().any(|request| is_item_id(request.item.as_str())) {
        return Reply::Each(assign(requests, &[], dialect.price()));
    }
    rows(dialect, requests, reply).unwrap_or_else(Reply::Refused)
}

fn rows(dialect: Dialect, requests: &[&Request], reply: &HttpReply) -> Result<Reply, Refusal> {
    let json = std::str::from_utf8(&reply.body).map_err(|_| not_json(reply))?;
    let body: Body<'_> = match crate::message::json::from_str(json) {
        Ok(body) => body,
        Err(error) if error.is_data() => return Err(by_status(reply, RefusalKind::Malformed, "JSON of another shape")),
        Err(_) => return Err(not_json(reply)),
    };
    if let Some(reply) = refused(&body, json, requests, reply) {
        return reply;
    }
    if !is_success(reply) {
        return Err(by_status(reply, RefusalKind::Malformed, "JSON without an error code"));
    }
    // `{}` is no answer: who takes it for one believes in an outage that nothing exists.
    let rows = match dialect {
        Dialect::Pool => body.items.ok_or_else(|| malformed("shape", "neither items nor an error in the reply"))?,
        Dialect::OneBound => {
            body.item.ok_or_else(|| malformed("shape", "neither an item nor an error in the reply"))?
        }
    };
    let rows = list(rows).ok_or_else(|| malformed("shape", "what should be the reply's items is no list"))?;
    Ok(Reply::Each(assign(requests, &rows, dialect.price())))
}

/// What an error in the reply means; nothing if there is none.
fn refused(body: &Body<'_>, json: &str, requests: &[&Request], reply: &HttpReply) -> Option<Result<Reply, Refusal>> {
    if let Some(error) = body.error_response.and_then(ErrorResponse::of) {
        return Some(match error.meaning(reply) {
            TopSaid::Absent => absent(json, requests).ok_or_else(|| error.refusal(RefusalKind::Malformed)),
            TopSaid::Refused(kind) => Err(error.refusal(kind)),
        });
    }
    let code = body.error_code.or(body.code).map(text).unwrap_or_default();
    let words =
        [body.reason, body.error, body.msg].into_iter().flatten().map(text).find(|words| !words.trim().is_empty());
    let words = words.unwrap_or_default();
    match errors::meaning(&code, &words, reply) {
        Said::Nothing => None,
        Said::Absent => {
            let unclear = || refusal(RefusalKind::Malformed, &code, "no result, of which of the items it does not say");
            Some(absent(json, requests).ok_or_else(unclear))
        }
        Said::Refused(kind) => Some(Err(refusal(kind, &code, &words))),
    }
}

/// The only item of a call is not there. Of many nobody knows which one is meant.
fn absent(json: &str, requests: &[&Request]) -> Option<Reply> {
    let [_] = requests else { return None };
    let raw = RawValue::from_string(json.to_owned()).ok();
    Some(Reply::Each(vec![Ok(Answer { status: Status::Absent, columns: Columns::default(), raw })]))
}
