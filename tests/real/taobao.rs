//! 1688 and Taobao side by side in one process, against their simulated gateways: full batches, and an outage of one.

use std::{collections::HashMap, time::Duration};

use tempfile::TempDir;
use weir::{
    message::SourceName,
    runtime::clock::Clock,
    simulate::{self, Latency, Options, Order, Shares, SideOptions, Simulator},
    topics::Topics,
};

use crate::{
    process::{Installation, Process},
    stack::{Follower, produce, topics, unique},
};

struct Scene {
    simulator: Simulator,
    topics: Topics,
    sources: [SourceName; 2],
    ends: Follower,
    installation: Installation,
    _accounts: TempDir,
}

impl Scene {
    /// `reseller`: whether the second source is the reseller instead of Taobao's own platform.
    async fn new(what: &str, reseller: bool) -> Self {
        let accounts = tempfile::tempdir().unwrap();
        let file = |name: &str| accounts.path().join(name);
        let options = Options {
            accounts: 20,
            accounts_file: Some(file("1688.toml")),
            latency: Latency { from: Duration::from_millis(20), to: Duration::from_millis(60) },
            shares: Shares {
                absent: 0.1,
                off_shelf: 0.1,
                throttled: 0.002,
                failing: 0.02,
                broken: 0.01,
                hopeless: 0.0,
            },
            taobao: SideOptions { accounts_file: Some(file("taobao.toml")), ..SideOptions::of(5) },
            reseller: SideOptions { accounts_file: Some(file("keys.toml")), ..SideOptions::of(5) },
            ..Options::default()
        };
        let simulator = simulate::start(options, Clock::System).await.unwrap();
        let sources = ["ali1688", "taobao"].map(|name| SourceName::new(name).unwrap());
        let topics = topics(what, &sources[0], 4).await;
        let results = topics.results();
        let (kind, path, keys) = if reseller {
            ("taobao_reseller", "/ibrad/taobao/item_get/", "keys.toml")
        } else {
            ("taobao", "/router/rest", "taobao.toml")
        };
        let more = format!(
            "[retry]\nattempts = 100\nbase = \"200ms\"\ncap = \"1s\"\n\n[[source]]\nname = \"taobao\"\nkind = \"{kind}\"\n\
             url = \"{}{path}\"\naccounts_file = \"{}\"\npreset = \"taobao-8-of-10-per-second\"\n",
            simulator.url(),
            file(keys).display()
        );
        let prefix = results.trim_end_matches(".results");
        let installation = Installation::new(&simulator, &file("1688.toml"), prefix, &unique("group"), &more)
            .with("limit = { calls = 10, per = \"1s\", burst = 5 }\n", ("WEIR_QUOTA__JITTER", "100ms"));
        installation.run(&["topics", "apply"]).await;
        let ends = Follower::of(&[topics.results(), topics.dead()]).await;
        Self { simulator, topics, sources, ends, installation, _accounts: accounts }
    }

    fn start(&self) -> [Process; 2] {
        [self.installation.start("fetch", &["fetch"]), self.installation.start("retry", &["retry"])]
    }

    /// Asks for as many items of each source as these say.
    async fn ask(&self, counts: [usize; 2]) {
        for ((source, count), seed) in self.sources.iter().zip(counts).zip([7, 8]) {
            produce(&self.topics.requests(source), simulate::sample(seed).take(count).map(|id| id.to_string())).await;
        }
    }

    /// How often each item has ended, by source and item.
    fn ended(&mut self) -> HashMap<(String, String), u32> {
        let mut ended: HashMap<(String, String), u32> = HashMap::new();
        for seen in self.ends.read() {
            let json = seen.json();
            assert!(json["status"].is_string(), "a dead letter: {json}");
            let text = |name: &str| json[name].as_str().unwrap().to_owned();
            *ended.entry((text("source"), text("item"))).or_default() += 1;
        }
        ended
    }

    fn order(&self, json: &str) {
        self.simulator.order(&serde_json::from_str::<Order>(json).unwrap()).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_vendors_are_collected_with_full_batches_and_no_call_over_a_limit() {
    for reseller in [false, true] {
        let mut scene = Scene::new("both", reseller).await;
        scene.ask([400, 4_000]).await;
        let [fetch, retry] = scene.start();
        scene.ends.read_until(4_400).await;
        let ended = scene.ended();
        assert_eq!(ended.len(), 4_400);
        assert!(ended.values().all(|times| *times == 1));
        assert!(fetch.stop().await.success() && retry.stop().await.success());

        let stats = scene.simulator.stats();
        assert_eq!(stats.violations, 0, "{:?}", stats.gateways);
        let (name, most) = if reseller { ("reseller", 40) } else { ("taobao", 20) };
        let gate = &stats.gateways[name];
        println!("{name}: {gate:?}");
        assert_eq!(gate.items_per_call_max, most);
        // Retries come in small groups.
        assert!(gate.item_calls <= 2 * 4_000 / most, "{gate:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_of_taobao_fails_all_ids_of_its_calls_and_none_of_1688() {
    let mut scene = Scene::new("out", false).await;
    scene.order(r#"{"gateway":"taobao","mode":"outage"}"#);
    scene.ask([300, 1_000]).await;
    let [fetch, retry] = scene.start();
    scene.ends.read_until(300).await;
    assert!(scene.ended().keys().all(|(source, _)| source == "ali1688"), "nothing is absent since nobody answers");
    scene.order(r#"{"gateway":"taobao","mode":"off"}"#);
    scene.ends.read_until(1_300).await;
    let ended = scene.ended();
    assert_eq!((ended.len(), ended.values().max()), (1_300, Some(&1)));
    assert!(fetch.stop().await.success() && retry.stop().await.success());
    assert_eq!(scene.simulator.stats().violations, 0);
}
