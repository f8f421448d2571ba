//! Names of a topic's successive logs when it is deleted and re-created, and the record of the first topic id.
//!
//! Rows and ids name a record by topic, partition and offset. When a topic is deleted and re-created, other records get
//! the same places. So the first log of a name is called by the topic's name, and any later one `topic@1a2b3c4d`, by the
//! start of its id: no topic can be called so. The id of the first one is noted on the control topic, under the key
//! `log/<topic>`, by whoever meets the topic first; what rows there are from before are of that log.

use std::{
    collections::HashMap,
    sync::{PoisonError, atomic::Ordering},
    time::Duration,
};

use rdkafka::{
    error::{KafkaError, KafkaResult},
    producer::{BaseProducer, BaseRecord, Producer as _},
    types::RDKafkaErrorCode,
};
use serde::{Deserialize, Serialize};
use tracing::{debug, warn};

use super::{
    admin::AdminError,
    ask,
    client::Config,
    log_names::{KEY, Logs, Names, name},
    topic_ids::{self, TopicId, TopicIds},
};

/// How long the brokers may take for one answer.
const ASK: Duration = Duration::from_secs(10);

/// A note on the control topic: the first log of a topic's name.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    topic: String,
    first_id: String,
}

/// Whether a first log that is not noted yet is to be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Noting {
    /// By roles, and by `weir topics apply`.
    Yes,
    /// By whoever only reads.
    No,
}

impl Logs {
    /// What the logs with these ids are called. Blocks.
    ///
    /// # Errors
    /// [`KafkaError`]: the brokers did not answer.
    pub(super) fn names(&self, config: &Config, ids: &TopicIds, noting: Noting) -> KafkaResult<Names> {
        let Some(control) = self.control.as_deref() else { return Ok(Names::default()) };
        let mut firsts = self.firsts.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = |firsts: &HashMap<String, TopicId>, topic: &str| topic != control && !firsts.contains_key(topic);
        if ids.keys().any(|topic| is_new(&firsts, topic)) {
            let Some(noted) = read(config, control)? else {
                debug!(control, "there is no control topic: topic ids are not recorded");
                return Ok(Names::default());
            };
            self.failures.store(0, Ordering::Relaxed);
            firsts.extend(noted);
            let new: Vec<_> = ids.iter().filter(|(topic, _)| is_new(&firsts, topic)).collect();
            if noting == Noting::Yes && !new.is_empty() {
                write(config, control, &new)?;
                firsts.extend(read(config, control)?.unwrap_or_default());
                if let Some((topic, _)) = new.iter().find(|(topic, _)| is_new(&firsts, topic)) {
                    warn!(
                        topic,
                        control,
                        "cannot record the topic's id on the control topic: if the topic is deleted and re-created, \
                         its records are taken for the former ones. Does this user have Write permission on topic \
                         {control}?"
                    );
                }
            }
        }
        let later = ids.iter().filter(|(topic, id)| firsts.get(*topic).is_some_and(|first| first != *id));
        Ok(Names(later.map(|(topic, id)| (topic.clone(), name(topic, *id))).collect()))
    }
}

/// The notes; `None` if there is no such topic.
fn read(config: &Config, control: &str) -> KafkaResult<Option<HashMap<String, TopicId>>> {
    let mut noted = HashMap::new();
    let consumer = ask::consumer(config, true)?;
    let done = ask::read_whole(&consumer, control, |record| {
        let is_note = record.key.as_ref().is_some_and(|key| key.starts_with(KEY.as_bytes()));
        let note = record.value.filter(|_| is_note).and_then(|value| serde_json::from_slice::<Note>(&value).ok());
        if let Some((topic, id)) = note.and_then(|note| Some((note.topic, note.first_id.parse().ok()?))) {
            noted.insert(topic, id);
        }
    });
    match done {
        Ok(()) => Ok(Some(noted)),
        Err(error) if error.rdkafka_error_code() == Some(RDKafkaErrorCode::UnknownTopicOrPartition) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether all of them were taken shows when they are read again.
fn write(config: &Config, control: &str, firsts: &[(&String, &TopicId)]) -> KafkaResult<()> {
    let producer: BaseProducer = config.producer().set("message.timeout.ms", "8000").create()?;
    for (topic, id) in firsts {
        let note = Note { topic: (*topic).clone(), first_id: id.to_string() };
        let (key, value) = (format!("{KEY}{topic}"), serde_json::to_vec(&note).unwrap_or_default());
        producer.send(BaseRecord::to(control).key(&key).payload(&value)).map_err(|(error, _)| error)?;
    }
    producer.flush(ASK)
}

/// What the logs of these topics are called now.
///
/// # Errors
/// [`AdminError`]
pub async fn names(config: &Config, topics: &[String]) -> Result<Names, AdminError> {
    look(config, topics, Noting::No).await
}

/// Notes the first log of these topics, where none is noted yet.
///
/// # Errors
/// [`AdminError`]
pub async fn note(config: &Config, topics: &[String]) -> Result<(), AdminError> {
    look(config, topics, Noting::Yes).await.map(drop)
}

async fn look(config: &Config, topics: &[String], noting: Noting) -> Result<Names, AdminError> {
    let (of, topics) = (config.clone(), topics.to_vec());
    ask::blocking(config, "looking up the ids of topics", move || names_of(&of, &topics, noting)).await
}

/// The same, blocking.
pub(super) fn names_of(config: &Config, topics: &[String], noting: Noting) -> Result<Names, KafkaError> {
    if config.logs.control.is_none() || topics.is_empty() {
        return Ok(Names::default());
    }
    let consumer = ask::consumer(config, false)?;
    let ids = topic_ids::ask(rdkafka::consumer::Consumer::client(&consumer), topics.iter().map(String::as_str), ASK)?;
    config.logs.names(config, &ids, noting)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kafka::{Partition, log_names::topic_of};

    #[test]
    fn the_first_log_is_called_as_its_topic_and_a_later_one_as_no_topic_can_be() {
        let logs = Logs::noted_on("control");
        let (first, later) = (topic_ids::id(1), topic_ids::id(0xab));
        logs.firsts.lock().unwrap().extend([("a".to_owned(), first), ("b".to_owned(), first)]);
        let ids = [("a".to_owned(), first), ("b".to_owned(), later)].into();
        let names = logs.names(&Config::default(), &ids, Noting::No).unwrap();
        assert_eq!((names.name("a"), names.name("b"), names.name("c")), ("a", "b@abababab", "c"));
        let partition = |topic: &str| Partition { topic: topic.into(), number: 3 };
        assert_eq!(names.partition(&partition("b")), partition("b@abababab"));
        assert_eq!(names.partition(&partition("a")), partition("a"));
        assert_eq!((topic_of("b@abababab"), topic_of("a")), ("b", "a"));
    }
}
