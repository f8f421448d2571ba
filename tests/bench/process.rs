//! The processes under test: the simulator and fetch, each the release binary.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;
use weir::{
    kafka::{admin, client},
    message::SourceName,
    simulate::Report,
    topics::{self, Topics},
};

use crate::{log, machine};

/// What all measurements share.
pub struct Bench {
    pub kafka: client::Config,
    pub http: reqwest::Client,
    pub source: SourceName,
    pub folder: TempDir,
}

impl Bench {
    pub fn new() -> Result<Self> {
        let brokers = std::env::var("WEIR_TEST_KAFKA").context("WEIR_TEST_KAFKA is not set: run deploy/local/bench")?;
        Ok(Self {
            kafka: client::Config { brokers, ..client::Config::default() },
            http: reqwest::Client::builder().no_proxy().build()?,
            source: SourceName::new("ali1688")?,
            folder: tempfile::tempdir()?,
        })
    }

    fn log(&self, of: &str) -> PathBuf {
        self.folder.path().join(format!("{of}.log"))
    }

    pub fn accounts_file(&self) -> PathBuf {
        self.folder.path().join("accounts.toml")
    }

    /// Starts `weir simulate` on a free port.
    pub fn simulator(&self, options: &str) -> Result<Simulator> {
        let log = self.log("simulate");
        let mut child = Command::new(env!("CARGO_BIN_EXE_weir"))
            .args(["simulate", "--listen", "127.0.0.1:0", "--write-accounts"])
            .arg(self.accounts_file())
            .args(options.split_whitespace())
            .stdout(Stdio::piped())
            .stderr(File::create(&log)?)
            .spawn()
            .context("starting weir simulate")?;
        let mut line = String::new();
        let output = child.stdout.take().context("the simulator has no output")?;
        let process = Process { child, log };
        BufReader::new(output).read_line(&mut line)?;
        let url =
            line.split_whitespace().find(|word| word.starts_with("http://")).context("weir simulate did not start")?;
        Ok(Simulator { url: url.to_owned(), process })
    }

    /// Topics of their own.
    pub async fn topics(&self, what: &str) -> Result<OwnTopics> {
        let prefix = format!("bench-{what}-{}", std::process::id());
        let topics = Topics::new(topics::Config { prefix: prefix.clone(), ..topics::Config::default() });
        let all = [topics.all(std::slice::from_ref(&self.source)), topics.delays()].concat();
        admin::apply(&self.kafka, &all, 1).await?;
        Ok(OwnTopics { topics, prefix, kafka: self.kafka.clone() })
    }

    /// Starts `weir fetch`; `limit` is a line of TOML for the source, or nothing.
    pub fn fetch(&self, simulator: &Simulator, topics: &OwnTopics, limit: &str) -> Result<Process> {
        self.start("fetch", &simulator.url, topics, limit)
    }

    /// Starts `weir retry`, which calls nobody.
    pub fn retry(&self, topics: &OwnTopics) -> Result<Process> {
        fs::write(self.accounts_file(), "[[account]]\nalias = \"a\"\napp_key = \"1\"\napp_secret = \"s\"\n")?;
        self.start("retry", "http://127.0.0.1:9", topics, "unlimited = true")
    }

    fn start(&self, role: &str, url: &str, topics: &OwnTopics, limit: &str) -> Result<Process> {
        let (prefix, file) = (&topics.prefix, self.folder.path().join("weir.toml"));
        let text = format!(
            "[instance]\nname = \"bench\"\n[kafka]\nbrokers = {:?}\ngroup_prefix = {prefix:?}\n[topics]\nprefix = {prefix:?}\n\
             [http]\nlisten = \"off\"\n\
             [[source]]\nname = \"ali1688\"\nkind = \"ali1688\"\nurl = {:?}\naccounts_file = \"accounts.toml\"\n{limit}\n",
            self.kafka.brokers, url,
        );
        fs::write(&file, text)?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
        command.arg(role).arg("--config").arg(&file);
        // The stack's variables would go before the file.
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("WEIR_")) {
            command.env_remove(name);
        }
        let log = self.log(role);
        let child = command.stderr(File::create(&log)?).spawn().with_context(|| format!("starting weir {role}"))?;
        Ok(Process { child, log })
    }
}

/// A running weir; killed when dropped.
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn cpu(&self) -> Result<Duration> {
        machine::cpu_of(self.pid())
    }

    /// kill -9.
    pub fn kill(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Fails if it has ended by itself.
    pub fn check(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            bail!("weir ended before its time: {status}\n{log}");
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A running simulator.
pub struct Simulator {
    pub url: String,
    pub process: Process,
}

impl Simulator {
    /// What it has counted.
    pub async fn stats(&self, http: &reqwest::Client) -> Result<Report> {
        let reply = http.get(format!("{}/stats", self.url)).send().await?;
        ensure!(reply.status().is_success(), "the simulator's /stats: {}", reply.status());
        Ok(serde_json::from_slice(&reply.bytes().await?)?)
    }
}

/// Topics that are deleted in the end.
pub struct OwnTopics {
    pub topics: Topics,
    prefix: String,
    kafka: client::Config,
}

impl OwnTopics {
    /// What the names of these topics and their groups begin with.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Deletes them; a run that fails leaves them to the end of the stack.
    pub async fn delete(self) -> Result<()> {
        let all = admin::describe(&self.kafka).await?;
        let own: Vec<&str> = all.keys().map(String::as_str).filter(|name| name.starts_with(&self.prefix)).collect();
        log::delete_topics(&self.kafka.brokers, &own).await
    }
}
