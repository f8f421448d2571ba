//! Parses the times and offsets that users give. Pure.

use std::{collections::BTreeMap, time::Duration};

use crate::runtime::clock::Timestamp;

/// Why a text is neither a time nor a list of offsets.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WhenError {
    /// Not a time.
    #[error(
        "{found:?} is not a time: write an RFC 3339 time (2026-11-20T09:00:00Z), a day (2026-11-20, from midnight UTC), \
         or how long ago (\"2 days ago\", 2d, 90m)"
    )]
    Time {
        /// What was written.
        found: String,
    },
    /// Not an offset.
    #[error("{found:?} is not an offset: write PARTITION:OFFSET, several separated by commas (0:123,1:456)")]
    Offset {
        /// What was written.
        found: String,
    },
    /// A partition that was named twice.
    #[error("partition {partition} is given twice")]
    Twice {
        /// Which.
        partition: i32,
    },
}

/// Where a piece of a topic begins or ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Edge {
    /// With the first record that is not older.
    Time(Timestamp),
    /// With these offsets, by partition. Partitions that are not named are left out.
    Offsets(BTreeMap<i32, i64>),
}

impl Edge {
    /// Whether a piece that begins here and ends there is empty, whatever the topic holds.
    #[must_use]
    pub fn leaves_nothing_before(&self, end: &Self) -> bool {
        match (self, end) {
            (Self::Time(from), Self::Time(to)) => from >= to,
            (Self::Offsets(from), Self::Offsets(to)) => {
                from.iter().all(|(partition, from)| to.get(partition).is_none_or(|to| from >= to))
            }
            _ => false,
        }
    }

    /// Reads a text; `now` is what "ago" counts from.
    ///
    /// # Errors
    /// [`WhenError`] says what can be written.
    pub fn parse(text: &str, now: Timestamp) -> Result<Self, WhenError> {
        let is_offsets =
            text.contains(':') && text.bytes().all(|b| b.is_ascii_digit() || matches!(b, b':' | b',' | b' '));
        if !is_offsets {
            return time(text, now).map(Self::Time);
        }
        let mut offsets = BTreeMap::new();
        for part in text.split(',').map(str::trim) {
            let wrong = || WhenError::Offset { found: part.to_owned() };
            let (partition, offset) = part.split_once(':').ok_or_else(wrong)?;
            let partition = partition.parse().map_err(|_| wrong())?;
            if offsets.insert(partition, offset.parse().map_err(|_| wrong())?).is_some() {
                return Err(WhenError::Twice { partition });
            }
        }
        Ok(Self::Offsets(offsets))
    }
}

/// Reads a time: RFC 3339, a day, or how long before `now`.
///
/// # Errors
/// [`WhenError::Time`]
pub fn time(text: &str, now: Timestamp) -> Result<Timestamp, WhenError> {
    let text = text.trim();
    if let Ok(at) = text.parse::<jiff::Timestamp>() {
        return Ok(Timestamp::from_millis(at.as_millisecond()));
    }
    if let Ok(day) = text.parse::<jiff::civil::Date>()
        && let Ok(midnight) = day.to_zoned(jiff::tz::TimeZone::UTC)
    {
        return Ok(Timestamp::from_millis(midnight.timestamp().as_millisecond()));
    }
    let long = text.strip_suffix("ago").unwrap_or(text).trim();
    let ago: Duration = humantime::parse_duration(long).map_err(|_| WhenError::Time { found: text.to_owned() })?;
    let ago = i64::try_from(ago.as_millis()).unwrap_or(i64::MAX);
    Ok(Timestamp::from_millis(now.as_millis().saturating_sub(ago)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-11-20T12:00:00Z
    const NOW: Timestamp = Timestamp::from_millis(1_795_176_000_000);

    fn parse(text: &str) -> Result<Edge, WhenError> {
        Edge::parse(text, NOW)
    }

    #[test]
    fn a_time_may_be_written_in_several_ways() {
        let hours_ago = |hours: i64| Ok(Edge::Time(Timestamp::from_millis(NOW.as_millis() - hours * 3_600_000)));
        for (text, hours) in [
            ("2026-11-20T09:00:00Z", 3),
            ("2026-11-20T10:00:00.000+01:00", 3),
            ("2026-11-20", 12),
            ("2 days ago", 48),
            ("2d", 48),
            ("90m ago", 1),
            ("1h 30m", 1),
        ] {
            let shift = if text.contains("90m") || text.contains("30m") { 30 * 60_000 } else { 0 };
            let expected = hours_ago(hours).map(|edge| match edge {
                Edge::Time(at) => Edge::Time(Timestamp::from_millis(at.as_millis() - shift)),
                offsets @ Edge::Offsets(_) => offsets,
            });
            assert_eq!(parse(text), expected, "{text}");
        }
    }

    #[test]
    fn offsets_are_by_partition() {
        assert_eq!(parse("0:123"), Ok(Edge::Offsets(BTreeMap::from([(0, 123)]))));
        assert_eq!(parse("0:123, 7:0"), Ok(Edge::Offsets(BTreeMap::from([(0, 123), (7, 0)]))));
        assert_eq!(parse("0:1,0:2"), Err(WhenError::Twice { partition: 0 }));
        for text in ["0:", ":5", "0:1,", "1:2:3", "99999999999:1"] {
            assert!(matches!(parse(text), Err(WhenError::Offset { .. })), "{text}: {:?}", parse(text));
        }
    }

    #[test]
    fn a_piece_that_ends_before_it_begins_is_known_to_be_empty() {
        let empty = |from: &str, to: &str| parse(from).unwrap().leaves_nothing_before(&parse(to).unwrap());
        for (from, to) in [("1h", "2h"), ("1h", "1h"), ("0:5", "0:5"), ("0:5", "1:9"), ("0:5,1:2", "0:4,1:2")] {
            assert!(empty(from, to), "{from} to {to}");
        }
        for (from, to) in [("2h", "1h"), ("0:5", "0:6"), ("0:5,1:2", "0:4,1:3"), ("2h", "0:1"), ("0:1", "2h")] {
            assert!(!empty(from, to), "{from} to {to}");
        }
    }

    #[test]
    fn what_is_neither_says_what_can_be_written() {
        for text in ["", "yesterday", "2026-13-01", "2 fortnights ago", "-2d", "12"] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains("days ago") || error.contains("PARTITION"), "{text}: {error}");
        }
    }
}
