//! A quota slot for the one call of a command, since commands' calls count against the quota too.

use std::time::Duration;

use anyhow::Context;
use secrecy::ExposeSecret;
use tokio::time::{Instant, sleep_until, timeout};

use super::Ended;
use crate::{
    cli::terminal::note,
    config::Config,
    platform::Source,
    quota::{self, Lease, Quota, Store, journal::Journal},
    runtime::clock::Clock,
    topics::Topics,
};

/// How long to wait for a slot of the account.
const PATIENCE: Duration = Duration::from_secs(30);
/// Slots leased at once while looking for it.
const LEASE: usize = 64;

/// Waits until the account may make one call.
pub(super) async fn wait(config: &Config, source: &Source, account: usize) -> anyhow::Result<()> {
    if config.quota.store == Store::Memory {
        note(
            "note: each process counts the quota for itself (quota.store = \"memory\"): if weir is running, this call \
             comes on top of its own",
        );
        return Ok(());
    }
    let aliases = source.accounts.iter().map(|account| account.alias.clone()).collect();
    let redis = config.redis.url.as_ref().map(ExposeSecret::expose_secret);
    let limits = source.quota();
    // A state that Redis has lost would begin anew with this call: it is to know what is spent.
    let topic = Topics::new(config.topics.clone()).quota();
    let journal = Journal::open(&config.kafka, &topic, &source.name, Clock::System)
        .await
        .context("cannot read how much of the shared quota is used")?;
    let quota = quota::open(&config.quota, redis, &source.name, &aliases, &limits, &Clock::System, &journal.past())
        .context("cannot reserve a slot of the shared quota")?;
    match timeout(PATIENCE, take(&*quota, account)).await {
        Ok(true) => Ok(()),
        Ok(false) => Err(Ended::failed("every account of the source is disabled: nothing was called").into()),
        Err(_) => {
            let text = "the shared quota had no slot for this account within 30 s: nothing was called. Is Redis running? Is the account paused?";
            Err(Ended::failed(text).into())
        }
    }
}

/// Takes one slot of the account and returns the others; false if no account may call. A disabled account has no slots
/// and makes no other calls, so one call without a slot, which may repair it, exceeds nothing.
async fn take(quota: &dyn Quota, account: usize) -> bool {
    let is_disabled = || {
        let known = quota.snapshot(account..account + 1, Clock::System.now()).accounts;
        known.first().and_then(|state| state.held.as_ref()).is_some_and(|held| held.until.is_none())
    };
    loop {
        if is_disabled() {
            return true;
        }
        match quota.lease(LEASE).await {
            Lease::Slots(slots) => {
                let (mine, mut others): (Vec<_>, Vec<_>) = slots.into_iter().partition(|slot| slot.account == account);
                let mut mine = mine.into_iter();
                let slot = mine.next();
                others.extend(mine);
                quota.give_back(others).await;
                let Some(slot) = slot else { continue };
                sleep_until(slot.at).await;
                if !slot.is_late(Instant::now()) {
                    return true;
                }
            }
            Lease::NotBefore(at) => sleep_until(at).await,
            Lease::Nobody => return is_disabled(),
        }
    }
}
