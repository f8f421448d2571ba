//! Which record becomes which row.

use bytes::Bytes;
use serde::Serialize;
use serde_json::{Value, json};

use super::*;
use crate::{
    message::{Columns, Request, envelope::Headers},
    store::columns::{Blob, Time},
};

const TIME: i64 = 1_795_824_000_123;

fn raw<'a>(headers: &'a Headers, value: &'a [u8]) -> Raw<'a> {
    let time = Timestamp::from_millis(TIME);
    Raw { topic: "weir.results", partition: 3, offset: 42, time, headers, value: Some(value) }
}

fn route(kind: Kind) -> Route {
    let source = (kind == Kind::Request).then(|| SourceName::new("ali1688").unwrap());
    Route { kind, source }
}

/// The row as JSON, with only the named columns.
fn columns<T: Serialize>(row: &T, names: &[&str]) -> Value {
    let all = serde_json::to_value(row).unwrap();
    Value::Object(names.iter().map(|name| ((*name).to_owned(), all[*name].clone())).collect())
}

#[test]
fn money_is_exact_or_not_a_number_at_all() {
    let table = [
        ("10.00", Some(100_000)),
        ("0.0001", Some(1)),
        ("-3.5", Some(-35_000)),
        ("12.34000000000", Some(123_400)),
        ("99999999999999.9999", Some(999_999_999_999_999_999)),
        ("100000000000000", None),
        ("0.00001", None),
        ("10.00-12.00", None),
        ("1e3", None),
        ("1_000", None),
        ("¥10", None),
        ("", None),
        (".", None),
    ];
    for (text, expected) in table {
        assert_eq!(decimal(text).map(|exact| exact.0), expected, "{text:?}");
    }
}

#[test]
fn a_time_outside_the_columns_range_becomes_the_nearest_one() {
    for (millis, expected) in [(-1, 0), (5, 5), (i64::MAX, LAST_MILLIS)] {
        assert_eq!(storable(Timestamp::from_millis(millis)), expected);
    }
}

#[test]
fn a_result_becomes_an_observation_with_exact_columns() {
    let headers: Headers = vec![("traceparent".into(), Bytes::from_static(b"00-ab-cd-01"))];
    let value = br#"{"request_id":"r1","source":"ali1688","item":"584051070147","batch":"monday","status":"found",
        "via":"call","calls":2,"account":"a7","requested_at":1795823999000,"fetched_at":1795824000000,"latency_ms":12,
        "instead_of":"taobao","columns":{"title":"cup","price":"10.50","currency":"CNY","stock":"7","rating":"4.95","reviews":"31"},
        "fingerprint":"ab","raw":{ "price" : 10.50 }}"#;
    let raw = raw(&headers, value);
    let Parsed::Result(seen) = parse(&raw, &route(Kind::Result)) else { panic!("a result") };
    let row = serde_json::to_value(ObservationRow::new(&raw, &seen)).unwrap();
    assert_eq!(
        row,
        json!({
            "topic": "weir.results", "partition": 3, "offset": 42, "recorded_at": TIME, "request_id": "r1",
            "source": "ali1688", "instead_of": "taobao", "item": "584051070147", "batch": "monday",
            "requested_at": 1_795_823_999_000_i64, "fetched_at": 1_795_824_000_000_i64, "status": "found", "via": "call", "calls": 2, "account": "a7",
            "latency_ms": 12, "title": "cup", "price": 105_000, "price_text": "", "currency": "CNY", "stock": 70_000,
            "sku_info": "", "category_id": "", "seller_nick": "", "rating": 49_500, "reviews": 31,
            "vendor_status": "", "vendor_updated": "", "further": {}, "fingerprint": "ab", "raw": r#"{ "price" : 10.50 }"#,
            "traceparent": "00-ab-cd-01",
        })
    );
}

#[test]
fn a_result_of_a_newer_weir_keeps_its_word_for_the_way() {
    let value = br#"{"request_id":"r1","source":"s","item":"1","status":"found","via":"edge_cache","calls":1,
        "requested_at":1,"fetched_at":2,"latency_ms":3}"#;
    let headers = Headers::new();
    let raw = raw(&headers, value);
    let Parsed::Result(seen) = parse(&raw, &route(Kind::Result)) else { panic!("a result") };
    assert_eq!(columns(&ObservationRow::new(&raw, &seen), &["via"]), json!({"via": "edge_cache"}));
}

#[test]
fn a_price_that_is_more_than_a_decimal_is_kept_as_text_too() {
    let value = br#"{"request_id":"r1","source":"s","item":"1","status":"found","via":"call","calls":1,
        "requested_at":1,"fetched_at":2,"latency_ms":3,"columns":{"price":"10.00-12.00","stock":"many"}}"#;
    let headers = Headers::new();
    let raw = raw(&headers, value);
    let Parsed::Result(seen) = parse(&raw, &route(Kind::Result)) else { panic!("a result") };
    let row = columns(&ObservationRow::new(&raw, &seen), &["price", "price_text", "stock"]);
    assert_eq!(row, json!({"price": 100_000, "price_text": "10.00-12.00", "stock": null}));
    let of = |stated: Columns| {
        let seen = Observation { columns: stated, ..*seen.clone() };
        columns(&ObservationRow::new(&raw, &seen), &["price", "price_text"])
    };
    let some = |text: &str| Some(text.to_owned());
    let table = [
        (some("12.00"), some("￥12.00"), json!({"price": 120_000, "price_text": "￥12.00"})),
        (None, some("面议"), json!({"price": null, "price_text": "面议"})),
        (some("-1"), None, json!({"price": null, "price_text": "-1"})),
        (some("0.00001"), None, json!({"price": null, "price_text": "0.00001"})),
    ];
    for (price, price_text, expected) in table {
        assert_eq!(of(Columns { price, price_text, ..Columns::default() }), expected);
    }
}

#[test]
fn further_columns_are_a_map_of_the_row() {
    let value = br#"{"request_id":"r1","source":"s","item":"1","status":"found","via":"call","calls":1,
        "requested_at":1,"fetched_at":2,"latency_ms":3,"columns":{"title":"cup","further":{"brand":"it's"}}}"#;
    let headers = Headers::new();
    let raw = raw(&headers, value);
    let Parsed::Result(seen) = parse(&raw, &route(Kind::Result)) else { panic!("a result") };
    let row = columns(&ObservationRow::new(&raw, &seen), &["title", "further"]);
    assert_eq!(row, json!({"title": "cup", "further": {"brand": "it's"}}));
}

#[test]
fn a_bare_id_becomes_a_request_row() {
    let headers = Headers::new();
    let raw = raw(&headers, b"584051070147");
    let Parsed::Request(received) = parse(&raw, &route(Kind::Request)) else { panic!("a request") };
    let row = columns(
        &RequestRow::new(&raw, &received),
        &["request_id", "source", "item", "batch", "requested_at", "calls", "params"],
    );
    assert_eq!(
        row,
        json!({"request_id": "weir.results/3/42", "source": "ali1688", "item": "584051070147", "batch": "",
            "requested_at": TIME, "calls": 0, "params": ""})
    );
}

const FAILED_REQUEST: &str = r#"{"item":"1","source":"ali1688","batch":"b","params":{"zip":"1"},"requested_at":1000,
    "history":[{"at":2000,"class":"outage","code":"timeout","message":"m","latency_ms":9}]}"#;

#[test]
fn a_failure_counts_its_own_call_too() {
    let value = format!(
        r#"{{"request_id":"r1","source":"ali1688","request":{FAILED_REQUEST},"attempt":{{"at":3000,"account":"a1",
        "class":"throttled","code":"gw.QosAppFrequencyLimit","message":"slow","http_status":400,"latency_ms":5,"not_before":4000}}}}"#
    );
    let headers = Headers::new();
    let raw = raw(&headers, value.as_bytes());
    let Parsed::Failure(failure) = parse(&raw, &route(Kind::Failure)) else { panic!("a failure") };
    let names = [
        "batch",
        "requested_at",
        "failed_at",
        "calls",
        "account",
        "class",
        "code",
        "http_status",
        "latency_ms",
        "not_before",
    ];
    assert_eq!(
        columns(&FailureRow::new(&raw, &failure), &names),
        json!({"batch": "b", "requested_at": 1000, "failed_at": 3000, "calls": 2, "account": "a1", "class": "throttled",
            "code": "gw.QosAppFrequencyLimit", "http_status": 400, "latency_ms": 5, "not_before": 4000})
    );
}

#[test]
fn a_dead_letter_keeps_the_request_and_says_what_the_last_call_came_to() {
    let value = format!(
        r#"{{"request_id":"r1","source":"ali1688","reason":"exhausted","message":"5 attempts","died_at":5000,
        "origin":{{"topic":"weir.failures","partition":1,"offset":7}},"request":{FAILED_REQUEST}}}"#
    );
    let headers = Headers::new();
    let raw = raw(&headers, value.as_bytes());
    let Parsed::DeadLetter(dead) = parse(&raw, &route(Kind::DeadLetter)) else { panic!("a dead letter") };
    let row = DeadLetterRow::new(&raw, &dead);
    let names =
        ["item", "batch", "requested_at", "died_at", "reason", "calls", "last_class", "last_code", "origin_offset"];
    assert_eq!(
        columns(&row, &names),
        json!({"item": "1", "batch": "b", "requested_at": 1000, "died_at": 5000, "reason": "exhausted", "calls": 1,
            "last_class": "outage", "last_code": "timeout", "origin_offset": 7})
    );
    let request: Request = serde_json::from_str(&row.request).unwrap();
    assert_eq!(request.history.len(), 1);
}

#[test]
fn the_bytes_of_an_unreadable_request_are_bytes_again() {
    let value =
        br#"{"request_id":"weir.requests.ali1688/0/1","source":"ali1688","reason":"invalid","message":"m","died_at":1,
        "origin":{"topic":"t","partition":0,"offset":1},"original_base64":"//4="}"#;
    let headers = Headers::new();
    let raw = raw(&headers, value);
    let Parsed::DeadLetter(dead) = parse(&raw, &route(Kind::DeadLetter)) else { panic!("a dead letter") };
    assert_eq!(DeadLetterRow::new(&raw, &dead).original, Blob(b"\xff\xfe".to_vec()));
}

#[test]
fn an_unreadable_dead_letter_keeps_its_bytes() {
    let headers = Headers::new();
    let raw = raw(&headers, b"\xff{");
    let Parsed::Raw(why) = parse(&raw, &route(Kind::DeadLetter)) else { panic!("unreadable") };
    let row = DeadLetterRow::unreadable(&raw, &why);
    assert_eq!((row.reason, row.original.0.as_slice()), ("invalid", b"\xff{".as_slice()));
    assert_eq!((row.request_id.as_str(), row.died_at), ("weir.results/3/42", Time(TIME)));
    assert!(row.message.contains(Kind::DeadLetter.ce_type()), "{}", row.message);
}

#[test]
fn what_cannot_be_read_has_no_row_and_only_a_results_dead_letter_is_ours() {
    let headers = Headers::new();
    for kind in [Kind::Request, Kind::Failure, Kind::Result] {
        let parsed = parse(&raw(&headers, b""), &route(kind));
        assert!(!parsed.has_row());
        assert_eq!(matches!(parsed, Parsed::Poison(_)), kind == Kind::Result, "{kind:?}");
    }
}
