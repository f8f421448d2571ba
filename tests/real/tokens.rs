//! Tokens that expire while two processes call with them: renewed once for both, kept, revoked, authorised anew.

use std::{collections::HashMap, path::PathBuf, time::Duration};

use tempfile::TempDir;
use tokio::time::Instant;
use weir::{
    message::SourceName,
    runtime::clock::Clock,
    simulate::{self, Latency, Options, Quota, Shares, Simulator, TokenRules},
    topics::Topics,
};

use crate::{
    process::{Installation, Process},
    stack::{Follower, address, eventually, produce, topics, unique},
};

const KEY: &str = "1f2e3d4c5b6a79880716253443526170f0e1d2c3b4a5968778695a4b3c2d1e0f";
const ROLES: &[&str] = &["run", "--role", "fetch,retry"];

struct Scene {
    simulator: Simulator,
    installation: Installation,
    topics: Topics,
    requests: String,
    ends: Follower,
    ids: Box<dyn Iterator<Item = u64> + Send>,
    asked: usize,
    prefix: String,
    accounts: PathBuf,
    _folder: TempDir,
}

impl Scene {
    async fn new(what: &str, accounts: usize, tokens: TokenRules) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("accounts.toml");
        let options = Options {
            accounts,
            accounts_file: Some(file.clone()),
            quota: Quota::Bucket { rate: 10.0, burst: 5 },
            tokens,
            latency: Latency { from: Duration::from_millis(5), to: Duration::from_millis(50) },
            shares: Shares::NONE,
            ..Options::default()
        };
        let simulator = simulate::start(options, Clock::System).await.unwrap();
        let source = SourceName::new("ali1688").unwrap();
        let topics = topics(what, &source, 8).await;
        let results = topics.results();
        let prefix = unique("tokens");
        let sections = format!(
            "[redis]\nurl = \"{}\"\n[quota]\nstore = \"redis\"\njitter = \"10ms\"\nprefix = \"{prefix}\"\n[tokens]\nstore = \"redis\"\n\
             [retry]\nbase = \"100ms\"\n[log]\nfilter = \"info,weir=debug\"\n",
            address("WEIR_TEST_REDIS")
        );
        let source_keys = format!(
            "limit = {{ calls = 10, per = \"1s\", burst = 5 }}\nauthorise_url = \"{}/oauth/authorize\"\n",
            simulator.url()
        );
        let group = unique("group");
        let installation =
            Installation::new(&simulator, &file, results.trim_end_matches(".results"), &group, &sections)
                .with(&source_keys, ("WEIR_TOKENS__KEY", KEY));
        Self {
            simulator,
            installation,
            requests: topics.requests(&source),
            ends: Follower::of(&[topics.results(), topics.dead()]).await,
            topics,
            ids: Box::new(simulate::sample(13)),
            asked: 0,
            prefix,
            accounts: file,
            _folder: folder,
        }
    }

    async fn ask(&mut self, count: usize) {
        let ids: Vec<String> = self.ids.by_ref().take(count).map(|id| id.to_string()).collect();
        self.asked += ids.len();
        produce(&self.requests, ids).await;
    }

    async fn ask_and_wait(&mut self, count: usize) {
        self.ask(count).await;
        self.ends.read_until(self.asked).await;
    }

    /// How many results came from this account, of those after the first `from`.
    fn served_by(&self, alias: &str, from: usize) -> usize {
        self.ends.seen[from..].iter().filter(|seen| seen.json()["account"] == alias).count()
    }

    /// Each request has exactly one end, and that is a result.
    fn each_ended_once(&self) {
        let mut ends: HashMap<String, Vec<String>> = HashMap::new();
        for seen in &self.ends.seen {
            let json = seen.json();
            let end = json["status"].as_str().or(json["reason"].as_str()).unwrap().to_owned();
            ends.entry(json["request_id"].as_str().unwrap().to_owned()).or_default().push(end);
        }
        let wrong: Vec<_> = ends.iter().filter(|(_, ends)| **ends != ["found"]).take(5).collect();
        assert!(wrong.is_empty(), "{wrong:?} on {}", self.topics.results());
        assert_eq!(ends.len(), self.asked);
    }

    /// No log has a secret in it, and Redis none that can be read.
    async fn nothing_leaked(&self, processes: &[&Process]) {
        let secrets = self.simulator.secrets();
        assert!(secrets.len() > 3);
        let client = redis::Client::open(address("WEIR_TEST_REDIS")).unwrap();
        let mut connection = client.get_multiplexed_async_connection().await.unwrap();
        let key = format!("{}:tokens:{{ali1688}}", self.prefix);
        let kept: HashMap<String, String> = redis::cmd("HGETALL").arg(key).query_async(&mut connection).await.unwrap();
        assert!(!kept.is_empty());
        let texts = processes.iter().map(|process| process.log()).chain([format!("{kept:?}")]);
        for text in texts {
            for secret in secrets.iter().map(String::as_str).chain([KEY]) {
                assert!(!text.contains(secret), "{secret} in {} bytes", text.len());
            }
        }
    }

    /// The user opens the link that weir prints, and agrees; what weir says to the code.
    async fn authorise(&self, alias: &str) -> String {
        let command = ["account", "authorise", "ali1688", alias, "--redirect-uri", "http://shop.example/back?a=b"];
        let link = self.installation.run(&command).await;
        let browser = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).build().unwrap();
        let sent_on = browser.get(link.trim()).send().await.unwrap();
        let location = sent_on.headers()["location"].to_str().unwrap().to_owned();
        let code = location.split("code=").nth(1).unwrap().split('&').next().unwrap().to_owned();
        self.installation.run(&[&command[..], &["--code", &code]].concat()).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processes_renew_each_token_once_and_outlive_a_revocation() {
    let rules = TokenRules { life: Some(Duration::from_secs(6)), rotation: true };
    let mut scene = Scene::new("renew", 8, rules).await;
    let one = scene.installation.start("one", ROLES);
    let two = scene.installation.start("two", ROLES);
    one.says("assigned ").await;
    two.says("assigned ").await;

    let since = Instant::now();
    scene.ask_and_wait(1_200).await;
    let stats = scene.simulator.stats();
    let seconds = since.elapsed().as_secs();
    // A token is renewed after 4.4 s at the earliest; the configured ones once more when they are first refused.
    let most = 8 * (seconds / 4 + 2);
    println!(
        "{seconds} s, {} renewals, {} early, {} refused",
        stats.renewals, stats.renewals_early, stats.unauthorised
    );
    assert_eq!((stats.violations, stats.renewals_early), (0, 0), "{stats:?}");
    assert!((16..=most).contains(&stats.renewals), "{stats:?}");
    scene.each_ended_once();

    assert!(scene.simulator.revoke("sim-0001"));
    scene.ask_and_wait(300).await;
    let needed = "weir account authorise ali1688 sim-0001";
    one.says(needed).await;
    two.says(needed).await;
    let before = scene.asked;
    scene.ask_and_wait(300).await;
    assert_eq!(scene.served_by("sim-0001", before), 0, "the others carry its load");
    assert!(scene.installation.run(&["account", "list"]).await.contains("refused at"));

    let said = scene.authorise("sim-0001").await;
    assert!(said.contains("is authorised"), "{said}");
    one.says("account enabled again").await;
    two.says("account enabled again").await;
    let before = scene.asked;
    eventually("the account calls again, without a restart", async || {
        scene.ask_and_wait(100).await;
        (scene.served_by("sim-0001", before) > 0).then_some(())
    })
    .await;

    scene.each_ended_once();
    let stats = scene.simulator.stats();
    assert_eq!((stats.violations, stats.renewals_early), (0, 0), "{stats:?}");
    scene.nothing_leaked(&[&one, &two]).await;
    assert!(one.stop().await.success() && two.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_kill_the_stored_token_is_used() {
    let rules = TokenRules { life: Some(Duration::from_secs(3_600)), rotation: true };
    let mut scene = Scene::new("keep", 2, rules).await;
    // The configured access tokens are dead, and after the first renewal the refresh tokens too.
    let text = std::fs::read_to_string(&scene.accounts).unwrap();
    let stale =
        |line: &str| if line.starts_with("access_token") { "access_token = \"stale-0815\"" } else { line }.to_owned();
    std::fs::write(&scene.accounts, text.lines().map(stale).collect::<Vec<_>>().join("\n")).unwrap();

    let process = scene.installation.start("only", ROLES);
    scene.ask_and_wait(60).await;
    let stats = scene.simulator.stats();
    // Each renewed once: this one is early by the gateway's reckoning, since the token before it had not expired.
    assert_eq!(stats.renewals, 2, "{stats:?}");
    process.kill();

    let process = scene.installation.start("only", ROLES);
    scene.ask_and_wait(60).await;
    let after = scene.simulator.stats();
    assert_eq!((after.renewals, after.unauthorised), (2, stats.unauthorised), "{after:?}");
    scene.each_ended_once();
    scene.nothing_leaked(&[&process]).await;
    let listed = scene.installation.run(&["account", "list"]).await;
    assert_eq!(listed.matches("valid until").count(), 2, "{listed}");
    let tested = scene.installation.run(&["account", "test", "ali1688", "sim-0002"]).await;
    assert!(tested.starts_with("ok: ali1688 accepts"), "{tested}");
    assert!(process.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_that_is_corrected_in_the_file_of_accounts_is_taken_by_running_roles_before_a_resume() {
    let mut scene = Scene::new("corrected", 1, TokenRules::default()).await;
    let right = std::fs::read_to_string(&scene.accounts).unwrap();
    let secret = right.lines().find(|line| line.starts_with("app_secret")).unwrap();
    let wrong = "app_secret = \"mistyped-4711\"";
    std::fs::write(&scene.accounts, right.replace(secret, wrong)).unwrap();
    let (one, two) = (scene.installation.start("one", ROLES), scene.installation.start("two", ROLES));
    two.says("fetching").await;
    scene.ask(20).await;
    let refusals = || [one.log(), two.log()].iter().map(|log| log.matches("disabled until").count()).sum::<usize>();
    eventually("the account is refused", async || (refusals() > 0).then_some(())).await;
    // Half of it, as an editor leaves it while it writes.
    let half = &right[..right.find(secret).unwrap() + secret.len() - 3];
    std::fs::write(&scene.accounts, half).unwrap();
    one.says("changed credentials are not taken over").await;
    let (resume, before) = (["quota", "resume", "ali1688", "sim-0001"], refusals());
    scene.installation.run(&resume).await;
    eventually("it calls with the old secret, and is refused", async || (refusals() > before).then_some(())).await;
    let stats = scene.simulator.stats();
    assert_eq!((stats.found, stats.absent, stats.off_shelf), (0, 0, 0));
    std::fs::write(&scene.accounts, &right).unwrap();
    scene.installation.run(&resume).await;
    scene.ends.read_until(scene.asked).await;
    scene.each_ended_once();
    one.says("its corrected credentials are used").await;
    two.says("its corrected credentials are used").await;
    for log in [one.log(), two.log()] {
        let secrets = scene.simulator.secrets();
        let shown = secrets.iter().map(String::as_str).chain(["mistyped"]).find(|secret| log.contains(secret));
        assert_eq!(shown, None);
    }
    assert!(one.stop().await.success() && two.stop().await.success());
}
