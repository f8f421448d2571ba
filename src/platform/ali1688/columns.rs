//! Where a reply has its columns, and how a price is chosen.

use std::{borrow::Cow, collections::BTreeMap};

use rust_decimal::Decimal;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::{
    message::{
        Columns, json,
        price::{self, Stated},
    },
    platform::{
        pick::{InvalidPointer, Picked, Picker},
        reading::{first_price, present, price, text},
    },
};

/// JSON pointers into the reply of the chosen API.
///
/// The defaults fit `alibaba.product.get`, which serves a seller's own goods only; buyers use other APIs,
/// which answer in other shapes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pointers {
    /// The product's id, which must be the one that was asked for. What it stands in is the product.
    pub item: String,
    /// What the vendor says instead of a product.
    pub error: String,
    /// The title.
    pub title: String,
    /// Where to look for the price, first hit first. If empty, the price of the tier with the lowest
    /// `startQuantity` in `tiers`, else the lowest price in `sku_info`; of a range its low end.
    pub price: Vec<String>,
    /// A list of `{startQuantity, price}`.
    pub tiers: String,
    /// How many are for sale.
    pub stock: String,
    /// The variants: a list with a `price` in each, kept verbatim.
    pub sku_info: String,
    /// The category id.
    pub category_id: String,
    /// The seller's name; `alibaba.product.get` has none.
    pub seller_nick: Option<String>,
    /// The customers' score; `alibaba.product.get` has none (`qualityLevel` is the listing's quality).
    pub rating: Option<String>,
    /// How many customers have reviewed it; `alibaba.product.get` does not say.
    pub reviews: Option<String>,
    /// The state of the listing: anything but `published` is off the shelf.
    pub status: String,
    /// When the listing was last changed.
    pub updated: String,
    /// Further columns by name.
    pub further: BTreeMap<String, String>,
}

impl Default for Pointers {
    fn default() -> Self {
        Self {
            item: "/productInfo/productID".to_owned(),
            error: "/errMsg".to_owned(),
            title: "/productInfo/subject".to_owned(),
            price: Vec::new(),
            tiers: "/productInfo/saleInfo/priceRanges".to_owned(),
            stock: "/productInfo/saleInfo/amountOnSale".to_owned(),
            sku_info: "/productInfo/skuInfos".to_owned(),
            category_id: "/productInfo/categoryID".to_owned(),
            seller_nick: None,
            rating: None,
            reviews: None,
            status: "/productInfo/status".to_owned(),
            updated: "/lastUpdateTime".to_owned(),
            further: BTreeMap::new(),
        }
    }
}

/// `[source.columns]`: JSON pointers into the reply of the chosen API, each in place of the dialect's own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Overrides {
    /// The product's id, which must be the one that was asked for. What it stands in is the product.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub item: Option<String>,
    /// What the vendor says instead of a product.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The title.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// Where to look for the price, first hit first. If empty: the price of the tier with the lowest `startQuantity` in
    /// `tiers`, else the lowest price in `sku_info`; of a range its low end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub price: Option<Vec<String>>,
    /// A list of `{startQuantity, price}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tiers: Option<String>,
    /// How many are for sale.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stock: Option<String>,
    /// The variants: a list with a `price` in each, kept verbatim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sku_info: Option<String>,
    /// The category id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub category_id: Option<String>,
    /// The seller's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seller_nick: Option<String>,
    /// The customers' score.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rating: Option<String>,
    /// How many customers have reviewed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reviews: Option<String>,
    /// The state of the listing: anything but `published` is off the shelf.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    /// When the listing was last changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub updated: Option<String>,
    /// Further columns of your own, by name: small letters, digits and `_`. They are kept beside the others, in
    /// ClickHouse as `further['name']`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub further: Option<BTreeMap<String, String>>,
}

impl Overrides {
    /// These, and the others' where nothing is said.
    #[must_use]
    pub fn over(self, other: Pointers) -> Pointers {
        Pointers {
            item: self.item.unwrap_or(other.item),
            error: self.error.unwrap_or(other.error),
            title: self.title.unwrap_or(other.title),
            price: self.price.unwrap_or(other.price),
            tiers: self.tiers.unwrap_or(other.tiers),
            stock: self.stock.unwrap_or(other.stock),
            sku_info: self.sku_info.unwrap_or(other.sku_info),
            category_id: self.category_id.unwrap_or(other.category_id),
            seller_nick: self.seller_nick.or(other.seller_nick),
            rating: self.rating.or(other.rating),
            reviews: self.reviews.or(other.reviews),
            status: self.status.unwrap_or(other.status),
            updated: self.updated.unwrap_or(other.updated),
            further: self.further.unwrap_or(other.further),
        }
    }
}

impl From<Pointers> for Overrides {
    fn from(all: Pointers) -> Self {
        Self {
            item: Some(all.item),
            error: Some(all.error),
            title: Some(all.title),
            price: Some(all.price),
            tiers: Some(all.tiers),
            stock: Some(all.stock),
            sku_info: Some(all.sku_info),
            category_id: Some(all.category_id),
            seller_nick: all.seller_nick,
            rating: all.rating,
            reviews: all.reviews,
            status: Some(all.status),
            updated: Some(all.updated),
            further: Some(all.further).filter(|further| !further.is_empty()),
        }
    }
}

/// What is looked up in every reply, in the order in which [`places`] lists the pointers.
#[derive(Clone, Copy)]
pub enum Field {
    /// The gateway's own error.
    ErrorCode,
    /// Its words.
    ErrorMessage,
    /// More of its words.
    Exception,
    /// An error in the articles' forms.
    ErrorResponse,
    /// The object that holds the id.
    Product,
    /// [`Pointers::item`]
    Item,
    /// [`Pointers::error`]
    Error,
    /// [`Pointers::title`]
    Title,
    /// [`Pointers::tiers`]
    Tiers,
    /// [`Pointers::stock`]
    Stock,
    /// [`Pointers::sku_info`]
    SkuInfo,
    /// [`Pointers::category_id`]
    CategoryId,
    /// [`Pointers::seller_nick`]
    SellerNick,
    /// [`Pointers::rating`]
    Rating,
    /// [`Pointers::reviews`]
    Reviews,
    /// [`Pointers::status`]
    Status,
    /// [`Pointers::updated`]
    Updated,
    /// The first of [`Pointers::price`]; the others follow, and then [`Pointers::further`].
    Prices,
}

/// Where everything is that is looked up in a reply.
#[derive(Clone, Debug)]
pub struct Places {
    picker: Picker,
    /// The names of the further columns: their values come last.
    further: Vec<String>,
}

impl Places {
    /// Looks a reply through.
    ///
    /// # Errors
    /// If it is no JSON.
    pub fn find<'a>(&'a self, json: &'a str) -> Result<Found<'a>, serde_json::Error> {
        Ok(Found { picked: self.picker.pick(json)?, further: &self.further })
    }
}

/// The places of all [`Field`]s.
///
/// # Errors
/// [`InvalidPointer`] if one of the pointers is none.
pub fn places(pointers: &Pointers) -> Result<Places, InvalidPointer> {
    // A product that is the whole reply is always there: then the id alone says whether there is one.
    let product = pointers.item.rsplit_once('/').map(|(parent, _)| parent).filter(|parent| !parent.is_empty());
    let fixed = [
        Some("/error_code"),
        Some("/error_message"),
        Some("/exception"),
        Some("/error_response"),
        product.or(Some(&pointers.item)),
        Some(&pointers.item),
        Some(&pointers.error),
        Some(&pointers.title),
        Some(&pointers.tiers),
        Some(&pointers.stock),
        Some(&pointers.sku_info),
        Some(&pointers.category_id),
        pointers.seller_nick.as_deref(),
        pointers.rating.as_deref(),
        pointers.reviews.as_deref(),
        Some(&pointers.status),
        Some(&pointers.updated),
    ];
    let more = pointers.price.iter().chain(pointers.further.values()).map(|pointer| Some(pointer.as_str()));
    let picker = Picker::new(fixed.into_iter().chain(more))?;
    Ok(Places { picker, further: pointers.further.keys().cloned().collect() })
}

/// The reply's values by [`Field`].
pub struct Found<'a> {
    picked: Picked<'a>,
    further: &'a [String],
}

impl<'a> Found<'a> {
    /// A value that is there and not null.
    #[must_use]
    pub fn raw(&self, field: Field) -> Option<&'a RawValue> {
        present(self.picked[field as usize])
    }

    /// Whether a value is there and null.
    #[must_use]
    pub fn is_null(&self, field: Field) -> bool {
        self.picked[field as usize].is_some_and(|raw| raw.get() == "null")
    }

    /// A value as text: a string's content, anything else as it stands in the JSON.
    #[must_use]
    pub fn text(&self, field: Field) -> Option<Cow<'a, str>> {
        self.raw(field).map(text)
    }

    /// What the columns of a product say.
    #[must_use]
    pub fn columns(&self) -> Columns {
        let owned = |field| self.text(field).map(Cow::into_owned);
        let Stated { number, words } = self.price();
        Columns {
            title: owned(Field::Title),
            price: number,
            price_text: words,
            currency: Some("CNY".to_owned()),
            stock: owned(Field::Stock),
            sku_info: self.raw(Field::SkuInfo).map(|raw| raw.get().to_owned()),
            category_id: owned(Field::CategoryId),
            seller_nick: owned(Field::SellerNick),
            rating: owned(Field::Rating),
            reviews: owned(Field::Reviews),
            vendor_status: owned(Field::Status),
            vendor_updated: owned(Field::Updated),
            further: self.further(),
        }
    }

    fn further(&self) -> BTreeMap<String, String> {
        let values = &self.picked[self.picked.len() - self.further.len()..];
        let named = self.further.iter().zip(values);
        named.filter_map(|(name, value)| Some((name.clone(), text(present(*value)?).into_owned()))).collect()
    }

    fn price(&self) -> Stated {
        let prices = &self.picked[Field::Prices as usize..self.picked.len() - self.further.len()];
        if !prices.is_empty() {
            return first_price(prices.iter().copied());
        }
        let of_tier = self.raw(Field::Tiers).map(price_of_lowest_tier).unwrap_or_default();
        if of_tier.number.is_some() {
            return of_tier;
        }
        let of_sku = self.raw(Field::SkuInfo).map(lowest_price).unwrap_or_default();
        if of_sku == Stated::default() { of_tier } else { of_sku }
    }
}

/// A tier of quantity, or a variant: both have a price.
#[derive(Deserialize)]
struct Priced<'a> {
    #[serde(borrow, default, rename = "startQuantity")]
    start_quantity: Option<&'a RawValue>,
    #[serde(borrow, default)]
    price: Option<&'a RawValue>,
}

fn price_of_lowest_tier(tiers: &RawValue) -> Stated {
    let tiers: Vec<Priced<'_>> = json::from_str(tiers.get()).unwrap_or_default();
    let start = |tier: &Priced<'_>| value(&price(tier.start_quantity)).unwrap_or(Decimal::MAX);
    lowest(tiers.iter().map(|tier| (Some(start(tier)), price(tier.price))))
}

fn lowest_price(skus: &RawValue) -> Stated {
    let skus: Vec<Priced<'_>> = json::from_str(skus.get()).unwrap_or_default();
    lowest(skus.iter().map(|sku| price(sku.price)).map(|price| (value(&price), price)))
}

fn value(stated: &Stated) -> Option<Decimal> {
    price::read(stated.number.as_deref()?).map(|price| price.low)
}

/// Of those that are numbers the one of the lowest rank; else the first that says anything.
fn lowest(ranked: impl Iterator<Item = (Option<Decimal>, Stated)>) -> Stated {
    let (numbers, words): (Vec<_>, Vec<_>) = ranked.partition(|(_, price)| price.number.is_some());
    let lowest = numbers.into_iter().min_by_key(|(rank, _)| *rank);
    let words = || words.into_iter().find(|(_, price)| price.words.is_some());
    lowest.or_else(words).map(|(_, price)| price).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn columns(pointers: &Pointers, json: &str) -> Columns {
        places(pointers).unwrap().find(json).unwrap().columns()
    }

    fn price_of(product: &str) -> Option<String> {
        columns(&Pointers::default(), &format!(r#"{{"productInfo":{product}}}"#)).price
    }

    #[test]
    fn the_price_is_that_of_the_smallest_quantity_else_of_the_cheapest_variant() {
        let table = [
            (
                r#"{"saleInfo":{"priceRanges":[{"startQuantity":10,"price":161},{"startQuantity":3,"price":258.50}]}}"#,
                Some("258.50"),
            ),
            (
                r#"{"saleInfo":{"priceRanges":[{"startQuantity":"10","price":"9"},{"startQuantity":"9","price":"10.00"}]}}"#,
                Some("10.00"),
            ),
            (r#"{"saleInfo":{"priceRanges":[{"price":1},{"startQuantity":5,"price":2}]}}"#, Some("2")),
            (
                r#"{"saleInfo":{"priceRanges":[]},"skuInfos":[{"price":10.0},{"price":9.90},{"price":null}]}"#,
                Some("9.90"),
            ),
            (r#"{"saleInfo":{"priceRanges":null},"skuInfos":[{"price":"100"},{"price":"20"}]}"#, Some("20")),
            (r#"{"saleInfo":{"priceRanges":[{"startQuantity":1,"price":1.0E7}]}}"#, Some("10000000")),
            (r#"{"saleInfo":{"priceRanges":[{"startQuantity":1,"price":0}]}}"#, Some("0")),
            (r#"{"saleInfo":{"priceRanges":"?"},"skuInfos":{"price":1}}"#, None),
            (r#"{"skuInfos":[{"price":"1.00-2.00"},{"price":"¥0.50"},{"price":""},{"price":-1}]}"#, Some("0.50")),
            (r#"{"skuInfos":[{"price":{"cents":5}},{"price":true},{"price":"ask us"}]}"#, None),
            (r#"{"skuInfos":[]}"#, None),
        ];
        for (product, expected) in table {
            assert_eq!(price_of(product).as_deref(), expected, "{product}");
        }
    }

    #[test]
    fn prices_as_people_write_them_are_numbers_and_equal_meanings_are_no_change() {
        let columns = |price: &str| {
            columns(&Pointers::default(), &format!(r#"{{"productInfo":{{"skuInfos":[{{"price":{price}}}]}}}}"#))
        };
        let price = |price: &str| columns(price).price;
        assert_eq!(price(r#""12.00-15.00""#).as_deref(), Some("12.00"));
        assert_eq!(price(r#""￥1,299.00""#).as_deref(), Some("1299.00"));
        assert_eq!(price("-1"), None);
        let words = |price: &str| columns(price).price_text;
        assert_eq!(words(r#""12.00-15.00""#).as_deref(), Some("12.00-15.00"));
        assert_eq!((price(r#""面议""#), words(r#""面议""#).as_deref()), (None, Some("面议")));
        assert_eq!(words("12.00"), None);
        let print = |price: &str| columns(price).fingerprint(crate::message::Status::Found);
        assert_eq!(print(r#""￥1,299.00""#), print("1299"));
        assert_eq!(print(r#""12.00-15.00""#), print(r#""12 ~ 15元""#));
        assert_ne!(print(r#""12.00-15.00""#), print(r#""12.00-16.00""#));
    }

    #[test]
    fn further_columns_are_kept_by_name_as_texts_and_what_is_not_there_is_left_out() {
        let further = [("brand", "/b"), ("sizes", "/s"), ("weight", "/w"), ("gone", "/g"), ("none", "/n")];
        let mut further: BTreeMap<_, _> = further.map(|(name, pointer)| (name.to_owned(), pointer.to_owned())).into();
        for price in [vec![], vec!["/p".to_owned()]] {
            let pointers = Pointers { item: "/id".to_owned(), price, further, ..Pointers::default() };
            let found = columns(&pointers, r#"{"id":1,"b":"it's \"a\"","s":[1, 2],"w":1.50,"n":null,"p":"3"}"#);
            let expected = [("brand", "it's \"a\""), ("sizes", "[1, 2]"), ("weight", "1.50")];
            assert!(found.further.iter().map(|(name, value)| (&**name, &**value)).eq(expected), "{:?}", found.further);
            assert_eq!(found.price.as_deref(), pointers.price.first().map(|_| "3"));
            further = pointers.further;
        }
    }

    #[test]
    fn of_doubled_members_the_last_counts() {
        let product = r#"{"saleInfo":{"priceRanges":[{"startQuantity":1,"price":1,"price":2}]}}"#;
        assert_eq!(price_of(product).as_deref(), Some("2"));
    }

    #[test]
    fn pointers_of_ones_own_are_followed_and_the_first_price_that_is_one_wins() {
        let pointers = Pointers {
            item: "/id".to_owned(),
            title: "/name".to_owned(),
            price: vec!["/sale".to_owned(), "/list/0".to_owned()],
            seller_nick: Some("/shop".to_owned()),
            ..Pointers::default()
        };
        let found = columns(&pointers, r#"{"id":1,"name":"a \"b\"","sale":"ask us","list":[12.30],"shop":"\u73bb"}"#);
        assert_eq!(found.title.as_deref(), Some("a \"b\""));
        assert_eq!(found.price.as_deref(), Some("12.30"));
        assert_eq!(found.seller_nick.as_deref(), Some("玻"));
    }

    #[test]
    fn a_pointer_that_is_none_is_refused() {
        let pointers = Pointers { stock: "productInfo.stock".to_owned(), ..Pointers::default() };
        assert_eq!(places(&pointers).unwrap_err(), InvalidPointer("productInfo.stock".to_owned()));
    }
}
