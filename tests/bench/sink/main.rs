//! What the sink and replay cost, each figure beside the bare libraries in the same run, and how soon a record is a row.

#![allow(missing_docs, reason = "a benchmark, nobody's library")]
#![allow(clippy::print_stdout, reason = "its table is for people")]
#![allow(clippy::disallowed_methods, reason = "it measures real time, and its servers come from the environment")]

mod bare;
mod pour;
mod records;
mod tables;
mod visible;

#[path = "../log.rs"]
#[allow(dead_code, reason = "shared with the other benchmarks, which use the rest")]
mod log;
#[path = "../machine.rs"]
#[allow(dead_code, reason = "shared with the other benchmarks, which use the rest")]
mod machine;
#[path = "../process.rs"]
#[allow(dead_code, reason = "shared with the other benchmarks, which use the rest")]
mod process;
#[path = "../table.rs"]
mod table;

use anyhow::Result;
use clap::{Parser, ValueEnum};

use self::process::Bench;

/// Measures the sink against a real broker and a real ClickHouse: rows a second, CPU per row, and seconds until a
/// record is a row.
#[derive(Parser)]
#[command(name = "deploy/local/bench sink")]
pub struct Options {
    /// How many results of about 1 kB are stored and replayed.
    #[arg(long, default_value_t = 1_000_000, value_name = "COUNT")]
    rows: usize,
    /// How long each load of the latency measurement lasts, in seconds.
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    seconds: u64,
    /// Only these measurements.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "WHAT", default_value = "pour,visible")]
    only: Vec<What>,
    /// A tenth of everything: to see that it works, not for figures.
    #[arg(long)]
    quick: bool,
    /// Whatever cargo says to a benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// The sink and replay at full speed.
    Pour,
    /// The time from a record to its row.
    Visible,
}

fn main() -> Result<()> {
    let mut options = Options::parse();
    if options.quick {
        options.rows = (options.rows / 10).max(1);
        options.seconds = (options.seconds / 6).max(5);
    }
    table::measured(async |table| {
        let bench = Bench::new()?;
        let mut full_speed = None;
        if options.only.contains(&What::Pour) {
            full_speed = Some(pour::measure(&bench, options.rows, table).await?);
        }
        if options.only.contains(&What::Visible) {
            visible::measure(&bench, options.seconds, full_speed, table).await?;
        }
        Ok(())
    })
}
