//! Windows that follow a calendar: days, weeks and months of a time zone, across its changes of the clocks. Pure.
//!
//! A length of time divides into windows by a division. A day of a zone has 23, 24 or 25 hours and a month from 28 to 31
//! days, so their windows are counted by the calendar: window n begins n days (or months) after the first by the clock on
//! the wall. What the clocks leave out is moved behind it; of what comes twice the first counts.
//!
//! Lua knows no zones. [`Calendar::steps`] gives it the same windows as a few stretches in which all are of one length.

use std::{fmt, ops::Deref, time::Duration};

use jiff::{
    Span, Zoned,
    civil::DateTime,
    tz::{Offset, TimeZone},
};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::micros::{Micros, micros};
use crate::runtime::{clock::Timestamp, duration_text::duration_text};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// The time of a limit: a length (`"1s"`, `"1day"`), or months of the calendar (`"1month"`, `"1year"`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Per {
    length: Duration,
    months: u32,
}

impl Per {
    /// A length of time.
    #[must_use]
    pub const fn of(length: Duration) -> Self {
        Self { length, months: 0 }
    }

    /// So many months; the length is that of the longest.
    #[must_use]
    pub fn of_months(months: u32) -> Self {
        // No twelve months have more.
        let days = if months == 12 { 366 } else { months.saturating_mul(31) };
        Self { length: DAY * days, months }
    }

    /// How many months of the calendar it is; 0 = it is a length of time.
    #[must_use]
    pub const fn months(self) -> u32 {
        self.months
    }

    fn parse(text: &str) -> Result<Self, String> {
        let length = humantime::parse_duration(text).map_err(|error| error.to_string())?;
        let units: Vec<&str> =
            text.split(|letter: char| !letter.is_ascii_alphabetic()).filter(|unit| !unit.is_empty()).collect();
        let months_of = |unit: &str| match unit {
            "month" | "months" | "M" => Some(1),
            "year" | "years" | "yr" | "yrs" | "y" => Some(12),
            _ => None,
        };
        let Some(each) = units.iter().find_map(|unit| months_of(unit)) else { return Ok(Self::of(length)) };
        let number: String = text.chars().filter(char::is_ascii_digit).collect();
        let months = number.parse::<u32>().ok().and_then(|number| number.checked_mul(each));
        match months.filter(|months| units.len() == 1 && (1..=12).contains(months)) {
            Some(months) => Ok(Self::of_months(months)),
            None => Err(format!("{text:?} is neither a length of time nor 1 to 12 whole months")),
        }
    }
}

impl From<Duration> for Per {
    fn from(length: Duration) -> Self {
        Self::of(length)
    }
}

impl Deref for Per {
    type Target = Duration;

    /// The length; of months that of the longest.
    fn deref(&self) -> &Duration {
        &self.length
    }
}

impl fmt::Display for Per {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.months {
            0 => f.write_str(&duration_text(self.length)),
            12 => f.write_str("1year"),
            1 => f.write_str("1month"),
            months => write!(f, "{months}months"),
        }
    }
}

impl Serialize for Per {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Per {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Per;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a duration")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Per, E> {
                Per::parse(text).map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_str(Visitor)
    }
}

/// A time at which a window begins, and the clock on the wall by which the others do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartsAt {
    at: Timestamp,
    zone: TimeZone,
}

impl From<Timestamp> for StartsAt {
    fn from(at: Timestamp) -> Self {
        Self { at, zone: TimeZone::UTC }
    }
}

impl Default for StartsAt {
    fn default() -> Self {
        Timestamp::default().into()
    }
}

impl StartsAt {
    /// The time.
    #[must_use]
    pub const fn at(&self) -> Timestamp {
        self.at
    }

    /// Whether its clocks may change: it names a zone, and not only an offset.
    #[must_use]
    pub fn follows_a_zone(&self) -> bool {
        self.zone.to_fixed_offset().is_err()
    }

    fn zoned(&self) -> Zoned {
        jiff::Timestamp::from_millisecond(self.at.as_millis()).unwrap_or_default().to_zoned(self.zone.clone())
    }

    fn parse(text: &str) -> Result<Self, jiff::Error> {
        let stamp = |at: jiff::Timestamp| Timestamp::from_millis(at.as_millisecond());
        if text.contains('[') {
            let zoned: Zoned = text.parse()?;
            return Ok(Self { at: stamp(zoned.timestamp()), zone: zoned.time_zone().clone() });
        }
        let at: jiff::Timestamp = text.parse()?;
        let pieces = jiff::fmt::temporal::Pieces::parse(text)?;
        let offset = pieces.to_numeric_offset().unwrap_or(Offset::UTC);
        Ok(Self { at: stamp(at), zone: TimeZone::fixed(offset) })
    }
}

/// `2026-01-01T00:00:00-08:00[America/Los_Angeles]`
impl fmt::Display for StartsAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let zoned = self.zoned();
        if self.follows_a_zone() {
            return zoned.fmt(f);
        }
        let format = if zoned.offset() == Offset::UTC { "%Y-%m-%dT%H:%M:%S%.fZ" } else { "%Y-%m-%dT%H:%M:%S%.f%:z" };
        zoned.strftime(format).fmt(f)
    }
}

impl Serialize for StartsAt {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for StartsAt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = StartsAt;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a time such as \"2026-01-01T00:00:00-08:00[America/Los_Angeles]\" or \"2026-01-01T00:00:00+08:00\"")
            }

            fn visit_i64<E: de::Error>(self, millis: i64) -> Result<StartsAt, E> {
                let in_range = jiff::Timestamp::from_millisecond(millis).map(|_| Timestamp::from_millis(millis).into());
                in_range.map_err(E::custom)
            }

            fn visit_u64<E: de::Error>(self, millis: u64) -> Result<StartsAt, E> {
                self.visit_i64(i64::try_from(millis).map_err(E::custom)?)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<StartsAt, E> {
                // An unknown zone is named by jiff.
                StartsAt::parse(text).map_err(|error| E::custom(format!("{text:?} is no such time: {error}")))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// How long a window of a calendar is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Length {
    Days(i64),
    Months(i64),
}

/// Windows of a calendar, numbered from 1970 on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calendar {
    first: DateTime,
    zone: TimeZone,
    length: Length,
    /// What the window that has the number [`Self::PAD`] is counted from the first; so no number is below zero.
    base: i64,
    name: String,
}

impl Calendar {
    /// So the end of each window is less than its number and one times its [`Self::width`], whatever the zone.
    const PAD: i64 = 4;

    /// Windows of so long, of which one begins then; `None` if they are all of one length of time, or no whole days: then
    /// no calendar is needed, or none is of use.
    #[must_use]
    pub fn new(per: Per, starts_at: &StartsAt) -> Option<Self> {
        let length = match per.months() {
            0 if !starts_at.follows_a_zone() || !is_whole_days(per) => return None,
            0 => Length::Days(i64::try_from(per.as_secs() / DAY.as_secs()).ok()?),
            months => Length::Months(months.into()),
        };
        let name = format!("{per} from {starts_at}");
        let mut calendar =
            Self { first: starts_at.zoned().datetime(), zone: starts_at.zone.clone(), length, base: 0, name };
        calendar.base = calendar.count(0);
        Some(calendar)
    }

    /// What it is called in records and in Redis: two of one name are the same.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The length of the longest window, but for an hour that is there twice.
    #[must_use]
    pub fn width(&self) -> Micros {
        let days = match self.length {
            Length::Days(days) => days,
            Length::Months(months) => 31 * months,
        };
        micros(DAY).saturating_mul(u64::try_from(days).unwrap_or_default())
    }

    /// The number of the window that a time is in.
    #[must_use]
    pub fn number(&self, at: Micros) -> u64 {
        u64::try_from(self.count(at) - self.base + Self::PAD).unwrap_or_default()
    }

    /// When the window of a number begins.
    #[must_use]
    pub fn begin(&self, number: u64) -> Micros {
        let count = i64::try_from(number).unwrap_or(i64::MAX).saturating_add(self.base - Self::PAD);
        self.begin_of(count).unwrap_or(Micros::MAX / 2)
    }

    /// When a window begins, counted from the first; zero before 1970, `None` beyond the year 9999.
    fn begin_of(&self, count: i64) -> Option<Micros> {
        let span = match self.length {
            Length::Days(days) => Span::new().try_days(count.checked_mul(days)?),
            Length::Months(months) => Span::new().try_months(count.checked_mul(months)?),
        };
        let begin = self.zone.to_timestamp(self.first.checked_add(span.ok()?).ok()?).ok()?;
        Some(u64::try_from(begin.as_microsecond()).unwrap_or_default())
    }

    /// The window that a time is in, counted from the first.
    fn count(&self, at: Micros) -> i64 {
        let at = at.min(Micros::MAX / 2);
        let time = i64::try_from(at).ok().and_then(|at| jiff::Timestamp::from_microsecond(at).ok());
        let local = self.zone.to_datetime(time.unwrap_or(jiff::Timestamp::MAX));
        let guess = match self.length {
            Length::Days(days) => i64::from((local.date() - self.first.date()).get_days()).div_euclid(days),
            Length::Months(months) => {
                let month = |date: DateTime| i64::from(date.year()) * 12 + i64::from(date.month());
                (month(local) - month(self.first)).div_euclid(months)
            }
        };
        // By the time of day, or by the day of the month, it may be the one before; where clocks change, the one after.
        let has_begun = |count: i64| self.begin_of(count).is_some_and(|begin| begin <= at);
        (guess - 2..=guess + 1).rev().find(|count| has_begun(*count)).unwrap_or(guess)
    }

    /// The windows from one time to another, for who cannot count by a calendar: stretches of windows of one length, each as
    /// the number of its first, when that begins, and the length. The last one goes on for ever.
    #[must_use]
    pub fn steps(&self, from: Micros, until: Micros) -> Vec<[u64; 3]> {
        let mut steps: Vec<[u64; 3]> = Vec::new();
        let (mut number, mut begin) = (self.number(from), self.begin(self.number(from)));
        while begin <= until || steps.is_empty() {
            let end = self.begin(number + 1);
            let length = end.saturating_sub(begin).max(1);
            if steps.last().is_none_or(|last| last[2] != length) {
                steps.push([number, begin, length]);
            }
            (number, begin) = (number + 1, end);
        }
        steps
    }
}

/// Whether it is made of whole days.
#[must_use]
pub fn is_whole_days(per: Per) -> bool {
    per.months() > 0 || (*per >= DAY && per.subsec_nanos() == 0 && per.as_secs().is_multiple_of(DAY.as_secs()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(text: &str) -> Micros {
        u64::try_from(text.parse::<jiff::Timestamp>().unwrap().as_microsecond()).unwrap()
    }

    fn calendar(per: &str, starts_at: &str) -> Calendar {
        let per = serde_json::from_value(per.into()).unwrap();
        Calendar::new(per, &serde_json::from_value(starts_at.into()).unwrap()).unwrap()
    }

    /// When the windows begin after a time.
    fn begins(calendar: &Calendar, from: &str, count: u64) -> Vec<String> {
        let number = calendar.number(at(from));
        let stamp = |number| i64::try_from(calendar.begin(number)).unwrap();
        (1..=count).map(|n| jiff::Timestamp::from_microsecond(stamp(number + n)).unwrap().to_string()).collect()
    }

    #[test]
    fn a_day_of_a_zone_begins_at_its_midnight_across_changes_of_the_clocks() {
        let day = calendar("1day", "2026-01-01T00:00:00-08:00[America/Los_Angeles]");
        let spring = ["2026-03-08T08:00:00Z", "2026-03-09T07:00:00Z", "2026-03-10T07:00:00Z"];
        assert_eq!(begins(&day, "2026-03-07T12:00:00Z", 3), spring);
        let autumn = ["2026-11-01T07:00:00Z", "2026-11-02T08:00:00Z"];
        assert_eq!(begins(&day, "2026-10-31T12:00:00Z", 2), autumn);
        // Clocks that go back at midnight have two of them, and those that go forward have none.
        let havana = calendar("1day", "2026-01-01T00:00:00-05:00[America/Havana]");
        assert_eq!(begins(&havana, "2026-10-31T12:00:00Z", 2), ["2026-11-01T04:00:00Z", "2026-11-02T05:00:00Z"]);
        assert_eq!(begins(&havana, "2026-03-07T12:00:00Z", 2), ["2026-03-08T05:00:00Z", "2026-03-09T04:00:00Z"]);
    }

    #[test]
    fn a_week_and_a_month_are_those_of_the_calendar() {
        let week = calendar("1week", "2026-03-02T06:30:00+01:00[Europe/Berlin]");
        assert_eq!(begins(&week, "2026-03-24T00:00:00Z", 2), ["2026-03-30T04:30:00Z", "2026-04-06T04:30:00Z"]);
        let month = calendar("1month", "2026-01-01T00:00:00+08:00");
        let expected = ["2026-01-31T16:00:00Z", "2026-02-28T16:00:00Z", "2026-03-31T16:00:00Z"];
        assert_eq!(begins(&month, "2026-01-20T00:00:00Z", 3), expected);
        assert_eq!(begins(&month, "2023-12-31T15:59:59Z", 1), ["2023-12-31T16:00:00Z"], "before the first, too");
        let last = calendar("1month", "2026-01-31T00:00:00Z");
        let expected = ["2026-02-28T00:00:00Z", "2026-03-31T00:00:00Z", "2026-04-30T00:00:00Z"];
        assert_eq!(begins(&last, "2026-02-01T00:00:00Z", 3), expected, "a month without a 31st");
        let year = calendar("1year", "2024-07-01T00:00:00Z");
        assert_eq!(begins(&year, "2026-02-01T00:00:00Z", 1), ["2026-07-01T00:00:00Z"]);
    }

    #[test]
    fn what_is_of_one_length_needs_no_calendar() {
        let new = |per: &str, starts_at: serde_json::Value| {
            let per = serde_json::from_value(per.into()).unwrap();
            Calendar::new(per, &serde_json::from_value(starts_at).unwrap())
        };
        assert_eq!(new("1day", "2026-01-01T00:00:00+08:00".into()), None);
        assert_eq!(new("1day", 0.into()), None);
        assert_eq!(new("1day", "2026-01-01T00:00:00+00:00[UTC]".into()), None);
        assert_eq!(new("1h", "2026-01-01T00:00:00+01:00[Europe/Berlin]".into()), None);
    }

    #[test]
    fn times_and_zones_are_read_and_written_as_people_write_them() {
        let again = |text: &str| {
            let read: StartsAt = serde_json::from_value(text.into()).unwrap();
            assert_eq!(serde_json::from_value::<StartsAt>(read.to_string().into()).unwrap(), read);
            (read.at().to_string(), read.to_string(), read.follows_a_zone())
        };
        let table = [
            ("2026-07-01T00:00:00-07:00[America/Los_Angeles]", "2026-07-01T07:00:00.000Z", true),
            ("2026-01-01T00:00:00+08:00", "2025-12-31T16:00:00.000Z", false),
            ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00.000Z", false),
        ];
        for (text, time, follows) in table {
            assert_eq!(again(text), (time.to_owned(), text.to_owned(), follows));
        }
        for wrong in
            ["2026-01-01T00:00:00[Mars/Olympus]", "2026-01-01T00:00:00-07:00[Europe/Berlin]", "noon", "2026-01-01"]
        {
            let error = serde_json::from_value::<StartsAt>(wrong.into()).unwrap_err().to_string();
            assert!(error.contains(wrong), "{error}");
        }
    }

    #[test]
    fn months_are_months_and_everything_else_is_a_length() {
        let read = |text: &str| serde_json::from_value::<Per>(text.into());
        for (text, months) in [("1month", 1), ("1M", 1), ("3 months", 3), ("1year", 12), ("1y", 12)] {
            let per = read(text).unwrap();
            assert_eq!(per.months(), months, "{text}");
            assert_eq!(read(&per.to_string()).unwrap(), per);
        }
        for (text, secs) in [("1m", 60), ("1day", 86_400), ("1week", 604_800), ("1h 30m", 5_400)] {
            let per = read(text).unwrap();
            assert_eq!((per.months(), per.as_secs()), (0, secs), "{text}");
            assert_eq!(read(&per.to_string()).unwrap(), per);
        }
        for wrong in ["1month 3days", "13months", "2years", "often"] {
            assert!(read(wrong).unwrap_err().to_string().contains("expected a duration"), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn every_time_is_in_its_window_and_the_steps_say_the_same(
            zone in prop::sample::select(vec!["America/Los_Angeles", "Asia/Shanghai", "Europe/Berlin", "America/Havana",
                "Australia/Lord_Howe", "Pacific/Apia", "Africa/Casablanca", "America/Sao_Paulo", "Asia/Kathmandu"]),
            per in prop::sample::select(vec!["1day", "1week", "2days", "1month", "3months", "1year"]),
            (day, hour) in (1u32..=31, 0u32..24), year in 1980u32..2030,
            from in 0u64..1_900_000_000, after in prop::collection::vec(0u64..100_000_000_000_000, 20),
        ) {
            let starts_at = format!("{year}-01-{day:02}T{hour:02}:00:00[{zone}]");
            let calendar = calendar(per, &starts_at);
            let from = from * 1_000_000;
            let until = from + 100_000_000_000_000;
            let steps = calendar.steps(from, until);
            for at in after.iter().map(|after| from + after).chain([from, until]) {
                let number = calendar.number(at);
                let (begin, end) = (calendar.begin(number), calendar.begin(number + 1));
                prop_assert!(begin <= at && at < end, "{} {} {} {}", at, number, begin, end);
                prop_assert!(end <= (number + 1) * calendar.width());
                let step = steps.iter().rfind(|step| step[1] <= at).unwrap();
                prop_assert_eq!(step[0] + (at - step[1]) / step[2], number);
                let step = steps.iter().rfind(|step| step[0] <= number).unwrap();
                prop_assert_eq!(step[1] + (number - step[0]) * step[2], begin);
            }
        }
    }
}
