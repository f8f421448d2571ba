//! Products as `alibaba.product.get` shows them: about a kilobyte of JSON, the same for the same id.

use std::{fmt::Write as _, time::Duration};

use jiff::{Timestamp as Instant, tz};

use super::dice::{Question, below, next, roll};
use crate::runtime::clock::Timestamp;

const SEASONS: [&str; 6] = ["2024新款", "夏季", "秋冬", "跨境", "现货", "外贸"];
const STYLES: [&str; 8] = ["加厚", "轻奢", "简约", "便携式", "大容量", "防水", "复古", "北欧风"];
const MATERIALS: [&str; 8] = ["纯棉", "不锈钢", "硅胶", "陶瓷", "高硼硅玻璃", "实木", "帆布", "ABS"];
const GOODS: [(&str, u32); 12] = [
    ("短袖T恤", 124_096_006),
    ("保温杯", 1_048_182),
    ("手机壳", 10_210),
    ("餐具套装", 1_042_736),
    ("玻璃杯", 122_258_001),
    ("收纳盒", 1_037_012),
    ("双肩包", 1_042_954),
    ("蓝牙耳机", 124_370_006),
    ("台灯", 122_698_004),
    ("瑜伽垫", 1_046_613),
    ("宠物窝", 122_348_004),
    ("毛巾", 1_037_192),
];
const ENDINGS: [&str; 5] = ["厂家批发", "一件代发", "支持定制logo", "厂家直销", "亚马逊专供"];
pub(super) const COLOURS: [&str; 8] = ["黑色", "白色", "米白色", "红色", "藏青色", "军绿色", "粉色", "透明"];

/// How far a drifting price strays from where it began, in thousandths.
const DRIFT: u64 = 100;
/// In how many steps it goes once up and down.
const DRIFT_STEPS: u64 = 240;

/// 2015-01-01 in China, in milliseconds since 1970.
const OLDEST: u64 = 1_420_041_600_000;
const DAY: u64 = 86_400_000;

/// What has to be known to show a product.
#[derive(Clone, Copy, Debug)]
pub(super) struct Showing {
    pub(super) seed: u64,
    pub(super) id: u64,
    /// `published`, or why it is not sold.
    pub(super) status: &'static str,
    pub(super) now: Timestamp,
    /// Prices go up and down by a tenth within this time; `None`: they stay.
    pub(super) drift: Option<Duration>,
}

/// The whole reply for a product that the vendor knows.
pub(super) fn reply(showing: Showing) -> String {
    let Showing { seed, id, status, now, drift } = showing;
    let mut bits = roll(seed, Question::Product, id);
    let created_at = OLDEST + below(next(&mut bits), 3_000) * DAY + below(next(&mut bits), DAY);
    let changed_at = created_at + below(next(&mut bits), 300) * DAY;
    let base_fen = base_fen(&mut bits);
    let (permille, changed_at) = drifted(next(&mut bits), now, drift).unwrap_or((1_000, changed_at));
    let fen = (base_fen * permille + 500) / 1_000;

    let (noun, category) = *pick(&mut bits, &GOODS);
    let mut json = String::with_capacity(1_400);
    // Writing to a String cannot fail.
    let _ = write!(
        json,
        r#"{{"productInfo":{{"productID":{id},"productType":"wholesale","categoryID":{category},"categoryName":"{noun}","status":"{status}","subject":"{} {}{}{noun} {}","language":"CHINESE","bizType":1,"supplierUserId":{},"qualityLevel":{},"#,
        pick(&mut bits, &SEASONS),
        pick(&mut bits, &STYLES),
        pick(&mut bits, &MATERIALS),
        pick(&mut bits, &ENDINGS),
        2_200_000_000_000 + below(next(&mut bits), 19_000_000_000),
        below(next(&mut bits), 6),
    );
    let on_sale = skus(&mut json, &mut bits, id, fen);
    sale_info(&mut json, &mut bits, fen, on_sale);
    let _ = write!(
        json,
        r#"}},"bizGroupInfos":[{{"code":"isConsignMarketOffer","description":"1688代销产品","support":{}}}],"createTime":"{}","lastUpdateTime":"{}","errMsg":null}}"#,
        next(&mut bits).is_multiple_of(2),
        aop_time(created_at),
        aop_time(changed_at),
    );
    json
}

/// What an article is called, and its category.
pub(super) fn name(bits: &mut u64) -> (String, u32) {
    let (noun, category) = *pick(bits, &GOODS);
    (format!("{} {}{}{noun}", pick(bits, &SEASONS), pick(bits, &STYLES), pick(bits, &MATERIALS)), category)
}

/// The reply for an id without a product.
pub(super) fn nothing(message: &str) -> String {
    format!(r#"{{"bizGroupInfos":[],"errMsg":"{message}"}}"#)
}

/// 1.50 to about 1,200 yuan, cheap goods more often than dear ones.
pub(super) fn base_fen(bits: &mut u64) -> u64 {
    let ceiling = 300 << below(next(bits), 9);
    150 + below(next(bits), ceiling)
}

/// Two to four variants; returns how many pieces they have together.
fn skus(json: &mut String, bits: &mut u64, id: u64, fen: u64) -> u64 {
    json.push_str(r#""skuInfos":["#);
    let first_colour = next(bits);
    let count = 2 + below(next(bits), 3);
    let mut on_sale = 0;
    for index in 0..count {
        let amount = below(next(bits), 5_000);
        on_sale += amount;
        let at = usize::try_from(first_colour.wrapping_add(index) % 8).unwrap_or(0);
        let separator = if index == 0 { "" } else { "," };
        let _ = write!(
            json,
            r#"{separator}{{"skuId":{},"specId":"{:016x}{:016x}","price":{},"amountOnSale":{amount},"attributes":[{{"attributeID":3216,"attributeDisplayName":"颜色","attributeValue":"{}"}}]}}"#,
            id * 8 + index,
            next(bits),
            next(bits),
            Yuan(fen + fen * index / 20),
            COLOURS[at],
        );
    }
    json.push_str("],");
    on_sale
}

/// Two or three prices, each for a higher quantity and lower than the one before.
fn sale_info(json: &mut String, bits: &mut u64, fen: u64, on_sale: u64) {
    let start = 1 + below(next(bits), 5);
    json.push_str(r#""saleInfo":{"priceRanges":["#);
    for tier in 0..2 + below(next(bits), 2) {
        let separator = if tier == 0 { "" } else { "," };
        let quantity = [start, start * 10, start * 100][usize::try_from(tier).unwrap_or(0)];
        let price = Yuan(fen - fen * tier / 16);
        let _ = write!(json, r#"{separator}{{"startQuantity":{quantity},"price":{price}}}"#);
    }
    let _ = write!(json, r#"],"minOrderQuantity":{start},"quoteType":2,"unit":"件","amountOnSale":{on_sale}}}"#);
}

/// Where a drifting price stands, in thousandths of its base, and when it last moved (ms since 1970).
pub(super) fn drifted(phase: u64, now: Timestamp, period: Option<Duration>) -> Option<(u64, u64)> {
    let step = (u64::try_from(period?.as_millis()).ok()? / DRIFT_STEPS).max(1);
    let now = u64::try_from(now.as_millis()).ok()?;
    let phase = phase % (step * DRIFT_STEPS);
    let steps = (now + phase) / step;
    // Up from -DRIFT to +DRIFT in the first half of the period, and back in the second.
    let at = steps % DRIFT_STEPS;
    let height = at.min(DRIFT_STEPS - at) * 4 * DRIFT / DRIFT_STEPS;
    Some((1_000 - DRIFT + height, (steps * step).saturating_sub(phase)))
}

fn pick<'a, T>(bits: &mut u64, among: &'a [T]) -> &'a T {
    &among[usize::try_from(below(next(bits), among.len() as u64)).unwrap_or(0)]
}

/// Fen as yuan with two decimals, as the vendor writes them: `10.00`.
pub(super) struct Yuan(pub(super) u64);

impl std::fmt::Display for Yuan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{:02}", self.0 / 100, self.0 % 100)
    }
}

/// A time as AOP writes it: `20180717174002000+0800`.
fn aop_time(millis: u64) -> String {
    let at = i64::try_from(millis).ok().and_then(|ms| Instant::from_millisecond(ms).ok()).unwrap_or_default();
    let at = tz::offset(8).to_datetime(at);
    format!(
        "{:04}{:02}{:02}{:02}{:02}{:02}{:03}+0800",
        at.year(),
        at.month(),
        at.day(),
        at.hour(),
        at.minute(),
        at.second(),
        at.millisecond()
    )
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn showing(id: u64) -> Showing {
        let now = Timestamp::from_millis(1_750_000_000_000);
        Showing { seed: 7, id, status: "published", now, drift: None }
    }

    fn parsed(showing: Showing) -> Value {
        serde_json::from_str(&reply(showing)).unwrap()
    }

    #[test]
    fn a_product_is_about_a_kilobyte_of_json_with_the_fields_that_are_read() {
        let mut bytes = 0;
        for id in 600_000_000_000..600_000_001_000 {
            let text = reply(showing(id));
            bytes += text.len();
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
            let product = &value["productInfo"];
            assert_eq!(product["productID"], id);
            assert_eq!(product["status"], "published");
            assert!(product["subject"].as_str().unwrap().chars().count() > 6);
            assert!(product["categoryID"].is_u64());
            assert!(product["skuInfos"].as_array().unwrap().len() >= 2);
            assert!(value["errMsg"].is_null());
        }
        assert!((900_000..1_400_000).contains(&bytes), "{bytes} bytes for 1,000 products");
    }

    #[test]
    fn prices_have_two_decimals_and_fall_with_the_quantity() {
        for id in 600_000_000_000..600_000_001_000 {
            let product = parsed(showing(id));
            let ranges = product["productInfo"]["saleInfo"]["priceRanges"].as_array().unwrap();
            assert!((2..=3).contains(&ranges.len()));
            for pair in ranges.windows(2) {
                assert!(pair[0]["startQuantity"].as_u64() < pair[1]["startQuantity"].as_u64());
                assert!(pair[0]["price"].as_f64() > pair[1]["price"].as_f64(), "{pair:?}");
            }
            let text = ranges[0]["price"].to_string();
            assert_eq!(text.rsplit('.').next().map(str::len), Some(2), "{text}");
        }
    }

    #[test]
    fn a_product_stays_the_same_unless_prices_drift() {
        let (then, later) = (Timestamp::from_millis(1_750_000_000_000), Timestamp::from_millis(1_750_003_600_000));
        let at = |now, drift| reply(Showing { now, drift, ..showing(584_051_070_147) });
        assert_eq!(at(then, None), at(later, None));
        assert_ne!(at(then, None), reply(Showing { seed: 8, ..showing(584_051_070_147) }));
        let drift = Some(Duration::from_secs(6 * 3600));
        assert_ne!(at(then, drift), at(later, drift));
    }

    #[test]
    fn a_drifting_price_moves_slowly_and_within_a_tenth() {
        let period = Duration::from_secs(3_600);
        let mut seen = Vec::new();
        for second in 0..7_200 {
            let now = Timestamp::from_millis(1_750_000_000_000 + second * 1_000);
            let (permille, changed_at) = drifted(12_345, now, Some(period)).unwrap();
            assert!(i64::try_from(changed_at).unwrap() <= now.as_millis());
            seen.push(permille);
        }
        assert_eq!((seen.iter().min(), seen.iter().max()), (Some(&900), Some(&1_100)));
        assert!(seen.windows(2).all(|pair| pair[0].abs_diff(pair[1]) <= 2));
    }

    #[test]
    fn times_are_written_as_the_gateway_writes_them() {
        assert_eq!(aop_time(1_531_820_402_000), "20180717174002000+0800");
    }

    #[test]
    fn an_id_without_a_product_has_a_message() {
        let value: Value = serde_json::from_str(&nothing("商品不存在")).unwrap();
        assert!(value.get("productInfo").is_none());
        assert_eq!(value["errMsg"], "商品不存在");
    }
}
