//! What a fleet remembers of its quotas over kill -9 and a lost Redis, and how it follows an operator.

use std::{collections::HashMap, path::PathBuf, time::Duration};

use serde_json::Value;
use tempfile::TempDir;
use weir::{
    message::SourceName,
    runtime::clock::{Clock, Timestamp},
    simulate::{self, Latency, Options, Quota, Shares, Simulator},
    topics::Topics,
};

use crate::{
    process::Installation,
    stack::{Follower, eventually, produce, topics, unique},
    workers::Server,
};

/// A vendor, weir's installation before it, and a reader of the outcomes.
struct Scene {
    installation: Installation,
    simulator: Simulator,
    topics: Topics,
    requests: String,
    follower: Follower,
    ids: Box<dyn Iterator<Item = u64> + Send>,
    asked: usize,
    accounts: PathBuf,
    _folder: TempDir,
}

impl Scene {
    /// `limits`: lines of TOML for each account; `more`: sections of the configuration.
    async fn new(what: &str, options: Options, limits: &str, sections: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let accounts = folder.path().join("accounts.toml");
        let options = Options {
            accounts_file: Some(accounts.clone()),
            latency: Latency { from: Duration::from_millis(20), to: Duration::from_millis(60) },
            shares: Shares::NONE,
            ..options
        };
        let simulator = simulate::start(options, Clock::System).await.unwrap();
        let text = std::fs::read_to_string(&accounts).unwrap();
        let end = |line: &str| line.starts_with("access_token");
        let more = |line: &str| if end(line) { format!("{line}\n{limits}\n") } else { format!("{line}\n") };
        let with_limits: String = text.lines().map(more).collect();
        std::fs::write(&accounts, with_limits).unwrap();
        let source = SourceName::new("ali1688").unwrap();
        let topics = topics(what, &source, 4).await;
        let results = topics.results();
        let prefix = results.trim_end_matches(".results");
        let group = unique("group");
        Self {
            installation: Installation::new(&simulator, &accounts, prefix, &group, sections),
            simulator,
            requests: topics.requests(&source),
            follower: Follower::of(&[topics.results(), topics.dead()]).await,
            topics,
            ids: Box::new(simulate::sample(5)),
            asked: 0,
            accounts,
            _folder: folder,
        }
    }

    async fn ask(&mut self, count: usize) {
        let ids: Vec<String> = self.ids.by_ref().take(count).map(|id| id.to_string()).collect();
        self.asked += ids.len();
        produce(&self.requests, ids).await;
    }

    /// `weir quota` of one account.
    async fn account(&self, alias: &str) -> Value {
        let views: Value = serde_json::from_str(&self.installation.run(&["quota", "--json"]).await).unwrap();
        let accounts = views[0]["accounts"].as_array().unwrap();
        accounts.iter().find(|account| account["account"] == alias).unwrap().clone()
    }

    /// Waits until the account says that its next call is hours away: its budget is spent.
    async fn budget_is_spent(&self) {
        eventually("the day's budget is spent", async || {
            let next_at = self.account("sim-0001").await["next_at"].as_str()?.to_owned();
            let next_at: Timestamp = serde_json::from_value(next_at.into()).unwrap();
            (next_at.since(Clock::System.now()) > Duration::from_secs(3_600)).then_some(())
        })
        .await;
    }

    /// Waits until no call has been made for longer than a lease and two calls take.
    async fn budget_is_spent_in_redis(&self) {
        let mut before = (self.simulator.stats().served, std::time::Instant::now());
        eventually("calls have ceased", async || {
            let served = self.simulator.stats().served;
            if served != before.0 {
                before = (served, std::time::Instant::now());
            }
            (before.1.elapsed() > Duration::from_secs(8)).then_some(())
        })
        .await;
    }
}

/// An account's 2/s, and so many a day.
fn a_day(calls: u32) -> String {
    format!(r#"limits = [{{ calls = 2, per = "1s" }}, {{ calls = {calls}, per = "1day", kind = "fixed" }}]"#)
}

/// A single account, whose vendor counts nothing.
fn one() -> Options {
    Options { accounts: 1, quota: Quota::None, ..Options::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_days_budget_survives_a_kill_and_an_orderly_end() {
    let mut scene = Scene::new("budget", one(), &a_day(30), "").await;
    scene.ask(200).await;
    let process = scene.installation.start("worker", &["fetch"]);
    scene.follower.read_until(20).await;
    process.kill();
    let killed_at = scene.simulator.stats().served;

    // Under another name: what is remembered is the source's.
    let process = scene.installation.start("other", &["fetch"]);
    scene.budget_is_spent().await;
    let served = scene.simulator.stats().served;
    println!("{killed_at} calls before the kill, {served} in all, of 30");
    assert!((20..=30).contains(&served), "{served} of 30");
    assert!(process.stop().await.success());

    let process = scene.installation.start("other", &["fetch"]);
    process.says("fetching").await;
    scene.budget_is_spent().await;
    assert_eq!(scene.simulator.stats().served, served, "an orderly end costs nothing, and brings nothing");
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_days_budget_survives_the_loss_of_redis_and_of_all_workers_at_once() {
    let redis = Server::start();
    let more = format!("[quota]\nstore = \"redis\"\n[redis]\nurl = \"{}\"\n", redis.url());
    let mut scene = Scene::new("flushed", one(), &a_day(80), &more).await;
    scene.ask(200).await;
    let process = scene.installation.start("worker", &["fetch"]);
    scene.follower.read_until(20).await;
    process.kill();
    redis.flush().await;
    let process = scene.installation.start("worker", &["fetch"]);
    process.says("fetching").await;
    // Whoever calls in a state that is made anew waits for what may be leased; then the rest, if there is any.
    scene.budget_is_spent_in_redis().await;
    let served = scene.simulator.stats().served;
    println!("{served} calls in all, of 80");
    assert!((21..=80).contains(&served), "{served} of 80");
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disabled_account_stays_so_over_a_kill_until_it_is_resumed() {
    let options = Options { accounts: 2, ..Options::default() };
    let mut scene = Scene::new("disabled", options, r#"limit = { calls = 10, per = "1s", burst = 5 }"#, "").await;
    let text = std::fs::read_to_string(&scene.accounts).unwrap();
    // A token would be renewed; a wrong secret nobody can mend but its owner.
    let secret = text.lines().find_map(|line| line.strip_prefix("app_secret = ")).unwrap().to_owned();
    std::fs::write(&scene.accounts, text.replace(&secret, "\"wrong\"")).unwrap();
    scene.ask(50).await;
    let process = scene.installation.start("worker", &["run", "--role", "fetch,retry"]);
    let disabled = async |scene: &Scene| {
        eventually("the account is disabled", async || {
            let account = scene.account("sim-0001").await;
            (account["state"] == "disabled").then(|| account["reason"].as_str().unwrap().to_owned())
        })
        .await
    };
    let reason = disabled(&scene).await;
    assert!(!reason.is_empty() && reason != "unknown", "{reason:?}");
    process.kill();
    let refused = scene.simulator.stats().refused;
    assert!(refused >= 1);

    let process = scene.installation.start("worker", &["run", "--role", "fetch,retry"]);
    scene.ask(50).await;
    scene.follower.read_until(80).await;
    assert_eq!(scene.simulator.stats().refused, refused, "it has not called again");

    let said = scene.installation.run(&["quota", "resume", "ali1688", "sim-0001"]).await;
    assert!(said.contains("resumed"), "{said}");
    scene.ask(50).await;
    eventually("it calls again, and is refused again", async || {
        (scene.simulator.stats().refused > refused).then_some(())
    })
    .await;
    assert_eq!(disabled(&scene).await, reason);
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_paused_before_a_worker_starts_does_not_call_until_it_is_resumed() {
    let options = Options { accounts: 1, ..Options::default() };
    let mut scene = Scene::new("paused", options, r#"limit = { calls = 10, per = "1s", burst = 5 }"#, "").await;
    scene.installation.run(&["quota", "pause", "ali1688", "--reason", "stocktaking"]).await;
    let text = scene.installation.run(&["quota"]).await;
    assert!(text.contains("stocktaking") && text.contains("no worker has ever reported"), "{text}");
    scene.ask(10).await;
    let process = scene.installation.start("worker", &["fetch"]);
    eventually("the worker reports", async || {
        scene.installation.run(&["quota"]).await.contains("1 worker reports").then_some(())
    })
    .await;
    assert_eq!(scene.simulator.stats().served, 0);
    scene.installation.run(&["quota", "resume", "ali1688"]).await;
    scene.follower.read_until(10).await;
    assert_eq!(scene.simulator.stats().served, 10);
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processes_share_a_quota_in_redis_and_both_follow_an_operator() {
    let url = crate::stack::address("WEIR_TEST_REDIS");
    // Processes beside others on a busy machine: with this burst a jitter of 300 ms costs nothing.
    let more = format!(
        "[quota]\nstore = \"redis\"\njitter = \"300ms\"\nprefix = \"{}\"\n[redis]\nurl = \"{url}\"\n",
        unique("fleet")
    );
    let limit = r#"limit = { calls = 10, per = "1s", burst = 5 }"#;
    let options = Options { accounts: 10, quota: Quota::Bucket { rate: 10.0, burst: 5 }, ..Options::default() };
    let mut scene = Scene::new("fleet", options, limit, &more).await;
    let processes = ["one", "two"].map(|name| scene.installation.start(name, &["run", "--role", "fetch,retry"]));
    for process in &processes {
        process.says("assigned ").await;
    }
    scene.ask(1_500).await;
    scene.follower.read_until(200).await;
    scene.installation.run(&["quota", "pause", "ali1688", "sim-0003", "--reason", "test"]).await;
    let from = Clock::System.now().after(Duration::from_secs(1));
    let seen = scene.follower.read().len();
    scene.follower.read_until(seen + 450).await;
    let until = Clock::System.now();
    assert!(until.since(from) > Duration::from_secs(2), "paused for {:?}", until.since(from));
    scene.installation.run(&["quota", "resume", "ali1688", "sim-0003"]).await;
    scene.follower.read_until(scene.asked).await;

    let mut ends: HashMap<String, u32> = HashMap::new();
    let mut calls: Vec<Timestamp> = Vec::new();
    for seen in &scene.follower.seen {
        let json = seen.json();
        *ends.entry(json["request_id"].as_str().unwrap().to_owned()).or_default() += 1;
        if json["account"] == "sim-0003" {
            let ended: Timestamp = serde_json::from_value(json["fetched_at"].clone()).unwrap();
            let latency = json["latency_ms"].as_i64().unwrap();
            calls.push(Timestamp::from_millis(ended.as_millis() - latency));
        }
    }
    assert_eq!(ends.len(), scene.asked, "on {}", scene.topics.results());
    assert!(ends.values().all(|times| *times == 1));
    let count = |is_in: &dyn Fn(Timestamp) -> bool| calls.iter().filter(|at| is_in(**at)).count();
    let (before, paused, after) =
        (count(&|at| at < from), count(&|at| at > from && at < until), count(&|at| at > until));
    println!(
        "calls of the account: {before} before, {paused} while paused, {after} after; {:?}",
        scene.simulator.stats()
    );
    assert!(before > 0 && paused == 0 && after > 0, "{before} before, {paused} while paused, {after} after");
    assert_eq!(scene.simulator.stats().violations, 0);
    for process in processes {
        assert!(process.stop().await.success());
    }
}
