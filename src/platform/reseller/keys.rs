//! `[[source]]` with `kind = "taobao_reseller"`: its own keys.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

use super::{Dialect, Reseller, Settings};
use crate::platform::{
    Vendor,
    problem::{Problem, check_batch, check_url, check_word},
    protocol::{self, Params, Protocol, or},
};

/// The keys of a reseller of Taobao's data.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "weir: [[source]] with kind = \"taobao_reseller\"")]
pub struct Keys {
    /// Whose form: up to 40 ids a call (`pool`), or one (`onebound`).
    #[serde(default, deserialize_with = "dialect")]
    dialect: Dialect,
    /// The endpoint, path and all.
    #[serde(default)]
    url: String,
    /// The name of the parameter that carries the ids.
    #[serde(default)]
    item_param: String,
    /// The most ids that one call carries; what the form takes if it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    batch_max: Option<usize>,
    /// Parameters of every call; those of a request cannot change them.
    #[serde(default)]
    params: Option<Params>,
}

fn dialect<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Dialect, D::Error> {
    protocol::word(deserializer, "dialect", "pool or onebound")
}

impl protocol::Keys for Keys {
    const KIND: &'static str = "taobao_reseller";
    const NO_MATTER: &'static [&'static str] = &["batch_max"];

    fn filled(self) -> Self {
        let (url, params): (_, &[(&str, &str)]) = match self.dialect {
            Dialect::Pool => ("https://o0b.cn/ibrad/taobao/item_get/", &[("is_promotion", "1")]),
            // What it has in its cache may be old, and it is on by default.
            Dialect::OneBound => {
                ("https://api-gw.onebound.cn/taobao/item_get/", &[("is_promotion", "1"), ("cache", "no")])
            }
        };
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let most = self.dialect.batch_max();
        Self {
            url: or(self.url, url),
            item_param: or(self.item_param, self.dialect.item_param()),
            params: self.params.or_else(|| Some(params.iter().map(owned).collect())),
            batch_max: self.batch_max.or((most > 1).then_some(most)),
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
        check_word("item_param", &self.item_param)?;
        check_batch(self.batch_max, self.dialect.batch_max())
    }

    fn vendor(&self) -> Result<Arc<dyn Vendor>, Problem> {
        self.check()?;
        Ok(Arc::new(Reseller::new(Settings {
            url: self.url.clone(),
            dialect: self.dialect,
            item_param: self.item_param.clone(),
            params: self.params.clone().unwrap_or_default(),
            batch_max: self.batch_max.unwrap_or(1),
        })))
    }

    /// The pool's keys have no names.
    fn needs_app_key(&self) -> bool {
        self.dialect != Dialect::Pool
    }
}
