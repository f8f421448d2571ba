//! How late calls really leave, and how their replies bunch: by how much the pace is widened for it. Pure.
//!
//! The pace counts with a declared jitter ([`crate::quota::pace`]). A machine that has other things to do adds delays of
//! its own: a call whose slot has come waits for a thread before it is written, and a vendor, or a proxy, that stands
//! still for a moment reads many calls at once. The vendor sees both as a burst. Both can be measured, within seconds:
//!
//! - *How late calls leave*: from the slot to the moment at which whatever waited for a thread before the call has run.
//! - *How replies bunch*: calls that left evenly, one after the other, and of which nearly all took longer than nine in
//!   ten usually do. A vendor that simply takes its time does so for one call and not for its neighbours, which says
//!   nothing of jitter, and does not slow anything down.
//!
//! The larger of the two, if it is more than the declared jitter, takes its place for some seconds; then the pace comes
//! back. The spacing that covers it is that of the same formula. It is never less than half the pace: beyond that
//! refusals are the better judge ([`crate::quota::adapt`]).

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

use crate::quota::{Limit, Pacing, Share};

/// What was measured lately, and what it comes to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Measured {
    /// How late a call left.
    pub(super) late: Duration,
    /// By how much replies that came together were later than usual.
    pub(super) bunched: Duration,
}

/// Calls that left one after the other, and came back.
#[derive(Debug)]
struct Group {
    from: Instant,
    calls: u32,
    slow: u32,
    slowest: Duration,
}

/// The delays of the calls of one source.
#[derive(Debug)]
pub(in crate::fetch) struct Delays {
    limits: Vec<Limit>,
    pacing: Pacing,
    /// The process begins, and alone decides on the pace.
    is_soft: bool,
    /// When it first called.
    began_at: Option<Instant>,
    groups: VecDeque<Group>,
    /// What was seen when: the latest last.
    seen: VecDeque<(Instant, Measured)>,
    /// The times that calls took lately, in order of their ends.
    took: VecDeque<Duration>,
    usual: Option<Duration>,
    since_usual: usize,
}

impl Delays {
    /// For so long what was measured counts in full …
    const HOLDS: Duration = Duration::from_secs(2);
    /// … and after so long not at all.
    const FORGOTTEN: Duration = Duration::from_secs(4);
    /// A process that begins calls at half the pace, and at all of it after so long: its threads, caches and connections
    /// are cold, and nothing has been measured.
    const SOFT: Duration = Duration::from_secs(2);
    /// The least share of the pace.
    const LEAST: f64 = 0.5;
    /// Calls that left within so much time are looked at together …
    const TOGETHER: Duration = Duration::from_millis(25);
    /// … if they are so many, which at 600/s are a third of them.
    const TOGETHER_MIN: u32 = 5;
    /// So many calls say what is usual.
    const USUAL: usize = 512;

    /// For calls under these limits. `is_soft`: begins at less than the pace.
    pub(in crate::fetch) fn new(limits: Vec<Limit>, pacing: Pacing, is_soft: bool) -> Self {
        Self {
            limits: limits.into_iter().filter(Limit::is_paced).collect(),
            pacing,
            is_soft,
            began_at: None,
            groups: VecDeque::new(),
            seen: VecDeque::new(),
            took: VecDeque::new(),
            usual: None,
            since_usual: 0,
        }
    }

    /// A call of the slot at `slot_at` has left at `departed_at`; `took`: its reply came so long after.
    pub(super) fn note(&mut self, slot_at: Instant, departed_at: Instant, took: Option<Duration>, now: Instant) {
        let late = departed_at.saturating_duration_since(slot_at);
        self.began_at.get_or_insert(slot_at);
        self.see(now, Measured { late, ..Measured::default() });
        let Some(took) = took else { return };
        if let Some(usual) = self.usual {
            self.group(departed_at, took, usual, now);
        }
        self.took.push_back(took);
        if self.took.len() > Self::USUAL {
            self.took.pop_front();
        }
        self.since_usual += 1;
        // Sorting them is for once in a while.
        if self.since_usual >= Self::USUAL / 8 {
            self.since_usual = 0;
            let mut sorted: Vec<Duration> = self.took.iter().copied().collect();
            sorted.sort_unstable();
            self.usual = sorted.get(sorted.len() * 9 / 10).copied();
        }
    }

    /// Puts a call to those that left at about the same time.
    fn group(&mut self, departed_at: Instant, took: Duration, usual: Duration, now: Instant) {
        let is_of = |group: &&mut Group| {
            departed_at >= group.from && departed_at.saturating_duration_since(group.from) < Self::TOGETHER
        };
        let slow = u32::from(took > usual);
        match self.groups.iter_mut().rev().find(is_of) {
            Some(group) => {
                (group.calls, group.slow) = (group.calls + 1, group.slow + slow);
                group.slowest = group.slowest.max(took);
                if group.calls >= Self::TOGETHER_MIN && group.slow * 4 >= group.calls * 3 {
                    let bunched = group.slowest.saturating_sub(usual);
                    self.see(now, Measured { bunched, ..Measured::default() });
                }
            }
            None => self.groups.push_back(Group { from: departed_at, calls: 1, slow, slowest: took }),
        }
        while self.groups.len() > 64 {
            self.groups.pop_front();
        }
    }

    /// Remembers the larger ones of what was seen at about the same time.
    fn see(&mut self, now: Instant, measured: Measured) {
        match self.seen.back_mut() {
            Some((at, known)) if now.saturating_duration_since(*at) < Duration::from_millis(100) => {
                known.late = known.late.max(measured.late);
                known.bunched = known.bunched.max(measured.bunched);
            }
            _ => self.seen.push_back((now, measured)),
        }
        while self.seen.front().is_some_and(|(at, _)| now.saturating_duration_since(*at) > Self::FORGOTTEN) {
            self.seen.pop_front();
        }
    }

    /// What counts now of what was measured.
    pub(super) fn measured(&self, now: Instant) -> Measured {
        let mut all = Measured::default();
        for (at, one) in &self.seen {
            let age = now.saturating_duration_since(*at).max(Self::HOLDS);
            let left = Self::FORGOTTEN.saturating_sub(age).as_secs_f64()
                / Self::FORGOTTEN.saturating_sub(Self::HOLDS).as_secs_f64();
            all.late = all.late.max(one.late.mul_f64(left));
            all.bunched = all.bunched.max(one.bunched.mul_f64(left));
        }
        all
    }

    /// The share of the pace at which the vendor's limits hold in spite of these delays.
    pub(super) fn share(&self, now: Instant) -> Share {
        let Measured { late, bunched } = self.measured(now);
        let jitter = self.pacing.jitter.max(late).max(bunched).min(Pacing::JITTER_MAX);
        let widened = Pacing { jitter, ..self.pacing };
        let share = |limit: &Limit| {
            let planned = self.pacing.spacing(limit).as_secs_f64();
            planned / widened.spacing(limit).as_secs_f64().max(planned)
        };
        let least = self.limits.iter().map(share).fold(self.soft(now), f64::min);
        Share::new(least.clamp(Self::LEAST, 1.0)).unwrap_or(Share::WHOLE)
    }

    /// The share of a process that has just begun.
    fn soft(&self, now: Instant) -> f64 {
        if !self.is_soft || self.limits.is_empty() {
            return 1.0;
        }
        let Some(began_at) = self.began_at else { return Self::LEAST };
        let begun = now.saturating_duration_since(began_at).as_secs_f64() / Self::SOFT.as_secs_f64();
        // For the first half of that time it stays at the least.
        (begun - 0.5).max(0.0).mul_add(2.0 * (1.0 - Self::LEAST), Self::LEAST).min(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{quota::model::Bucket, runtime::clock::Dice};

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn limit(calls: u32, burst: u32) -> Limit {
        Limit::new(calls, Duration::from_secs(1), burst).unwrap()
    }

    /// Calls by their slots, one after the other at the share of the pace, each late by what `late` says, to a vendor that
    /// reads them all, as soon as it does not stand still, and answers after `think`.
    struct Trial {
        delays: Delays,
        spacing: Duration,
        start: Instant,
        at: Instant,
        arrivals: Vec<Duration>,
        left: Vec<Instant>,
        widens: bool,
    }

    impl Trial {
        fn new(limit: &Limit, is_soft: bool, widens: bool) -> Self {
            let start = Instant::now();
            let delays = Delays::new(vec![limit.clone()], Pacing::default(), is_soft);
            let spacing = Pacing::default().spacing(limit);
            Self { delays, spacing, start, at: start, arrivals: Vec::new(), left: Vec::new(), widens }
        }

        /// Runs for so long; `late`: of a slot; `reads_at`: when the vendor reads what arrives; `think`: its work.
        fn run(
            &mut self,
            time: Duration,
            late: impl Fn(Instant) -> Duration,
            reads_at: impl Fn(Instant) -> Instant,
            think: impl Fn() -> Duration,
        ) {
            let until = self.at + time;
            // What comes back is known only then.
            let mut pending: Vec<(Instant, Instant, Instant)> = Vec::new();
            while self.at < until {
                pending.sort_by_key(|(ends, ..)| std::cmp::Reverse(*ends));
                while pending.last().is_some_and(|(ends, ..)| *ends <= self.at) {
                    let (ends, slot, left) = pending.pop().unwrap();
                    self.delays.note(slot, left, Some(ends - left), ends);
                }
                let left = self.at + late(self.at);
                let read = reads_at(left);
                self.arrivals.push(read - self.start);
                self.left.push(left);
                pending.push((read + think(), self.at, left));
                let share = if self.widens { self.delays.share(self.at).get() } else { 1.0 };
                self.at += self.spacing.div_f64(share);
            }
        }

        /// How many calls a vendor refuses that arrive at least so long after the start.
        fn refused_after(mut self, limit: &Limit, since: Duration) -> usize {
            self.arrivals.sort_unstable();
            let mut bucket = Bucket::new(limit);
            let mut late = Vec::new();
            for arrival in self.arrivals {
                if bucket.refused([arrival]) > 0 && arrival > since {
                    late.push(arrival);
                }
            }
            late.len()
        }
    }

    #[test]
    fn a_vendor_that_takes_its_time_for_some_calls_slows_nothing_down() {
        let (limit, dice) = (limit(100, 5), Dice::seeded(7));
        let mut trial = Trial::new(&limit, false, true);
        // A third of a second, more or less, and one in fifty takes two.
        let think = || if dice.fraction() < 0.02 { ms(2_000) } else { ms(200) + ms(300).mul_f64(dice.fraction()) };
        trial.run(Duration::from_secs(60), |_| Duration::ZERO, |at| at, think);
        let planned = 60_000_f64 / (trial.spacing.as_secs_f64() * 1e3);
        #[allow(clippy::cast_precision_loss, reason = "thousands")]
        let made = trial.arrivals.len() as f64;
        assert!(made >= planned * 0.995, "{made} of {planned}");
    }

    #[test]
    fn what_was_measured_is_covered_by_the_formula_at_once_and_forgotten_within_seconds() {
        let (limit, start) = (limit(600, 20), Instant::now());
        let mut delays = Delays::new(vec![limit.clone()], Pacing::default(), false);
        assert_eq!(delays.share(start), Share::WHOLE);
        // The burst covers some.
        delays.note(start, start + ms(15), None, start);
        assert_eq!(delays.share(start), Share::WHOLE);
        delays.note(start, start + ms(40), None, start);
        let widened = Pacing { jitter: ms(40), ..Pacing::default() }.spacing(&limit);
        let expected = Pacing::default().spacing(&limit).as_secs_f64() / widened.as_secs_f64();
        assert!((delays.share(start).get() - expected).abs() < 1e-6, "{:?}", delays.share(start));
        assert!(delays.share(start + Duration::from_millis(1_900)).get() < expected + 1e-6);
        assert_eq!(delays.share(start + Duration::from_secs(4)), Share::WHOLE);
        delays.note(start, start + Duration::from_secs(5), None, start + Duration::from_secs(5));
        assert!((delays.share(start + Duration::from_secs(5)).get() - 0.5).abs() < 1e-9, "never less than half");
    }

    #[test]
    fn on_a_busy_machine_calls_that_leave_late_are_refused_without_it_and_not_with_it() {
        // Some of the calls wait up to 35 ms for a thread: the way to the vendor takes up to 10 ms more.
        let limit = limit(600, 20);
        let run = |widens: bool| {
            let dice = Dice::seeded(11);
            let mut trial = Trial::new(&limit, true, widens);
            let start = trial.start;
            // Every third of a second the calls of some time leave together.
            let late = move |at: Instant| {
                let phase = u32::try_from((at - start).as_millis() % 333).unwrap();
                if phase < 60 { ms(35).mul_f64(1.0 - f64::from(phase) / 60.0) } else { Duration::ZERO }
            };
            let way = |at: Instant| at + ms(10).mul_f64(dice.fraction());
            trial.run(Duration::from_secs(20), late, way, || ms(20));
            trial
        };
        assert!(run(false).refused_after(&limit, Duration::from_secs(1)) > 0, "the trial can fail");
        assert_eq!(run(true).refused_after(&limit, Duration::from_secs(1)), 0);
    }
}
