//! What the roles of a process share: the instance's name, Kafka clients, and the checks before a role starts.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::{
    cache::Cache,
    config::Config,
    fetch::{CallLimiter, FetchError},
    kafka::{
        self, GroupConfig, KafkaReader, KafkaWriter, Reach, ReadError, TransactError, admin, client::SESSION_TIMEOUT,
        intake::IntakeError,
    },
    platform::SourceConfig,
    quota::journal::JournalError,
    runtime::{
        clock::{Clock, Dice},
        descriptors,
        health::RoleHealth,
    },
    sink,
    topics::{Groups, Topic, Topics},
};

/// How long to wait before Kafka is asked for its topics again.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// Where a group begins that has lost its offsets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Begin {
    /// At the first record: everything on the topic is processed, and paid for, again.
    Earliest,
    /// At new records: requests on the topic without an outcome stay without one.
    Latest,
}

/// Roles that cannot run as they are configured.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Fetch without a source.
    #[error("there is nothing to fetch: the configuration has no [[source]]")]
    NothingToFetch,
    /// Serve without an address.
    #[error("items cannot be served: [http] listen is \"off\", and there is no [serve] listen; set one of them")]
    NowhereToServe,
}

/// Why a role ended.
pub enum RoleError {
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

/// Everything that the roles share.
pub struct Process {
    pub config: Config,
    pub begin: Option<Begin>,
    pub topics: Topics,
    pub groups: Groups,
    pub clock: Clock,
    pub dice: Dice,
    pub cache: Cache,
    /// For the calls of all sources.
    pub limiter: CallLimiter,
    pub stop: CancellationToken,
}

impl Process {
    /// Connects to nothing yet.
    pub fn new(config: Config, cache: Cache, begin: Option<Begin>, stop: CancellationToken) -> Self {
        Self {
            topics: Topics::new(config.topics.clone()),
            groups: Groups::new(&config.kafka.group_prefix),
            clock: Clock::System,
            dice: Dice::random(),
            cache,
            limiter: CallLimiter::new(config.fetch.calls_in_flight_in_all),
            stop,
            begin,
            config,
        }
    }

    pub fn reader(&self, group: String, topics: Vec<Vec<String>>) -> Result<KafkaReader, RoleError> {
        self.reader_of(&self.config.kafka, group, topics)
    }

    pub fn reader_of(
        &self,
        kafka: &kafka::client::Config,
        group: String,
        topics: Vec<Vec<String>>,
    ) -> Result<KafkaReader, RoleError> {
        KafkaReader::open(kafka, self.group(group, topics)).map_err(|error| IntakeError::from(error).into())
    }

    pub fn group(&self, group: String, topics: Vec<Vec<String>>) -> GroupConfig {
        let instance = self.member(&group);
        GroupConfig { group, instance, topics, drain: self.config.fetch.drain }
    }

    /// Whether another process is in our place. A broker that restarts can fence a member by its own request
    /// whose answer was lost; so the last word has the group, when a session without us is over.
    pub async fn is_taken(&self, group: Option<&str>) -> bool {
        // Without a group nobody can take its place.
        let Some(group) = group else { return false };
        let ours_is_over = SESSION_TIMEOUT + Duration::from_secs(3);
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return false,
                () = tokio::time::sleep(ours_is_over) => {}
            }
            match admin::has_member(&self.config.kafka, group, &self.member(group)).await {
                Ok(taken) => return taken,
                Err(error) => warn!(%error, "cannot list the members of the group; trying again"),
            }
        }
    }

    /// Waits until Kafka answers and has these topics; false if the process stops before that.
    pub async fn topics_are_there(&self, topics: &[Topic], health: &RoleHealth) -> bool {
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
    pub async fn delays_are_fit(&self, health: &RoleHealth) -> bool {
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
    pub async fn writer(&self, reach: Reach, health: &RoleHealth) -> Result<Option<KafkaWriter>, RoleError> {
        self.writer_of(&self.config.kafka, reach, health).await
    }

    pub async fn writer_of(
        &self,
        kafka: &kafka::client::Config,
        reach: Reach,
        health: &RoleHealth,
    ) -> Result<Option<KafkaWriter>, RoleError> {
        health.not_ready("initialising Kafka transactions");
        let name = self.member(&reach.group);
        tokio::select! {
            () = self.stop.cancelled() => Ok(None),
            writer = KafkaWriter::open_for(kafka, &name, reach) => {
                Ok(Some(writer.map_err(|error| RoleError::from(IntakeError::from(error)))?))
            }
        }
    }

    /// The stable name of this process in a group: `group.instance.id` and `transactional.id`.
    pub fn member(&self, group: &str) -> String {
        format!("{group}.{}", self.config.instance.name)
    }
}

/// How many files and connections a process that runs all roles may want at once.
#[must_use]
pub fn descriptors_wanted(config: &Config) -> u64 {
    let fetch = &config.fetch;
    let calls_of = |source: &SourceConfig| {
        let [in_all, per_host] = source.common.in_flight();
        let of_all_addresses = per_host.map(|calls| calls.saturating_mul(source.common.address.len().max(1)));
        in_all.into_iter().chain(of_all_addresses).chain([fetch.calls_in_flight]).min().unwrap_or_default()
    };
    let calls = config.sources.iter().map(calls_of).fold(0, usize::saturating_add).min(fetch.calls_in_flight_in_all);
    // A reader and a writer for each source and each of the other roles.
    let clients = 2 * (config.sources.len() + 4);
    descriptors::wanted(calls as u64, clients as u64)
}
