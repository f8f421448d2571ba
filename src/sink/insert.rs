//! One block → one insert under a token, and the count that tells whether it is there: what the sink asks of a store.

use std::{collections::HashSet, fmt::Write as _};

use super::{
    block::Block,
    guard::{Guard, Known},
    sealed::Sealed,
};
use crate::{
    kafka::Partition,
    message::envelope::Kind,
    store::{Route, Store, Trouble, present::range, row},
};

/// Stores blocks in ClickHouse.
pub trait Insert: Send + Sync + 'static {
    /// Inserts the rows of a block with a deduplication token. Idempotent for the same token.
    ///
    /// # Cancellation
    /// Whether the rows are stored is then unknown.
    ///
    /// # Errors
    /// [`Trouble`]: perhaps stored, perhaps not.
    fn insert(&self, sealed: &Sealed, token: &str) -> impl Future<Output = Result<(), Trouble>> + Send;

    /// How many rows of the block's range are in its table.
    ///
    /// # Errors
    /// [`Trouble`]
    fn count(&self, sealed: &Sealed) -> impl Future<Output = Result<u64, Trouble>> + Send;

    /// Feeds the block's rows to the tables of the views once more: an insert that was broken off, perhaps by a view that
    /// would not take them (`refused_by`), may have stored the rows and not come to the views. A view of somebody else's
    /// that takes none, or must not get them twice, is named with the statement that fills it.
    ///
    /// # Errors
    /// [`Trouble`] with a view of weir's own, or with the question which views there are.
    fn refill(&self, sealed: &Sealed, refused_by: Option<&Trouble>)
    -> impl Future<Output = Result<(), Trouble>> + Send;

    /// The offset after the last record of a partition that has been dealt with: that has a row, or a dead letter of
    /// the sink. 0 if none has.
    ///
    /// # Errors
    /// [`Trouble`]
    fn reaches(&self, kind: Kind, partition: &Partition) -> impl Future<Output = Result<i64, Trouble>> + Send;

    /// The offsets of a block's records that have a row. Those rows are fed to the tables of the views once more: the
    /// insert that nobody knows of any longer may have been broken off before.
    ///
    /// # Errors
    /// [`Trouble`]
    fn stored(&self, kind: Kind, block: &Block) -> impl Future<Output = Result<HashSet<i64>, Trouble>> + Send;
}

impl Insert for Store {
    async fn insert(&self, sealed: &Sealed, token: &str) -> Result<(), Trouble> {
        self.insert_columns(row::table(sealed.kind), &sealed.columns, token).await
    }

    async fn count(&self, sealed: &Sealed) -> Result<u64, Trouble> {
        self.count_where(sealed.kind, &range_of(sealed)).await
    }

    async fn refill(&self, sealed: &Sealed, refused_by: Option<&Trouble>) -> Result<(), Trouble> {
        let block = sealed.intent.token(&sealed.partition, 1);
        self.refill_views(sealed.kind, &range_of(sealed), &block, refused_by).await
    }

    async fn reaches(&self, kind: Kind, partition: &Partition) -> Result<i64, Trouble> {
        self.dealt_with_until(kind, partition).await
    }

    async fn stored(&self, kind: Kind, block: &Block) -> Result<HashSet<i64>, Trouble> {
        let times = block.records.iter().map(|record| row::storable(record.time));
        let range = range(&block.partition, block.first()..block.next(), times);
        let found = self.offsets_where(kind, &range).await?;
        if !found.is_empty() {
            let token =
                format!("{}:{}:{}-{}", block.partition.topic, block.partition.number, block.first(), block.next() - 1);
            self.refill_views(kind, &range, &token, None).await?;
        }
        Ok(found)
    }
}

/// The rows of a block, as a condition: without those at the places of its records that make none, since what stands
/// there is not of this block, and of their times, since other records had the same places before a topic was
/// re-created.
pub(super) fn range_of(sealed: &Sealed) -> String {
    let intent = &sealed.intent;
    let times = sealed.rows.iter().map(|row| row.recorded_at);
    let mut condition = range(&sealed.partition, intent.first..intent.next, times);
    for (first, last) in &intent.runs {
        // Writing into a String cannot fail.
        let _ = write!(condition, " AND offset NOT BETWEEN {first} AND {last}");
    }
    condition
}

/// Asks the table about a block, and how far it reaches if that is not known.
///
/// # Errors
/// [`Trouble`]
pub(super) async fn look<I: Insert>(
    store: &I,
    block: &Block,
    route: &Route,
    guard: Guard,
) -> Result<(Guard, Known), Trouble> {
    let until = match guard {
        Guard::Off => return Ok((guard, Known::default())),
        Guard::Until(until) => until,
        Guard::Unknown => {
            let until = store.reaches(route.kind, &block.partition).await?;
            if until > block.first() {
                tracing::warn!(
                    partition = %block.partition, from = block.first(), until,
                    "the sink's committed offset was moved by someone else, and the table has rows beyond it: up to \
                     `until` only missing rows are inserted"
                );
            }
            until
        }
    };
    let guard = Guard::Until(until).from(block.first());
    if guard == Guard::Off {
        return Ok((guard, Known::default()));
    }
    Ok((guard, Known { rows: store.stored(route.kind, block).await?, until }))
}
