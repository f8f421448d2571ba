//! A snapshot of committed offsets and topic ends, read in an order that makes the comparison valid while roles run.

use std::collections::HashMap;

use super::scope::{Places, SKEW_MS, Scope, VerifyError};
use crate::{
    kafka::{
        Committed, Epoch, Partition, client,
        ledger::{Ledger, LedgerError},
        log_names::Names,
        logs,
        scan::{self, Bounds, Span},
    },
    message::envelope::Kind,
    runtime::clock::Timestamp,
    topics::Topic,
};

/// What the stages have done, and how far the topics reach, taken in the order that the head of this file gives.
pub(super) struct Snapshot {
    /// By partition of requests and failures: what its stage has done.
    pub(super) ledgers: HashMap<Partition, Ledger>,
    /// What the sink has committed.
    pub(super) stored: HashMap<Partition, i64>,
    /// What rows call the logs of the topics.
    pub(super) names: Names,
    /// By topic, requests first.
    pub(super) bounds: Vec<(Topic, Vec<Bounds>)>,
    /// Where to begin, if not at the first record.
    begin: HashMap<Partition, i64>,
}

impl Snapshot {
    pub(super) async fn take(places: Places<'_>, scope: &Scope) -> Result<Self, VerifyError> {
        let Places { kafka, topics, groups, sources, .. } = places;
        let all = topics.rows(sources);
        let delays = topics.delays();
        let names = |wanted: &dyn Fn(&Topic) -> bool| -> Vec<String> {
            all.iter().filter(|topic| wanted(topic)).map(|topic| topic.name.clone()).collect()
        };
        let (requests, outcomes) = (names(&|t| t.kind == Kind::Request), names(&|t| t.kind != Kind::Request));
        let every: Vec<String> = requests.iter().chain(&outcomes).cloned().collect();
        let names = logs::names(kafka, &every).await?;
        let mut ledgers = HashMap::new();
        // Together: what hops is either where it was or where it goes.
        add_ledgers(&mut ledgers, kafka, &groups.retry(), &topics.retried()).await?;
        let mut found = scan::bounds(kafka, &requests).await?;
        for source in sources {
            add_ledgers(&mut ledgers, kafka, &groups.fetch(source), &topics.every_request(source)).await?;
        }
        let stored = scan::committed(kafka, &groups.sink(), &every).await?;
        found.extend(scan::bounds(kafka, &outcomes).await?);
        let waiting: Vec<String> = delays.iter().map(|topic| topic.name.clone()).collect();
        found.extend(scan::bounds(kafka, &waiting).await?);
        let mut begin = HashMap::new();
        if let Some(since) = scope.since {
            begin.extend(scan::at_time(kafka, &requests, since).await?);
            let earlier = Timestamp::from_millis(since.as_millis().saturating_sub(SKEW_MS));
            begin.extend(scan::at_time(kafka, &outcomes, earlier).await?);
        }
        let of = |topic: &Topic| found.iter().filter(|b| *b.partition.topic == *topic.name).cloned().collect();
        Ok(Self {
            ledgers,
            names,
            stored: stored.into_iter().filter_map(|(partition, at)| Some((partition, at?.offset))).collect(),
            bounds: all.iter().chain(&delays).map(|topic| (topic.clone(), of(topic))).collect(),
            begin,
        })
    }

    pub(super) fn span(&self, bounds: &Bounds) -> Span {
        let Bounds { partition, low, end } = bounds.clone();
        let from = self.begin.get(&partition).map_or(low, |begin| low.max(*begin)).min(end);
        Span { partition, range: from..end }
    }
}

async fn add_ledgers(
    ledgers: &mut HashMap<Partition, Ledger>,
    kafka: &client::Config,
    group: &str,
    topics: &[String],
) -> Result<(), VerifyError> {
    for (partition, committed) in scan::committed(kafka, group, topics).await? {
        let ledger = ledger(committed.as_ref()).map_err(|error| VerifyError::Ledger {
            group: group.to_owned(),
            partition: partition.clone(),
            error,
        })?;
        ledgers.insert(partition, ledger);
    }
    Ok(())
}

fn ledger(committed: Option<&Committed>) -> Result<Ledger, LedgerError> {
    Ledger::new(Epoch(0), committed)
}
