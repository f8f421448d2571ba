//! Kafka administration: creates and configures topics, reads committed offsets and lag.

use std::{collections::HashMap, time::Duration};

use rdkafka::{
    TopicPartitionList,
    admin::{AdminClient, AdminOptions, AlterConfig, NewPartitions, NewTopic, ResourceSpecifier, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, CommitMode, Consumer},
    error::KafkaError,
    topic_partition_list::Offset,
    types::RDKafkaErrorCode,
};
use tokio::time::{Instant, sleep};

use super::{Committed, Partition, client::Config, commit_mark, topic_ids};
use crate::{
    message::envelope::Kind,
    topics::{KEPT_DELAYS, Topic},
};

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

/// A group's committed offset and lag in one partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lag {
    /// The topic.
    pub topic: String,
    /// The partition.
    pub partition: i32,
    /// The group's next offset; `None` if it never committed, or about another log only.
    pub committed: Option<i64>,
    /// The first offset that is still there.
    pub low: i64,
    /// The log end offset.
    pub end: i64,
}

impl Lag {
    /// Offsets not yet done. Transaction markers count too, so it can rest a little above 0.
    #[must_use]
    pub fn behind(&self) -> i64 {
        (self.end - self.committed.unwrap_or(self.low).max(self.low)).max(0)
    }
}

/// The property that says how large a batch of records may be, compressed: one record at least.
const RECORDS: &str = "max.message.bytes";
const SEGMENT: &str = "segment.bytes";

/// The property that says whose time stands in a record.
const TIME: &str = "message.timestamp.type";

/// The time at which the broker took it: then the records of a partition are in the order of their times.
const BROKERS_TIME: &str = "LogAppendTime";

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
            None => create(&admin, topic, replication, config.record_limit()).await?,
            Some(&partitions) => keep(&admin, topic, partitions, config.record_limit()).await?,
        });
    }
    Ok(changes)
}

/// The properties of a topic that weir sets.
fn properties(topic: &Topic, record_limit: usize) -> Vec<(&'static str, String)> {
    let mut properties = vec![
        ("retention.ms", topic.keep.as_millis().to_string()),
        ("cleanup.policy", if topic.is_compacted() { "compact" } else { "delete" }.to_owned()),
        // Raw replies compress to about a fifth; whatever the producer uses, the broker stores it as it came.
        ("compression.type", "producer".to_owned()),
        // A record that the broker refuses could never be committed, and would hold up all others.
        (RECORDS, record_limit.to_string()),
    ];
    // Whoever asks may give a record any time: one of long ago would be deleted at once, though nobody has read it.
    if topic.delay.is_some() || topic.kind == Kind::Request {
        properties.push((TIME, BROKERS_TIME.to_owned()));
    }
    if topic.is_compacted() {
        // Whoever starts reads all of it: small segments that are closed soon are compacted soon.
        properties.extend([
            (SEGMENT, (32 * 1024 * 1024).to_string()),
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
    record_limit: usize,
) -> Result<Change, AdminError> {
    let attempt = format!("creating topic {}", topic.name);
    let properties = properties(topic, record_limit);
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

async fn keep(
    admin: &AdminClient<DefaultClientContext>,
    topic: &Topic,
    partitions: i32,
    record_limit: usize,
) -> Result<Change, AdminError> {
    let attempt = format!("setting the retention of topic {}", topic.name);
    let properties = properties(topic, record_limit);
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

/// What is wrong with the settings of these delay topics, so that records on them could be lost or held up; `None` if
/// nothing is. They are asked for at each start, since anybody may have changed them.
///
/// # Errors
/// [`AdminError`].
pub async fn unfit_delays(config: &Config, topics: &[Topic]) -> Result<Option<String>, AdminError> {
    let names: Vec<_> = topics.iter().map(|topic| topic.name.clone()).collect();
    for (topic, settings) in topics.iter().zip(settings(config, &names).await?) {
        if let Some(what) = unfit(topic, &settings) {
            return Ok(Some(format!("topic {}: {what}. Run `weir topics apply`", topic.name)));
        }
    }
    Ok(None)
}

/// The largest batch that each of these topics takes, in bytes: the smaller of `max.message.bytes` and `segment.bytes`, its
/// own or the brokers'.
///
/// # Errors
/// [`AdminError`].
pub async fn record_limits(config: &Config, topics: &[String]) -> Result<HashMap<String, usize>, AdminError> {
    let settings = settings(config, topics).await?;
    let limit = |settings: HashMap<String, String>| {
        [RECORDS, SEGMENT].into_iter().filter_map(|name| settings.get(name)?.parse::<usize>().ok()).min()
    };
    Ok(topics.iter().cloned().zip(settings).filter_map(|(topic, settings)| Some((topic, limit(settings)?))).collect())
}

/// How old a record of this topic is at least when it is deleted; `None`: other things than age delete.
///
/// # Errors
/// [`AdminError`].
pub async fn kept_for(config: &Config, topic: &str) -> Result<Option<Duration>, AdminError> {
    Ok(settings(config, &[topic.to_owned()]).await?.first().and_then(kept_by_age))
}

/// The same, of its settings. What is kept for ever and yet is gone was deleted by hand.
fn kept_by_age(settings: &HashMap<String, String>) -> Option<Duration> {
    let is = |name: &str| settings.get(name).map(String::as_str);
    let by_age_alone = is("retention.bytes") == Some("-1") && is("cleanup.policy") == Some("delete");
    let kept = is("retention.ms").filter(|_| by_age_alone)?.parse::<u64>().ok()?;
    Some(Duration::from_millis(kept))
}

/// The settings of these topics that are in effect, in their order.
async fn settings(config: &Config, topics: &[String]) -> Result<Vec<HashMap<String, String>>, AdminError> {
    let attempt = "reading the settings of topics";
    let admin: AdminClient<DefaultClientContext> = config.base().create().map_err(|e| refused(attempt, &e))?;
    let wanted: Vec<_> = topics.iter().map(|topic| ResourceSpecifier::Topic(topic)).collect();
    let answers = admin.describe_configs(&wanted, &options()).await.map_err(|e| refused(attempt, &e))?;
    let of = |(topic, answer): (&String, rdkafka::admin::ConfigResourceResult)| {
        let settings = answer.map_err(|code| AdminError::Refused {
            attempt: format!("reading the settings of topic {topic}"),
            reason: code.to_string(),
        })?;
        Ok(settings.entries.into_iter().filter_map(|entry| Some((entry.name, entry.value?))).collect())
    };
    topics.iter().zip(answers).map(of).collect()
}

/// What is wrong with a delay topic's settings, if anything.
fn unfit(topic: &Topic, settings: &HashMap<String, String>) -> Option<String> {
    let is = |name: &str| settings.get(name).map_or("", String::as_str);
    let least = topic.delay.unwrap_or_default() * KEPT_DELAYS;
    let kept = is("retention.ms").parse::<i64>().unwrap_or(0);
    let kept = u64::try_from(kept).map_or(Duration::MAX, Duration::from_millis);
    if kept < least {
        let (kept, least) = (kept.as_millis(), least.as_millis());
        return Some(format!(
            "retention.ms is {kept}, at least {least} is needed so that waiting records are not deleted"
        ));
    }
    let needed = [(TIME, BROKERS_TIME), ("cleanup.policy", "delete"), ("retention.bytes", "-1")];
    let wrong = needed.iter().find(|(name, value)| is(name) != *value)?;
    Some(format!("{} is {:?}, {:?} is needed", wrong.0, is(wrong.0), wrong.1))
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
        let ids = topic_ids::ask(consumer.client(), wanted.iter().map(|(topic, _)| topic.as_str()), TIMEOUT)?;
        let mut lags = Vec::new();
        for element in committed.elements() {
            let (low, end) = consumer.fetch_watermarks(element.topic(), element.partition(), TIMEOUT)?;
            let committed = if let Offset::Offset(offset) = element.offset() {
                let committed = Committed { offset, metadata: element.metadata().to_owned() };
                commit_mark::of_this_log(element.topic(), &committed, &ids).map(|committed| committed.offset)
            } else {
                None
            };
            lags.push(Lag { topic: element.topic().to_owned(), partition: element.partition(), committed, low, end });
        }
        Ok(lags)
    })
    .await
}

/// Commits the end offsets of these topics for a group without members.
///
/// # Errors
/// [`AdminError`]: no broker answers, or it has members.
pub async fn begin_at_end(config: &Config, group: &str, topics: &[String]) -> Result<(), AdminError> {
    let lags = lag(config, group, topics).await?;
    let mut config = config.clone();
    config.properties.insert("group.id".to_owned(), group.to_owned());
    config.properties.insert("enable.auto.commit".to_owned(), "false".to_owned());
    let topics = topics.to_vec();
    blocking(&config, move |consumer| {
        let ids = topic_ids::ask(consumer.client(), topics.iter().map(String::as_str), TIMEOUT)?;
        let mut list = TopicPartitionList::new();
        for Lag { topic, partition, end, .. } in &lags {
            let mut element = list.add_partition(topic, *partition);
            element.set_offset(Offset::Offset(*end))?;
            element.set_metadata(commit_mark::marked(ids.get(topic).copied(), ""));
        }
        consumer.commit(&list, CommitMode::Sync)
    })
    .await
}

/// For how long the brokers remember the offsets of a group without members; `None` if they do not say.
///
/// # Errors
/// [`AdminError`]
pub async fn offsets_kept(config: &Config) -> Result<Option<Duration>, AdminError> {
    let attempt = "reading the brokers' offsets.retention.minutes";
    let broker = blocking(config, |consumer| {
        let metadata = consumer.fetch_metadata(None, TIMEOUT)?;
        Ok(metadata.brokers().first().map(rdkafka::metadata::MetadataBroker::id))
    });
    let Some(broker) = broker.await? else { return Ok(None) };
    let admin: AdminClient<DefaultClientContext> = config.base().create().map_err(|e| refused(attempt, &e))?;
    let answers = admin.describe_configs(&[ResourceSpecifier::Broker(broker)], &options()).await;
    // Who may not read the brokers' settings does without.
    let entries = answers.map_err(|e| refused(attempt, &e))?.into_iter().flatten().flat_map(|answer| answer.entries);
    let minutes = entries.into_iter().find(|entry| entry.name == "offsets.retention.minutes");
    let minutes = minutes.and_then(|entry| entry.value?.parse::<u64>().ok());
    Ok(minutes.map(|minutes| Duration::from_secs(minutes.saturating_mul(60))))
}

/// Whether the group has a member with this `group.instance.id`.
///
/// # Errors
/// [`AdminError::Unreachable`] after ten seconds without an answer.
pub async fn has_member(config: &Config, group: &str, instance: &str) -> Result<bool, AdminError> {
    let (group, instance) = (group.to_owned(), instance.to_owned());
    blocking(config, move |consumer| {
        let list = consumer.fetch_group_list(Some(&group), TIMEOUT)?;
        let mut members = list.groups().iter().flat_map(rdkafka::groups::GroupInfo::members);
        Ok(members.any(|member| is_of(member.id(), &instance)))
    })
    .await
}

/// Whether the broker has made this member id from this `group.instance.id`: it adds a hyphen and a UUID. The instance `x-1`
/// is not `x`.
fn is_of(member: &str, instance: &str) -> bool {
    let added = member.strip_prefix(instance).and_then(|rest| rest.strip_prefix('-'));
    added.is_some_and(|uuid| uuid.len() == 36 && uuid.chars().all(|c| c == '-' || c.is_ascii_hexdigit()))
}

/// Whether the group has any member.
///
/// # Errors
/// [`AdminError::Unreachable`] after ten seconds without an answer.
pub async fn has_members(config: &Config, group: &str) -> Result<bool, AdminError> {
    let group = group.to_owned();
    blocking(config, move |consumer| {
        let list = consumer.fetch_group_list(Some(&group), TIMEOUT)?;
        Ok(list.groups().iter().any(|group| !group.members().is_empty()))
    })
    .await
}

/// Deletes the records of these partitions before these offsets, for good.
///
/// # Errors
/// [`AdminError`], naming the first partition that was refused; others may have been cleared.
pub async fn delete_before(config: &Config, offsets: &[(Partition, i64)]) -> Result<(), AdminError> {
    let attempt = "deleting records";
    let admin: AdminClient<DefaultClientContext> = config.base().create().map_err(|e| refused(attempt, &e))?;
    let mut list = TopicPartitionList::new();
    for (partition, offset) in offsets {
        list.add_partition_offset(&partition.topic, partition.number, Offset::Offset(*offset))
            .map_err(|e| refused(attempt, &e))?;
    }
    let result = admin.delete_records(&list, &options()).await.map_err(|e| refused(attempt, &e))?;
    for element in result.elements() {
        let attempt = format!("{attempt} of {}/{}", element.topic(), element.partition());
        element.error().map_err(|e| refused(&attempt, &e))?;
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topics::{self, Topics};

    #[test]
    fn an_instance_is_not_taken_for_one_whose_name_goes_on() {
        let uuid = "0f8fad5b-d9cb-469f-a165-70867728950e";
        assert!(is_of(&format!("weir.sink.x-{uuid}"), "weir.sink.x"));
        assert!(is_of(&format!("weir.sink.x-1-{uuid}"), "weir.sink.x-1"));
        assert!(!is_of(&format!("weir.sink.x-1-{uuid}"), "weir.sink.x"));
        assert!(!is_of(&format!("weir.sink.xy-{uuid}"), "weir.sink.x"));
    }

    #[test]
    fn a_topic_is_kept_for_its_time_only_where_nothing_but_age_deletes() {
        let of = |ms: &str, bytes: &str, policy: &str| {
            let settings = [("retention.ms", ms), ("retention.bytes", bytes), ("cleanup.policy", policy)];
            kept_by_age(&settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into())
        };
        assert_eq!(of("60000", "-1", "delete"), Some(Duration::from_secs(60)));
        assert_eq!(of("-1", "-1", "delete"), None);
        assert_eq!(of("60000", "1000", "delete"), None);
        assert_eq!(of("60000", "-1", "compact,delete"), None);
        assert_eq!(kept_by_age(&HashMap::new()), None);
    }

    #[test]
    fn a_delay_topic_that_could_lose_or_hold_up_what_waits_is_unfit() {
        let topic = Topics::new(topics::Config::default()).delays().remove(1);
        let with = |name: &str, value: &str| {
            let mut settings: HashMap<_, _> =
                properties(&topic, 1_000_000).into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
            settings.insert("retention.bytes".to_owned(), "-1".to_owned());
            settings.insert(name.to_owned(), value.to_owned());
            unfit(&topic, &settings)
        };
        for (name, value) in [("retention.ms", "-1"), ("retention.ms", "16000")] {
            assert_eq!(with(name, value), None, "{name}={value}");
        }
        let wrong = [
            ("retention.ms", "15999"),
            ("retention.bytes", "1000000"),
            ("cleanup.policy", "compact,delete"),
            (TIME, "CreateTime"),
        ];
        for (name, value) in wrong {
            let found = with(name, value).unwrap_or_default();
            assert!(found.contains(name) && found.contains(value), "{name}={value}: {found}");
        }
    }
}
