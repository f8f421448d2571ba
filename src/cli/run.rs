//! `weir run`: the roles of this process, each under a supervisor, until the process is told to stop.

use std::process::ExitCode;

use tokio_util::sync::CancellationToken;

use super::exit::Ended;
use crate::config::Config;

pub(super) const LONG_ABOUT: &str = "\
Run the roles: fetch, retry and sink, together or some of them.

Any number of processes may run the same role: they share the partitions among them. Each needs an [instance] name of \
its own that stays the same over restarts. Ctrl-C or SIGTERM stops in good order: what is under way is finished and \
committed; a second signal ends the process at once, and the next one begins at the last commit.

/health and /ready answer on [http] listen.";

pub(super) const EXAMPLES: &str = "\
Examples:
  weir run                                   everything in one process
  weir run --role fetch,retry                without the sink
  WEIR_INSTANCE__NAME=fetch-2 weir fetch     a second process that shares the work";

/// `weir run`
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Which roles.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "ROLE", default_value = "fetch,retry,sink")]
    pub role: Vec<Role>,
}

/// A stage that runs until it is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Role {
    /// Calls the vendors.
    Fetch,
    /// Asks again for what failed.
    Retry,
    /// Writes to ClickHouse.
    Sink,
}

/// Runs the roles until `stop`.
///
/// # Errors
/// A role that cannot go on: its error says why, and [`super::exit::exit_of`] has the code.
#[allow(clippy::unused_async, reason = "the roles are wired in next")]
pub async fn run(args: Args, config: Config, stop: CancellationToken) -> anyhow::Result<ExitCode> {
    let _ = (config, stop);
    Err(Ended::failed(format!("not wired yet: {:?}", args.role)).into())
}
