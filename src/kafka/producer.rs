//! Plain writes without a transaction, for `enqueue` and other jobs that end.

use std::time::Duration;

use futures::future::join_all;
use rdkafka::{
    error::KafkaError,
    producer::{FutureProducer, FutureRecord},
    util::Timeout,
};

use super::{Outgoing, WriteError, client::Config, native};

/// An idempotent producer: each record is acknowledged by all in-sync replicas, and never doubled by a resend.
#[derive(Clone)]
pub struct Producer {
    inner: FutureProducer,
}

impl Producer {
    /// A producer for these brokers; connecting happens on the first write.
    ///
    /// # Errors
    /// [`WriteError::Refused`] if a property of `[kafka.properties]` is not librdkafka's.
    pub fn new(config: &Config) -> Result<Self, WriteError> {
        let inner = config.producer().set("message.timeout.ms", "60000").create().map_err(|error: KafkaError| {
            WriteError::Refused { topic: "any topic".into(), reason: error.to_string() }
        })?;
        Ok(Self { inner })
    }

    /// Writes all records and returns when all are acknowledged. Hand over thousands at once: they travel in
    /// batches.
    ///
    /// # Errors
    /// [`WriteError::Refused`] for the first record that was not taken within a minute; others may have been.
    pub async fn send(&self, records: Vec<Outgoing>) -> Result<(), WriteError> {
        self.place(records).await.map(|_| ())
    }

    /// As [`Self::send`]; answers with the partition and offset that each has got, in their order.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub async fn place(&self, records: Vec<Outgoing>) -> Result<Vec<(i32, i64)>, WriteError> {
        let writes = records.iter().map(|record| self.send_one(record));
        join_all(writes).await.into_iter().collect()
    }

    async fn send_one(&self, outgoing: &Outgoing) -> Result<(i32, i64), WriteError> {
        let topic = outgoing.topic.as_ref();
        let record: FutureRecord<'_, [u8], [u8]> = FutureRecord {
            topic,
            partition: None,
            payload: Some(&outgoing.value),
            key: outgoing.key.as_deref(),
            timestamp: None,
            headers: Some(native::headers(outgoing)),
        };
        // A full local queue is waited for, as long as the brokers take anything at all.
        match self.inner.send(record, Timeout::After(Duration::from_secs(60))).await {
            Ok(delivery) => Ok((delivery.partition, delivery.offset)),
            Err((error, _)) => Err(WriteError::Refused { topic: topic.to_owned(), reason: error.to_string() }),
        }
    }
}
