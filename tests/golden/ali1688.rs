//! Replies of 1688's gateway and what they mean.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;
use serde::Deserialize;
use weir::{
    message::{Columns, ItemId, Request, Status},
    platform::{
        Affected, Answer, Common, Denial, HttpReply, Refusal, RefusalKind, Reply, Vendor as _,
        ali1688::{Ali1688, Dialect, Pointers, Settings},
    },
    runtime::clock::Timestamp,
};

const ITEM: &str = "584051070147";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AnswerCase {
    name: String,
    item: String,
    http: u16,
    body: String,
    answer: Expected,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Expected {
    status: Status,
    columns: Columns,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RefusalCase {
    name: String,
    http: u16,
    retry_after_s: Option<u64>,
    body: String,
    kind: String,
    wait_s: Option<u64>,
    code: String,
    message: String,
}

fn vendor() -> Ali1688 {
    Ali1688::new(Settings {
        dialect: Dialect::Aop,
        url: "https://gw.open.1688.com".to_owned(),
        authorise_url: "https://auth.1688.com/oauth/authorize".to_owned(),
        api: "com.alibaba.product/alibaba.product.get".to_owned(),
        version: "1".to_owned(),
        item_param: "productID".to_owned(),
        params: [("webSite".to_owned(), "1688".to_owned())].into(),
        columns: Pointers::default(),
    })
    .unwrap()
}

fn interpret(item: &str, status: u16, retry_after: Option<Duration>, body: &[u8]) -> Result<Answer, Refusal> {
    let request = Request::new(ItemId::new(item).unwrap());
    let retry_after = retry_after.map(|wait| ("retry-after", wait.as_secs().to_string()));
    let reply =
        HttpReply::new(status, Bytes::copy_from_slice(body), Timestamp::from_millis(0)).with_headers(retry_after);
    let mut each = vendor().interpret(&[&request], &reply).each(1);
    assert_eq!(each.len(), 1, "one entry per request");
    each.remove(0)
}

fn kind(words: &str, wait: Option<Duration>) -> RefusalKind {
    match words {
        "throttled account" => RefusalKind::Throttled { scope: Affected::Account, wait },
        "throttled everyone" => RefusalKind::Throttled { scope: Affected::Everyone, wait },
        "denied token" => RefusalKind::Denied(Denial::Token),
        "denied account" => RefusalKind::Denied(Denial::Account),
        "outage" => RefusalKind::Outage,
        "malformed" => RefusalKind::Malformed,
        "misconfigured form" => RefusalKind::Misconfigured(Common::Form),
        "misconfigured params" => RefusalKind::Misconfigured(Common::Params),
        "bug" => RefusalKind::Bug,
        other => panic!("refusals.json has the unknown kind {other:?}"),
    }
}

#[test]
fn each_answer_gives_its_status_its_columns_and_its_own_bytes() {
    let cases: Vec<AnswerCase> = serde_json::from_str(include_str!("ali1688/answers.json")).unwrap();
    for case in cases {
        let answer = interpret(&case.item, case.http, None, case.body.as_bytes())
            .unwrap_or_else(|refusal| panic!("{}: {refusal:?}", case.name));
        assert_eq!(answer.status, case.answer.status, "{}", case.name);
        assert_eq!(answer.columns, case.answer.columns, "{}", case.name);
        assert_eq!(answer.raw.unwrap().get(), case.body.trim(), "{}", case.name);
    }
}

#[test]
fn each_refusal_gives_its_kind_its_code_and_the_vendors_words() {
    let cases: Vec<RefusalCase> = serde_json::from_str(include_str!("ali1688/refusals.json")).unwrap();
    for case in cases {
        let refusal = interpret(ITEM, case.http, case.retry_after_s.map(Duration::from_secs), case.body.as_bytes())
            .expect_err(&case.name);
        assert_eq!(refusal.kind, kind(&case.kind, case.wait_s.map(Duration::from_secs)), "{}", case.name);
        assert_eq!((refusal.code, refusal.message), (case.code, case.message), "{}", case.name);
    }
}

#[test]
fn bytes_that_are_no_text_are_an_outage() {
    assert_eq!(interpret(ITEM, 200, None, b"{\"errMsg\":\"\xff\"}").unwrap_err().kind, RefusalKind::Outage);
}

#[test]
fn a_call_for_several_items_is_our_own_mistake() {
    let request = Request::new(ItemId::new(ITEM).unwrap());
    let reply = HttpReply::new(200, Bytes::from_static(b"{}"), Timestamp::from_millis(0));
    let outcome = vendor().interpret(&[&request, &request], &reply);
    assert!(matches!(outcome, Reply::Refused(Refusal { kind: RefusalKind::Bug, .. })), "{outcome:?}");
}

proptest! {
    /// However a good reply is damaged, nothing panics, and no item but the one asked for is found.
    #[test]
    fn a_damaged_reply_is_read_or_refused(status in 100..600_u16, cut in 0..400_usize, at in 0..400_usize, byte: u8) {
        let mut body = br#"{"productInfo":{"productID":584051070147,"status":"published","subject":"a","skuInfos":
            [{"price":10.00}],"saleInfo":{"priceRanges":[{"startQuantity":3,"price":258}],"amountOnSale":628}},
            "error_code":null,"exception":null,"errMsg":null}"#.to_vec();
        if let Some(damaged) = body.get_mut(at) {
            *damaged = byte;
        }
        body.truncate(cut.max(200));
        if let Ok(answer) = interpret(ITEM, status, None, &body) {
            prop_assert!((200..300).contains(&status) || answer.status != Status::Found);
            prop_assert!(answer.raw.is_some());
        }
    }
}
