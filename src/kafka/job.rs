//! A resumable batch job: its records and its progress are committed in one transaction.
//!
//! The progress is kept as the committed offsets of a consumer group without members, where the next run finds it
//! from any machine. Jobs that must not run at the same time share a transactional id: the second one fences the first.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rdkafka::{
    Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer},
};

use tracing::{debug, error};

use super::{
    Committed, Instead, Outgoing, Partition, TooLarge, TransactError,
    admin::AdminError,
    client::Config,
    commit_mark,
    outbox::Position,
    scan,
    topic_ids::{self, TopicIds},
    writer::Transactions,
};
use crate::runtime::clock::Timestamp;

const TIMEOUT: Duration = Duration::from_secs(10);

/// How often a transaction that is rolled back is tried.
const TIMES: u32 = 5;

/// How far a job has come in a partition.
pub type Progress = (Partition, Committed);

/// A running job: the only one of its name.
pub struct Job {
    inner: Arc<Inner>,
}

struct Inner {
    group: String,
    config: Config,
    transactions: Transactions,
    /// Never subscribes: only what the group's name and the absence of a generation are read from.
    consumer: BaseConsumer,
    /// Which logs its progress is about, as first seen.
    ids: Mutex<TopicIds>,
}

impl Inner {
    /// The ids of the topics that the progress is about.
    fn ids(&self, progress: &[Progress]) -> Result<TopicIds, TransactError> {
        let mut known = self.ids.lock().unwrap_or_else(PoisonError::into_inner);
        let new: BTreeSet<&str> = progress.iter().map(|(partition, _)| &*partition.topic).collect();
        let new: Vec<&str> = new.into_iter().filter(|topic| !known.contains_key(*topic)).collect();
        if !new.is_empty() {
            let asked = topic_ids::ask(self.consumer.client(), new, TIMEOUT);
            known.extend(asked.map_err(|error| TransactError::Aborted(format!("asking for topic ids: {error}")))?);
        }
        Ok(known.clone())
    }
}

impl Job {
    /// Takes over `name` (the transactional id) and fences its former user: that one's open transaction is aborted, and
    /// it cannot commit any more. The progress is kept in `group`.
    ///
    /// # Errors
    /// [`TransactError`]
    pub async fn open(config: &Config, name: &str, group: &str) -> Result<Self, TransactError> {
        let (config, name, group) = (config.clone(), name.to_owned(), group.to_owned());
        let opened = tokio::task::spawn_blocking(move || {
            let consumer: BaseConsumer = config
                .base()
                .set("group.id", &group)
                .set("enable.auto.commit", "false")
                .create()
                .map_err(|error| TransactError::Rebuild(format!("making a consumer: {error}")))?;
            let transactions = Transactions::start(&config, name, None)?;
            Ok(Self { inner: Arc::new(Inner { group, config, transactions, consumer, ids: Mutex::default() }) })
        });
        opened.await.map_err(|error| TransactError::Rebuild(error.to_string()))?
    }

    /// How far earlier runs have come in these topics.
    ///
    /// # Errors
    /// [`AdminError`]
    pub async fn progress(&self, topics: &[String]) -> Result<Vec<Progress>, AdminError> {
        let found = scan::committed(&self.inner.config, &self.inner.group, topics).await?;
        Ok(found.into_iter().filter_map(|(partition, committed)| Some((partition, committed?))).collect())
    }

    /// Writes records together with the progress that they are.
    ///
    /// # Cancellation
    /// The transaction is run to its end all the same.
    ///
    /// # Errors
    /// [`TransactError`]: `Aborted` may be tried again, after anything else the job has to be opened anew.
    pub async fn commit(&self, records: Vec<Outgoing>, progress: Vec<Progress>) -> Result<(), TransactError> {
        let inner = Arc::clone(&self.inner);
        let done = tokio::task::spawn_blocking(move || {
            let ids = inner.ids(&progress)?;
            let mut list = TopicPartitionList::with_capacity(progress.len());
            for (partition, committed) in &progress {
                let mut element = list.add_partition(&partition.topic, partition.number);
                let set = element.set_offset(Offset::Offset(committed.offset));
                set.map_err(|error| TransactError::Rebuild(format!("offset of {partition}: {error}")))?;
                let id = ids.get(&*partition.topic).copied();
                element.set_metadata(commit_mark::marked(id, &committed.metadata));
            }
            let metadata = inner.consumer.group_metadata();
            let metadata = metadata.ok_or_else(|| TransactError::Rebuild("the consumer has no group".to_owned()))?;
            inner.transactions.transact(&records, &[(list, metadata)])
        });
        done.await.map_err(|error| TransactError::Rebuild(error.to_string()))?
    }

    /// As [`Self::commit`]; what is rolled back is made again, a few times.
    ///
    /// # Errors
    /// [`TransactError`]
    pub async fn insist(&self, records: Vec<Outgoing>, progress: Vec<Progress>) -> Result<(), TransactError> {
        for _ in 1..TIMES {
            match self.commit(records.clone(), progress.clone()).await {
                Err(TransactError::Aborted(reason)) => debug!(reason, "transaction aborted; trying again"),
                done => return done,
            }
        }
        self.commit(records, progress).await
    }

    /// As [`Self::insist`], with the records that each is made of; one that its topic does not take holds up no other: a
    /// dead letter by `instead` is written in its place. Gives back what was too large.
    ///
    /// # Errors
    /// [`TransactError`], also where nothing smaller can be said.
    pub async fn insist_or_set_aside(
        &self,
        records: Vec<(Outgoing, Position)>,
        progress: Vec<Progress>,
        instead: &Instead,
        now: Timestamp,
    ) -> Result<Vec<TooLarge>, TransactError> {
        let (mut records, origins): (Vec<Outgoing>, Vec<Position>) = records.into_iter().unzip();
        let mut set_aside = Vec::new();
        loop {
            match self.insist(records.clone(), progress.clone()).await {
                Err(TransactError::TooLarge(all)) => {
                    for why in &all {
                        error!(record = %why, "a record is too large for Kafka; writing a dead letter instead");
                    }
                    instead.replace(&mut records, &origins, &all, now)?;
                    set_aside.extend(all);
                }
                done => return done.map(|()| set_aside),
            }
        }
    }

    /// Ends the job for good: its progress is deleted, so that the next run under this name begins anew.
    ///
    /// # Errors
    /// [`AdminError`]
    pub async fn forget(self) -> Result<(), AdminError> {
        let Inner { group, config, .. } = &*self.inner;
        let attempt = format!("deleting the group {group}");
        let refused = |reason: String| AdminError::Refused { attempt: attempt.clone(), reason };
        let admin: AdminClient<DefaultClientContext> =
            config.base().create().map_err(|error| refused(error.to_string()))?;
        let options = AdminOptions::new().request_timeout(Some(TIMEOUT));
        let results = admin.delete_groups(&[group], &options).await.map_err(|error| refused(error.to_string()))?;
        for result in results {
            result.map_err(|(_, code)| refused(code.to_string()))?;
        }
        Ok(())
    }
}
