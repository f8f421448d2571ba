//! Names of a topic's successive logs: the first is named as the topic, each later one by the start of its topic id.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use rdkafka::{error::KafkaError, types::RDKafkaErrorCode};
use tracing::warn;

use super::{Partition, topic_ids::TopicId};

/// How often the roles of a process, all together, ask for the notes before they go on without.
const TRIES: u32 = 6;

/// What the key of a note on the control topic begins with.
pub const KEY: &str = "log/";

/// Where the notes are, and what has been read of them. Clones share it.
#[derive(Clone, Default)]
pub struct Logs {
    /// The control topic; `None`: nothing is noted, and every log is called by its topic's name.
    pub(super) control: Option<Arc<str>>,
    pub(super) firsts: Arc<Mutex<HashMap<String, TopicId>>>,
    /// Tries in a row, of whatever role, that came to nothing.
    pub(super) failures: Arc<AtomicU32>,
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
pub struct Names(pub(super) HashMap<String, Arc<str>>);

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
pub(super) fn name(topic: &str, id: TopicId) -> Arc<str> {
    format!("{topic}@{}", id.short()).into()
}

/// The topic of a log.
#[must_use]
pub fn topic_of(log: &str) -> &str {
    log.split_once('@').map_or(log, |(topic, _)| topic)
}

impl Logs {
    /// The notes are on this topic.
    #[must_use]
    pub fn noted_on(control: &str) -> Self {
        Self { control: Some(control.into()), ..Self::default() }
    }

    /// Asking for what logs are called has failed by this error; whether it is not worth another try: for want of a
    /// permission, since it was not before, or since all roles together have tried it often enough.
    pub(super) fn is_hopeless(&self, error: &KafkaError) -> bool {
        let failures = self.failures.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        failures >= TRIES || self.unread.load(Ordering::Relaxed) || is_forbidden(error)
    }

    /// Says, once, that logs are called by their topics' names since the notes cannot be read.
    pub(super) fn do_without(&self, error: &KafkaError) {
        if !self.unread.swap(true, Ordering::Relaxed) {
            let control = self.control.as_deref().unwrap_or_default();
            warn!(
                control, %error,
                "cannot read the control topic: a topic that is deleted and re-created cannot be told from the former \
                 one. Does this user have Read and Describe permission on topic {control}, and are its replicas \
                 online?"
            );
        }
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
    fn the_tries_of_all_roles_count_together() {
        let logs = Logs::noted_on("control");
        let away = KafkaError::MessageConsumption(RDKafkaErrorCode::OperationTimedOut);
        let roles: Vec<Logs> = (0..3).map(|_| logs.clone()).collect();
        let hopeless = (0..7).map(|n: usize| roles[n % 3].is_hopeless(&away)).collect::<Vec<_>>();
        assert_eq!(hopeless, [false, false, false, false, false, true, true]);
    }
}
