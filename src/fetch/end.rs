//! How requests end, as long as there is no room for the records of it. Pure.
//!
//! An answer can be some megabytes long, and a thousand requests can share it: for each its record is made when there is
//! room for it, and not before.

use std::sync::Arc;

use tokio::time::Instant;

use super::{backlog::Placed, call_facts::CallFacts, job::Job, outcome::Outcomes};
use crate::{
    cache::{Answer, Kept},
    kafka::{
        Outgoing, kept,
        outbox::{Position, Risk},
    },
    message::Via,
    platform::Refusal,
    runtime::clock::Timestamp,
};

/// How a request ends.
#[derive(Debug)]
pub(super) enum End {
    /// By these records; they are small.
    Made(Vec<Outgoing>),
    /// By what a call has brought, for it or for another that asks for the same.
    Result(Box<Job>, Arc<Answer>, CallFacts, Via),
    /// By an answer that was kept; if that makes no record, it is called for.
    Again(Box<Job>, Kept),
    /// By an older answer instead of this failure.
    Stale(Box<Job>, Kept, Refusal, CallFacts),
}

impl End {
    /// About how many bytes its records will have.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Made(records) => records.iter().map(Outgoing::size).sum(),
            Self::Result(_, answer, ..) => answer.size(),
            Self::Again(_, kept) | Self::Stale(_, kept, ..) => kept.answer.size(),
        }
    }

    /// Its records.
    ///
    /// # Errors
    /// The request, if it has to be called for.
    pub(super) fn records(self, outcomes: &Outcomes, now: Timestamp) -> Result<Vec<Outgoing>, Box<Job>> {
        match self {
            Self::Made(records) => Ok(records),
            Self::Result(job, answer, facts, via) => Ok(outcomes.result(&job, Answer::clone(&answer), &facts, via)),
            Self::Again(job, kept) => outcomes.again(&job, &kept, Via::Cache, now).ok_or(job),
            Self::Stale(job, kept, refusal, facts) => {
                let again = outcomes.again(&job, &kept, Via::Stale, facts.ended_at);
                Ok(again.unwrap_or_else(|| outcomes.failure(&job, &refusal, &facts)))
            }
        }
    }
}

impl Placed for (Position, End) {
    fn offset(&self) -> i64 {
        self.0.offset
    }

    fn bytes(&self) -> usize {
        self.1.bytes()
    }
}

/// How a request ends, and what it has cost.
#[derive(Debug)]
pub(super) struct Called {
    pub(super) end: End,
    /// How many calls would have to be made again if it were lost, see [`kept::Answer`].
    pub(super) calls: u32,
    /// When the call ended.
    pub(super) since: Instant,
}

impl Called {
    /// Without a call of its own.
    pub(super) fn none(end: End) -> Self {
        Self { end, calls: 0, since: Instant::now() }
    }

    /// What is to be written for it.
    ///
    /// # Errors
    /// The request, if it has to be called for.
    pub(super) fn answer(self, outcomes: &Outcomes, now: Timestamp) -> Result<kept::Answer, Box<Job>> {
        let records = self.end.records(outcomes, now)?;
        Ok(kept::Answer { records, calls: self.calls, since: self.since })
    }

    /// What is at risk as long as it waits.
    pub(super) fn risk(&self) -> Risk {
        let calls = usize::try_from(self.calls).unwrap_or(usize::MAX);
        Risk { calls, since: (calls > 0).then_some(self.since) }
    }
}

impl Placed for (Position, Called) {
    fn offset(&self) -> i64 {
        self.0.offset
    }

    fn bytes(&self) -> usize {
        self.1.end.bytes()
    }
}

/// How long a call's reply is about to be: as the longest of late, so that calls in flight can be bounded by bytes.
#[derive(Debug)]
pub(super) struct ReplySize(usize);

impl ReplySize {
    /// `most` bytes, until something is known.
    pub(super) fn unknown(most: usize) -> Self {
        Self(most)
    }

    /// A reply had so many bytes.
    pub(super) fn note(&mut self, bytes: usize) {
        // A long one counts at once, and is forgotten after some dozens of short ones.
        self.0 = bytes.max(self.0 - self.0.div_ceil(8)).max(1);
    }

    /// How many calls may be under way if their replies may have `room` bytes in all; at least one.
    pub(super) fn calls(&self, room: usize) -> usize {
        (room / self.0.max(1)).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1024 * 1024;

    #[test]
    fn so_many_calls_are_under_way_as_their_replies_have_room() {
        let mut size = ReplySize::unknown(4 * MIB);
        assert_eq!(size.calls(256 * MIB), 64, "nothing is known");
        (0..60).for_each(|_| size.note(20_000));
        assert_eq!(size.calls(256 * MIB), 256 * MIB / 20_000);
        size.note(4 * MIB);
        assert_eq!(size.calls(256 * MIB), 64, "a long one counts at once");
        assert_eq!(size.calls(1), 1);
        (0..200).for_each(|_| size.note(0));
        assert!(size.calls(256 * MIB) > 10_000);
    }
}
