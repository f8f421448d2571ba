//! The time as the quota's arithmetic counts it.

use std::time::Duration;

use crate::runtime::clock::Timestamp;

/// Microseconds: what the arithmetic counts in here and in Redis, whose numbers hold them exactly until 2255.
pub type Micros = u64;

/// Rounded up: later is always lawful.
pub(super) fn micros(time: Duration) -> Micros {
    u64::try_from(time.as_nanos().div_ceil(1_000)).unwrap_or(u64::MAX)
}

/// A time of day in microseconds; zero before 1970.
pub(super) fn micros_since_1970(at: Timestamp) -> Micros {
    u64::try_from(at.as_millis()).unwrap_or_default() * 1_000
}
