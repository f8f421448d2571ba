//! `deploy/local/torture brokers`: fetch on three brokers that are killed one after the other, as weir itself is.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::cast_precision_loss,
    reason = "a program for people that fails by panicking"
)]

#[path = "../real/process.rs"]
mod process;
#[path = "../real/stack.rs"]
mod stack;

use std::{
    collections::HashMap,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;
use tempfile::TempDir;
use tokio::{process::Command, time::sleep};
use weir::{
    message::SourceName,
    runtime::clock::{Clock, Dice},
    simulate::{self, Latency, Options, Quota, Shares, Simulator},
    topics::{self, Topics},
};

use self::{
    process::{Installation, Process},
    stack::{Follower, address, produce},
};

/// Kills brokers and weir while ids are called for, and accounts for each of them.
#[derive(Parser)]
#[command(name = "deploy/local/torture brokers", max_term_width = 110)]
struct Args {
    /// What the dice start from; random if not said.
    #[arg(long)]
    seed: Option<u64>,
    /// How many ids.
    #[arg(long, default_value_t = 30_000)]
    ids: usize,
    /// Calls a second.
    #[arg(long, default_value_t = 300)]
    rate: u32,
    /// How often a broker is killed with -9 and started again.
    #[arg(long, default_value_t = 6)]
    broker_kills: usize,
    /// How often weir is.
    #[arg(long, default_value_t = 3)]
    weir_kills: usize,
    /// cargo's own.
    #[arg(long, hide = true)]
    bench: bool,
}

/// So many ids may be answered twice: paid for by a killed process, and not yet committed.
const TWICE_MAX: u64 = 2_500;

/// How long it may take after the last fault until every id has its outcome.
const CATCH_UP: Duration = Duration::from_secs(300);

/// How long a broker is away.
const AWAY: Duration = Duration::from_secs(3);

/// How long before the next fault a broker is back: two of the three have to have all records.
const WHOLE_AGAIN: Duration = Duration::from_secs(6);

struct Scene {
    weir: Installation,
    topics: Topics,
    simulator: Simulator,
    _folder: TempDir,
}

impl Scene {
    async fn new(rate: u32) -> Self {
        const ACCOUNTS: u32 = 10;
        let folder = tempfile::tempdir().unwrap();
        let accounts = folder.path().join("accounts.toml");
        let options = Options {
            accounts: 10,
            accounts_file: Some(accounts.clone()),
            quota: Quota::None,
            latency: Latency { from: Duration::from_millis(20), to: Duration::from_millis(120) },
            shares: Shares::NONE,
            ..Options::default()
        };
        let simulator = simulate::start(options, Clock::System).await.unwrap();
        let config = format!(
            r#"
[kafka]
brokers = "{brokers}"

[topics]
request_partitions = 8
outcome_partitions = 4
replication = 3

[http]
listen = "off"

[[source]]
name = "ali1688"
kind = "ali1688"
url = "{url}"
limit = {{ calls = {calls}, per = "1s", burst = 5 }}
accounts_file = "{accounts}"
"#,
            brokers = address("WEIR_TEST_KAFKA"),
            url = simulator.url(),
            calls = rate / ACCOUNTS,
            accounts = accounts.display(),
        );
        let weir = Installation::of(&config);
        weir.run(&["topics", "apply"]).await;
        Self { weir, topics: Topics::new(topics::Config::default()), simulator, _folder: folder }
    }

    fn start(&self) -> Process {
        self.weir.start("only", &["run", "--role", "fetch,retry"])
    }

    /// Answers of the vendor: more than there are ids is what was paid for twice.
    fn answered(&self) -> u64 {
        self.simulator.stats().found
    }
}

async fn control(action: &str, server: &str) {
    let mut command = Command::new(address("WEIR_TEST_CONTROL"));
    let output = command.args([action, &address("WEIR_TEST_STACK"), server]).output().await.unwrap();
    assert!(output.status.success(), "{action} {server}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Which broker is killed, or weir if none.
fn faults(args: &Args, dice: &Dice) -> Vec<Option<u32>> {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "one of three")]
    let broker = || 1 + (dice.fraction() * 3.0) as u32;
    let brokers = (0..args.broker_kills).map(|_| Some(broker()));
    let mut faults: Vec<_> = brokers.chain((0..args.weir_kills).map(|_| None)).collect();
    let mut order: Vec<(u64, Option<u32>)> =
        faults.drain(..).map(|fault| ((dice.fraction() * 1e9).to_bits(), fault)).collect();
    order.sort_unstable_by_key(|(at, _)| *at);
    order.into_iter().map(|(_, fault)| fault).collect()
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    let seed =
        args.seed.unwrap_or_else(|| u64::from(std::process::id()) ^ Clock::System.now().as_millis().unsigned_abs());
    let dice = Dice::seeded(seed);
    println!("seed {seed}: {} ids at {}/s", args.ids, args.rate);
    let scene = Scene::new(args.rate).await;
    let source = SourceName::new("ali1688").unwrap();
    let topics = &scene.topics;
    let mut follower = Follower::of(&[topics.results(), topics.failures(), topics.dead()]).await;
    let ids: Vec<String> = simulate::sample(seed).take(args.ids).map(|id| id.to_string()).collect();
    produce(&topics.requests(&source), ids.iter().cloned()).await;
    let mut process = scene.start();
    let since = Instant::now();
    follower.read_until(1).await;
    let faults = faults(&args, &dice);
    // Spread over the work, so that each meets calls under way.
    let share = args.ids as f64 / (faults.len() + 1) as f64;
    for (number, fault) in (1_u32..).zip(faults) {
        let due = share * (f64::from(number) - 0.4 + 0.8 * dice.fraction() / 2.0);
        let waiting = Instant::now();
        while (follower.seen.len() as f64) < due && waiting.elapsed() < CATCH_UP {
            follower.read_in_trouble();
            sleep(Duration::from_millis(50)).await;
        }
        let (ended, answered) = (follower.seen.len(), scene.answered());
        let at = since.elapsed().as_secs_f64();
        if let Some(number) = fault {
            println!("{at:>6.1} s: {ended} ended, {answered} answered; kill -9 of broker {number}");
            let broker = format!("kafka-{number}");
            control("kill", &broker).await;
            sleep(AWAY).await;
            control("start", &broker).await;
            sleep(WHOLE_AGAIN).await;
        } else {
            println!("{at:>6.1} s: {ended} ended, {answered} answered; kill -9 of weir");
            process.kill();
            process = scene.start();
        }
    }
    let faults_over = Instant::now();
    while follower.read_in_trouble().len() < args.ids && faults_over.elapsed() < CATCH_UP {
        sleep(Duration::from_millis(100)).await;
    }
    println!("{:>6.1} s: {} ended", since.elapsed().as_secs_f64(), follower.seen.len());
    // What is doubled comes later than the first.
    for _ in 0..50 {
        follower.read_in_trouble();
        sleep(Duration::from_millis(100)).await;
    }
    let log = process.log();
    let begun = log.matches("restarting it from its last commit").count();
    let is_clean = process.stop().await.success();
    let mut ends: HashMap<String, u32> = HashMap::new();
    for seen in &follower.seen {
        *ends.entry(seen.json()["item"].as_str().unwrap_or_default().to_owned()).or_default() += 1;
    }
    let lost = ids.iter().filter(|id| !ends.contains_key(*id)).count();
    let doubled = ends.values().filter(|times| **times > 1).count();
    let twice = scene.answered().saturating_sub(args.ids as u64);
    println!(
        "lost {lost}, doubled {doubled}, answered twice {twice} (at most {TWICE_MAX}); roles began anew {begun} times"
    );
    println!("{}", scene.weir.outcome(&["quota"]).await.1);
    if lost == 0 && doubled == 0 && twice <= TWICE_MAX && is_clean { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
