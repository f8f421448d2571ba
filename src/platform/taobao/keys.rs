//! `[[source]]` with `kind = "taobao"`: its own keys.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Method, Settings, Taobao, sign::SignMethod};
use crate::platform::{
    Vendor,
    problem::{Problem, check_batch, check_url, check_word},
    protocol::{self, Params, Protocol, or},
};

/// The keys of Taobao's open platform (TOP).
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "weir: [[source]] with kind = \"taobao\"")]
pub struct Keys {
    /// The endpoint, path and all.
    #[serde(default)]
    url: String,
    /// Name of the API.
    #[serde(default)]
    api: String,
    /// How calls are signed.
    #[serde(default)]
    sign_method: SignMethod,
    /// The name of the parameter that carries the ids.
    #[serde(default)]
    item_param: String,
    /// The most ids that one call carries; what the API takes if it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    batch_max: Option<usize>,
    /// Parameters of every call; those of a request cannot change them.
    #[serde(default)]
    params: Option<Params>,
}

const METHODS: &str = "taobao.item.seller.get, taobao.items.seller.list.get, taobao.tbk.item.info.get or \
                       taobao.miniapp.items.get";

impl Keys {
    fn method(&self) -> Result<Method, Problem> {
        Method::of_name(&self.api).ok_or_else(|| {
            let (key, found) = ("api".to_owned(), format!("{:?}", self.api));
            Problem::Key { key, found, allowed: METHODS }
        })
    }
}

impl protocol::Keys for Keys {
    const KIND: &'static str = "taobao";
    const NO_MATTER: &'static [&'static str] = &["sign_method", "batch_max"];

    fn filled(self) -> Self {
        let known = Method::of_name(&self.api);
        let method = known.unwrap_or(Method::ItemsSellerListGet);
        let of_method = || method.fields().into_iter().map(|fields| ("fields".to_owned(), fields.to_owned())).collect();
        let most = method.batch_max();
        Self {
            url: or(self.url, "https://gw.api.taobao.com/router/rest"),
            api: or(self.api, method.name()),
            item_param: or(self.item_param, method.item_param()),
            params: self.params.or_else(|| Some(of_method())),
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
        let method = self.method()?;
        check_word("item_param", &self.item_param)?;
        check_batch(self.batch_max, method.batch_max())
    }

    fn vendor(&self) -> Result<Arc<dyn Vendor>, Problem> {
        self.check()?;
        Ok(Arc::new(Taobao::new(Settings {
            url: self.url.clone(),
            method: self.method()?,
            sign_method: self.sign_method,
            item_param: self.item_param.clone(),
            params: self.params.clone().unwrap_or_default(),
            batch_max: self.batch_max.unwrap_or(1),
        })))
    }
}
