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
            // No more than the call had asked for.
            self.splits.put_back(group, Job::together(missed))
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
            let jobs = self.unless_all_over(refused.jobs);
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

    /// The same of requests with twins, which are put back among all others if theirs is over.
    pub(super) fn unless_all_over(&mut self, jobs: Vec<Job>) -> Vec<Job> {
        let (mut left, mut free) = (Vec::with_capacity(jobs.len()), Vec::new());
        for mut job in jobs {
            let twins = std::mem::take(&mut job.twins);
            match self.unless_over(job) {
                Some(job) => left.push(Job { twins, ..job }),
                None => free.extend(twins),
            }
        }
        self.free(free);
        left
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

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use tokio::time::Instant;

    use super::*;
    use crate::{
        cancelled::Cancelled,
        fetch::{
            outcome::CallFacts,
            tests::{caller, ended, job},
        },
        kafka::scripted::{Log, assigned},
        message::{AccountAlias, BatchId, ItemId},
        platform::Common,
        quota::{memory::Memory, pace::Pacing},
        runtime::clock::Timestamp,
    };

    /// A stage that owns the partition.
    async fn stage(cancelled: Cancelled) -> Fetch<impl Reader, Log> {
        let log = Log::default();
        let (events, reader) = log.reader();
        let quota = Arc::new(Memory::new(vec![None; 2], Pacing::default()));
        let mut fetch = Fetch::new(reader, log, caller(), quota, crate::fetch::Config::default()).heeding(cancelled);
        events.send(assigned()).unwrap();
        let read = tokio::time::timeout(Duration::from_millis(100), fetch.intake.next()).await;
        assert!(read.is_err(), "nothing but the assignment: {read:?}");
        fetch
    }

    fn asks(item: &str, offset: i64, batch: Option<&str>) -> Job {
        let mut job = job(0);
        job.request.item = ItemId::new(item).unwrap();
        job.request.batch = batch.map(|batch| BatchId::new(batch).unwrap());
        job.request.requested_at = Some(Timestamp::from_millis(0));
        job.position.offset = offset;
        job
    }

    fn with_twin(mut job: Job, twin: Job) -> Job {
        job.twins.push(twin);
        job
    }

    fn refusal(kind: RefusalKind) -> Refusal {
        Refusal { kind, code: "41".to_owned(), message: "words".to_owned() }
    }

    fn call_for(jobs: Vec<Job>) -> Unrecorded {
        let account = AccountAlias::new("a").unwrap();
        let facts =
            CallFacts { account, ended_at: Timestamp::from_millis(0), latency: Duration::ZERO, http_status: None };
        Unrecorded { jobs, reply: Reply::Each(vec![]), facts }
    }

    /// The offsets of all that waits for a call.
    fn waiting(fetch: &mut Fetch<impl Reader, Log>) -> Vec<i64> {
        let mut jobs = fetch.backlog.clear();
        jobs.extend(fetch.splits.clear());
        jobs.extend(fetch.misfits.clear().into_iter().flat_map(|aside| aside.call.jobs));
        let mut offsets: Vec<i64> = Job::apart(jobs).iter().map(|job| job.position.offset).collect();
        offsets.sort_unstable();
        offsets
    }

    #[tokio::test(start_paused = true)]
    async fn twins_of_a_request_that_was_cancelled_while_its_refused_call_was_under_way_are_called_for_again() {
        for kind in [RefusalKind::Unclear, RefusalKind::Misconfigured(Common::Params)] {
            let (cancel, cancelled) = Cancelled::scripted();
            let mut fetch = stage(cancelled).await;
            let jobs = vec![with_twin(asks("7", 0, Some("monday")), asks("7", 1, None)), asks("8", 2, None)];
            cancel("monday", 1_000);
            let mut call = ended(Instant::now(), crate::fetch::call::Advice::default(), Some(kind.clone()));
            call.refused = Some(call_for(jobs));
            fetch.regroup(&mut call).await;
            assert_eq!(waiting(&mut fetch), [1, 2], "{kind:?}");
            let (position, _) = fetch.uncalled.pop(|_| true).expect("it has an end");
            assert_eq!(position.offset, 0);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_for_a_call_that_is_set_aside_is_free_when_nothing_is_left_of_that() {
        let (cancel, cancelled) = Cancelled::scripted();
        let mut fetch = stage(cancelled).await;
        let jobs = vec![asks("7", 0, Some("monday")), asks("8", 1, None)];
        fetch.split(None, call_for(jobs), refusal(RefusalKind::Unclear));
        let (group, jobs) = fetch.splits.take(|_| true).unwrap();
        assert_eq!(jobs[0].position.offset, 0);
        let aside = Aside {
            call: call_for(jobs),
            refusal: refusal(RefusalKind::Misconfigured(Common::Params)),
            group: Some(group),
        };
        fetch.set_aside(Common::Params, Instant::now(), aside).await;
        cancel("monday", 1_000);
        fetch.sweep();
        assert!(fetch.misfits.is_empty() && !fetch.backlog.is_empty(), "the other one need not wait any more");
        assert_eq!(waiting(&mut fetch), [1]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_groups_call_that_did_not_leave_asks_for_each_item_once_the_next_time() {
        let mut fetch = stage(Cancelled::none()).await;
        let jobs = vec![
            with_twin(asks("7", 0, None), asks("7", 1, None)),
            with_twin(asks("8", 2, None), asks("8", 3, None)),
            asks("9", 4, None),
            asks("10", 5, None),
        ];
        fetch.split(None, call_for(jobs), refusal(RefusalKind::Unclear));
        let (group, jobs) = fetch.splits.take(|_| true).unwrap();
        assert_eq!(jobs.len(), 2);
        let mut call = ended(Instant::now(), crate::fetch::call::Advice::default(), None);
        (call.contact, call.travel.group, call.missed) = (Contact::None, Some(group), Job::apart(jobs));
        fetch.regroup(&mut call).await;
        let (_, jobs) = fetch.splits.take(|_| true).unwrap();
        let items: Vec<&str> = jobs.iter().map(|job| job.request.item.as_str()).collect();
        assert_eq!(items, ["7", "8"], "no more than go into a call");
        assert_eq!(Job::apart(jobs).len(), 4);
    }
}
