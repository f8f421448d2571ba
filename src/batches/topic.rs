//! The topic: one record for the end of a batch, its key the batch.

use std::{collections::HashSet, sync::Arc};

use crate::{
    kafka::{Outgoing, Producer},
    message::{
        BatchEnd,
        codec::{self, Encoded},
        envelope::{Envelope, Kind},
    },
};

/// The name of this stage in `ce_source`.
const WRITER: &str = "weir/batches";

/// Writes ends, each once as long as this process lives: a webhook that does not answer repeats no record.
pub struct Herald {
    producer: Producer,
    topic: Arc<str>,
    /// Ends that are written, and not yet noted as told.
    written: HashSet<String>,
}

impl Herald {
    /// Writes to this topic.
    #[must_use]
    pub fn new(producer: Producer, topic: Arc<str>) -> Self {
        Self { producer, topic, written: HashSet::new() }
    }

    /// Writes those of these ends that it has not written yet, and returns when all of them are acknowledged.
    ///
    /// # Errors
    /// Why not all of them were taken, in words; those that were are written again the next time.
    pub async fn write(&mut self, ends: &[BatchEnd]) -> Result<(), String> {
        let fresh: Vec<&BatchEnd> = ends.iter().filter(|end| !self.written.contains(&end.id())).collect();
        if fresh.is_empty() {
            return Ok(());
        }
        let records = fresh.iter().map(|end| record(&self.topic, end)).collect();
        self.producer.send(records).await.map_err(|error| error.to_string())?;
        self.written.extend(fresh.iter().map(|end| end.id()));
        Ok(())
    }

    /// Forgets an end that is noted as told.
    pub fn told(&mut self, end: &BatchEnd) {
        self.written.remove(&end.id());
    }
}

fn record(topic: &Arc<str>, end: &BatchEnd) -> Outgoing {
    let id = end.id();
    let envelope = Envelope { kind: Kind::BatchEnd, id: &id, writer: WRITER, time: end.finished_at, traceparent: None };
    let Encoded { headers, value } = codec::encode(&envelope, end);
    let key = end.key().as_bytes().to_owned();
    Outgoing { topic: Arc::clone(topic), key: Some(key.into()), value, headers }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{message::codec::Raw, runtime::clock::Timestamp};

    #[test]
    fn the_record_of_an_end_is_keyed_by_its_batch_and_says_what_the_webhook_is_told() {
        let end = super::super::tests::end();
        let record = record(&"weir.batches".into(), &end);
        assert_eq!(record.key.as_deref(), Some(b"monday".as_slice()));
        let raw = Raw {
            topic: "weir.batches",
            partition: 0,
            offset: 0,
            time: Timestamp::from_millis(0),
            headers: &record.headers,
            value: Some(&record.value),
        };
        assert_eq!(codec::read_batch_end(&raw).unwrap(), end);
        assert!(record.headers.iter().any(|(name, value)| name == "ce_id" && **value == *b"monday#1795824000123"));
    }
}
