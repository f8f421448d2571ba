//! Two forms of calls that articles show on 1688's hosts, with TOP's envelope: not the gateway's own, which is the rest
//! of this folder. Neither host could be confirmed; who has such a service, or a proxy that speaks so, can use it.
//!
//! [`Dialect::Router`] is of "处理限流、缓存与数据一致性", which leaves its signature out and so has TOP's MD5 here;
//! [`Dialect::ItemGet`] of the article on a distributed 1688 pipeline. Both send the machine's local time, which is wrong
//! wherever that is not China's: here it is China's everywhere. And both sign once and repeat what they signed: here each
//! attempt is signed anew.

use std::collections::BTreeMap;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use secrecy::ExposeSecret;
use sha1::Sha1;

use super::{Dialect, columns::Pointers};
use crate::{
    message::Request,
    platform::{
        Account, Affected, Exchange, HttpReply, RefusalKind, params,
        taobao::{
            self,
            errors::{ErrorResponse, Said},
            sign::{SIGNATURE, SignMethod},
        },
    },
    runtime::clock::Timestamp,
};

/// The protocol's own parameters, which no request may set.
const PROTOCOL: [&str; 7] = ["method", "app_key", "access_token", "timestamp", "format", "v", SIGNATURE];

/// What all calls of a source have in common.
#[derive(Clone, Debug)]
pub struct Template {
    /// The endpoint, path and all.
    pub url: String,
    /// Which form; not [`Dialect::Aop`].
    pub dialect: Dialect,
    /// The API's name: `alibaba.item.get`.
    pub method: String,
    /// The API's version.
    pub version: String,
    /// The name of the parameter that carries the item's id.
    pub item_param: String,
    /// Parameters of every call.
    pub params: BTreeMap<String, String>,
}

impl Template {
    /// The signed call for one request: a query, as the articles send it.
    pub fn fill(&self, account: &Account, request: &Request, now: Timestamp) -> Exchange {
        let mut form = Vec::with_capacity(8 + self.params.len() + request.params.len());
        let head = [
            ("method", self.method.as_str()),
            ("app_key", &account.app_key),
            ("timestamp", &taobao::timestamp(now)),
            ("format", "json"),
            ("v", &self.version),
            (&self.item_param, request.item.as_str()),
        ];
        form.extend(head.map(|(name, value)| (name.to_owned(), value.to_owned())));
        let token = account.access_token.as_ref().filter(|_| self.dialect == Dialect::Router);
        form.extend(token.map(|token| ("access_token".to_owned(), token.expose_secret().to_owned())));
        let is_protocols = |name: &str| params::is_one_of(name, &PROTOCOL);
        params::add(&mut form, (&self.item_param, &self.params), Some(request), is_protocols);
        let signature = signature(self.dialect, &form, account.app_secret.expose_secret());
        form.push((SIGNATURE.to_owned(), signature));
        Exchange::get(self.url.clone(), form)
    }
}

/// `sign` of a call.
///
/// [`Dialect::ItemGet`]: Base64 of HMAC-SHA1 over the parameters, sorted by key, *and the secret behind them*; the path is
/// not signed. [`Dialect::Router`]: [`taobao::sign`] with MD5.
#[must_use]
pub fn signature<K: AsRef<str>, V: AsRef<str>>(dialect: Dialect, params: &[(K, V)], secret: &str) -> String {
    if dialect == Dialect::Router {
        return taobao::sign::signature(SignMethod::Md5, params, secret);
    }
    let signed = params.iter().map(|(key, value)| (key.as_ref(), value.as_ref()));
    let mut signed: Vec<(&str, &str)> = signed.filter(|(key, _)| *key != SIGNATURE).collect();
    signed.sort_unstable();
    // HMAC takes a key of any length, so there is always one.
    let Ok(mut mac) = Hmac::<Sha1>::new_from_slice(secret.as_bytes()) else { return String::new() };
    for (key, value) in signed {
        mac.update(key.as_bytes());
        mac.update(value.as_bytes());
    }
    mac.update(secret.as_bytes());
    BASE64_STANDARD.encode(mac.finalize().into_bytes())
}

/// What the status of a reply means, whatever its body says.
///
/// An article counts 403 among what is to be repeated: it pauses the account, and the item goes to another one.
pub fn of_status(reply: &HttpReply) -> Option<RefusalKind> {
    match reply.status {
        403 | 429 => Some(RefusalKind::Throttled { scope: Affected::Account, wait: reply.retry_after() }),
        500.. => Some(RefusalKind::Outage),
        _ => None,
    }
}

/// What an `error_response` means: 429, and 100001 by the assumption of one article, are throttles; the rest is TOP's.
pub fn of_error(error: &ErrorResponse, reply: &HttpReply) -> Said {
    match error.code() {
        "403" | "429" | "100001" => {
            Said::Refused(RefusalKind::Throttled { scope: Affected::Account, wait: reply.retry_after() })
        }
        "500" | "502" | "503" | "504" => Said::Refused(RefusalKind::Outage),
        _ => error.meaning(reply),
    }
}

/// Where [`Dialect::ItemGet`] has its columns, as far as the article shows.
pub fn item_get() -> Pointers {
    Pointers {
        item: "/item/item_id".to_owned(),
        title: "/item/title".to_owned(),
        price: vec!["/item/price".to_owned()],
        stock: "/item/quantity".to_owned(),
        sku_info: "/item/sku_info".to_owned(),
        category_id: "/item/category_id".to_owned(),
        seller_nick: Some("/item/seller_nick".to_owned()),
        status: "/item/status".to_owned(),
        updated: "/item/updated".to_owned(),
        ..Pointers::default()
    }
}

/// Where [`Dialect::Router`] has them: the article names the fields, and not where they stand.
pub fn router() -> Pointers {
    Pointers {
        item: "/product/id".to_owned(),
        title: "/product/title".to_owned(),
        price: vec!["/product/price".to_owned()],
        stock: "/product/quantity".to_owned(),
        sku_info: "/product/sku_info".to_owned(),
        category_id: "/product/category_id".to_owned(),
        status: "/product/status".to_owned(),
        updated: "/product/updated".to_owned(),
        ..Pointers::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        message::{AccountAlias, ItemId},
        platform::Method,
    };

    fn account() -> Account {
        Account {
            app_key: "1000000".to_owned(),
            app_secret: "test123".into(),
            access_token: Some("at-0001".into()),
            ..Account::named(AccountAlias::new("one").unwrap())
        }
    }

    fn template(dialect: Dialect) -> Template {
        let fields = "item_id,title,price,sku_info,category_id,seller_nick".to_owned();
        Template {
            url: "https://gw.api.1688.com/openapi/param2/1/alibaba.item.get/2.0".to_owned(),
            dialect,
            method: "alibaba.item.get".to_owned(),
            version: "2.0".to_owned(),
            item_param: "item_id".to_owned(),
            params: BTreeMap::from([("fields".to_owned(), fields)]),
        }
    }

    fn fill(dialect: Dialect, params: &[(&str, &str)]) -> Exchange {
        let mut request = Request::new(ItemId::new("584051070147").unwrap());
        request.params = params.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        // 2024-01-01 12:00:00 in China.
        template(dialect).fill(&account(), &request, Timestamp::from_millis(1_704_081_600_000))
    }

    fn value<'e>(exchange: &'e Exchange, name: &str) -> Vec<&'e str> {
        exchange.params().filter(|(found, _)| *found == name).map(|(_, value)| value).collect()
    }

    #[test]
    fn a_call_for_an_item_is_vector_s1_in_a_query() {
        let exchange = fill(Dialect::ItemGet, &[]);
        assert_eq!(exchange.method, Method::Get);
        assert!(exchange.url.ends_with("/alibaba.item.get/2.0"), "{}", exchange.url);
        assert_eq!(value(&exchange, "sign"), ["15G+wxpi5BfkjFebQAooV9mwkFA="]);
        assert!(value(&exchange, "access_token").is_empty(), "this one has none");
    }

    #[test]
    fn the_router_has_a_token_and_the_signature_that_its_article_leaves_out() {
        let exchange = fill(Dialect::Router, &[]);
        assert_eq!(value(&exchange, "access_token"), ["at-0001"]);
        // MD5 of the secret, the sorted parameters and the secret, computed apart from this code.
        assert_eq!(value(&exchange, "sign"), ["174AC5B7F50BE0BEF765A61468F46D22"]);
    }

    #[test]
    fn a_request_may_add_parameters_but_not_change_whose_call_it_is() {
        let exchange = fill(Dialect::ItemGet, &[("area", "hz"), ("App_Key", "2"), ("fields", "x"), ("item_id", "9")]);
        assert_eq!((value(&exchange, "area"), value(&exchange, "item_id")), (vec!["hz"], vec!["584051070147"]));
        assert!(value(&exchange, "App_Key").is_empty());
        assert_eq!(value(&exchange, "fields").len(), 1);
    }
}
