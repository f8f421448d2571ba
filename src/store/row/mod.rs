//! Maps records to rows (`tables`), and unreadable records to dead letters.

mod tables;

use rust_decimal::Decimal;

pub use tables::{ChangeRow, DeadLetterRow, FailureRow, ObservationRow, RequestRow};

use super::columns::{Columns, Exact};
use crate::{
    message::{
        Change, DeadLetter, Failure, Observation, SourceName,
        codec::{self, Raw, Received, Unreadable},
        envelope::Kind,
    },
    runtime::clock::Timestamp,
    topics::Topic,
};

/// The headers of a record that its row is made with.
pub const HEADERS: [&str; 3] = ["ce_type", "ce_id", "traceparent"];

/// The last millisecond that a `DateTime64(3)` can hold: the end of the year 2299.
const LAST_MILLIS: i64 = 10_413_791_999_999;

/// What is on a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// What its records are.
    pub kind: Kind,
    /// Whose requests they are; `None` for topics that all sources share.
    pub source: Option<SourceName>,
}

impl From<&Topic> for Route {
    fn from(topic: &Topic) -> Self {
        Self { kind: topic.kind, source: topic.source.clone() }
    }
}

/// A record as far as it could be read.
#[derive(Debug)]
pub enum Parsed {
    /// For table `requests`.
    Request(Box<Received>),
    /// For table `observations`.
    Result(Box<Observation>),
    /// For table `failures`.
    Failure(Box<Failure>),
    /// For table `dead_letters`.
    DeadLetter(Box<DeadLetter>),
    /// For table `item_changes`.
    Change(Box<Change>),
    /// An unreadable dead letter: its bytes are stored in `dead_letters`. Sent round again it would come back.
    Raw(Unreadable),
    /// An unreadable result or change: it gets a dead letter, and no row of its own.
    Poison(Unreadable),
    /// An unreadable request or failure: not ours to store, since fetch or retry writes its dead letter.
    Skipped(Unreadable),
}

impl Parsed {
    /// Whether the record becomes a row.
    #[must_use]
    pub const fn has_row(&self) -> bool {
        !matches!(self, Self::Poison(_) | Self::Skipped(_))
    }
}

/// Reads a record of a topic.
#[must_use]
pub fn parse(raw: &Raw<'_>, route: &Route) -> Parsed {
    match (route.kind, &route.source) {
        (Kind::Request, Some(source)) => match codec::read_request(raw, source) {
            Ok(received) => Parsed::Request(Box::new(received)),
            Err(why) => Parsed::Skipped(why),
        },
        // The sink does not read the others: see Topics::rows.
        (Kind::Request | Kind::Cancellation | Kind::BatchEnd | Kind::QuotaReport | Kind::QuotaSetting, _) => {
            Parsed::Skipped(Unreadable::Empty)
        }
        (Kind::Result, _) => read(codec::read_observation(raw), Parsed::Result, Parsed::Poison),
        (Kind::Failure, _) => read(codec::read_failure(raw), Parsed::Failure, Parsed::Skipped),
        (Kind::DeadLetter, _) => read(codec::read_dead_letter(raw), Parsed::DeadLetter, Parsed::Raw),
        (Kind::Change, _) => read(codec::read_change(raw), Parsed::Change, Parsed::Poison),
    }
}

fn read<T>(
    record: Result<T, Unreadable>,
    parsed: fn(Box<T>) -> Parsed,
    unreadable: fn(Unreadable) -> Parsed,
) -> Parsed {
    match record {
        Ok(record) => parsed(Box::new(record)),
        Err(why) => unreadable(why),
    }
}

/// The table for records of a kind.
#[must_use]
pub const fn table(kind: Kind) -> &'static str {
    match kind {
        Kind::Request => "requests",
        Kind::Result => "observations",
        Kind::Failure => "failures",
        Kind::Change => "item_changes",
        Kind::DeadLetter => "dead_letters",
        // There is none: the sink does not read those topics.
        Kind::Cancellation | Kind::BatchEnd | Kind::QuotaReport | Kind::QuotaSetting => "none",
    }
}

/// Adds the row of a record to the columns of its table; nothing for one that has no row.
pub fn put(columns: &mut Columns, raw: &Raw<'_>, parsed: &Parsed) {
    match parsed {
        Parsed::Request(request) => columns.add(&RequestRow::new(raw, request)),
        Parsed::Result(seen) => columns.add(&ObservationRow::new(raw, seen)),
        Parsed::Failure(failure) => columns.add(&FailureRow::new(raw, failure)),
        Parsed::Change(change) => columns.add(&ChangeRow::new(raw, change)),
        Parsed::DeadLetter(dead) => columns.add(&DeadLetterRow::new(raw, dead)),
        Parsed::Raw(why) => columns.add(&DeadLetterRow::unreadable(raw, why)),
        Parsed::Poison(_) | Parsed::Skipped(_) => {}
    }
}

/// Milliseconds since 1970 as `DateTime64(3, 'UTC')` stores them: a time before 1970 or after 2299 becomes the
/// nearest one. (A Kafka message without a time has -1.)
#[must_use]
pub fn storable(time: Timestamp) -> i64 {
    time.as_millis().clamp(0, LAST_MILLIS)
}

/// The value of a `Decimal(18, 4)` in ten-thousandths, if the text is one exactly.
#[must_use]
pub fn decimal(text: &str) -> Option<Exact> {
    const SCALE: u32 = 4;
    const LIMIT: i64 = 1_000_000_000_000_000_000;
    // rust_decimal would also read 1_000.
    if !text.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b'.' | b'-' | b'+')) {
        return None;
    }
    let number = Decimal::from_str_exact(text).ok()?.normalize();
    let missing = SCALE.checked_sub(number.scale())?;
    let value = number.mantissa().checked_mul(10_i128.pow(missing))?;
    i64::try_from(value).ok().filter(|value| value.abs() < LIMIT).map(Exact)
}

#[cfg(test)]
mod tests;
