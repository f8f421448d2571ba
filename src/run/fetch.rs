//! Wiring of the fetch role, one source each: quota and journal, cache, budgets, health.

use std::{convert::Infallible, pin::pin, sync::Arc, time::Duration};

use secrecy::ExposeSecret;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::process::{Process, RoleError};
use crate::{
    config,
    fetch::{Caller, CallerParts, Carry, Fetch},
    kafka::{Reach, Reader, Writer},
    message::{SourceName, envelope::Kind},
    platform::config::Source,
    quota::{
        self, Purse, Quota, Share,
        guard::Guard,
        journal::{
            BeforeResume, Journal,
            report::{Reporter, allowed},
        },
        used_up::{self, Allowance},
    },
    runtime::{health::RoleHealth, metrics::METRICS},
    tokens::{Store, TokenStore, corrected::Corrected},
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
        let keeper = caller.keeper();
        let aliases = source.accounts.iter().map(|account| account.alias.clone()).collect();
        let redis = self.config.redis.url.as_ref().map(ExposeSecret::expose_secret);
        health.not_ready("loading saved quota state");
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
        let corrected = Arc::new(Corrected::new(source, config::variable, keeper, Arc::clone(&quota)));
        // A role that begins anew has what was read when the process began.
        corrected.take().await;
        let journal = journal.with_before_resume(Arc::clone(&corrected) as Arc<dyn BeforeResume>);
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
            never = corrected.follow() => match never {},
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
                    warn!(%source, "{words}: calls paused until then, requests wait on Kafka");
                }
                None => info!(%source, "budget available again; calls resume"),
            }
            told = used_up;
            tokio::time::sleep(LOOK_EVERY).await;
        }
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
}
