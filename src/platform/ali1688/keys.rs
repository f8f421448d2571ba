//! `[[source]]` with `kind = "ali1688"`: its own keys.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

use super::{Ali1688, Dialect, Overrides, Settings};
use crate::platform::{
    Vendor,
    problem::{Problem, check_batch, check_url, check_word, is_word, require},
    protocol::{self, Params, Protocol, or},
};

/// The keys of 1688's open platform.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "weir: [[source]] with kind = \"ali1688\"")]
pub struct Keys {
    /// Which form of the API is called: the gateway's own (`aop`), or one of those on other hosts (`router`, `item-get`).
    #[serde(default, deserialize_with = "dialect")]
    dialect: Dialect,
    /// Scheme, host and perhaps a path of the gateway; of the other forms the endpoint, path and all.
    #[serde(default)]
    url: String,
    /// The page where a user authorises an app; the gateway alone has one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    authorise_url: String,
    /// Name of the API, at the gateway with its namespace.
    #[serde(default)]
    api: String,
    /// The API's version.
    #[serde(default)]
    version: String,
    /// The name of the parameter that carries the item's id.
    #[serde(default)]
    item_param: String,
    /// The most ids that one call carries: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    batch_max: Option<usize>,
    /// Parameters of every call; those of a request cannot change them.
    #[serde(default)]
    params: Option<Params>,
    /// Where the reply has its columns.
    #[serde(default)]
    columns: Overrides,
}

fn dialect<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Dialect, D::Error> {
    protocol::word(deserializer, "dialect", "aop, router or item-get")
}

impl protocol::Keys for Keys {
    const KIND: &'static str = "ali1688";
    const NO_MATTER: &'static [&'static str] = &["authorise_url", "batch_max"];

    fn filled(self) -> Self {
        let [url, authorise_url, api, version, item_param, name, value] = match self.dialect {
            Dialect::Aop => [
                "https://gw.open.1688.com",
                "https://auth.1688.com/oauth/authorize",
                "com.alibaba.product/alibaba.product.get",
                "1",
                "productID",
                "webSite",
                "1688",
            ],
            Dialect::Router => [
                "https://api.1688.com/router/json",
                "",
                "alibaba.product.get",
                "1.0",
                "product_id",
                "fields",
                "id,title,price,quantity,detail",
            ],
            Dialect::ItemGet => [
                "https://gw.api.1688.com/openapi/param2/1/alibaba.item.get/2.0",
                "",
                "alibaba.item.get",
                "2.0",
                "item_id",
                "fields",
                "item_id,title,price,sku_info,category_id,seller_nick",
            ],
        };
        Self {
            url: or(self.url, url),
            authorise_url: or(self.authorise_url, authorise_url),
            api: or(self.api, api),
            version: or(self.version, version),
            item_param: or(self.item_param, item_param),
            params: self.params.or_else(|| Some(Params::from([(name.to_owned(), value.to_owned())]))),
            columns: self.columns.over(self.dialect.pointers()).into(),
            ..self
        }
    }
}

impl Protocol for Keys {
    fn url(&self) -> &str {
        &self.url
    }

    fn check(&self) -> Result<(), Problem> {
        check_url("url", &self.url)?;
        match self.dialect {
            Dialect::Aop => {
                let words: Vec<_> = self.api.split('/').collect();
                let is_api = words.len() == 2 && words.iter().all(|word| is_word(word));
                require("api", &self.api, is_api, "namespace/name, like com.alibaba.product/alibaba.product.get")?;
                check_url("authorise_url", &self.authorise_url)?;
            }
            Dialect::Router | Dialect::ItemGet => {
                if !self.authorise_url.is_empty() {
                    return Err(Problem::stranger("authorise_url"));
                }
                require("api", &self.api, is_word(&self.api), "the API's name, like alibaba.item.get")?;
            }
        }
        for name in self.columns.further.iter().flatten().map(|(name, _)| name) {
            let is_name = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
            let is_right = is_name && (1..=64).contains(&name.len());
            require("columns.further", name, is_right, "names of 1 to 64 small letters, digits and _")?;
        }
        check_word("version", &self.version)?;
        check_word("item_param", &self.item_param)?;
        check_batch(self.batch_max, 1)
    }

    fn vendor(&self) -> Result<Arc<dyn Vendor>, Problem> {
        self.check()?;
        Ok(Arc::new(Ali1688::new(Settings {
            dialect: self.dialect,
            url: self.url.clone(),
            authorise_url: self.authorise_url.clone(),
            api: self.api.clone(),
            version: self.version.clone(),
            item_param: self.item_param.clone(),
            params: self.params.clone().unwrap_or_default(),
            columns: self.columns.clone().over(self.dialect.pointers()),
        })?))
    }
}
