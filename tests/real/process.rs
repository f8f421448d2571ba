//! weir as a process of its own, to be killed.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use tempfile::TempDir;
use weir::simulate::Simulator;

use crate::stack::{address, eventually};

/// A folder with a configuration for one source, `ali1688`, at a simulator.
pub struct Installation {
    folder: TempDir,
    config: PathBuf,
    variables: Vec<(String, String)>,
}

impl Installation {
    /// `more` is TOML: further sections, and last the source's own keys.
    pub fn new(simulator: &Simulator, accounts: &Path, prefix: &str, group: &str, more: &str) -> Self {
        Self::on(&address("WEIR_TEST_KAFKA"), simulator, accounts, prefix, group, more)
    }

    /// The same on brokers of one's own.
    pub fn on(brokers: &str, simulator: &Simulator, accounts: &Path, prefix: &str, group: &str, more: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("weir.toml");
        let text = format!(
            r#"
[kafka]
brokers = "{brokers}"
group_prefix = "{group}"

[topics]
prefix = "{prefix}"

[http]
listen = "off"

{more}

[[source]]
name = "ali1688"
kind = "ali1688"
url = "{url}"
unlimited = true
accounts_file = "{accounts}"
# Much fails on purpose: a breaker that opened would only make tests wait.
breaker = {{ failures = 1000, sample = 100000 }}
"#,
            url = simulator.url(),
            accounts = accounts.display(),
        );
        std::fs::write(&config, text).unwrap();
        Self { folder, config, variables: Vec::new() }
    }

    /// The same with a configuration of one's own.
    #[allow(dead_code, reason = "for deploy/local/torture")]
    pub fn of(text: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("weir.toml");
        std::fs::write(&config, text).unwrap();
        Self { folder, config, variables: Vec::new() }
    }

    /// Adds keys of the source, and a variable for every command to come.
    pub fn with(mut self, source_keys: &str, variable: (&str, &str)) -> Self {
        let text = std::fs::read_to_string(&self.config).unwrap() + source_keys;
        std::fs::write(&self.config, text).unwrap();
        self.variables.push((variable.0.to_owned(), variable.1.to_owned()));
        self
    }

    /// `weir <arguments>` with this configuration and nothing of the environment, which names the shared servers.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("WEIR_")) {
            command.env_remove(name);
        }
        command.args(arguments).arg("--config").arg(&self.config);
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs `weir <arguments>` to its end; its standard output.
    pub async fn run(&self, arguments: &[&str]) -> String {
        let output = tokio::process::Command::from(self.command(arguments)).output().await.unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "weir {arguments:?} ended with {}: {errors}", output.status);
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs `weir <arguments>` to its end: its exit code, and all that it printed.
    pub async fn outcome(&self, arguments: &[&str]) -> (i32, String) {
        let mut command = tokio::process::Command::from(self.command(arguments));
        let output = command.stdin(Stdio::null()).output().await.unwrap();
        let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
        (output.status.code().unwrap_or(-1), text)
    }

    /// Runs `weir <arguments>`, as a shell reads them, on a terminal; all that it prints there.
    #[allow(dead_code, reason = "deploy/local/torture shares this file")]
    pub async fn on_a_terminal(&self, arguments: &[&str], (name, value): (&str, &str)) -> String {
        let weir = format!("{} {} --config {}", env!("CARGO_BIN_EXE_weir"), arguments.join(" "), self.config.display());
        let mut command = tokio::process::Command::new("script");
        command.args(["--quiet", "--return", "--command", &weir, "/dev/null"]).stdin(Stdio::null());
        let output = command.env("TERM", "xterm").env(name, value).output().await.unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "weir {arguments:?}: {text}");
        text
    }

    /// A file in its folder.
    pub fn file(&self, name: &str, text: &str) -> String {
        let path = self.folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// The answer to a query as tab-separated text; `None` while ClickHouse is away.
    pub async fn query(&self, sql: &str) -> Option<String> {
        let arguments = ["query", sql, "--format", "TSV"];
        let output = tokio::process::Command::from(self.command(&arguments)).output().await.unwrap();
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
    }

    /// Starts `weir <arguments>` as the instance `name`.
    pub fn start(&self, name: &str, arguments: &[&str]) -> Process {
        let log = self.folder.path().join(format!("{name}.log"));
        let output = File::options().create(true).append(true).open(&log).unwrap();
        let child = self
            .command(arguments)
            .env("WEIR_INSTANCE__NAME", name)
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        Process { child, log }
    }
}

/// A running weir; killed when dropped.
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// kill -9, and nothing else.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    #[allow(dead_code, reason = "for deploy/local/torture")]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill").arg(format!("-{signal}")).arg(self.child.id().to_string()).status().unwrap();
        assert!(status.success());
    }

    pub fn has_ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Asks it to stop, and waits until it has.
    pub async fn stop(mut self) -> ExitStatus {
        self.signal("TERM");
        eventually("the process ends", async || self.has_ended()).await
    }

    /// Waits until its log says something.
    pub async fn says(&self, text: &str) {
        eventually(text, async || self.log().contains(text).then_some(())).await;
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(30).collect();
            eprintln!("the last lines of {}:", self.log.display());
            tail.iter().rev().for_each(|line| eprintln!("  {line}"));
        }
    }
}

/// How long a stopped process has to be stopped until the group and the coordinator have given it up.
pub const BEYOND_ALL_TIMEOUTS: Duration = Duration::from_secs(20);
