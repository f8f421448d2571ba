//! A block that has been read: its rows, its intent, and the dead letters of what cannot be a row.

use std::sync::Arc;

use super::{
    block::Block,
    guard::{Guard, Known},
    intent::Intent,
    row::{self, Parsed, Route},
};
use crate::{
    kafka::{Outgoing, Partition, Record},
    message::{
        SourceName,
        codec::{self, Encoded, Raw},
        envelope::{Envelope, Kind},
    },
    runtime::clock::Timestamp,
};

/// The name of this stage in `ce_source`.
const WRITER: &str = "weir/sink";

/// So many records are parsed before other tasks of the thread get their turn.
const TURN: usize = 32;

/// The bytes of dead letters that one block may come to: they go in one transaction.
const LETTERS_MAX: usize = 4 * 1024 * 1024;

/// A record and what it says.
#[derive(Debug)]
pub struct Row {
    /// The record; without its value where `parsed` has all of it.
    pub record: Record,
    /// What it says.
    pub parsed: Parsed,
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
    let (mut rows, mut index) = (Vec::with_capacity(block.records.len()), 0);
    while let Some(record) = block.records.get(index) {
        let raw = record.raw(&block.partition);
        let parsed = row::parse(&raw, route);
        let has_row = parsed.has_row() && !known.rows.contains(&record.offset);
        if letter_bytes > LETTERS_MAX || !intent.add(record.offset, has_row) {
            break;
        }
        if let (Parsed::Poison(why), true) = (&parsed, record.offset >= known.until) {
            tracing::warn!(record = %raw.position_id(), %why, "unreadable: it becomes a dead letter");
            let letter = letter(&raw, record, why, grave);
            letter_bytes += letter.size();
            letters.push(letter);
        }
        rows.push(parsed);
        index += 1;
        if index.is_multiple_of(TURN) {
            tokio::task::yield_now().await;
        }
    }
    let rest = (index < block.records.len()).then(|| block.split_off(index));
    let sealed = sealed(block, rows, intent, route.kind, None);
    Reading { sealed, letters, rest, guard: None }
}

/// Reads a block again as its intent announced it.
pub async fn read_again(block: Block, intent: Intent, route: &Route) -> Reading {
    let mut rows = Vec::with_capacity(block.records.len());
    let mut is_same = true;
    for (index, record) in block.records.iter().enumerate() {
        let parsed = row::parse(&record.raw(&block.partition), route);
        // What had no row then has its dead letter: it gets no row now, even if this version could read it.
        is_same &= parsed.has_row() || intent.is_rowless(record.offset);
        rows.push(parsed);
        if index % TURN == TURN - 1 {
            tokio::task::yield_now().await;
        }
    }
    let rowless = block.records.iter().filter(|record| intent.is_rowless(record.offset)).count();
    let trouble = (!is_same || rowless != intent.rowless).then_some(Unusable::ReadsDifferently);
    let sealed = sealed(block, rows, intent, route.kind, trouble);
    Reading { sealed, letters: Vec::new(), rest: None, guard: None }
}

/// A block whose records are gone.
#[must_use]
pub fn lost(partition: Partition, intent: Intent, kind: Kind) -> Sealed {
    Sealed { partition, kind, intent, rows: Vec::new(), bytes: 0, trouble: Some(Unusable::Lost) }
}

fn sealed(block: Block, parsed: Vec<Parsed>, intent: Intent, kind: Kind, trouble: Option<Unusable>) -> Sealed {
    let row = |(mut record, parsed): (Record, Parsed)| {
        // Only the bytes of what could not be read are needed again.
        if !matches!(parsed, Parsed::Raw(_)) {
            record.value = None;
        }
        Row { record, parsed }
    };
    let rows = block.records.into_iter().zip(parsed);
    let rows = rows.filter(|(record, _)| !intent.is_rowless(record.offset)).map(row).collect();
    Sealed { partition: block.partition, kind, intent, rows, bytes: block.bytes, trouble }
}

impl Sealed {
    /// Two halves, to be announced and inserted one after the other.
    ///
    /// # Errors
    /// The whole again, if it has too few rows for that, or records between them whose place is not known exactly.
    pub fn split(mut self) -> Result<(Self, Self), Self> {
        let half = self.rows.len() / 2;
        if half == 0 || self.intent.rowless > 0 || self.trouble.is_some() {
            return Err(self);
        }
        let right = self.rows.split_off(half);
        let part = |rows: Vec<Row>| {
            let mut intent = Intent::default();
            for row in &rows {
                intent.add(row.record.offset, true);
            }
            let (partition, kind, bytes) = (self.partition.clone(), self.kind, self.bytes / 2);
            Self { partition, kind, intent, rows, bytes, trouble: None }
        };
        let right = part(right);
        Ok((part(std::mem::take(&mut self.rows)), right))
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
