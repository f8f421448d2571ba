//! Calls that are refused for what may be one item's: their requests are called for again, in smaller calls, until it is
//! known whose it is. None of that spends an attempt of theirs.

use super::{
    Fetch, batches,
    call::{Contact, Ended, Travel, Unrecorded},
    grouped::fingerprint,
    job::Job,
    set_aside::Aside,
    splits::GroupId,
};
use crate::{
    kafka::{Reader, Writer},
    message::{Class, Lane},
    platform::{Refusal, RefusalKind, Reply},
    quota::Pay,
};

impl<R: Reader, W: Writer> Fetch<R, W> {
    /// Whether the request would only spoil a call that it shares: it was refused alone before.
    pub(super) fn travels_alone(&self, job: &Job) -> bool {
        let failed = job.request.history.last().is_some_and(|last| last.class == Class::Malformed);
        self.caller.batch_max() > 1 && (failed || self.splits.knows(fingerprint(job)))
    }

    /// The requests of a group whose turn it is, and that are paid for.
    pub(super) fn take_split(&mut self) -> Option<(GroupId, Vec<Job>)> {
        let intake = &self.intake;
        let may_start = |job: &Job| intake.may_start(&job.position);
        let express_waits = self.backlog.waits(Lane::Express, may_start);
        if !self.splits.can_start(may_start) || !self.splits.is_turn(express_waits) {
            return None;
        }
        let (group, jobs) = self.splits.take(may_start)?;
        let (mut taken, mut paid) = (Vec::with_capacity(jobs.len()), Vec::new());
        for mut job in jobs {
            let twins = std::mem::take(&mut job.twins);
            let Some(mut job) = self.pay(job, &mut paid) else {
                self.free(twins);
                continue;
            };
            job.twins.extend(twins.into_iter().filter_map(|twin| self.pay(twin, &mut paid)));
            taken.push(job);
        }
        self.end_unpaid();
        if taken.is_empty() {
            let free = self.splits.ended(group);
            self.free(free);
            return None;
        }
        Some((group, taken))
    }

    /// Pays for a call that serves this request; else the request waits for money, or ends.
    fn pay(&mut self, job: Job, paid: &mut Vec<crate::message::BatchId>) -> Option<Job> {
        match self.spending.pay(job.request.batch.as_ref(), paid) {
            Pay::Go => Some(job),
            pay @ (Pay::Wait | Pay::Spent) => {
                self.unpaid.put(job, pay);
                None
            }
        }
    }

    /// Counts what the end of a call says of items and of the source.
    pub(super) fn note_split(&mut self, ended: &mut Ended) {
        let Contact::Called(_) = ended.contact else { return };
        let Travel { group, alone } = ended.travel;
        let is_known = alone.is_some_and(|item| self.splits.knows(item));
        let is_ones = ended.refused.is_some() || group.is_some();
        // What is to be learned of the only item of the call.
        let learned = match ended.refusal.as_ref().map(|refusal| &refusal.kind) {
            _ if ended.has_answer => {
                self.splits.note(true);
                Some(false)
            }
            Some(RefusalKind::Bug) => Some(true),
            // Once more: that says nothing new.
            Some(RefusalKind::Malformed | RefusalKind::Unclear) if is_known => {
                ended.is_one_items = true;
                None
            }
            Some(RefusalKind::Malformed | RefusalKind::Unclear) if is_ones => {
                self.splits.note(false);
                ended.is_one_items = !self.splits.blames_source();
                group.and_then(|group| self.splits.others_were_answered(group).then_some(true))
            }
            None | Some(_) => None,
        };
        if let Some((item, is_to_blame)) = alone.zip(learned) {
            self.splits.learn(item, is_to_blame);
        }
    }

    /// What becomes of the requests of a refused call, and of those that have waited for the end of this one.
    pub(super) async fn regroup(&mut self, ended: &mut Ended) {
        let group = ended.travel.group;
        if ended.has_answer {
            self.judge_aside(ended.left_at);
        }
        if let Some(refused) = ended.refused.take() {
            let Some(refusal) = ended.refusal.clone() else { return };
            if let Some(common) = refusal.common() {
                // Rare, and not to be in the way of all other ends.
                let aside = Aside { call: refused, refusal, group };
                return Box::pin(self.set_aside(common, ended.left_at, aside)).await;
            }
            let free = self.split(group, refused, refusal);
            return self.free(free);
        }
        let Some(group) = group else { return };
        let free = if !ended.missed.is_empty() {
            // What was not called for costs nothing.
            self.spending.refund(&batches(&ended.missed));
            let missed = std::mem::take(&mut ended.missed);
            let missed = missed.into_iter().filter_map(|job| self.unless_over(job)).collect();
            self.splits.put_back(group, missed)
        } else if ended.has_answer {
            self.splits.answered(group);
            Vec::new()
        } else {
            self.splits.ended(group)
        };
        self.free(free);
    }

    /// Ends the only request of a refused call; several are called for again. Those that are free by that.
    pub(super) fn split(&mut self, group: Option<GroupId>, mut refused: Unrecorded, mut refusal: Refusal) -> Vec<Job> {
        if refused.jobs.len() > 1 {
            let jobs: Vec<Job> = refused.jobs.into_iter().filter_map(|job| self.unless_over(job)).collect();
            return match jobs.len() {
                0 => group.map(|group| self.splits.ended(group)).unwrap_or_default(),
                1 => group.map(|group| self.splits.ended(group)).into_iter().flatten().chain(jobs).collect(),
                _ => self.splits.refused(group, jobs, (&refusal.code, &refusal.message)),
            };
        }
        if refusal.kind == RefusalKind::Unclear
            && group.is_some_and(|group| self.splits.is_to_blame(group, &refusal.code))
        {
            refusal.kind = RefusalKind::Bug;
        }
        refused.reply = Reply::Refused(refusal);
        self.end_refused(refused);
        group.map(|group| self.splits.ended(group)).unwrap_or_default()
    }

    /// A request whose call was for nothing, unless there is no use in another one.
    pub(super) fn unless_over(&mut self, job: Job) -> Option<Job> {
        if self.stopping || !self.intake.may_start(&job.position) {
            self.intake.give_up(&job.position);
            return None;
        }
        self.unless_cancelled(job)
    }

    /// Puts requests back among all others.
    pub(super) fn free(&mut self, jobs: Vec<Job>) {
        for job in Job::apart(jobs) {
            if let Some(job) = self.unless_over(job) {
                self.backlog.push(job);
            }
        }
    }
}
