//! Time and randomness, handed to the code that needs them so that a test can decide both.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::SmallRng};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use tokio::time::{Instant, sleep_until};

/// An instant in UTC with millisecond precision; in JSON an RFC 3339 text.
///
/// Reading also accepts a number of milliseconds since 1970, since that is what many producers have at hand.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp(i64);

impl Timestamp {
    /// From milliseconds since 1970-01-01T00:00:00Z.
    #[must_use]
    pub const fn from_millis(millis: i64) -> Self {
        Self(millis)
    }

    /// Milliseconds since 1970-01-01T00:00:00Z.
    #[must_use]
    pub const fn as_millis(self) -> i64 {
        self.0
    }

    /// This instant moved by `by` into the future, saturating.
    #[must_use]
    pub fn after(self, by: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(by.as_millis()).unwrap_or(i64::MAX)))
    }

    /// The time so long before this one.
    #[must_use]
    pub fn before(self, by: Duration) -> Self {
        Self(self.0.saturating_sub(i64::try_from(by.as_millis()).unwrap_or(i64::MAX)))
    }

    /// The time from `earlier` to here; zero if `earlier` is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_millisecond(self.0) {
            Ok(at) => write!(f, "{at:.3}"),
            Err(_) => write!(f, "{}ms", self.0),
        }
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Timestamp;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an RFC 3339 time or milliseconds since 1970")
            }
            fn visit_i64<E: de::Error>(self, millis: i64) -> Result<Timestamp, E> {
                // Micro- and nanoseconds end up beyond the year 9999, where there is no text to write them as.
                let in_range = jiff::Timestamp::from_millisecond(millis).map(|_| Timestamp(millis));
                in_range
                    .map_err(|error| E::custom(format!("{millis} is no number of milliseconds since 1970: {error}")))
            }
            fn visit_u64<E: de::Error>(self, millis: u64) -> Result<Timestamp, E> {
                self.visit_i64(i64::try_from(millis).map_err(E::custom)?)
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Timestamp, E> {
                let at: jiff::Timestamp = text.parse().map_err(E::custom)?;
                Ok(Timestamp(at.as_millisecond()))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for Timestamp {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Timestamp".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "format": "date-time"})
    }
}

/// Waits until then; for ever if there is no such time.
///
/// # Cancellation
/// Safe.
pub async fn sleep_until_due(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Where a stage reads the time of day.
///
/// Durations are measured with `tokio::time::Instant`, which tests can pause; this is for the times that are
/// written into records and compared with a vendor's.
#[derive(Clone, Debug)]
pub enum Clock {
    /// The machine's clock.
    System,
    /// `start` plus the time that tokio's (pausable) clock has advanced since `since`.
    Simulated {
        /// What the clock showed at `since`.
        start: Timestamp,
        /// Tokio's time when the clock was made.
        since: tokio::time::Instant,
    },
    /// Like the simulated one, and somebody sets it: these milliseconds are added.
    #[cfg(test)]
    Set(Box<Self>, Arc<std::sync::atomic::AtomicI64>),
    /// Like the simulated one on a machine that was suspended for so many milliseconds, which tokio does not know of.
    #[cfg(test)]
    Suspended(Box<Self>, Arc<std::sync::atomic::AtomicU64>),
}

impl Clock {
    /// A clock that starts at `start` and moves with tokio's time.
    #[must_use]
    pub fn simulated(start: Timestamp) -> Self {
        Self::Simulated { start, since: tokio::time::Instant::now() }
    }

    /// Time since some moment in the past, that goes on while the machine is suspended, which tokio's does not. For
    /// what must not be believed any longer after a while.
    #[must_use]
    pub fn uptime(&self) -> Duration {
        match self {
            Self::System => {
                use rustix::time::{ClockId, clock_gettime};
                // Elsewhere the monotonic clock counts suspension, or there is none that does.
                #[cfg(target_os = "linux")]
                let clock = ClockId::Boottime;
                #[cfg(not(target_os = "linux"))]
                let clock = ClockId::Monotonic;
                Duration::try_from(clock_gettime(clock)).unwrap_or_default()
            }
            Self::Simulated { since, .. } => since.elapsed(),
            // Who sets the time of day does not change how much has passed.
            #[cfg(test)]
            Self::Set(clock, _) => clock.uptime(),
            #[cfg(test)]
            Self::Suspended(clock, by) => {
                clock.uptime() + Duration::from_millis(by.load(std::sync::atomic::Ordering::Relaxed))
            }
        }
    }

    /// The time of day.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        match self {
            Self::System => {
                #[allow(clippy::disallowed_methods, reason = "the one place that reads the machine's clock")]
                let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
                Timestamp(since_1970.map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX)))
            }
            Self::Simulated { start, since } => start.after(since.elapsed()),
            #[cfg(test)]
            Self::Set(clock, by) => Timestamp(clock.now().0 + by.load(std::sync::atomic::Ordering::Relaxed)),
            #[cfg(test)]
            Self::Suspended(clock, by) => {
                clock.now().after(Duration::from_millis(by.load(std::sync::atomic::Ordering::Relaxed)))
            }
        }
    }
}

/// Randomness that can be seeded: jitter of retries, ids, the simulator's dice.
#[derive(Clone, Debug)]
pub struct Dice(Arc<Mutex<SmallRng>>);

impl Dice {
    /// Dice that fall the same way for the same seed.
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(SmallRng::seed_from_u64(seed))))
    }

    /// Dice seeded by the operating system.
    #[must_use]
    pub fn random() -> Self {
        Self::seeded(rand::random())
    }

    /// 128 random bits, never all zero in the upper or lower half.
    #[must_use]
    pub fn bits(&self) -> u128 {
        let bits: u128 = self.0.lock().unwrap_or_else(PoisonError::into_inner).random();
        bits | 1 << 64 | 1
    }

    /// A number from 0 (included) to 1 (excluded).
    #[must_use]
    pub fn fraction(&self) -> f64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).random()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timestamp_is_written_as_rfc_3339_with_milliseconds() {
        let at = Timestamp::from_millis(1_700_000_000_123);
        assert_eq!(serde_json::to_string(&at).unwrap(), r#""2023-11-14T22:13:20.123Z""#);
    }

    #[test]
    fn a_timestamp_is_read_from_text_and_from_milliseconds() {
        for text in [r#""2023-11-14T22:13:20.123Z""#, r#""2023-11-15T06:13:20.123+08:00""#, "1700000000123"] {
            assert_eq!(serde_json::from_str::<Timestamp>(text).unwrap().as_millis(), 1_700_000_000_123, "{text}");
        }
    }

    #[test]
    fn what_was_read_can_be_written_and_read_again() {
        for number in ["1700000000123000", "1700000000123000000", "-9223372036854775808", "18446744073709551615"] {
            // Otherwise no reader of the outcome could read it.
            let error = serde_json::from_str::<Timestamp>(number).unwrap_err();
            assert!(!error.to_string().is_empty());
        }
        for number in ["0", "-1", "253402207200000"] {
            let at: Timestamp = serde_json::from_str(number).unwrap();
            let text = serde_json::to_string(&at).unwrap();
            assert_eq!(serde_json::from_str::<Timestamp>(&text).unwrap(), at, "{text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_simulated_clock_moves_with_tokios_time() {
        let clock = Clock::simulated(Timestamp::from_millis(1_000));
        tokio::time::advance(Duration::from_millis(250)).await;
        assert_eq!(clock.now().as_millis(), 1_250);
    }
}
