//! The simulated gateway on threads of its own, and a source that calls it.

use std::path::Path;

use tokio::runtime::{Builder, Runtime};
use weir::{
    platform::{Source, SourceConfig},
    quota::Limit,
    runtime::clock::Clock,
    simulate::{self, Options, Quota, Shares, Simulator},
};

/// What its threads' names begin with.
pub const THREADS: &str = "vendor";

/// A running gateway.
pub struct Vendor {
    pub simulator: Simulator,
    folder: tempfile::TempDir,
    runtime: Runtime,
}

impl Vendor {
    /// Accounts with this limit each, answers after 200 to 500 ms, nothing goes wrong.
    pub fn start(accounts: u32, limit: &Limit) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let runtime = Builder::new_multi_thread().worker_threads(1).thread_name(THREADS).enable_all().build().unwrap();
        let options = Options {
            accounts: usize::try_from(accounts).unwrap(),
            accounts_file: Some(folder.path().join("accounts.toml")),
            quota: Quota::Bucket { rate: f64::from(limit.calls) / limit.per.as_secs_f64(), burst: limit.burst },
            shares: Shares::NONE,
            ..Options::default()
        };
        let simulator = runtime.block_on(simulate::start(options, Clock::System)).unwrap();
        Self { simulator, folder, runtime }
    }

    /// The source as a process of its own would have it: with its own connections.
    pub fn source(&self, limit: &Limit) -> Source {
        let config = serde_json::json!({
            "name": "ali1688", "kind": "ali1688", "url": self.simulator.url(),
            "accounts_file": self.folder.path().join("accounts.toml"), "limit": limit,
        });
        let config: SourceConfig = serde_json::from_value(config).unwrap();
        Source::open(&config, Path::new("/"), &|_| None).unwrap()
    }

    /// Calls that have arrived within the quota since the last reset.
    pub fn admitted(&self) -> u64 {
        self.simulator.stats().addresses.iter().map(|seen| seen.calls - seen.violations).sum()
    }

    pub fn stop(self) {
        self.runtime.block_on(self.simulator.stop()).unwrap();
        self.runtime.shutdown_background();
    }
}
