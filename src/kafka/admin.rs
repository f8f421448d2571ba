//! Topics as they should be, and how far groups have come.

use std::{collections::HashMap, time::Duration};

use rdkafka::{
    TopicPartitionList,
    admin::{AdminClient, AdminOptions, AlterConfig, NewPartitions, NewTopic, ResourceSpecifier, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer},
    error::KafkaError,
    topic_partition_list::Offset,
    types::RDKafkaErrorCode,
};
use tokio::time::{Instant, sleep};

use super::client::{Config, MESSAGE_LIMIT};
use crate::topics::Topic;

const TIMEOUT: Duration = Duration::from_secs(10);
/// For so long a broker may not know of a topic that is there, and how often it is asked.
const HEARD_WITHIN: Duration = Duration::from_secs(3);
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Why an administrative request failed.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// No broker answered.
    #[error("no Kafka broker answers at {brokers}: {reason}. Is it running? Is [kafka] brokers right?")]
    Unreachable {
        /// The addresses that were tried.
        brokers: String,
        /// What librdkafka said.
        reason: String,
    },
    /// A broker refused.
    #[error("{attempt}: {reason}")]
    Refused {
        /// What was attempted on what.
        attempt: String,
        /// What Kafka said.
        reason: String,
    },
}

/// What `apply` did to one topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It was not there.
    Created {
        /// The topic.
        topic: String,
        /// Its partitions.
        partitions: i32,
    },
    /// It had fewer partitions. Keys move between partitions by that; weir does not depend on where a key is.
    Grown {
        /// The topic.
        topic: String,
        /// Partitions before.
        from: i32,
        /// Partitions now.
        to: i32,
    },
    /// It was there; its retention has been set.
    Kept {
        /// The topic.
        topic: String,
        /// Its partitions: at least as many as asked for.
        partitions: i32,
    },
}

/// How far a group has come in one partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lag {
    /// The topic.
    pub topic: String,
    /// The partition.
    pub partition: i32,
    /// The group's next offset; `None` if it never committed.
    pub committed: Option<i64>,
    /// The first offset that is still there.
    pub low: i64,
    /// The offset that the next record will get.
    pub end: i64,
}

impl Lag {
    /// Offsets not yet done. Transaction markers count too, so it can rest a little above 0.
    #[must_use]
    pub fn behind(&self) -> i64 {
        (self.end - self.committed.unwrap_or(self.low).max(self.low)).max(0)
    }
}

/// Creates what is missing, adds partitions, sets retention. Safe to repeat.
///
/// # Errors
/// [`AdminError`], naming the first topic that was refused.
pub async fn apply(config: &Config, topics: &[Topic], replication: i32) -> Result<Vec<Change>, AdminError> {
    let present = describe(config).await?;
    let admin: AdminClient<DefaultClientContext> =
        config.base().create().map_err(|e| refused("making an admin client", &e))?;
    let mut changes = Vec::new();
    for topic in topics {
        changes.push(match present.get(&topic.name) {
            None => create(&admin, topic, replication).await?,
            Some(&partitions) => keep(&admin, topic, partitions).await?,
        });
    }
    Ok(changes)
}

/// The properties of a topic that weir sets.
fn properties(topic: &Topic) -> Vec<(&'static str, String)> {
    let mut properties = vec![
        ("retention.ms", topic.keep.as_millis().to_string()),
        ("cleanup.policy", if topic.is_compacted() { "compact" } else { "delete" }.to_owned()),
        // Raw replies compress to about a fifth; whatever the producer uses, the broker stores it as it came.
        ("compression.type", "producer".to_owned()),
        // A record that the broker refuses could never be committed, and would hold up all others.
        ("max.message.bytes", MESSAGE_LIMIT.to_string()),
    ];
    if topic.is_compacted() {
        // Whoever starts reads all of it: small segments that are closed soon are compacted soon.
        properties.extend([
            ("segment.bytes", (32 * 1024 * 1024).to_string()),
            ("segment.ms", "600000".to_owned()),
            ("min.cleanable.dirty.ratio", "0.1".to_owned()),
            ("delete.retention.ms", topic.keep.as_millis().to_string()),
        ]);
    }
    properties
}

async fn create(
    admin: &AdminClient<DefaultClientContext>,
    topic: &Topic,
    replication: i32,
) -> Result<Change, AdminError> {
    let attempt = format!("creating topic {}", topic.name);
    let properties = properties(topic);
    let new = NewTopic::new(&topic.name, topic.partitions, TopicReplication::Fixed(replication));
    let new = properties.iter().fold(new, |new, (key, value)| new.set(key, value));
    let results = admin.create_topics([&new], &options()).await.map_err(|e| refused(&attempt, &e))?;
    for result in results {
        match result {
            // Perhaps somebody was quicker; the topic is there, and that is what was asked for.
            Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err((_, code)) => return Err(AdminError::Refused { attempt, reason: code.to_string() }),
        }
    }
    Ok(Change::Created { topic: topic.name.clone(), partitions: topic.partitions })
}

async fn keep(admin: &AdminClient<DefaultClientContext>, topic: &Topic, partitions: i32) -> Result<Change, AdminError> {
    let attempt = format!("setting the retention of topic {}", topic.name);
    let properties = properties(topic);
    let alter = AlterConfig::new(ResourceSpecifier::Topic(&topic.name));
    let alter = properties.iter().fold(alter, |alter, (key, value)| alter.set(key, value));
    for result in admin.alter_configs([&alter], &options()).await.map_err(|e| refused(&attempt, &e))? {
        result.map_err(|(_, code)| AdminError::Refused { attempt: attempt.clone(), reason: code.to_string() })?;
    }
    if partitions >= topic.partitions {
        return Ok(Change::Kept { topic: topic.name.clone(), partitions });
    }
    let attempt = format!("adding partitions to topic {}", topic.name);
    let count = usize::try_from(topic.partitions).unwrap_or(0);
    let new = NewPartitions::new(&topic.name, count);
    for result in admin.create_partitions([&new], &options()).await.map_err(|e| refused(&attempt, &e))? {
        result.map_err(|(_, code)| AdminError::Refused { attempt: attempt.clone(), reason: code.to_string() })?;
    }
    Ok(Change::Grown { topic: topic.name.clone(), from: partitions, to: topic.partitions })
}

/// Every topic of the cluster with its number of partitions.
///
/// # Errors
/// [`AdminError::Unreachable`] after ten seconds without an answer.
pub async fn describe(config: &Config) -> Result<HashMap<String, i32>, AdminError> {
    blocking(config, |consumer| {
        let metadata = consumer.fetch_metadata(None, TIMEOUT)?;
        let count = |topic: &rdkafka::metadata::MetadataTopic| i32::try_from(topic.partitions().len()).unwrap_or(0);
        Ok(metadata.topics().iter().map(|topic| (topic.name().to_owned(), count(topic))).collect())
    })
    .await
}

/// How many partitions a topic has; `None` if it is still not there after a few seconds, since a broker may not have
/// heard yet of a topic that another one has just created.
///
/// # Errors
/// [`AdminError::Unreachable`] after ten seconds without an answer.
pub async fn partitions(config: &Config, topic: &str) -> Result<Option<i32>, AdminError> {
    let until = Instant::now() + HEARD_WITHIN;
    loop {
        let found = describe(config).await?.remove(topic).filter(|count| *count > 0);
        if found.is_some() || Instant::now() >= until {
            return Ok(found);
        }
        sleep(LOOK_AGAIN).await;
    }
}

/// How far `group` has come in each partition of `topics`; topics that do not exist are left out.
///
/// # Errors
/// [`AdminError::Unreachable`] after ten seconds without an answer.
pub async fn lag(config: &Config, group: &str, topics: &[String]) -> Result<Vec<Lag>, AdminError> {
    let present = describe(config).await?;
    let wanted: Vec<(String, i32)> =
        topics.iter().filter_map(|topic| Some((topic.clone(), *present.get(topic)?))).collect();
    let mut config = config.clone();
    // Asking does not make this client a member: it never subscribes.
    config.properties.insert("group.id".to_owned(), group.to_owned());
    blocking(&config, move |consumer| {
        let mut list = TopicPartitionList::new();
        for (topic, partitions) in &wanted {
            for partition in 0..*partitions {
                list.add_partition(topic, partition);
            }
        }
        let committed = consumer.committed_offsets(list, TIMEOUT)?;
        let mut lags = Vec::new();
        for element in committed.elements() {
            let (low, end) = consumer.fetch_watermarks(element.topic(), element.partition(), TIMEOUT)?;
            let committed = if let Offset::Offset(offset) = element.offset() { Some(offset) } else { None };
            lags.push(Lag { topic: element.topic().to_owned(), partition: element.partition(), committed, low, end });
        }
        Ok(lags)
    })
    .await
}

/// Whether the group has a member with this `group.instance.id`: the broker makes its member id from it.
///
/// # Errors
/// [`AdminError::Unreachable`] after ten seconds without an answer.
pub async fn has_member(config: &Config, group: &str, instance: &str) -> Result<bool, AdminError> {
    let (group, prefix) = (group.to_owned(), format!("{instance}-"));
    blocking(config, move |consumer| {
        let list = consumer.fetch_group_list(Some(&group), TIMEOUT)?;
        let mut members = list.groups().iter().flat_map(rdkafka::groups::GroupInfo::members);
        Ok(members.any(|member| member.id().starts_with(&prefix)))
    })
    .await
}

/// Runs a question that librdkafka answers by blocking, away from the async threads.
async fn blocking<T: Send + 'static>(
    config: &Config,
    ask: impl FnOnce(&BaseConsumer) -> Result<T, KafkaError> + Send + 'static,
) -> Result<T, AdminError> {
    let brokers = config.brokers.clone();
    let unreachable = move |reason: String| AdminError::Unreachable { brokers, reason };
    let client = config.base();
    let task = tokio::task::spawn_blocking(move || ask(&client.create()?));
    match task.await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(unreachable(error.to_string())),
        Err(panic) => Err(unreachable(panic.to_string())),
    }
}

fn options() -> AdminOptions {
    AdminOptions::new().request_timeout(Some(TIMEOUT)).operation_timeout(Some(TIMEOUT))
}

fn refused(attempt: &str, error: &KafkaError) -> AdminError {
    AdminError::Refused { attempt: attempt.to_owned(), reason: error.to_string() }
}
