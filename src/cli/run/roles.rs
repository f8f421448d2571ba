//! What each role is made of.

use std::{convert::Infallible, pin::pin, sync::Arc, time::Duration};

use secrecy::ExposeSecret;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Process, RoleError};
use crate::{
    batches::{Batches, Followed, Herald, Webhook},
    cancelled::Cancelled,
    changes::{self, Changes, ChangesParts},
    fetch::{Caller, CallerParts, Carry, Fetch},
    kafka::{Instead, KafkaReader, Producer, Reach, ReadError, Reader, WriteError, Writer, intake::IntakeError},
    message::{SourceName, envelope::Kind},
    platform::config::Source,
    quota::{
        self, Purse, Quota, Share,
        guard::Guard,
        journal::{
            Journal,
            report::{Reporter, allowed},
        },
        used_up::{self, Allowance},
    },
    retry::{self, Retry},
    runtime::{health::RoleHealth, metrics::METRICS},
    serve::Desk,
    sink,
    store::{self, row::HEADERS},
    tokens::{Store, TokenStore},
    topics,
};

/// How long a start waits for the cache in Redis; without it a process begins with its own memory.
const CACHE_WITHIN: Duration = Duration::from_secs(1);

/// How often it is looked whether calls can leave.
const LOOK_EVERY: Duration = Duration::from_secs(1);

impl Process {
    pub(super) async fn fetch(&self, source: &Source, carry: &Carry, health: &RoleHealth) -> Result<(), RoleError> {
        let group = self.groups.fetch(&source.name);
        let (breaker, fallback) = &source.breaker;
        let read = self.topics.every_request(&source.name);
        let written: Vec<_> = [&source.name].into_iter().chain(fallback).cloned().collect();
        if !self.topics_are_there(&self.topics.all(&written), health).await {
            return Ok(());
        }
        let mut outcomes = vec![self.topics.results(), self.topics.failures(), self.topics.dead()];
        outcomes.extend(fallback.iter().flat_map(|fallback| self.topics.every_request(fallback)));
        let reach = Reach { group: group.clone(), reads: read.clone(), writes: outcomes };
        let Some(writer) = self.writer(reach, health).await? else { return Ok(()) };
        // After it: what a killed predecessor's transaction has left open would hold up the answer.
        if !self.has_its_place((&group, &read, Kind::Request), health).await? {
            return Ok(());
        }
        let cancelled = self.cancelled().await?;
        // A worker that joins gets its share of each lane.
        let reader = self.reader(group, topics::apart(read))?;
        let limits = source.quota();
        let caller = Caller::new(CallerParts {
            source: source.name.clone(),
            vendor: Arc::clone(&source.vendor),
            client: source.client.clone(),
            accounts: Arc::clone(&source.accounts),
            tokens: self.tokens(source)?,
            guard: Guard::of(&limits, &self.clock),
            topics: self.topics.clone(),
            clock: self.clock.clone(),
            rng: self.dice.clone(),
        });
        let aliases = source.accounts.iter().map(|account| account.alias.clone()).collect();
        let redis = self.config.redis.url.as_ref().map(ExposeSecret::expose_secret);
        health.not_ready("reading what is spent and who is paused");
        let topic = self.topics.quota();
        let opened = Journal::open(&self.config.kafka, &topic, &source.name, self.clock.clone());
        let journal = tokio::select! {
            () = self.stop.cancelled() => return Ok(()),
            journal = opened => journal?,
        };
        let past = journal.past();
        let quota = quota::open(&self.config.quota, redis, &source.name, &aliases, &limits, &self.clock, &past)
            .map_err(|error| RoleError::Failed(error.into()))?;
        journal.restore(&past, quota.as_ref(), &aliases).await;
        let allowance = Arc::new(self.allowance(source, &limits));
        let purse = source.budgets.as_ref().and_then(|budgets| Purse::new(budgets, &past)).map(Arc::new);
        if let Some(purse) = &purse {
            quota.fund(purse);
        }
        health.ready();
        info!(source = %source.name, accounts = source.accounts.len(), "fetching");
        let (share, shares) = watch::channel(source.express_share);
        let express = |planned: Option<Share>| {
            share.send_replace(planned.map_or(source.express_share, Share::get));
        };
        let (windows, name) = (&self.config.calendar, &source.name);
        let calendar = quota::calendar::follow(windows, name, quota.as_ref(), express, &self.clock);
        let configured = self.config.source(source.name.as_str());
        let cache = configured.and_then(|configured| self.cache.source(configured, &self.clock, &self.dice));
        if let Some(cache) = &cache {
            // What others have fetched need not be called for, just because this process is a moment too early.
            cache.connected(CACHE_WITHIN).await;
        }
        let mut config = self.config.fetch.clone();
        config.calls_in_flight =
            source.calls_in_flight.map_or(config.calls_in_flight, |own| own.min(config.calls_in_flight));
        let fetch = Fetch::new(reader, writer, caller, Arc::clone(&quota), config)
            .with_delays(&allowance.limits, allowance.pacing, self.config.quota.store == quota::Store::Memory)
            .with_address_health(source.address_health)
            .with_budgets(source.budgets.clone(), purse.clone())
            .with_express_share(shares)
            .with_breaker(*breaker, fallback.clone())
            .with_cache(cache)
            .with_limiter(self.limiter.clone())
            .carrying(carry)
            .with_cancellations(cancelled);
        let has_budgets = limits.has_budgets() || purse.is_some();
        let reporter = Reporter {
            topic: topic.into(),
            source: source.name.clone(),
            instance: self.config.instance.name.clone(),
            aliases,
            allowed: allowed(&allowance.limits),
            allowance: Arc::clone(&allowance),
            quota: Arc::clone(&quota),
            purse,
            tally: fetch.tally(),
            clock: self.clock.clone(),
        };
        tokio::select! {
            ended = self.fetch_and_report(fetch, journal, reporter, has_budgets) => ended,
            never = calendar => match never {},
            never = self.tell_whether_calls_can_leave(&source.name, &allowance, &quota, health) => match never {},
        }
    }

    /// What the vendor and the budgets allow a source.
    fn allowance(&self, source: &Source, limits: &quota::plan::Limits) -> Allowance {
        let configured = self.config.source(source.name.as_str());
        let money = source.budgets.clone().map(|budgets| {
            let per_day = configured.and_then(|configured| configured.common.budget.per_day);
            (budgets, per_day, configured.and_then(|configured| configured.common.currency.clone()).unwrap_or_default())
        });
        let limits = limits.or_unknown(&self.config.quota.unknown);
        Allowance { limits, pacing: self.config.quota.pacing(), money }
    }

    /// Keeps `/ready` true to whether calls can leave at all, and says when a spent budget stops them. Never ends.
    async fn tell_whether_calls_can_leave(
        &self,
        source: &SourceName,
        allowance: &Arc<Allowance>,
        quota: &Arc<dyn Quota>,
        health: &RoleHealth,
    ) -> Infallible {
        let mut told = None;
        loop {
            let now = self.clock.now();
            let (of, whose) = (Arc::clone(allowance), Arc::clone(quota));
            // With thousands of accounts that have spent their budgets it takes milliseconds.
            let used_up = tokio::task::spawn_blocking(move || of.stops(whose.as_ref(), now)).await.unwrap_or_default();
            METRICS.budget_spent(source.as_str(), health.name(), used_up.is_some());
            match quota.snapshot(0..0, now).cut_off.and_then(|cut_off| cut_off.reason()) {
                Some(reason) => health.not_ready(reason),
                None => match &used_up {
                    Some(used_up) => health.not_ready(used_up::words(used_up)),
                    None => health.ready(),
                },
            }
            match &used_up {
                _ if used_up == told => {}
                Some(used_up) => {
                    let words = used_up::words(used_up);
                    warn!(%source, "{words}: no calls until then, requests wait on Kafka");
                }
                None => info!(%source, "there is a budget again: calls go on"),
            }
            told = used_up;
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// The batches that have been cancelled by now, and from now on.
    async fn cancelled(&self) -> Result<Cancelled, RoleError> {
        let followed = Cancelled::follow(&self.config.kafka, &self.topics.control()).await;
        followed.map_err(|error| RoleError::Failed(error.into()))
    }

    /// Where the source's renewed tokens are kept.
    fn tokens(&self, source: &Source) -> anyhow::Result<Arc<dyn TokenStore>> {
        let can_be_renewed = source.accounts.iter().any(|account| account.refresh_token.is_some());
        if can_be_renewed && self.config.quota.store == quota::Store::Redis && self.config.tokens.store == Store::File {
            warn!(source = %source.name, "the quota is shared through Redis, but renewed tokens are kept in a file: set tokens.store = \"redis\" if processes run on several machines");
        }
        self.config.token_store()
    }

    /// Runs fetch with its journal beside it. Without the journal nobody calls: then fetch finishes what is in
    /// flight and ends.
    async fn fetch_and_report<R: Reader, W: Writer>(
        &self,
        fetch: Fetch<R, W>,
        journal: Journal,
        reporter: Reporter,
        has_budgets: bool,
    ) -> Result<(), RoleError> {
        let (stop, ended) = (self.stop.child_token(), CancellationToken::new());
        // Of 10 kB and more: whoever runs this does not have to carry it.
        let mut fetch = Box::pin(fetch.run(stop.clone()));
        let purse = reporter.purse.clone();
        let mut journal = pin!(journal.run(reporter, has_budgets, ended.clone()));
        tokio::select! {
            outcome = &mut fetch => {
                if let Some(purse) = purse {
                    purse.close().await;
                }
                ended.cancel();
                let last = journal.await;
                outcome?;
                Ok(last?)
            }
            lost = &mut journal => {
                stop.cancel();
                fetch.await?;
                Ok(lost?)
            }
        }
    }

    pub(super) async fn retry(&self, health: &RoleHealth) -> Result<(), RoleError> {
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
            .heeding(cancelled);
        Ok(retry.run(self.stop.clone()).await?)
    }

    pub(super) async fn changes(&self, health: &RoleHealth) -> Result<(), RoleError> {
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
        let memory = store::Store::connect(&self.config.clickhouse).map_err(|error| RoleError::Failed(error.into()))?;
        health.ready();
        let (topic, config) = (self.topics.changes().into(), self.config.changes.clone());
        let instead = Instead::new(self.topics.dead(), changes::WRITER);
        let (clock, dice) = (self.clock.clone(), self.dice.clone());
        let parts = ChangesParts { reader, writer, memory, topic, instead, config, clock, dice };
        Ok(Changes::new(parts).run(self.stop.clone()).await?)
    }

    /// Beside the sink, since it is about rows; in one process of all, since each end is to be told once.
    pub(super) async fn batches(&self, webhook: Option<&Webhook>, health: &RoleHealth) -> Result<(), RoleError> {
        let topics = self.topics.all(&self.config.source_names());
        if !self.topics_are_there(&topics, health).await {
            return Ok(());
        }
        let reader = self.reader(self.groups.batches(), vec![vec![self.topics.control()]])?;
        let store = store::Store::connect(&self.config.clickhouse).map_err(|error| RoleError::Failed(error.into()))?;
        health.ready();
        let (settle, webhook) = (self.config.batches.settle, webhook.cloned());
        let failed = |error: WriteError| RoleError::Failed(error.into());
        let producer =
            self.config.batches.topic.then(|| Producer::new(&self.config.kafka)).transpose().map_err(failed)?;
        let herald = producer.map(|producer| Herald::new(producer, self.topics.batches().into()));
        let stored = self.topics.rows(&self.config.source_names()).into_iter().map(|topic| topic.name).collect();
        let followed = Followed { kafka: self.config.kafka.clone(), group: self.groups.sink(), topics: stored };
        let (clock, dice, health) = (self.clock.clone(), self.dice.clone(), health.clone());
        let batches = Batches { reader, store, followed, webhook, herald, settle, clock, dice, health };
        Ok(batches.run(self.stop.clone()).await.map_err(IntakeError::from)?)
    }

    pub(super) async fn sink(&self, health: &RoleHealth) -> Result<(), RoleError> {
        let topics = self.topics.rows(&self.config.source_names());
        if !self.topics_are_there(&topics, health).await {
            return Ok(());
        }
        let group = self.groups.sink();
        let store = store::Store::connect(&self.config.clickhouse).map_err(|error| RoleError::Failed(error.into()))?;
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

    /// Hears of the outcomes that somebody waits for.
    pub(super) async fn serve(&self, desk: &Desk, health: &RoleHealth) -> Result<(), RoleError> {
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
