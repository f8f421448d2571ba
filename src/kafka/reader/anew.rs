//! Topics that are deleted and re-created: detected at each assignment and while reading, and read from their start.

use std::{collections::BTreeSet, time::Duration};

use rdkafka::{
    TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::KafkaError,
    topic_partition_list::TopicPartitionListElem,
};
use tokio::time::Instant;
use tracing::{debug, warn};

use super::{ASK, Context, Noting, ReadError, TopicIds, commit_mark, list_of, topic_ids};
use crate::kafka::{log_names::Names, topic_ids::Asking};

/// How often the ids of the topics are asked for. What is read of another log in the meantime is read under the wrong
/// offsets, and once more when it is noticed.
const EVERY: Duration = Duration::from_secs(5);

/// Looks every few seconds whether the topics are still the same.
pub(super) struct Watch<'a> {
    consumer: &'a BaseConsumer<Context>,
    asking: Option<Asking<'a>>,
    next: Instant,
}

impl<'a> Watch<'a> {
    pub(super) fn new(consumer: &'a BaseConsumer<Context>) -> Self {
        Self { consumer, asking: None, next: Instant::now() + EVERY }
    }

    /// Asks when it is time, and takes the answer when it is there; never waits.
    pub(super) fn look(&mut self) {
        let context = self.consumer.context();
        if let Some(asking) = &self.asking {
            let Some(answer) = asking.poll(Duration::ZERO) else { return };
            self.asking = None;
            match answer {
                Ok(ids) => context.begin_anew(self.consumer, &ids),
                // Whatever is wrong with the brokers is told by those who read.
                Err(error) => debug!(group = context.group.group, %error, "asking for topic ids"),
            }
        } else if Instant::now() >= self.next {
            self.next = Instant::now() + EVERY;
            let topics = context.membership.topics(context.member);
            if !topics.is_empty() {
                self.asking = Asking::begin(self.consumer.client(), topics.iter().map(|topic| &**topic), ASK).ok();
            }
        }
    }
}

impl Context {
    /// The ids of the topics of these commits, and what their logs are called; says which were re-created.
    pub(super) fn look_up(
        &self,
        consumer: &BaseConsumer<Self>,
        commits: &TopicPartitionList,
    ) -> Result<TopicIds, ReadError> {
        let elements = commits.elements();
        let topics: BTreeSet<&str> = elements.iter().map(TopicPartitionListElem::topic).collect();
        let ask = || topic_ids::ask(consumer.client(), topics.iter().copied(), ASK);
        let ids = self.insist("asking for topic ids", ask)?;
        let names = self.names(&ids)?;
        let mut shared = self.shared();
        for (topic, id) in &ids {
            let of_topic = elements.iter().filter(|element| element.topic() == topic);
            let mut committed = of_topic.filter_map(|element| commit_mark::read(element.metadata()).0);
            let former = committed.find(|of| of != id).or(shared.known.get(topic).copied()).filter(|of| of != id);
            if let Some(former) = former {
                warn!(
                    group = self.group.group, topic, %former, now = %id, log = names.name(topic),
                    "the topic was deleted and re-created: starting at its first record"
                );
            }
        }
        shared.known.extend(ids.iter().map(|(topic, id)| (topic.clone(), *id)));
        shared.names.extend(names);
        Ok(ids)
    }

    /// The names of the logs; if they cannot be looked up, the topics' names.
    fn names(&self, ids: &TopicIds) -> Result<Names, ReadError> {
        let logs = &self.config.logs;
        self.insist("looking up recorded topic ids", || match logs.names(&self.config, ids, Noting::Yes) {
            Err(error) if logs.is_hopeless(&error) => {
                logs.do_without(&error);
                Ok(Names::default())
            }
            answer => answer,
        })
    }

    /// Leaves the partitions of topics that have another id by now, as if they went to another member, and takes them
    /// again.
    pub(super) fn begin_anew(&self, consumer: &BaseConsumer<Self>, now: &TopicIds) {
        let outdated = self.membership.outdated(self.member, now);
        if outdated.is_empty() {
            return;
        }
        let list = list_of(&outdated);
        self.hand_over(&outdated);
        self.let_go(&outdated);
        match consumer.incremental_unassign(&list) {
            Ok(()) => self.assign(consumer, &list),
            Err(error) => self.push(Err(self.failed(format!("unassigning re-created topics: {error}")))),
        }
    }

    /// Begins anew what is another log by now, out of turn; false if all of it is the same.
    pub(super) fn is_begun_anew(&self, consumer: &BaseConsumer<Self>, topic: &str) -> Result<bool, ReadError> {
        let ask = || -> Result<TopicIds, KafkaError> { topic_ids::ask(consumer.client(), [topic], ASK) };
        let now = self.insist("asking for the id of a topic", ask)?;
        if self.membership.outdated(self.member, &now).is_empty() {
            return Ok(false);
        }
        self.begin_anew(consumer, &now);
        Ok(true)
    }
}
