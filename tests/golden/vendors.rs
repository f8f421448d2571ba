//! Replies of Taobao, of its resellers and of the articles' 1688, and what they mean for each request.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use figment::providers::{Format, Toml};
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::Value;
use weir::{
    message::{Columns, ItemId, Request, Status},
    platform::{Affected, Answer, Common, Denial, HttpReply, Refusal, RefusalKind, Reply, SourceConfig, Vendor},
    runtime::clock::Timestamp,
};

/// Replies to calls of one source.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Group {
    /// The source, as in a configuration.
    source: String,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    /// What the call asks for.
    items: Vec<String>,
    http: u16,
    /// The body: a text, or the JSON itself.
    body: Value,
    /// What each item gets.
    #[serde(default)]
    each: Vec<Expected>,
    /// What all of them get.
    refused: Option<Refused>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Expected {
    Answer(Box<ExpectedAnswer>),
    Refused(Refused),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ExpectedAnswer {
    status: Status,
    columns: Columns,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Refused {
    kind: String,
    /// At least so long, and at most five seconds more.
    wait_s: Option<u64>,
    code: String,
    message: String,
}

const FILES: [(&str, &str); 3] = [
    ("taobao", include_str!("vendors/taobao.json")),
    ("reseller", include_str!("vendors/reseller.json")),
    ("articles", include_str!("vendors/articles.json")),
];

fn vendor(source: &str) -> Arc<dyn Vendor> {
    let text = format!("name = \"a\"\n{source}");
    <Toml as Format>::from_str::<SourceConfig>(&text).unwrap().vendor().unwrap()
}

fn interpret(vendor: &dyn Vendor, items: &[String], status: u16, body: &[u8]) -> Vec<Result<Answer, Refusal>> {
    let requests: Vec<Request> = items.iter().map(|item| Request::new(ItemId::new(item).unwrap())).collect();
    let requests: Vec<&Request> = requests.iter().collect();
    let reply = HttpReply::new(status, Bytes::copy_from_slice(body), Timestamp::from_millis(0));
    let reply = vendor.interpret(&requests, &reply);
    assert!(reply.is_for(items.len()) && !matches!(reply, Reply::Pending(_)), "one entry per request: {reply:?}");
    reply.each(items.len())
}

/// The kind in words, and its wait.
fn words(kind: &RefusalKind) -> (&'static str, Option<Duration>) {
    match kind {
        RefusalKind::Throttled { scope: Affected::Account, wait } => ("throttled account", *wait),
        RefusalKind::Throttled { scope: Affected::Address, wait } => ("throttled address", *wait),
        RefusalKind::Throttled { scope: Affected::Everyone, wait } => ("throttled everyone", *wait),
        RefusalKind::Denied(Denial::Token) => ("denied token", None),
        RefusalKind::Denied(Denial::Account) => ("denied account", None),
        RefusalKind::Outage => ("outage", None),
        RefusalKind::Unclear => ("unclear", None),
        RefusalKind::Malformed => ("malformed", None),
        RefusalKind::Misconfigured(Common::Clock) => ("misconfigured clock", None),
        RefusalKind::Misconfigured(Common::Form) => ("misconfigured form", None),
        RefusalKind::Misconfigured(Common::Params) => ("misconfigured params", None),
        RefusalKind::Misconfigured(Common::Later) => ("misconfigured later", None),
        RefusalKind::Bug => ("bug", None),
    }
}

#[track_caller]
fn assert_refused(name: &str, refusal: &Refusal, expected: &Refused) {
    let (kind, wait) = words(&refusal.kind);
    assert_eq!(kind, expected.kind, "{name}: {refusal:?}");
    assert_eq!((&refusal.code, &refusal.message), (&expected.code, &expected.message), "{name}");
    assert_eq!(wait.is_some(), expected.wait_s.is_some(), "{name}: {wait:?}");
    if let (Some(wait), Some(least)) = (wait, expected.wait_s.map(Duration::from_secs)) {
        assert!((least..=least + Duration::from_secs(5)).contains(&wait), "{name}: {wait:?}");
    }
}

#[test]
fn each_reply_gives_each_item_its_answer_or_its_refusal() {
    for (file, text) in FILES {
        for group in serde_json::from_str::<Vec<Group>>(text).unwrap_or_else(|error| panic!("{file}: {error}")) {
            let vendor = vendor(&group.source);
            for case in group.cases {
                let name = format!("{file}: {}", case.name);
                let body = case.body.as_str().map_or_else(|| case.body.to_string(), str::to_owned);
                let each = interpret(&*vendor, &case.items, case.http, body.as_bytes());
                assert_eq!(case.each.len(), if case.refused.is_some() { 0 } else { each.len() }, "{name}");
                for (index, found) in each.iter().enumerate() {
                    match (found, case.each.get(index), &case.refused) {
                        (Ok(answer), Some(Expected::Answer(expected)), _) => {
                            assert_eq!(
                                (answer.status, &answer.columns),
                                (expected.status, &expected.columns),
                                "{name}"
                            );
                            let again = answer.raw.as_ref().and_then(|raw| vendor.columns(raw));
                            let is_kept =
                                answer.columns == Columns::default() || again.as_ref() == Some(&answer.columns);
                            assert!(is_kept, "{name}: what is kept reads as {again:?}");
                        }
                        (Err(refusal), Some(Expected::Refused(expected)), _) | (Err(refusal), None, Some(expected)) => {
                            assert_refused(&name, refusal, expected);
                        }
                        _ => panic!("{name}: {found:?}"),
                    }
                }
            }
        }
    }
}

/// A reply of whoever stands before the vendor, or of a vendor that is not at work.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Notice {
    name: String,
    http: u16,
    /// As [`Case::body`].
    body: Value,
    /// What it is to each source, by [`NOTIFIED`].
    is: BTreeMap<String, Refused>,
}

/// The sources that get each notice.
const NOTIFIED: [(&str, &str); 5] = [
    ("ali1688", "kind = \"ali1688\""),
    ("ali1688 router", "kind = \"ali1688\"\ndialect = \"router\""),
    ("ali1688 item-get", "kind = \"ali1688\"\ndialect = \"item-get\""),
    ("taobao", "kind = \"taobao\""),
    ("taobao_reseller", "kind = \"taobao_reseller\""),
];

fn notices() -> String {
    std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/vendors/notices.json")).unwrap()
}

/// What no request may end by: it says nothing of an item, an account or the request.
const SAYS_NOTHING: [&str; 3] = ["malformed", "outage", "unclear"];

#[test]
fn a_ban_or_a_notice_of_maintenance_is_no_answer_and_no_items_fault_and_is_quoted_as_far_as_it_is_not_understood() {
    let notices: Vec<Notice> = serde_json::from_str(&notices()).unwrap();
    for Notice { name, http, body, is } in notices {
        assert_eq!(is.len(), NOTIFIED.len(), "{name}");
        let body = body.as_str().map_or_else(|| body.to_string(), str::to_owned);
        for (source, config) in NOTIFIED {
            let name = format!("{name}, to {source}");
            let vendor = vendor(config);
            let request = Request::new(ItemId::new("11223344").unwrap());
            let reply = HttpReply::new(http, body.clone(), Timestamp::from_millis(0));
            let mut said = vendor.interpret(&[&request], &reply);
            said.quote(&reply.body);
            let Reply::Refused(refusal) = first_of(said) else { panic!("{name}: an answer") };
            assert_refused(&name, &refusal, &is[source]);
            let (kind, _) = words(&refusal.kind);
            assert!(SAYS_NOTHING.contains(&kind) || kind.starts_with("throttled"), "{name}: {kind}");
            let is_shown = refusal.message.chars().all(|c| !c.is_control() && !('\u{202a}'..='\u{202e}').contains(&c));
            assert!(is_shown && refusal.message.len() < 600, "{name}: {:?}", refusal.message);
            let quoted = refusal.message.contains("; the reply begins: ");
            assert_eq!(quoted, kind == "malformed", "{name}: {}", refusal.message);
        }
    }
}

/// What the first item gets, as a refusal of the call.
fn first_of(reply: Reply) -> Reply {
    match reply {
        Reply::Each(mut each) if each[0].is_err() => Reply::Refused(each.remove(0).unwrap_err()),
        all @ (Reply::Each(_) | Reply::Pending(_) | Reply::Refused(_)) => all,
    }
}

proptest! {
    /// However a good reply is damaged, nothing panics, and a status other than success finds nothing and misses nothing.
    #[test]
    fn a_damaged_reply_is_read_or_refused(status in 100..600_u16, cut in 0..600_usize, at in 0..600_usize, byte: u8) {
        let replies = [
            ("kind = \"taobao\"", r#"{"items_seller_list_get_response":{"items":{"item":[{"num_iid":1,"price":"1.00"},{"num_iid":"2"}]}}}"#),
            ("kind = \"taobao_reseller\"", r#"{"items":[{"num_iid":1,"final_price":0},{"num_iid":"2"}],"error_code":"0000"}"#),
            ("kind = \"ali1688\"\ndialect = \"item-get\"", r#"{"item":{"item_id":"1","price":"1.00"}}"#),
            ("kind = \"ali1688\"\ndialect = \"router\"", r#"{"product":null,"error_response":null}"#),
        ];
        for (source, good) in replies {
            let vendor = vendor(source);
            let items: Vec<String> = (1..=vendor.batch_max().min(2)).map(|id| id.to_string()).collect();
            let mut body = good.as_bytes().to_vec();
            if let Some(damaged) = body.get_mut(at) {
                *damaged = byte;
            }
            body.truncate(cut.max(good.len() / 2));
            for answer in interpret(&*vendor, &items, status, &body) {
                prop_assert!((200..300).contains(&status) || answer.is_err(), "{source}: {answer:?}");
            }
        }
    }
}
