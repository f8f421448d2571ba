//! Failures that wait, weir's retry as processes that die, and a reader that counts what comes of it.

use std::{
    collections::HashMap,
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use tempfile::TempDir;
use weir::{
    kafka::{Outgoing, Producer, admin},
    message::{
        Attempt, BatchId, Cancellation, Class, Failure, ItemId, Lane, Request, RequestId, SourceName, envelope::Kind,
    },
    runtime::clock::{Clock, Dice, Timestamp},
    simulate::{self, Options, Simulator},
    topics::{Groups, Topics},
};

use crate::{
    process::{Installation, Process},
    stack::{Follower, Seen, kafka, topics, unique},
};

/// What `weir retry` has to refuse and what to heal.
pub struct Scene {
    pub installation: Installation,
    pub topics: Topics,
    #[allow(dead_code, reason = "for deploy/local/torture")]
    group: String,
    source: SourceName,
    follower: Follower,
    producer: Producer,
    /// When each request is due, in milliseconds since 1970.
    due: HashMap<String, i64>,
    _simulator: Simulator,
    _accounts: TempDir,
}

/// How late requests were sent, in milliseconds, ascending.
#[derive(Default)]
pub struct Lateness(Vec<i64>);

impl Lateness {
    /// So many in a hundred are at most this late.
    pub fn percent(&self, share: usize) -> i64 {
        self.0.get((self.0.len().max(1) - 1) * share / 100).copied().unwrap_or(0)
    }
}

/// What came of all that failed.
pub struct Account {
    pub failed: usize,
    pub lost: usize,
    pub doubled: usize,
    pub early: usize,
    pub lateness: Lateness,
}

impl Account {
    pub fn is_clean(&self) -> bool {
        (self.lost, self.doubled, self.early) == (0, 0, 0)
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { failed, lost, doubled, early, lateness } = self;
        writeln!(f, "{failed} failed: {lost} lost, {doubled} doubled, {early} early")?;
        let [half, most, nearly, all] = [50, 90, 99, 100].map(|share| lateness.percent(share));
        write!(f, "lateness: p50 {half} ms, p90 {most} ms, p99 {nearly} ms, max {all} ms")
    }
}

pub fn now_ms() -> i64 {
    i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

impl Scene {
    pub async fn new(what: &str) -> Self {
        Self::with(what, "").await
    }

    /// `properties` are lines of TOML for every client.
    pub async fn with(what: &str, properties: &str) -> Self {
        let accounts = tempfile::tempdir().unwrap();
        let file = accounts.path().join("accounts.toml");
        let options = Options { accounts: 1, accounts_file: Some(file.clone()), ..Options::default() };
        let simulator = simulate::start(options, Clock::System).await.unwrap();
        let source = SourceName::new("ali1688").unwrap();
        let topics = topics(what, &source, 4).await;
        let results = topics.results();
        let prefix = results.trim_end_matches(".results");
        // Partitions that are added are to be found before the test is over.
        let more = format!(
            "[log]\nfilter = \"info,weir::retry=debug\"\n\
             [kafka.properties]\n\"topic.metadata.refresh.interval.ms\" = \"1000\"\n{properties}"
        );
        let group = unique("group");
        Self {
            installation: Installation::new(&simulator, &file, prefix, &group, &more),
            group,
            follower: Follower::of(&[topics.requests(&source), topics.dead()]).await,
            producer: Producer::new(&kafka()).unwrap(),
            due: HashMap::new(),
            topics,
            source,
            _simulator: simulator,
            _accounts: accounts,
        }
    }

    /// A process that retries.
    pub fn start(&self, name: &str) -> Process {
        self.installation.start(name, &["retry"])
    }

    /// Requests fail now and are due at these times, in milliseconds since 1970.
    pub async fn fail(&mut self, due: impl IntoIterator<Item = i64>) {
        self.fail_of(None, due).await;
    }

    /// The same of a batch.
    pub async fn fail_of(&mut self, batch: Option<&str>, due: impl IntoIterator<Item = i64>) {
        let now = now_ms();
        let mut records = vec![];
        for due in due {
            let id = format!("{:012}", self.due.len());
            records.push(self.failure(&id, batch, now, due));
            self.due.insert(id, due);
        }
        self.producer.send(records).await.unwrap();
    }

    /// `weir batch NAME cancel`, without ClickHouse.
    #[allow(dead_code, reason = "not for deploy/local/torture")]
    pub async fn cancel(&self, batch: &str) {
        let cancelled_at = Timestamp::from_millis(now_ms());
        let cancellation = Cancellation { batch: BatchId::new(batch).unwrap(), cancelled_at };
        let record = Outgoing {
            topic: self.topics.control().into(),
            key: Some(cancellation.key().into()),
            value: serde_json::to_vec(&cancellation).unwrap().into(),
            headers: vec![("ce_type".into(), Kind::Cancellation.ce_type().into())],
        };
        self.producer.send(vec![record]).await.unwrap();
    }

    /// What has come so far.
    #[allow(dead_code, reason = "not for deploy/local/torture")]
    pub fn come(&mut self) -> &[Seen] {
        self.follower.read()
    }

    fn failure(&self, id: &str, batch: Option<&str>, now: i64, due: i64) -> Outgoing {
        let mut request = Request::new(ItemId::new(id).unwrap());
        request.batch = batch.map(|batch| BatchId::new(batch).unwrap());
        request.source = Some(self.source.clone());
        request.requested_at = Some(Timestamp::from_millis(now));
        let attempt = Attempt {
            at: Timestamp::from_millis(now),
            account: None,
            class: Class::Throttled,
            code: "gw.QosAppFrequencyLimit".to_owned(),
            message: "App call exceed the frequency limit".to_owned(),
            http_status: Some(400),
            latency_ms: 5,
            not_before: Some(Timestamp::from_millis(due)),
        };
        let failure = Failure {
            request_id: RequestId::new(id).unwrap(),
            source: self.source.clone(),
            request,
            attempt,
            lane: Lane::Bulk,
        };
        Outgoing {
            topic: self.topics.failures().into(),
            key: Some(Bytes::copy_from_slice(id.as_bytes())),
            value: serde_json::to_vec(&failure).unwrap().into(),
            headers: vec![("ce_type".into(), Kind::Failure.ce_type().into())],
        }
    }

    /// How many failures are still on their topic, transaction markers included.
    #[allow(dead_code, reason = "for deploy/local/torture")]
    pub async fn behind(&self) -> i64 {
        let lags = admin::lag(&kafka(), &Groups::new(&self.group).retry(), &[self.topics.failures()]).await.unwrap();
        lags.iter().map(admin::Lag::behind).sum()
    }

    /// How many have come so far.
    pub fn seen(&mut self) -> usize {
        self.follower.read().len()
    }

    /// Waits until as many have come as have failed and for whatever is doubled, or until `patience` is over.
    pub async fn settle(&mut self, patience: Duration) -> Account {
        let since = tokio::time::Instant::now();
        while self.seen() < self.due.len() && since.elapsed() < patience {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        // Behind the last of them comes what is sent twice: one more goes the whole way.
        self.fail([now_ms() + 1_500]).await;
        let last = format!("{:012}", self.due.len() - 1);
        let is_last = |follower: &Follower| follower.seen.iter().any(|seen| seen.headers.get("ce_id") == Some(&last));
        while !is_last(&self.follower) && since.elapsed() < patience + Duration::from_secs(20) {
            self.seen();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.account()
    }

    fn account(&self) -> Account {
        let mut times: HashMap<&str, usize> = HashMap::new();
        let (mut lateness, mut early) = (vec![], 0);
        for seen in &self.follower.seen {
            let id = seen.headers["ce_id"].as_str();
            *times.entry(id).or_default() += 1;
            let late = seen.at - self.due.get(id).copied().unwrap_or(i64::MAX);
            early += usize::from(late < 0);
            lateness.push(late);
        }
        lateness.sort_unstable();
        Account {
            failed: self.due.len(),
            lost: self.due.keys().filter(|id| !times.contains_key(id.as_str())).count(),
            doubled: times.values().filter(|times| **times > 1).count(),
            early,
            lateness: Lateness(lateness),
        }
    }
}

/// What happens to the processes.
pub struct Torture {
    pub faults: usize,
    pub seed: u64,
    /// Requests that fail between two faults.
    pub failures: usize,
    /// The longest delay; the shortest is 1 s.
    pub delay_max: Duration,
    /// About how long between two faults.
    pub between: Duration,
}

/// Two processes retry what fails all the time, and every few seconds one of them is killed in the middle of it, or
/// asked to stop, and started again under its name.
pub async fn torture(scene: &mut Scene, torture: &Torture) -> Account {
    let dice = Dice::seeded(torture.seed);
    let names = ["one", "two"];
    let mut processes: Vec<Process> = names.iter().map(|name| scene.start(name)).collect();
    for process in &processes {
        process.says("assigned ").await;
    }
    let spread = torture.delay_max.as_secs_f64() * 1_000.0 - 1_000.0;
    for fault in 0..=torture.faults {
        for _ in 0..10 {
            #[allow(clippy::cast_possible_truncation, reason = "milliseconds")]
            let due: Vec<_> =
                (0..torture.failures / 10).map(|_| now_ms() + 1_000 + (spread * dice.fraction()) as i64).collect();
            scene.fail(due).await;
            tokio::time::sleep(torture.between.mul_f64(dice.fraction() / 5.0)).await;
        }
        if fault == torture.faults {
            break;
        }
        let index = usize::from(dice.fraction() < 0.5);
        let process = processes.remove(index);
        if dice.fraction() < 0.8 {
            process.kill();
        } else {
            process.stop().await;
        }
        // Sometimes the group notices, sometimes not.
        tokio::time::sleep(Duration::from_secs(8).mul_f64(dice.fraction().powi(4))).await;
        processes.insert(index, scene.start(names[index]));
    }
    scene.settle(torture.delay_max + Duration::from_secs(60)).await
}
