//! What a role takes along when it begins anew: answers that it has paid for, and its counts of today.

use std::sync::{Arc, OnceLock};

use bytesize::ByteSize;

use crate::{kafka::kept::Kept, quota::Tally};

/// Of the fetch role of one source, as long as the process lives.
#[derive(Debug, Default)]
pub struct Carry {
    pub(super) kept: Kept,
    tally: OnceLock<Arc<Tally>>,
}

impl Carry {
    /// Nothing yet; with room for so much.
    #[must_use]
    pub fn new(limit: ByteSize) -> Self {
        Self { kept: Kept::new(usize::try_from(limit.as_u64()).unwrap_or(usize::MAX)), tally: OnceLock::new() }
    }

    /// The counts of the role's first life, which go on: what no report has taken is only here.
    pub(super) fn tally(&self, first: &Arc<Tally>) -> Arc<Tally> {
        Arc::clone(self.tally.get_or_init(|| Arc::clone(first)))
    }
}
