//! What a vendor allows, in the vendor's own terms.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// At most `calls` in `per`, `burst` of them at once: a token bucket that holds `burst` tokens and gains
/// `calls` tokens in `per`.
///
/// This is what the vendor grants, not how fast weir goes: see [`super::pace`] for that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    /// How many calls in `per`; at least 1.
    pub calls: u32,
    /// The time in which they are granted, `"1s"`; above zero, at most [`Self::PER_MAX`].
    #[serde(with = "humantime_serde")]
    pub per: Duration,
    /// How many calls may arrive at once; at least 1. If the vendor does not say, 1 is safe and costs speed.
    #[serde(default = "one")]
    pub burst: u32,
}

const fn one() -> u32 {
    1
}

/// Why a limit makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidLimit {
    /// `calls = 0`
    #[error("calls = 0 would never allow a call; give at least 1, or disable the account")]
    NoCalls,
    /// `burst = 0`
    #[error("burst = 0 would never allow a call; give at least 1")]
    NoBurst,
    /// `per` is zero or absurdly long.
    #[error("per = {found:?} must be above zero and at most {:?} (a year)", Limit::PER_MAX)]
    Per {
        /// What was given.
        found: Duration,
    },
}

impl Limit {
    /// The longest `per`: a year.
    pub const PER_MAX: Duration = Duration::from_secs(366 * 24 * 60 * 60);

    /// A checked limit.
    ///
    /// # Errors
    /// [`InvalidLimit`] says which number makes no sense.
    pub fn new(calls: u32, per: Duration, burst: u32) -> Result<Self, InvalidLimit> {
        let limit = Self { calls, per, burst };
        limit.validate()?;
        Ok(limit)
    }

    /// Checks a limit that was read from a file.
    ///
    /// # Errors
    /// [`InvalidLimit`] says which number makes no sense.
    pub fn validate(&self) -> Result<(), InvalidLimit> {
        if self.calls == 0 {
            return Err(InvalidLimit::NoCalls);
        }
        if self.burst == 0 {
            return Err(InvalidLimit::NoBurst);
        }
        if self.per.is_zero() || self.per > Self::PER_MAX {
            return Err(InvalidLimit::Per { found: self.per });
        }
        Ok(())
    }

    /// The time in which one token is gained, rounded up to nanoseconds, so that a pace made from it is never
    /// too fast.
    #[must_use]
    pub fn interval(&self) -> Duration {
        // An unchecked zero counts as one: the slowest pace, not a crash.
        div_ceil(self.per, self.calls)
    }
}

/// `time / by`, rounded up to nanoseconds; `by` = 0 counts as 1.
pub(super) fn div_ceil(time: Duration, by: u32) -> Duration {
    let by = by.max(1);
    let floor = time / by;
    if floor * by < time { floor + Duration::from_nanos(1) } else { floor }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_reads_as_people_write_it_and_its_burst_is_one_unless_said() {
        let limit: Limit = serde_json::from_str(r#"{"calls": 60, "per": "1m"}"#).unwrap();
        assert_eq!(limit, Limit::new(60, Duration::from_secs(60), 1).unwrap());
        assert!(serde_json::from_str::<Limit>(r#"{"calls": 60, "per": "1m", "bursts": 2}"#).is_err());
    }

    #[test]
    fn a_limit_that_allows_nothing_is_refused_with_the_key_that_is_wrong() {
        let second = Duration::from_secs(1);
        let table = [
            (0, second, 1, "calls = 0"),
            (1, second, 0, "burst = 0"),
            (1, Duration::ZERO, 1, "per = 0ns"),
            (1, Limit::PER_MAX + second, 1, "a year"),
        ];
        for (calls, per, burst, expected) in table {
            let message = Limit::new(calls, per, burst).unwrap_err().to_string();
            assert!(message.contains(expected), "{message:?} should say {expected:?}");
        }
    }

    #[test]
    fn the_interval_is_rounded_up() {
        let limit = Limit::new(3, Duration::from_secs(1), 1).unwrap();
        assert_eq!(limit.interval(), Duration::from_nanos(333_333_334));
    }
}
