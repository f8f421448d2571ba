//! The table of roles: name, consumer group and parts of each.

use std::{path::Path, sync::Arc};

use super::process::{Process, RoleError, RunError};
use crate::{
    batches::{Batches, Followed, Herald, Webhook},
    cache::Cache,
    cancelled::Cancelled,
    changes::{self, Changes, ChangesParts},
    config::{self, Config},
    fetch::Carry,
    kafka::{
        Instead, KafkaReader, Producer, Reach, ReadError, WriteError, intake::IntakeError, leadership::Leadership,
    },
    message::envelope::Kind,
    platform::config::{Source, SourceConfig},
    retry::{self, Retry},
    runtime::{
        clock::{Clock, Dice},
        health::RoleHealth,
    },
    serve::{Desk, SourceParts},
    sink,
    store::{Store, row::HEADERS},
    topics::{self, Groups, Topics},
};

/// A stage that runs until it is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Role {
    /// Call the vendors.
    Fetch,
    /// Repeat failed requests.
    Retry,
    /// Publish changes of items.
    Changes,
    /// Write to ClickHouse.
    Sink,
    /// Answer `GET /items/{source}/{id}` on `[serve] listen`, or else on `[http] listen`.
    Serve,
}

/// What runs by itself and is started again by itself: a role, or its part for one source.
pub struct Task {
    /// What logs and `/ready` call it.
    pub name: String,
    /// Its consumer group; `None`: it is in none, so that nobody can take its place.
    pub group: Option<String>,
    /// What it does.
    pub work: Work,
}

/// What a task does, with what outlives its new starts.
pub enum Work {
    Fetch(Box<Source>, Carry),
    Retry,
    Changes,
    Sink,
    Batches(Option<Webhook>),
    Serve(Arc<Desk>),
}

impl Task {
    fn new(name: impl Into<String>, group: Option<String>, work: Work) -> Self {
        Self { name: name.into(), group, work }
    }

    /// Whom items are asked from, if this serves them.
    pub fn desk(&self) -> Option<Arc<Desk>> {
        match &self.work {
            Work::Serve(desk) => Some(Arc::clone(desk)),
            Work::Fetch(..) | Work::Retry | Work::Changes | Work::Sink | Work::Batches(_) => None,
        }
    }
}

/// The tasks of these roles: the table.
pub fn tasks(roles: &[Role], config: &Config, cache: &Cache) -> anyhow::Result<Vec<Task>> {
    let (groups, mut tasks) = (Groups::new(&config.kafka.group_prefix), Vec::new());
    let mut ordered = [Role::Fetch, Role::Retry, Role::Changes, Role::Sink, Role::Serve].to_vec();
    ordered.retain(|role| roles.contains(role));
    for role in ordered {
        match role {
            Role::Fetch if config.sources.is_empty() => return Err(RunError::NothingToFetch.into()),
            Role::Fetch => {
                for source in sources(config)? {
                    let (name, group) = (format!("fetch/{}", source.name), groups.fetch(&source.name));
                    let work = Work::Fetch(Box::new(source), Carry::new(config.fetch.outcomes_limit));
                    tasks.push(Task::new(name, Some(group), work));
                }
            }
            Role::Retry => tasks.push(Task::new("retry", Some(groups.retry()), Work::Retry)),
            Role::Changes => tasks.push(Task::new("changes", Some(groups.changes()), Work::Changes)),
            Role::Sink => {
                tasks.push(Task::new("sink", Some(groups.sink()), Work::Sink));
                // Beside the sink, since it is about rows.
                let webhook = Webhook::open(&config.batches)?;
                if webhook.is_some() || config.batches.topic {
                    tasks.push(Task::new("batches", Some(groups.batches()), Work::Batches(webhook)));
                }
            }
            Role::Serve => {
                let desk = Arc::new(desk(config, cache, config.serve.waiting)?);
                tasks.push(Task::new("serve", None, Work::Serve(desk)));
            }
        }
    }
    Ok(tasks)
}

fn sources(config: &Config) -> anyhow::Result<Vec<Source>> {
    let folder = config.file.as_deref().and_then(Path::parent).unwrap_or(Path::new("."));
    let open = |source: &SourceConfig| Source::open(source, folder, &config::variable);
    config.sources.iter().map(|source| Ok(open(source)?)).collect()
}

/// Where items are asked for, by at most `waiting` at once. Connects to nothing yet.
///
/// # Errors
/// Settings of Kafka that no client takes.
pub fn desk(config: &Config, cache: &Cache, waiting: usize) -> anyhow::Result<Desk> {
    let (clock, dice) = (Clock::System, Dice::random());
    let topics = Topics::new(config.topics.clone());
    let parts = |source: &SourceConfig| SourceParts {
        name: source.common.name.clone(),
        topic: topics.express(&source.common.name).into(),
        cache: cache.source(source, &clock, &dice),
    };
    let sources = config.sources.iter().map(parts).collect();
    Ok(Desk::new(sources, topics.clone(), &config.kafka, (clock, dice), waiting)?)
}

impl Process {
    /// Runs a task until the process stops; what it is made of is made anew each time.
    pub async fn run(&self, work: &Work, health: &RoleHealth) -> Result<(), RoleError> {
        match work {
            Work::Fetch(source, carry) => self.fetch(source, carry, health).await,
            Work::Retry => self.retry(health).await,
            Work::Changes => self.changes(health).await,
            Work::Sink => self.sink(health).await,
            Work::Serve(desk) => self.serve(desk, health).await,
            Work::Batches(webhook) => self.batches(webhook.as_ref(), health).await,
        }
    }

    /// The batches that have been cancelled by now, and from now on.
    pub(super) async fn cancelled(&self) -> Result<Cancelled, RoleError> {
        let followed = Cancelled::follow(&self.config.kafka, &self.topics.control()).await;
        followed.map_err(|error| RoleError::Failed(error.into()))
    }

    async fn retry(&self, health: &RoleHealth) -> Result<(), RoleError> {
        let group = self.groups.retry();
        let topics = [self.topics.all(&self.config.source_names()), self.topics.delays()].concat();
        if !self.topics_are_there(&topics, health).await || !self.delays_are_fit(health).await {
            return Ok(());
        }
        let sources = self.config.source_names();
        let requests = sources.iter().flat_map(|source| self.topics.every_request(source));
        let delays = self.topics.delays().into_iter().map(|topic| topic.name);
        let targets = requests.chain(delays).chain([self.topics.dead()]).collect();
        let reach = Reach { group: group.clone(), reads: self.topics.retried(), writes: targets };
        let kafka = retry::frugal(&self.config.kafka);
        let Some(writer) = self.writer_of(&kafka, reach, health).await? else { return Ok(()) };
        if !self.has_its_place((&group, &[self.topics.failures()], Kind::Failure), health).await? {
            return Ok(());
        }
        let cancelled = self.cancelled().await?;
        // What failed and what waits are spread over the workers each by itself.
        let reader = self.reader_of(&kafka, group, vec![vec![self.topics.failures()], self.topics.waiting()])?;
        health.ready();
        let (clock, dice) = (self.clock.clone(), self.dice.clone());
        let retry = Retry::new(reader, writer, sources, &self.topics, self.config.retry.clone(), clock, dice)
            .with_cancellations(cancelled);
        Ok(retry.run(self.stop.clone()).await?)
    }

    async fn changes(&self, health: &RoleHealth) -> Result<(), RoleError> {
        let group = self.groups.changes();
        if !self.topics_are_there(&self.topics.all(&self.config.source_names()), health).await {
            return Ok(());
        }
        let reach = Reach {
            group: group.clone(),
            reads: vec![self.topics.results()],
            writes: vec![self.topics.changes(), self.topics.dead()],
        };
        let Some(writer) = self.writer(reach, health).await? else { return Ok(()) };
        let reader = self.reader(group, vec![vec![self.topics.results()]])?;
        let memory = Store::connect(&self.config.clickhouse).map_err(|error| RoleError::Failed(error.into()))?;
        health.ready();
        let (topic, config) = (self.topics.changes().into(), self.config.changes.clone());
        let instead = Instead::new(self.topics.dead(), changes::WRITER);
        let (clock, dice) = (self.clock.clone(), self.dice.clone());
        let parts = ChangesParts { reader, writer, memory, topic, instead, config, clock, dice };
        Ok(Changes::new(parts).run(self.stop.clone()).await?)
    }

    /// Beside the sink, since it is about rows; in one process of all, since each end is to be told once.
    async fn batches(&self, webhook: Option<&Webhook>, health: &RoleHealth) -> Result<(), RoleError> {
        let topics = self.topics.all(&self.config.source_names());
        if !self.topics_are_there(&topics, health).await {
            return Ok(());
        }
        let leadership = Leadership::new(self.reader(self.groups.batches(), vec![vec![self.topics.control()]])?);
        let store = Store::connect(&self.config.clickhouse).map_err(|error| RoleError::Failed(error.into()))?;
        health.ready();
        let (settle, webhook) = (self.config.batches.settle, webhook.cloned());
        let failed = |error: WriteError| RoleError::Failed(error.into());
        let producer =
            self.config.batches.topic.then(|| Producer::new(&self.config.kafka)).transpose().map_err(failed)?;
        let herald = producer.map(|producer| Herald::new(producer, self.topics.batches().into()));
        let stored = self.topics.rows(&self.config.source_names()).into_iter().map(|topic| topic.name).collect();
        let followed = Followed { kafka: self.config.kafka.clone(), group: self.groups.sink(), topics: stored };
        let (clock, dice, health) = (self.clock.clone(), self.dice.clone(), health.clone());
        let batches = Batches { leadership, store, followed, webhook, herald, settle, clock, dice, health };
        Ok(batches.run(self.stop.clone()).await.map_err(IntakeError::from)?)
    }

    async fn sink(&self, health: &RoleHealth) -> Result<(), RoleError> {
        let topics = self.topics.rows(&self.config.source_names());
        if !self.topics_are_there(&topics, health).await {
            return Ok(());
        }
        let group = self.groups.sink();
        let store = Store::connect(&self.config.clickhouse).map_err(|error| RoleError::Failed(error.into()))?;
        let names: Vec<String> = topics.iter().map(|topic| topic.name.clone()).collect();
        let reach = Reach { group: group.clone(), reads: names.clone(), writes: vec![self.topics.dead()] };
        let Some(writer) = self.writer(reach, health).await? else { return Ok(()) };
        let reader = KafkaReader::open_for(&self.config.kafka, self.group(group, topics::alike(&topics)), &HEADERS);
        let reader = reader.map_err(IntakeError::from)?;
        health.ready();
        let parts = sink::Parts {
            reader,
            writer,
            store,
            topics,
            dead_topic: self.topics.dead().into(),
            clock: self.clock.clone(),
            health: health.clone(),
        };
        sink::run(parts, self.config.sink.clone(), self.stop.clone()).await.map_err(RoleError::from)
    }

    /// Follows the outcomes that item lookups wait for.
    async fn serve(&self, desk: &Desk, health: &RoleHealth) -> Result<(), RoleError> {
        if !self.topics_are_there(&self.topics.all(&self.config.source_names()), health).await {
            return Ok(());
        }
        let failed = |error: ReadError| RoleError::Failed(error.into());
        let tail = tokio::select! {
            () = self.stop.cancelled() => return Ok(()),
            tail = desk.open() => tail.map_err(failed)?,
        };
        health.ready();
        tokio::select! {
            () = self.stop.cancelled() => Ok(()),
            lost = desk.listen(tail) => match lost.map_err(failed)? {},
        }
    }
}
