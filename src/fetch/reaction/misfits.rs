//! Calls that were refused for what all calls of the source have in common, this machine's clock or their form; and how
//! it is told whether it is only about one of them. Pure.
//!
//! Only other calls can tell. A call that left later and was answered shows that it is about the refused one. Without
//! any such answer the source is held: for a first refusal that no item can be to blame for, else after a few. Then one
//! call at a time tries again, after pauses that grow, and it is another request's if there is one. What was refused
//! waits aside meanwhile, without an end and without a spent attempt; once the source answers it is called for again.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use tokio::time::Instant;

use crate::{kafka::Partition, runtime::backoff::doubled};

/// A refused call, by what it is made of.
pub(super) trait Parts {
    /// The partition of each of its requests.
    fn partitions(&self) -> impl Iterator<Item = &Partition>;
}

/// Refused calls and what was found out with them.
#[derive(Debug)]
pub(super) struct Misfits<T> {
    aside: Vec<Misfit<T>>,
    /// How many of their requests wait, by partition.
    counts: HashMap<Partition, usize>,
    /// How often the source was held since it was answered last.
    holds: u32,
    /// When the last hold ends.
    held_until: Option<Instant>,
    /// How often one of them was called for since, for want of others; when the next one may be.
    looks: u32,
    look_at: Option<Instant>,
    /// It has answered before.
    has_answered: bool,
    /// Items, by fingerprint, that were refused before the source was held and answered again: what refuses them once
    /// more may be about them alone.
    before: HashSet<u64>,
    /// The hold is about this process alone.
    pub(super) is_local: bool,
}

#[derive(Debug)]
struct Misfit<T> {
    left_at: Instant,
    items: Vec<u64>,
    call: T,
}

/// What an answered call says of those that were refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Shown<T> {
    /// These were refused for something of their own.
    Own(Vec<T>),
    /// What was wrong with all is over: these can be called for again.
    Over(Vec<T>),
}

impl<T> Default for Misfits<T> {
    fn default() -> Self {
        let (aside, counts, before) = (Vec::new(), HashMap::new(), HashSet::new());
        let (looks, look_at, has_answered) = (0, None, false);
        Self { aside, counts, holds: 0, held_until: None, looks, look_at, has_answered, before, is_local: false }
    }
}

impl<T: Parts> Misfits<T> {
    /// The first hold; each one that follows is twice as long.
    const FIRST: Duration = Duration::from_secs(10);
    const LONGEST: Duration = Duration::from_secs(300);

    /// So many refused calls without an answer hold a source if one item may be to blame for each; more if the source has
    /// answered calls of the same form before.
    const FEW: [usize; 2] = [3, 10];
    /// Of more items it is not remembered that they were refused before.
    const MOST_BEFORE: usize = 10_000;

    /// A call for these items, by fingerprint, was refused that had left at `left_at`. `is_sure`: no item can be to blame.
    /// For how long the source is to be held now, if it is.
    pub(super) fn refused(
        &mut self,
        call: T,
        (left_at, items): (Instant, Vec<u64>),
        is_sure: bool,
        now: Instant,
    ) -> Option<Duration> {
        let is_again = !items.is_empty() && items.iter().all(|item| self.before.contains(item));
        self.count(&call);
        self.aside.push(Misfit { left_at, items, call });
        // It had left before the hold began: this is known.
        if self.held_until.is_some_and(|until| left_at < until) {
            return None;
        }
        let enough = if is_sure && !is_again { 1 } else { Self::FEW[usize::from(self.has_answered)] };
        (self.holds > 0 || self.aside.len() >= enough).then(|| self.hold(now))
    }

    /// For how long the source is held from now on.
    fn hold(&mut self, now: Instant) -> Duration {
        let pause = Self::pause(self.holds);
        self.holds += 1;
        self.held_until = Some(now + pause);
        pause
    }

    fn pause(times: u32) -> Duration {
        doubled(Self::FIRST, times, Self::LONGEST)
    }

    /// A call was answered that had left at `left_at`.
    pub(super) fn answered(&mut self, left_at: Instant) -> Shown<T> {
        self.has_answered = true;
        (self.looks, self.look_at) = (0, None);
        match self.held_until {
            // It says nothing of the time after it left.
            Some(until) if left_at < until => Shown::Own(Vec::new()),
            Some(_) => {
                (self.holds, self.held_until, self.is_local) = (0, None, false);
                if self.before.len() > Self::MOST_BEFORE {
                    self.before.clear();
                }
                self.counts.clear();
                let aside = std::mem::take(&mut self.aside);
                self.before.extend(aside.iter().flat_map(|misfit| &misfit.items));
                Shown::Over(aside.into_iter().map(|misfit| misfit.call).collect())
            }
            None => {
                let own = self.aside.extract_if(.., |misfit| misfit.left_at <= left_at);
                let own: Vec<T> = own.map(|misfit| misfit.call).collect();
                for call in &own {
                    self.uncount(call);
                }
                Shown::Own(own)
            }
        }
    }

    /// The hold has been ended before its time.
    pub(super) fn try_now(&mut self, now: Instant) {
        self.held_until = self.held_until.map(|until| until.min(now));
    }

    /// Whether one call at a time finds out if the source answers again.
    pub(super) fn is_trying(&self) -> bool {
        self.holds > 0
    }

    pub(super) fn is_empty(&self) -> bool {
        self.aside.is_empty()
    }

    /// What is called for if nothing else waits: that which was refused first. At once after a hold; else after a pause
    /// that grows as a hold does, since whatever comes meanwhile is called for.
    pub(super) fn take_first(&mut self, now: Instant) -> Result<T, Instant> {
        let pause = Self::pause(self.looks);
        let at = *self.look_at.get_or_insert(now + pause);
        if self.aside.is_empty() || (!self.is_trying() && now < at) {
            return Err(at);
        }
        (self.looks, self.look_at) = (self.looks + 1, None);
        let call = self.aside.remove(0).call;
        self.uncount(&call);
        Ok(call)
    }

    /// How many of a partition's requests wait here.
    pub(super) fn waiting_in(&self, partition: &Partition) -> usize {
        self.counts.get(partition).copied().unwrap_or_default()
    }

    fn count(&mut self, call: &T) {
        for partition in call.partitions() {
            *self.counts.entry(partition.clone()).or_default() += 1;
        }
    }

    fn uncount(&mut self, call: &T) {
        for partition in call.partitions() {
            if let Some(count) = self.counts.get_mut(partition) {
                *count -= 1;
                if *count == 0 {
                    self.counts.remove(partition);
                }
            }
        }
    }

    /// Replaces each refused call by what `keep` leaves of it.
    pub(super) fn sift(&mut self, mut keep: impl FnMut(T) -> Option<T>) {
        self.counts.clear();
        for misfit in std::mem::take(&mut self.aside) {
            let Some(call) = keep(misfit.call) else { continue };
            self.count(&call);
            self.aside.push(Misfit { call, ..misfit });
        }
    }

    /// Takes out all of them.
    pub(super) fn clear(&mut self) -> Vec<T> {
        self.counts.clear();
        std::mem::take(&mut self.aside).into_iter().map(|misfit| misfit.call).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    impl Parts for u64 {
        fn partitions(&self) -> impl Iterator<Item = &Partition> {
            std::iter::empty()
        }
    }

    impl Parts for Vec<Partition> {
        fn partitions(&self) -> impl Iterator<Item = &Partition> {
            self.iter()
        }
    }

    #[test]
    fn how_many_requests_of_a_partition_wait_is_counted_however_they_come_and_go() {
        let of = |number| Partition { topic: "t".into(), number };
        let (mut misfits, now) = (Misfits::default(), Instant::now());
        let refuse = |misfits: &mut Misfits<Vec<Partition>>, after: u32, numbers: &[i32]| {
            let call = numbers.iter().copied().map(of).collect();
            misfits.refused(call, (now + after * SECOND, vec![]), false, now);
        };
        let counts = |misfits: &Misfits<_>| [0, 1].map(|number| misfits.waiting_in(&of(number)));
        refuse(&mut misfits, 0, &[0, 0, 1]);
        refuse(&mut misfits, 5, &[1]);
        assert_eq!(counts(&misfits), [2, 2]);
        assert!(matches!(misfits.answered(now + SECOND), Shown::Own(calls) if calls.len() == 1));
        assert_eq!(counts(&misfits), [0, 1]);
        refuse(&mut misfits, 6, &[0, 1]);
        misfits.sift(|call| Some(call.into_iter().filter(|part| part.number == 0).collect()));
        assert_eq!(counts(&misfits), [1, 0]);
        misfits.sift(|call: Vec<_>| (!call.is_empty()).then_some(call));
        assert!(misfits.take_first(now).is_err() && misfits.take_first(now + 60 * SECOND).is_ok());
        assert_eq!((counts(&misfits), misfits.counts.len()), ([0, 0], 0));
        refuse(&mut misfits, 70, &[1]);
        assert_eq!((misfits.clear().len(), misfits.counts.len()), (1, 0));
    }

    #[test]
    fn what_no_item_can_be_to_blame_for_holds_at_once_and_pauses_grow_until_one_call_is_answered() {
        let (mut misfits, start) = (Misfits::default(), Instant::now());
        let refused = |misfits: &mut Misfits<u64>, item, left_at, now| {
            misfits.refused(item, (left_at, vec![item]), true, now).map(|pause| pause.as_secs())
        };
        assert_eq!(refused(&mut misfits, 0, start, start), Some(10));
        assert_eq!(refused(&mut misfits, 1, start + SECOND / 10, start + SECOND), None, "it had left before");
        assert_eq!(misfits.answered(start + SECOND / 20), Shown::Own(vec![]), "so had this");
        let (mut now, mut pauses) = (start + 10 * SECOND, Vec::new());
        for item in 2..8 {
            assert!(misfits.is_trying());
            let pause = refused(&mut misfits, item, now, now).unwrap();
            pauses.push(pause);
            now += Duration::from_secs(pause);
        }
        assert_eq!(pauses, [20, 40, 80, 160, 300, 300]);
        assert_eq!(misfits.answered(now), Shown::Over((0..8).collect()), "each is called for again");
        assert!(!misfits.is_trying() && misfits.is_empty());
    }

    #[test]
    fn a_refusal_that_may_be_about_one_request_is_that_if_a_later_call_is_answered() {
        let (mut misfits, start) = (Misfits::default(), Instant::now());
        for number in 0..100_u64 {
            let left_at = start + SECOND * u32::try_from(number).unwrap();
            assert_eq!(misfits.refused(number, (left_at, vec![number]), false, left_at), None);
            assert_eq!(misfits.answered(left_at - SECOND / 2), Shown::Own(vec![]), "an earlier one says nothing");
            assert_eq!(misfits.answered(left_at + SECOND / 2), Shown::Own(vec![number]));
        }
        let pauses: Vec<_> =
            (0..10).map(|number| misfits.refused(number, (start, vec![number]), false, start).is_some()).collect();
        assert_eq!(pauses.iter().position(|holds| *holds), Some(9), "ten in a row, though it has answered before");
        let mut fresh = Misfits::default();
        let pauses: Vec<_> =
            (0..3).map(|number| fresh.refused(number, (start, vec![number]), false, start).is_some()).collect();
        assert_eq!(pauses, [false, false, true], "three of a source that has never answered");
    }

    #[test]
    fn a_hold_that_an_operator_ends_is_over_with_the_next_answer() {
        let (mut misfits, start) = (Misfits::default(), Instant::now());
        assert!(misfits.refused(7, (start, vec![7]), true, start).is_some());
        misfits.try_now(start + SECOND);
        assert_eq!(misfits.answered(start + SECOND), Shown::Over(vec![7]));
    }

    #[test]
    fn the_only_request_is_called_for_again_after_pauses_that_grow_and_holds_nobody() {
        let (mut misfits, mut now) = (Misfits::default(), Instant::now());
        for pause in [10, 20, 40] {
            assert_eq!(misfits.refused(7, (now, vec![7]), false, now), None);
            assert_eq!(misfits.take_first(now), Err(now + pause * SECOND));
            now += pause * SECOND;
            assert_eq!(misfits.take_first(now), Ok(7));
        }
    }

    #[test]
    fn one_request_that_is_refused_again_and_again_while_others_are_answered_holds_the_source_once() {
        let (mut misfits, start) = (Misfits::default(), Instant::now());
        assert!(misfits.refused(7, (start, vec![7]), true, start).is_some());
        let now = start + 10 * SECOND;
        assert_eq!(misfits.answered(now), Shown::Over(vec![7]));
        assert_eq!(misfits.refused(7, (now, vec![7]), true, now), None);
        assert_eq!(misfits.answered(now + SECOND), Shown::Own(vec![7]));
        assert!(misfits.refused(8, (now, vec![8]), true, now).is_some(), "another one is another matter");
    }
}
