//! Circuit breaker: when to stop calls to a peer that does not answer, and how to probe whether it answers again. Pure.
//!
//! Closed: calls leave, and outages are counted. Open: no call leaves for a while. Half open: up to a few probes are
//! under way at once; one that is answered closes the breaker, it opens again when all have ended in outages, and one
//! that came to nothing (its slot was missed, it never left) only gives its place to another. Time is an argument.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

/// `[source.breaker]`
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BreakerConfig {
    /// So many outages in a row open it, unless others were answered just before, or are under way, of which they are
    /// less than `share`.
    pub failures: u32,
    /// So does this share of the calls of the last `window`, from 0.01 to 1.
    pub share: f64,
    /// How far back calls count.
    #[serde(with = "humantime_serde")]
    pub window: Duration,
    /// Fewer calls than this in the window have no share.
    pub sample: u32,
    /// For how long it opens.
    #[serde(with = "humantime_serde")]
    pub open: Duration,
    /// How many calls at once find out afterwards whether it may close.
    pub probes: u32,
    /// A vendor that says for how long it is away (503 with `Retry-After`) is believed for so long at most: then it is
    /// asked again.
    #[serde(with = "humantime_serde")]
    pub open_max: Duration,
}

impl Default for BreakerConfig {
    fn default() -> Self {
        let (window, open) = (Duration::from_secs(30), Duration::from_secs(30));
        Self { failures: 5, share: 0.5, window, sample: 20, open, probes: 3, open_max: Duration::from_secs(300) }
    }
}

impl BreakerConfig {
    /// Checks the values.
    ///
    /// # Errors
    /// The key, what was found and what is allowed.
    pub fn check(&self) -> Result<(), (String, String, &'static str)> {
        let Some((key, found, allowed)) = self.problem() else { return Ok(()) };
        Err((format!("breaker.{key}"), found, allowed))
    }

    fn problem(&self) -> Option<(&'static str, String, &'static str)> {
        let seconds = |time: Duration| humantime::format_duration(time).to_string();
        let times = Duration::from_millis(100)..=Duration::from_secs(3_600);
        let allowed = "from 100ms to 1h";
        if !(1..=10_000).contains(&self.failures) {
            Some(("failures", self.failures.to_string(), "from 1 to 10000"))
        } else if !(0.01..=1.0).contains(&self.share) {
            Some(("share", self.share.to_string(), "from 0.01 to 1"))
        } else if !times.contains(&self.window) {
            Some(("window", seconds(self.window), allowed))
        } else if self.sample == 0 {
            Some(("sample", self.sample.to_string(), "at least 1"))
        } else if !times.contains(&self.open) {
            Some(("open", seconds(self.open), allowed))
        } else if !(1..=100).contains(&self.probes) {
            Some(("probes", self.probes.to_string(), "from 1 to 100"))
        } else if !(Duration::from_secs(1)..=Duration::from_secs(86_400)).contains(&self.open_max) {
            Some(("open_max", seconds(self.open_max), "from 1s to 1day"))
        } else {
            None
        }
    }
}

/// What the end of a call says of whom was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The peer answered.
    Good,
    /// An outage: no answer, an error of the peer's own, or an unreadable reply.
    Outage,
    /// Neither: too fast, refused, or never left.
    Neither,
}

/// What a call carries from [`Breaker::admit`] to [`Breaker::ended`]: a call that left before the breaker last changed
/// says nothing any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u64);

/// What no call may leave for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shut {
    /// It is open, until then.
    Until(Instant),
    /// The probes are under way.
    Probing,
}

/// What the end of a call has changed.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// It is open.
    Opened {
        /// Until then.
        until: Instant,
        /// Why, for people.
        why: String,
    },
    /// It is closed again.
    Closed,
}

#[derive(Debug)]
enum State {
    Closed(Box<Counts>),
    Open(Instant),
    HalfOpen(Probes),
}

/// The calls that find out whether it may close.
#[derive(Clone, Copy, Debug, Default)]
struct Probes {
    under_way: u32,
    /// Have ended in an outage, while others were under way.
    failed: u32,
}

impl Probes {
    const fn places_taken(self) -> u32 {
        self.under_way + self.failed
    }
}

/// Of one source, or of one account.
#[derive(Debug)]
pub struct Breaker {
    config: BreakerConfig,
    state: State,
    /// How often it has changed.
    generation: u64,
}

impl Breaker {
    /// Closed.
    #[must_use]
    pub fn new(config: BreakerConfig) -> Self {
        Self { config, state: State::Closed(Box::default()), generation: 0 }
    }

    /// Why no call may leave, if none may.
    #[must_use]
    pub fn shut(&self, now: Instant) -> Option<Shut> {
        match self.state {
            State::Closed(_) => None,
            State::Open(until) => (now < until).then_some(Shut::Until(until)),
            State::HalfOpen(probes) => (probes.places_taken() >= self.config.probes).then_some(Shut::Probing),
        }
    }

    /// Whether the next call finds out if it may close.
    #[must_use]
    pub fn is_trying(&self) -> bool {
        !matches!(self.state, State::Closed(_))
    }

    /// How many calls may leave, at most.
    #[must_use]
    pub fn room(&self, now: Instant) -> usize {
        let probes = usize::try_from(self.config.probes).unwrap_or(usize::MAX);
        match self.state {
            State::Closed(_) => usize::MAX,
            State::Open(until) if now < until => 0,
            State::Open(_) => probes,
            State::HalfOpen(taken) => {
                probes.saturating_sub(usize::try_from(taken.places_taken()).unwrap_or(usize::MAX))
            }
        }
    }

    /// A call leaves.
    ///
    /// # Errors
    /// [`Shut`] if it may not.
    pub fn admit(&mut self, now: Instant) -> Result<Ticket, Shut> {
        if let Some(shut) = self.shut(now) {
            return Err(shut);
        }
        match &mut self.state {
            State::Closed(counts) => counts.under_way += 1,
            State::Open(_) => self.change(State::HalfOpen(Probes { under_way: 1, failed: 0 })),
            State::HalfOpen(probes) => probes.under_way += 1,
        }
        Ok(Ticket(self.generation))
    }

    /// A call has ended, and its reply came `at` that time; what that changes. Calls are to be told of in the order of
    /// their replies.
    pub fn ended(&mut self, Ticket(generation): Ticket, verdict: Verdict, at: Instant) -> Option<Change> {
        if generation != self.generation {
            return None;
        }
        match &mut self.state {
            State::Closed(counts) => {
                let why = counts.note(verdict, &self.config, at)?;
                Some(self.open(at + self.config.open, why))
            }
            State::HalfOpen(probes) => {
                probes.under_way = probes.under_way.saturating_sub(1);
                match verdict {
                    Verdict::Neither => None,
                    Verdict::Outage => {
                        probes.failed += 1;
                        // The others may have been for items that do better.
                        let why = match (probes.under_way, probes.failed) {
                            (0, 1) => "a probe failed with an outage".to_owned(),
                            (0, failed) => format!("{failed} probes failed with outages"),
                            _ => return None,
                        };
                        Some(self.open(at + self.config.open, why))
                    }
                    Verdict::Good => {
                        // One good call proves little: two outages before the next one are enough to open it again.
                        let row = self.config.failures.saturating_sub(2);
                        let under_way = probes.under_way;
                        // Not another generation: the other probes count.
                        self.state = State::Closed(Box::new(Counts { row, under_way, ..Counts::default() }));
                        Some(Change::Closed)
                    }
                }
            }
            State::Open(_) => None,
        }
    }

    /// Opens until then because another process or the vendor said so; `None` if it is open for as long already.
    pub fn open_until(&mut self, until: Instant, why: &str) -> Option<Change> {
        if matches!(self.state, State::Open(already) if already >= until) {
            return None;
        }
        Some(self.open(until, why.to_owned()))
    }

    /// If it is open, it need not wait any longer for its probes.
    pub fn try_now(&mut self, now: Instant) {
        if let State::Open(until) = &mut self.state {
            *until = now.min(*until);
        }
    }

    /// What was counted counts no more: who is to blame has been found elsewhere.
    pub fn forget(&mut self) {
        if let State::Closed(counts) = &mut self.state {
            **counts = Counts { under_way: counts.under_way, ..Counts::default() };
        }
    }

    fn open(&mut self, until: Instant, why: String) -> Change {
        self.change(State::Open(until));
        Change::Opened { until, why }
    }

    fn change(&mut self, state: State) {
        self.state = state;
        self.generation += 1;
    }
}

/// The ends of calls of the last so much time, counted in pieces, of which the oldest are forgotten.
#[derive(Debug, Default)]
struct Window {
    began_at: Option<Instant>,
    /// Which piece since the first call, calls, outages.
    pieces: [(u64, u32, u32); Self::PIECES],
    latest: u64,
}

impl Window {
    const PIECES: usize = 10;

    fn note(&mut self, is_outage: bool, length: Duration, at: Instant) {
        let began_at = *self.began_at.get_or_insert(at);
        let width = length.as_micros() / Self::PIECES as u128;
        let number = u64::try_from((at - began_at).as_micros() / width.max(1)).unwrap_or(u64::MAX);
        let place = usize::try_from(number % Self::PIECES as u64).unwrap_or_default();
        self.latest = self.latest.max(number);
        let piece = &mut self.pieces[place];
        if piece.0 < number {
            *piece = (number, 0, 0);
        }
        // One that is told of long after its time is forgotten already.
        if piece.0 == number {
            piece.1 += 1;
            piece.2 += u32::from(is_outage);
        }
    }

    /// How many calls, and how many of them were outages.
    fn sum(&self) -> (u32, u32) {
        let recent = self.pieces.iter().filter(|(number, ..)| self.latest - number < Self::PIECES as u64);
        recent.fold((0, 0), |sum, (_, calls, outages)| (sum.0 + calls, sum.1 + outages))
    }
}

/// How calls have ended of late.
#[derive(Debug, Default)]
struct Counts {
    /// Outages in a row.
    row: u32,
    row_since: Option<Instant>,
    /// Calls that have left and not ended.
    under_way: u32,
    window: Window,
    /// The last [`Self::MOMENT`].
    moment: Window,
}

impl Counts {
    /// Consecutive outages over this long open the breaker even at a low rate: no call was answered meanwhile.
    const SILENCE: Duration = Duration::from_millis(500);

    /// A shorter one is measured by all that was answered within this time, and by what is under way: of a thousand calls
    /// a second of which each twentieth fails by itself, five in a row fail about once an hour.
    const MOMENT: Duration = Duration::from_millis(250);

    /// Counts a call; why that opens the breaker, if it does.
    fn note(&mut self, verdict: Verdict, config: &BreakerConfig, at: Instant) -> Option<String> {
        self.under_way = self.under_way.saturating_sub(1);
        let is_outage = match verdict {
            Verdict::Neither => return None,
            Verdict::Good => false,
            Verdict::Outage => true,
        };
        self.window.note(is_outage, config.window, at);
        self.moment.note(is_outage, Self::MOMENT, at);
        if !is_outage {
            (self.row, self.row_since) = (0, None);
            return None;
        }
        self.row = self.row.saturating_add(1);
        let since = *self.row_since.get_or_insert(at);
        if self.row >= config.failures && self.row_counts(at - since, config) {
            return Some(format!("{} outages in a row", self.row));
        }
        let (calls, outages) = self.window.sum();
        // Failures may come at once where answers take their time: what is under way may yet be answered.
        let all = f64::from(calls.saturating_add(self.under_way));
        let is_too_much = calls >= config.sample && f64::from(outages) >= config.share * all;
        is_too_much.then(|| format!("{outages} of the last {calls} calls were outages, within {:?}", config.window))
    }

    /// Whether the row is more than chance among many calls.
    fn row_counts(&self, lasts: Duration, config: &BreakerConfig) -> bool {
        let answered = self.moment.sum().0.max(self.row);
        let all = f64::from(answered.saturating_add(self.under_way));
        lasts >= Self::SILENCE || f64::from(self.row) >= config.share * all
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn breaker() -> (Breaker, Instant) {
        (Breaker::new(BreakerConfig::default()), Instant::now())
    }

    /// One call, which ends at once.
    fn call(breaker: &mut Breaker, verdict: Verdict, now: Instant) -> Option<Change> {
        let ticket = breaker.admit(now).unwrap();
        breaker.ended(ticket, verdict, now)
    }

    fn opened(breaker: &mut Breaker, now: Instant) {
        (0..4).for_each(|_| assert_eq!(call(breaker, Verdict::Outage, now), None));
        assert!(matches!(call(breaker, Verdict::Outage, now), Some(Change::Opened { .. })));
    }

    #[test]
    fn five_outages_in_a_row_open_it_for_thirty_seconds_and_a_good_probe_closes_it() {
        let (mut breaker, start) = breaker();
        opened(&mut breaker, start);
        let until = start + 30 * SECOND;
        assert_eq!(breaker.admit(until - SECOND / 1_000), Err(Shut::Until(until)));
        let probes: Vec<_> = (0..3).map(|_| breaker.admit(until).unwrap()).collect();
        assert_eq!(breaker.admit(until), Err(Shut::Probing));
        assert_eq!(breaker.ended(probes[1], Verdict::Good, until), Some(Change::Closed));
        assert!(breaker.admit(until).is_ok());
        assert_eq!(breaker.ended(probes[0], Verdict::Outage, until), None);
        let again = breaker.ended(probes[2], Verdict::Outage, until);
        assert!(matches!(again, Some(Change::Opened { .. })), "two of the three probes failed: {again:?}");
    }

    #[test]
    fn a_probe_that_came_to_nothing_gives_its_place_to_another() {
        let (mut breaker, start) = breaker();
        opened(&mut breaker, start);
        let now = start + 30 * SECOND;
        for _ in 0..100 {
            let probes: Vec<_> = (0..3).map(|_| breaker.admit(now).unwrap()).collect();
            for probe in probes {
                assert_eq!(breaker.ended(probe, Verdict::Neither, now), None);
            }
        }
        assert_eq!(call(&mut breaker, Verdict::Good, now), Some(Change::Closed));
    }

    #[test]
    fn a_probe_that_fails_waits_for_the_others_that_are_under_way() {
        let (mut breaker, start) = breaker();
        opened(&mut breaker, start);
        let now = start + 30 * SECOND;
        let probes: Vec<_> = (0..3).map(|_| breaker.admit(now).unwrap()).collect();
        assert_eq!(breaker.ended(probes[0], Verdict::Outage, now), None);
        assert_eq!(breaker.admit(now), Err(Shut::Probing), "its place is not given to another");
        assert_eq!(breaker.ended(probes[1], Verdict::Outage, now), None);
        let Some(Change::Opened { why, .. }) = breaker.ended(probes[2], Verdict::Outage, now) else {
            panic!("nobody was answered");
        };
        assert_eq!(why, "3 probes failed with outages");
        let now = now + 30 * SECOND;
        let probes: Vec<_> = (0..3).map(|_| breaker.admit(now).unwrap()).collect();
        assert_eq!(breaker.ended(probes[0], Verdict::Outage, now), None);
        assert_eq!(breaker.ended(probes[1], Verdict::Good, now), Some(Change::Closed));
    }

    /// A source of so many calls a second, each answered after `latency` or failing after `fails_after`; whether each
    /// one fails is `fails`' to say. When it was opened first.
    fn busy(
        (per_second, seconds): (u64, u64),
        (latency, fails_after): (Duration, Duration),
        mut fails: impl FnMut(Duration) -> bool,
    ) -> Option<Duration> {
        let (mut breaker, start) = breaker();
        let (mut good, mut bad) = (std::collections::VecDeque::new(), std::collections::VecDeque::new());
        for number in 0..per_second * seconds {
            let now = start + Duration::from_micros(number * 1_000_000 / per_second);
            loop {
                let due = |queue: &std::collections::VecDeque<(Instant, Ticket)>| {
                    queue.front().map(|(at, _)| *at).filter(|at| *at <= now)
                };
                let (queue, verdict) = match (due(&good), due(&bad)) {
                    (None, None) => break,
                    (Some(at), bad_at) if bad_at.is_none_or(|bad_at| at <= bad_at) => (&mut good, Verdict::Good),
                    _ => (&mut bad, Verdict::Outage),
                };
                let (at, ticket) = queue.pop_front().unwrap();
                if breaker.ended(ticket, verdict, at).is_some() {
                    return Some(at - start);
                }
            }
            let ticket = breaker.admit(now).unwrap();
            if fails(now - start) {
                bad.push_back((now + fails_after, ticket));
            } else {
                good.push_back((now + latency, ticket));
            }
        }
        None
    }

    fn one_in_twenty(dice: &crate::runtime::clock::Dice) -> bool {
        dice.fraction() < 0.05
    }

    #[test]
    fn a_busy_source_of_which_one_call_in_twenty_fails_is_never_shut() {
        let ms = Duration::from_millis;
        let dice = crate::runtime::clock::Dice::seeded(5);
        // An hour of quick replies: about one row of five by chance.
        assert_eq!(busy((1_000, 3_600), (ms(3), ms(3)), |_| one_in_twenty(&dice)), None);
        // Failures that come at once, before any of the others is answered, and after them.
        for (latency, fails_after) in [(ms(300), ms(2)), (ms(2), ms(300)), (ms(20), ms(10_000))] {
            for seed in 0..20 {
                let dice = crate::runtime::clock::Dice::seeded(seed);
                let opened = busy((1_000, 30), (latency, fails_after), |_| one_in_twenty(&dice));
                assert_eq!(opened, None, "{latency:?} {fails_after:?} {seed}");
            }
        }
    }

    #[test]
    fn a_source_that_goes_away_is_shut_within_five_calls_or_a_second() {
        let ms = Duration::from_millis;
        for per_second in [1, 2, 10, 50, 200, 1_000, 5_000] {
            for (latency, fails_after) in [(ms(3), ms(1)), (ms(300), ms(2)), (ms(30), ms(5_000))] {
                let gone_at = ms(10_000);
                let dice = crate::runtime::clock::Dice::seeded(per_second);
                let fails = |at| at >= gone_at || one_in_twenty(&dice) && per_second >= 50;
                let opened = busy((per_second, 30), (latency, fails_after), fails).expect("it is away");
                let five_calls = ms(4_000 / per_second);
                // What had left before is answered until then, and it shows by the first failure at the earliest.
                let shows_at = gone_at + fails_after.max(latency);
                let within = shows_at + five_calls.max(Duration::from_secs(1));
                assert!(
                    opened >= gone_at && opened <= within,
                    "{per_second}/s {latency:?} {fails_after:?}: {opened:?}"
                );
            }
        }
    }

    #[test]
    fn a_busy_source_that_goes_away_costs_the_calls_of_an_eighth_of_a_second() {
        let gone_at = Duration::from_secs(10);
        let opened = busy((1_000, 30), (SECOND / 100, SECOND / 1_000), |at| at >= gone_at).expect("it is away");
        assert!(opened <= gone_at + SECOND / 8 + SECOND / 50, "{opened:?}");
    }

    #[test]
    fn a_row_of_failures_among_hundreds_of_calls_under_way_is_no_outage() {
        let (mut breaker, start) = breaker();
        let calls: Vec<_> = (0..200).map(|_| breaker.admit(start).unwrap()).collect();
        for ticket in &calls[..10] {
            assert_eq!(breaker.ended(*ticket, Verdict::Outage, start + SECOND / 100), None);
        }
        assert_eq!(breaker.ended(calls[10], Verdict::Good, start + SECOND / 3), None);
        // The same without any answer for half a second.
        let (mut breaker, start) = self::breaker();
        let calls: Vec<_> = (0..200).map(|_| breaker.admit(start).unwrap()).collect();
        for ticket in &calls[..10] {
            assert_eq!(breaker.ended(*ticket, Verdict::Outage, start + SECOND / 100), None);
        }
        assert!(breaker.ended(calls[10], Verdict::Outage, start + SECOND).is_some());
    }

    #[test]
    fn what_left_before_it_opened_neither_closes_nor_lengthens_it() {
        let (mut breaker, start) = breaker();
        let old: Vec<_> = (0..2).map(|_| breaker.admit(start).unwrap()).collect();
        opened(&mut breaker, start);
        assert_eq!(breaker.ended(old[0], Verdict::Outage, start + 10 * SECOND), None);
        assert_eq!(breaker.shut(start + 29 * SECOND), Some(Shut::Until(start + 30 * SECOND)));
        let probe = breaker.admit(start + 30 * SECOND).unwrap();
        assert_eq!(breaker.ended(old[1], Verdict::Good, start + 30 * SECOND), None);
        assert!(breaker.is_trying());
        let failed = breaker.ended(probe, Verdict::Outage, start + 31 * SECOND);
        assert_eq!(failed.map(|_| breaker.shut(start + 60 * SECOND)), Some(Some(Shut::Until(start + 61 * SECOND))));
    }

    #[test]
    fn half_of_a_windows_calls_open_it_though_some_are_answered_in_between() {
        let (mut breaker, mut now) = breaker();
        let mut changes = Vec::new();
        for number in 0..20 {
            let verdict = if number % 2 == 0 { Verdict::Good } else { Verdict::Outage };
            changes.extend(call(&mut breaker, verdict, now).map(|change| (number, change)));
            now += SECOND;
        }
        assert!(matches!(changes[..], [(19, Change::Opened { .. })]), "the twentieth is the sample: {changes:?}");
    }

    #[test]
    fn calls_of_long_ago_do_not_count() {
        let (mut breaker, start) = breaker();
        // Ten bad calls of twenty, in two bursts a minute apart.
        for minute in 0..40u32 {
            let now = start + 60 * SECOND * minute;
            for number in 0..9 {
                let verdict = if number % 2 == 0 { Verdict::Outage } else { Verdict::Good };
                assert_eq!(call(&mut breaker, verdict, now), None, "minute {minute}");
            }
        }
    }

    #[test]
    fn what_somebody_else_knows_opens_it_too() {
        let (mut breaker, start) = breaker();
        assert!(breaker.open_until(start + 5 * SECOND, "the vendor says so").is_some());
        assert_eq!(breaker.open_until(start + 4 * SECOND, "shorter"), None);
        assert_eq!(breaker.admit(start + 4 * SECOND), Err(Shut::Until(start + 5 * SECOND)));
        assert!(breaker.admit(start + 5 * SECOND).is_ok());
    }

    fn verdict() -> impl Strategy<Value = Verdict> {
        prop_oneof![1 => Just(Verdict::Good), 3 => Just(Verdict::Outage), 1 => Just(Verdict::Neither)]
    }

    #[derive(Clone, Debug)]
    enum Step {
        Admit,
        End(prop::sample::Index, Verdict),
        Wait(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let end = (any::<prop::sample::Index>(), verdict()).prop_map(|(which, verdict)| Step::End(which, verdict));
        prop_oneof![3 => Just(Step::Admit), 3 => end, 1 => (0u64..20_000).prop_map(Step::Wait)]
    }

    proptest! {
        #[test]
        fn probes_are_few_it_is_shut_as_long_as_it_says_and_never_for_ever(
            steps in prop::collection::vec(step(), 1..400), probes in 1u32..5, failures in 1u32..7,
        ) {
            let config = BreakerConfig { failures, probes, ..BreakerConfig::default() };
            let (mut breaker, mut now) = (Breaker::new(config), Instant::now());
            let mut under_way: Vec<Ticket> = Vec::new();
            let mut open_until = now;
            for step in steps {
                match step {
                    Step::Wait(millis) => now += Duration::from_millis(millis),
                    Step::Admit => {
                        let room = breaker.room(now);
                        let admitted = breaker.admit(now);
                        prop_assert_eq!(admitted.is_ok(), room > 0);
                        if let Ok(ticket) = admitted {
                            prop_assert!(now >= open_until);
                            under_way.push(ticket);
                        }
                        let of_now = under_way.iter().filter(|ticket| ticket.0 == breaker.generation).count();
                        let is_half_open = matches!(breaker.state, State::HalfOpen(_));
                        prop_assert!(!is_half_open || of_now <= probes as usize);
                    }
                    Step::End(which, verdict) if !under_way.is_empty() => {
                        let ticket = under_way.swap_remove(which.index(under_way.len()));
                        match breaker.ended(ticket, verdict, now) {
                            Some(Change::Opened { until, .. }) => {
                                prop_assert_eq!(verdict, Verdict::Outage);
                                prop_assert_eq!(until, now + config.open);
                                open_until = until;
                            }
                            Some(Change::Closed) => prop_assert_eq!(verdict, Verdict::Good),
                            None => {}
                        }
                    }
                    Step::End(..) => {}
                }
            }
            // Whatever was: when all calls have come to nothing, one may leave after at most one opening.
            for ticket in under_way {
                breaker.ended(ticket, Verdict::Neither, now);
            }
            now += config.open;
            prop_assert!(breaker.admit(now).is_ok());
        }

        #[test]
        fn nothing_but_outages_opens_it(verdicts in prop::collection::vec(verdict(), 0..300), step_ms in 0u64..5_000) {
            let (mut breaker, mut now) = breaker();
            for verdict in verdicts.into_iter().filter(|verdict| *verdict != Verdict::Outage) {
                prop_assert_eq!(call(&mut breaker, verdict, now), None);
                now += Duration::from_millis(step_ms);
            }
        }

        #[test]
        fn it_opens_at_the_first_row_of_outages_or_share_of_a_window_and_not_before(
            verdicts in prop::collection::vec(verdict(), 1..200),
        ) {
            // All within one piece of the window: then the law can be said in one line each.
            let (mut breaker, now) = breaker();
            let config = BreakerConfig::default();
            let counted: Vec<bool> =
                verdicts.iter().filter(|v| **v != Verdict::Neither).map(|v| *v == Verdict::Outage).collect();
            let is_due = |end: usize| {
                let seen = &counted[..=end];
                let row = seen.iter().rev().take_while(|outage| **outage).count();
                let outages = seen.iter().filter(|outage| **outage).count();
                counted[end] && (row >= 5 && row * 2 >= seen.len() || seen.len() >= 20 && outages * 2 >= seen.len())
            };
            let due = (0..counted.len()).find(|end| is_due(*end));
            let mut opened = None;
            for (index, outage) in counted.iter().enumerate() {
                let verdict = if *outage { Verdict::Outage } else { Verdict::Good };
                if call(&mut breaker, verdict, now).is_some() {
                    opened = Some(index);
                    break;
                }
            }
            prop_assert_eq!(opened, due, "{:?}", config);
        }
    }

    #[test]
    fn a_wrong_key_is_named() {
        let wrong = BreakerConfig { share: 1.5, ..BreakerConfig::default() };
        assert_eq!(wrong.problem(), Some(("share", "1.5".to_owned(), "from 0.01 to 1")));
        assert_eq!(BreakerConfig::default().problem(), None);
        let never = BreakerConfig { probes: 0, ..BreakerConfig::default() };
        assert_eq!(never.problem().map(|(key, ..)| key), Some("probes"));
        let for_ever = BreakerConfig { open_max: 90_000 * SECOND, ..BreakerConfig::default() };
        assert_eq!(for_ever.problem(), Some(("open_max", "1day 1h".to_owned(), "from 1s to 1day")));
    }
}
