//! What weir costs, each figure beside the floor of the same run: deploy/local/bench starts the servers and this.

#![allow(missing_docs, reason = "a benchmark, nobody's library")]
#![allow(dead_code, reason = "it shares files with the benchmark of retry, which uses more of them")]
#![allow(clippy::print_stdout, reason = "its table is for people")]
#![allow(clippy::disallowed_methods, reason = "it measures real time, and its servers come from the environment")]

mod floor;
mod log;
mod machine;
mod memory;
#[allow(dead_code, reason = "shared with the other benchmarks, which use the rest")]
mod process;
mod table;
mod throughput;

use anyhow::Result;
use clap::Parser;

use self::process::Bench;

/// Measures throughput, CPU and memory of `weir fetch` against a real broker and the simulated gateway.
#[derive(Parser)]
#[command(name = "deploy/local/bench")]
pub struct Options {
    /// How many IDs are collected for throughput and CPU.
    #[arg(long, default_value_t = 50_000, value_name = "COUNT")]
    ids: usize,
    /// How many IDs wait while memory and the quota are measured.
    #[arg(long, default_value_t = 1_000_000, value_name = "COUNT")]
    waiting: usize,
    /// Leaves out memory and the quota.
    #[arg(long)]
    skip_memory: bool,
    /// A tenth of everything: to see that it works, not for figures.
    #[arg(long)]
    quick: bool,
    /// Whatever cargo says to a benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Options {
    fn scaled(&self, full: usize) -> usize {
        if self.quick { (full / 10).max(1) } else { full }
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    table::measured(async |table| {
        let bench = Bench::new()?;
        throughput::measure(&bench, options.scaled(options.ids), table).await?;
        if !options.skip_memory {
            memory::measure(&bench, options.scaled(options.waiting), table).await?;
        }
        Ok(())
    })
}
