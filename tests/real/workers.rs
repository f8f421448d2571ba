//! Workers that call as fast as a quota in Redis lets them, a vendor that judges their calls by arrival, and a Redis of
//! their own to do things to.

#![allow(clippy::print_stdout, reason = "the numbers are part of what the tests are for")]

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{task::JoinSet, time::Instant};
use weir::{
    message::{AccountAlias, SourceName},
    quota::{
        Counting, Lease, Limit, Pacing, Past, Quota,
        plan::{AccountLimits, Limits, Plan},
        redis::Redis,
    },
    runtime::clock::Dice,
    simulate::limiter::{self, Limiter},
};

use crate::stack::{eventually, unique};

const JITTER: Duration = Duration::from_millis(10);

/// A Redis of its own, which a test may treat as it likes.
pub struct Server {
    folder: tempfile::TempDir,
    port: u16,
    process: Child,
}

impl Server {
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let process = Self::spawn(folder.path(), port);
        Self { folder, port, process }
    }

    fn spawn(folder: &std::path::Path, port: u16) -> Child {
        Command::new("redis-server")
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes"])
            .arg("--dir")
            .arg(folder)
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server must be installed")
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.process.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// kill -9, and nothing else.
    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    pub async fn restart(&mut self) {
        self.kill_for(Duration::from_millis(500)).await;
    }

    /// Kills it, and starts it again after a while.
    pub async fn kill_for(&mut self, away: Duration) {
        self.kill();
        tokio::time::sleep(away).await;
        self.process = Self::spawn(self.folder.path(), self.port);
    }

    pub async fn flush(&self) {
        let client = redis::Client::open(self.url()).unwrap();
        let mut connection = client.get_multiplexed_async_connection().await.unwrap();
        redis::cmd("FLUSHALL").exec_async(&mut connection).await.unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// Workers with an endless backlog that share a source's quota.
pub struct Fleet {
    url: String,
    prefix: String,
    limits: Limits,
    /// Calls by account and arrival.
    pub calls: Arc<Mutex<Vec<(usize, Instant)>>>,
    workers: JoinSet<()>,
    pub quotas: Vec<Arc<Redis>>,
    started: Instant,
}

impl Fleet {
    /// 10 accounts of 20/s, and 100/s for all.
    pub fn limits() -> Limits {
        let account = AccountLimits {
            limits: vec![Limit::new(20, Duration::from_secs(1), 5).unwrap()],
            ..AccountLimits::default()
        };
        let source = vec![Limit::new(100, Duration::from_secs(1), 5).unwrap()];
        Limits { accounts: vec![account; 10], source, ..Limits::default() }
    }

    pub fn start(url: &str, limits: Limits, workers: usize) -> Self {
        let mut fleet = Self {
            url: url.to_owned(),
            prefix: unique("test"),
            limits,
            calls: Arc::default(),
            workers: JoinSet::new(),
            quotas: Vec::new(),
            started: Instant::now(),
        };
        for _ in 0..workers {
            fleet.join();
        }
        fleet
    }

    /// The quota of one more worker; somebody has looked: nobody has called before.
    pub fn quota(&self) -> Arc<Redis> {
        self.quota_after(&Past { is_read: true, ..Past::default() })
    }

    /// The same with this past.
    pub fn quota_after(&self, past: &Past) -> Arc<Redis> {
        self.quota_of(&self.limits, past)
    }

    /// The quota of a worker that is configured with other accounts than the fleet.
    pub async fn quota_of_others(&self, limits: &Limits) -> Arc<Redis> {
        let quota = self.quota_of(limits, &Past { is_read: true, ..Past::default() });
        eventually("it is connected", async || (quota.counts().operations > 0).then_some(())).await;
        quota
    }

    fn quota_of(&self, limits: &Limits, past: &Past) -> Arc<Redis> {
        let pacing = Pacing { jitter: JITTER, ..Pacing::default() };
        let aliases: Vec<AccountAlias> =
            (0..limits.accounts.len()).map(|n| AccountAlias::new(format!("a{n}")).unwrap()).collect();
        let source = SourceName::new("ali1688").unwrap();
        Arc::new(
            Redis::new(&self.url, &self.prefix, &source, &aliases.into(), Plan::new(limits, &pacing), past).unwrap(),
        )
    }

    /// One more worker.
    pub fn join(&mut self) -> tokio::task::AbortHandle {
        let quota = self.quota();
        self.quotas.push(Arc::clone(&quota));
        self.work(quota)
    }

    /// One more, which is connected and has nothing to do yet.
    pub async fn idle(&mut self) -> Arc<Redis> {
        let quota = self.quota();
        eventually("a worker that has nothing to do is connected", async || {
            (quota.counts().operations > 0).then_some(())
        })
        .await;
        self.quotas.push(Arc::clone(&quota));
        quota
    }

    /// It has something to do now.
    pub fn work(&mut self, quota: Arc<Redis>) -> tokio::task::AbortHandle {
        self.workers.spawn(work(quota, Arc::clone(&self.calls)))
    }

    /// What the keys of its quota begin with.
    pub fn key(&self) -> String {
        format!("{}:quota:{{ali1688}}", self.prefix)
    }

    pub fn made(&self) -> usize {
        self.calls.lock().unwrap().len()
    }

    pub fn calls_of(&self, account: usize) -> usize {
        self.calls.lock().unwrap().iter().filter(|call| call.0 == account).count()
    }

    /// Waits until calls are made (again), for at most `seconds`.
    pub async fn flows(&self, seconds: u64) {
        let (before, deadline) = (self.made(), Instant::now() + Duration::from_secs(seconds));
        while self.made() < before + 50 {
            assert!(Instant::now() < deadline, "no calls within {seconds} s");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Ends the run and lets the vendor judge it.
    pub async fn judge(mut self, what: &str) -> usize {
        self.workers.shutdown().await;
        let mut calls = std::mem::take(&mut *self.calls.lock().unwrap());
        calls.sort_by_key(|call| call.1);
        let refused = |limits: &[Limit], account: Option<usize>| -> usize {
            let of_limit = |limit: &Limit| {
                let mut vendor = vendor(limit);
                let calls = calls.iter().filter(|call| account.is_none_or(|account| call.0 == account));
                calls.filter(|call| !vendor.admit(call.1 - self.started)).count()
            };
            limits.iter().map(of_limit).sum()
        };
        let accounts = self.limits.accounts.iter().enumerate();
        let refused = accounts.map(|(index, account)| refused(&account.limits, Some(index))).sum::<usize>()
            + refused(&self.limits.source, None);
        let (mut operations, mut discarded, mut leases) = (0, 0, Vec::new());
        for quota in &self.quotas {
            let counts = quota.counts();
            (operations, discarded) = (operations + counts.operations, discarded + counts.discarded);
            leases.extend(counts.leases);
        }
        leases.sort_unstable();
        let p99 = leases.get(leases.len() * 99 / 100);
        println!(
            "{what}: {} calls in {:.1?}, {refused} refused; {operations} operations, {discarded} slots discarded, reserve p50 {:?} p99 {p99:?}",
            calls.len(),
            self.started.elapsed(),
            leases.get(leases.len() / 2),
        );
        assert_eq!(refused, 0, "{what}");
        calls.len()
    }
}

fn vendor(limit: &Limit) -> Limiter {
    let quota = match limit.kind {
        Counting::Bucket => {
            limiter::Quota::Bucket { rate: f64::from(limit.calls) / limit.per.as_secs_f64(), burst: limit.burst }
        }
        Counting::Fixed => limiter::Quota::Fixed { calls: limit.calls, window: *limit.per },
        Counting::Sliding => limiter::Quota::Sliding { calls: limit.calls, window: *limit.per },
    };
    Limiter::new(quota, Duration::ZERO)
}

async fn work(quota: Arc<Redis>, calls: Arc<Mutex<Vec<(usize, Instant)>>>) {
    let dice = Dice::random();
    loop {
        // Nobody waits here, but where somebody does slots are passed on: what is held may be another's.
        quota.hurry(0, 0.5);
        let slots = match quota.lease(64).await {
            Lease::Slots(slots) => slots,
            Lease::NotBefore(at) => {
                tokio::time::sleep_until(at).await;
                continue;
            }
            Lease::Nobody => {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        for slot in slots {
            tokio::time::sleep_until(slot.at).await;
            let now = Instant::now();
            if slot.is_late(now) || quota.is_held(&slot) {
                quota.give_back(vec![slot]).await;
                continue;
            }
            calls.lock().unwrap().push((slot.account, now + JITTER.mul_f64(dice.fraction())));
        }
    }
}
