//! Runs the roles of a process, and restarts each from its last commit when it fails.
//!
//! `roles` is the table of them: what each is called, which consumer group it is in and what it is made of. Here they are
//! started, watched and stopped; `process` is what they share, `fetch` is the wiring of the one that calls vendors,
//! `history` keeps a group that has lost its offsets from doing again what the tables know the ends of.

mod fetch;
mod history;
mod process;
mod roles;

use std::{collections::HashMap, pin::pin, sync::Arc, time::Duration};

use tokio::{
    task::{self, JoinSet},
    time::{Instant, sleep, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

pub use process::{Begin, RunError, descriptors_wanted};
pub use roles::{Role, desk};

use self::{
    process::{Process, RoleError},
    roles::Task,
};
use crate::{
    config::Config,
    runtime::{
        descriptors,
        health::{self, Health, RoleHealth},
    },
    serve,
};

/// How long the first new start of a failed role waits.
const RESTART_FIRST: Duration = Duration::from_secs(1);

/// How long a new start waits at most.
const RESTART_MAX: Duration = Duration::from_secs(30);

/// How long a stop in good order may take in all; supervisors kill after 30 s by default. What hangs then is left where
/// it stands, as if the process had been killed: nothing is lost by that, and nothing doubled.
const STOP_WITHIN: Duration = Duration::from_secs(25);

/// How long connections of both listeners may take to end after all roles have.
const CLOSE_WITHIN: Duration = Duration::from_secs(2);

/// A role that outlived this was well: its next failure counts as the first.
const WELL_AFTER: Duration = Duration::from_secs(60);

/// Runs these roles until `stop`, or until another process takes this one's name. `begin`: where a group begins that has
/// lost its offsets.
///
/// # Errors
/// [`RunError`], a source that cannot be opened, or an address for `/health` that cannot be listened on.
pub async fn run(roles: &[Role], begin: Option<Begin>, config: Config, stop: CancellationToken) -> anyhow::Result<()> {
    let cache = config.open_cache()?;
    let tasks = roles::tasks(roles, &config, &cache)?;
    if let Some(problem) = descriptors::problem(descriptors::raised(), descriptors_wanted(&config)) {
        warn!("{problem}");
    }
    let health = Health::default();
    let mut listeners = Vec::new();
    let mut admin = health::router(health.clone());
    if let Some(desk) = tasks.iter().find_map(Task::desk) {
        let items = serve::http::router(desk, &config.serve);
        match (config.serve.listen, config.http.listen) {
            (Some(address), _) => {
                let listener = health::bind(address, "items", "[serve] listen").await?;
                listeners.push((listener, items.merge(health::liveness())));
            }
            (None, Some(_)) => admin = admin.merge(items),
            (None, None) => return Err(RunError::NowhereToServe.into()),
        }
    }
    if let Some(address) = config.http.listen {
        let what = "/health, /ready and /metrics";
        let listener = health::bind(address, what, "[http] listen (\"off\": nowhere)").await?;
        listeners.push((listener, admin));
    }
    let process = Arc::new(Process::new(config, cache, begin, stop.clone()));
    let (mut roles, mut names) = (JoinSet::new(), HashMap::new());
    for task in tasks {
        let (name, role) = (task.name.clone(), health.role(task.name.clone()));
        names.insert(roles.spawn(supervise(Arc::clone(&process), task, role)).id(), name);
    }
    let mut servers = JoinSet::new();
    for (listener, router) in listeners {
        servers.spawn(health::serve(listener, router, stop.clone()));
    }
    let outcome = all_end(roles, names, &stop).await;
    stop.cancel();
    let until = Instant::now() + CLOSE_WITHIN;
    while let Ok(Some(ended)) = timeout_at(until, servers.join_next()).await {
        ended?;
    }
    outcome
}

/// Waits until all roles have ended, or for [`STOP_WITHIN`] after `stop`. One that ends by an error stops the others.
async fn all_end(
    mut roles: JoinSet<anyhow::Result<()>>,
    mut names: HashMap<task::Id, String>,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let mut outcome = Ok(());
    let mut overdue = pin!(async {
        stop.cancelled().await;
        sleep(STOP_WITHIN).await;
    });
    loop {
        tokio::select! {
            ended = roles.join_next_with_id() => {
                let Some(ended) = ended else { return outcome };
                let (id, ended) = ended?;
                names.remove(&id);
                if let Err(error) = ended {
                    outcome = Err(error);
                    stop.cancel();
                }
            }
            () = &mut overdue => {
                let mut hanging: Vec<String> = names.into_values().collect();
                hanging.sort();
                let roles = hanging.join(", ");
                warn!(roles, "stopped before these roles had finished: a server does not answer; what is not committed is done again at the next start");
                return outcome;
            }
        }
    }
}

/// Runs one role until it is told to stop; an error is only returned when starting again would do harm.
async fn supervise(process: Arc<Process>, task: Task, health: RoleHealth) -> anyhow::Result<()> {
    let mut wait = RESTART_FIRST;
    loop {
        let since = Instant::now();
        let reason = match process.run(&task.work, &health).await {
            Ok(()) => return Ok(()),
            Err(RoleError::Fenced(error)) => {
                health.not_ready("fenced: checking whether another process has this instance's name");
                if process.is_taken(task.group.as_deref()).await {
                    return Err(error.context(format!("{} ends", task.name)));
                }
                format!("{error:#}; but no other process has this instance's name")
            }
            Err(RoleError::Failed(error)) => format!("{error:#}"),
        };
        if since.elapsed() > WELL_AFTER {
            wait = RESTART_FIRST;
        }
        warn!(role = task.name, reason, again_in = ?wait, "role failed; restarting it from its last commit");
        health.not_ready(reason);
        tokio::select! {
            () = process.stop.cancelled() => return Ok(()),
            () = sleep(wait) => {}
        }
        wait = (wait * 2).min(RESTART_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Roles that end so long after the stop, or never.
    fn roles(
        after: &[Option<u64>],
        stop: &CancellationToken,
    ) -> (JoinSet<anyhow::Result<()>>, HashMap<task::Id, String>) {
        let (mut roles, mut names) = (JoinSet::new(), HashMap::new());
        for (number, after) in after.iter().copied().enumerate() {
            let stop = stop.clone();
            let role = async move {
                stop.cancelled().await;
                match after {
                    Some(seconds) => sleep(Duration::from_secs(seconds)).await,
                    None => std::future::pending().await,
                }
                Ok(())
            };
            names.insert(roles.spawn(role).id(), format!("role {number}"));
        }
        (roles, names)
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_ends_within_30_seconds_though_a_role_hangs() {
        for (after, expected) in [(vec![Some(1), Some(12)], 12), (vec![Some(1), None], 25), (vec![], 0)] {
            let stop = CancellationToken::new();
            let (roles, names) = roles(&after, &stop);
            stop.cancel();
            let since = Instant::now();
            all_end(roles, names, &stop).await.unwrap();
            assert_eq!(since.elapsed().as_secs(), expected, "{after:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_role_that_must_not_go_on_stops_the_others_and_is_what_is_reported() {
        let stop = CancellationToken::new();
        let (mut roles, mut names) = roles(&[Some(3), None], &stop);
        names.insert(roles.spawn(async { Err(anyhow::anyhow!("fenced")) }).id(), "fetch/a".to_owned());
        let error = all_end(roles, names, &stop).await.unwrap_err();
        assert_eq!(error.to_string(), "fenced");
    }
}
