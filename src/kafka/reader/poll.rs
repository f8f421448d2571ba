//! The thread that polls: records are gathered by partition, and handed over as fast as the stage takes them.

use std::{sync::Arc, time::Duration};

use rdkafka::{
    Message,
    consumer::{BaseConsumer, Consumer},
    message::BorrowedMessage,
};
use tracing::{debug, error};

use super::{Context, Event, GATHER, POLL, Partition, ReadError, Stage};
use crate::kafka::native::{record, record_with};

/// The reader's thread, until the stage drops the reader or reading fails for good.
#[allow(clippy::needless_pass_by_value, reason = "the consumer must end on this thread")]
pub(super) fn poll_until_dropped(consumer: Arc<BaseConsumer<Context>>) {
    let context = Arc::clone(consumer.context());
    while context.flush() == Stage::Listening && !context.shared().is_over {
        context.serve(&consumer);
        if !context.shared().pending.is_empty() {
            // The stage is behind: read no further, but stay at its service.
            context.serve_for(&consumer, POLL);
        } else if let Err(error) = gather(&consumer, &context) {
            error!(group = context.group.group, %error, "reading ends");
            context.push(Err(error));
            // The stage has to hear why, also if it is far behind: a fenced one must not start again.
            while context.flush() == Stage::Listening && !context.shared().pending.is_empty() {
                context.serve_for(&consumer, POLL);
            }
            break;
        }
    }
    // From here on nothing may be committed; then the consumer ends on this thread, where its callbacks belong.
    context.membership.clear();
    while Arc::strong_count(&consumer) > 1 {
        std::thread::yield_now();
    }
    debug!(group = context.group.group, "left");
}

/// Polls a while and makes events of what has come.
fn gather(consumer: &Arc<BaseConsumer<Context>>, context: &Context) -> Result<(), ReadError> {
    let mut wait = POLL;
    for _ in 0..GATHER {
        match consumer.poll(wait) {
            None => break,
            Some(Ok(message)) => context.take(&message),
            Some(Err(error)) => context.trouble(consumer, &error)?,
        }
        wait = Duration::ZERO;
    }
    Ok(())
}

impl Context {
    /// Adds a message to the last event, if that is of the same partition, else to a new one.
    fn take(&self, message: &BorrowedMessage<'_>) {
        let topic = message.topic();
        let number = message.partition();
        let record = self.headers.map_or_else(|| record(message), |wanted| record_with(message, wanted));
        let mut shared = self.shared();
        if let Some(Ok(Event::Records { partition, records, .. })) = shared.pending.back_mut()
            && partition.number == number
            && *partition.topic == *topic
        {
            records.push(record);
            return;
        }
        let partition = Partition { topic: topic.into(), number };
        // Of a partition that has left since: not ours to work on.
        if let Some(epoch) = self.membership.epoch(&partition) {
            shared.pending.push_back(Ok(Event::Records { partition, epoch, records: vec![record] }));
        }
    }
}
