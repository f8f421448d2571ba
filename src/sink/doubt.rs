//! Decides whether a block is stored after an insert whose outcome is unknown, and the next step. Pure.
//!
//! ClickHouse recognises an insert that is repeated under the same token, but the token alone is not enough. When it
//! is killed between the token's log and the part, the rows are gone and the repetition is "recognised" (measured: 6
//! absent rows in 100 kills). So after every insert whose end is unknown the rows of the block's range are counted:
//!
//! - all are there: done;
//! - none: the block is offered again under the same token. Only when that is acknowledged, and still no row is there,
//!   under the next one (`#2`). By then the log holds the first token, so that an insert that was given up and is
//!   executed late (it waited in a proxy, in a socket, in a stopped process) is recognised, and drops its rows;
//! - some, of a block that lies in several parts of the table (its records are of several months): ClickHouse stores one
//!   part after the other, and was killed in between, or is still at it. The block is offered again under the same
//!   token, which is recognised in each part by itself: that stores the others;
//! - some of one part, or too many: somebody else has been at this range. That needs a person.

/// The tokens that a block is tried under before it is given to a person.
pub const TOKENS_MAX: u32 = 4;

/// The state of a block whose insert may have an unknown outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Doubt {
    /// The number of the current token, from 1.
    token: u32,
    /// Whether an insert of unknown outcome may have stored it.
    is_uncertain: bool,
    /// Whether ClickHouse has acknowledged the current token.
    is_acknowledged: bool,
    /// Whether an insert may still be executed: it was sent, and never answered.
    is_at_large: bool,
    next: Next,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Insert,
    Count,
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
    /// Some of its parts are there: go on with the next step, and with the same rows.
    Partly,
    /// A count that no insert of weir's leaves: another writer has changed this range.
    Odd,
    /// Acknowledged under several tokens, and never there: something deletes what is inserted.
    Vanished,
}

impl Doubt {
    /// A new block, never sent.
    #[must_use]
    pub const fn none() -> Self {
        Self { token: 1, is_uncertain: false, is_acknowledged: false, is_at_large: false, next: Next::Insert }
    }

    /// A block known only from a predecessor's intent: it may have been sent.
    #[must_use]
    pub const fn recovered() -> Self {
        Self { token: 1, is_uncertain: true, is_acknowledged: false, is_at_large: true, next: Next::Count }
    }

    /// The next step.
    #[must_use]
    pub const fn step(&self) -> Step {
        match self.next {
            Next::Insert => Step::Insert(self.token),
            Next::Count => Step::Count,
        }
    }

    /// The insert was acknowledged. True if that is the end of it.
    #[must_use]
    pub const fn acknowledged(&mut self) -> bool {
        self.is_acknowledged = true;
        self.next = Next::Count;
        !self.is_uncertain
    }

    /// The insert failed; `answered`: by ClickHouse itself, so it is over, whatever it has left.
    pub const fn failed(&mut self, answered: bool) {
        self.is_uncertain = true;
        self.is_at_large |= !answered;
        self.next = Next::Count;
    }

    /// Evaluates a count of the block's rows against `expected`; `in_parts`: they are stored in more than one part.
    #[must_use]
    pub const fn counted(&mut self, found: u64, expected: u64, in_parts: bool) -> Verdict {
        if found == expected {
            return Verdict::Stored;
        }
        if found > 0 {
            // After an acknowledgement the log has every part: what is not there then is not stored under this token.
            if !in_parts || found > expected || self.is_acknowledged {
                return Verdict::Odd;
            }
            self.next = Next::Insert;
            return Verdict::Partly;
        }
        if self.is_acknowledged {
            if self.token >= TOKENS_MAX {
                return Verdict::Vanished;
            }
            self.token += 1;
            self.is_acknowledged = false;
        }
        self.next = Next::Insert;
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

    #[derive(Clone, Copy, Debug)]
    enum Answer {
        Yes,
        No,
        Count(u64),
        CountInParts(u64),
    }

    #[test]
    fn each_answer_has_one_meaning() {
        use Answer::{Count, CountInParts, No, Yes};
        let mut fresh = Doubt::none();
        assert_eq!(fresh.step(), Step::Insert(1));
        assert!(fresh.acknowledged(), "a first insert that is acknowledged needs no count");

        // Answers in order → the steps that were taken, and the end. `p`: a count of a block in several parts.
        let table: &[(Doubt, &[Answer], &str)] = &[
            (Doubt::none(), &[No, CountInParts(7), Yes, CountInParts(10)], "1 p 1 p Stored"),
            (Doubt::recovered(), &[CountInParts(7), No, CountInParts(9), Yes, CountInParts(10)], "p 1 p 1 p Stored"),
            (Doubt::none(), &[No, CountInParts(7), Yes, CountInParts(7)], "1 p 1 p Odd"),
            (Doubt::none(), &[No, CountInParts(11)], "1 p Odd"),
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
                        end = format!("{:?}", doubt.counted(found, 10, false));
                    }
                    (Step::Count, CountInParts(found)) => {
                        steps.push("p".to_owned());
                        end = format!("{:?}", doubt.counted(found, 10, true));
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

    /// A table as ClickHouse keeps one: parts, and for each a log of tokens, which a kill can tear apart. The block has
    /// five rows in each of two parts.
    #[derive(Default)]
    struct Table {
        rows: [u64; 2],
        log: [HashSet<u32>; 2],
    }

    impl Table {
        /// True if it is acknowledged.
        fn execute(&mut self, token: u32, fate: Fate) -> bool {
            let parts = if fate == Fate::OnePart { 1 } else { 2 };
            for (rows, log) in self.rows.iter_mut().zip(&mut self.log).take(parts) {
                if log.insert(token) && fate != Fate::TornAndLost {
                    *rows += 5;
                }
            }
            matches!(fate, Fate::Done)
        }

        fn rows(&self) -> u64 {
            self.rows.iter().sum()
        }
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Fate {
        Done,
        /// Executed, but the answer was lost.
        DoneUnheard,
        /// Killed between the log and the part.
        TornAndLost,
        /// Killed after the first part.
        OnePart,
        /// Not executed, and never will be.
        Refused,
        /// Not executed yet, and given up.
        Late,
    }

    fn fate() -> impl Strategy<Value = Fate> {
        prop_oneof![
            4 => Just(Fate::Done), 2 => Just(Fate::DoneUnheard), 1 => Just(Fate::TornAndLost),
            1 => Just(Fate::Refused), 2 => Just(Fate::Late), 2 => Just(Fate::OnePart),
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
                    table.execute(token, Fate::DoneUnheard);
                }
                if crash == 0 {
                    doubt = Doubt::recovered();
                }
                match doubt.step() {
                    Step::Count => match doubt.counted(table.rows(), 10, true) {
                        Verdict::Stored => break true,
                        Verdict::Absent | Verdict::Partly => {}
                        // A token was lost with its rows, and the next one has come to one part only, or its process
                        // was killed before it came to the other.
                        Verdict::Odd => break !torn.is_empty() && table.rows() < 10,
                        Verdict::Vanished => break torn.len() == TOKENS_MAX as usize,
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
                            Fate::Done | Fate::DoneUnheard | Fate::TornAndLost | Fate::OnePart => {
                                if table.log[0].contains(&token) && fate == Fate::TornAndLost {
                                    fate = Fate::DoneUnheard;
                                }
                                table.execute(token, fate)
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
                table.execute(token, Fate::DoneUnheard);
            }
            prop_assert!(table.rows() <= 10, "{} rows", table.rows());
            prop_assert!(table.rows() == 10 || !torn.is_empty(), "{} rows", table.rows());
        }
    }
}
