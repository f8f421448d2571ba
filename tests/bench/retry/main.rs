//! What retry costs and how punctual it is, each figure beside the floor of the same run.

#![allow(missing_docs, dead_code, reason = "a benchmark, which shares files with another that uses more of them")]
#![allow(clippy::print_stdout, reason = "its table is for people")]
#![allow(clippy::disallowed_methods, reason = "it measures real time, and its servers come from the environment")]

mod floor;
#[path = "../log.rs"]
mod log;
#[path = "../machine.rs"]
mod machine;
mod measure;
#[path = "../process.rs"]
mod process;
mod scene;
#[path = "../table.rs"]
mod table;

use anyhow::Result;
use clap::Parser;

use self::{measure::Measurement, process::Bench, scene::Scene};

/// Measures `weir retry` on a real broker: memory and start with a crowd that waits, how fast due requests leave, and
/// how late.
#[derive(Parser)]
#[command(name = "deploy/local/bench retry")]
struct Options {
    /// How many failed requests wait meanwhile.
    #[arg(long, default_value_t = 1_000_000, value_name = "COUNT")]
    waiting: usize,
    /// How many become due at one moment.
    #[arg(long, default_value_t = 100_000, value_name = "COUNT")]
    due: usize,
    /// For how many seconds requests fail that are to come again after 1 s, 5 s and 30 s.
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    punctual: u64,
    /// A tenth of everything: to see that it works, not for figures.
    #[arg(long)]
    quick: bool,
    /// Whatever cargo says to a benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let scaled = |full: usize| if options.quick { (full / 10).max(1) } else { full };
    table::measured(async |table| {
        let bench = Bench::new()?;
        let mut scene = Scene::new(&bench).await?;
        let mut measurement = Measurement::start(&bench, &mut scene, table)?;
        measurement.crowd(scaled(options.waiting)).await?;
        measurement.restart()?;
        measurement.due_at_once(scaled(options.due)).await?;
        measurement.punctuality(if options.quick { 5 } else { options.punctual }).await?;
        measurement.end()?;
        scene.delete().await
    })
}
