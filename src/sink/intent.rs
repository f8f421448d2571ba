//! The sink's intent: the blocks that it is about to insert, committed as offset metadata before the insert. Pure.
//!
//! Whoever takes a partition over finds there the blocks that may or may not be in ClickHouse, and cuts exactly the
//! same ones again: the same ranges, the same tokens, and how many rows each must have come to.
//!
//! `B1:100-205/98+5!3!7-10;205-300/95` is two blocks. The first has the records of offsets 100 to 204: 98 rows, and 5
//! records that make none, at 103 and 107 to 110. Ranges are offsets, not counts: transaction markers leave gaps.
//! `B1:` alone says that nothing is under way, `B1:<900;…` that rows below offset 900 may be in the table (see
//! [`super::guard`]). A commit without any of this is not the sink's.

use std::fmt::Write as _;

use super::guard::Guard;
use crate::kafka::ledger::METADATA_LIMIT;

/// Kind and version. Another kind, or a newer version, must not be ignored: its blocks would be stored twice.
const KIND: &str = "B1:";

/// Runs of records without a row in one block, at most.
pub const RUNS_MAX: usize = 64;

/// Blocks that are announced ahead: one under way, and the next. A block that is split becomes several, without runs.
pub const AHEAD: usize = 2;

/// Why a commit's metadata cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IntentError {
    /// Written by something else, or by a newer weir.
    #[error("the commit metadata begins with {found:?}, this version of weir reads {KIND:?}; run the newer version")]
    Kind {
        /// How it begins.
        found: String,
    },
    /// Cut or changed.
    #[error(
        "the commit metadata is damaged at {found:?}: the blocks in flight are unknown. Compare the last offset in \
         ClickHouse with the group's, and set the group's offset by hand"
    )]
    Damaged {
        /// The part that cannot be read.
        found: String,
    },
}

/// A block that is about to be inserted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Intent {
    /// The offset of its first record.
    pub first: i64,
    /// The offset after its last record.
    pub next: i64,
    /// The rows that it makes.
    pub rows: usize,
    /// The records that make none: they cannot be read, and have their dead letter.
    pub rowless: usize,
    /// Where those are: offsets, first and last of each run, with no record that makes a row in between.
    pub runs: Vec<(i64, i64)>,
}

impl Intent {
    /// All of its records.
    #[must_use]
    pub fn records(&self) -> usize {
        self.rows + self.rowless
    }

    /// Whether the record at this offset makes no row.
    #[must_use]
    pub fn is_rowless(&self, offset: i64) -> bool {
        let index = self.runs.partition_point(|(_, last)| *last < offset);
        self.runs.get(index).is_some_and(|(first, _)| *first <= offset)
    }

    /// Notes the next record, by offset; false if there is no room for another run.
    pub fn add(&mut self, offset: i64, has_row: bool) -> bool {
        if self.records() == 0 {
            self.first = offset;
        }
        if has_row {
            self.rows += 1;
        } else {
            let runs = self.runs.len();
            match self.runs.last_mut() {
                // The record before had no row either.
                Some((_, last)) if *last + 1 == self.next => *last = offset,
                _ if runs >= RUNS_MAX => return false,
                _ => self.runs.push((offset, offset)),
            }
            self.rowless += 1;
        }
        self.next = offset + 1;
        true
    }

    /// The deduplication token: the same for the same range of the same partition.
    #[must_use]
    pub fn token(&self, partition: &crate::kafka::Partition, number: u32) -> String {
        let range = format!("{}:{}:{}-{}", partition.topic, partition.number, self.first, self.next - 1);
        if number == 1 { range } else { format!("{range}#{number}") }
    }
}

/// The text of the blocks, by offset, and how many of them a commit has room for: at least two of the largest, and
/// forty without runs. As long as it is not known what the table holds, and there is no block, it is empty.
#[must_use]
pub fn encode<'a>(guard: Guard, intents: impl IntoIterator<Item = &'a Intent>) -> (String, usize) {
    let (mut text, mut count) = (String::new(), 0);
    match guard {
        Guard::Off => text.push_str(KIND),
        Guard::Unknown => {}
        // Writing to a text does not fail.
        Guard::Until(until) => drop(write!(text, "{KIND}<{until}")),
    }
    for intent in intents {
        let before = text.len();
        text.push_str(match text.len() {
            0 => KIND,
            length if length == KIND.len() => "",
            _ => ";",
        });
        let _ = write!(text, "{}-{}/{}", intent.first, intent.next, intent.rows);
        if intent.rowless > 0 {
            let _ = write!(text, "+{}", intent.rowless);
        }
        for (first, last) in &intent.runs {
            let _ = write!(text, "!{}", first - intent.first);
            if last != first {
                let _ = write!(text, "-{}", last - intent.first);
            }
        }
        if text.len() > METADATA_LIMIT {
            text.truncate(before);
            break;
        }
        count += 1;
    }
    (text, count)
}

/// The blocks of a commit, and whether there may be rows of what follows it.
///
/// # Errors
/// [`IntentError`] if it cannot be understood to the last character.
pub fn decode(offset: i64, metadata: &str) -> Result<(Guard, Vec<Intent>), IntentError> {
    if metadata.is_empty() {
        return Ok((Guard::Unknown, Vec::new()));
    }
    let Some(text) = metadata.strip_prefix(KIND) else {
        return Err(IntentError::Kind { found: metadata.chars().take(KIND.len()).collect() });
    };
    if text.is_empty() {
        return Ok((Guard::Off, Vec::new()));
    }
    let damaged = |part: &str| IntentError::Damaged { found: part.chars().take(100).collect() };
    let (mut guard, mut intents, mut from) = (Guard::Off, Vec::new(), offset);
    for (index, part) in text.split(';').enumerate() {
        if let (0, Some(until)) = (index, part.strip_prefix('<')) {
            guard = Guard::Until(until.parse().map_err(|_| damaged(part))?);
            continue;
        }
        let intent = read(part).filter(|intent| intent.first >= from && is_sound(intent));
        let intent = intent.ok_or_else(|| damaged(part))?;
        from = intent.next;
        intents.push(intent);
    }
    Ok((guard, intents))
}

fn read(text: &str) -> Option<Intent> {
    let mut parts = text.split('!');
    let (range, counts) = parts.next()?.split_once('/')?;
    let (first, next) = range.split_once('-')?;
    let (rows, rowless) = counts.split_once('+').unwrap_or((counts, "0"));
    let (first, next) = (first.parse().ok()?, next.parse().ok()?);
    let run = |text: &str| {
        let (from, to) = text.split_once('-').unwrap_or((text, text));
        Some((from.parse::<i64>().ok()?.checked_add(first)?, to.parse::<i64>().ok()?.checked_add(first)?))
    };
    let runs = parts.map(run).collect::<Option<Vec<_>>>()?;
    Some(Intent { first, next, rows: rows.parse().ok()?, rowless: rowless.parse().ok()?, runs })
}

fn is_sound(intent: &Intent) -> bool {
    let Intent { first, next, runs, .. } = intent;
    let ordered = runs.windows(2).all(|pair| pair[0].1 < pair[1].0) && runs.iter().all(|(from, to)| from <= to);
    let within = runs.iter().all(|(from, to)| from >= first && to < next);
    let room = next.checked_sub(*first).and_then(|room| usize::try_from(room).ok()).unwrap_or(0);
    let holds = intent.records() >= 1 && intent.records() <= room;
    *first >= 0 && ordered && within && holds && runs.is_empty() == (intent.rowless == 0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A block whose records follow each other at these distances, with or without a row.
    fn block(first: i64, records: &[(i64, bool)]) -> Intent {
        let (mut intent, mut offset) = (Intent::default(), first);
        for (distance, has_row) in records {
            if !intent.add(offset, *has_row) {
                break;
            }
            offset += distance;
        }
        intent
    }

    #[test]
    fn the_text_is_short_and_says_all() {
        let first = block(100, &[(3, true), (4, false), (1, false), (2, false), (5, true)]);
        let second = Intent { first: 205, next: 300, rows: 95, ..Intent::default() };
        let (text, count) = encode(Guard::Off, [&first, &second]);
        assert_eq!((text.as_str(), count), ("B1:100-111/2+3!3-8;205-300/95", 2));
        assert_eq!(decode(100, &text).unwrap(), (Guard::Off, vec![first.clone(), second.clone()]));
        for (guard, nothing) in [(Guard::Off, "B1:"), (Guard::Unknown, ""), (Guard::Until(900), "B1:<900")] {
            assert_eq!(encode(guard, []), (nothing.to_owned(), 0));
            assert_eq!(decode(7, nothing).unwrap(), (guard, vec![]));
        }
        let (text, _) = encode(Guard::Until(900), [&first, &second]);
        assert_eq!(text, "B1:<900;100-111/2+3!3-8;205-300/95");
        assert_eq!(decode(100, &text).unwrap(), (Guard::Until(900), vec![first, second]));
    }

    #[test]
    fn what_is_not_understood_to_the_last_character_is_refused() {
        for text in ["L1:AAAA", "B2:1-2/1", "hello", "B"] {
            assert!(matches!(decode(0, text), Err(IntentError::Kind { .. })), "{text}");
        }
        let damaged = [
            "B1:<",
            "B1:<9;",
            "B1:1-2/1;<9",
            "B1:1-2",
            "B1:1-2/1;",
            "B1:2-1/1",
            "B1:1-2/2",
            "B1:1-5/1+1",
            "B1:1-5/1!1",
            "B1:1-5/1+1!9",
            "B1:0-2/1",
            "B1:1-2/1;1-3/1",
            "B1:1-9/1+2!3!2",
            "B1:1-9/1+2!3-2",
            "B1:1-2/1 ",
            "B1:1-99999999999999999999/1",
            "B1:1-2/0",
        ];
        for text in damaged {
            assert!(matches!(decode(1, text), Err(IntentError::Damaged { .. })), "{text}");
        }
    }

    #[test]
    fn tokens_name_the_range_and_the_try() {
        let intent = Intent { first: 7, next: 10, rows: 2, ..Intent::default() };
        let partition = crate::kafka::Partition { topic: "weir.results".into(), number: 3 };
        assert_eq!(intent.token(&partition, 1), "weir.results:3:7-9");
        assert_eq!(intent.token(&partition, 2), "weir.results:3:7-9#2");
    }

    #[test]
    fn two_of_the_worst_blocks_far_out_fit_into_one_commit() {
        let worst: Vec<_> = (0..1_000_000).map(|number| (7, number % 2 == 0)).collect();
        let (first, second) = (block(i64::MAX / 4, &worst), block(i64::MAX / 2, &worst));
        assert_eq!((first.runs.len(), first.rowless), (RUNS_MAX, RUNS_MAX));
        let (text, count) = encode(Guard::Off, [&first, &second]);
        assert_eq!(count, AHEAD, "{} bytes", text.len());
        // A block of a million rows that is split down to one row leaves twenty others behind it.
        let halves: Vec<_> = (0..20)
            .map(|at| Intent {
                first: i64::MAX / 2 + at,
                next: i64::MAX / 2 + at + 1,
                rows: 9_999_999,
                ..Intent::default()
            })
            .collect();
        let (text, count) = encode(Guard::Off, halves.iter().chain([&second]));
        assert_eq!(count, 21, "{} bytes", text.len());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(
            records in prop::collection::vec((1i64..5, prop::bool::weighted(0.8)), 1..300),
            first in 0i64..1_000_000_000_000,
        ) {
            let intent = block(first, &records);
            let (text, count) = encode(Guard::Off, [&intent]);
            prop_assert!(count == 1 && text.len() <= METADATA_LIMIT);
            prop_assert_eq!(decode(first, &text).unwrap(), (Guard::Off, vec![intent.clone()]));
            let mut offset = first;
            for (distance, has_row) in &records {
                if offset < intent.next {
                    prop_assert_eq!(intent.is_rowless(offset), !has_row, "{} in {}", offset, text);
                }
                offset += distance;
            }
        }

        #[test]
        fn no_text_makes_it_panic(text in "B1:<?[0-9;/+!-]{0,40}") {
            let _ = decode(0, &text);
        }
    }
}
