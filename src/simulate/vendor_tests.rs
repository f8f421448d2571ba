//! Whether weir and each gateway understand each other: weir's own signing and reading, over HTTP.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use figment::providers::{Format, Toml};

use super::{
    catalogue::{Catalogue, Shelf},
    *,
};
use crate::{
    message::{ItemId, Request, Status},
    platform::{
        Account, Affected, Answer, Common, Denial, Refusal, RefusalKind, Reply, SourceConfig, Vendor,
        http::{Client, Timeouts},
    },
    runtime::clock::Timestamp,
};

/// Each gateway as a source of weir.
const SOURCES: [(Front, &str, &str); 8] = [
    (Front::Ali1688, "", "kind = \"ali1688\""),
    (Front::Router, "/router/json", "kind = \"ali1688\"\ndialect = \"router\""),
    (Front::ItemGet, "/openapi/param2/1/alibaba.item.get/2.0", "kind = \"ali1688\"\ndialect = \"item-get\""),
    (Front::Taobao, "/router/rest", "kind = \"taobao\""),
    (Front::Taobao, "/router/rest", "kind = \"taobao\"\napi = \"taobao.item.seller.get\"\nsign_method = \"md5\""),
    (Front::Taobao, "/router/rest", "kind = \"taobao\"\napi = \"taobao.tbk.item.info.get\"\nsign_method = \"hmac\""),
    (Front::Reseller, "/ibrad/taobao/item_get/", "kind = \"taobao_reseller\""),
    (Front::OneBound, "/taobao/item_get/", "kind = \"taobao_reseller\"\ndialect = \"onebound\""),
];

struct Caller {
    vendor: Arc<dyn Vendor>,
    account: Account,
    client: Client,
}

impl Caller {
    fn new(simulator: &Simulator, (front, path, source): (Front, &str, &str)) -> Self {
        let text = format!("name = \"a\"\nurl = \"{}{path}\"\n{source}", simulator.url());
        let accounts = match front {
            Front::Ali1688 | Front::Router | Front::ItemGet => simulator.accounts(),
            Front::Taobao => simulator.taobao_accounts(),
            Front::Reseller | Front::OneBound => simulator.reseller_keys(),
        };
        let timeouts = Timeouts { total: Duration::from_secs(20), connect: Duration::from_secs(5) };
        Self {
            vendor: <Toml as Format>::from_str::<SourceConfig>(&text).unwrap().vendor().unwrap(),
            account: accounts[0].clone(),
            client: Client::new(timeouts).unwrap(),
        }
    }

    async fn call_at(&self, now: Timestamp, items: &[u64]) -> Vec<Result<Answer, Refusal>> {
        let request = |item: &u64| Request::new(ItemId::new(item.to_string()).unwrap());
        let requests: Vec<Request> = items.iter().map(request).collect();
        let requests: Vec<&Request> = requests.iter().collect();
        let exchange = self.vendor.prepare(&self.account, &requests, now);
        let reply = match self.client.exchange(&exchange).await {
            Ok(reply) => self.vendor.interpret(&requests, &reply),
            Err(refusal) => Reply::Refused(refusal),
        };
        reply.each(items.len())
    }

    async fn call(&self, items: &[u64]) -> Vec<Result<Answer, Refusal>> {
        self.call_at(Clock::System.now(), items).await
    }

    /// How the only item is refused.
    async fn refusal(&self, item: u64) -> RefusalKind {
        self.call(&[item]).await.remove(0).unwrap_err().kind
    }
}

fn calm() -> Options {
    let side = SideOptions { quota: Quota::None, ..SideOptions::of(2) };
    Options {
        accounts: 2,
        quota: Quota::None,
        latency: Latency::NONE,
        shares: Shares::NONE,
        taobao: side.clone(),
        reseller: side,
        ..Options::default()
    }
}

async fn simulator(options: Options) -> Simulator {
    start(options, Clock::System).await.unwrap()
}

/// What weir should make of what is under an id.
fn expected(front: Front, shelf: Shelf) -> Status {
    match (front, shelf) {
        (_, Shelf::Found) => Status::Found,
        (Front::Ali1688 | Front::Taobao, Shelf::OffShelf(_)) => Status::OffShelf,
        // The others show only what can be bought.
        (_, Shelf::OffShelf(_) | Shelf::Absent) => Status::Absent,
    }
}

#[tokio::test]
async fn weir_reads_every_item_as_it_is_meant_whatever_goes_wrong_on_the_way() {
    let shares = Shares { absent: 0.1, off_shelf: 0.1, throttled: 0.05, failing: 0.1, broken: 0.1, hopeless: 0.0 };
    let catalogue = Catalogue { seed: 7, shares };
    for source in SOURCES {
        // Each method of a gateway begins anew: what went wrong once does not again.
        let simulator = simulator(Options { shares, ..calm() }).await;
        let caller = Caller::new(&simulator, source);
        let (front, batch) = (source.0, caller.vendor.batch_max());
        let mut open: Vec<u64> = sample(7).take(24 * batch.max(10)).collect();
        let mut tries = 0;
        while !open.is_empty() {
            tries += 1;
            assert!(tries < 60, "{source:?}: {open:?}");
            let mut again = Vec::new();
            for items in open.chunks(batch) {
                for (item, answer) in items.iter().zip(caller.call(items).await) {
                    match answer {
                        Ok(answer) => {
                            // The affiliates' API does not say what is for sale.
                            let is_affiliate = source.2.contains("tbk") && catalogue.shelf(*item) != Shelf::Absent;
                            let right =
                                if is_affiliate { Status::Found } else { expected(front, catalogue.shelf(*item)) };
                            assert_eq!(answer.status, right, "{source:?}: {item}");
                            let columns = answer.columns;
                            let is_found = answer.status == Status::Found;
                            assert!(!is_found || (columns.title.is_some() && columns.price.is_some()), "{columns:?}");
                        }
                        Err(refusal) => {
                            let is_passing = matches!(
                                refusal.kind,
                                RefusalKind::Throttled { .. } | RefusalKind::Outage | RefusalKind::Malformed
                            );
                            assert!(is_passing, "{source:?}: {refusal:?}");
                            again.push(*item);
                        }
                    }
                }
            }
            // Somebody else comes first in the next try.
            let half = again.len() / 2;
            again.rotate_left(half);
            open = again;
        }
        let report = simulator.stats().gateways[front.name()].clone();
        assert!(report.injected > 0 && report.refused == 0, "{source:?}: {report:?}");
        assert_eq!(report.items_per_call_max, batch as u64);
    }
}

#[tokio::test]
async fn each_gateway_refuses_who_is_over_and_weir_understands_whom_it_means() {
    let quota = Quota::Sliding { calls: 3, window: Duration::from_secs(3_600) };
    let side = SideOptions { quota, ..SideOptions::of(2) };
    let options = Options { quota, taobao: side.clone(), reseller: side, ..calm() };
    for source in SOURCES {
        let simulator = simulator(options.clone()).await;
        let caller = Caller::new(&simulator, source);
        for _ in 0..3 {
            assert!(caller.call(&[600_000_000_000]).await[0].is_ok(), "{source:?}");
        }
        let RefusalKind::Throttled { scope: Affected::Account, wait } = caller.refusal(600_000_000_000).await else {
            panic!("{source:?}")
        };
        let is_banned = source.0 == Front::Taobao;
        assert_eq!(wait.is_some(), is_banned || source.0 == Front::OneBound, "{source:?}: {wait:?}");
        // A second account is not concerned.
        let other = Caller { account: sibling(&simulator, &caller.account), ..caller };
        assert!(other.call(&[600_000_000_000]).await[0].is_ok(), "{source:?}");
        let report = &simulator.stats().gateways[source.0.name()];
        assert_eq!((report.calls, report.item_calls, report.violations), (5, 4, 1), "{source:?}");
        assert_eq!(simulator.stats().offenders.len(), 1);
    }
}

/// The other account of the same gateway.
fn sibling(simulator: &Simulator, account: &Account) -> Account {
    let all = [simulator.accounts(), simulator.taobao_accounts(), simulator.reseller_keys()];
    let own = all.into_iter().find(|own| own.iter().any(|other| other.alias == account.alias)).unwrap();
    own.iter().find(|other| other.alias != account.alias).unwrap().clone()
}

#[tokio::test]
async fn a_ban_of_taobao_lasts_and_one_of_the_api_is_everybodys() {
    let (calls, window) = (1, Duration::from_secs(3_600));
    let api_quota = Quota::Sliding { calls, window };
    let taobao = SideOptions { quota: Quota::None, api_quota, ..SideOptions::of(2) };
    let simulator = simulator(Options { taobao, ..calm() }).await;
    let one = Caller::new(&simulator, SOURCES[3]);
    let two = Caller { account: simulator.taobao_accounts()[1].clone(), ..Caller::new(&simulator, SOURCES[3]) };
    assert!(one.call(&[1]).await[0].is_ok());
    for caller in [&two, &one, &two] {
        let kind = caller.refusal(1).await;
        let RefusalKind::Throttled { scope: Affected::Everyone, wait: Some(wait) } = kind else { panic!("{kind:?}") };
        assert!(wait >= Duration::from_secs(1), "{wait:?}");
    }
    let report = &simulator.stats().gateways["taobao"];
    // How long the ban lasts is a second or two: a slow machine may have sat out the first.
    assert_eq!(report.violations + report.during_bans, 3);
    assert!(report.during_bans > 0, "{report:?}");
}

#[tokio::test]
async fn wrong_credentials_clocks_and_batches_are_refused_and_understood() {
    let simulator = simulator(calm()).await;
    for source in SOURCES {
        let caller = Caller::new(&simulator, source);
        let forger = Account { app_secret: "wrong".into(), ..caller.account.clone() };
        let forger = Caller { account: forger, ..Caller::new(&simulator, source) };
        assert_eq!(forger.refusal(1).await, RefusalKind::Denied(Denial::Account), "{source:?}");
        let has_token = !matches!(source.0, Front::ItemGet | Front::Reseller | Front::OneBound);
        if has_token && !source.2.contains("tbk") {
            let account = Account { access_token: Some("stale".into()), ..caller.account.clone() };
            let stale = Caller { account, ..Caller::new(&simulator, source) };
            assert_eq!(stale.refusal(1).await, RefusalKind::Denied(Denial::Token), "{source:?}");
        }
        let has_clock = !matches!(source.0, Front::Ali1688 | Front::Reseller | Front::OneBound);
        if has_clock {
            // What somebody sends who takes his own zone for China's.
            let off = Clock::System.now().after(Duration::from_secs(8 * 3_600));
            let refusal = caller.call_at(off, &[1]).await.remove(0).unwrap_err();
            let kind = RefusalKind::Misconfigured(Common::Clock);
            assert_eq!(refusal.kind, kind, "{source:?}: {refusal:?}");
        }
    }
    let caller = Caller::new(&simulator, SOURCES[3]);
    let many: Vec<u64> = (1..=21).collect();
    let kind = RefusalKind::Misconfigured(Common::Params);
    assert_eq!(caller.call(&many).await[20].as_ref().unwrap_err().kind, kind);
    assert_eq!(simulator.stats().gateways["taobao"].too_many_ids, 1);
}

#[tokio::test]
async fn taobaos_sessions_can_be_renewed() {
    let tokens = TokenRules { life: Some(Duration::from_secs(3_600)), rotation: true };
    let simulator = simulator(Options { tokens, ..calm() }).await;
    let caller = Caller::new(&simulator, SOURCES[3]);
    let renew = async |account: &Account| {
        let exchange = caller.vendor.prepare_renewal(account, Clock::System.now()).unwrap();
        caller.vendor.interpret_renewal(&caller.client.exchange(&exchange).await.unwrap())
    };
    let given = renew(&caller.account).await.unwrap();
    assert_eq!(given.lives, Some(Duration::from_secs(3_600)));
    assert_eq!(caller.refusal(1).await, RefusalKind::Denied(Denial::Token), "the old one is dead");
    assert_eq!(renew(&caller.account).await.unwrap_err().kind, RefusalKind::Denied(Denial::Token));
    let account = Account { access_token: Some(given.access_token), ..caller.account.clone() };
    let renewed = Caller { account, ..Caller::new(&simulator, SOURCES[3]) };
    assert!(renewed.call(&[1]).await[0].is_ok());
    assert!(simulator.revoke("tb-0001"));
    assert_eq!(renewed.refusal(1).await, RefusalKind::Denied(Denial::Token));
}

#[tokio::test]
async fn an_outage_on_command_is_one_gateways_and_ends() {
    let simulator = simulator(calm()).await;
    let order = async |json: &'static str| tests::send(simulator.url() + "/chaos", Some(json)).await;
    let callers: Vec<(Front, Caller)> =
        SOURCES.into_iter().map(|source| (source.0, Caller::new(&simulator, source))).collect();
    for mode in [r#"{"gateway":"taobao","mode":"outage"}"#, r#"{"gateway":"taobao","mode":"errors","for":"1h"}"#] {
        assert_eq!(order(mode).await, (200, r#"{"gateways":["taobao"]}"#.to_owned()));
        for (front, caller) in &callers {
            let is_out = caller.call(&[5]).await[0].as_ref().is_err_and(|refusal| refusal.kind == RefusalKind::Outage);
            assert_eq!(is_out, *front == Front::Taobao, "{front:?}, {mode}");
        }
    }
    order(r#"{"mode":"errors"}"#).await;
    for (front, caller) in &callers {
        assert_eq!(caller.refusal(5).await, RefusalKind::Outage, "{front:?}");
    }
    assert_eq!(order(r#"{"mode":"off"}"#).await.0, 200);
    for (front, caller) in &callers {
        assert!(caller.call(&[5]).await[0].is_ok(), "{front:?}");
    }
    let (status, why) = order(r#"{"gateway":"ebay","mode":"off"}"#).await;
    assert!(status == 400 && why.contains("known: 1688"), "{why}");
    assert_eq!(order("{}").await.0, 400);
}

#[tokio::test]
async fn prices_change_with_time_and_are_the_same_for_the_same_seed() {
    let prices = async |seed: u64, drift: Option<Duration>, later: Duration| {
        let clock = Clock::simulated(Timestamp::from_millis(1_750_000_000_000).after(later));
        let simulator = start(Options { seed, drift, ..calm() }, clock.clone()).await.unwrap();
        let caller = Caller::new(&simulator, SOURCES[3]);
        let answers = caller.call_at(clock.now(), &[1, 2, 3]).await;
        answers.into_iter().map(|answer| answer.unwrap().columns.price.unwrap()).collect::<Vec<_>>()
    };
    let (hour, drift) = (Duration::from_secs(3_600), Some(Duration::from_secs(6 * 3_600)));
    let first = prices(7, drift, Duration::ZERO).await;
    assert_eq!(first, prices(7, drift, Duration::ZERO).await);
    assert_ne!(first, prices(7, drift, hour).await);
    assert_ne!(first, prices(8, drift, Duration::ZERO).await);
    assert_eq!(prices(7, None, Duration::ZERO).await, prices(7, None, hour).await);
}

#[tokio::test]
async fn stats_say_how_many_ids_each_gateways_calls_had() {
    let simulator = simulator(calm()).await;
    let batch = Caller::new(&simulator, SOURCES[6]);
    batch.call(&(1..=40).collect::<Vec<_>>()).await;
    batch.call(&[1, 2]).await;
    Caller::new(&simulator, SOURCES[0]).call(&[1]).await;
    let (_, reply) = tests::send(simulator.url() + "/stats", None).await;
    let gateways: BTreeMap<String, GatewayReport> = serde_json::from_str::<Report>(&reply).unwrap().gateways;
    assert_eq!(gateways.keys().map(String::as_str).collect::<Vec<_>>(), ["1688", "reseller"]);
    let reseller = &gateways["reseller"];
    assert_eq!((reseller.item_calls, reseller.items, reseller.items_per_call_max), (2, 42, 40));
    assert!((reseller.items_per_call - 21.0).abs() < f64::EPSILON);
    simulator.reset();
    assert!(simulator.stats().gateways.is_empty());
}
