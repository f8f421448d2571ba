//! simulate: the vendors' servers, faithful to their limits and their lies.
//!
//! `aop` (1688's gateway), `top` (Taobao's), `resellers` and `articles` (1688 as the articles have it) decide, `server`
//! talks HTTP; `catalogue` says what the seeded world holds, `limiter` is the vendor's own judgement of the quota,
//! `chaos` makes outages on command.

mod accounts;
mod addresses;
mod aop;
mod articles;
mod catalogue;
mod chaos;
mod dice;
mod gate;
mod gates;
mod goods;
mod ids;
pub mod limiter;
mod meter;
mod options;
mod product;
mod resellers;
mod server;
mod side;
mod sides;
mod stats;
mod top;

use std::{
    io::{self, BufWriter, Write},
    net::SocketAddr,
    path::PathBuf,
};

use anyhow::Context;
use tokio_util::sync::CancellationToken;

pub use self::{
    aop::TokenRules,
    catalogue::Shares,
    chaos::{Mode, Order, OrderError},
    gate::Front,
    ids::sample,
    limiter::Quota,
    meter::Rates,
    options::{Args, Latency, Options},
    server::{Simulator, start},
    sides::SideOptions,
    stats::{AddressReport, Offender, Report},
};
use crate::{message::InvalidId, runtime::clock::Clock};
pub use stats::GatewayReport;

/// Why a simulator does not run.
#[derive(Debug, thiserror::Error)]
pub enum SimulateError {
    /// An option that makes no sense.
    #[error("{option} is {found}; it must be {allowed}")]
    Option {
        /// As on the command line.
        option: &'static str,
        /// What was given.
        found: String,
        /// What is allowed.
        allowed: &'static str,
    },
    /// The address is taken or not this machine's.
    #[error("cannot listen on {address}: {source}; choose another with --listen")]
    Listen {
        /// Where it should have listened.
        address: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
    /// The secrets' file cannot be written.
    #[error("cannot write the accounts to {}: {source}", path.display())]
    AccountsFile {
        /// Which file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The server ended.
    #[error("the server on {address} ended: {source}")]
    Serve {
        /// Where it listened.
        address: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
    /// An account's alias is not valid.
    #[error("cannot name an account: {0}")]
    Alias(#[from] InvalidId),
}

/// Runs `weir simulate` until `stop`, or prints sample ids and returns.
///
/// # Errors
/// [`SimulateError`], or standard output that cannot be written to.
pub async fn run(args: Args, clock: Clock, stop: CancellationToken) -> anyhow::Result<()> {
    if let Some(count) = args.sample_ids() {
        return print_ids(args.seed(), count);
    }
    let mut simulator = start(args.into_options()?, clock).await?;
    announce(&simulator).context("cannot say on standard output where the simulator listens")?;
    tokio::select! {
        biased;
        () = stop.cancelled() => simulator.stop().await?,
        ended = simulator.ended() => ended?,
    }
    Ok(())
}

fn announce(simulator: &Simulator) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let (url, accounts) = (simulator.url(), simulator.accounts().len());
    writeln!(out, "1688 gateway simulated on {url} with {accounts} accounts; counts on {url}/stats")?;
    let (taobao, keys) = (simulator.taobao_accounts().len(), simulator.reseller_keys().len());
    writeln!(
        out,
        "Taobao on {url}/router/rest with {taobao} accounts; resellers on {url}/ibrad/taobao/item_get/ and {url}/taobao/item_get/ with {keys} keys"
    )?;
    out.flush()
}

fn print_ids(seed: u64, count: usize) -> anyhow::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    let written = sample(seed).take(count).try_for_each(|id| writeln!(out, "{id}")).and_then(|()| out.flush());
    match written {
        // `weir simulate ids | head` has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("cannot write the ids to standard output"),
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod vendor_tests;
