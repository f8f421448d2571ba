//! What the logs are called that a topic's name has had, and where the first of them is noted.
//!
//! Rows and ids name a record by topic, partition and offset. When a topic is deleted and made anew, other records get
//! the same places. So the first log of a name is called by the topic's name, and any later one `topic@1a2b3c4d`, by the
//! start of its id: no topic can be called so. The id of the first one is noted on the control topic, under the key
//! `log/<topic>`, by whoever meets the topic first; what rows there are from before are of that log.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
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
    Partition,
    admin::AdminError,
    client::Config,
    scan,
    topic_ids::{self, TopicId, TopicIds},
};

/// How long the brokers may take for one answer.
const ASK: Duration = Duration::from_secs(10);

/// What the key of a note begins with.
pub const KEY: &str = "log/";

/// A note on the control topic: the first log of a topic's name.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    topic: String,
    first_id: String,
}

/// Where the notes are, and what has been read of them. Clones share it.
#[derive(Clone, Default)]
pub struct Logs {
    /// The control topic; `None`: nothing is noted, and every log is called by its topic's name.
    control: Option<Arc<str>>,
    firsts: Arc<Mutex<HashMap<String, TopicId>>>,
    /// Whether an assignment has gone on without.
    unread: Arc<AtomicBool>,
}

impl fmt::Debug for Logs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Logs")
    }
}

/// What logs are called that are not called by their topic's name.
#[derive(Clone, Debug, Default)]
pub struct Names(HashMap<String, Arc<str>>);

impl Names {
    /// The name of a topic's log, if it is not the topic's.
    #[must_use]
    pub fn of(&self, topic: &str) -> Option<&Arc<str>> {
        self.0.get(topic)
    }

    /// Those of other topics too; of the same, what they are called now.
    pub(super) fn extend(&mut self, more: Self) {
        self.0.extend(more.0);
    }

    /// The name of a topic's log.
    #[must_use]
    pub fn name<'a>(&'a self, topic: &'a str) -> &'a str {
        self.of(topic).map_or(topic, |name| name)
    }

    /// The partition as rows name it.
    #[must_use]
    pub fn partition(&self, partition: &Partition) -> Partition {
        let topic = self.of(&partition.topic).unwrap_or(&partition.topic);
        Partition { topic: Arc::clone(topic), number: partition.number }
    }
}

/// What a later log is called.
fn name(topic: &str, id: TopicId) -> Arc<str> {
    format!("{topic}@{}", id.short()).into()
}

/// The topic of a log.
#[must_use]
pub fn topic_of(log: &str) -> &str {
    log.split_once('@').map_or(log, |(topic, _)| topic)
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
    /// The notes are on this topic.
    #[must_use]
    pub fn noted_on(control: &str) -> Self {
        Self { control: Some(control.into()), ..Self::default() }
    }

    /// Whether asking again for what logs are called would be in vain: for want of a permission, or since it was already.
    pub(super) fn is_hopeless(&self, error: &KafkaError) -> bool {
        self.unread.load(Ordering::Relaxed) || is_forbidden(error)
    }

    /// Says, once, that logs are called by their topics' names since the notes cannot be read.
    pub(super) fn do_without(&self, error: &KafkaError) {
        if !self.unread.swap(true, Ordering::Relaxed) {
            let control = self.control.as_deref().unwrap_or_default();
            warn!(
                control, %error,
                "the control topic cannot be read: topics that are deleted and made anew are not told from the former \
                 ones. Does this user have the permissions Read and Describe on topic {control}, and are its replicas there?"
            );
        }
    }

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
                debug!(control, "there is no control topic: no log is noted");
                return Ok(Names::default());
            };
            firsts.extend(noted);
            let new: Vec<_> = ids.iter().filter(|(topic, _)| is_new(&firsts, topic)).collect();
            if noting == Noting::Yes && !new.is_empty() {
                write(config, control, &new)?;
                firsts.extend(read(config, control)?.unwrap_or_default());
                if let Some((topic, _)) = new.iter().find(|(topic, _)| is_new(&firsts, topic)) {
                    warn!(
                        topic,
                        control,
                        "the topic's id could not be noted on the control topic: if the topic is deleted and made \
                         anew, its records are taken for the former ones. May this user write to {control}?"
                    );
                }
            }
        }
        let later = ids.iter().filter(|(topic, id)| firsts.get(*topic).is_some_and(|first| first != *id));
        Ok(Names(later.map(|(topic, id)| (topic.clone(), name(topic, *id))).collect()))
    }
}

/// Whether the brokers refuse this user.
fn is_forbidden(error: &KafkaError) -> bool {
    use RDKafkaErrorCode as Code;
    matches!(
        error.rdkafka_error_code(),
        Some(Code::TopicAuthorizationFailed | Code::GroupAuthorizationFailed | Code::ClusterAuthorizationFailed)
    )
}

/// The notes; `None` if there is no such topic.
fn read(config: &Config, control: &str) -> KafkaResult<Option<HashMap<String, TopicId>>> {
    let mut noted = HashMap::new();
    let consumer = scan::consumer(config, true)?;
    let done = scan::read_whole(&consumer, control, |record| {
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
    scan::blocking(config, "looking up the ids of topics", move || names_of(&of, &topics, noting)).await
}

/// The same, blocking.
pub(super) fn names_of(config: &Config, topics: &[String], noting: Noting) -> Result<Names, KafkaError> {
    if config.logs.control.is_none() || topics.is_empty() {
        return Ok(Names::default());
    }
    let consumer = scan::consumer(config, false)?;
    let ids = topic_ids::ask(rdkafka::consumer::Consumer::client(&consumer), topics.iter().map(String::as_str), ASK)?;
    config.logs.names(config, &ids, noting)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_permission_nobody_asks_again_and_after_going_on_without_nobody_asks_often() {
        let logs = Logs::noted_on("control");
        let forbidden = KafkaError::MessageConsumption(RDKafkaErrorCode::TopicAuthorizationFailed);
        let away = KafkaError::MessageConsumption(RDKafkaErrorCode::OperationTimedOut);
        assert!(logs.is_hopeless(&forbidden) && !logs.is_hopeless(&away));
        logs.clone().do_without(&away);
        assert!(logs.is_hopeless(&away));
    }

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
