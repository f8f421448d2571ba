//! One attempt at a block: insert it, or check whether it is stored.

use std::fmt;

use tokio::time::Instant;

use super::{
    doubt::{Doubt, Step, TOKENS_MAX, Verdict},
    insert::{Insert, range_of},
    sealed::{Sealed, Unusable},
};
use crate::{
    runtime::metrics::METRICS,
    store::{Trouble, TroubleKind, row},
};

/// How a try has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// Every row is there, once.
    Stored,
    /// The intent is too old for an insert to begin: commit it again.
    Stale,
    /// No row is there, and the block is to be split.
    Split,
    /// ClickHouse cannot now. Try again later.
    Refused(Trouble),
    /// Trying again does not help: a person has to look.
    Halted(Halt),
}

/// Why a partition stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Halt {
    /// A number of rows that no insert of this block can have left.
    Odd {
        /// What was counted.
        found: u64,
    },
    /// Inserts are acknowledged, but no row is there.
    Vanished,
    /// The block has to be made again, but cannot.
    Unusable(Unusable),
}

/// What one try may do.
pub struct Terms<F> {
    /// Whether the intent is still young enough for an insert to begin.
    pub is_fresh: F,
    /// Whether the block was too large for ClickHouse.
    pub split: bool,
}

/// Tries until the block is stored or something is in the way; bounded by the number of tokens.
pub async fn settle<I: Insert, F: Fn() -> bool + Send>(
    store: &I,
    sealed: &Sealed,
    doubt: &mut Doubt,
    terms: Terms<F>,
) -> End {
    let begun_at = Instant::now();
    let end = until_settled(store, sealed, doubt, terms).await;
    match &end {
        End::Stored => METRICS.inserted(row::table(sealed.kind), sealed.intent.rows, begun_at.elapsed()),
        End::Refused(trouble) => METRICS.not_inserted(trouble.kind.as_str()),
        End::Stale | End::Split | End::Halted(_) => {}
    }
    end
}

async fn until_settled<I: Insert, F: Fn() -> bool + Send>(
    store: &I,
    sealed: &Sealed,
    doubt: &mut Doubt,
    terms: Terms<F>,
) -> End {
    let mut by_view: Option<Trouble> = None;
    loop {
        match doubt.step() {
            Step::Insert(_) if !(terms.is_fresh)() => return End::Stale,
            Step::Insert(number) => {
                let token = sealed.intent.token(&sealed.partition, number);
                match store.insert(sealed, &token).await {
                    Ok(()) if doubt.acknowledged() => return End::Stored,
                    Ok(()) => {}
                    Err(trouble) => {
                        doubt.failed(is_answer(&trouble));
                        // A view is fed after the table: the rows are most likely there, and nobody has to wait.
                        if trouble.view.is_none() || by_view.is_some() {
                            return End::Refused(trouble);
                        }
                        by_view = Some(trouble);
                    }
                }
            }
            Step::Count => {
                let found = match store.count(sealed).await {
                    Ok(found) => found,
                    Err(trouble) => return End::Refused(trouble),
                };
                let token = sealed.intent.token(&sealed.partition, 1);
                let rows = sealed.intent.rows;
                // Where ClickHouse itself has refused each insert none was expected: nobody need hear of it at each try.
                if found == 0 && doubt.may_split() {
                    tracing::debug!(block = token, "insert refused; checked: {found} of {rows} rows stored");
                } else {
                    tracing::info!(block = token, "insert outcome unknown; checked: {found} of {rows} rows stored");
                }
                let verdict = doubt.counted(found, sealed.intent.rows as u64, sealed.is_in_parts());
                match (verdict, sealed.trouble) {
                    // The views' tables are written after the block's own, and may have been left without.
                    (Verdict::Stored, _) => match store.refill(sealed, by_view.as_ref()).await {
                        Ok(()) => return End::Stored,
                        Err(trouble) => return End::Refused(trouble),
                    },
                    (Verdict::Partly, None) => {
                        tracing::info!(block = token, "{found} of {rows} rows stored; inserting the rest");
                    }
                    (Verdict::Odd, _) | (Verdict::Partly, Some(_)) => return End::Halted(Halt::Odd { found }),
                    (Verdict::Vanished, _) => return End::Halted(Halt::Vanished),
                    (Verdict::Absent, Some(unusable)) => return End::Halted(Halt::Unusable(unusable)),
                    (Verdict::Absent, None) if terms.split && doubt.may_split() => return End::Split,
                    (Verdict::Absent, None) => {}
                }
            }
        }
    }
}

/// Whether ClickHouse itself has ended the insert: then nothing of it comes late.
fn is_answer(trouble: &Trouble) -> bool {
    trouble.code.is_some() && trouble.kind != TroubleKind::Away
}

/// A halt for people: what was found, and what to do.
pub struct Told<'a>(pub &'a Halt, pub &'a Sealed);

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(halt, sealed) = self;
        let Sealed { partition, kind, intent, .. } = sealed;
        let (first, last, rows, table) = (intent.first, intent.next - 1, intent.rows, row::table(*kind));
        let range = range_of(sealed);
        let of = |count: u64| if count == 1 { "row" } else { "rows" };
        let row = of(rows as u64);
        write!(f, "{partition} is stuck at offsets {first} to {last}: ")?;
        match halt {
            Halt::Odd { found } => write!(
                f,
                "table {table} has {found} {} of them, where {rows} or none are expected. If they may be deleted: \
                 ALTER TABLE {table} DELETE WHERE {range}; they are then inserted again automatically",
                of(*found)
            ),
            Halt::Vanished => write!(
                f,
                "ClickHouse acknowledged their {rows} {row} under {TOKENS_MAX} tokens, but table {table} has none of \
                 them. Does a TTL or a person delete them? They are counted again every 30 s"
            ),
            Halt::Unusable(Unusable::Lost) => write!(
                f,
                "their insert was started, table {table} has none of their {rows} {row}, and Kafka no longer holds all of the records. Restore the rows from a backup (WHERE {range}), or give them up by setting the \
                 offset of the sink's group for this partition to {} or later while the sink is stopped",
                intent.next
            ),
            Halt::Unusable(Unusable::ReadsDifferently) => write!(
                f,
                "another version of weir announced {rows} {row} of them, and this one reads the records differently. \
                 Run that version until these are stored"
            ),
        }
    }
}
