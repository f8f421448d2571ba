//! A block ready for its insert: its rows, its intent, and the dead letters of unreadable records.

use std::sync::Arc;

use super::{
    block::{self, Block},
    guard::{Guard, Known},
    intent::Intent,
};
use crate::{
    kafka::{Outgoing, Partition, Record},
    message::{
        SourceName,
        codec::{self, Encoded, Raw},
        envelope::{Envelope, Kind},
    },
    runtime::clock::Timestamp,
    store::{
        Route,
        columns::Columns,
        row::{self, Parsed},
    },
};

/// The name of this stage in `ce_source`.
pub(super) const WRITER: &str = "weir/sink";

/// So many records are parsed before other tasks of the thread get their turn.
const TURN: usize = 32;

/// The bytes of dead letters that one block may come to: they go in one transaction.
const LETTERS_MAX: usize = 4 * 1024 * 1024;

/// Where a row comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The offset of its record.
    pub offset: i64,
    /// Its record's time as the table has it, in milliseconds since 1970.
    pub recorded_at: i64,
}

impl Row {
    fn of(record: &Record) -> Self {
        Self { offset: record.offset, recorded_at: row::storable(record.time) }
    }
}

/// A block that is ready for its intent and its insert.
#[derive(Debug)]
pub struct Sealed {
    /// Where it comes from.
    pub partition: Partition,
    /// What is on the topic.
    pub kind: Kind,
    /// Its range, and what it comes to.
    pub intent: Intent,
    /// The records that become rows, by offset. Empty if none does, or if Kafka no longer has all of them.
    pub rows: Vec<Row>,
    /// What is inserted of them: all that this version can read.
    pub columns: Columns,
    /// What they weigh in memory, about.
    pub bytes: usize,
    /// Why it can only be counted, not inserted.
    pub trouble: Option<Unusable>,
}

/// Why a block that was announced cannot be made again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unusable {
    /// Its records are not all on Kafka.
    Lost,
    /// This version reads its records differently from the one that announced it.
    ReadsDifferently,
}

/// A sealed block, with what belongs to it for a moment only.
#[derive(Debug)]
pub struct Reading {
    /// The block.
    pub sealed: Sealed,
    /// Dead letters to be written together with its intent.
    pub letters: Vec<Outgoing>,
    /// Records that are too much for one block after all.
    pub rest: Option<Block>,
    /// What has been found out about the rows that follow.
    pub guard: Option<Guard>,
}

/// Where dead letters go, and when they were written.
#[derive(Clone, Debug)]
pub struct Grave {
    /// The topic of dead letters.
    pub topic: Arc<str>,
    /// When.
    pub now: Timestamp,
}

/// Reads a new block. What is `known` makes no row and no dead letter again.
pub async fn read(mut block: Block, route: &Route, grave: &Grave, known: &Known) -> Reading {
    let (mut intent, mut letters, mut letter_bytes) = (Intent::default(), Vec::new(), 0);
    let (count, mut index) = (block.records.len(), 0);
    let (mut rows, mut columns) = (Vec::with_capacity(count), Columns::expecting(count));
    while let Some(record) = block.records.get(index) {
        let raw = record.raw(&block.partition);
        let parsed = row::parse(&raw, route);
        let has_row = parsed.has_row() && !known.rows.contains(&record.offset);
        if letter_bytes > LETTERS_MAX || !intent.add(record.offset, has_row) {
            break;
        }
        if has_row {
            rows.push(Row::of(record));
            row::put(&mut columns, &raw, &parsed);
        }
        if let (Parsed::Poison(why), true) = (&parsed, record.offset >= known.until) {
            tracing::warn!(record = %raw.position_id(), %why, "unreadable record; writing a dead letter");
            let letter = letter(&raw, record, why, grave);
            letter_bytes += letter.size();
            letters.push(letter);
        }
        free(&mut block, index);
        index += 1;
        if index.is_multiple_of(TURN) {
            tokio::task::yield_now().await;
        }
    }
    let rest = (index < block.records.len()).then(|| block.split_off(index));
    let sealed = Sealed::new(block.partition, route.kind, intent, (rows, columns), None);
    Reading { sealed, letters, rest, guard: None }
}

/// Reads a block again as its intent announced it.
pub async fn read_again(mut block: Block, intent: Intent, route: &Route) -> Reading {
    let count = block.records.len();
    let (mut rows, mut columns) = (Vec::with_capacity(count), Columns::expecting(count));
    let (mut is_same, mut rowless) = (true, 0);
    for index in 0..count {
        let Some(record) = block.records.get(index) else { break };
        // What had no row then has its dead letter: it gets no row now, even if this version could read it.
        if intent.is_rowless(record.offset) {
            rowless += 1;
            continue;
        }
        let raw = record.raw(&block.partition);
        let parsed = row::parse(&raw, route);
        is_same &= parsed.has_row();
        // Also one that cannot be read now: its row is counted.
        rows.push(Row::of(record));
        row::put(&mut columns, &raw, &parsed);
        free(&mut block, index);
        if index % TURN == TURN - 1 {
            tokio::task::yield_now().await;
        }
    }
    let trouble = (!is_same || rowless != intent.rowless).then_some(Unusable::ReadsDifferently);
    let sealed = Sealed::new(block.partition, route.kind, intent, (rows, columns), trouble);
    Reading { sealed, letters: Vec::new(), rest: None, guard: None }
}

/// Lets go of the bytes of a record that stand in the columns now: a block is in memory once.
fn free(block: &mut Block, index: usize) {
    if let Some(record) = block.records.get_mut(index) {
        (record.value, record.headers) = (None, Vec::new());
    }
}

/// A block whose records are gone.
#[must_use]
pub fn lost(partition: Partition, intent: Intent, kind: Kind) -> Sealed {
    Sealed::new(partition, kind, intent, (Vec::new(), Columns::default()), Some(Unusable::Lost))
}

impl Sealed {
    fn new(
        partition: Partition,
        kind: Kind,
        intent: Intent,
        (rows, columns): (Vec<Row>, Columns),
        trouble: Option<Unusable>,
    ) -> Self {
        let bytes = columns.bytes() + rows.len() * size_of::<Row>();
        Self { partition, kind, intent, rows, columns, bytes, trouble }
    }

    /// Whether ClickHouse stores it in more than one part, one after the other: the tables are split by months.
    #[must_use]
    pub fn is_in_parts(&self) -> bool {
        let mut months = self.rows.iter().map(|row| block::month(Timestamp::from_millis(row.recorded_at)));
        months.next().is_some_and(|first| months.any(|month| month != first))
    }

    /// Two halves, to be announced and inserted one after the other.
    ///
    /// # Errors
    /// The whole again, if it has too few rows for that, or records between them whose place is not known exactly.
    pub fn split(mut self) -> Result<(Self, Self), Box<Self>> {
        let half = self.rows.len() / 2;
        if half == 0 || self.intent.rowless > 0 || self.trouble.is_some() {
            return Err(Box::new(self));
        }
        let right = (self.rows.split_off(half), self.columns.split_off(half));
        let part = |(rows, columns): (Vec<Row>, Columns)| {
            let mut intent = Intent::default();
            for row in &rows {
                intent.add(row.offset, true);
            }
            Self::new(self.partition.clone(), self.kind, intent, (rows, columns), None)
        };
        Ok((part((self.rows, self.columns)), part(right)))
    }
}

fn letter(raw: &Raw<'_>, record: &Record, why: &codec::Unreadable, grave: &Grave) -> Outgoing {
    let dead = codec::dead_letter(raw, &SourceName::unknown(), why, grave.now);
    let id = dead.request_id.as_str();
    let (kind, traceparent) = (Kind::DeadLetter, raw.traceparent());
    let envelope = Envelope { kind, id, writer: WRITER, time: grave.now, traceparent };
    let Encoded { headers, value } = codec::encode(&envelope, &dead);
    Outgoing { topic: Arc::clone(&grave.topic), key: record.key.clone(), value, headers }
}
