//! A call to the platform: its form and signature.

use std::{collections::BTreeMap, fmt::Write as _};

use secrecy::ExposeSecret;

use super::sign::{SIGNATURE, SignMethod, signature};
use crate::{
    message::Request,
    platform::{Account, Exchange, params},
    runtime::clock::Timestamp,
};

/// The protocol's own parameters, which no request may set.
const PROTOCOL: [&str; 11] = [
    "method",
    "app_key",
    "session",
    "timestamp",
    "format",
    "v",
    "sign_method",
    SIGNATURE,
    // Without its wrappers a reply has another shape.
    "simplify",
    "partner_id",
    "target_app_key",
];

/// The longest id, in bytes.
const ID_LIMIT: usize = 64;

/// What all calls of a source have in common.
#[derive(Clone, Debug)]
pub struct Template {
    /// The endpoint.
    pub url: String,
    /// What is called.
    pub method: &'static str,
    /// How it is signed.
    pub sign_method: SignMethod,
    /// The name of the parameter that carries the ids.
    pub item_param: String,
    /// Parameters of every call.
    pub params: BTreeMap<String, String>,
}

impl Template {
    /// The signed call for these requests, whose parameters are the same.
    ///
    /// See [`params::add`] for which of them are added.
    pub fn fill(&self, account: &Account, requests: &[&Request], now: Timestamp) -> Exchange {
        let mut form = self.head(self.method, account, now);
        if let Some(session) = &account.access_token {
            form.push(("session".to_owned(), session.expose_secret().to_owned()));
        }
        form.push((self.item_param.clone(), item_ids(requests)));
        let first = requests.first().copied();
        params::add(&mut form, (&self.item_param, &self.params), first, |name| params::is_one_of(name, &PROTOCOL));
        self.signed(account, form)
    }

    /// What every call of the platform begins with.
    pub(super) fn head(&self, method: &str, account: &Account, now: Timestamp) -> Vec<(String, String)> {
        let mut form = Vec::with_capacity(10 + self.params.len());
        let head = [
            ("method", method),
            ("app_key", &account.app_key),
            ("timestamp", &timestamp(now)),
            ("format", "json"),
            ("v", "2.0"),
            ("sign_method", self.sign_method.name()),
        ];
        form.extend(head.map(|(name, value)| (name.to_owned(), value.to_owned())));
        form
    }

    pub(super) fn signed(&self, account: &Account, mut form: Vec<(String, String)>) -> Exchange {
        let signature = signature(self.sign_method, &form, account.app_secret.expose_secret());
        form.push((SIGNATURE.to_owned(), signature));
        Exchange::post(self.url.clone(), form)
    }
}

/// The ids as the batch methods take them, each once. What is no id is left out: with a comma in it, it would be
/// several, and the vendor could refuse the whole call for it.
#[must_use]
pub fn item_ids(requests: &[&Request]) -> String {
    let mut ids = String::with_capacity(requests.len() * 14);
    for (index, request) in requests.iter().enumerate() {
        let id = request.item.as_str();
        if !is_item_id(id) || requests[..index].iter().any(|earlier| earlier.item == request.item) {
            continue;
        }
        if !ids.is_empty() {
            ids.push(',');
        }
        ids.push_str(id);
    }
    ids
}

/// Whether a text can be an item's id: a number, or the letters and digits of the newer ones for affiliates.
#[must_use]
pub fn is_item_id(text: &str) -> bool {
    let is_right = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    text.len() <= ID_LIMIT && text.bytes().all(is_right)
}

/// A time as the platform takes it, `2016-01-01 12:00:00`, in its own zone wherever this runs: it allows for ten minutes.
#[must_use]
pub fn timestamp(now: Timestamp) -> String {
    let at = jiff::Timestamp::from_millisecond(now.as_millis()).unwrap_or_default();
    let at = jiff::tz::offset(8).to_datetime(at);
    let mut text = String::with_capacity(19);
    // Writing to a String cannot fail.
    let _ = write!(
        text,
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02}",
        at.year(),
        at.month(),
        at.day(),
        at.hour(),
        at.minute(),
        at.second()
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{AccountAlias, ItemId};

    fn template() -> Template {
        Template {
            url: "https://gw.api.taobao.com/router/rest".to_owned(),
            method: "taobao.items.seller.list.get",
            sign_method: SignMethod::HmacSha256,
            item_param: "num_iids".to_owned(),
            params: BTreeMap::from([("fields".to_owned(), "num_iid,title,nick,price,cid,sku".to_owned())]),
        }
    }

    fn fill(ids: &[&str], params: &[(&str, &str)]) -> Exchange {
        let account = Account {
            app_key: "12345678".to_owned(),
            app_secret: "helloworld".into(),
            access_token: Some("test".into()),
            ..Account::named(AccountAlias::new("one").unwrap())
        };
        let request = |id: &&str| {
            let mut request = Request::new(ItemId::new(id).unwrap());
            request.params = params.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            request
        };
        let requests: Vec<Request> = ids.iter().map(request).collect();
        // 2016-01-01 12:00:00 in China.
        let now = Timestamp::from_millis(1_451_620_800_999);
        template().fill(&account, &requests.iter().collect::<Vec<_>>(), now)
    }

    fn value<'e>(exchange: &'e Exchange, name: &str) -> Vec<&'e str> {
        exchange.params().filter(|(found, _)| *found == name).map(|(_, value)| value).collect()
    }

    #[test]
    fn a_call_is_vector_t7_with_nothing_secret_in_its_url() {
        let exchange = fill(&["11223344", "55667788"], &[]);
        assert_eq!(exchange.url, "https://gw.api.taobao.com/router/rest");
        assert_eq!(exchange.method, crate::platform::Method::Post);
        assert_eq!(value(&exchange, "timestamp"), ["2016-01-01 12:00:00"]);
        let expected = "0751C7E067DB2CF2C318E69FF82C541F0C2C29B5BBBA182812BB2D705CB27277";
        assert_eq!(value(&exchange, "sign"), [expected]);
        assert!(!exchange.params().any(|(_, value)| value.contains("helloworld")));
    }

    #[test]
    fn ids_travel_once_each_and_what_is_none_stays_here() {
        let exchange = fill(&["1", "2", "1", "3,4", "AAF-x_9"], &[]);
        assert_eq!(value(&exchange, "num_iids"), ["1,2,AAF-x_9"]);
    }

    #[test]
    fn a_request_may_add_parameters_but_not_change_whose_call_it_is() {
        let own = [("q", "女装"), ("SESSION", "x"), ("fields", "num_iid"), ("num_iids", "9"), ("simplify", "true")];
        let exchange = fill(&["1"], &own);
        assert_eq!(value(&exchange, "q"), ["女装"]);
        assert_eq!(value(&exchange, "session"), ["test"]);
        for name in ["SESSION", "simplify"] {
            assert!(value(&exchange, name).is_empty(), "{name}");
        }
        assert_eq!((value(&exchange, "fields").len(), value(&exchange, "num_iids")), (1, vec!["1"]));
    }
}
