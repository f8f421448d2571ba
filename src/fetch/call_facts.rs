//! What is known of a call besides its reply.

use std::time::Duration;

use crate::{message::AccountAlias, runtime::clock::Timestamp};

/// Goes into the records of all requests that the call was made for.
#[derive(Clone, Debug)]
pub(super) struct CallFacts {
    pub(super) account: AccountAlias,
    pub(super) ended_at: Timestamp,
    /// From its start to the last byte of its reply, or to the end of the wait for one.
    pub(super) latency: Duration,
    /// `None`: there was no reply.
    pub(super) http_status: Option<u16>,
}

impl CallFacts {
    pub(super) fn latency_ms(&self) -> u32 {
        u32::try_from(self.latency.as_millis()).unwrap_or(u32::MAX)
    }
}
