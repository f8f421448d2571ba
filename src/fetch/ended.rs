//! What follows from calls that have ended.

use std::sync::Arc;

use tokio::time::Instant;

use super::{
    Fetch, FetchError, batches,
    call::{Contact, Ended, Unrecorded},
    end::{Called, End},
};
use crate::{
    kafka::{Reader, Writer, outbox::Position},
    platform::{Refusal, RefusalKind},
    quota::{Hold, Scope},
    runtime::metrics::METRICS,
};

impl<R: Reader, W: Writer> Fetch<R, W> {
    /// Takes the outcomes of this call and of all others that have ended meanwhile, in the order of their replies.
    pub(super) async fn end_calls(&mut self, first: Ended) -> Result<(), FetchError> {
        let mut all = vec![first];
        while let Some(next) = self.calls.try_join_next() {
            all.push(next?);
        }
        all.sort_by_key(|ended| ended.replied_at);
        for ended in all {
            self.end_call(ended).await;
        }
        Ok(())
    }

    async fn end_call(&mut self, mut ended: Ended) {
        match ended.unused.take() {
            // With its budget, which others may spend.
            Some(slot) => self.quota.drop_unused(slot).await,
            None => self.quota.ended(ended.account),
        }
        self.count(&ended);
        match &ended.contact {
            Contact::Called(_) => {
                self.tally.called(ended.account, ended.refusal.as_ref().is_some_and(Refusal::is_no));
            }
            Contact::None => self.tally.missed(ended.account),
            // Neither late nor a call: the vendor knows nothing of it.
            Contact::NoWay(_) | Contact::Machine(_) | Contact::Unprocessed(_) => {}
        }
        self.react_machine(&ended.contact);
        self.note_split(&mut ended);
        self.react_address(&ended).await;
        // A throttle's own wait overrides the other headers.
        let is_throttled = matches!(&ended.refusal, Some(Refusal { kind: RefusalKind::Throttled { .. }, .. }));
        let absence = ended.advice.unavailable.filter(|_| !is_throttled);
        let is_of_address = match absence {
            Some(wait) => !self.heed_absence(ended.address, wait).await,
            None => false,
        };
        self.judge(&ended, is_of_address).await;
        self.regroup(&mut ended).await;
        // What was not called for costs nothing.
        self.spending.refund(&batches(&ended.missed));
        for job in ended.missed.into_iter().rev() {
            if let Some(job) = self.unless_over(job) {
                self.backlog.push(job);
            }
        }
        if let Some(latency) = ended.latency {
            self.spread.note(latency, Instant::now());
        }
        if let (Some(delays), Some(departed_at)) = (&mut self.delays, ended.departed_at) {
            delays.note(ended.left_at, departed_at, ended.latency, Instant::now());
        }
        match &ended.refusal {
            Some(refusal) => self.react((ended.account, ended.address), ended.left_at, refusal).await,
            None if ended.outcomes.is_empty() => {}
            None => self.penalties.forgive(ended.account, ended.left_at),
        }
        if !is_throttled {
            self.heed((ended.account, ended.address), ended.advice).await;
        }
        if let Some(cause) = self.caller.tokens.death(ended.account).filter(|_| ended.is_dead) {
            self.quota.hold(Scope::Account(ended.account), Hold::Disabled, &cause).await;
        }
        if matches!(ended.contact, Contact::Called(Some(_))) {
            self.reply_size.note(ended.bytes);
        }
        self.complete(ended.outcomes);
        self.look_up(ended.to_look_up);
    }

    /// Ends the requests of a refused call.
    pub(super) fn end_refused(&mut self, refused: Unrecorded) {
        let (outcomes, to_look_up) = self.caller.record_at_once(refused);
        self.complete(outcomes);
        self.look_up(to_look_up);
    }

    fn look_up(&mut self, unrecorded: Option<Unrecorded>) {
        if let Some(unrecorded) = unrecorded {
            self.looking_up.spawn(Arc::clone(&self.caller).look_up(unrecorded));
        }
    }

    /// The requests of a call have come to their ends. What is not ours any more is kept or lost at once: its partition may
    /// be here again, and the same request with it.
    pub(super) fn complete(&mut self, ends: Vec<(Position, End)>) {
        let (since, mut left) = (Instant::now(), ends.len());
        for (position, end) in ends {
            left -= 1;
            let called = Called { end, calls: u32::from(left == 0), since };
            let has_room = self.called.is_empty() && self.has_room_for_outcomes();
            if has_room || !self.intake.is_current(&position) {
                self.finish(position, called);
            } else {
                self.called.push(&position.partition.clone(), (position, called));
            }
        }
    }

    fn count(&self, ended: &Ended) {
        let outcome = match (&ended.contact, &ended.refusal) {
            (Contact::None, _) => return,
            (Contact::NoWay(_), _) => "no_way",
            (Contact::Machine(_), _) => "machine",
            (Contact::Unprocessed(_), _) => "unprocessed",
            (Contact::Called(_), Some(refusal)) if !ended.has_answer => refusal.class().as_str(),
            (Contact::Called(_), _) => "answered",
        };
        let whose = (self.caller.source.as_str(), self.caller.alias(ended.account).as_str());
        METRICS.call(whose, outcome, ended.latency);
    }
}
