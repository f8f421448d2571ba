//! Detects offsets that were moved by hand, so that rows already in the table are not inserted again.
//!
//! All that the sink commits carries its mark ([`super::intent`]). Where the mark is missing somebody else has set the
//! offset, or the group was forgotten, or this is the first start. Then the table is asked how far it reaches, and up
//! to there each block is held against it: what is there stays, what is missing is inserted. How far that goes stands
//! in the commits, so that it also holds for the next owner.

use std::collections::HashSet;

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
