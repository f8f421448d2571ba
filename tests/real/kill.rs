//! fetch killed at any moment: a `read_committed` reader sees exactly one outcome per request.

use std::{collections::HashMap, time::Duration};

use tempfile::TempDir;
use weir::{
    message::SourceName,
    runtime::clock::{Clock, Dice},
    simulate::{self, Latency, Options, Quota, Shares, Simulator},
    topics::Topics,
};

use crate::{
    process::{BEYOND_ALL_TIMEOUTS, Installation},
    stack::{Follower, produce, topics, unique},
};

/// A world, weir's installation in it, and a reader of everything that fetch writes.
struct Scene {
    installation: Installation,
    topics: Topics,
    requests: String,
    follower: Follower,
    ids: Box<dyn Iterator<Item = u64> + Send>,
    asked: usize,
    _simulator: Simulator,
    _accounts: TempDir,
}

impl Scene {
    async fn new(what: &str) -> Self {
        let accounts = tempfile::tempdir().unwrap();
        let file = accounts.path().join("accounts.toml");
        let options = Options {
            accounts: 10,
            accounts_file: Some(file.clone()),
            quota: Quota::None,
            latency: Latency { from: Duration::from_millis(2), to: Duration::from_millis(60) },
            // Failures are outcomes too; nobody retries here.
            shares: Shares { absent: 0.1, off_shelf: 0.1, failing: 0.1, ..Shares::NONE },
            ..Options::default()
        };
        let simulator = simulate::start(options, Clock::System).await.unwrap();
        let source = SourceName::new("ali1688").unwrap();
        let topics = topics(what, &source, 8).await;
        let results = topics.results();
        let prefix = results.trim_end_matches(".results");
        Self {
            installation: Installation::new(&simulator, &file, prefix, &unique("group"), ""),
            requests: topics.requests(&source),
            follower: Follower::of(&[topics.results(), topics.failures(), topics.dead()]).await,
            topics,
            ids: Box::new(simulate::sample(11)),
            asked: 0,
            _simulator: simulator,
            _accounts: accounts,
        }
    }

    async fn ask(&mut self, count: usize) {
        let ids: Vec<String> = self.ids.by_ref().take(count).map(|id| id.to_string()).collect();
        self.asked += ids.len();
        produce(&self.requests, ids).await;
    }

    /// Waits until every request has an outcome, and checks that none has two.
    async fn each_has_exactly_one_outcome(&mut self) {
        self.follower.read_until(self.asked).await;
        // What is doubled comes later than the first: take in whatever is still on its way.
        self.ask(8).await;
        self.follower.read_until(self.asked).await;
        let mut outcomes: HashMap<String, u32> = HashMap::new();
        for seen in &self.follower.seen {
            let id = seen.json()["request_id"].as_str().unwrap().to_owned();
            *outcomes.entry(id).or_default() += 1;
        }
        let doubled: Vec<_> = outcomes.iter().filter(|(_, times)| **times > 1).collect();
        assert!(doubled.is_empty(), "{} of {} doubled: {doubled:?}", doubled.len(), self.asked);
        assert_eq!(outcomes.len(), self.asked, "on {}", self.topics.results());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_kills_with_a_restart_under_the_same_name() {
    let mut scene = Scene::new("kill").await;
    let dice = Dice::seeded(20);
    let mut process = scene.installation.start("only", &["fetch"]);
    for _ in 0..20 {
        // Work that begins before the kill, in the middle of calls, of a transaction, of a start.
        scene.ask(300).await;
        let before = scene.follower.read().len();
        scene.follower.read_until(before + 20).await;
        tokio::time::sleep(Duration::from_millis(200).mul_f64(dice.fraction())).await;
        process.kill();
        process = scene.installation.start("only", &["fetch"]);
    }
    scene.each_has_exactly_one_outcome().await;
    assert!(process.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_member_is_replaced_by_another_within_the_time_outs() {
    let mut scene = Scene::new("take-over").await;
    let first = scene.installation.start("first", &["fetch"]);
    let second = scene.installation.start("second", &["fetch"]);
    first.says("assigned ").await;
    second.says("assigned ").await;
    scene.ask(2_000).await;
    let before = scene.follower.read().len();
    scene.follower.read_until(before + 100).await;
    first.kill();
    scene.ask(500).await;
    scene.each_has_exactly_one_outcome().await;
    assert!(second.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_stopped_beyond_all_time_outs_doubles_nothing_when_it_wakes_up() {
    let mut scene = Scene::new("sleeper").await;
    let mut sleeper = scene.installation.start("sleeper", &["fetch"]);
    let second = scene.installation.start("second", &["fetch"]);
    sleeper.says("assigned ").await;
    second.says("assigned ").await;
    scene.ask(2_000).await;
    let before = scene.follower.read().len();
    scene.follower.read_until(before + 100).await;
    sleeper.signal("STOP");
    tokio::time::sleep(BEYOND_ALL_TIMEOUTS).await;
    // The other has taken over all of it by now.
    scene.follower.read_until(scene.asked).await;
    sleeper.signal("CONT");
    scene.ask(500).await;
    scene.each_has_exactly_one_outcome().await;
    // It has come back, or it has ended and says why.
    if let Some(status) = sleeper.has_ended() {
        assert_eq!(status.code(), Some(75), "{}", sleeper.log());
    }
    assert!(second.stop().await.success());
}
