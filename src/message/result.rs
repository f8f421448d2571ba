//! The vendor's answer for an item. In code it is an [`Observation`], since `Result` is taken.

use std::{collections::BTreeMap, convert::Infallible};

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use sha1::{Digest as _, Sha1};

use super::{
    AccountAlias, BatchId, ItemId, RequestId, SourceName,
    change::{Field, value},
    id::from_text,
    price,
};
use crate::runtime::clock::Timestamp;

/// What the vendor said about the item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Here are its data.
    Found,
    /// There is no such item.
    Absent,
    /// It exists, but is not for sale now.
    OffShelf,
}

impl Status {
    /// The word in records and rows.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Found => "found",
            Self::Absent => "absent",
            Self::OffShelf => "off_shelf",
        }
    }
}

/// Where the answer came from. A newer weir may know further ways: their words are kept as they are.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Via {
    /// A call to the vendor for this request.
    Call,
    /// An answer that was kept, or that came for another request at the same time. `fetched_at` is the vendor's time,
    /// so it makes no new point of a price's history.
    Cache,
    /// The same since the call for this request failed: older than it would have been given else.
    Stale,
    /// A way that this version does not know.
    #[serde(untagged)]
    Other(Box<str>),
}

impl Via {
    /// The word in records and rows.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::Call => "call",
            Self::Cache => "cache",
            Self::Stale => "stale",
            Self::Other(word) => word,
        }
    }
}

impl From<&str> for Via {
    fn from(word: &str) -> Self {
        match word {
            "call" => Self::Call,
            "cache" => Self::Cache,
            "stale" => Self::Stale,
            other => Self::Other(other.into()),
        }
    }
}

/// By hand: with an untagged variant serde would copy the word of every result before it looks at it.
impl<'de> Deserialize<'de> for Via {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        from_text(deserializer, "a word like \"call\"", |word| Ok::<_, Infallible>(Self::from(word)))
    }
}

/// The columns that all sources share, each as the vendor sent it, and those of a source's own.
///
/// Numbers that people pay with are decimal texts: they never pass through floating point.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Columns {
    /// The title.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// The price in units of `currency`, as a decimal text; of a range its low end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub price: Option<String>,
    /// The price as the vendor wrote it, if that is not the number itself: a range, a currency's sign, words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub price_text: Option<String>,
    /// ISO 4217.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub currency: Option<String>,
    /// How many are for sale.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stock: Option<String>,
    /// The vendor's JSON of the variants, verbatim.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sku_info: Option<String>,
    /// The vendor's category id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub category_id: Option<String>,
    /// The seller's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seller_nick: Option<String>,
    /// The customers' score, as a decimal text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rating: Option<String>,
    /// How many customers have reviewed it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reviews: Option<String>,
    /// The vendor's own word for the state of the listing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vendor_status: Option<String>,
    /// When the vendor last changed the listing, in its own form.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vendor_updated: Option<String>,
    /// Further columns of the source's own, by the names that its configuration gives them: texts as they are, any other
    /// JSON as it stands. What the vendor leaves out, or says null to, is not there.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub further: BTreeMap<String, String>,
}

impl Columns {
    /// A fingerprint of what people watch: price, title, stock, rating and the status. It is decided here, once:
    /// `10.0` and `￥10.00` are one price, so that formatting alone makes no change.
    #[must_use]
    pub fn fingerprint(&self, status: Status) -> String {
        let watched = [
            status.as_str().to_owned(),
            value(Field::Title, self.title.as_deref()),
            price::meaning(self.price.as_deref(), self.price_text.as_deref()),
            value(Field::Stock, self.stock.as_deref()),
            value(Field::Rating, self.rating.as_deref()),
        ];
        let digest = Sha1::digest(watched.join("\u{1f}"));
        hex::encode(&digest[..8])
    }
}

/// The answer of a vendor for one request.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "weir result v1")]
pub struct Observation {
    /// Which request.
    pub request_id: RequestId,
    /// Which source.
    pub source: SourceName,
    /// The source that was asked first, and did not answer: `source` stood in for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instead_of: Option<SourceName>,
    /// Which item.
    pub item: ItemId,
    /// The batch of the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch: Option<BatchId>,
    /// What the vendor said.
    pub status: Status,
    /// Where the answer came from.
    pub via: Via,
    /// How many calls it took, this one included.
    pub calls: u32,
    /// The account that called.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<AccountAlias>,
    /// When it was asked for.
    pub requested_at: Timestamp,
    /// When the vendor answered.
    pub fetched_at: Timestamp,
    /// From sending to the end of the reply, in milliseconds.
    pub latency_ms: u32,
    /// What weir understood of the answer.
    #[serde(default)]
    pub columns: Columns,
    /// A fingerprint of the watched columns (price, title, stock, rating, status): another value = a change.
    #[serde(default)]
    pub fingerprint: String,
    /// The vendor's JSON for this item, byte for byte.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<serde_json::Value>")]
    pub raw: Option<Box<RawValue>>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn columns(price: &str, stock: &str) -> Columns {
        Columns {
            title: Some("cup".into()),
            price: Some(price.into()),
            stock: Some(stock.into()),
            ..Columns::default()
        }
    }

    #[test]
    fn formatting_alone_changes_no_fingerprint() {
        let one = columns("10.00", "5").fingerprint(Status::Found);
        assert_eq!(one, columns("10.0", "5").fingerprint(Status::Found));
        assert_eq!(one.len(), 16);
        let written = Columns { price_text: Some("￥10.00".into()), ..columns("10.00", "5") };
        assert_eq!(one, written.fingerprint(Status::Found));
        let range = Columns { price_text: Some("10.00-12.00".into()), ..columns("10.00", "5") };
        assert_ne!(one, range.fingerprint(Status::Found));
    }

    proptest! {
        #[test]
        fn any_word_for_the_way_is_read_kept_and_written_again(word in "call|cache|stale|[a-z_]{0,12}|\\PC{0,12}") {
            let text = serde_json::to_string(&word).unwrap();
            let via: Via = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(via.as_str(), &word);
            prop_assert_eq!(serde_json::to_string(&via).unwrap(), text);
            prop_assert_eq!(matches!(via, Via::Other(_)), !["call", "cache", "stale"].contains(&word.as_str()));
        }
    }

    #[test]
    fn price_stock_and_status_change_it() {
        let one = columns("10.00", "5").fingerprint(Status::Found);
        assert_ne!(one, columns("10.01", "5").fingerprint(Status::Found));
        assert_ne!(one, columns("10.00", "6").fingerprint(Status::Found));
        assert_ne!(one, columns("10.00", "5").fingerprint(Status::OffShelf));
    }
}
