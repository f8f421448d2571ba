//! Requests that have come to their turn, and whose call is not paid for: their batch's budget is spent, or others have
//! to say first what is left of it. Pure.

use crate::{
    fetch::{backlog::Backlog, job::Job},
    kafka::Partition,
    quota::Pay,
};

/// Out of the way of those that can be paid for; the answer puts them back into their place.
#[derive(Default)]
pub(super) struct Unpaid {
    waiting: Backlog<Job>,
    spent: Vec<Job>,
}

impl Unpaid {
    /// Takes one of which it was found that it waits, or that nothing is left for it.
    pub(super) fn put(&mut self, job: Job, pay: Pay) {
        match pay {
            Pay::Spent => self.spent.push(job),
            Pay::Wait | Pay::Go => self.waiting.push(&job.position.partition.clone(), job),
        }
    }

    /// Those for which nothing is left.
    pub(super) fn take_spent(&mut self) -> Vec<Job> {
        std::mem::take(&mut self.spent)
    }

    pub(super) fn waiting_in(&self, partition: &Partition) -> usize {
        self.waiting.waiting_in(partition)
    }

    /// Takes a partition out, with all that waits in it.
    pub(super) fn remove(&mut self, partition: &Partition) -> impl Iterator<Item = Job> {
        self.waiting.remove(partition).into_iter()
    }

    /// Takes out all that wait.
    pub(super) fn clear(&mut self) -> Vec<Job> {
        self.waiting.clear()
    }
}
