//! Credentials that somebody corrects while calls are made with them.
//!
//! The files with secrets are looked at every second; one that has come to rest is read, and so are all at an operator's
//! `resume`, before it lets calls go again. What cannot be read, or is only half written, changes nothing.

use std::{convert::Infallible, sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::{
    sync::Mutex,
    task::spawn_blocking,
    time::{sleep, timeout},
};
use tracing::{info, warn};

use super::keeper::Keeper;
use crate::{
    message::SourceName,
    platform::{
        Source,
        credentials::{Credentials, Stamp},
    },
    quota::{Quota, journal::BeforeResume},
};

/// How often the files are looked at. One that has not changed for so long is no longer being written.
const EVERY: Duration = Duration::from_secs(1);
/// How long reading them may take before calls go on without.
const READ_WITHIN: Duration = Duration::from_secs(5);

/// How a variable of the environment is read.
type Variable = fn(&str) -> Option<String>;

/// Takes over the corrected credentials of one source.
pub struct Corrected {
    source: SourceName,
    credentials: Arc<Credentials>,
    variable: Variable,
    keeper: Arc<Keeper>,
    quota: Arc<dyn Quota>,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    /// How the files looked when they were last read.
    read: Option<Stamp>,
    /// What was last in the way: said once.
    trouble: Option<String>,
}

impl Corrected {
    /// Of the accounts that `keeper` has.
    #[must_use]
    pub fn new(source: &Source, variable: Variable, keeper: Arc<Keeper>, quota: Arc<dyn Quota>) -> Self {
        let credentials = Arc::new(source.credentials.clone());
        Self { source: source.name.clone(), credentials, variable, keeper, quota, seen: Mutex::default() }
    }

    /// Reads the files now, and takes over what has changed in them. What is in the way is said in the log, and nothing
    /// has changed then.
    pub async fn take(&self) {
        let mut seen = self.seen.lock().await;
        let (credentials, variable) = (Arc::clone(&self.credentials), self.variable);
        let read = spawn_blocking(move || {
            let stamp = credentials.stamp();
            (stamp, credentials.read(&variable))
        });
        let source = &self.source;
        let trouble = match timeout(READ_WITHIN, read).await {
            Ok(Ok((stamp, Ok(accounts)))) => match self.keeper.correct(&accounts, &*self.quota).await {
                Ok(changed) => {
                    seen.read = Some(stamp);
                    for alias in changed {
                        info!(%source, account = %alias, "its corrected credentials are used from now on; if the account is disabled, `weir quota resume {source} {alias}` lets it call again");
                    }
                    None
                }
                // With changed tokens nobody may call before the others of the fleet can learn of them.
                Err(error) => Some(error.to_string()),
            },
            Ok(Ok((stamp, Err(error)))) => {
                seen.read = Some(stamp);
                Some(error.to_string())
            }
            Ok(Err(error)) => Some(format!("reading them ended abnormally: {error}")),
            Err(_) => Some(format!("reading them took more than {READ_WITHIN:?}")),
        };
        if let Some(why) = trouble.as_ref().filter(|_| trouble != seen.trouble) {
            warn!(%source, why, "changed credentials are not taken over: calls go on with those from before");
        }
        seen.trouble = trouble;
    }

    /// Takes over what changes in the files, each time that they have come to rest. Never ends.
    pub async fn follow(&self) -> Infallible {
        let mut before = None;
        loop {
            sleep(EVERY).await;
            let credentials = Arc::clone(&self.credentials);
            let Ok(Ok(stamp)) = timeout(READ_WITHIN, spawn_blocking(move || credentials.stamp())).await else {
                continue;
            };
            let is_at_rest = before.as_ref() == Some(&stamp);
            if is_at_rest && self.seen.lock().await.read.as_ref() != Some(&stamp) {
                self.take().await;
            }
            before = Some(stamp);
        }
    }
}

#[async_trait]
impl BeforeResume for Corrected {
    async fn before_resume(&self) {
        self.take().await;
    }
}

#[cfg(test)]
mod tests;
