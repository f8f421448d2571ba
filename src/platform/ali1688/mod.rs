//! 1688's open platform (AOP gateway): one item a call, signed, with a form as body.
//!
//! Facts and their sources: <https://open.1688.com/api/sysSignature.htm?ns=cn.alibaba.open> for the signature;
//! the error codes come from the gateway's public clients. The platform publishes neither quotas nor the
//! length of a ban, so limits are configuration and a throttle names no time.

mod columns;
mod errors;
mod reply;
mod request;
pub mod sign;
pub mod token;

use std::collections::BTreeMap;

use serde_json::value::RawValue;

use super::{
    Account, Exchange, HttpReply, Refusal, RefusalKind, Reply, Tokens, Vendor,
    pick::{InvalidPointer, Picker},
};
use crate::{
    message::{Columns, Request},
    runtime::clock::Timestamp,
};

pub use columns::Pointers;

/// Which API of the gateway is called, and how.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Scheme, host and perhaps a path.
    pub url: String,
    /// The page where a user authorises an app.
    pub authorise_url: String,
    /// Namespace and name: `com.alibaba.product/alibaba.product.get`.
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
    authorise_url: String,
    template: request::Template,
    picker: Picker,
}

impl Ali1688 {
    /// Prepares everything that calls have in common.
    ///
    /// # Errors
    /// [`InvalidPointer`] if one of the column pointers is none.
    pub fn new(settings: Settings) -> Result<Self, InvalidPointer> {
        let template = request::Template {
            url: settings.url.trim_end_matches('/').to_owned(),
            path: format!("param2/{}/{}/", settings.version, settings.api),
            item_param: settings.item_param,
            params: settings.params,
        };
        Ok(Self { authorise_url: settings.authorise_url, template, picker: columns::picker(&settings.columns)? })
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
        match requests.first() {
            Some(request) => self.template.fill(account, request, now),
            None => Exchange { url: self.template.url.clone(), form: Vec::new() },
        }
    }

    fn interpret(&self, requests: &[&Request], reply: &HttpReply) -> Reply {
        match requests {
            [request] => match reply::read(&self.picker, request, reply) {
                Ok(answer) => Reply::Each(vec![Ok(answer)]),
                Err(refusal) => Reply::Refused(refusal),
            },
            _ => Self::refuse("batch", "1688 serves one item a call"),
        }
    }

    fn columns(&self, raw: &RawValue) -> Option<Columns> {
        reply::columns(&self.picker, raw)
    }

    fn prepare_renewal(&self, account: &Account, _: Timestamp) -> Option<Exchange> {
        token::renewal(&self.template.url, account)
    }

    fn interpret_renewal(&self, reply: &HttpReply) -> Result<Tokens, Refusal> {
        token::read(reply)
    }

    fn authorise_link(&self, account: &Account, redirect_uri: &str, state: &str) -> Option<String> {
        token::link(&self.authorise_url, account, redirect_uri, state)
    }

    fn prepare_authorisation(&self, account: &Account, code: &str, redirect_uri: &str) -> Option<Exchange> {
        Some(token::authorisation(&self.template.url, account, code, redirect_uri))
    }
}
