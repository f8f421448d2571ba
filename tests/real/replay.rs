//! The past poured again, and the proof that nothing is lost: replay, redrive, verify and batches as a user runs them.

use std::time::Duration;

use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    consumer::{BaseConsumer, CommitMode, Consumer},
};
use serde_json::json;
use tempfile::TempDir;
use weir::{
    kafka::Producer,
    message::SourceName,
    runtime::clock::Clock,
    simulate::{self, Latency, Options, Quota, Shares, Simulator},
    store::{ClickHouseConfig, schema},
    topics::Topics,
};

use crate::{
    process::{Installation, Process},
    stack::{address, eventually, kafka, outgoing, topics, unique},
};

/// 2026-11-20T00:00:00Z
const NOVEMBER: i64 = 1_795_132_800_000;

/// weir with a simulator and a database of its own.
pub struct Scene {
    pub installation: Installation,
    pub topics: Topics,
    pub group: String,
    pub database: String,
    _simulator: Simulator,
    _accounts: TempDir,
}

impl Scene {
    pub async fn new(what: &str, shares: Shares, latency: Duration, more: &str) -> Self {
        let accounts = tempfile::tempdir().unwrap();
        let file = accounts.path().join("accounts.toml");
        let options = Options {
            accounts: 4,
            accounts_file: Some(file.clone()),
            quota: Quota::None,
            latency: Latency { from: latency, to: latency },
            shares,
            ..Options::default()
        };
        let simulator = simulate::start(options, Clock::System).await.unwrap();
        let topics = topics(what, &SourceName::new("ali1688").unwrap(), 2).await;
        let (group, database) = (unique("group"), unique("weir_test").replace('-', "_"));
        schema::apply(&clickhouse(&database)).await.unwrap();
        let url = address("WEIR_TEST_CLICKHOUSE");
        let more = format!("[clickhouse]\nurl = \"{url}\"\ndatabase = \"{database}\"\n{more}");
        let results = topics.results();
        let prefix = results.trim_end_matches(".results");
        let installation = Installation::new(&simulator, &file, prefix, &group, &more);
        Self { installation, topics, group, database, _simulator: simulator, _accounts: accounts }
    }

    /// Asks for these items and waits for their ends.
    pub async fn collect(&self, batch: &str, ids: impl Iterator<Item = u64>) -> (i32, String) {
        let ids: Vec<String> = ids.map(|id| id.to_string()).collect();
        let file = self.installation.file("ids.txt", &ids.join("\n"));
        let arguments = ["enqueue", &file, "--source", "ali1688", "--batch", batch, "--wait"];
        self.installation.outcome(&arguments).await
    }

    pub async fn number(&self, sql: &str) -> u64 {
        let text = self.installation.query(sql).await.expect("ClickHouse answers");
        text.trim().parse().unwrap_or_else(|_| panic!("{sql}: {text:?}"))
    }

    pub async fn execute(&self, sql: &str) {
        self.installation.query(sql).await.unwrap_or_else(|| panic!("refused: {sql}"));
    }

    /// Waits until all of these tables' rows of both databases are the same.
    async fn differing_rows(&self, table: &str, other: &str) -> u64 {
        let own = format!("{}.{table}", self.database);
        let one = format!("SELECT count() FROM (SELECT * FROM {own} EXCEPT SELECT * FROM {other})");
        let two = format!("SELECT count() FROM (SELECT * FROM {other} EXCEPT SELECT * FROM {own})");
        let doubled = format!("SELECT count() - uniqExact(topic, partition, offset) FROM {other}");
        self.number(&one).await + self.number(&two).await + self.number(&doubled).await
    }

    pub async fn expect_clean(&self) {
        // The sink's commit of the last records may still be on its way.
        eventually("verify finds everything", async || {
            let (code, text) = self.installation.outcome(&["verify"]).await;
            (code == 0 && text.contains("all accounted for")).then_some(())
        })
        .await;
    }

    pub fn run(&self) -> Process {
        self.installation.start("only", &["run"])
    }
}

fn clickhouse(database: &str) -> ClickHouseConfig {
    ClickHouseConfig {
        url: address("WEIR_TEST_CLICKHOUSE"),
        database: database.to_owned(),
        ..ClickHouseConfig::default()
    }
}

async fn another_database() -> String {
    let name = unique("weir_other").replace('-', "_");
    schema::apply(&clickhouse(&name)).await.unwrap();
    name
}

/// Says that a group is done with everything up to `offset`, whether it is or not.
pub async fn commit(group: &str, topic: &str, partition: i32, (offset, metadata): (i64, &str)) {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", address("WEIR_TEST_KAFKA"))
        .set("group.id", group)
        .create()
        .unwrap();
    let mut list = TopicPartitionList::new();
    let mut element = list.add_partition(topic, partition);
    element.set_offset(Offset::Offset(offset)).unwrap();
    element.set_metadata(metadata);
    // A member that has just left is one until its session ends.
    eventually("the group takes the offset", async || consumer.commit(&list, CommitMode::Sync).ok()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verify_names_a_missing_row_a_doubled_row_and_a_lost_request_and_replay_mends_the_first() {
    let scene = Scene::new("verify", Shares { absent: 0.1, off_shelf: 0.1, ..Shares::NONE }, Duration::ZERO, "").await;
    let process = scene.run();
    let (code, text) = scene.collect("monday", simulate::sample(5).take(200)).await;
    assert_eq!(code, 0, "{text}");
    scene.expect_clean().await;
    assert!(process.stop().await.success());

    // A request that fetch says it has done, and that came to nothing.
    let requests = scene.topics.requests(&SourceName::new("ali1688").unwrap());
    let placed = Producer::new(&kafka()).unwrap().place(vec![outgoing(&requests, "k", "610000000077")]).await.unwrap();
    let (partition, offset) = placed[0];
    commit(&format!("{}.fetch.ali1688", scene.group), &requests, partition, (offset + 1, "L1:")).await;
    let one = |order: &str| {
        format!(
            "SELECT concat(topic, '/', toString(partition), '/', toString(offset)) FROM observations ORDER BY offset {order}, partition LIMIT 1"
        )
    };
    let missing = scene.installation.query(&one("ASC")).await.unwrap().trim().to_owned();
    let doubled = scene.installation.query(&one("DESC")).await.unwrap().trim().to_owned();
    let is = |name: &str| {
        let mut parts = name.rsplit('/');
        let (offset, partition) = (parts.next().unwrap(), parts.next().unwrap());
        format!("partition = {partition} AND offset = {offset}")
    };
    scene.execute(&format!("ALTER TABLE observations DELETE WHERE {} SETTINGS mutations_sync = 2", is(&missing))).await;
    scene
        .execute(&format!(
            "INSERT INTO observations SELECT * FROM observations WHERE {} SETTINGS insert_deduplicate = 0, async_insert = 0",
            is(&doubled)
        ))
        .await;

    // Another record's row in the place of one: as after a topic was made anew, and nothing to be deleted.
    let another = "SELECT concat(topic, '/', toString(partition), '/', toString(offset)) FROM observations \
        ORDER BY offset DESC, partition LIMIT 1 OFFSET 2";
    let another = scene.installation.query(another).await.unwrap().trim().to_owned();
    scene
        .execute(&format!(
            "INSERT INTO observations SELECT * REPLACE (recorded_at - INTERVAL 1 MINUTE AS recorded_at) FROM observations \
             WHERE {} SETTINGS insert_deduplicate = 0, async_insert = 0",
            is(&another)
        ))
        .await;

    let (code, text) = scene.installation.outcome(&["verify"]).await;
    assert_eq!(code, 1, "{text}");
    assert!(text.contains(&format!("      {another} (2 rows)\n")), "{text}");
    assert!(text.contains("must not be deleted"), "{text}");
    let place = |name: &str| {
        let mut parts = name.rsplit('/');
        let (offset, partition) = (parts.next().unwrap(), parts.next().unwrap());
        format!("({partition}, {offset})")
    };
    let advice = text.lines().find(|line| line.contains("DELETE WHERE")).expect(&text);
    assert!(advice.contains(&place(&doubled)) && !advice.contains(&place(&another)), "{advice}");
    assert!(text.contains(&format!("      {missing}\n")), "the missing row {missing}: {text}");
    assert!(text.contains(&format!("      {doubled} (2 rows)\n")), "the doubled row {doubled}: {text}");
    assert!(text.contains("lost: item 610000000077,"), "the lost request: {text}");
    assert!(text.contains("201 requested = ") && text.contains(" + 1 LOST"), "{text}");
    let (code, text) = scene.installation.outcome(&["verify", "--batch", "monday"]).await;
    assert!(code == 1 && text.contains("✓ 200 requested = ") && !text.contains("LOST"), "{text}");

    let (code, text) = scene.installation.outcome(&["replay", "--topic", "results"]).await;
    assert!(code == 64 && text.contains("1 would be inserted") && text.contains("--yes"), "{text}");
    let text = scene.installation.run(&["replay", "--topic", "results", "--yes"]).await;
    assert!(text.contains("1 was inserted"), "{text}");
    let (_, text) = scene.installation.outcome(&["verify"]).await;
    assert!(!text.contains(&format!("      {missing}\n")), "{text}");
}

/// Results as fetch writes them, about a kilobyte each.
pub async fn produce_results(topic: &str, count: usize) {
    let filler = "x".repeat(700);
    let result = |id: usize| {
        json!({"request_id": format!("b/{id}"), "source": "ali1688", "item": id.to_string(), "batch": "b", "status": "found",
            "via": "call", "calls": 1, "requested_at": NOVEMBER, "fetched_at": NOVEMBER + 5, "latency_ms": 9,
            "columns": {"price": "1.5", "title": "cup"}, "fingerprint": "f", "raw": {"id": id, "filler": filler}})
    };
    let producer = Producer::new(&kafka()).unwrap();
    for chunk in (0..count).collect::<Vec<_>>().chunks(5_000) {
        let records = chunk.iter().map(|id| outgoing(topic, &id.to_string(), &result(*id).to_string()));
        producer.send(records.collect()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replays_into_another_database_are_the_live_rows_also_when_killed_and_run_again() {
    const COUNT: usize = 150_000;
    let scene = Scene::new("replay", Shares::NONE, Duration::ZERO, "").await;
    produce_results(&scene.topics.results(), COUNT).await;
    // One record that cannot be read, and one in another topic.
    let broken =
        vec![outgoing(&scene.topics.results(), "k", "{broken"), outgoing(&scene.topics.dead(), "k", "{broken")];
    Producer::new(&kafka()).unwrap().send(broken).await.unwrap();
    let sink = scene.installation.start("only", &["sink"]);
    eventually("the sink has stored them", async || {
        (scene.number("SELECT count() FROM observations").await == COUNT as u64).then_some(())
    })
    .await;
    scene.expect_clean().await;
    assert!(sink.stop().await.success());

    let other = another_database().await;
    let arguments = ["replay", "--topic", "results", "--into", &other, "--yes"];
    let rows = format!("SELECT count() FROM {other}.observations");
    for kill in 0..2 {
        let replay = scene.installation.start(&format!("replay-{kill}"), &arguments);
        let before = scene.number(&rows).await;
        eventually("some rows are there", async || (scene.number(&rows).await > before).then_some(())).await;
        replay.kill();
    }
    assert!(scene.number(&rows).await < COUNT as u64, "killed before the end: else this test shows nothing");
    let (code, text) = scene.installation.outcome(&arguments).await;
    assert!(code == 0 && text.contains("Continuing an interrupted run"), "{text}");
    assert_eq!(scene.differing_rows("observations", &format!("{other}.observations")).await, 0);

    let text = scene.installation.run(&arguments).await;
    assert!(text.contains(" 0 were inserted"), "run twice: {text}");
    assert_eq!(scene.differing_rows("observations", &format!("{other}.observations")).await, 0);
    scene.installation.run(&["replay", "--topic", "dead", "--into", &other, "--yes"]).await;
    assert_eq!(scene.differing_rows("dead_letters", &format!("{other}.dead_letters")).await, 0);

    // A piece: two places of one partition, and nothing else.
    let piece = another_database().await;
    let arguments = ["replay", "--topic", "results", "--into", &piece, "--yes", "--from", "0:100", "--to", "0:102"];
    scene.installation.run(&arguments).await;
    let places = format!("SELECT partition, offset FROM {piece}.observations ORDER BY offset");
    assert_eq!(scene.installation.query(&places).await.unwrap(), "0\t100\n0\t101\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_recipe_for_a_new_column_gives_every_row_its_value() {
    let scene = Scene::new("rebuild", Shares { absent: 0.1, ..Shares::NONE }, Duration::ZERO, "").await;
    let process = scene.run();
    let (code, text) = scene.collect("monday", simulate::sample(6).take(300)).await;
    assert_eq!(code, 0, "{text}");
    assert!(process.stop().await.success());
    let other = another_database().await;
    // The recipe of schemas/README.md, with this test's names; the price was spoilt by a pointer that was wrong.
    let recipe = include_str!("../../schemas/README.md");
    let sql: Vec<&str> = recipe.lines().filter_map(|line| line.trim().strip_prefix("weir query \"")).collect();
    let alter = sql.iter().find(|sql| sql.starts_with("ALTER TABLE rebuilt.")).expect("the recipe adds a column");
    let alter = alter.trim_end_matches('"').replace("rebuilt.", &format!("{other}."));
    scene.execute(&alter).await;
    let spoil = "ALTER TABLE observations UPDATE price = 1, title = '' WHERE 1 SETTINGS mutations_sync = 2";
    let prices = "SELECT sum(cityHash64(item, toString(price), title)) FROM";
    let found = "status = 'found'";
    let before = scene.number(&format!("{prices} observations WHERE {found}")).await;
    scene.execute(spoil).await;
    let arguments = ["replay", "--from-table", "observations", "--into", &other, "--yes"];
    let text = scene.installation.run(&arguments).await;
    assert!(text.contains("300 were inserted"), "{text}");
    let text = scene.installation.run(&arguments).await;
    assert!(text.contains(" 0 were inserted"), "run twice: {text}");
    assert_eq!(
        scene.number(&format!("SELECT count() - uniqExact(topic, partition, offset) FROM {other}.observations")).await,
        0
    );
    let restored = scene.number(&format!("{prices} {other}.observations WHERE {found}")).await;
    assert_eq!(restored, before, "the columns were read anew");
    assert_ne!(
        scene.number(&format!("{prices} observations WHERE {found}")).await,
        before,
        "the live ones were spoilt"
    );
    let units = format!("SELECT count() FROM {other}.observations WHERE {found} AND unit = ''");
    assert_eq!(scene.number(&units).await, 0, "every product has its new column");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redriven_dead_letters_come_to_results_and_are_sent_once() {
    // Whatever fails heals after a call or two, but each has one attempt: it dies first.
    let shares = Shares { failing: 0.3, ..Shares::NONE };
    let scene = Scene::new("redrive", shares, Duration::ZERO, "[retry]\nattempts = 1\n").await;
    let process = scene.run();
    let (code, text) = scene.collect("monday", simulate::sample(8).take(200)).await;
    assert_eq!(code, 0, "{text}");
    let dead = scene.number("SELECT dead FROM batches WHERE batch = 'monday'").await;
    assert!(dead > 10, "{text}");
    let (code, text) = scene.installation.outcome(&["redrive", "--dry-run"]).await;
    assert!(code == 0 && text.contains(&format!("{dead} requests would be sent")), "{text}");
    // At rest, so that nothing dies again meanwhile: each dead letter is sent once, however often this is run.
    assert!(process.stop().await.success());
    let text = scene.installation.run(&["redrive", "--batch", "monday", "--yes"]).await;
    assert!(text.contains(&format!("{dead} requests were sent")), "{text}");
    let again = scene.installation.run(&["redrive", "--yes"]).await;
    assert!(again.starts_with(&format!("0 requests were sent; {dead} have been redriven before")), "{again}");
    let open = scene.number("SELECT under_way + dead FROM batches WHERE batch = 'monday'").await;
    assert_eq!(open, dead, "the sink has not seen them yet");
    let process = scene.run();
    // Counted here, since the sink sees what was sent only a moment later.
    let mut sent = 200 + dead;
    for round in 0..4 {
        if round > 0 {
            let text = scene.installation.run(&["redrive", "--yes"]).await;
            sent +=
                text.split(' ').next().and_then(|count| count.parse::<u64>().ok()).unwrap_or_else(|| panic!("{text}"));
        }
        eventually("all have their end", async || {
            let open = scene.number("SELECT under_way FROM batches WHERE batch = 'monday'").await;
            let asked = scene.number("SELECT count() FROM requests WHERE calls = 0").await;
            let ended = "SELECT (SELECT count() FROM observations) + (SELECT count() FROM dead_letters)";
            (open == 0 && asked == sent && scene.number(ended).await == sent).then_some(())
        })
        .await;
    }
    let progress = "SELECT requested, found, dead, under_way FROM batches WHERE batch = 'monday'";
    assert_eq!(scene.installation.query(progress).await.unwrap(), "200\t200\t0\t0\n");
    scene.expect_clean().await;
    let (_, text) = scene.installation.outcome(&["verify", "--batch", "monday"]).await;
    assert!(text.contains("200 requested = 200 found + 0 absent + 0 off-shelf + 0 dead + 0 under way"), "{text}");
    assert!(process.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_batch_ends_without_being_called_for_and_another_goes_on() {
    let more = "[fetch]\ncalls_in_flight = 4\n";
    let scene = Scene::new("cancel", Shares::NONE, Duration::from_millis(500), more).await;
    let process = scene.run();
    let ids: Vec<String> = simulate::sample(9).take(500).map(|id| id.to_string()).collect();
    let file = scene.installation.file("many.txt", &ids.join("\n"));
    scene.installation.run(&["enqueue", &file, "--source", "ali1688", "--batch", "monday"]).await;
    eventually("some have been called for", async || {
        let found = scene.installation.query("SELECT found FROM batches WHERE batch = 'monday'").await?;
        found.trim().parse::<u64>().ok().filter(|found| *found >= 4)
    })
    .await;
    scene.installation.run(&["batch", "monday", "cancel"]).await;
    let (code, text) = scene.installation.outcome(&["batch", "monday", "--follow"]).await;
    assert!(code == 0 && text.contains("All 500 finished"), "{text}");
    let cancelled = scene.number("SELECT count() FROM dead_letters WHERE reason = 'cancelled'").await;
    assert!(cancelled > 400, "at the pace of the calls it would have taken a minute: {cancelled}");
    let listed = scene.installation.run(&["batch", "monday", "items", "--status", "dead"]).await;
    assert_eq!(listed.lines().count() as u64, cancelled);
    // What comes later under the same name, and under another, is called for.
    for batch in ["monday", "tuesday"] {
        let (code, text) = scene.collect(batch, simulate::sample(10).take(4)).await;
        assert_eq!(code, 0, "{text}");
    }
    assert_eq!(scene.number("SELECT found FROM batches WHERE batch = 'tuesday'").await, 4);
    assert_eq!(scene.number("SELECT dead FROM batches WHERE batch = 'monday'").await, cancelled);
    scene.expect_clean().await;
    assert!(process.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiting_for_a_batch_that_was_there_waits_for_the_new_requests_too() {
    let scene = Scene::new("wait", Shares::NONE, Duration::from_millis(20), "").await;
    let process = scene.run();
    let ids: Vec<u64> = simulate::sample(11).take(150).collect();
    scene.collect("monday", ids[..100].iter().copied()).await;
    let ended = "SELECT found + absent + off_shelf + dead FROM batches WHERE batch = 'monday'";
    assert_eq!(scene.number(ended).await, 100);
    let (code, text) = scene.collect("monday", ids[100..].iter().copied()).await;
    assert_eq!(scene.number(ended).await, 150, "{text}");
    assert!(code == 0 && text.contains("All 150 finished"), "{text}");
    // The same ones once more: each is called for, and counts once.
    let (_, text) = scene.collect("monday", ids[..100].iter().copied()).await;
    assert_eq!(scene.number("SELECT count() FROM observations").await, 250, "{text}");
    assert_eq!(scene.number(ended).await, 150);
    assert!(process.stop().await.success());
}
