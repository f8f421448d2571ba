//! Results of about 1 kB as fetch writes them, the same for the same number.

use std::fmt::Write as _;

use anyhow::Result;
use rdkafka::{
    message::{Header, OwnedHeaders},
    producer::BaseRecord,
};
use serde_json::value::RawValue;
use weir::{
    message::{
        AccountAlias, BatchId, Columns, ItemId, Observation, RequestId, SourceName, Status, Via,
        codec::{self, Encoded},
        envelope::{Envelope, Kind},
    },
    runtime::clock::Timestamp,
};

const WORDS: [&str; 16] = [
    "加厚",
    "轻奢",
    "简约",
    "便携式",
    "大容量",
    "防水",
    "复古",
    "北欧风",
    "保温杯",
    "手机壳",
    "餐具套装",
    "玻璃杯",
    "收纳盒",
    "双肩包",
    "台灯",
    "毛巾",
];

/// The next of a sequence that repeats after 2^64 (`SplitMix64`).
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut bits = *state;
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// The result of this number, fetched at this time.
pub fn observation(number: u64, now: Timestamp) -> Result<Observation> {
    let mut state = number;
    let mut bits = || next(&mut state);
    let item = 600_000_000_000 + bits() % 99_999_999_999;
    let price = format!("{}.{:02}", bits() % 900 + 1, bits() % 100);
    let (stock, category) = (bits() % 10_000, 1_000_000 + bits() % 300);
    let mut title = String::new();
    for _ in 0..5 {
        title.push_str(WORDS[usize::try_from(bits() % 16).unwrap_or(0)]);
    }
    let mut skus = String::from("[");
    for variant in 0..2 {
        let separator = if variant == 0 { "" } else { "," };
        let (id, amount) = (bits(), bits() % 5_000);
        write!(skus, r#"{separator}{{"skuId":{item}{variant},"specId":"{id:016x}","amountOnSale":{amount}}}"#)?;
    }
    skus.push(']');
    let seller = 2_200_000_000_000 + bits() % 5_000;
    let raw = format!(
        r#"{{"productInfo":{{"productID":{item},"categoryID":{category},"status":"published","subject":"{title}","supplierUserId":{seller},"skuInfos":{skus},"price":{price},"amountOnSale":{stock},"unit":"件"}},"errMsg":null}}"#
    );
    let columns = Columns {
        title: Some(title),
        price: Some(price),
        currency: Some("CNY".to_owned()),
        stock: Some(stock.to_string()),
        sku_info: Some(skus),
        category_id: Some(category.to_string()),
        vendor_status: Some("published".to_owned()),
        ..Columns::default()
    };
    Ok(Observation {
        request_id: RequestId::new(format!("{:016x}", bits()))?,
        source: SourceName::new("ali1688")?,
        instead_of: None,
        item: ItemId::new(item.to_string())?,
        batch: Some(BatchId::new("bench")?),
        status: Status::Found,
        via: Via::Call,
        calls: 1,
        account: Some(AccountAlias::new(format!("a{}", number % 100))?),
        requested_at: now,
        fetched_at: now,
        latency_ms: 100,
        fingerprint: columns.fingerprint(Status::Found),
        columns,
        raw: Some(RawValue::from_string(raw)?),
    })
}

/// The record of a result, as fetch writes it.
pub fn encode(seen: &Observation) -> Encoded {
    let (kind, id) = (Kind::Result, seen.request_id.as_str());
    codec::encode(&Envelope { kind, id, writer: "weir/fetch", time: seen.fetched_at, traceparent: None }, seen)
}

/// As a producer takes it.
pub fn record<'a>(topic: &'a str, seen: &'a Observation, encoded: &'a Encoded) -> BaseRecord<'a, [u8], [u8]> {
    let headers = encoded
        .headers
        .iter()
        .fold(OwnedHeaders::new(), |headers, (key, value)| headers.insert(Header { key, value: Some(value.as_ref()) }));
    BaseRecord::to(topic).key(seen.item.as_str().as_bytes()).payload(encoded.value.as_ref()).headers(headers)
}
