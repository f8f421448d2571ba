//! Whether a block is in its table: what an answer means, and what to ask next. Pure.
//!
//! ClickHouse recognises an insert that is repeated under the same token, but the token alone is not enough. When it
//! is killed between the token's log and the part, the rows are gone and the repetition is "recognised" (measured: 6
//! absent rows in 100 kills). So after every insert whose end is unknown the rows of the block's range are counted:
//!
//! - all are there: done;
//! - none: the block is offered again under the same token. Only when that is acknowledged, and still no row is there,
//!   under the next one (`#2`). By then the log holds the first token, so that an insert that was given up and is
//!   executed late (it waited in a proxy, in a socket, in a stopped process) is recognised, and drops its rows;
//! - some, or too many: somebody else has been at this range. That needs a person.

/// The tokens that a block is tried under before it is given to a person.
pub const TOKENS_MAX: u32 = 4;

/// What is known of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Doubt {
    /// Which token is on: 1, 2, …
    token: u32,
    /// Whether an insert of it may have been executed without our knowing.
    is_uncertain: bool,
    /// Whether ClickHouse has acknowledged the token that is on.
    is_acknowledged: bool,
    /// Whether an insert may still be executed: it was sent, and never answered.
    is_at_large: bool,
    counts: bool,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Insert under the token of this number.
    Insert(u32),
    /// Count the rows of the range.
    Count,
}

/// What a count says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Every row is there.
    Stored,
    /// None is there: go on with the next step.
    Absent,
    /// Another number than all or none.
    Odd,
    /// Acknowledged under several tokens, and never there: something deletes what is inserted.
    Vanished,
}

impl Doubt {
    /// A block of our own that nobody has tried to insert.
    #[must_use]
    pub const fn none() -> Self {
        Self { token: 1, is_uncertain: false, is_acknowledged: false, is_at_large: false, counts: false }
    }

    /// A block that is known from an intent only.
    #[must_use]
    pub const fn recovered() -> Self {
        Self { token: 1, is_uncertain: true, is_acknowledged: false, is_at_large: true, counts: true }
    }

    /// The next step.
    #[must_use]
    pub const fn step(&self) -> Step {
        if self.counts { Step::Count } else { Step::Insert(self.token) }
    }

    /// The insert was acknowledged. True if that is the end of it.
    #[must_use]
    pub const fn acknowledged(&mut self) -> bool {
        self.is_acknowledged = true;
        self.counts = true;
        !self.is_uncertain
    }

    /// The insert failed; `answered`: by ClickHouse itself, so it is over, whatever it has left.
    pub const fn failed(&mut self, answered: bool) {
        self.is_uncertain = true;
        self.is_at_large |= !answered;
        self.counts = true;
    }

    /// So many rows are there of `expected`.
    #[must_use]
    pub const fn counted(&mut self, found: u64, expected: u64) -> Verdict {
        if found == expected {
            return Verdict::Stored;
        }
        if found > 0 {
            return Verdict::Odd;
        }
        if self.is_acknowledged {
            if self.token >= TOKENS_MAX {
                return Verdict::Vanished;
            }
            self.token += 1;
            self.is_acknowledged = false;
        }
        self.counts = false;
        Verdict::Absent
    }

    /// Whether nothing was ever sent: then the intent can be taken back.
    #[must_use]
    pub const fn is_untouched(&self) -> bool {
        !self.is_uncertain && !self.is_acknowledged
    }

    /// Whether the block can become two, if no row of it is there: no insert of the whole one can come late.
    #[must_use]
    pub const fn may_split(&self) -> bool {
        !self.is_at_large
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_answer_has_one_meaning() {
        let mut fresh = Doubt::none();
        assert_eq!(fresh.step(), Step::Insert(1));
        assert!(fresh.acknowledged(), "a first insert that is acknowledged needs no count");

        // Answers in order → the steps that were taken, and the end.
        #[derive(Clone, Copy, Debug)]
        enum Answer {
            Yes,
            No,
            Count(u64),
        }
        use Answer::{Count, No, Yes};
        let table: &[(Doubt, &[Answer], &str)] = &[
            (Doubt::none(), &[No, Count(10)], "1 c Stored"),
            (Doubt::none(), &[No, Count(0), Yes, Count(10)], "1 c 1 c Stored"),
            (Doubt::none(), &[No, Count(0), Yes, Count(0), Yes, Count(10)], "1 c 1 c 2 c Stored"),
            (Doubt::none(), &[No, Count(0), No, Count(0), No, Count(10)], "1 c 1 c 1 c Stored"),
            (Doubt::none(), &[No, Count(7)], "1 c Odd"),
            (Doubt::none(), &[No, Count(20)], "1 c Odd"),
            (Doubt::recovered(), &[Count(10)], "c Stored"),
            (Doubt::recovered(), &[Count(0), Yes, Count(0), No, Count(0), Yes, Count(10)], "c 1 c 2 c 2 c Stored"),
            (
                Doubt::recovered(),
                &[Count(0), Yes, Count(0), Yes, Count(0), Yes, Count(0), Yes, Count(0)],
                "c 1 c 2 c 3 c 4 c Vanished",
            ),
        ];
        for (doubt, answers, expected) in table {
            let (mut doubt, mut steps, mut end) = (doubt.clone(), Vec::new(), String::new());
            for answer in *answers {
                match (doubt.step(), *answer) {
                    (Step::Insert(token), Yes) => {
                        steps.push(token.to_string());
                        assert!(!doubt.acknowledged());
                    }
                    (Step::Insert(token), No) => {
                        steps.push(token.to_string());
                        doubt.failed(false);
                    }
                    (Step::Count, Count(found)) => {
                        steps.push("c".to_owned());
                        end = format!("{:?}", doubt.counted(found, 10));
                    }
                    (step, answer) => panic!("{answer:?} does not answer {step:?}"),
                }
            }
            assert_eq!(format!("{} {end}", steps.join(" ")), *expected);
        }
    }

    #[test]
    fn only_a_block_whose_inserts_were_all_answered_may_be_split() {
        let mut doubt = Doubt::none();
        doubt.failed(true);
        assert!(doubt.may_split());
        doubt.failed(false);
        doubt.failed(true);
        assert!(!doubt.may_split() && !Doubt::recovered().may_split());
    }

    /// A table as ClickHouse keeps one: parts, and a log of tokens, which a kill can tear apart.
    #[derive(Default)]
    struct Table {
        rows: u64,
        log: HashSet<u32>,
    }

    impl Table {
        /// True if it is acknowledged.
        fn execute(&mut self, token: u32, rows: u64, fate: Fate) -> bool {
            let is_new = self.log.insert(token);
            if is_new && fate != Fate::TornAndLost {
                self.rows += rows;
            }
            matches!(fate, Fate::Done)
        }
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Fate {
        Done,
        /// Executed, but the answer was lost.
        DoneUnheard,
        /// Killed between the log and the part.
        TornAndLost,
        /// Not executed, and never will be.
        Refused,
        /// Not executed yet, and given up.
        Late,
    }

    fn fate() -> impl Strategy<Value = Fate> {
        prop_oneof![
            4 => Just(Fate::Done), 2 => Just(Fate::DoneUnheard), 1 => Just(Fate::TornAndLost),
            1 => Just(Fate::Refused), 2 => Just(Fate::Late),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4_000))]
        /// Whatever happens to inserts, to the process and to late arrivals: in the end each row is there once.
        #[test]
        fn a_block_ends_exactly_once_in_the_table(
            fates in prop::collection::vec((fate(), 0u8..10, 0u8..10), 1..40),
        ) {
            let (mut table, mut late) = (Table::default(), Vec::new());
            let mut doubt = Doubt::none();
            let mut torn = HashMap::<u32, u32>::new();
            let mut fates = fates.into_iter();
            let is_stored = loop {
                let (mut fate, crash, arrival) = fates.next().unwrap_or((Fate::Done, 9, 9));
                if arrival < 3 && !late.is_empty() {
                    let token = late.remove(usize::from(arrival) % late.len());
                    table.execute(token, 10, Fate::DoneUnheard);
                }
                if crash == 0 {
                    doubt = Doubt::recovered();
                }
                match doubt.step() {
                    Step::Count => match doubt.counted(table.rows, 10) {
                        Verdict::Stored => break true,
                        Verdict::Absent => {}
                        verdict => break verdict == Verdict::Vanished && torn.len() == TOKENS_MAX as usize,
                    },
                    Step::Insert(token) => {
                        // ClickHouse tears the same token apart once: from then on the log has it.
                        if fate == Fate::TornAndLost {
                            *torn.entry(token).or_default() += 1;
                        }
                        let acknowledged = match fate {
                            Fate::Refused => false,
                            Fate::Late => {
                                late.push(token);
                                false
                            }
                            Fate::Done | Fate::DoneUnheard | Fate::TornAndLost => {
                                if table.log.contains(&token) && fate == Fate::TornAndLost {
                                    fate = Fate::DoneUnheard;
                                }
                                table.execute(token, 10, fate)
                            }
                        };
                        if acknowledged {
                            if doubt.acknowledged() {
                                break true;
                            }
                        } else {
                            doubt.failed(fate == Fate::Refused);
                        }
                    }
                }
            };
            prop_assert!(is_stored);
            // What was given up arrives at last.
            for token in late {
                table.execute(token, 10, Fate::DoneUnheard);
            }
            prop_assert!(table.rows == 10 || torn.len() == TOKENS_MAX as usize, "{} rows", table.rows);
        }
    }
}
