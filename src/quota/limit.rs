//! What a vendor allows, in the vendor's own terms.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::civil::{Calendar, Per, StartsAt, is_whole_days};
pub use super::micros::Micros;
pub(super) use super::micros::{micros, micros_since_1970};

/// The kind of rate limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Counting {
    /// A token bucket: `burst` tokens at most, `calls` new ones in `per`.
    #[default]
    Bucket,
    /// At most `calls` in each window of `per`, which begin at fixed times.
    Fixed,
    /// At most `calls` in any stretch of `per`.
    Sliding,
}

/// At most `calls` in `per`; several limits of one account all hold together.
///
/// This is what the vendor grants, not how fast weir goes: see [`super::pace`] for that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    /// How many calls in `per`; at least 1.
    pub calls: u32,
    /// The time in which they are granted, `"1s"`; above zero, at most [`Self::PER_MAX`]. Months are those of the calendar,
    /// and only for fixed windows.
    pub per: Per,
    /// How many calls may arrive at once in a bucket; at least 1. If the vendor does not say, 1 is safe and
    /// costs speed. Windows have none.
    #[serde(default = "one")]
    pub burst: u32,
    /// The kind of rate limit.
    #[serde(default)]
    pub kind: Counting,
    /// Any time at which a fixed window begins, such as the vendor's midnight; without it the phase is unknown. With a zone
    /// in brackets the windows follow its clocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub starts_at: Option<StartsAt>,
    /// Spread a long window's calls evenly over it, instead of spending them as they are needed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub spread: bool,
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
    /// A window with a burst, or a bucket with the settings of a window.
    #[error("{key} is only for kind = {wanted}; leave it out, or change the kind")]
    Misplaced {
        /// Which key.
        key: &'static str,
        /// What it belongs to.
        wanted: &'static str,
    },
    /// Months without a calendar.
    #[error(
        "per = \"{found}\" is a time of the calendar, which is not always of one length: it is for kind = \"fixed\" with \
         starts_at, such as starts_at = \"2026-01-01T00:00:00+08:00\". For any other window give days, such as \"30days\""
    )]
    Months {
        /// What was given.
        found: Per,
    },
    /// A zone whose clocks would not matter, or would break windows.
    #[error(
        "per = \"{found}\" with a zone in starts_at: windows that follow the clocks of a zone are whole days, weeks or months; \
         give starts_at as \"2026-01-01T00:00:00Z\", without brackets, for windows of always the same length"
    )]
    Zone {
        /// What was given.
        found: Per,
    },
}

impl Limit {
    /// The longest `per`: a year.
    pub const PER_MAX: Duration = Duration::from_secs(366 * 24 * 60 * 60);

    /// The longest window that is paced. What is paced is one number, and lost state is learned in one
    /// spacing; its calls leave evenly. A longer window would make single calls wait for long (5,000 a day:
    /// 17 s), so it is a budget, which must be remembered, and of which losing the memory costs a window.
    pub const PACED_MAX: Duration = Duration::from_secs(10);

    /// A checked token bucket.
    ///
    /// # Errors
    /// [`InvalidLimit`] says which number makes no sense.
    pub fn new(calls: u32, per: Duration, burst: u32) -> Result<Self, InvalidLimit> {
        let limit = Self { calls, per: per.into(), burst, kind: Counting::Bucket, starts_at: None, spread: false };
        limit.validate()?;
        Ok(limit)
    }

    /// A checked window.
    ///
    /// # Errors
    /// [`InvalidLimit`] says which number makes no sense.
    pub fn window(calls: u32, per: Duration, kind: Counting) -> Result<Self, InvalidLimit> {
        let limit = Self { calls, per: per.into(), burst: 1, kind, starts_at: None, spread: false };
        limit.validate()?;
        Ok(limit)
    }

    /// Whether calls keep a distance for its sake; else it is a budget.
    #[must_use]
    pub fn is_paced(&self) -> bool {
        match self.kind {
            Counting::Bucket => true,
            Counting::Fixed | Counting::Sliding => self.spread || *self.per <= Self::PACED_MAX,
        }
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
        if self.per.is_zero() || *self.per > Self::PER_MAX {
            return Err(InvalidLimit::Per { found: *self.per });
        }
        if self.per.months() > 0 && (self.kind != Counting::Fixed || self.starts_at.is_none()) {
            return Err(InvalidLimit::Months { found: self.per });
        }
        let misplaced = |key, wanted| Err(InvalidLimit::Misplaced { key, wanted });
        let follows_a_zone = self.starts_at.as_ref().is_some_and(StartsAt::follows_a_zone);
        match self.kind {
            Counting::Bucket if self.spread => misplaced("spread", "\"fixed\" or \"sliding\""),
            Counting::Bucket | Counting::Sliding if self.starts_at.is_some() => misplaced("starts_at", "\"fixed\""),
            Counting::Fixed | Counting::Sliding if self.burst > 1 => misplaced("burst", "\"bucket\""),
            Counting::Fixed if follows_a_zone && !is_whole_days(self.per) => {
                Err(InvalidLimit::Zone { found: self.per })
            }
            Counting::Bucket | Counting::Fixed | Counting::Sliding => Ok(()),
        }
    }

    /// It in words: `10/1s burst 5`.
    #[must_use]
    pub fn words(&self) -> String {
        let per = self.per;
        let burst = match self.kind {
            Counting::Bucket if self.burst > 1 => format!(" burst {}", self.burst),
            Counting::Bucket | Counting::Fixed | Counting::Sliding => String::new(),
        };
        format!("{}/{per}{burst}", self.calls)
    }

    /// It in a sentence: `300 calls per 1m, in windows of which one begins at 2026-01-01T00:00:00Z`.
    #[must_use]
    pub fn sentence(&self) -> String {
        let calls = if self.calls == 1 { "call" } else { "calls" };
        let how = match (self.kind, &self.starts_at) {
            (Counting::Bucket, _) if self.burst == 1 => ", one at a time".to_owned(),
            (Counting::Bucket, _) => format!(", {} at once", self.burst),
            (Counting::Sliding, _) => ", in any stretch of that time".to_owned(),
            (Counting::Fixed, None) => ", in windows that begin at any time".to_owned(),
            (Counting::Fixed, Some(starts_at)) => format!(", in windows of which one begins at {starts_at}"),
        };
        let spread = if self.spread { ", spread over it" } else { "" };
        format!("{} {calls} per {}{how}{spread}", self.calls, self.per)
    }

    /// Its windows, if they follow a calendar.
    #[must_use]
    pub fn calendar(&self) -> Option<Calendar> {
        let starts_at = self.starts_at.as_ref().filter(|_| self.kind == Counting::Fixed)?;
        Calendar::new(self.per, starts_at)
    }

    /// The longest that one of its windows can be.
    #[must_use]
    pub fn longest(&self) -> Duration {
        /// Clocks are set back by up to two hours, hardly ever by more.
        const SET_BACK: Duration = Duration::from_secs(3 * 60 * 60);
        if self.calendar().is_some() { *self.per + SET_BACK } else { *self.per }
    }

    /// The time in which one token is gained, rounded up to nanoseconds, so that a pace made from it is never
    /// too fast.
    #[must_use]
    pub fn interval(&self) -> Duration {
        // An unchecked zero counts as one: the slowest pace, not a crash.
        div_ceil(*self.per, self.calls)
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
    fn windows_are_limits_too_and_what_belongs_to_another_kind_is_refused() {
        let read = |text: &str| serde_json::from_str::<Limit>(text).unwrap();
        let day = read(r#"{"calls": 5000, "per": "1day", "kind": "fixed", "starts_at": "2026-01-01T00:00:00+08:00"}"#);
        assert_eq!(day.validate(), Ok(()));
        assert!(!day.is_paced());
        let table = [
            (r#"{"calls": 9, "per": "1s", "kind": "sliding", "burst": 2}"#, "burst"),
            (r#"{"calls": 9, "per": "1s", "spread": true}"#, "spread"),
            (r#"{"calls": 9, "per": "1m", "kind": "sliding", "starts_at": 0}"#, "starts_at"),
        ];
        for (text, key) in table {
            let message = read(text).validate().unwrap_err().to_string();
            assert!(message.starts_with(key), "{message:?} should name {key}");
        }
    }

    #[test]
    fn windows_of_a_calendar_are_read_and_what_has_no_calendar_is_refused_in_a_sentence() {
        let read = |text: &str| serde_json::from_str::<Limit>(text).unwrap();
        let los_angeles = r#""starts_at": "2026-01-01T00:00:00-08:00[America/Los_Angeles]""#;
        for per in ["1day", "1week", "1month"] {
            let limit = read(&format!(r#"{{"calls": 9, "per": "{per}", "kind": "fixed", {los_angeles}}}"#));
            assert_eq!(limit.validate(), Ok(()));
            assert!(limit.calendar().is_some() && !limit.is_paced());
            let written = serde_json::to_string(&limit).unwrap();
            assert!(written.contains("[America/Los_Angeles]"), "{written}");
            assert_eq!(read(&written), limit);
        }
        let table = [
            (r#"{"calls": 9, "per": "1month"}"#.to_owned(), "per = \"1month\" is a time of the calendar"),
            (r#"{"calls": 9, "per": "1month", "kind": "sliding"}"#.to_owned(), "\"30days\""),
            (r#"{"calls": 9, "per": "1year", "kind": "fixed"}"#.to_owned(), "with starts_at"),
            (format!(r#"{{"calls": 9, "per": "12h", "kind": "fixed", {los_angeles}}}"#), "whole days, weeks or months"),
        ];
        for (text, expected) in table {
            let message = read(&text).validate().unwrap_err().to_string();
            assert!(message.contains(expected), "{message:?} should say {expected:?}");
        }
    }

    #[test]
    fn short_windows_are_paced_and_long_ones_are_budgets_unless_spread() {
        let window = |secs| Limit::window(100, Duration::from_secs(secs), Counting::Sliding).unwrap();
        assert!(window(1).is_paced() && window(10).is_paced() && !window(60).is_paced());
        assert!(Limit { spread: true, ..window(60) }.is_paced());
        assert!(Limit::new(60, Duration::from_secs(60), 1).unwrap().is_paced(), "a bucket always is");
    }

    #[test]
    fn the_interval_is_rounded_up() {
        let limit = Limit::new(3, Duration::from_secs(1), 1).unwrap();
        assert_eq!(limit.interval(), Duration::from_nanos(333_333_334));
    }
}
