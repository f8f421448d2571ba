//! Detects consumer groups that have lost their offsets, which would silently repeat work whose outcomes are stored.
//!
//! Kafka forgets a group's offsets when it is deleted, or has had no member for longer than the brokers'
//! `offsets.retention.minutes` (seven days, if nobody has set it). Then it looks like a first start. It is none if
//! ClickHouse knows how requests have ended that are on the topic.

use std::fmt;

use tracing::warn;

use super::process::{Begin, Process, RoleError};
use crate::{
    kafka::{admin, logs},
    message::envelope::Kind,
    runtime::health::RoleHealth,
    store::{self, present::Place},
};

/// How often the group's offsets are checked again.
const LOOK_AGAIN: std::time::Duration = std::time::Duration::from_secs(30);

/// A topic that a group without offsets would begin anew.
#[derive(Debug, PartialEq, Eq)]
struct Forgotten {
    group: String,
    topic: String,
    records: i64,
}

impl fmt::Display for Forgotten {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { group, topic, records } = self;
        write!(
            f,
            "group {group} has no offsets for {topic} (deleted, or weir was stopped for longer than the brokers' \
             offsets.retention.minutes), but ClickHouse has outcomes of requests that are on it: its {records} offsets are not processed again unasked. Start once with `weir run --from latest` to continue with new records only, or with --from earliest to process all of it again"
        )
    }
}

impl Process {
    /// Waits until it is known where the group begins; false if the process stops before that. `kind`: what its topics
    /// hold. A first start is let through, and so is what ClickHouse cannot be asked about.
    pub(super) async fn has_its_place(
        &self,
        (group, topics, kind): (&str, &[String], Kind),
        health: &RoleHealth,
    ) -> Result<bool, RoleError> {
        loop {
            let found = tokio::select! {
                () = self.stop.cancelled() => return Ok(false),
                found = self.forgotten(group, topics, kind) => found?,
            };
            let Some(forgotten) = found else { return Ok(true) };
            match self.begin {
                Some(Begin::Earliest) => {
                    warn!(
                        group,
                        topic = forgotten.topic,
                        "the group has lost its offsets: starting at the first record (--from earliest)"
                    );
                    return Ok(true);
                }
                Some(Begin::Latest) => {
                    let topic = forgotten.topic;
                    let begun = admin::begin_at_end(&self.config.kafka, group, std::slice::from_ref(&topic)).await;
                    begun.map_err(|error| RoleError::Failed(error.into()))?;
                    warn!(group, topic, "the group has lost its offsets: starting at the end (--from latest)");
                }
                None => {
                    warn!("{forgotten}");
                    health.not_ready(forgotten.to_string());
                    tokio::select! {
                        () = self.stop.cancelled() => return Ok(false),
                        () = tokio::time::sleep(LOOK_AGAIN) => {}
                    }
                }
            }
        }
    }

    async fn forgotten(&self, group: &str, topics: &[String], kind: Kind) -> Result<Option<Forgotten>, RoleError> {
        let failed = |error: admin::AdminError| RoleError::Failed(error.into());
        let lags = admin::lag(&self.config.kafka, group, topics).await.map_err(failed)?;
        for topic in topics {
            let of_topic = || lags.iter().filter(|lag| lag.topic == *topic);
            let records: i64 = of_topic().map(|lag| lag.end - lag.low).sum();
            if records == 0 || of_topic().any(|lag| lag.committed.is_some()) {
                continue;
            }
            let names = logs::names(&self.config.kafka, std::slice::from_ref(topic)).await.map_err(failed)?;
            let lows: Vec<_> = of_topic().map(|lag| (lag.partition, lag.low)).collect();
            let store =
                store::Store::connect(&self.config.clickhouse).map_err(|error| RoleError::Failed(error.into()))?;
            match store.knows_ends(&Place::of(kind), names.name(topic), &lows).await {
                Ok(true) => return Ok(Some(Forgotten { group: group.to_owned(), topic: topic.clone(), records })),
                Ok(false) => {}
                Err(trouble) => warn!(
                    group, topic, %trouble,
                    "the group has no offsets and starts at the first record; whether this is its first start is \
                     unknown, since ClickHouse does not answer"
                ),
            }
        }
        Ok(None)
    }
}
