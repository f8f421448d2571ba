//! Cancelled batches, read from the control topic: the stage that holds one of their requests ends it.

use std::{collections::HashMap, sync::Arc};

use tokio::{sync::watch, task::JoinSet};

use crate::{
    kafka::{
        Partition, ReadError, Record, client,
        follow::{Follower, Seen},
        log_names::KEY,
    },
    message::{BatchId, Cancellation, Request, codec},
    runtime::clock::Timestamp,
};

type Batches = Arc<HashMap<BatchId, Timestamp>>;

/// The cancelled batches, as far as they are known now.
#[derive(Debug)]
pub struct Cancelled {
    now: watch::Receiver<Batches>,
    /// Reads on; ends with this.
    _reading: JoinSet<()>,
}

impl Cancelled {
    /// Knows of none, for ever.
    #[must_use]
    pub fn none() -> Self {
        Self { now: watch::channel(Batches::default()).1, _reading: JoinSet::new() }
    }

    /// Follows the control topic; returns when all that is on it is known.
    ///
    /// # Errors
    /// [`ReadError`]: it is not there, or cannot be read.
    pub async fn follow(kafka: &client::Config, topic: &str) -> Result<Self, ReadError> {
        let (sender, now) = watch::channel(Batches::default());
        let partition = Partition { topic: topic.into(), number: 0 };
        let mut follower = Follower::open(kafka, topic).await?;
        while let Seen::Record(record) = follower.next().await? {
            if is_other(&record) {
                continue;
            }
            note(&sender, &record.raw(&partition));
        }
        let mut reading = JoinSet::new();
        reading.spawn(async move {
            loop {
                match follower.next().await {
                    Ok(Seen::Record(record)) if is_other(&record) => {}
                    Ok(Seen::Record(record)) => note(&sender, &record.raw(&partition)),
                    Ok(Seen::CaughtUp) => {}
                    // What is known by now stays; the role's next start reads it all again.
                    Err(error) => return tracing::error!(%error, "cannot follow cancellations any longer; new ones take effect after a restart of the role"),
                }
            }
        });
        Ok(Self { now, _reading: reading })
    }

    /// Whether a request is not to be called for.
    #[must_use]
    pub fn has(&self, request: &Request) -> bool {
        self.covers(request.batch.as_ref(), request.requested_at)
    }

    /// The same of a request of which only this is known: its batch, and when it was asked for.
    #[must_use]
    pub fn covers(&self, batch: Option<&BatchId>, asked_at: Option<Timestamp>) -> bool {
        let batches = self.now.borrow();
        let until = batch.and_then(|batch| batches.get(batch));
        until.zip(asked_at).is_some_and(|(until, asked)| asked <= *until)
    }

    /// Whether no batch is cancelled: then nobody has to look into requests.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.now.borrow().is_empty()
    }

    /// Waits until another batch is cancelled; for ever if nobody says so.
    ///
    /// # Cancellation
    /// Safe.
    pub async fn changed(&mut self) {
        if self.now.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// What else is noted on the topic is not for us.
fn is_other(record: &Record) -> bool {
    record.key.as_ref().is_some_and(|key| key.starts_with(KEY.as_bytes()))
}

fn note(batches: &watch::Sender<Batches>, raw: &codec::Raw<'_>) {
    match codec::read_cancellation(raw) {
        Ok(cancellation) => batches.send_modify(|batches| add(batches, cancellation)),
        Err(why) => tracing::warn!(record = %raw.position_id(), %why, "ignored an unreadable cancellation"),
    }
}

/// The latest cancellation of a batch counts, in whatever order they are read.
fn add(batches: &mut Batches, Cancellation { batch, cancelled_at }: Cancellation) {
    let until = Arc::make_mut(batches).entry(batch).or_insert(cancelled_at);
    *until = (*until).max(cancelled_at);
}

#[cfg(test)]
impl Cancelled {
    /// Knows of what is sent.
    pub(crate) fn scripted() -> (impl Fn(&str, i64), Self) {
        let (sender, now) = watch::channel(Batches::default());
        let cancel = move |batch: &str, at: i64| {
            let (batch, cancelled_at) = (BatchId::new(batch).unwrap(), Timestamp::from_millis(at));
            sender.send_modify(|batches| add(batches, Cancellation { batch, cancelled_at }));
        };
        (cancel, Self { now, _reading: JoinSet::new() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::ItemId;

    #[test]
    fn what_was_asked_for_before_the_cancellation_is_cancelled_and_nothing_else() {
        let (cancel, cancelled) = Cancelled::scripted();
        cancel("monday", 1_000);
        cancel("monday", 500);
        let request = |batch: Option<&str>, at: i64| {
            let mut request = Request::new(ItemId::new("1").unwrap());
            request.batch = batch.map(|batch| BatchId::new(batch).unwrap());
            request.requested_at = Some(Timestamp::from_millis(at));
            request
        };
        for (batch, at, expected) in [
            (Some("monday"), 999, true),
            (Some("monday"), 1_000, true),
            (Some("monday"), 1_001, false),
            (Some("tuesday"), 1, false),
            (None, 1, false),
        ] {
            assert_eq!(cancelled.has(&request(batch, at)), expected, "{batch:?} {at}");
        }
    }
}
