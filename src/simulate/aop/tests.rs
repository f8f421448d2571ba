//! The gateway's order of checks, and what it says.

use super::*;
use crate::simulate::{accounts, catalogue::Shares};

const ITEM: &str = "584051070147";

fn gateway(quota: Quota, shares: Shares) -> Gateway {
    let catalogue = Catalogue { seed: 7, shares };
    Gateway::new(accounts::generate(7, 2).unwrap(), quota, TokenRules::default(), catalogue, None, Clock::System)
}

fn code(verdict: &Verdict) -> String {
    match &verdict.reply {
        Reply::Cut => "cut".into(),
        Reply::Http { body, .. } => {
            let value: serde_json::Value = serde_json::from_str(body).unwrap_or_default();
            value["error_code"].as_str().unwrap_or("ok").to_owned()
        }
    }
}

/// A call that is right in every way, to be spoiled.
struct Draft {
    path: String,
    secret: String,
    params: Vec<(String, String)>,
}

impl Draft {
    fn new(gateway: &Gateway, item: &str) -> Self {
        let account = &gateway.accounts[0];
        let token = account.access_token.as_ref().unwrap().expose_secret();
        let params = [("access_token", token), ("productID", item), ("webSite", "1688")];
        Self {
            path: format!("{API}/{}", account.app_key),
            secret: account.app_secret.expose_secret().to_owned(),
            params: params.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
        }
    }

    fn without(mut self, name: &str) -> Self {
        self.params.retain(|(key, _)| key != name);
        self
    }

    fn with(self, name: &str, value: &str) -> Self {
        let mut draft = self.without(name);
        draft.params.push((name.to_owned(), value.to_owned()));
        draft
    }

    fn signed(self) -> Self {
        let signature = sign::signature(&self.path, &self.params, &self.secret);
        self.with(sign::SIGNATURE, &signature)
    }

    fn judged(&self, gateway: &Gateway) -> Verdict {
        gateway.judge(&Call {
            path: &self.path,
            params: &self.params,
            arrived: Duration::ZERO,
            is_address_within: true,
        })
    }
}

/// Each call is wrong in the named way *and in all ways that are checked later*, so the order matters.
#[test]
fn the_gateway_checks_in_its_order() {
    let closed = gateway(Quota::Sliding { calls: 0, window: Duration::from_secs(1) }, Shares::NONE);
    let open = gateway(Quota::None, Shares::NONE);
    let bare = |path: &str| Draft { path: path.into(), secret: String::new(), params: Vec::new() };
    let no_params = |gateway: &Gateway| Draft::new(gateway, ITEM).without("productID").without("webSite");
    let wrong_token = |gateway: &Gateway| no_params(gateway).with("access_token", "wrong");

    let unknown = bare("param2/1/com.alibaba.product/alibaba.item.get/1");
    assert_eq!(code(&unknown.judged(&closed)), "gw.APIUnsupported");
    assert_eq!(code(&bare(&format!("{API}x/1")).judged(&closed)), "gw.APIUnsupported");
    assert_eq!(code(&bare(&format!("{API}/")).judged(&closed)), "gw.AppKeyMissing");
    assert_eq!(code(&bare(&format!("{API}/999")).judged(&closed)), "gw.AppKeyNotFound");
    assert_eq!(code(&wrong_token(&closed).judged(&closed)), "gw.SignatureMissing");
    let forged = wrong_token(&closed).with(sign::SIGNATURE, &"A".repeat(40));
    assert_eq!(code(&forged.judged(&closed)), "gw.SignatureInvalid");
    assert_eq!(code(&wrong_token(&closed).signed().judged(&closed)), "gw.QosAppFrequencyLimit");
    assert_eq!(code(&wrong_token(&open).signed().judged(&open)), "401");
    assert_eq!(code(&no_params(&open).signed().judged(&open)), "gw.ParamMissing");
    assert_eq!(code(&Draft::new(&open, ITEM).signed().judged(&open)), "ok");
}

#[test]
fn missing_and_wrong_parameters_are_refused() {
    let open = gateway(Quota::None, Shares::NONE);
    let drafts = [
        Draft::new(&open, ITEM).without("productID"),
        Draft::new(&open, ITEM).without("webSite"),
        Draft::new(&open, "not-a-number"),
        Draft::new(&open, ITEM).without("productID").with("productId", ITEM),
    ];
    for draft in drafts {
        assert_eq!(code(&draft.signed().judged(&open)), "gw.ParamMissing");
    }
}

#[test]
fn a_signature_in_base64_or_over_other_parameters_is_refused() {
    use base64::{Engine as _, prelude::BASE64_STANDARD};

    let open = gateway(Quota::None, Shares::NONE);
    let draft = Draft::new(&open, ITEM);
    let signature = sign::signature(&draft.path, &draft.params, &draft.secret);
    let base64 = BASE64_STANDARD.encode(hex::decode(&signature).unwrap());
    assert_eq!(code(&draft.with(sign::SIGNATURE, &base64).judged(&open)), "gw.SignatureInvalid");
    let changed = Draft::new(&open, ITEM).signed().with("productID", "584051070148");
    assert_eq!(code(&changed.judged(&open)), "gw.SignatureInvalid");
    let others = Draft { path: format!("{API}/{}", open.accounts[1].app_key), ..Draft::new(&open, ITEM).signed() };
    assert_eq!(code(&others.judged(&open)), "gw.SignatureInvalid");
}

#[test]
fn a_refused_token_is_spelled_both_ways() {
    let open = gateway(Quota::None, Shares::NONE);
    let draft = Draft::new(&open, ITEM).without("access_token").signed();
    let status = |verdict: Verdict| match verdict.reply {
        Reply::Http { status, .. } => status,
        Reply::Cut => 0,
    };
    let statuses: Vec<u16> = (0..64).map(|_| status(draft.judged(&open))).collect();
    assert!(statuses.contains(&200) && statuses.contains(&401), "{statuses:?}");
    let again = gateway(Quota::None, Shares::NONE);
    assert_eq!(statuses, (0..64).map(|_| status(draft.judged(&again))).collect::<Vec<_>>());
}

#[test]
fn each_account_has_a_quota_of_its_own() {
    let limited = gateway(Quota::Bucket { rate: 10.0, burst: 2 }, Shares::NONE);
    let draft = Draft::new(&limited, ITEM).signed();
    let codes: Vec<String> = (0..3).map(|_| code(&draft.judged(&limited))).collect();
    assert_eq!(codes, ["ok", "ok", "gw.QosAppFrequencyLimit"]);
    let other = &limited.accounts[1];
    let second = Draft {
        path: format!("{API}/{}", other.app_key),
        secret: other.app_secret.expose_secret().into(),
        ..Draft::new(&limited, ITEM).with("access_token", other.access_token.as_ref().unwrap().expose_secret())
    };
    let verdict = second.signed().judged(&limited);
    assert_eq!((code(&verdict).as_str(), verdict.account), ("ok", Some(1)));
}

#[test]
fn a_failing_item_is_found_when_asked_again() {
    let failing = gateway(Quota::None, Shares { failing: 1.0, ..Shares::NONE });
    for item in 600_000_000_000_u64..600_000_000_200 {
        let draft = Draft::new(&failing, &item.to_string()).signed();
        let outcomes: Vec<Outcome> = (0..4).map(|_| draft.judged(&failing).outcome).collect();
        assert_eq!(outcomes[0], Outcome::InjectedFailure, "{item}");
        assert_eq!(outcomes[3], Outcome::Found, "{item}");
    }
}

#[test]
fn an_injected_throttle_is_no_violation_and_passes() {
    let throttling = gateway(Quota::None, Shares { throttled: 1.0, ..Shares::NONE });
    let draft = Draft::new(&throttling, ITEM).signed();
    let first = draft.judged(&throttling);
    assert_eq!((first.outcome, code(&first).as_str()), (Outcome::InjectedThrottle, "gw.QosAppFrequencyLimit"));
    draft.judged(&throttling);
    assert_eq!(draft.judged(&throttling).outcome, Outcome::Found);
}

#[test]
fn a_reply_that_makes_no_sense_is_never_a_product_of_the_item() {
    let broken = gateway(Quota::None, Shares { broken: 1.0, ..Shares::NONE });
    for item in 600_000_000_000_u64..600_000_000_200 {
        let verdict = Draft::new(&broken, &item.to_string()).signed().judged(&broken);
        let Reply::Http { status: 200, body, .. } = verdict.reply else { panic!("{item}: {verdict:?}") };
        let value: serde_json::Value = serde_json::from_str(&body).unwrap_or_default();
        assert_ne!(value["productInfo"]["productID"], item);
    }
}

#[test]
fn absent_and_off_shelf_items_say_so() {
    let absent = gateway(Quota::None, Shares { absent: 1.0, ..Shares::NONE });
    let verdict = Draft::new(&absent, ITEM).signed().judged(&absent);
    assert_eq!(verdict.outcome, Outcome::Absent);
    assert!(matches!(&verdict.reply, Reply::Http { status: 200, body, .. } if !body.contains("productInfo")));

    let off = gateway(Quota::None, Shares { off_shelf: 1.0, ..Shares::NONE });
    for item in 600_000_000_000_u64..600_000_000_100 {
        let verdict = Draft::new(&off, &item.to_string()).signed().judged(&off);
        assert_eq!(verdict.outcome, Outcome::OffShelf);
        let Reply::Http { body, .. } = verdict.reply else { panic!("cut") };
        assert!(!body.contains("published"), "{body}");
    }
}
