//! 1688's open platform (AOP gateway): one item a call, signed, with a form as body.
//!
//! Facts and their sources: <https://open.1688.com/api/sysSignature.htm?ns=cn.alibaba.open> for the signature;
//! the error codes come from the gateway's public clients. The platform publishes neither quotas nor the
//! length of a ban, so limits are configuration and a throttle names no time.
//!
//! Beside the gateway's own form there are two that articles show, see [`Dialect`].

pub mod article;
mod columns;
mod errors;
mod keys;
mod reply;
mod request;
pub mod sign;
pub mod token;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::{Account, Exchange, HttpReply, Refusal, RefusalKind, Reply, Tokens, Vendor, pick::InvalidPointer};
use crate::{
    message::{Columns, Request},
    runtime::clock::Timestamp,
};

pub use columns::{Overrides, Pointers};
pub use keys::Keys;

/// In which form the API is called.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Dialect {
    /// The gateway's own.
    #[default]
    #[serde(rename = "aop")]
    Aop,
    /// `/router/json`, as one article has it: see [`article`].
    #[serde(rename = "router")]
    Router,
    /// `alibaba.item.get` as another one has it: see [`article`].
    #[serde(rename = "item-get")]
    ItemGet,
}

impl Dialect {
    /// Where its replies have their columns.
    #[must_use]
    pub fn pointers(self) -> Pointers {
        match self {
            Self::Aop => Pointers::default(),
            Self::Router => article::router(),
            Self::ItemGet => article::item_get(),
        }
    }
}

/// Which API of the gateway is called, and how.
#[derive(Clone, Debug)]
pub struct Settings {
    /// In which form.
    pub dialect: Dialect,
    /// Scheme, host and perhaps a path; for an article's form the endpoint, path and all.
    pub url: String,
    /// The page where a user authorises an app.
    pub authorise_url: String,
    /// Namespace and name: `com.alibaba.product/alibaba.product.get`; for an article's form the name alone.
    pub api: String,
    /// The API's version.
    pub version: String,
    /// The name of the parameter that carries the item's id.
    pub item_param: String,
    /// Parameters of every call (`webSite=1688`).
    pub params: BTreeMap<String, String>,
    /// Where the reply has its columns.
    pub columns: Pointers,
}

/// The vendor.
#[derive(Clone, Debug)]
pub struct Ali1688 {
    protocol: Protocol,
    dialect: Dialect,
    places: columns::Places,
}

#[derive(Clone, Debug)]
enum Protocol {
    Aop { authorise_url: String, template: request::Template },
    Article(article::Template),
}

impl Ali1688 {
    /// Prepares everything that calls have in common.
    ///
    /// # Errors
    /// [`InvalidPointer`] if one of the column pointers is none.
    pub fn new(settings: Settings) -> Result<Self, InvalidPointer> {
        let Settings { dialect, url, authorise_url, api, version, item_param, params, columns } = settings;
        let protocol = match dialect {
            Dialect::Aop => {
                let (url, path) = (url.trim_end_matches('/').to_owned(), format!("param2/{version}/{api}/"));
                Protocol::Aop { authorise_url, template: request::Template { url, path, item_param, params } }
            }
            Dialect::Router | Dialect::ItemGet => {
                Protocol::Article(article::Template { url, dialect, method: api, version, item_param, params })
            }
        };
        Ok(Self { protocol, dialect, places: columns::places(&columns)? })
    }

    /// The gateway's own address, which alone gives tokens.
    fn gateway(&self) -> Option<(&str, &str)> {
        match &self.protocol {
            Protocol::Aop { authorise_url, template } => Some((authorise_url, &template.url)),
            Protocol::Article(_) => None,
        }
    }

    fn refuse(code: &str, message: &str) -> Reply {
        Reply::Refused(Refusal { kind: RefusalKind::Bug, code: code.to_owned(), message: message.to_owned() })
    }
}

impl Vendor for Ali1688 {
    fn batch_max(&self) -> usize {
        1
    }

    fn prepare(&self, account: &Account, requests: &[&Request], now: Timestamp) -> Exchange {
        let Some(request) = requests.first() else { return Exchange::post(String::new(), Vec::new()) };
        match &self.protocol {
            Protocol::Aop { template, .. } => template.fill(account, request, now),
            Protocol::Article(template) => template.fill(account, request, now),
        }
    }

    fn interpret(&self, requests: &[&Request], reply: &HttpReply) -> Reply {
        match requests {
            [request] => match reply::read(&self.places, self.dialect, request, reply) {
                Ok(answer) => Reply::Each(vec![Ok(answer)]),
                Err(refusal) => Reply::Refused(refusal),
            },
            _ => Self::refuse("batch", "1688 serves one item a call"),
        }
    }

    fn columns(&self, raw: &RawValue) -> Option<Columns> {
        reply::columns(&self.places, self.dialect, raw)
    }

    fn prepare_renewal(&self, account: &Account, _: Timestamp) -> Option<Exchange> {
        token::renewal(self.gateway()?.1, account)
    }

    fn interpret_renewal(&self, reply: &HttpReply) -> Result<Tokens, Refusal> {
        token::read(reply)
    }

    fn authorise_link(&self, account: &Account, redirect_uri: &str, state: &str) -> Option<String> {
        token::link(self.gateway()?.0, account, redirect_uri, state)
    }

    fn prepare_authorisation(&self, account: &Account, code: &str, redirect_uri: &str) -> Option<Exchange> {
        Some(token::authorisation(self.gateway()?.1, account, code, redirect_uri))
    }
}
