//! Topics: what is on them, who writes and who reads them, how long they are kept. The only place with their names.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::message::{SourceName, envelope::Kind};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// `[topics]`: how topics are named, split and kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// What every topic's name begins with.
    pub prefix: String,
    /// Partitions of each request topic: the most fetch processes that can share one source.
    pub request_partitions: i32,
    /// Partitions of results, failures and dead letters. The sink makes one block per partition, so more
    /// partitions mean smaller blocks: stay at or below 12.
    pub outcome_partitions: i32,
    /// Copies of each partition; 3 on a real cluster, 1 on one broker.
    pub replication: i32,
    /// How long requests are kept.
    #[serde(with = "humantime_serde")]
    pub keep_requests: Duration,
    /// How long results are kept: as far back as `weir replay` can go.
    #[serde(with = "humantime_serde")]
    pub keep_results: Duration,
    /// How long failures are kept; far above the longest delay of a retry.
    #[serde(with = "humantime_serde")]
    pub keep_failures: Duration,
    /// How long changes are kept.
    #[serde(with = "humantime_serde")]
    pub keep_changes: Duration,
    /// How long dead letters are kept: somebody has to find the time to read them.
    #[serde(with = "humantime_serde")]
    pub keep_dead: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            prefix: "weir".to_owned(),
            request_partitions: 8,
            outcome_partitions: 8,
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
}

impl Topic {
    /// Whether the newest record of each key is kept for ever, and older ones need not be.
    #[must_use]
    pub fn is_compacted(&self) -> bool {
        matches!(self.kind, Kind::QuotaReport | Kind::QuotaSetting)
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

    /// Every topic for these sources, as `topics apply` creates them.
    #[must_use]
    pub fn all(&self, sources: &[SourceName]) -> Vec<Topic> {
        let config = &self.config;
        let shared = |name, kind, keep| Topic { name, kind, source: None, partitions: config.outcome_partitions, keep };
        let requests = |source: &SourceName| Topic {
            name: self.requests(source),
            kind: Kind::Request,
            source: Some(source.clone()),
            partitions: config.request_partitions,
            keep: config.keep_requests,
        };
        let mut topics: Vec<_> = sources.iter().map(requests).collect();
        topics.push(shared(self.results(), Kind::Result, config.keep_results));
        topics.push(shared(self.failures(), Kind::Failure, config.keep_failures));
        topics.push(shared(self.dead(), Kind::DeadLetter, config.keep_dead));
        topics.push(shared(self.changes(), Kind::Change, config.keep_changes));
        topics.push(Topic {
            name: self.quota(),
            kind: Kind::QuotaReport,
            source: None,
            // What is set and what is reported stay in order.
            partitions: 1,
            keep: DAY,
        });
        topics
    }

    /// Copies of each partition.
    #[must_use]
    pub fn replication(&self) -> i32 {
        self.config.replication
    }
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

    /// Reads the failures.
    #[must_use]
    pub fn retry(&self) -> String {
        format!("{}.retry", self.prefix)
    }

    /// Reads the results, to compare each with the one before.
    #[must_use]
    pub fn changes(&self) -> String {
        format!("{}.changes", self.prefix)
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
    fn the_sink_reads_every_topic_but_the_one_that_is_compacted() {
        let topics = Topics::new(Config::default());
        let sources = [SourceName::new("ali1688").expect("a name")];
        let names = |topics: Vec<Topic>| topics.into_iter().map(|topic| topic.name).collect::<Vec<_>>();
        let mut all = names(topics.all(&sources));
        assert!(all.contains(&topics.quota()), "{all:?}");
        all.retain(|name| *name != topics.quota());
        assert_eq!(names(topics.rows(&sources)), all);
        assert!(all.len() > 3);
    }
}
