//! A request on its way through fetch.

use std::collections::BTreeMap;

use tokio::time::Instant;

use super::{
    backlog::{Placed, Waits},
    single_flight::SingleFlight,
};
use crate::{
    kafka::{Partition, outbox::Position},
    message::{Lane, Request, RequestId},
};

/// A request on its way through fetch.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) position: Position,
    pub(super) id: RequestId,
    pub(super) request: Request,
    pub(super) lane: Lane,
    pub(super) traceparent: String,
    /// When it was taken in.
    pub(super) since: Instant,
    /// Requests that ask for the same, and end with what its call brings.
    pub(super) coalesced: Vec<Job>,
    /// What it owes the cache once it is called for.
    pub(super) single_flight: Option<SingleFlight>,
    /// How many calls for it the peer has not acted on.
    pub(super) unprocessed: u8,
}

impl Job {
    /// This request, after those that end with what its call brings.
    pub(super) fn with_coalesced(&self) -> impl Iterator<Item = &Self> {
        self.coalesced.iter().chain([self])
    }

    /// Requests and those that were coalesced with them, each for itself.
    pub(super) fn apart(jobs: Vec<Self>) -> Vec<Self> {
        let apart = |mut job: Self| {
            let mut all = std::mem::take(&mut job.coalesced);
            all.push(job);
            all
        };
        jobs.into_iter().flat_map(apart).collect()
    }

    /// Requests of one call; those that ask for the same are coalesced with the first of them.
    pub(super) fn together(jobs: Vec<Self>) -> Vec<Self> {
        let mut all: Vec<Self> = Vec::new();
        for job in jobs {
            match all.iter_mut().find(|first| first.item() == job.item() && first.group() == job.group()) {
                Some(first) => first.coalesced.push(job),
                None => all.push(job),
            }
        }
        all
    }
}

impl Placed for Job {
    fn offset(&self) -> i64 {
        self.position.offset
    }
}

impl Waits for Job {
    /// All that changes the reply but the item.
    type Group = BTreeMap<String, String>;
    fn group(&self) -> &Self::Group {
        &self.request.params
    }
    fn item(&self) -> &str {
        self.request.item.as_str()
    }
    fn partition(&self) -> &Partition {
        &self.position.partition
    }
}
