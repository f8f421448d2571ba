//! The JSON Schemas under `schemas/`: they follow the Rust types, and judge records as weir does.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{fs, path::PathBuf, time::Duration};

use jsonschema::Validator;
use schemars::schema_for;
use serde::Serialize;
use serde_json::{Value, json};
use weir::{
    message::{
        AccountReport, AddressReport, Attempt, BatchEnd, BatchId, BatchPart, BatchReport, Cancellation, Change, Class,
        Columns, CutOffReport, DeadLetter, DelayReport, Failure, Field, HoldReport, ItemId, Lane, MaxAge, Observation,
        Origin, Pause, QuotaReport, QuotaSetting, Reason, Request, RequestId, SourceName, Spent, Status, UsedUpReport,
        Via, WholeReport, codec, envelope::Kind,
    },
    runtime::clock::Timestamp,
};

/// The schema of a record as its Rust type has it.
fn generated(kind: Kind) -> Value {
    let schema = match kind {
        Kind::Request => schema_for!(Request),
        Kind::Result => schema_for!(Observation),
        Kind::Failure => schema_for!(Failure),
        Kind::DeadLetter => schema_for!(DeadLetter),
        Kind::Change => schema_for!(Change),
        Kind::Cancellation => schema_for!(Cancellation),
        Kind::BatchEnd => schema_for!(BatchEnd),
        Kind::QuotaReport => schema_for!(QuotaReport),
        Kind::QuotaSetting => schema_for!(QuotaSetting),
    };
    let mut schema = Value::from(schema);
    // What `ce_dataschema` says, so that whoever holds a record finds its schema.
    schema["$id"] = kind.schema_uri().into();
    schema
}

fn path(kind: Kind) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(kind.schema())
}

fn blessing() -> bool {
    std::env::var_os("WEIR_BLESS").is_some()
}

fn committed(kind: Kind) -> Value {
    if blessing() {
        // Another test is writing the file at this moment.
        return generated(kind);
    }
    let text = fs::read_to_string(path(kind)).expect("the schema is committed; WEIR_BLESS=1 writes it");
    serde_json::from_str(&text).expect("a schema is JSON")
}

fn validator(kind: Kind) -> Validator {
    jsonschema::options().should_validate_formats(true).build(&committed(kind)).expect("a valid schema")
}

/// What the schema says against a record, if anything.
fn complaint(kind: Kind, record: &Value) -> Option<String> {
    let validator = validator(kind);
    let complaints: Vec<String> =
        validator.iter_errors(record).map(|error| format!("{}: {error}", error.instance_path())).collect();
    (!complaints.is_empty()).then(|| complaints.join("; "))
}

/// Whether weir's own reader takes the record.
fn readable(kind: Kind, record: &Value) -> bool {
    let value = record.to_string();
    let raw = codec::Raw {
        topic: "topic",
        partition: 0,
        offset: 0,
        time: now(),
        headers: &[],
        value: Some(value.as_bytes()),
    };
    match kind {
        Kind::Request => codec::read_request(&raw, &source()).is_ok(),
        Kind::Result => codec::read_observation(&raw).is_ok(),
        Kind::Failure => codec::read_failure(&raw).is_ok(),
        Kind::DeadLetter => codec::read_dead_letter(&raw).is_ok(),
        Kind::Change => codec::read_change(&raw).is_ok(),
        Kind::Cancellation => codec::read_cancellation(&raw).is_ok(),
        Kind::BatchEnd => codec::read_batch_end(&raw).is_ok(),
        Kind::QuotaReport => codec::read_quota_report(&raw).is_ok(),
        Kind::QuotaSetting => codec::read_quota_setting(&raw).is_ok(),
    }
}

fn now() -> Timestamp {
    Timestamp::from_millis(1_700_000_000_123)
}

fn source() -> SourceName {
    SourceName::new("ali1688").expect("a name")
}

fn record<T: Serialize>(record: &T) -> Value {
    serde_json::to_value(record).expect("records are JSON")
}

fn request() -> Request {
    let mut request = Request::new(ItemId::new("584051070147").expect("an id"));
    request.source = Some(source());
    request.batch = Some("monday".parse().expect("a name"));
    request.params.insert("fields".to_owned(), "price".to_owned());
    request.requested_at = Some(now());
    request.expires_at = Some(now());
    request.max_age = Some(MaxAge(Duration::ZERO));
    request.redriven = 1;
    request.earlier = vec![attempt()];
    request.history = vec![attempt(), Attempt { account: None, http_status: None, not_before: None, ..attempt() }];
    request
}

fn attempt() -> Attempt {
    Attempt {
        at: now(),
        account: Some("main".parse().expect("an alias")),
        class: Class::Throttled,
        code: "gw.QosAppFrequencyLimit".to_owned(),
        message: "too fast".to_owned(),
        http_status: Some(403),
        latency_ms: 12,
        not_before: Some(now()),
    }
}

fn observation(status: Status, raw: Option<&str>) -> Observation {
    Observation {
        request_id: request_id(),
        source: source(),
        instead_of: None,
        item: request().item,
        batch: request().batch,
        status,
        via: Via::Call,
        calls: 1,
        account: attempt().account,
        requested_at: now(),
        fetched_at: now(),
        latency_ms: 250,
        columns: Columns { title: Some("玻璃杯".to_owned()), price: Some("10.00".to_owned()), ..Columns::default() },
        fingerprint: "ab".to_owned(),
        raw: raw.map(|raw| serde_json::from_str(raw).expect("JSON")),
    }
}

fn request_id() -> RequestId {
    RequestId::new("weir.requests.ali1688/3/42").expect("an id")
}

fn dead(reason: Reason, request: Option<Request>) -> DeadLetter {
    DeadLetter {
        request_id: request_id(),
        source: source(),
        reason,
        message: "all 5 attempts are spent".to_owned(),
        died_at: now(),
        origin: Origin { topic: "weir.failures".to_owned(), partition: 3, offset: 42 },
        original_base64: request.is_none().then(|| "//4=".to_owned()),
        request,
    }
}

fn report() -> QuotaReport {
    let calendar = Some("1month from 2026-01-01T00:00:00+08:00".to_owned());
    let spent = Spent { width: 864_000_000, shift: 0, span: 102, calendar, first: 1_967_592, calls: vec![3, 0, 1] };
    let held = HoldReport { until_at: Some(now()), reason: "gw.QosAppFrequencyLimit".to_owned(), since_at: now() };
    let used_up = UsedUpReport { reason: "day budget spent, 50.00 of 50.00 CNY".to_owned(), until_at: now() };
    let account = AccountReport {
        alias: "main".parse().expect("an alias"),
        allowed: "10/1s".to_owned(),
        calls: 4,
        calls_last_minute: 1,
        refused: 1,
        late: 0,
        returned: 2,
        held: Some(held.clone()),
        used_up: Some(used_up.clone()),
        address: Some("proxy-1".to_owned()),
        next_at: Some(now()),
        spent: vec![spent.clone()],
    };
    let address = AddressReport {
        name: "proxy-1".to_owned(),
        held: Some(held.clone()),
        used_up: Some(used_up.clone()),
        spent: vec![spent.clone()],
    };
    let part = BatchPart { holder: "4f1c".to_owned(), granted: 40, calls: 31, seq: 6 };
    let batch = BatchReport { batch: "monday".parse().expect("a batch"), allowed: 500, parts: vec![part] };
    QuotaReport {
        source: source(),
        instance: "weir-1".to_owned(),
        chunk: 0,
        chunks: 1,
        reported_at: now(),
        counted_at: now(),
        day_at: now(),
        closed: false,
        whole: Some(WholeReport {
            held: Some(held),
            used_up: Some(used_up),
            spent: vec![spent],
            addresses: vec![address],
            batches: vec![batch],
            cut_off: Some(CutOffReport { since_at: now(), stopped: false }),
            calls_again: 3,
            silent_ends: 1,
            delays: Some(DelayReport { late_ms: 43, bunched_ms: 7, pace: 0.62 }),
        }),
        accounts: vec![account],
    }
}

fn setting(until_at: Option<Timestamp>) -> QuotaSetting {
    let paused = Pause { since_at: now(), until_at, reason: "sale".to_owned() };
    let setting = QuotaSetting::none(source(), Some("main".parse().expect("an alias")), now());
    QuotaSetting { paused: Some(paused), pace: Some(0.5), resumed_at: Some(now()), ..setting }
}

/// Records as weir writes them.
fn written() -> Vec<(Kind, Value)> {
    let bare = Request::new(request().item);
    let classes = Class::ALL.map(|class| {
        let failure = Failure {
            request_id: request_id(),
            source: source(),
            request: request(),
            attempt: attempt(),
            lane: Lane::Bulk,
        };
        (Kind::Failure, record(&Failure { attempt: Attempt { class, ..attempt() }, ..failure }))
    });
    let reasons = [Reason::Exhausted, Reason::Permanent, Reason::Expired, Reason::Cancelled, Reason::Budget];
    let reasons = reasons.map(|reason| dead(reason, Some(request())));
    let statuses = [(Status::Found, Some(r#"{"price":10.00}"#)), (Status::Absent, None), (Status::OffShelf, None)];
    let mut all = vec![(Kind::Request, record(&request())), (Kind::Request, record(&bare))];
    all.extend(statuses.map(|(status, raw)| (Kind::Result, record(&observation(status, raw)))));
    all.extend(classes);
    all.extend(reasons.map(|dead| (Kind::DeadLetter, record(&dead))));
    all.push((Kind::DeadLetter, record(&dead(Reason::Invalid, None))));
    let fields = [Field::Status, Field::Price, Field::Title, Field::Stock, Field::Rating];
    let batch: BatchId = "monday".parse().expect("a name");
    all.push((Kind::BatchEnd, record(&end(batch.clone()))));
    all.push((Kind::Cancellation, record(&Cancellation { batch, cancelled_at: now() })));
    all.extend(fields.map(|field| (Kind::Change, record(&change(field)))));
    all.push((Kind::QuotaReport, record(&report())));
    all.extend([None, Some(now())].map(|until_at| (Kind::QuotaSetting, record(&setting(until_at)))));
    all
}

fn end(batch: BatchId) -> BatchEnd {
    BatchEnd { batch, requested: 10, found: 6, absent: 2, off_shelf: 1, dead: 1, finished_at: now() }
}

fn change(field: Field) -> Change {
    Change {
        source: source(),
        item: request().item,
        field,
        old: Some("10.00".to_owned()),
        new: None,
        currency: Some("CNY".to_owned()),
        old_at: now(),
        new_at: now(),
        batch: None,
        request_id: request_id(),
    }
}

/// The least that a record of each kind needs.
fn minimal(kind: Kind) -> Value {
    let request = json!({"item": "584051070147"});
    match kind {
        Kind::Request => request,
        Kind::Result => json!({
            "request_id": "r1", "source": "ali1688", "item": "1", "status": "absent", "via": "call", "calls": 1,
            "requested_at": "2026-11-21T09:00:00Z", "fetched_at": "2026-11-21T17:00:01.5+08:00", "latency_ms": 0,
        }),
        Kind::Failure => json!({
            "request_id": "r1", "source": "ali1688", "request": request,
            "attempt": {"at": "2026-11-21T09:00:00Z", "class": "outage", "code": "", "message": "", "latency_ms": 0},
        }),
        Kind::DeadLetter => json!({
            "request_id": "r1", "source": "ali1688", "reason": "invalid", "message": "",
            "died_at": "2026-11-21T09:00:00Z", "origin": {"topic": "t", "partition": 0, "offset": 0},
        }),
        Kind::Cancellation => json!({"batch": "monday", "cancelled_at": "2026-11-21T09:00:00Z"}),
        Kind::BatchEnd => json!({
            "batch": "monday", "requested": 1, "found": 0, "absent": 0, "off_shelf": 0, "dead": 1,
            "finished_at": "2026-11-21T09:00:00Z",
        }),
        Kind::Change => json!({
            "source": "ali1688", "item": "1", "field": "status", "request_id": "r1",
            "old_at": "2026-11-21T09:00:00Z", "new_at": "2026-11-21T09:00:00Z",
        }),
        Kind::QuotaReport => json!({
            "source": "ali1688", "instance": "weir-1", "chunk": 0, "chunks": 1, "accounts": [{"alias": "one"}],
            "reported_at": "2026-11-21T09:00:00Z", "counted_at": "2026-11-21T09:00:00Z",
            "day_at": "2026-11-21T00:00:00Z",
        }),
        Kind::QuotaSetting => json!({"source": "ali1688", "set_at": "2026-11-21T09:00:00Z"}),
    }
}

#[test]
fn the_committed_schemas_are_those_of_the_types() {
    for kind in Kind::ALL {
        if blessing() {
            let text = format!("{:#}\n", generated(kind));
            fs::write(path(kind), text).expect("schemas/ is there and can be written");
        }
        assert!(
            committed(kind) == generated(kind),
            "{} differs from the Rust types. If the change is meant (README.md there says which are allowed): \
             WEIR_BLESS=1 cargo test --test golden schemas, then commit the file",
            kind.schema()
        );
    }
}

#[test]
fn each_schema_says_what_it_is_and_tolerates_unknown_fields() {
    for kind in Kind::ALL {
        let schema = committed(kind);
        assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
        assert_eq!(schema["$id"], kind.schema_uri());
        let title = schema["title"].as_str().expect("a title");
        assert_eq!(title, kind.ce_type().replace(['.', '_'], " "), "the title names kind and version");
        assert!(schema["description"].as_str().is_some_and(|text| text.len() > 20), "{title}");
        assert!(!schema.to_string().contains("additionalProperties\":false"), "{title} refuses newer writers");
        assert!(
            !schema.to_string().contains("[`"),
            "{title}: a link into the Rust code, which its readers do not have"
        );
        for (name, property) in schema["properties"].as_object().expect("properties") {
            assert!(property["description"].is_string(), "{title}: {name} has no description");
        }
        assert!(jsonschema::meta::is_valid(&schema), "{title}");
    }
}

#[test]
fn what_weir_writes_is_valid() {
    for (kind, record) in written() {
        assert_eq!(complaint(kind, &record), None, "{record:#}");
        assert!(readable(kind, &record), "{record:#}");
    }
}

#[test]
fn the_least_and_unknown_fields_are_valid_and_can_be_read() {
    for kind in Kind::ALL {
        let mut record = minimal(kind);
        assert_eq!(complaint(kind, &record), None, "{record}");
        assert!(readable(kind, &record), "{record}");
        record["from_a_newer_version"] = json!({"a": [1, null]});
        for inner in ["request", "attempt", "origin"] {
            if let Some(inner) = record.get_mut(inner) {
                inner["from_a_newer_version"] = json!(1);
            }
        }
        assert_eq!(complaint(kind, &record), None, "{record}");
        assert!(readable(kind, &record), "{record}");
    }
}

#[test]
fn a_word_of_a_newer_version_for_where_an_answer_came_from_is_valid_and_can_be_read() {
    let mut record = minimal(Kind::Result);
    record["via"] = json!("edge_cache");
    assert_eq!(complaint(Kind::Result, &record), None);
    assert!(readable(Kind::Result, &record));
}

#[test]
fn without_any_of_its_required_fields_a_record_is_neither_valid_nor_readable() {
    for kind in Kind::ALL {
        let least = minimal(kind);
        for field in least.as_object().expect("records are objects").keys() {
            let mut record = least.clone();
            record.as_object_mut().expect("records are objects").remove(field);
            assert!(complaint(kind, &record).is_some(), "{kind:?} without {field}");
            assert!(!readable(kind, &record), "{kind:?} without {field}");
        }
    }
}

#[test]
fn bad_records_are_refused_at_the_field_that_is_wrong() {
    let table = [
        (Kind::Request, "/item", json!("")),
        (Kind::Request, "/item", json!(584_051_070_147_u64)),
        (Kind::Request, "/item", json!("9".repeat(257))),
        (Kind::Request, "/params", json!({"zip": 10041})),
        (Kind::Request, "/history", json!([{"class": "outage"}])),
        (Kind::Request, "/requested_at", json!("yesterday")),
        (Kind::Result, "/status", json!("gone")),
        (Kind::Result, "/via", json!(7)),
        (Kind::Result, "/calls", json!(-1)),
        (Kind::Result, "/columns", json!({"price": 10.0})),
        (Kind::Result, "/fetched_at", json!("21.11.2026")),
        (Kind::Failure, "/attempt/class", json!("absent")),
        (Kind::Failure, "/attempt/http_status", json!(70_000)),
        (Kind::Failure, "/request/item", json!("")),
        (Kind::DeadLetter, "/reason", json!("bored")),
        (Kind::DeadLetter, "/origin/offset", json!("42")),
        (Kind::DeadLetter, "/source", json!("")),
        (Kind::QuotaReport, "/accounts", json!([{"alias": ""}])),
        (Kind::QuotaReport, "/chunk", json!(-1)),
        (Kind::QuotaReport, "/accounts", json!([{"alias": "one", "held": {"reason": "401"}}])),
        (Kind::QuotaSetting, "/pace", json!("half")),
        (Kind::QuotaSetting, "/paused", json!({"reason": "sale"})),
    ];
    for (kind, pointer, wrong) in table {
        let mut record = minimal(kind);
        let (parent, field) = pointer.rsplit_once('/').expect("a pointer has a slash");
        record.pointer_mut(parent).expect("the parent is there")[field] = wrong;
        let complaint = complaint(kind, &record).unwrap_or_default();
        assert!(complaint.contains(pointer), "{kind:?} {pointer}: {complaint:?}");
        assert!(!readable(kind, &record), "{kind:?} {pointer}: the schema refuses what weir would read");
    }
}
