//! An item as Taobao's APIs and their resellers show it, and which row of a reply answers which request.

use std::{borrow::Cow, collections::HashMap};

use serde::Deserialize;
use serde_json::value::RawValue;

use super::is_item_id;
use crate::{
    message::{Columns, Request, Status, json, price::Stated},
    platform::{
        Answer, Refusal,
        reading::{bug, malformed, price, text},
    },
};

/// Which of a row's prices is the item's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PriceOf {
    /// `price`
    Price,
    /// `zk_final_price`: after discounts (`reserve_price` is the list price).
    ZkFinal,
    /// `final_price`: after coupons. 0 is a price.
    Final,
}

/// The members that are read, each as it stands in the JSON; null counts as none.
#[derive(Deserialize)]
pub struct Row<'a> {
    #[serde(borrow, default)]
    num_iid: Option<&'a RawValue>,
    #[serde(borrow, default)]
    title: Option<&'a RawValue>,
    #[serde(borrow, default)]
    nick: Option<&'a RawValue>,
    #[serde(borrow, default)]
    price: Option<&'a RawValue>,
    #[serde(borrow, default)]
    zk_final_price: Option<&'a RawValue>,
    #[serde(borrow, default)]
    final_price: Option<&'a RawValue>,
    #[serde(borrow, default)]
    num: Option<&'a RawValue>,
    #[serde(borrow, default)]
    cid: Option<&'a RawValue>,
    #[serde(borrow, default)]
    skus: Option<&'a RawValue>,
    #[serde(borrow, default)]
    approve_status: Option<&'a RawValue>,
    #[serde(borrow, default)]
    modified: Option<&'a RawValue>,
}

/// `{"sku":[…]}`
#[derive(Deserialize)]
struct Skus<'a> {
    #[serde(borrow)]
    sku: &'a RawValue,
}

impl<'a> Row<'a> {
    /// Reads a row; nothing if it is no object.
    #[must_use]
    pub fn of(raw: &'a RawValue) -> Option<Self> {
        json::from_str(raw.get()).ok()
    }

    /// Its id as text: it may come as a number or as a string.
    #[must_use]
    pub fn id(&self) -> Option<Cow<'a, str>> {
        self.num_iid.map(text).filter(|id| !id.trim().is_empty())
    }

    fn columns(&self, of: PriceOf) -> Columns {
        let owned = |raw: Option<&RawValue>| raw.map(|raw| text(raw).into_owned()).filter(|text| !text.is_empty());
        let found = match of {
            PriceOf::Price => self.price,
            PriceOf::ZkFinal => self.zk_final_price,
            PriceOf::Final => self.final_price,
        };
        let Stated { number, words } = price(found);
        Columns {
            title: owned(self.title),
            price: number,
            price_text: words,
            currency: Some("CNY".to_owned()),
            stock: owned(self.num),
            sku_info: self.skus.map(skus).map(|skus| skus.get().to_owned()),
            category_id: owned(self.cid),
            seller_nick: owned(self.nick),
            // None of these APIs has either: what affiliates see as `volume` are sales.
            rating: None,
            reviews: None,
            vendor_status: owned(self.approve_status),
            vendor_updated: owned(self.modified),
            ..Columns::default()
        }
    }
}

/// The list inside its wrapper.
fn skus(raw: &RawValue) -> &RawValue {
    json::from_str::<Skus<'_>>(raw.get()).map_or(raw, |inside| inside.sku)
}

/// The columns of a row that was kept; nothing if it has no id.
#[must_use]
pub fn columns(raw: &RawValue, of: PriceOf) -> Option<Columns> {
    let row = Row::of(raw)?;
    row.id().is_some().then(|| row.columns(of))
}

fn answer(raw: &RawValue, row: &Row<'_>, of: PriceOf) -> Answer {
    let columns = row.columns(of);
    let on_sale = columns.vendor_status.as_deref().is_none_or(|status| status.eq_ignore_ascii_case("onsale"));
    Answer { status: if on_sale { Status::Found } else { Status::OffShelf }, columns, raw: Some(raw.to_owned()) }
}

/// What the rows of a good reply mean for each request, in the requests' order.
///
/// An id without a row is absent. Not so if there is a row that nobody asked for: then the reply may be somebody
/// else's, or its rows mixed up, and what is missing from it says nothing.
#[must_use]
pub fn assign(requests: &[&Request], rows: &[&RawValue], of: PriceOf) -> Vec<Result<Answer, Refusal>> {
    let mut by_id = HashMap::with_capacity(rows.len());
    let mut stranger = None;
    for raw in rows {
        let row = Row::of(raw);
        match row.as_ref().and_then(Row::id) {
            Some(id) if requests.iter().any(|request| request.item.as_str() == id.trim()) => {
                if let Some(row) = row {
                    by_id.entry(id.trim().to_owned()).or_insert((*raw, row));
                }
            }
            Some(id) => stranger = Some(format!("a row about item {}, which nobody asked for", id.trim())),
            None => stranger = Some("a row without an id".to_owned()),
        }
    }
    let of_request = |request: &&Request| match by_id.get(request.item.as_str()) {
        _ if !is_item_id(request.item.as_str()) => {
            Err(bug("item", "no item of Taobao has such an id: letters, digits, - and _ alone"))
        }
        Some((raw, row)) => Ok(answer(raw, row, of)),
        None => match &stranger {
            Some(stranger) => Err(malformed("item", &format!("the reply has {stranger}, and none about this one"))),
            None => Ok(Answer { status: Status::Absent, columns: Columns::default(), raw: None }),
        },
    };
    requests.iter().map(of_request).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{message::ItemId, platform::RefusalKind};

    fn raw(json: &str) -> Box<RawValue> {
        RawValue::from_string(json.to_owned()).unwrap()
    }

    fn assigned(ids: &[&str], rows: &[&str]) -> Vec<Result<Answer, Refusal>> {
        let requests: Vec<Request> = ids.iter().map(|id| Request::new(ItemId::new(id).unwrap())).collect();
        let rows: Vec<_> = rows.iter().map(|row| raw(row)).collect();
        let rows: Vec<&RawValue> = rows.iter().map(AsRef::as_ref).collect();
        assign(&requests.iter().collect::<Vec<_>>(), &rows, PriceOf::Final)
    }

    #[test]
    fn each_request_gets_its_row_in_whatever_order_they_come() {
        let answers = assigned(
            &["1", "58218860983545941", "1"],
            &[r#"{"num_iid":"58218860983545941","final_price":0}"#, r#"{"num_iid":1,"final_price":"10.00"}"#],
        );
        let prices: Vec<_> = answers.iter().map(|answer| answer.as_ref().unwrap().columns.price.as_deref()).collect();
        assert_eq!(prices, [Some("10.00"), Some("0"), Some("10.00")]);
    }

    #[test]
    fn an_id_without_a_row_is_absent_unless_there_is_a_row_that_nobody_asked_for() {
        let answers = assigned(&["1", "2"], &[r#"{"num_iid":2}"#]);
        assert_eq!(answers[0].as_ref().unwrap().status, Status::Absent);
        assert!(answers[0].as_ref().unwrap().raw.is_none());
        for stranger in [r#"{"num_iid":3}"#, r#"{"title":"?"}"#, "[]", r#"{"num_iid":null}"#] {
            let answers = assigned(&["1", "2"], &[r#"{"num_iid":2}"#, stranger]);
            assert_eq!(answers[0].as_ref().unwrap_err().kind, RefusalKind::Malformed, "{stranger}");
            assert_eq!(answers[1].as_ref().unwrap().status, Status::Found, "{stranger}");
        }
    }

    #[test]
    fn an_id_that_would_be_several_is_our_mistake_and_nobody_elses() {
        let answers = assigned(&["1,2", "2"], &[r#"{"num_iid":2}"#]);
        assert_eq!(answers[0].as_ref().unwrap_err().kind, RefusalKind::Bug);
        assert_eq!(answers[1].as_ref().unwrap().status, Status::Found);
    }

    #[test]
    fn a_price_is_the_one_that_is_meant_and_nothing_else() {
        let row = raw(r#"{"num_iid":1,"price":"12.00","zk_final_price":9.90,"final_price":null}"#);
        let price = |of| columns(&row, of).unwrap().price;
        assert_eq!(price(PriceOf::Price).as_deref(), Some("12.00"));
        assert_eq!(price(PriceOf::ZkFinal).as_deref(), Some("9.90"));
        assert_eq!(price(PriceOf::Final), None);
    }

    #[test]
    fn of_doubled_members_the_last_counts() {
        let row = r#"{"num_iid":9,"num_iid":1,"title":"a","title":"b","final_price":1,"final_price":"2.00","skus":1,
            "skus":{"sku":[],"sku":[ {"price":1,"price":2} ]}}"#;
        let answers = assigned(&["1"], &[row]);
        let answer = answers[0].as_ref().unwrap();
        assert_eq!(answer.columns.title.as_deref(), Some("b"));
        assert_eq!(answer.columns.price.as_deref(), Some("2.00"));
        assert_eq!(answer.columns.sku_info.as_deref(), Some(r#"[ {"price":1,"price":2} ]"#));
        assert_eq!(answer.raw.as_ref().unwrap().get(), row, "the vendor's JSON stays as it came");
    }

    #[test]
    fn variants_are_kept_verbatim_without_their_wrapper() {
        let row = raw(r#"{"num_iid":1,"skus":{"sku":[{"sku_id":4987284715215, "price":"10.00"}]}}"#);
        let sku_info = columns(&row, PriceOf::Price).unwrap().sku_info;
        assert_eq!(sku_info.as_deref(), Some(r#"[{"sku_id":4987284715215, "price":"10.00"}]"#));
    }
}
