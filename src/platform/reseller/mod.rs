//! Resellers of Taobao's data: `item_get` by a key in the query, without a signature.
//!
//! Two forms. [`Dialect::Pool`] is the one of the article on a high-concurrency Taobao API: several keys, up to 40 ids a
//! call, the price after coupons. [`Dialect::OneBound`] is the nearest one that can be found in public, one id a call:
//! <https://open.onebound.cn/help/api/onebound.taobao.item_get.html>.

mod errors;
mod keys;
mod reply;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use secrecy::ExposeSecret;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::{
    Account, Exchange, HttpReply, Reply, Vendor, params,
    taobao::{
        item::{self, PriceOf},
        item_ids,
    },
};
use crate::{
    message::{Columns, Request},
    runtime::clock::Timestamp,
};

pub use keys::Keys;

/// The protocol's own parameters, which no request may set.
const PROTOCOL: [&str; 6] = ["key", "secret", "num_iid", "num_iids", "api_name", "result_type"];

/// Which reseller's form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Dialect {
    /// The article's: `key` alone, which is the account's secret.
    #[default]
    #[serde(rename = "pool")]
    Pool,
    /// `OneBound`'s: `key`, the account's name there, and `secret`.
    #[serde(rename = "onebound")]
    OneBound,
}

impl Dialect {
    /// The most ids that a call may have. The article assumes its 40.
    #[must_use]
    pub const fn batch_max(self) -> usize {
        match self {
            Self::Pool => 40,
            Self::OneBound => 1,
        }
    }

    /// The parameter that carries the ids.
    #[must_use]
    pub const fn item_param(self) -> &'static str {
        match self {
            Self::Pool => "num_iids",
            Self::OneBound => "num_iid",
        }
    }

    const fn price(self) -> PriceOf {
        match self {
            Self::Pool => PriceOf::Final,
            Self::OneBound => PriceOf::Price,
        }
    }
}

/// How the reseller is called.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The endpoint, path and all.
    pub url: String,
    /// Its form.
    pub dialect: Dialect,
    /// The name of the parameter that carries the ids.
    pub item_param: String,
    /// Parameters of every call.
    pub params: BTreeMap<String, String>,
    /// The most ids of a call; at most [`Dialect::batch_max`].
    pub batch_max: usize,
}

/// The vendor.
#[derive(Clone, Debug)]
pub struct Reseller {
    settings: Settings,
}

impl Reseller {
    /// A reseller that is called like this.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let batch_max = settings.batch_max.clamp(1, settings.dialect.batch_max());
        Self { settings: Settings { batch_max, ..settings } }
    }
}

impl Vendor for Reseller {
    fn batch_max(&self) -> usize {
        self.settings.batch_max
    }

    fn prepare(&self, account: &Account, requests: &[&Request], _: Timestamp) -> Exchange {
        let Settings { url, dialect, item_param, params, .. } = &self.settings;
        let secret = account.app_secret.expose_secret().to_owned();
        let mut form = match dialect {
            Dialect::Pool => vec![("key".to_owned(), secret)],
            Dialect::OneBound => vec![("key".to_owned(), account.app_key.clone()), ("secret".to_owned(), secret)],
        };
        form.push((item_param.clone(), item_ids(requests)));
        let first = requests.first().copied();
        params::add(&mut form, (item_param, params), first, |name| params::is_one_of(name, &PROTOCOL));
        Exchange::get(url.clone(), form)
    }

    fn interpret(&self, requests: &[&Request], reply: &HttpReply) -> Reply {
        reply::read(self.settings.dialect, requests, reply)
    }

    fn columns(&self, raw: &RawValue) -> Option<Columns> {
        item::columns(raw, self.settings.dialect.price())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        message::{AccountAlias, ItemId},
        platform::Method,
    };

    fn prepare(dialect: Dialect, ids: &[&str], params: &[(&str, &str)]) -> Exchange {
        let vendor = Reseller::new(Settings {
            url: "https://o0b.cn/ibrad/taobao/item_get/".to_owned(),
            dialect,
            item_param: dialect.item_param().to_owned(),
            params: BTreeMap::from([("is_promotion".to_owned(), "1".to_owned())]),
            batch_max: 100,
        });
        assert_eq!(vendor.batch_max(), dialect.batch_max());
        let account = Account {
            app_key: "t_public".to_owned(),
            app_secret: "hunter22".into(),
            ..Account::named(AccountAlias::new("one").unwrap())
        };
        let request = |id: &&str| {
            let mut request = Request::new(ItemId::new(id).unwrap());
            request.params = params.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            request
        };
        let requests: Vec<Request> = ids.iter().map(request).collect();
        vendor.prepare(&account, &requests.iter().collect::<Vec<_>>(), Timestamp::from_millis(0))
    }

    fn pairs(exchange: &Exchange) -> Vec<(&str, &str)> {
        exchange.params().collect()
    }

    #[test]
    fn the_key_is_in_the_query_and_not_in_the_url() {
        let exchange = prepare(Dialect::Pool, &["1", "2", "2"], &[]);
        assert_eq!((exchange.method, exchange.url.as_str()), (Method::Get, "https://o0b.cn/ibrad/taobao/item_get/"));
        assert_eq!(pairs(&exchange), [("key", "hunter22"), ("num_iids", "1,2"), ("is_promotion", "1")]);
        let exchange = prepare(Dialect::OneBound, &["1"], &[]);
        let expected = [("key", "t_public"), ("secret", "hunter22"), ("num_iid", "1"), ("is_promotion", "1")];
        assert_eq!(pairs(&exchange), expected);
    }

    #[test]
    fn a_request_may_add_parameters_but_not_change_whose_call_it_is() {
        let exchange = prepare(Dialect::Pool, &["1"], &[("area", "330100"), ("KEY", "x"), ("is_promotion", "0")]);
        let expected = [("key", "hunter22"), ("num_iids", "1"), ("is_promotion", "1"), ("area", "330100")];
        assert_eq!(pairs(&exchange), expected);
    }
}
