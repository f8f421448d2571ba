//! What the cache saves and what it costs: deploy/local/bench cache starts the servers and this.

#![allow(missing_docs, reason = "a benchmark, nobody's library")]
#![allow(dead_code, reason = "it shares files with another benchmark, and needs less of them")]
#![allow(clippy::print_stdout, reason = "its table is for people")]
#![allow(clippy::disallowed_methods, reason = "it measures real time, and its servers come from the environment")]
#![allow(clippy::cast_precision_loss, reason = "counts as figures")]

mod calls;
mod lookups;

#[path = "../log.rs"]
mod log;
#[path = "../machine.rs"]
mod machine;
#[path = "../process.rs"]
mod process;
#[path = "../table.rs"]
mod table;
#[path = "../zipf.rs"]
mod zipf;

use anyhow::Result;
use clap::Parser;

use self::process::Bench;

/// Measures hits, calls and look-ups of the cache against real servers and the simulated gateway.
#[derive(Parser)]
#[command(name = "deploy/local/bench cache")]
pub struct Options {
    /// How many requests are made.
    #[arg(long, default_value_t = 1_000_000, value_name = "COUNT")]
    requests: usize,
    /// For how many items, by Zipf's law with exponent 1.
    #[arg(long, default_value_t = 20_000, value_name = "COUNT")]
    items: usize,
    /// A twentieth of everything: to see that it works, not for figures.
    #[arg(long)]
    quick: bool,
    /// Redis; by default the one that deploy/local/bench has started.
    #[arg(long, env = "WEIR_TEST_REDIS")]
    redis: String,
    /// Whatever cargo says to a benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Options {
    fn scaled(&self, full: usize) -> usize {
        if self.quick { (full / 20).max(1) } else { full }
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    table::measured(async |table| {
        lookups::measure(&options, table).await?;
        let bench = Bench::new()?;
        calls::popular(&bench, &options, table).await?;
        calls::one_key(&bench, &options, 1, table).await?;
        calls::one_key(&bench, &options, 4, table).await
    })
}
