//! Parse, load the configuration, start the logs, run the command, exit code.

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use weir::{
    cli::{Cli, exit},
    config,
    runtime::{logging, shutdown::Signals},
};

/// Records are allocated by the readers' threads and freed by the writers': glibc keeps what was freed in an arena for
/// each thread. With 60,000 failures waiting, memory of its own (`RssAnon`) is 34 MB with mimalloc, and 32 MB at most and 18 MB
/// half a minute later with jemalloc, which takes minutes to build.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match Cli::try_parse() {
        Ok(cli) => start(cli).unwrap_or_else(|error| exit::report(&error)),
        Err(usage) => exit::usage(&usage),
    }
}

fn start(cli: Cli) -> anyhow::Result<ExitCode> {
    let mut config = if cli.needs_config() { config::load(cli.config_file())? } else { config::Config::default() };
    config.log.format = cli.log_format().unwrap_or(config.log.format);
    logging::start(&config.log, cli.audience(), cli.verbose())
        .map_err(anyhow::Error::msg)
        .context("starting the log")?;
    let runtime = tokio::runtime::Runtime::new().context("starting the threads")?;
    let outcome = runtime.block_on(async {
        let signals = Signals::watch().context("watching for signals")?;
        weir::cli::run(cli, config, signals.stop()).await
    });
    // A thread that waits for a broker or for standard input must not hold up the end.
    runtime.shutdown_background();
    outcome
}
