//! A call to the gateway: path, form and signature.

use std::collections::BTreeMap;

use secrecy::ExposeSecret;

use super::sign::{SIGNATURE, signature};
use crate::{
    message::Request,
    platform::{Account, Exchange, params},
    runtime::clock::Timestamp,
};

const TIMESTAMP: &str = "_aop_timestamp";
const ACCESS_TOKEN: &str = "access_token";

/// What all calls of a source have in common.
#[derive(Clone, Debug)]
pub struct Template {
    /// Scheme, host and perhaps a path, without a slash at the end.
    pub url: String,
    /// `param2/{version}/{namespace}/{api}/`: the account's app key follows.
    pub path: String,
    /// The name of the parameter that carries the item's id.
    pub item_param: String,
    /// Parameters of every call.
    pub params: BTreeMap<String, String>,
}

impl Template {
    /// The signed call for one request.
    ///
    /// See [`params::add`] for which of the request's own parameters are added.
    pub fn fill(&self, account: &Account, request: &Request, now: Timestamp) -> Exchange {
        let path = format!("{}{}", self.path, account.app_key);
        let mut form = Vec::with_capacity(5 + self.params.len() + request.params.len());
        form.push((TIMESTAMP.to_owned(), now.as_millis().to_string()));
        if let Some(token) = &account.access_token {
            form.push((ACCESS_TOKEN.to_owned(), token.expose_secret().to_owned()));
        }
        form.push((self.item_param.clone(), request.item.as_str().to_owned()));
        params::add(&mut form, (&self.item_param, &self.params), Some(request), is_protocols);
        let signature = signature(&path, &form, account.app_secret.expose_secret());
        form.push((SIGNATURE.to_owned(), signature));
        Exchange::post(format!("{}/openapi/{path}", self.url), form)
    }
}

/// Whether the gateway's protocol sets a parameter.
fn is_protocols(name: &str) -> bool {
    name.get(..5).is_some_and(|start| start.eq_ignore_ascii_case("_aop_")) || name.eq_ignore_ascii_case(ACCESS_TOKEN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{AccountAlias, ItemId};

    fn template() -> Template {
        Template {
            url: "https://gw.open.1688.com".to_owned(),
            path: "param2/1/com.alibaba.product/alibaba.product.get/".to_owned(),
            item_param: "productID".to_owned(),
            params: BTreeMap::from([("webSite".to_owned(), "1688".to_owned())]),
        }
    }

    fn account(token: Option<&str>) -> Account {
        Account {
            alias: AccountAlias::new("one").unwrap(),
            app_key: "1000000".to_owned(),
            app_secret: "test123".into(),
            access_token: token.map(Into::into),
            refresh_token: None,
            limit: None,
            limits: Vec::new(),
            calls_in_flight: None,
            address: None,
        }
    }

    fn request(params: &[(&str, &str)]) -> Request {
        let mut request = Request::new(ItemId::new("584051070147").unwrap());
        request.params = params.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        request
    }

    fn fill(token: Option<&str>, params: &[(&str, &str)]) -> Exchange {
        template().fill(&account(token), &request(params), Timestamp::from_millis(1_700_000_000_000))
    }

    fn value<'e>(exchange: &'e Exchange, name: &str) -> Vec<&'e str> {
        exchange.params().filter(|(found, _)| *found == name).map(|(_, value)| value).collect()
    }

    #[test]
    fn a_call_is_vector_a5_with_nothing_secret_in_its_url() {
        let exchange = fill(Some("at-0001"), &[]);
        let url = "https://gw.open.1688.com/openapi/param2/1/com.alibaba.product/alibaba.product.get/1000000";
        assert_eq!(exchange.url, url);
        assert_eq!(value(&exchange, "_aop_signature"), ["D1C523F97E03FD206938AB605F5D5BB338BDAB1B"]);
        assert_eq!(value(&exchange, "access_token"), ["at-0001"]);
        assert!(!exchange.params().any(|(_, value)| value.contains("test123")));
    }

    #[test]
    fn an_api_without_user_authorisation_gets_no_token() {
        assert!(value(&fill(None, &[]), "access_token").is_empty());
    }

    #[test]
    fn the_parameters_of_a_request_are_sent_and_signed() {
        let exchange = fill(Some("at-0001"), &[("scene", "1")]);
        assert_eq!(value(&exchange, "scene"), ["1"]);
        assert_ne!(value(&exchange, "_aop_signature"), ["D1C523F97E03FD206938AB605F5D5BB338BDAB1B"]);
    }

    #[test]
    fn a_request_cannot_set_what_the_protocol_or_the_source_sets() {
        let plain = fill(Some("at-0001"), &[]);
        let names = ["_aop_timestamp", "_AOP_signature", "_aop_datePattern", "Access_Token", "productid", "WEBSITE"];
        for name in names {
            assert_eq!(fill(Some("at-0001"), &[(name, "mine")]).form(), plain.form(), "{name}");
        }
    }

    #[test]
    fn every_attempt_is_signed_for_its_own_time() {
        let later = template().fill(&account(None), &request(&[]), Timestamp::from_millis(1_700_000_000_001));
        assert_eq!(value(&later, "_aop_timestamp"), ["1700000000001"]);
        assert_ne!(value(&later, "_aop_signature"), value(&fill(None, &[]), "_aop_signature"));
    }
}
