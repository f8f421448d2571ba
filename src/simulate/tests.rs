//! The simulator through its front door: HTTP against the bound port.

use std::time::Duration;

use secrecy::ExposeSecret;
use serde_json::Value;

use super::*;
use crate::{
    platform::{Account, ali1688::sign},
    simulate::aop::API,
};

const ITEM: &str = "584051070147";

async fn simulator(options: Options) -> Simulator {
    start(options, Clock::System).await.unwrap()
}

/// Answers at once, without limits, and nothing goes wrong.
fn calm() -> Options {
    Options { accounts: 2, quota: Quota::None, latency: Latency::NONE, shares: Shares::NONE, ..Options::default() }
}

fn signed(account: &Account, item: &str) -> (String, Vec<(String, String)>) {
    let path = format!("{API}/{}", account.app_key);
    let token = account.access_token.as_ref().unwrap().expose_secret();
    let params = [("access_token", token), ("productID", item), ("webSite", "1688"), ("note", "玻璃杯 a+b&c")];
    let mut params: Vec<(String, String)> = params.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    let signature = sign::signature(&path, &params, account.app_secret.expose_secret());
    params.push((sign::SIGNATURE.to_owned(), signature));
    (format!("/openapi/{path}"), params)
}

fn encoded(params: &[(String, String)]) -> String {
    let mut url = reqwest::Url::parse("http://localhost/").unwrap();
    url.query_pairs_mut().extend_pairs(params);
    url.query().unwrap().to_owned()
}

/// The client is an argument since making one reads every root certificate of the machine.
async fn post(client: &reqwest::Client, simulator: &Simulator, item: &str) -> reqwest::Result<(u16, String)> {
    let (path, params) = signed(&simulator.accounts()[0], item);
    let request = client
        .post(simulator.url() + &path)
        .header("content-type", "application/x-www-form-urlencoded;charset=utf-8")
        .body(encoded(&params));
    let reply = request.send().await?;
    Ok((reply.status().as_u16(), reply.text().await?))
}

/// The status and the text of a reply: to a POST of a body, else to a GET.
pub(super) async fn send(url: String, body: Option<&'static str>) -> (u16, String) {
    let client = reqwest::Client::new();
    let request = body.map_or_else(|| client.get(&url), |body| client.post(&url).body(body));
    let reply = request.send().await.unwrap();
    (reply.status().as_u16(), reply.text().await.unwrap())
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[tokio::test]
async fn a_product_is_served_by_post_and_by_get_alike() {
    let client = reqwest::Client::new();
    let simulator = simulator(calm()).await;
    let (status, posted) = post(&client, &simulator, ITEM).await.unwrap();
    assert_eq!((status, &json(&posted)["productInfo"]["productID"]), (200, &Value::from(584_051_070_147_u64)));

    let (path, params) = signed(&simulator.accounts()[1], ITEM);
    let url = format!("{}{path}?{}", simulator.url(), encoded(&params));
    let got = client.get(url).send().await.unwrap();
    assert_eq!(got.status(), 200);
    assert_eq!(got.text().await.unwrap(), posted);
    assert_eq!((simulator.stats().found, simulator.stats().calls_per_item_max), (2, 2));
}

#[tokio::test]
async fn a_refusal_is_http_400_with_the_gateways_four_fields() {
    let simulator = simulator(calm()).await;
    let url = format!("{}/openapi/{API}/42", simulator.url());
    let reply = reqwest::Client::new().post(url).send().await.unwrap();
    assert_eq!(reply.status(), 400);
    let body = json(&reply.text().await.unwrap());
    assert_eq!(body["error_code"], "gw.AppKeyNotFound");
    for field in ["error_message", "exception", "request_id"] {
        assert!(body[field].as_str().is_some_and(|text| !text.is_empty()), "{field} in {body}");
    }
}

#[tokio::test]
async fn two_simulators_with_one_seed_agree_on_every_reply() {
    let client = reqwest::Client::new();
    let options = || Options { shares: Shares { failing: 0.0, hopeless: 0.0, ..Shares::default() }, ..calm() };
    let (one, two) = (simulator(options()).await, simulator(options()).await);
    for item in sample(7).take(60).map(|id| id.to_string()) {
        let (first, second) = (post(&client, &one, &item).await.unwrap(), post(&client, &two, &item).await.unwrap());
        assert_eq!(first, second, "{item}");
    }
}

#[tokio::test]
async fn a_cut_connection_has_no_reply_at_all() {
    let client = reqwest::Client::new();
    let simulator = simulator(Options { shares: Shares { hopeless: 1.0, ..Shares::NONE }, ..calm() }).await;
    let mut cuts = 0;
    for item in sample(7).take(40).map(|id| id.to_string()) {
        cuts += u32::from(post(&client, &simulator, &item).await.is_err_and(|error| error.status().is_none()));
    }
    assert!((1..40).contains(&cuts), "{cuts} of 40 were cut");
    assert_eq!(simulator.stats().injected_failures, 40);
}

#[tokio::test]
async fn calls_over_the_quota_are_violations_of_their_account() {
    let client = reqwest::Client::new();
    let quota = Quota::Sliding { calls: 3, window: Duration::from_secs(3_600) };
    let simulator = simulator(Options { quota, ..calm() }).await;
    for expected in [200, 200, 200, 400, 400] {
        assert_eq!(post(&client, &simulator, ITEM).await.unwrap().0, expected);
    }
    let stats = simulator.stats();
    assert_eq!((stats.served, stats.found, stats.refused, stats.violations), (5, 3, 2, 2));
    let alias = simulator.accounts()[0].alias.to_string();
    assert_eq!(stats.offenders, [Offender { alias, violations: 2 }]);
}

#[tokio::test]
async fn stats_over_http_add_up_and_can_be_reset() {
    let client = reqwest::Client::new();
    let shares = Shares { absent: 0.3, off_shelf: 0.3, throttled: 0.2, failing: 0.2, ..Shares::NONE };
    let simulator = simulator(Options { shares, ..calm() }).await;
    for item in sample(7).take(100).map(|id| id.to_string()) {
        // A cut is an error here, and counted there.
        let _ = post(&client, &simulator, &item).await;
    }
    let get = async || -> Report {
        let reply = client.get(simulator.url() + "/stats").send().await.unwrap();
        serde_json::from_str(&reply.text().await.unwrap()).unwrap()
    };
    let stats = get().await;
    let parts = stats.found + stats.absent + stats.off_shelf + stats.refused;
    assert_eq!((stats.served, parts + stats.injected_throttles + stats.injected_failures), (100, 100));
    for part in [stats.found, stats.absent, stats.off_shelf, stats.injected_throttles, stats.injected_failures] {
        assert!(part > 0, "{stats:?}");
    }
    assert_eq!((stats.distinct_items, stats.in_flight, stats.violations), (100, 0, 0));

    let reply = client.post(simulator.url() + "/reset").send().await.unwrap();
    assert!(reply.status().is_success());
    let after = get().await;
    assert_eq!((after.served, after.distinct_items), (0, 0));
}

#[tokio::test]
async fn a_caller_who_leaves_is_abandoned_and_no_longer_in_flight() {
    let latency = Latency { from: Duration::from_secs(3_600), to: Duration::from_secs(3_600) };
    let simulator = simulator(Options { latency, ..calm() }).await;
    let mut calls = tokio::task::JoinSet::new();
    let (path, params) = signed(&simulator.accounts()[0], ITEM);
    let url = format!("{}{path}?{}", simulator.url(), encoded(&params));
    calls.spawn(async move { reqwest::get(url).await.is_ok() });
    until(|| simulator.stats().in_flight == 1).await;
    calls.shutdown().await;
    until(|| simulator.stats().in_flight == 0).await;
    assert_eq!((simulator.stats().abandoned, simulator.stats().served), (1, 0));
}

#[tokio::test]
async fn a_dropped_simulator_gives_its_port_back() {
    let client = reqwest::Client::new();
    let first = simulator(calm()).await;
    let listen = first.address();
    post(&client, &first, ITEM).await.unwrap();
    first.stop().await.unwrap();
    let second = simulator(Options { listen, ..calm() }).await;
    assert_eq!(second.address(), listen);

    let error = start(Options { listen, ..calm() }, Clock::System).await.unwrap_err();
    assert!(error.to_string().contains("--listen"), "{error}");
}

#[tokio::test]
async fn the_accounts_file_is_there_when_the_port_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("accounts.toml");
    let simulator = simulator(Options { accounts_file: Some(path.clone()), ..calm() }).await;
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(simulator.accounts().iter().all(|account| text.contains(&account.app_key)));

    let nowhere = Options { accounts_file: Some(folder.path().join("no/such/folder")), ..calm() };
    assert!(matches!(start(nowhere, Clock::System).await, Err(SimulateError::AccountsFile { .. })));
}

#[tokio::test]
async fn health_is_served_and_other_methods_and_paths_are_not() {
    let simulator = simulator(calm()).await;
    let client = reqwest::Client::new();
    let status = async |request: reqwest::RequestBuilder| request.send().await.unwrap().status().as_u16();
    assert_eq!(status(client.get(simulator.url() + "/healthz")).await, 200);
    assert_eq!(status(client.delete(simulator.url() + "/openapi/param2/1/x/y/z")).await, 405);
    assert_eq!(status(client.get(simulator.url() + "/router/xml")).await, 404);
}

/// Waits for something that the server does soon after.
async fn until(is: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while !is() {
        assert!(tokio::time::Instant::now() < deadline, "did not happen within 10 s");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
