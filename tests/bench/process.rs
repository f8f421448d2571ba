//! The processes under test: the simulator and weir's roles, each the release binary.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
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
        self.simulator_of("accounts", options)
    }

    /// The same with its accounts in a file of this name.
    pub fn simulator_of(&self, accounts: &str, options: &str) -> Result<Simulator> {
        let log = self.log(&format!("simulate-{accounts}"));
        let mut child = Command::new(env!("CARGO_BIN_EXE_weir"))
            .args(["simulate", "--listen", "127.0.0.1:0", "--write-accounts"])
            .arg(self.folder.path().join(format!("{accounts}.toml")))
            .args(options.split_whitespace())
            .stdout(Stdio::piped())
            .stderr(File::create(&log)?)
            .spawn()
            .context("starting weir simulate")?;
        let mut line = String::new();
        let output = child.stdout.take().context("the simulator has no output")?;
        let process = Process { child, log };
        let mut output = BufReader::new(output);
        output.read_line(&mut line)?;
        let url =
            line.split_whitespace().find(|word| word.starts_with("http://")).context("weir simulate did not start")?;
        Ok(Simulator { url: url.to_owned(), process, _output: output })
    }

    /// Topics of their own.
    pub async fn topics(&self, what: &str) -> Result<OwnTopics> {
        let partitions = topics::Config::default().request_partitions;
        self.topics_of(what, std::slice::from_ref(&self.source), partitions).await
    }

    /// The same for these sources, with so many partitions of requests.
    pub async fn topics_of(&self, what: &str, sources: &[SourceName], partitions: i32) -> Result<OwnTopics> {
        let prefix = format!("bench-{what}-{}", std::process::id());
        let config =
            topics::Config { prefix: prefix.clone(), request_partitions: partitions, ..topics::Config::default() };
        let topics = Topics::new(config);
        let all = [topics.all(sources), topics.delays()].concat();
        admin::apply(&self.kafka, &all, 1).await?;
        Ok(OwnTopics { topics, prefix, kafka: self.kafka.clone() })
    }

    /// Starts `weir fetch`; `limit` is a line of TOML for the source, or nothing.
    pub fn fetch(&self, simulator: &Simulator, topics: &OwnTopics, limit: &str) -> Result<Process> {
        self.fetch_as("weir", simulator, topics, limit)
    }

    /// The same as the instance `name`; `more` is TOML of the source and what comes after it.
    pub fn fetch_as(&self, name: &str, simulator: &Simulator, topics: &OwnTopics, more: &str) -> Result<Process> {
        let file = self.write(name, topics, &Self::source(&simulator.url, more))?;
        self.start(name, &file, &["fetch"])
    }

    /// Starts `weir fetch` with sources of one's own.
    pub fn fetch_from(&self, topics: &OwnTopics, sources: &str) -> Result<Process> {
        let file = self.write("weir", topics, sources)?;
        self.start("fetch", &file, &["fetch"])
    }

    /// Starts `weir retry`, which calls nobody.
    pub fn retry(&self, topics: &OwnTopics) -> Result<Process> {
        fs::write(self.accounts_file(), "[[account]]\nalias = \"a\"\napp_key = \"1\"\napp_secret = \"s\"\n")?;
        let file = self.write("weir", topics, &Self::source("http://127.0.0.1:9", "unlimited = true"))?;
        self.start("retry", &file, &["retry"])
    }

    fn source(url: &str, limit: &str) -> String {
        format!(
            "[[source]]\nname = \"ali1688\"\nkind = \"ali1688\"\nurl = {url:?}\naccounts_file = \"accounts.toml\"\n{limit}\n",
        )
    }

    /// A configuration for roles that store rows in this database.
    pub fn configure(&self, name: &str, topics: &OwnTopics, database: &str) -> Result<PathBuf> {
        let url =
            std::env::var("WEIR_TEST_CLICKHOUSE").context("WEIR_TEST_CLICKHOUSE is not set: deploy/local/bench")?;
        self.write(name, topics, &format!("[clickhouse]\nurl = {url:?}\ndatabase = {database:?}\n"))
    }

    fn write(&self, name: &str, topics: &OwnTopics, more: &str) -> Result<PathBuf> {
        let (prefix, file) = (&topics.prefix, self.folder.path().join(format!("{name}.toml")));
        let text = format!(
            "[instance]\nname = {name:?}\n[kafka]\nbrokers = {:?}\ngroup_prefix = {prefix:?}\n[topics]\nprefix = {prefix:?}\n\
             [http]\nlisten = \"off\"\n{more}",
            self.kafka.brokers,
        );
        fs::write(&file, text)?;
        Ok(file)
    }

    /// Starts `weir <arguments>`; its log has this name.
    pub fn start(&self, name: &str, config: &Path, arguments: &[&str]) -> Result<Process> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
        command.args(arguments).arg("--config").arg(config);
        // The stack's variables would go before the file.
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("WEIR_")) {
            command.env_remove(name);
        }
        let log = self.log(name);
        let output = File::create(&log)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = command.spawn().with_context(|| format!("starting weir {}", arguments.join(" ")))?;
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

    /// Waits until its log says something.
    pub async fn says(&mut self, text: &str) -> Result<()> {
        let since = std::time::Instant::now();
        while !fs::read_to_string(&self.log)?.contains(text) {
            self.check()?;
            ensure!(since.elapsed() < log::PATIENCE, "{} does not say {text:?}", self.log.display());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Fails if it has ended by itself.
    pub fn check(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("weir ended before its time: {status}\n{}", self.said());
        }
        Ok(())
    }

    /// Whether it has ended, and well; fails if it has ended otherwise.
    pub fn has_ended(&mut self) -> Result<bool> {
        let Some(status) = self.child.try_wait()? else { return Ok(false) };
        ensure!(status.success(), "weir ended with {status}\n{}", self.said());
        Ok(true)
    }

    /// Asks it to stop, and waits until it has.
    pub async fn stop(mut self) -> Result<()> {
        let asked = Command::new("kill").args(["-TERM", &self.pid().to_string()]).status()?;
        ensure!(asked.success(), "cannot ask weir to stop");
        let deadline = Instant::now() + log::PATIENCE;
        while !self.has_ended()? {
            ensure!(Instant::now() < deadline, "weir does not stop");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A running simulator. The pipe stays open: it says more than its address, and ends when nobody can hear it.
pub struct Simulator {
    pub url: String,
    pub process: Process,
    _output: BufReader<ChildStdout>,
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
