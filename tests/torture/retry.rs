//! `deploy/local/torture retry`: the wheel on a real broker while its processes are killed, and with a million waiting.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program for people that fails by panicking"
)]

#[path = "../real/process.rs"]
mod process;
#[path = "../real/stack.rs"]
mod stack;
#[path = "../real/wheel.rs"]
mod wheel;

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;

use self::{
    process::Process,
    wheel::{Account, Scene, Torture, now_ms, torture},
};

/// Kills weir's retry processes while failures with delays from 1 s to 20 s come in, and accounts for each of them.
#[derive(Parser)]
#[command(name = "deploy/local/torture retry", max_term_width = 110)]
struct Args {
    /// How many times a process is killed (or, one in five, stopped) and started again.
    #[arg(long, default_value_t = 20)]
    faults: usize,
    /// What the dice start from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many requests fail between two faults.
    #[arg(long, default_value_t = 1_000)]
    failures: usize,
    /// Instead: so many wait at once; memory, start and throughput are measured.
    #[arg(long, value_name = "COUNT")]
    waiting: Option<usize>,
    /// cargo's own.
    #[arg(long, hide = true)]
    bench: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    let mut scene = Scene::new("torture").await;
    let account = if let Some(count) = args.waiting {
        crowd(&mut scene, count).await
    } else {
        let (faults, seed, failures) = (args.faults, args.seed, args.failures);
        let (delay_max, between) = (Duration::from_secs(20), Duration::from_secs(4));
        torture(&mut scene, &Torture { faults, seed, failures, delay_max, between }).await
    };
    println!("{account}");
    if account.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// So many wait for the same moment: what it takes to hold them, to start with them, and to send them all.
async fn crowd(scene: &mut Scene, count: usize) -> Account {
    // Each hop takes them over once more: time enough that all have come to rest before the start is measured.
    let due = now_ms() + 60_000 + i64::try_from(count / 8).unwrap_or(0);
    let since = Instant::now();
    for from in (0..count).step_by(20_000) {
        scene.fail(vec![due; 20_000.min(count - from)]).await;
    }
    println!("{count} failures written in {:.1} s", since.elapsed().as_secs_f64());
    let process = scene.start("one");
    let since = Instant::now();
    let mut most = 0;
    while scene.behind().await > 16 {
        most = most.max(resident(&process));
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    println!("all on their delay topics after {:.1} s", since.elapsed().as_secs_f64());
    tokio::time::sleep(Duration::from_secs(5)).await;
    println!("resident with {count} waiting: {} MiB, at most {most} MiB on the way", resident(&process));
    let reads = "assigned ";
    let before = process.log().matches(reads).count();
    process.kill();
    let since = Instant::now();
    // Under the same name it writes on in the same log.
    let process = scene.start("one");
    while process.log().matches(reads).count() == before {
        assert!(since.elapsed() < Duration::from_secs(60), "it does not start again");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("started again after kill -9: reads after {:.1} s", since.elapsed().as_secs_f64());
    let mut most = 0;
    while now_ms() < due {
        most = most.max(resident(&process));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let seen = scene.seen();
    let since = Instant::now();
    while scene.seen() < count && since.elapsed() < Duration::from_secs(600) {
        most = most.max(resident(&process));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let took = since.elapsed().as_secs_f64();
    #[allow(clippy::cast_precision_loss, reason = "a rate")]
    let rate = (count - seen) as f64 / took;
    println!("{count} due at one moment: sent in {took:.1} s, {rate:.0}/s; resident at most {most} MiB");
    scene.settle(Duration::from_secs(60)).await
}

/// Memory that a process has in RAM, in MiB.
fn resident(process: &Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1_024
}
