//! Calls that are refused for what all of them have in common: none of their requests ends by it, the source is held, and
//! somebody who can mend it is told what to look at.

use tokio::time::Instant;
use tracing::{error, info, warn};

use super::{Aftermath, Aside, Reaction, misfits::Shown, regroup::unless_all_over};
use crate::{
    fetch::{admission::Admission, backlog::fingerprint, job::Job},
    kafka::{Partition, Reader, Writer, outbox::Position},
    message::Lane,
    platform::{Common, Refusal, RefusalKind, Reply},
};

const fn remedy(common: Common) -> &'static str {
    match common {
        Common::Clock => "the vendor refuses this machine's time: set its clock",
        Common::Form => "the vendor refuses the form of the calls: see url, api and version of the source",
        Common::Params => "the vendor refuses the parameters of the calls: see api and params of the source",
        Common::Later => {
            "the vendor answers later, which this source is not set up for: see api and params of the source"
        }
    }
}

impl Reaction {
    /// Puts the requests of a refused call aside, and holds the source if all calls are refused alike.
    pub(super) async fn set_aside<R: Reader, W: Writer>(
        &mut self,
        common: Common,
        left_at: Instant,
        mut aside: Aside,
        admission: &mut Admission<R, W>,
        aftermath: &mut Aftermath,
    ) {
        let jobs = std::mem::take(&mut aside.call.jobs);
        aside.call.jobs = unless_all_over(jobs, admission, aftermath);
        let items: Vec<u64> = aside.call.jobs.iter().map(fingerprint).collect();
        if items.is_empty() {
            return aftermath.again.extend(self.ended_group(aside.group));
        }
        let Refusal { code, message, .. } = aside.refusal.clone();
        let is_sure = matches!(common, Common::Clock | Common::Form);
        let source = &self.caller.source;
        match self.misfits.refused(aside, (left_at, items), is_sure, Instant::now()) {
            None => {
                warn!(%source, code, message, "vendor refused something that all calls share; the requests wait until it is known whether others are refused too");
            }
            Some(wait) => {
                let remedy = remedy(common);
                error!(%source, code, message, ?wait, "{remedy}; calls to the source paused, no request fails by it");
                // Other machines have clocks of their own.
                self.misfits.is_local = common == Common::Clock && self.quota.is_shared();
                let why = format!("{remedy} ({code} {message})");
                self.hold_source(wait, &why, self.misfits.is_local).await;
            }
        }
    }

    /// A call was answered that had left at that time.
    pub(super) fn judge_aside<R: Reader, W: Writer>(
        &mut self,
        left_at: Instant,
        admission: &mut Admission<R, W>,
        aftermath: &mut Aftermath,
    ) {
        match self.misfits.answered(left_at) {
            Shown::Own(calls) => {
                for Aside { mut call, refusal, group } in calls {
                    // One call's time may have been wrong, no item's is.
                    let is_clock = refusal.common() == Some(Common::Clock);
                    let kind = if is_clock { RefusalKind::Outage } else { RefusalKind::Bug };
                    let refusal = Refusal { kind, ..refusal };
                    if is_clock {
                        call.reply = Reply::Refused(refusal);
                        aftermath.over.push(call);
                        aftermath.again.extend(self.ended_group(group));
                    } else {
                        self.split(group, call, refusal, admission, aftermath);
                    }
                }
            }
            Shown::Over(calls) => {
                let source = &self.caller.source;
                info!(%source, calls = calls.len(), "vendor accepts calls again; repeating the refused ones");
                for aside in calls {
                    aftermath.again.extend(self.free_aside(aside));
                }
            }
        }
    }

    fn free_aside(&mut self, Aside { mut call, group, .. }: Aside) -> Vec<Job> {
        let mut free = std::mem::take(&mut call.jobs);
        free.extend(self.ended_group(group));
        free
    }

    /// Whether refused calls wait until it is known what they are refused for.
    pub(in crate::fetch) fn has_aside(&self) -> bool {
        !self.misfits.is_empty()
    }

    /// The requests that find out whether they still are refused, if nothing else is left to call for.
    ///
    /// # Errors
    /// When to ask again, if it is too early.
    pub(in crate::fetch) fn take_aside(&mut self, now: Instant) -> Result<Vec<Job>, Instant> {
        let aside = self.misfits.take_first(now)?;
        Ok(self.free_aside(aside))
    }

    /// Of refused calls that wait, what need not wait for the source: what is in a hurry or has an older answer, or all if
    /// another source stands in.
    pub(in crate::fetch) fn free_from_aside(&mut self) -> Vec<Job> {
        let mut free = Vec::new();
        if self.misfits.is_empty() {
            return free;
        }
        let all = self.fallback.is_some();
        let is_free = |job: &mut Job| {
            let has_stale = |job: &Job| job.single_flight.as_ref().is_some_and(|flight| flight.has_stale(&job.request));
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
        free
    }

    /// How many requests of a partition wait here.
    pub(in crate::fetch) fn waiting_in(&self, partition: &Partition) -> usize {
        self.splits.waiting_in(partition) + self.misfits.waiting_in(partition)
    }

    /// Takes what waits of a partition out of refused calls: its places, and what is free by that.
    pub(in crate::fetch) fn leave(&mut self, partition: &Partition) -> (Vec<Position>, Vec<Job>) {
        let (mut left, mut coalesced) = (Vec::new(), Vec::new());
        let mut free = self.sift(|mut job| {
            let is_left = |job: &mut Job| job.position.partition == *partition;
            left.extend(job.coalesced.extract_if(.., is_left).map(|other| other.position));
            if job.position.partition != *partition {
                return Some(job);
            }
            coalesced.append(&mut job.coalesced);
            left.push(job.position);
            None
        });
        free.extend(coalesced);
        (left, free)
    }

    /// Ends what waits in refused calls of a batch that has just been cancelled; what is free by that.
    pub(in crate::fetch) fn sweep<R: Reader, W: Writer>(&mut self, admission: &mut Admission<R, W>) -> Vec<Job> {
        let mut coalesced = Vec::new();
        let mut free = self.sift(|mut job| {
            let all = std::mem::take(&mut job.coalesced);
            job.coalesced = all.into_iter().filter_map(|other| admission.unless_cancelled(other)).collect();
            if admission.is_cancelled(&job) {
                coalesced.append(&mut job.coalesced);
            }
            admission.unless_cancelled(job)
        });
        free.extend(coalesced);
        free
    }

    /// Replaces each request of a refused call by what `keep` makes of it. What is free by that.
    fn sift(&mut self, mut keep: impl FnMut(Job) -> Option<Job>) -> Vec<Job> {
        let mut free = self.splits.sift(&mut keep);
        let splits = &mut self.splits;
        self.misfits.sift(|mut aside| {
            let jobs = std::mem::take(&mut aside.call.jobs);
            aside.call.jobs = jobs.into_iter().filter_map(&mut keep).collect();
            if aside.call.jobs.is_empty() {
                // Nobody will say any more what the others of its group wait for.
                free.extend(aside.group.into_iter().flat_map(|group| splits.ended(group)));
                return None;
            }
            Some(aside)
        });
        free
    }
}
