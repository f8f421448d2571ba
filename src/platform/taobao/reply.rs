//! What a reply of the platform means. Errors come with HTTP 200, so the body decides before the status.

use serde_json::value::RawValue;

use super::{
    Method,
    errors::{ErrorResponse, Said},
    is_item_id,
    item::{self, PriceOf},
};
use crate::{
    message::{Columns, Request, Status},
    platform::{
        Answer, HttpReply, Refusal, RefusalKind, Reply,
        pick::Picker,
        reading::{bug, by_status, is_success, malformed, not_json, present},
    },
};

/// How the replies of one method are read.
#[derive(Clone, Debug)]
pub struct Reading {
    picker: Picker,
    price: PriceOf,
}

impl Reading {
    pub fn new(method: Method) -> Self {
        let response = format!("/{}", method.response());
        let rows = format!("{response}{}", method.rows());
        // Method names have no characters that a pointer could stumble over.
        let picker = Picker::new([Some("/error_response"), Some(&response), Some(&rows)]).unwrap_or_default();
        Self { picker, price: method.price() }
    }

    pub fn columns(&self, raw: &RawValue) -> Option<Columns> {
        item::columns(raw, self.price)
    }

    pub fn read(&self, requests: &[&Request], reply: &HttpReply) -> Reply {
        // Such a call carried no id, and was refused for that.
        if !requests.iter().any(|request| is_item_id(request.item.as_str())) {
            return Reply::Each(item::assign(requests, &[], self.price));
        }
        self.rows(requests, reply).unwrap_or_else(Reply::Refused)
    }

    fn rows(&self, requests: &[&Request], reply: &HttpReply) -> Result<Reply, Refusal> {
        let json = std::str::from_utf8(&reply.body).map_err(|_| not_json(reply))?;
        let found = self.picker.pick(json).map_err(|_| not_json(reply))?;
        let [error, response, rows] = found[..] else { return Err(bug("picker", "the reply cannot be looked up in")) };
        if let Some(error) = present(error) {
            return refused(requests, reply, json, error);
        }
        if !is_success(reply) {
            return Err(by_status(reply, RefusalKind::Malformed, "JSON without an error_response"));
        }
        if present(response).is_none() {
            return Err(malformed("shape", "neither the method's response nor an error in the reply"));
        }
        // Where nothing matched, the list is missing, or its wrapper too.
        let rows = present(rows).map_or(Some(Vec::new()), list);
        let rows = rows.ok_or_else(|| malformed("shape", "what should be the reply's items is no list"))?;
        Ok(Reply::Each(item::assign(requests, &rows, self.price)))
    }
}

/// A list's elements; an object alone is one.
pub fn list(raw: &RawValue) -> Option<Vec<&RawValue>> {
    if raw.get().starts_with('{') { Some(vec![raw]) } else { serde_json::from_str(raw.get()).ok() }
}

fn refused(requests: &[&Request], reply: &HttpReply, json: &str, error: &RawValue) -> Result<Reply, Refusal> {
    let error = ErrorResponse::of(error).ok_or_else(|| malformed("shape", "error_response is no object"))?;
    match (error.meaning(reply), requests) {
        (Said::Absent, [_]) => {
            let raw = RawValue::from_string(json.to_owned()).ok();
            Ok(Reply::Each(vec![Ok(Answer { status: Status::Absent, columns: Columns::default(), raw })]))
        }
        // Of many ids nobody knows which one is meant until it is called for alone.
        (Said::Absent, _) => Err(error.refusal(RefusalKind::Malformed)),
        (Said::Refused(kind), _) => Err(error.refusal(kind)),
    }
}
