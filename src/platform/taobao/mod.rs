//! Taobao's open platform (TOP): one item a call, or up to 20, 40 or 50, signed, with a form as body.
//!
//! Facts and their sources: <https://developer.alibaba.com/docs/doc.htm?articleId=101617> for the signature, the pages of
//! the methods for their batches; the error codes come from the platform's manual and from its public clients.

pub(super) mod errors;
pub(super) mod item;
mod keys;
mod method;
mod reply;
mod request;
pub mod sign;
mod token;

use std::collections::BTreeMap;

use serde_json::value::RawValue;

use super::{Account, Exchange, HttpReply, Refusal, Reply, Tokens, Vendor};
use crate::{
    message::{Columns, Request},
    runtime::clock::Timestamp,
};

pub use keys::Keys;
pub use method::Method;
pub(super) use reply::list;
pub use request::timestamp;
pub(super) use request::{is_item_id, item_ids};

/// Which method of the platform is called, and how.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The endpoint, path and all.
    pub url: String,
    /// What is called.
    pub method: Method,
    /// How calls are signed.
    pub sign_method: sign::SignMethod,
    /// The name of the parameter that carries the ids.
    pub item_param: String,
    /// Parameters of every call.
    pub params: BTreeMap<String, String>,
    /// The most ids of a call; at most [`Method::batch_max`].
    pub batch_max: usize,
}

/// The vendor.
#[derive(Clone, Debug)]
pub struct Taobao {
    template: request::Template,
    reading: reply::Reading,
    batch_max: usize,
}

impl Taobao {
    /// Prepares everything that calls have in common.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let Settings { url, method, sign_method, item_param, params, batch_max } = settings;
        let template = request::Template { url, method: method.name(), sign_method, item_param, params };
        Self { template, reading: reply::Reading::new(method), batch_max: batch_max.clamp(1, method.batch_max()) }
    }
}

impl Vendor for Taobao {
    fn batch_max(&self) -> usize {
        self.batch_max
    }

    fn prepare(&self, account: &Account, requests: &[&Request], now: Timestamp) -> Exchange {
        self.template.fill(account, requests, now)
    }

    fn interpret(&self, requests: &[&Request], reply: &HttpReply) -> Reply {
        self.reading.read(requests, reply)
    }

    fn columns(&self, raw: &RawValue) -> Option<Columns> {
        self.reading.columns(raw)
    }

    fn prepare_renewal(&self, account: &Account, now: Timestamp) -> Option<Exchange> {
        token::renewal(&self.template, account, now)
    }

    fn interpret_renewal(&self, reply: &HttpReply) -> Result<Tokens, Refusal> {
        token::read(reply)
    }
}
