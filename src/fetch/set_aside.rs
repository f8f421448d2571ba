//! Calls that are refused for what all of them have in common: none of their requests ends by it, the source is held, and
//! somebody who can mend it is told what to look at.

use tokio::time::Instant;
use tracing::{error, info, warn};

use super::{
    Fetch,
    call::Unrecorded,
    grouped::fingerprint,
    job::Job,
    misfits::{Parts, Shown},
    splits::GroupId,
};
use crate::{
    breaker::Shut,
    kafka::{Partition, Reader, Writer, outbox::Position},
    message::Lane,
    platform::{Common, Refusal, RefusalKind, Reply},
};

/// A refused call that waits until it is known whether it is about it alone.
#[derive(Debug)]
pub(super) struct Aside {
    pub(super) call: Unrecorded,
    pub(super) refusal: Refusal,
    /// Its requests are of this group.
    pub(super) group: Option<GroupId>,
}

impl Parts for Aside {
    fn partitions(&self) -> impl Iterator<Item = &Partition> {
        self.call.jobs.iter().map(|job| &job.position.partition)
    }
}

const fn remedy(common: Common) -> &'static str {
    match common {
        Common::Clock => "the vendor refuses this machine's time: set its clock",
        Common::Form => "the vendor refuses the form of the calls: see url, api and version of the source",
        Common::Params => "the vendor refuses the parameters of the calls: see api and params of the source",
    }
}

impl<R: Reader, W: Writer> Fetch<R, W> {
    /// Puts the requests of a refused call aside, and holds the source if all calls are refused alike.
    pub(super) async fn set_aside(&mut self, common: Common, left_at: Instant, mut aside: Aside) {
        let jobs = std::mem::take(&mut aside.call.jobs);
        aside.call.jobs = self.unless_all_over(jobs);
        let items: Vec<u64> = aside.call.jobs.iter().map(fingerprint).collect();
        if items.is_empty() {
            let free = aside.group.map(|group| self.splits.ended(group)).unwrap_or_default();
            return self.free(free);
        }
        let Refusal { code, message, .. } = aside.refusal.clone();
        let is_sure = common != Common::Params;
        let source = &self.caller.source;
        match self.misfits.refused(aside, (left_at, items), is_sure, Instant::now()) {
            None => {
                warn!(%source, code, message, "the vendor refuses what all calls have in common; its requests wait for what others are told");
            }
            Some(wait) => {
                let remedy = remedy(common);
                error!(%source, code, message, ?wait, "{remedy}; nobody calls until then, and no request ends by it");
                // Other machines have clocks of their own.
                self.misfits.is_local = common == Common::Clock && self.quota.is_shared();
                let why = format!("{remedy} ({code} {message})");
                self.hold_source(wait, &why, self.misfits.is_local).await;
            }
        }
    }

    /// A call was answered that had left at that time.
    pub(super) fn judge_aside(&mut self, left_at: Instant) {
        match self.misfits.answered(left_at) {
            Shown::Own(calls) => {
                for Aside { mut call, refusal, group } in calls {
                    // One call's time may have been wrong, no item's is.
                    let is_clock = refusal.common() == Some(Common::Clock);
                    let kind = if is_clock { RefusalKind::Outage } else { RefusalKind::Bug };
                    let refusal = Refusal { kind, ..refusal };
                    let free = if is_clock {
                        call.reply = Reply::Refused(refusal);
                        self.end_refused(call);
                        group.map(|group| self.splits.ended(group)).unwrap_or_default()
                    } else {
                        self.split(group, call, refusal)
                    };
                    self.free(free);
                }
            }
            Shown::Over(calls) => {
                let source = &self.caller.source;
                info!(%source, calls = calls.len(), "the vendor answers again: what it refused is called for again");
                for aside in calls {
                    self.free_aside(aside);
                }
            }
        }
    }

    fn free_aside(&mut self, Aside { call, group, .. }: Aside) {
        self.free(call.jobs);
        let free = group.map(|group| self.splits.ended(group)).unwrap_or_default();
        self.free(free);
    }

    /// If nothing else is left to call for, requests that were refused find out whether they still are.
    pub(super) async fn mind_aside(&mut self) {
        if self.misfits.is_empty() || !self.calls.is_empty() || self.can_start() {
            return;
        }
        let now = Instant::now();
        match self.breakers.shut(now) {
            Some(Shut::Until(until)) => Box::pin(self.sit_out(until)).await,
            Some(Shut::Probing) => {}
            None => match self.misfits.take_first(now) {
                Ok(aside) => self.free_aside(aside),
                Err(at) => self.wake_at = Some(at),
            },
        }
    }

    /// Puts back among the others what need not wait for the source: what is in a hurry or has an older answer, or all.
    pub(super) fn free_from_aside(&mut self, all: bool) {
        if self.misfits.is_empty() {
            return;
        }
        let mut free = Vec::new();
        let is_free = |job: &mut Job| {
            let has_stale = |job: &Job| job.flight.as_ref().is_some_and(|flight| flight.has_stale(job));
            all || job.lane == Lane::Express || has_stale(job)
        };
        let splits = &mut self.splits;
        self.misfits.sift(|mut aside| {
            free.extend(aside.call.jobs.extract_if(.., is_free));
            if aside.call.jobs.is_empty() {
                free.extend(aside.group.into_iter().flat_map(|group| splits.ended(group)));
                return None;
            }
            Some(aside)
        });
        self.free(free);
    }

    /// Takes what waits of a partition out of refused calls.
    pub(super) fn leave_refused(&mut self, partition: &Partition) -> Vec<Position> {
        let (mut left, mut twins) = (Vec::new(), Vec::new());
        let free = self.sift_refused(|_, mut job| {
            let is_left = |job: &mut Job| job.position.partition == *partition;
            left.extend(job.twins.extract_if(.., is_left).map(|twin| twin.position));
            if job.position.partition != *partition {
                return Some(job);
            }
            twins.append(&mut job.twins);
            left.push(job.position);
            None
        });
        self.free(free);
        self.free(twins);
        left
    }

    /// Ends what waits in refused calls of a batch that has just been cancelled.
    pub(super) fn sweep_refused(&mut self) {
        let mut twins = Vec::new();
        let free = self.sift_refused(|fetch, mut job| {
            let all = std::mem::take(&mut job.twins);
            job.twins = all.into_iter().filter_map(|twin| fetch.unless_cancelled(twin)).collect();
            if fetch.cancelled.has(&job.request) {
                twins.append(&mut job.twins);
            }
            fetch.unless_cancelled(job)
        });
        self.free(free);
        self.free(twins);
    }

    /// Replaces each request of a refused call by what `keep` makes of it. What is free by that.
    fn sift_refused(&mut self, mut keep: impl FnMut(&mut Self, Job) -> Option<Job>) -> Vec<Job> {
        let (mut splits, mut misfits) = (std::mem::take(&mut self.splits), std::mem::take(&mut self.misfits));
        let mut free = splits.sift(|job| keep(self, job));
        misfits.sift(|mut aside| {
            let jobs = std::mem::take(&mut aside.call.jobs);
            aside.call.jobs = jobs.into_iter().filter_map(|job| keep(self, job)).collect();
            if aside.call.jobs.is_empty() {
                // Nobody will say any more what the others of its group wait for.
                free.extend(aside.group.into_iter().flat_map(|group| splits.ended(group)));
                return None;
            }
            Some(aside)
        });
        (self.splits, self.misfits) = (splits, misfits);
        free
    }
}
