//! The topics: names, content, writers, readers, retention. The only place with topic names.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::message::{Lane, SourceName, envelope::Kind};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// How long records wait on each of the delay topics, in seconds. A longer delay passes over several of them; with
/// steps of four that is five on average and eighteen at most for anything from 5 s to 6 h.
const DELAYS: [u64; 9] = [1, 4, 16, 64, 256, 1_024, 4_096, 16_384, 65_536];

/// A delay topic has to keep its records for at least so many times their delay: retry may be away for a while.
pub const KEPT_DELAYS: u32 = 4;

/// How the name of a source's express topic ends. No source's own name may end like that.
pub const EXPRESS: &str = ".express";

/// `[topics]`: how topics are named, split and kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// What every topic's name begins with.
    pub prefix: String,
    /// Partitions of each request topic, express ones too: the most fetch processes that can share one source.
    pub request_partitions: i32,
    /// Partitions of results, failures and dead letters. The sink makes one block per partition, so more
    /// partitions mean smaller blocks: stay at or below 12.
    pub outcome_partitions: i32,
    /// Partitions of each topic on which failed requests wait.
    pub delay_partitions: i32,
    /// Copies of each partition; 3 on a real cluster, 1 on one broker.
    pub replication: i32,
    /// How long requests are kept.
    #[serde(with = "humantime_serde")]
    pub keep_requests: Duration,
    /// How long results are kept: as far back as `weir replay` can go.
    #[serde(with = "humantime_serde")]
    pub keep_results: Duration,
    /// How long failures are kept, and at least how long the requests that wait to be tried again: for as long may
    /// retry be away.
    #[serde(with = "humantime_serde")]
    pub keep_failures: Duration,
    /// How long changes are kept.
    #[serde(with = "humantime_serde")]
    pub keep_changes: Duration,
    /// How long dead letters are kept, so that there is time to act on them.
    #[serde(with = "humantime_serde")]
    pub keep_dead: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            prefix: "weir".to_owned(),
            request_partitions: 8,
            outcome_partitions: 8,
            delay_partitions: 4,
            replication: 1,
            keep_requests: 7 * DAY,
            keep_results: 30 * DAY,
            keep_failures: 14 * DAY,
            keep_changes: 30 * DAY,
            keep_dead: 90 * DAY,
        }
    }
}

/// One topic as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topic {
    /// Its name.
    pub name: String,
    /// What is on it.
    pub kind: Kind,
    /// The source whose requests are on it; `None` for topics that all sources share.
    pub source: Option<SourceName>,
    /// How many partitions.
    pub partitions: i32,
    /// How long records are kept; of a compacted topic, records that a newer one of the same key replaces.
    pub keep: Duration,
    /// On a delay topic, how long records wait there: from the time at which the broker took them, which it writes
    /// into them (`message.timestamp.type=LogAppendTime`, as on topics of requests). On others `None`.
    pub delay: Option<Duration>,
}

impl Topic {
    /// Whether the newest record of each key is kept for ever, and older ones need not be.
    #[must_use]
    pub fn is_compacted(&self) -> bool {
        matches!(self.kind, Kind::Cancellation | Kind::BatchEnd | Kind::QuotaReport | Kind::QuotaSetting)
    }
}

/// The names of all topics.
#[derive(Clone, Debug)]
pub struct Topics {
    config: Config,
}

impl Topics {
    /// The topics under `config.prefix`.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self { config }
    }

    /// Written by any producer, `enqueue` and retry; read by fetch and the sink. Key: item id.
    #[must_use]
    pub fn requests(&self, source: &SourceName) -> String {
        format!("{}.requests.{source}", self.config.prefix)
    }

    /// The lane for what has to overtake the backlog. Written by any producer, `enqueue --express`, retry (what came
    /// from here); read by fetch and the sink. Key: item id.
    #[must_use]
    pub fn express(&self, source: &SourceName) -> String {
        format!("{}{EXPRESS}", self.requests(source))
    }

    /// The source's topic of this lane.
    #[must_use]
    pub fn requests_by(&self, source: &SourceName, lane: Lane) -> String {
        match lane {
            Lane::Bulk => self.requests(source),
            Lane::Express => self.express(source),
        }
    }

    /// Both topics of a source's requests: what its fetch reads.
    #[must_use]
    pub fn every_request(&self, source: &SourceName) -> Vec<String> {
        Lane::ALL.map(|lane| self.requests_by(source, lane)).into()
    }

    /// Written by fetch; read by the sink. Key: item id.
    #[must_use]
    pub fn results(&self) -> String {
        format!("{}.results", self.config.prefix)
    }

    /// Written by fetch; read by retry and the sink. Key: item id.
    #[must_use]
    pub fn failures(&self) -> String {
        format!("{}.failures", self.config.prefix)
    }

    /// Written by fetch (unreadable requests), retry, and the sink (unreadable results); read by the sink. Key: item
    /// id, or none.
    #[must_use]
    pub fn dead(&self) -> String {
        format!("{}.dead", self.config.prefix)
    }

    /// Written by the changes stage; read by the sink, and by repricers and alerts. Key: item id.
    #[must_use]
    pub fn changes(&self) -> String {
        format!("{}.changes", self.config.prefix)
    }

    /// Written and read by retry: requests that wait for the time in their header `x-due-at`. Key: item id.
    #[must_use]
    pub fn delay(&self, seconds: u64) -> String {
        format!("{}.retry.{seconds}s", self.config.prefix)
    }

    /// How people are told of all delay topics together.
    #[must_use]
    pub fn every_delay(&self) -> String {
        format!("{}.retry.*", self.config.prefix)
    }

    /// The delay topics, the shortest first. The sink does not store them: what is on them is on others too.
    #[must_use]
    pub fn delays(&self) -> Vec<Topic> {
        let config = &self.config;
        let topic = |seconds: u64| {
            let delay = Duration::from_secs(seconds);
            Topic {
                name: self.delay(seconds),
                kind: Kind::Request,
                source: None,
                partitions: config.delay_partitions,
                keep: config.keep_failures.max(delay * KEPT_DELAYS),
                delay: Some(delay),
            }
        };
        DELAYS.into_iter().map(topic).collect()
    }

    /// The names of what retry reads: the failures, and what waits on the delay topics.
    #[must_use]
    pub fn retried(&self) -> Vec<String> {
        [self.failures()].into_iter().chain(self.waiting()).collect()
    }

    /// The names of the delay topics.
    #[must_use]
    pub fn waiting(&self) -> Vec<String> {
        self.delays().into_iter().map(|topic| topic.name).collect()
    }

    /// Written by `weir batch NAME cancel`, and by roles and `weir topics apply` (the id of the first log of a topic's name);
    /// read by all. Compacted. Key: `cancel/<batch>`, `log/<topic>`.
    #[must_use]
    pub fn control(&self) -> String {
        format!("{}.control", self.config.prefix)
    }

    /// Written beside the sink, if `batches.topic` says so; read by whoever waits for batches. Compacted. Key: batch.
    #[must_use]
    pub fn batches(&self) -> String {
        format!("{}.batches", self.config.prefix)
    }

    /// Written by fetch (its reports) and `weir quota` (what is set); read by fetch at its start and from then on,
    /// and by `weir quota`. Compacted. Key: `report/<source>/<instance>/<chunk>`, `set/<source>[/<account>]`.
    #[must_use]
    pub fn quota(&self) -> String {
        format!("{}.quota", self.config.prefix)
    }

    /// The topics for these sources of which each record becomes a row: what the sink reads.
    #[must_use]
    pub fn rows(&self, sources: &[SourceName]) -> Vec<Topic> {
        let mut topics = self.all(sources);
        topics.retain(|topic| !topic.is_compacted());
        topics
    }

    /// The topics for these sources but [`Self::delays`]; with them all that `topics apply` creates.
    #[must_use]
    pub fn all(&self, sources: &[SourceName]) -> Vec<Topic> {
        let config = &self.config;
        let shared = |name, kind, keep| Topic {
            name,
            kind,
            source: None,
            partitions: config.outcome_partitions,
            keep,
            delay: None,
        };
        let requests = |(source, lane): (&SourceName, Lane)| Topic {
            name: self.requests_by(source, lane),
            kind: Kind::Request,
            source: Some(source.clone()),
            partitions: config.request_partitions,
            keep: config.keep_requests,
            delay: None,
        };
        let lanes = sources.iter().flat_map(|source| [(source, Lane::Bulk), (source, Lane::Express)]);
        let mut topics: Vec<_> = lanes.map(requests).collect();
        topics.push(shared(self.results(), Kind::Result, config.keep_results));
        topics.push(shared(self.failures(), Kind::Failure, config.keep_failures));
        topics.push(shared(self.dead(), Kind::DeadLetter, config.keep_dead));
        topics.push(shared(self.changes(), Kind::Change, config.keep_changes));
        topics.push(Topic { partitions: 1, ..shared(self.control(), Kind::Cancellation, config.keep_requests) });
        topics.push(Topic { partitions: 1, ..shared(self.batches(), Kind::BatchEnd, config.keep_results) });
        topics.push(Topic {
            name: self.quota(),
            kind: Kind::QuotaReport,
            source: None,
            // What is set and what is reported stay in order.
            partitions: 1,
            keep: DAY,
            delay: None,
        });
        topics
    }

    /// Copies of each partition.
    #[must_use]
    pub fn replication(&self) -> i32 {
        self.config.replication
    }
}

/// Each topic in a set of its own, for [`crate::kafka::GroupConfig`].
#[must_use]
pub fn apart(topics: Vec<String>) -> Vec<Vec<String>> {
    topics.into_iter().map(|topic| vec![topic]).collect()
}

/// The names of these topics in sets of those whose records are alike, for [`crate::kafka::GroupConfig`]: results are
/// spread over the sinks by themselves, and so are the requests of all sources.
#[must_use]
pub fn alike(topics: &[Topic]) -> Vec<Vec<String>> {
    let set = |topic: &Topic| (topic.kind, topic.name.ends_with(EXPRESS));
    let mut sets: Vec<((Kind, bool), Vec<String>)> = Vec::new();
    for topic in topics {
        match sets.iter_mut().find(|(found, _)| *found == set(topic)) {
            Some((_, names)) => names.push(topic.name.clone()),
            None => sets.push((set(topic), vec![topic.name.clone()])),
        }
    }
    sets.into_iter().map(|(_, names)| names).collect()
}

/// The names of the consumer groups, one word per stage.
#[derive(Clone, Debug)]
pub struct Groups {
    prefix: String,
}

impl Groups {
    /// The groups whose names begin with `prefix`.
    #[must_use]
    pub fn new(prefix: impl Into<String>) -> Self {
        Self { prefix: prefix.into() }
    }

    /// Reads the requests of one source.
    #[must_use]
    pub fn fetch(&self, source: &SourceName) -> String {
        format!("{}.fetch.{source}", self.prefix)
    }

    /// Reads the failures and what waits on the delay topics.
    #[must_use]
    pub fn retry(&self) -> String {
        format!("{}.retry", self.prefix)
    }

    /// Reads the results, to compare each with the one before.
    #[must_use]
    pub fn changes(&self) -> String {
        format!("{}.changes", self.prefix)
    }

    /// No members: how far a replay of this name has come.
    #[must_use]
    pub fn replay(&self, name: &str) -> String {
        format!("{}.replay.{name}", self.prefix)
    }

    /// Reads nothing that matters: its only member with a partition tells the ends of batches.
    #[must_use]
    pub fn batches(&self) -> String {
        format!("{}.batches", self.prefix)
    }

    /// Reads everything.
    #[must_use]
    pub fn sink(&self) -> String {
        format!("{}.sink", self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_lane_has_a_topic_of_its_own_and_the_sink_reads_both() {
        let (topics, source) = (Topics::new(Config::default()), SourceName::new("ali1688").expect("a name"));
        let both = topics.every_request(&source);
        assert_eq!(both, ["weir.requests.ali1688.express", "weir.requests.ali1688"]);
        let rows = topics.rows(std::slice::from_ref(&source));
        let of_source = rows.iter().filter(|topic| topic.source.as_ref() == Some(&source));
        assert_eq!(of_source.filter(|topic| both.contains(&topic.name)).count(), 2);
    }

    #[test]
    fn a_set_of_topics_has_records_of_one_kind_by_one_lane() {
        let topics = Topics::new(Config::default());
        let sources = ["ali1688", "taobao"].map(|name| SourceName::new(name).expect("a name"));
        let sets = alike(&topics.rows(&sources));
        let requests = |lane| sources.iter().map(|source| topics.requests_by(source, lane)).collect::<Vec<_>>();
        assert_eq!(sets[..2], [requests(Lane::Bulk), requests(Lane::Express)]);
        let alone = [topics.results(), topics.failures(), topics.dead(), topics.changes()];
        assert_eq!(sets[2..], apart(alone.to_vec()));
    }

    #[test]
    fn the_sink_reads_every_topic_but_those_that_are_compacted() {
        let topics = Topics::new(Config::default());
        let sources = [SourceName::new("ali1688").expect("a name")];
        let names = |topics: Vec<Topic>| topics.into_iter().map(|topic| topic.name).collect::<Vec<_>>();
        let mut all = names(topics.all(&sources));
        assert!(all.contains(&topics.quota()), "{all:?}");
        let compacted = [topics.quota(), topics.control(), topics.batches()];
        all.retain(|name| !compacted.contains(name));
        assert_eq!(names(topics.rows(&sources)), all);
        assert!(all.len() > 3);
    }
}
