//! An outcome as an HTTP response: status, headers and body. Pure.
//!
//! An edge cache in front gets what it needs (RFC 9111, RFC 5861): `Age` counts from the vendor's answer, `max-age` is
//! how long an answer is fresh from there, `stale-while-revalidate` and `stale-if-error` reach to its hard end. The `ETag`
//! is weak and made of what the vendor said, so that an answer that was fetched anew and says the same is a 304.

use std::time::Duration;

use axum::http::{
    HeaderMap, HeaderName, HeaderValue, StatusCode,
    header::{AGE, CACHE_CONTROL, CONTENT_TYPE, ETAG, LAST_MODIFIED, RETRY_AFTER},
};
use serde::Serialize;
use serde_json::value::RawValue;
use sha1::{Digest as _, Sha1};

use super::desk::{Answered, AskError, Given, Question};
use crate::{
    message::{Columns, Status, Via},
    runtime::clock::Timestamp,
};

/// `Retry-After` of a 503.
const AGAIN: Duration = Duration::from_secs(2);

/// A reply before it is sent.
#[derive(Debug)]
pub struct Reply {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// JSON; empty with 304.
    pub body: Vec<u8>,
}

/// The body of an item.
#[derive(Serialize)]
pub struct Body<'a> {
    source: &'a str,
    /// The source that was asked for, if another one has stood in for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    instead_of: Option<&'a str>,
    item: &'a str,
    status: Status,
    via: &'a Via,
    fetched_at: Timestamp,
    columns: &'a Columns,
    #[serde(skip_serializing_if = "Option::is_none")]
    raw: Option<&'a RawValue>,
}

impl<'a> Body<'a> {
    /// What is said of an item.
    #[must_use]
    pub fn of(question: &'a Question, given: &'a Given) -> Self {
        Self {
            source: given.source.as_str(),
            instead_of: (given.source != question.source).then(|| question.source.as_str()),
            item: question.item.as_str(),
            status: given.answer.status,
            via: &given.via,
            fetched_at: given.fetched_at,
            columns: &given.answer.columns,
            raw: given.answer.raw.as_deref(),
        }
    }
}

/// The HTTP reply to a lookup; `known`: the client's `If-None-Match`.
#[must_use]
pub fn reply(question: &Question, answered: &Result<Answered, AskError>, known: Option<&str>, now: Timestamp) -> Reply {
    match answered {
        Ok(Answered::Item(given)) => item(question, given, known, now),
        Ok(Answered::GivenUp(dead)) => {
            problem(StatusCode::BAD_GATEWAY, &format!("given up: {}", dead.message), Some(AGAIN))
        }
        Ok(Answered::Late(failure)) => {
            let why = failure.as_ref().map_or_else(String::new, |why| format!("; the last call failed: {why}"));
            let message = format!("no answer in time; the request stays queued{why}");
            problem(StatusCode::SERVICE_UNAVAILABLE, &message, Some(AGAIN))
        }
        Err(error @ AskError::NoSource(_)) => problem(StatusCode::NOT_FOUND, &error.to_string(), None),
        Err(error @ AskError::Busy(_)) => problem(StatusCode::SERVICE_UNAVAILABLE, &error.to_string(), Some(AGAIN)),
        // Brokers' addresses and the like are for the log.
        Err(AskError::Write(_)) => {
            problem(StatusCode::SERVICE_UNAVAILABLE, "cannot send the request to Kafka", Some(AGAIN))
        }
    }
}

/// A refusal with a reason.
#[must_use]
pub fn problem(status: StatusCode, message: &str, again: Option<Duration>) -> Reply {
    let mut headers = HeaderMap::new();
    set(&mut headers, CONTENT_TYPE, "application/json");
    set(&mut headers, CACHE_CONTROL, "no-store");
    if let Some(again) = again {
        set(&mut headers, RETRY_AFTER, &again.as_secs().to_string());
    }
    let body = serde_json::json!({ "error": message }).to_string().into_bytes();
    Reply { status, headers, body }
}

fn item(question: &Question, given: &Given, known: Option<&str>, now: Timestamp) -> Reply {
    let mut headers = HeaderMap::new();
    let tag = tag(given);
    set(&mut headers, ETAG, &tag);
    set(&mut headers, CACHE_CONTROL, &cache_control(given));
    set(&mut headers, AGE, &now.since(given.fetched_at).as_secs().to_string());
    set(&mut headers, LAST_MODIFIED, &http_date(given.fetched_at));
    set(&mut headers, HeaderName::from_static("x-weir-via"), given.via.as_str());
    if known.is_some_and(|known| matches(known, &tag)) {
        return Reply { status: StatusCode::NOT_MODIFIED, headers, body: Vec::new() };
    }
    set(&mut headers, CONTENT_TYPE, "application/json");
    let status = if given.is_there() { StatusCode::OK } else { StatusCode::NOT_FOUND };
    Reply { status, headers, body: serde_json::to_vec(&Body::of(question, given)).unwrap_or_default() }
}

/// How long others may keep it: as long as weir does itself.
fn cache_control(given: &Given) -> String {
    let Some((soft_at, hard_at)) = given.ends else { return "no-cache".to_owned() };
    let fresh = soft_at.since(given.fetched_at).as_secs();
    let stale = hard_at.since(soft_at).as_secs();
    format!("public, max-age={fresh}, stale-while-revalidate={stale}, stale-if-error={stale}")
}

fn tag(given: &Given) -> String {
    let answer = &given.answer;
    let mut digest = Sha1::new();
    digest.update(answer.status.as_str());
    digest.update(serde_json::to_vec(&answer.columns).unwrap_or_default());
    digest.update(answer.raw.as_ref().map_or("", |raw| raw.get()));
    format!("W/\"{}\"", hex::encode(&digest.finalize()[..10]))
}

/// The weak comparison of RFC 9110, 13.1.2.
fn matches(known: &str, tag: &str) -> bool {
    let bare = |tag: &str| tag.trim().trim_start_matches("W/").to_owned();
    known.trim() == "*" || known.split(',').any(|known| bare(known) == bare(tag))
}

fn http_date(at: Timestamp) -> String {
    let at = jiff::Timestamp::from_millisecond(at.as_millis()).unwrap_or_default();
    at.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()
}

fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, sync::Arc};

    use super::*;
    use crate::{
        cache::Answer,
        message::{ItemId, SourceName},
    };

    const FETCHED: Timestamp = Timestamp::from_millis(1_800_000_000_000);

    fn question() -> Question {
        let (source, item) = (SourceName::new("ali1688").unwrap(), ItemId::new("7").unwrap());
        Question { source, item, params: BTreeMap::new(), max_age: None, wait: Duration::ZERO }
    }

    fn given(status: Status, price: &str) -> Given {
        let columns = Columns { price: Some(price.to_owned()), ..Columns::default() };
        let raw = Some(RawValue::from_string(format!("{{\"p\":{price}}}")).unwrap());
        let answer = Arc::new(Answer { status, columns, fingerprint: String::new(), raw });
        let ends = Some((FETCHED.after(Duration::from_secs(300)), FETCHED.after(Duration::from_secs(3_600))));
        Given { source: question().source, answer, fetched_at: FETCHED, via: Via::Cache, ends }
    }

    fn replied(given: Given, known: Option<&str>) -> Reply {
        reply(&question(), &Ok(Answered::Item(given)), known, FETCHED.after(Duration::from_secs(42)))
    }

    fn of<'a>(reply: &'a Reply, name: &HeaderName) -> &'a str {
        reply.headers[name].to_str().unwrap()
    }

    #[test]
    fn an_edge_cache_learns_how_old_an_answer_is_and_how_long_it_counts() {
        let reply = replied(given(Status::Found, "9.90"), None);
        assert_eq!((reply.status, of(&reply, &AGE)), (StatusCode::OK, "42"));
        let control = "public, max-age=300, stale-while-revalidate=3300, stale-if-error=3300";
        assert_eq!(of(&reply, &CACHE_CONTROL), control);
        assert_eq!(of(&reply, &LAST_MODIFIED), "Fri, 15 Jan 2027 08:00:00 GMT");
        let body: serde_json::Value = serde_json::from_slice(&reply.body).unwrap();
        assert_eq!((&body["status"], &body["columns"]["price"]), (&"found".into(), &"9.90".into()));
    }

    #[test]
    fn who_has_stood_in_for_the_source_that_was_asked_is_named() {
        let body = |given: Given| serde_json::from_slice::<serde_json::Value>(&replied(given, None).body).unwrap();
        let own = body(given(Status::Found, "9.90"));
        assert_eq!((own["source"].as_str(), own.get("instead_of")), (Some("ali1688"), None));
        let other = Given { source: SourceName::new("reseller").unwrap(), ..given(Status::Found, "9.90") };
        let other = body(other);
        assert_eq!((other["source"].as_str(), other["instead_of"].as_str()), (Some("reseller"), Some("ali1688")));
    }

    #[test]
    fn the_same_said_anew_is_not_modified_and_something_else_is() {
        let tag = of(&replied(given(Status::Found, "9.90"), None), &ETAG).to_owned();
        let later = Given { fetched_at: FETCHED.after(Duration::from_secs(9)), ..given(Status::Found, "9.90") };
        for known in [tag.as_str(), "*", &format!("\"x\", {tag}"), tag.trim_start_matches("W/")] {
            let reply = replied(later.clone(), Some(known));
            assert_eq!((reply.status, reply.body.len()), (StatusCode::NOT_MODIFIED, 0), "{known}");
            assert_eq!(of(&reply, &ETAG), tag);
        }
        assert_eq!(replied(given(Status::Found, "9.91"), Some(&tag)).status, StatusCode::OK);
        assert_eq!(replied(given(Status::OffShelf, "9.90"), Some(&tag)).status, StatusCode::OK);
    }

    #[test]
    fn what_is_not_there_is_404_and_what_did_not_come_says_when_to_come_again() {
        assert_eq!(replied(given(Status::Absent, "1"), None).status, StatusCode::NOT_FOUND);
        let late = reply(&question(), &Ok(Answered::Late(Some("HTTP 500".to_owned()))), None, FETCHED);
        assert_eq!((late.status, of(&late, &RETRY_AFTER)), (StatusCode::SERVICE_UNAVAILABLE, "2"));
        assert!(String::from_utf8(late.body).unwrap().contains("HTTP 500"));
        let none = reply(&question(), &Err(AskError::NoSource(question().source)), None, FETCHED);
        assert_eq!((none.status, of(&none, &CACHE_CONTROL)), (StatusCode::NOT_FOUND, "no-store"));
    }
}
