//! What all gateways have in common: a call as it came, and what is done with it.

use std::time::Duration;

use super::stats::Outcome;

/// The type of a JSON reply.
pub(super) const JSON: &str = "application/json;charset=UTF-8";
/// The type of a page.
pub(super) const HTML: &str = "text/html;charset=UTF-8";

/// Which gateway: each has its own quotas, counts and outages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Front {
    /// 1688's AOP gateway.
    Ali1688,
    /// 1688 as the article with `/router/json` has it.
    Router,
    /// 1688 as the article with `alibaba.item.get` has it.
    ItemGet,
    /// Taobao's TOP.
    Taobao,
    /// The reseller of the Taobao article.
    Reseller,
    /// `OneBound`.
    OneBound,
}

impl Front {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Ali1688, Self::Router, Self::ItemGet, Self::Taobao, Self::Reseller, Self::OneBound];

    /// What `/stats` and `/chaos` call it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ali1688 => "1688",
            Self::Router => "1688-router",
            Self::ItemGet => "1688-item-get",
            Self::Taobao => "taobao",
            Self::Reseller => "reseller",
            Self::OneBound => "onebound",
        }
    }

    /// The gateway that serves this path.
    pub(super) fn of_path(path: &str) -> Option<Self> {
        Some(match path.trim_end_matches('/') {
            "/openapi/param2/1/alibaba.item.get/2.0" => Self::ItemGet,
            "/router/json" => Self::Router,
            "/router/rest" => Self::Taobao,
            "/ibrad/taobao/item_get" => Self::Reseller,
            "/taobao/item_get" => Self::OneBound,
            path if path.starts_with("/openapi/") => Self::Ali1688,
            _ => return None,
        })
    }
}

/// A call as it came over the wire.
pub(super) struct Call<'a> {
    /// For the AOP gateway from `param2/` on.
    pub(super) path: &'a str,
    /// Query and form together.
    pub(super) params: &'a [(String, String)],
    /// Since the start.
    pub(super) arrived: Duration,
    /// Whether the address that it came from is within its quota.
    pub(super) is_address_within: bool,
}

impl<'a> Call<'a> {
    /// A parameter that is there and not empty.
    pub(super) fn param(&self, name: &str) -> Option<&'a str> {
        param(self.params, name).filter(|value| !value.is_empty())
    }
}

/// What a gateway does with a call.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) outcome: Outcome,
    /// The account's index among all accounts, if its key is known.
    pub(super) account: Option<usize>,
    /// The items, if the call got as far as being about some.
    pub(super) items: Vec<u64>,
    pub(super) reply: Reply,
    /// The call's number: what is rolled per call (latency, request id) is rolled for it.
    pub(super) serial: u64,
}

impl Verdict {
    /// Whether the call got behind the gateway. A refusal at the door takes no time.
    pub(super) fn takes_time(&self) -> bool {
        match self.outcome {
            Outcome::Found
            | Outcome::Absent
            | Outcome::OffShelf
            | Outcome::InjectedFailure
            | Outcome::Renewed { .. } => true,
            Outcome::Refused(_) | Outcome::InjectedThrottle => false,
        }
    }
}

/// What goes back over the wire.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// A whole HTTP reply, whatever it says.
    Http { status: u16, content_type: &'static str, body: String },
    /// Nothing: the connection closes.
    Cut,
}

impl Reply {
    /// HTTP 200 with JSON.
    pub(super) fn ok(body: String) -> Self {
        Self::json(200, body)
    }

    /// JSON with this status.
    pub(super) fn json(status: u16, body: String) -> Self {
        Self::Http { status, content_type: JSON, body }
    }

    /// A proxy's page.
    pub(super) fn bad_gateway() -> Self {
        let body = "<html><head><title>502 Bad Gateway</title></head><body>Tengine</body></html>".to_owned();
        Self::Http { status: 502, content_type: HTML, body }
    }
}

/// The first parameter of this name.
pub(super) fn param<'a>(params: &'a [(String, String)], name: &str) -> Option<&'a str> {
    params.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
}
