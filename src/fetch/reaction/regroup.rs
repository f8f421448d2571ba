//! Calls that are refused for what may be one item's: their requests are called for again, in smaller calls, until it is
//! known whose it is. None of that spends an attempt of theirs.

use super::{Aftermath, Aside, Reaction, splits::GroupId};
use crate::{
    fetch::{
        admission::Admission,
        backlog::fingerprint,
        call::{Contact, Ended, Travel, Unrecorded},
        job::Job,
    },
    kafka::{Reader, Writer},
    message::Class,
    platform::{Refusal, RefusalKind, Reply},
};

impl Reaction {
    /// Whether the request would only spoil a call that it shares: it was refused alone before.
    pub(in crate::fetch) fn travels_alone(&self, job: &Job) -> bool {
        let failed = job.request.history.last().is_some_and(|last| last.class == Class::Malformed);
        self.caller.batch_max() > 1 && (failed || self.splits.knows(fingerprint(job)))
    }

    /// This request is to be called for alone.
    pub(in crate::fetch) fn push_alone(&mut self, job: Job) {
        self.splits.push_alone(job);
    }

    /// Whether requests of refused calls are to be called for now that may be.
    pub(in crate::fetch) fn can_start(&self, may_start: impl Fn(&Job) -> bool) -> bool {
        self.splits.can_start(may_start)
    }

    /// How many calls are to be made for them now.
    pub(in crate::fetch) fn calls(&self) -> usize {
        self.splits.calls()
    }

    /// The requests of a group whose turn it is, and that are paid for. They take turns with express requests, and those
    /// that only travel alone with bulk requests too, if any of these may start. Those go to `free` that are to be called for among all others.
    pub(in crate::fetch) fn take_split<R: Reader, W: Writer>(
        &mut self,
        (express_waits, bulk_waits): (bool, bool),
        admission: &mut Admission<R, W>,
        free: &mut Vec<Job>,
    ) -> Option<(GroupId, Vec<Job>)> {
        let may_start = |job: &Job| admission.may_start(job);
        if !self.can_start(may_start) || !self.splits.is_turn(may_start, express_waits, bulk_waits) {
            return None;
        }
        let (group, jobs) = self.splits.take(|job| admission.may_start(job))?;
        let (mut taken, mut paid) = (Vec::with_capacity(jobs.len()), Vec::new());
        for mut job in jobs {
            let coalesced = std::mem::take(&mut job.coalesced);
            let Some(mut job) = admission.pay(job, &mut paid) else {
                free.extend(coalesced);
                continue;
            };
            job.coalesced.extend(coalesced.into_iter().filter_map(|other| admission.pay(other, &mut paid)));
            taken.push(job);
        }
        admission.end_unpaid();
        if taken.is_empty() {
            free.extend(self.splits.ended(group));
            return None;
        }
        Some((group, taken))
    }

    /// The source is to blame, and no item: the requests of refused calls that wait are free.
    pub(in crate::fetch) fn free_splits(&mut self) -> Vec<Job> {
        self.splits.free_waiting()
    }

    /// Takes out all that waits here.
    pub(in crate::fetch) fn clear(&mut self) -> Vec<Job> {
        let mut jobs = self.splits.clear();
        jobs.extend(self.misfits.clear().into_iter().flat_map(|aside| aside.call.jobs));
        Job::apart(jobs)
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
    pub(super) async fn regroup<R: Reader, W: Writer>(
        &mut self,
        ended: &mut Ended,
        admission: &mut Admission<R, W>,
    ) -> Aftermath {
        let group = ended.travel.group;
        let mut aftermath = Aftermath::default();
        if ended.has_answer {
            self.judge_aside(ended.left_at, admission, &mut aftermath);
        }
        if let Some(refused) = ended.refused.take() {
            let Some(refusal) = ended.refusal.clone() else { return aftermath };
            if let Some(common) = refusal.common() {
                let aside = Aside { call: refused, refusal, group };
                // Rare, and not to be in the way of all other ends.
                Box::pin(self.set_aside(common, ended.left_at, aside, admission, &mut aftermath)).await;
            } else {
                self.split(group, refused, refusal, admission, &mut aftermath);
            }
            return aftermath;
        }
        let Some(group) = group else { return aftermath };
        let free = if !ended.missed.is_empty() {
            // What was not called for costs nothing.
            admission.refund(&ended.missed);
            let missed = std::mem::take(&mut ended.missed);
            let missed = missed.into_iter().filter_map(|job| admission.unless_over(job)).collect();
            // No more than the call had asked for.
            self.splits.put_back(group, Job::together(missed))
        } else if ended.has_answer {
            self.splits.answered(group);
            Vec::new()
        } else {
            self.splits.ended(group)
        };
        aftermath.again.extend(free);
        aftermath
    }

    /// Ends the only request of a refused call; several are called for again.
    pub(super) fn split<R: Reader, W: Writer>(
        &mut self,
        group: Option<GroupId>,
        mut refused: Unrecorded,
        mut refusal: Refusal,
        admission: &mut Admission<R, W>,
        aftermath: &mut Aftermath,
    ) {
        if refused.jobs.len() > 1 {
            let jobs = unless_all_over(refused.jobs, admission, aftermath);
            let free = match jobs.len() {
                0 => self.ended_group(group),
                1 => self.ended_group(group).into_iter().chain(jobs).collect(),
                _ => self.splits.refused(group, jobs, (&refusal.code, &refusal.message)),
            };
            return aftermath.again.extend(free);
        }
        if refusal.kind == RefusalKind::Unclear
            && group.is_some_and(|group| self.splits.is_to_blame(group, &refusal.code))
        {
            refusal.kind = RefusalKind::Bug;
        }
        refused.reply = Reply::Refused(refusal);
        aftermath.over.push(refused);
        aftermath.again.extend(self.ended_group(group));
    }

    /// Nobody will say any more what the others of this group wait for: they are free.
    pub(super) fn ended_group(&mut self, group: Option<GroupId>) -> Vec<Job> {
        group.map(|group| self.splits.ended(group)).unwrap_or_default()
    }
}

/// Those of refused requests that are still wanted. What was coalesced with others is called for again for itself.
pub(super) fn unless_all_over<R: Reader, W: Writer>(
    jobs: Vec<Job>,
    admission: &mut Admission<R, W>,
    aftermath: &mut Aftermath,
) -> Vec<Job> {
    let mut left = Vec::with_capacity(jobs.len());
    for mut job in jobs {
        let coalesced = std::mem::take(&mut job.coalesced);
        match admission.unless_over(job) {
            Some(job) => left.push(Job { coalesced, ..job }),
            None => aftermath.again.extend(coalesced),
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use tokio::time::Instant;

    use super::*;
    use crate::{
        cancelled::Cancelled,
        fetch::{
            Fetch,
            call_facts::CallFacts,
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
        let mut fetch =
            Fetch::new(reader, log, caller(), quota, crate::fetch::Config::default()).with_cancellations(cancelled);
        events.send(assigned()).unwrap();
        let read = tokio::time::timeout(Duration::from_millis(100), fetch.admission.next()).await;
        assert!(read.is_err(), "nothing but the assignment");
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

    fn with_other(mut job: Job, other: Job) -> Job {
        job.coalesced.push(other);
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

    /// A call for these was refused for what may be one item's.
    fn split(fetch: &mut Fetch<impl Reader, Log>, jobs: Vec<Job>) {
        let mut aftermath = Aftermath::default();
        let refusal = refusal(RefusalKind::Unclear);
        fetch.reaction.split(None, call_for(jobs), refusal, &mut fetch.admission, &mut aftermath);
        fetch.follow(aftermath);
    }

    /// The offsets of all that waits for a call.
    fn waiting(fetch: &mut Fetch<impl Reader, Log>) -> Vec<i64> {
        let mut jobs = fetch.departure.clear();
        jobs.extend(fetch.reaction.clear());
        let mut offsets: Vec<i64> = Job::apart(jobs).iter().map(|job| job.position.offset).collect();
        offsets.sort_unstable();
        offsets
    }

    #[tokio::test(start_paused = true)]
    async fn twins_of_a_request_that_was_cancelled_while_its_refused_call_was_under_way_are_called_for_again() {
        for kind in [RefusalKind::Unclear, RefusalKind::Misconfigured(Common::Params)] {
            let (cancel, cancelled) = Cancelled::scripted();
            let mut fetch = stage(cancelled).await;
            let jobs = vec![with_other(asks("7", 0, Some("monday")), asks("7", 1, None)), asks("8", 2, None)];
            cancel("monday", 1_000);
            let mut call = ended(Instant::now(), crate::fetch::call::Advice::default(), Some(kind.clone()));
            call.refused = Some(call_for(jobs));
            let aftermath = fetch.reaction.regroup(&mut call, &mut fetch.admission).await;
            fetch.follow(aftermath);
            assert_eq!(waiting(&mut fetch), [1, 2], "{kind:?}");
            let (position, _) = fetch.admission.pop_uncalled().expect("it has an end");
            assert_eq!(position.offset, 0);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_for_a_call_that_is_set_aside_is_free_when_nothing_is_left_of_that() {
        let (cancel, cancelled) = Cancelled::scripted();
        let mut fetch = stage(cancelled).await;
        let jobs = vec![asks("7", 0, Some("monday")), asks("8", 1, None)];
        split(&mut fetch, jobs);
        let (group, jobs) = fetch.reaction.splits.take(|_| true).unwrap();
        assert_eq!(jobs[0].position.offset, 0);
        let aside = Aside {
            call: call_for(jobs),
            refusal: refusal(RefusalKind::Misconfigured(Common::Params)),
            group: Some(group),
        };
        let (admission, mut aftermath) = (&mut fetch.admission, Aftermath::default());
        fetch.reaction.set_aside(Common::Params, Instant::now(), aside, admission, &mut aftermath).await;
        fetch.follow(aftermath);
        cancel("monday", 1_000);
        fetch.sweep();
        assert!(
            fetch.reaction.misfits.is_empty() && !fetch.departure.is_empty(),
            "the other one need not wait any more"
        );
        assert_eq!(waiting(&mut fetch), [1]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_groups_call_that_did_not_leave_asks_for_each_item_once_the_next_time() {
        let mut fetch = stage(Cancelled::none()).await;
        let jobs = vec![
            with_other(asks("7", 0, None), asks("7", 1, None)),
            with_other(asks("8", 2, None), asks("8", 3, None)),
            asks("9", 4, None),
            asks("10", 5, None),
        ];
        split(&mut fetch, jobs);
        let (group, jobs) = fetch.reaction.splits.take(|_| true).unwrap();
        assert_eq!(jobs.len(), 2);
        let mut call = ended(Instant::now(), crate::fetch::call::Advice::default(), None);
        (call.contact, call.travel.group, call.missed) = (Contact::None, Some(group), Job::apart(jobs));
        let aftermath = fetch.reaction.regroup(&mut call, &mut fetch.admission).await;
        fetch.follow(aftermath);
        let (_, jobs) = fetch.reaction.splits.take(|_| true).unwrap();
        let items: Vec<&str> = jobs.iter().map(|job| job.request.item.as_str()).collect();
        assert_eq!(items, ["7", "8"], "no more than go into a call");
        assert_eq!(Job::apart(jobs).len(), 4);
    }
}
