//! Whether rows of what is read may be in the table already: a group's offsets can be set back by hand.
//!
//! All that the sink commits carries its mark ([`super::intent`]). Where the mark is missing somebody else has set the
//! offset, or the group was forgotten, or this is the first start. Then the table is asked how far it reaches, and up
//! to there each block is held against it: what is there stays, what is missing is inserted. How far that goes stands
//! in the commits, so that it also holds for the next owner.

use std::collections::HashSet;

use super::{block::Block, insert::Insert};
use crate::store::{Route, Trouble};

/// What is known of the rows of a partition beyond its commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guard {
    /// There are none but those of announced blocks.
    Off,
    /// The commit is not the sink's: nothing is known.
    Unknown,
    /// Below this offset there may be.
    Until(i64),
}

impl Guard {
    /// What remains of it from this offset on.
    #[must_use]
    pub const fn from(self, offset: i64) -> Self {
        match self {
            Self::Until(until) if offset >= until => Self::Off,
            Self::Off | Self::Unknown | Self::Until(_) => self,
        }
    }
}

/// What of a block has been dealt with before.
#[derive(Debug, Default)]
pub struct Known {
    /// Its rows that are in the table.
    pub rows: HashSet<i64>,
    /// What cannot be read below this offset has its dead letter.
    pub until: i64,
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
                    "the offset of the sink's group was set by somebody else, and the table holds rows beyond it: up to \
                     there only what is missing is inserted"
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
