//! What one source's trouble costs the others, and what a backlog costs who is in a hurry: deploy/local/bench breaker
//! starts the servers and this.

#![allow(missing_docs, reason = "a benchmark, nobody's library")]
#![allow(dead_code, reason = "it shares files with other benchmarks, and needs less of them")]
#![allow(clippy::print_stdout, reason = "its table is for people")]
#![allow(clippy::disallowed_methods, reason = "it measures real time, and its servers come from the environment")]
#![allow(clippy::cast_precision_loss, reason = "counts as figures")]

mod express;
mod outage;

#[path = "../log.rs"]
mod log;
#[path = "../machine.rs"]
mod machine;
#[path = "../process.rs"]
mod process;
#[path = "../table.rs"]
mod table;

use std::time::Duration;

use anyhow::Result;
use clap::{Parser, ValueEnum};

use self::process::Bench;

/// Measures how far an outage of one source reaches, how soon it is over, and how long express requests wait.
#[derive(Parser)]
#[command(name = "deploy/local/bench breaker")]
pub struct Options {
    /// How many IDs wait while express requests are made.
    #[arg(long, default_value_t = 100_000, value_name = "COUNT")]
    backlog: usize,
    /// How many workers share the quota.
    #[arg(long, default_value_t = 16, value_name = "COUNT")]
    workers: usize,
    /// Only this.
    #[arg(long, value_enum)]
    only: Option<Part>,
    /// A quarter of the time: to see that it works, not for figures.
    #[arg(long)]
    quick: bool,
    /// Redis, for the quota of several workers; by default the one that deploy/local/bench has started.
    #[arg(long, env = "WEIR_TEST_REDIS")]
    redis: String,
    /// Whatever cargo says to a benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    Outage,
    Express,
}

impl Options {
    fn scaled(&self, full: usize) -> usize {
        if self.quick { (full / 4).max(1) } else { full }
    }

    fn lasting(&self, full: Duration) -> Duration {
        if self.quick { full / 4 } else { full }
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    table::measured(async |table| {
        let bench = Bench::new()?;
        if options.only != Some(Part::Express) {
            outage::measure(&bench, &options, table).await?;
        }
        if options.only != Some(Part::Outage) {
            express::measure(&bench, &options, 1, table).await?;
            express::measure(&bench, &options, options.workers, table).await?;
        }
        Ok(())
    })
}
