//! Whether weir reads the gateway's replies as they are meant: both sides of the wire without the wire.

use std::collections::BTreeMap;

use super::*;
use crate::{
    message::{ItemId, Request, Status},
    platform::{
        Affected, Denial, HttpReply, RefusalKind, Reply as Reading, Vendor,
        ali1688::{Ali1688, Dialect, Pointers, Settings},
    },
    simulate::{accounts, catalogue::Shares, ids::sample},
};

fn vendor() -> Ali1688 {
    let (namespace_and_name, version) = ("com.alibaba.product/alibaba.product.get", "1");
    Ali1688::new(Settings {
        dialect: Dialect::Aop,
        url: "http://gateway".into(),
        authorise_url: "http://gateway/oauth/authorize".into(),
        api: namespace_and_name.into(),
        version: version.into(),
        item_param: "productID".into(),
        params: BTreeMap::from([("webSite".into(), "1688".into())]),
        columns: Pointers::default(),
    })
    .unwrap()
}

/// The item's own reading of the reply; `None` for a cut connection.
fn call(vendor: &Ali1688, gateway: &Gateway, account: &Account, item: u64) -> (Outcome, Option<Reading>) {
    let request = Request::new(ItemId::new(item.to_string()).unwrap());
    let exchange = vendor.prepare(account, &[&request], Timestamp::from_millis(1_750_000_000_000));
    let path = exchange.url.strip_prefix("http://gateway/openapi/").unwrap();
    let verdict =
        gateway.judge(&Call { path, params: exchange.form(), arrived: Duration::ZERO, is_address_within: true });
    let reading = match verdict.reply {
        Reply::Cut => None,
        Reply::Http { status, body, .. } => {
            let reply = HttpReply::new(status, body, Timestamp::from_millis(0));
            Some(vendor.interpret(&[&request], &reply))
        }
    };
    (verdict.outcome, reading)
}

fn agree(outcome: Outcome, reading: &Reading) -> bool {
    let one = reading.clone().each(1).into_iter().next();
    match (outcome, one) {
        (Outcome::Found, Some(Ok(answer))) => {
            let columns = &answer.columns;
            answer.status == Status::Found && columns.title.is_some() && columns.price.is_some()
        }
        (Outcome::Absent, Some(Ok(answer))) => answer.status == Status::Absent,
        (Outcome::OffShelf, Some(Ok(answer))) => answer.status == Status::OffShelf,
        (Outcome::InjectedThrottle | Outcome::Refused(Refused::Violation), Some(Err(refusal))) => {
            matches!(refusal.kind, RefusalKind::Throttled { scope: Affected::Account, .. })
        }
        (Outcome::InjectedFailure, Some(Err(refusal))) => {
            matches!(refusal.kind, RefusalKind::Outage | RefusalKind::Malformed)
        }
        (Outcome::Refused(Refused::Unauthorised), Some(Err(refusal))) => {
            refusal.kind == RefusalKind::Denied(Denial::Token)
        }
        (_, _) => false,
    }
}

#[test]
fn weir_reads_every_reply_as_it_is_meant() {
    let shares = Shares { absent: 0.1, off_shelf: 0.1, throttled: 0.1, failing: 0.1, broken: 0.1, hopeless: 0.1 };
    let accounts = accounts::generate(7, 2).unwrap();
    let gateway = Gateway::new(
        accounts.clone(),
        Quota::None,
        TokenRules::default(),
        Catalogue { seed: 7, shares },
        None,
        Clock::System,
    );
    let vendor = vendor();
    for item in sample(7).take(2_000) {
        for _ in 0..4 {
            let (outcome, reading) = call(&vendor, &gateway, &accounts[0], item);
            let Some(reading) = reading else { continue };
            assert!(agree(outcome, &reading), "{item} is {outcome:?} and read as {reading:?}");
        }
    }
}

#[test]
fn weir_reads_a_refused_account_as_it_is_meant() {
    let accounts = accounts::generate(7, 2).unwrap();
    let catalogue = Catalogue { seed: 7, shares: Shares::NONE };
    let gateway = Gateway::new(accounts.clone(), Quota::None, TokenRules::default(), catalogue, None, Clock::System);
    let vendor = vendor();
    let item = 584_051_070_147;
    let foreign = Account { access_token: accounts[1].access_token.clone(), ..accounts[0].clone() };
    // Both spellings, HTTP 200 and 401.
    for _ in 0..32 {
        let (outcome, reading) = call(&vendor, &gateway, &foreign, item);
        assert_eq!(outcome, Outcome::Refused(Refused::Unauthorised));
        assert!(agree(outcome, &reading.unwrap()));
    }
    let forger = Account { app_secret: accounts[1].app_secret.clone(), ..accounts[0].clone() };
    let (_, reading) = call(&vendor, &gateway, &forger, item);
    let Some(Reading::Refused(refusal)) = &reading else { panic!("{reading:?}") };
    assert_eq!(refusal.kind, RefusalKind::Denied(Denial::Account));
}
