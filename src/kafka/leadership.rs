//! Leader election by a single-partition topic: the group member that is assigned the partition leads.
//!
//! For what is to be done by one process of a fleet, whichever it is. Kafka decides who leads, and moves it when that one
//! stops, or is not heard of for a session. Nothing that is on the topic matters.
//!
//! Two processes may hold themselves for the leader for a while: one that was cut off learns only when it reaches Kafka
//! again that it is not any more. So what a leader does has to bear being done twice, or be fenced by what it writes to.

use super::{Event, ReadError, Reader};

/// A process that leads, or would if the others stopped.
#[derive(Debug)]
pub struct Leadership<R> {
    reader: R,
    leads: bool,
}

impl<R: Reader> Leadership<R> {
    /// A candidate; it does not lead yet. The reader's group is of those that may lead, its topic has one partition.
    #[must_use]
    pub const fn new(reader: R) -> Self {
        Self { reader, leads: false }
    }

    /// Whether this process leads, as far as it has heard in [`Self::changed`].
    #[must_use]
    pub const fn leads(&self) -> bool {
        self.leads
    }

    /// Waits until this process begins to lead or ends to; whether it leads now.
    ///
    /// # Ordering
    /// Another process begins when this one has heard of its end here, or when the reader's deadline for that is over:
    /// whoever has work of the leader under way finishes it first, or drops it.
    ///
    /// # Cancellation
    /// Safe.
    ///
    /// # Errors
    /// [`ReadError`]: start again with a new reader.
    pub async fn changed(&mut self) -> Result<bool, ReadError> {
        loop {
            let leads = leads_after(self.leads, &self.reader.next().await?);
            if leads != self.leads {
                self.leads = leads;
                return Ok(leads);
            }
        }
    }
}

fn leads_after(leads: bool, event: &Event) -> bool {
    match event {
        Event::Assigned(partitions) => leads || !partitions.is_empty(),
        Event::Revoked(..) | Event::Lost(_) => false,
        Event::Records { .. } | Event::Gone { .. } => leads,
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use tokio::sync::oneshot;

    use super::*;
    use crate::kafka::{
        Handover,
        scripted::{Log, assigned, partition, records},
    };

    #[tokio::test]
    async fn who_has_the_partition_leads_and_lets_it_go_when_it_hears_of_its_end() {
        let (events, reader) = Log::default().reader();
        let mut leadership = Leadership::new(reader);
        assert!(!leadership.leads());

        events.send(Event::Assigned(Vec::new())).unwrap();
        assert!(leadership.changed().now_or_never().is_none(), "a member without a partition does not lead");
        events.send(assigned()).unwrap();
        assert!(leadership.changed().await.unwrap() && leadership.leads());
        events.send(records(0, ["a".into()])).unwrap();
        assert!(leadership.changed().now_or_never().is_none(), "what is on the topic does not matter");

        let (answer, mut handed_over) = oneshot::channel();
        events.send(Event::Revoked(vec![partition()], Handover(Some(answer)))).unwrap();
        assert!(handed_over.try_recv().is_err(), "as long as it leads, nobody else does");
        assert!(!leadership.changed().await.unwrap() && !leadership.leads());
        assert_eq!(handed_over.try_recv(), Ok(()));

        events.send(assigned()).unwrap();
        assert!(leadership.changed().await.unwrap());
        events.send(Event::Lost(vec![partition()])).unwrap();
        assert!(!leadership.changed().await.unwrap());
    }
}
