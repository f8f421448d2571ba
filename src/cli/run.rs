//! `weir run`: the roles of this process, each started again from its last commit when it fails.

mod history;
mod roles;

use std::{collections::HashMap, path::Path, pin::pin, process::ExitCode, sync::Arc, time::Duration};

use tokio::{
    task::{self, JoinSet},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

pub use history::Begin;

use super::{
    check::descriptors_wanted,
    exit::{Ended, Exit},
    get::{self, open_cache},
};
use crate::{
    batches::Webhook,
    cache::Cache,
    config::{self, Config},
    fetch::{CallLimiter, Carry, FetchError},
    kafka::{
        self, GroupConfig, KafkaReader, KafkaWriter, Reach, ReadError, TransactError, admin, client::SESSION_TIMEOUT,
        intake::IntakeError,
    },
    platform::config::{Source, SourceConfig},
    quota::journal::JournalError,
    runtime::{
        clock::{Clock, Dice},
        descriptors,
        health::{self, Health, RoleHealth},
    },
    serve::{self, Desk},
    sink,
    topics::{Groups, Topic, Topics},
};

/// How long the first new start of a failed role waits.
const RESTART_FIRST: Duration = Duration::from_secs(1);

/// How long a new start waits at most.
const RESTART_MAX: Duration = Duration::from_secs(30);

/// How long a stop in good order may take in all; supervisors kill after 30 s by default. What hangs then is left where
/// it stands, as if the process had been killed: nothing is lost by that, and nothing doubled.
const STOP_WITHIN: Duration = Duration::from_secs(25);

/// How long connections of `[http] listen` may take to end after all roles have.
const CLOSE_WITHIN: Duration = Duration::from_secs(2);

/// How long to wait before Kafka is asked for its topics again.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// A role that outlived this was well: its next failure counts as the first.
const WELL_AFTER: Duration = Duration::from_secs(60);

pub(super) const LONG_ABOUT: &str = "\
Run the roles: fetch, retry, changes and sink, together or some of them.

Any number of processes may run the same role: they share the partitions among them. Each needs an [instance] name of \
its own that stays the same over restarts. Ctrl-C, SIGTERM or SIGHUP stops in good order: what is under way is finished and \
committed, within 30 s whatever does not answer; a second signal ends the process at once. The next one begins at the \
last commit.

/health, /ready and /metrics (for Prometheus) answer on [http] listen.";

pub(super) const EXAMPLES: &str = "\
Examples:
  weir run                                         # fetch, retry, changes and sink in one process
  weir run --role fetch,retry                      # without changes and sink
  weir run --role fetch,retry,changes,sink,serve   # and items over HTTP: GET /items/{source}/{id}
  WEIR_INSTANCE__NAME=fetch-2 weir fetch           # a second process that shares the work";

/// `weir run`
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Which roles.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "ROLE", default_value = "fetch,retry,changes,sink")]
    pub role: Vec<Role>,
    /// Where a group begins that has lost its offsets though the tables know that it was at work: without this it stops and
    /// says so. For one start; a group that has its offsets, or has never been at work, goes on as ever.
    #[arg(long, value_enum, value_name = "WHERE")]
    pub from: Option<Begin>,
}

/// A stage that runs until it is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Role {
    /// Calls the vendors.
    Fetch,
    /// Asks again for what failed.
    Retry,
    /// Publishes what has changed of each item.
    Changes,
    /// Writes to ClickHouse.
    Sink,
    /// Answers `GET /items/{source}/{id}` on `[http] listen`.
    Serve,
}

/// Why a role ended.
enum RoleError {
    /// Another process has this one's name: starting again would take it back, and so on for ever.
    Fenced(anyhow::Error),
    /// Start again from the last commit.
    Failed(anyhow::Error),
}

impl From<IntakeError> for RoleError {
    fn from(error: IntakeError) -> Self {
        if error.is_fenced() { Self::Fenced(error.into()) } else { Self::Failed(error.into()) }
    }
}

impl From<FetchError> for RoleError {
    fn from(error: FetchError) -> Self {
        match error {
            FetchError::Intake(error) => error.into(),
            FetchError::Call(error) => Self::Failed(error.into()),
            FetchError::Tokens(error) => Self::Failed(error.into()),
        }
    }
}

impl From<JournalError> for RoleError {
    fn from(error: JournalError) -> Self {
        Self::Failed(error.into())
    }
}

impl From<sink::SinkError> for RoleError {
    fn from(error: sink::SinkError) -> Self {
        let is_fenced = matches!(
            error,
            sink::SinkError::Read(ReadError::Fenced { .. }) | sink::SinkError::Transact(TransactError::Fenced { .. })
        );
        if is_fenced { Self::Fenced(error.into()) } else { Self::Failed(error.into()) }
    }
}

impl From<anyhow::Error> for RoleError {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

/// What one role of this process is about.
enum Task {
    Fetch(Box<Source>, Carry),
    Retry,
    Changes,
    Sink,
    Serve(Arc<Desk>),
    Batches(Option<Webhook>),
}

impl Task {
    /// What logs and `/ready` call it.
    fn name(&self) -> String {
        match self {
            Self::Fetch(source, _) => format!("fetch/{}", source.name),
            Self::Retry => "retry".to_owned(),
            Self::Changes => "changes".to_owned(),
            Self::Sink => "sink".to_owned(),
            Self::Serve(_) => "serve".to_owned(),
            Self::Batches(_) => "batches".to_owned(),
        }
    }
}

/// Everything that the roles share.
struct Process {
    config: Config,
    from: Option<Begin>,
    topics: Topics,
    groups: Groups,
    clock: Clock,
    dice: Dice,
    cache: Cache,
    /// For the calls of all sources.
    limiter: CallLimiter,
    stop: CancellationToken,
}

/// Runs the roles until `stop`, or until another process takes this one's name.
///
/// # Errors
/// A source that cannot be opened, or an address for `/health` that cannot be listened on.
pub async fn run(args: Args, config: Config, stop: CancellationToken) -> anyhow::Result<ExitCode> {
    let mut tasks = tasks(&args.role, &config)?;
    if let Some(problem) = descriptors::problem(descriptors::raised(), descriptors_wanted(&config)) {
        warn!("{problem}");
    }
    let cache = open_cache(&config)?;
    let health = Health::default();
    let listener = match config.http.listen {
        Some(address) => Some(health::bind(address).await?),
        None => None,
    };
    let mut router = health::router(health.clone());
    if args.role.contains(&Role::Serve) {
        if listener.is_none() {
            return Err(Ended::usage("there is nowhere to serve items: [http] listen is \"off\"").into());
        }
        let desk = get::desk(&config, &cache)?;
        router = router.merge(serve::http::router(Arc::clone(&desk), &config.serve));
        tasks.push(Task::Serve(desk));
    }
    let process = Arc::new(Process {
        topics: Topics::new(config.topics.clone()),
        groups: Groups::new(&config.kafka.group_prefix),
        clock: Clock::System,
        dice: Dice::random(),
        cache,
        limiter: CallLimiter::new(config.fetch.calls_in_flight_in_all),
        stop: stop.clone(),
        from: args.from,
        config,
    });
    let (mut roles, mut names) = (JoinSet::new(), HashMap::new());
    for task in tasks {
        let (name, role) = (task.name(), health.role(task.name()));
        names.insert(roles.spawn(supervise(Arc::clone(&process), task, role)).id(), name);
    }
    let mut server = JoinSet::new();
    if let Some(listener) = listener {
        server.spawn(health::serve(listener, router, stop.clone()));
    }
    let outcome = all_end(roles, names, &stop).await;
    stop.cancel();
    while let Ok(Some(ended)) = timeout(CLOSE_WITHIN, server.join_next()).await {
        ended?;
    }
    outcome.map(|()| Exit::Done.into())
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
                warn!(roles, "stopped before these have finished: what they wait for does not answer; what was under way is done again from the last commit");
                return outcome;
            }
        }
    }
}

/// One task per source for fetch, one each for the others.
fn tasks(roles: &[Role], config: &Config) -> anyhow::Result<Vec<Task>> {
    let mut tasks = Vec::new();
    if roles.contains(&Role::Fetch) {
        if config.sources.is_empty() {
            return Err(Ended::usage("there is nothing to fetch: the configuration has no [[source]]").into());
        }
        let folder = config.file.as_deref().and_then(Path::parent).unwrap_or(Path::new("."));
        let open = |source: &SourceConfig| Source::open(source, folder, &config::variable);
        for source in &config.sources {
            tasks.push(Task::Fetch(Box::new(open(source)?), Carry::new(config.fetch.outcomes_limit)));
        }
    }
    if roles.contains(&Role::Retry) {
        tasks.push(Task::Retry);
    }
    if roles.contains(&Role::Changes) {
        tasks.push(Task::Changes);
    }
    if roles.contains(&Role::Sink) {
        tasks.push(Task::Sink);
        let webhook = Webhook::open(&config.batches)?;
        if webhook.is_some() || config.batches.topic {
            tasks.push(Task::Batches(webhook));
        }
    }
    Ok(tasks)
}

/// Runs one role until it is told to stop; an error is only returned when starting again would do harm.
async fn supervise(process: Arc<Process>, task: Task, health: RoleHealth) -> anyhow::Result<()> {
    let name = task.name();
    let mut wait = RESTART_FIRST;
    loop {
        let since = tokio::time::Instant::now();
        let reason = match process.run(&task, &health).await {
            Ok(()) => return Ok(()),
            Err(RoleError::Fenced(error)) => {
                health.not_ready("fenced: looking whether another process has our name");
                if process.is_taken(&task).await {
                    return Err(error.context(format!("{name} ends")));
                }
                format!("{error:#}; but nobody else has our name")
            }
            Err(RoleError::Failed(error)) => format!("{error:#}"),
        };
        if since.elapsed() > WELL_AFTER {
            wait = RESTART_FIRST;
        }
        warn!(role = name, reason, again_in = ?wait, "the role failed and starts again from its last commit");
        health.not_ready(reason);
        tokio::select! {
            () = process.stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(wait) => {}
        }
        wait = (wait * 2).min(RESTART_MAX);
    }
}

impl Process {
    async fn run(&self, task: &Task, health: &RoleHealth) -> Result<(), RoleError> {
        match task {
            Task::Fetch(source, carry) => self.fetch(source, carry, health).await,
            Task::Retry => self.retry(health).await,
            Task::Changes => self.changes(health).await,
            Task::Sink => self.sink(health).await,
            Task::Serve(desk) => self.serve(desk, health).await,
            Task::Batches(webhook) => self.batches(webhook.as_ref(), health).await,
        }
    }

    fn reader(&self, group: String, topics: Vec<Vec<String>>) -> Result<KafkaReader, RoleError> {
        self.reader_of(&self.config.kafka, group, topics)
    }

    fn reader_of(
        &self,
        kafka: &kafka::client::Config,
        group: String,
        topics: Vec<Vec<String>>,
    ) -> Result<KafkaReader, RoleError> {
        KafkaReader::open(kafka, self.group(group, topics)).map_err(|error| IntakeError::from(error).into())
    }

    fn group(&self, group: String, topics: Vec<Vec<String>>) -> GroupConfig {
        let instance = self.member(&group);
        GroupConfig { group, instance, topics, drain: self.config.fetch.drain }
    }

    /// Whether another process is in our place. A broker that restarts can fence a member by its own request
    /// whose answer was lost; so the last word has the group, when a session without us is over.
    async fn is_taken(&self, task: &Task) -> bool {
        let group = match task {
            Task::Fetch(source, _) => self.groups.fetch(&source.name),
            Task::Retry => self.groups.retry(),
            Task::Changes => self.groups.changes(),
            Task::Sink => self.groups.sink(),
            // It is in no group: nobody can take its place.
            Task::Serve(_) => return false,
            Task::Batches(_) => self.groups.batches(),
        };
        let ours_is_over = SESSION_TIMEOUT + Duration::from_secs(3);
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return false,
                () = tokio::time::sleep(ours_is_over) => {}
            }
            match admin::has_member(&self.config.kafka, &group, &self.member(&group)).await {
                Ok(taken) => return taken,
                Err(error) => warn!(%error, "asking who is in the group; asking again"),
            }
        }
    }

    /// Waits until Kafka answers and has these topics; false if the process stops before that.
    async fn topics_are_there(&self, topics: &[Topic], health: &RoleHealth) -> bool {
        health.not_ready(format!("waiting for Kafka at {}", self.config.kafka.brokers));
        loop {
            let described = tokio::select! {
                () = self.stop.cancelled() => return false,
                described = admin::describe(&self.config.kafka) => described,
            };
            match described.map(|present| topics.iter().find(|topic| !present.contains_key(&topic.name))) {
                Ok(None) => return true,
                Ok(Some(missing)) => {
                    health.not_ready(format!("there is no topic {}: run `weir topics apply`", missing.name));
                }
                Err(error) => health.not_ready(error.to_string()),
            }
            tokio::select! {
                () = self.stop.cancelled() => return false,
                () = tokio::time::sleep(LOOK_AGAIN) => {}
            }
        }
    }

    /// Waits until nothing that waits on the delay topics can be lost by their settings; false if the process stops
    /// before that.
    async fn delays_are_fit(&self, health: &RoleHealth) -> bool {
        loop {
            match admin::unfit_delays(&self.config.kafka, &self.topics.delays()).await {
                Ok(None) => return true,
                Ok(Some(what)) => {
                    warn!(what, "retry does not start");
                    health.not_ready(what);
                }
                Err(error) => health.not_ready(error.to_string()),
            }
            tokio::select! {
                () = self.stop.cancelled() => return false,
                () = tokio::time::sleep(LOOK_AGAIN) => {}
            }
        }
    }

    /// The transactional producer of a group's member; `None` if the process stops before a broker answers.
    async fn writer(&self, reach: Reach, health: &RoleHealth) -> Result<Option<KafkaWriter>, RoleError> {
        self.writer_of(&self.config.kafka, reach, health).await
    }

    async fn writer_of(
        &self,
        kafka: &kafka::client::Config,
        reach: Reach,
        health: &RoleHealth,
    ) -> Result<Option<KafkaWriter>, RoleError> {
        health.not_ready("waiting for Kafka to know this process as a producer");
        let name = self.member(&reach.group);
        tokio::select! {
            () = self.stop.cancelled() => Ok(None),
            writer = KafkaWriter::open_for(kafka, &name, reach) => {
                Ok(Some(writer.map_err(|error| RoleError::from(IntakeError::from(error)))?))
            }
        }
    }

    /// The stable name of this process in a group: `group.instance.id` and `transactional.id`.
    fn member(&self, group: &str) -> String {
        format!("{group}.{}", self.config.instance.name)
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
            let since = tokio::time::Instant::now();
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
