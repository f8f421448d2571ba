//! Follows a compacted topic: all of it at first, then whatever is added, in no consumer group.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
};
use tokio::{sync::watch, task::JoinHandle};
use tracing::debug;

use super::{
    Partition, Record,
    admin::AdminError,
    client::Config,
    native::record,
    scan::{Bounds, bounds, consumer},
};

/// How long a poll waits for a record: as long may it take to notice that nobody follows any more.
const POLL: Duration = Duration::from_millis(200);

/// What is read of a topic, until it is dropped.
#[derive(Debug)]
pub struct Follow {
    gone: Arc<AtomicBool>,
    caught_up: watch::Receiver<bool>,
    /// Ends soon after `gone` is set.
    _reading: JoinHandle<()>,
}

impl Follow {
    /// Hands every record of the topic to `take`, on a thread of its own; brokers that are away are waited for.
    ///
    /// # Errors
    /// [`AdminError`]: the topic is missing, or no broker answers now.
    pub async fn start(
        config: &Config,
        topic: &str,
        mut take: impl FnMut(Partition, Record) + Send + 'static,
    ) -> Result<Self, AdminError> {
        let bounds = bounds(config, &[topic.to_owned()]).await?;
        let attempt = format!("following topic {topic}");
        let refused = |reason: String| AdminError::Refused { attempt: attempt.clone(), reason };
        let consumer = consumer(config, true).map_err(|error| refused(error.to_string()))?;
        let mut list = TopicPartitionList::new();
        for Bounds { partition, low, .. } in &bounds {
            let added = list.add_partition_offset(&partition.topic, partition.number, Offset::Offset(*low));
            added.map_err(|error| refused(error.to_string()))?;
        }
        consumer.assign(&list).map_err(|error| refused(error.to_string()))?;
        let (sender, caught_up) = watch::channel(false);
        let gone = Arc::new(AtomicBool::new(false));
        let is_gone = Arc::clone(&gone);
        let reading = tokio::task::spawn_blocking(move || {
            let mut ends = bounds.iter().filter(|b| b.low < b.end).count();
            let mut at_end = vec![false; bounds.len()];
            sender.send_replace(ends == 0);
            while !is_gone.load(Ordering::Relaxed) {
                if let Some(number) = poll(&consumer, &mut take)
                    && let Some(seen) = usize::try_from(number).ok().and_then(|number| at_end.get_mut(number))
                    && !std::mem::replace(seen, true)
                    && bounds.iter().any(|b| b.partition.number == number && b.low < b.end)
                {
                    ends -= 1;
                    sender.send_replace(ends == 0);
                }
            }
        });
        Ok(Self { gone, caught_up, _reading: reading })
    }

    /// Waits until all that was there at the start has been handed over.
    pub async fn caught_up(&mut self) {
        // An error means that the thread has ended: there is nothing to wait for then.
        let _ = self.caught_up.wait_for(|is| *is).await;
    }
}

impl Drop for Follow {
    fn drop(&mut self) {
        self.gone.store(true, Ordering::Relaxed);
    }
}

/// Takes what has come; the number of a partition whose end has been reached.
fn poll(consumer: &BaseConsumer, take: &mut impl FnMut(Partition, Record)) -> Option<i32> {
    use rdkafka::{Message as _, error::KafkaError};
    match consumer.poll(POLL)? {
        Ok(message) => {
            let partition = Partition { topic: message.topic().into(), number: message.partition() };
            take(partition, record(&message));
            None
        }
        Err(KafkaError::PartitionEOF(number)) => Some(number),
        Err(error) => {
            debug!(%error, "Kafka");
            None
        }
    }
}
