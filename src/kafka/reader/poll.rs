//! The polling thread: gathers records by partition and hands them to the stage at the stage's pace.

use std::{sync::Arc, time::Duration};

use rdkafka::{
    Message,
    consumer::{BaseConsumer, Consumer},
    message::BorrowedMessage,
};
use tracing::{debug, error, warn};

use super::{COMMIT_WITHIN, Context, Event, GATHER, POLL, Partition, ReadError, Stage, anew::Watch};
use crate::kafka::native::{record, record_with};

/// The reader's thread, until the stage drops the reader or reading fails for good.
#[allow(clippy::needless_pass_by_value, reason = "the consumers must end on this thread")]
pub(super) fn poll_until_dropped(consumers: Vec<Arc<BaseConsumer<Context>>>) {
    // What is to be done for the stage is shared by all members: any of them will do.
    let Some(context) = consumers.first().map(|consumer| Arc::clone(consumer.context())) else { return };
    let mut watches: Vec<_> = consumers.iter().map(|consumer| Watch::new(consumer)).collect();
    while context.flush() == Stage::Listening && !context.shared().is_over {
        context.serve();
        watches.iter_mut().for_each(Watch::look);
        if !context.shared().pending.is_empty() {
            // The stage is behind: read no further, but stay at its service.
            context.serve_for(POLL);
        } else if let Err(error) = gather_from_all(&consumers, &context) {
            error!(group = context.group.group, %error, "reading stopped");
            context.push(Err(error));
            break;
        }
    }
    // The stage has to hear why, also if it is far behind: a fenced one must not start again.
    while context.flush() == Stage::Listening && !context.shared().pending.is_empty() {
        context.serve_for(POLL);
    }
    drop(watches);
    // From here on nothing may be committed; then the consumers end on this thread, where their callbacks belong.
    let under_way = context.membership.clear();
    if !context.membership.have_ended(under_way, COMMIT_WITHIN) {
        warn!(group = context.group.group, "reading stopped while a commit had not finished");
    }
    while consumers.iter().any(|consumer| Arc::strong_count(consumer) > 1) {
        std::thread::yield_now();
    }
    debug!(group = context.group.group, "left the consumer group");
}

/// Polls each member once. A lone one is waited for, several are looked at by turns.
fn gather_from_all(consumers: &[Arc<BaseConsumer<Context>>], context: &Context) -> Result<(), ReadError> {
    if let [only] = consumers {
        return gather(only, POLL).map(drop);
    }
    let mut came = false;
    for consumer in consumers {
        came |= gather(consumer, Duration::ZERO)?;
    }
    // A rebalance is an event too.
    if !came && context.shared().pending.is_empty() {
        context.serve_for(POLL);
    }
    Ok(())
}

/// Polls a while and makes events of what has come; whether anything has.
fn gather(consumer: &Arc<BaseConsumer<Context>>, first: Duration) -> Result<bool, ReadError> {
    let (context, mut wait) = (consumer.context(), first);
    for count in 0..GATHER {
        match consumer.poll(wait) {
            None => return Ok(count > 0),
            Some(Ok(message)) => context.take(&message),
            Some(Err(error)) => context.trouble(consumer, &error)?,
        }
        wait = Duration::ZERO;
    }
    Ok(true)
}

impl Context {
    /// Adds a message to the last event, if that is of the same partition, else to a new one.
    fn take(&self, message: &BorrowedMessage<'_>) {
        let topic = message.topic();
        let number = message.partition();
        let mut record = self.headers.map_or_else(|| record(message), |wanted| record_with(message, wanted));
        let mut shared = self.shared();
        record.log = shared.names.of(topic).cloned();
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
