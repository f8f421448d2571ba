//! The consumer groups with their topics and lag.

use crate::{
    config::Config,
    topics::{Groups, Topics},
};

/// A group and the topics that it reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// The stage.
    pub stage: &'static str,
    /// Its name in Kafka.
    pub name: String,
    /// What it reads.
    pub topics: Vec<String>,
}

/// All groups, in the order of the flow.
#[must_use]
pub fn all(config: &Config) -> Vec<Group> {
    let topics = Topics::new(config.topics.clone());
    let (names, groups) = (config.source_names(), Groups::new(&config.kafka.group_prefix));
    let of_source = |source| Group { stage: "fetch", name: groups.fetch(source), topics: topics.every_request(source) };
    let mut all: Vec<_> = names.iter().map(of_source).collect();
    all.push(Group { stage: "retry", name: groups.retry(), topics: topics.retried() });
    all.push(Group { stage: "changes", name: groups.changes(), topics: vec![topics.results()] });
    let every = topics.rows(&names).into_iter().map(|topic| topic.name).collect();
    all.push(Group { stage: "sink", name: groups.sink(), topics: every });
    all
}
