//! `weir run`: some roles, or all, in this process.

use std::process::ExitCode;

use tokio_util::sync::CancellationToken;

use super::exit::Exit;
use crate::{
    config::Config,
    run::{self, Begin, Role},
};

pub(super) const LONG_ABOUT: &str = "\
Run the roles: fetch, retry, changes and sink, together or some of them.

Any number of processes may run the same role: they share the partitions among them. Each needs an [instance] name of \
its own that stays the same over restarts. Ctrl-C, SIGTERM or SIGHUP stops gracefully: work in flight is finished and \
committed, within 30 s even if a server does not answer; a second signal ends the process at once. The next start \
continues from the last commit.

/health, /ready and /metrics (for Prometheus) answer on [http] listen, items on [serve] listen (without one, beside them).";

pub(super) const EXAMPLES: &str = "\
Examples:
  weir run                                         # fetch, retry, changes and sink in one process
  weir run --role fetch,retry                      # without changes and sink
  weir run --role fetch,retry,changes,sink,serve   # and items over HTTP: GET /items/{source}/{id}
  WEIR_INSTANCE__NAME=fetch-2 weir fetch           # a second process that shares the work";

/// `weir run`
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The roles to run.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "ROLE", default_value = "fetch,retry,changes,sink")]
    pub role: Vec<Role>,
    /// Where a consumer group starts that has lost its offsets although the tables hold its work; without this option
    /// it stops with an error. For one start only; groups that have their offsets, and new ones, are not affected.
    #[arg(long, value_enum, value_name = "WHERE")]
    pub from: Option<Begin>,
}

pub(super) async fn run(args: Args, config: Config, stop: CancellationToken) -> anyhow::Result<ExitCode> {
    let Args { role, from } = args;
    run::run(&role, from, config, stop).await.map(|()| Exit::Done.into())
}
