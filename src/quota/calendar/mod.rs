//! `[[calendar]]`: planned windows in which a source is called at a share of its pace, or its express lane has another
//! share of the calls. Pure but for [`follow`].
//!
//! Every worker follows the calendar of its own configuration and tells the quota ([`Quota::set_pace`]), which counts it
//! once however many tell it. It says so again each minute, also that there is no window: so a Redis that has lost its
//! state, or a window that was taken out of the configuration, is right again within one.

use std::{collections::BTreeSet, convert::Infallible, fmt, time::Duration};

use jiff::{civil, tz::TimeZone};
use serde::{Deserialize, Serialize};
use tracing::info;

use super::{PaceBy, Quota, Scope, Share};
use crate::{
    message::SourceName,
    runtime::clock::{Clock, Timestamp},
};

/// A planned window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub struct Window {
    written: Written,
    zone: TimeZone,
    when: When,
}

#[derive(Clone, Debug, PartialEq)]
enum When {
    /// Once.
    Between(jiff::Timestamp, jiff::Timestamp),
    /// On each of these days; up to the next day if it ends before it begins.
    Daily { days: BTreeSet<Day>, from: civil::Time, to: civil::Time },
}

/// As it stands in a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    /// What logs and `weir check` call it.
    name: String,
    /// For which sources; none = all.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    sources: BTreeSet<SourceName>,
    /// A date and time, or a time of each day.
    from: String,
    to: String,
    /// On which days it begins, if it comes again; none = every day.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    days: BTreeSet<Day>,
    /// In which zone the times are meant, such as `Asia/Shanghai` or `+08:00`; UTC if nobody says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    zone: Option<String>,
    /// The share of the pace; all of it if nobody says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pace: Option<Share>,
    /// The share of the calls that the express lane may have; the source's own if nobody says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    express_share: Option<Share>,
}

/// A day of the week.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "they say it themselves")]
pub enum Day {
    Mon,
    Tue,
    Wed,
    Thu,
    Fri,
    Sat,
    Sun,
}

impl Day {
    fn of(date: civil::Date) -> Self {
        use jiff::civil::Weekday;
        match date.weekday() {
            Weekday::Monday => Self::Mon,
            Weekday::Tuesday => Self::Tue,
            Weekday::Wednesday => Self::Wed,
            Weekday::Thursday => Self::Thu,
            Weekday::Friday => Self::Fri,
            Weekday::Saturday => Self::Sat,
            Weekday::Sunday => Self::Sun,
        }
    }
}

/// Why a window makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidWindow {
    /// Neither a date and time nor a time.
    #[error(
        "calendar {name:?}: {key} is {found:?}; give both as dates and times (\"2026-11-11T00:00\"), or both as times of a day (\"20:00\")"
    )]
    Time {
        /// Which window.
        name: String,
        /// Which key.
        key: &'static str,
        /// What was given.
        found: String,
    },
    /// It is over before it begins.
    #[error("calendar {name:?}: to is {to:?}, which is not after from, {from:?}")]
    Empty {
        /// Which window.
        name: String,
        /// What was given.
        from: String,
        /// What was given.
        to: String,
    },
    /// Days, for something that comes once.
    #[error("calendar {name:?}: days are for windows that come again: give from and to as times (\"20:00\")")]
    Days {
        /// Which window.
        name: String,
    },
    /// A window that changes nothing.
    #[error("calendar {name:?}: it changes nothing; give pace, express_share, or both (0.5 is half)")]
    Nothing {
        /// Which window.
        name: String,
    },
    /// No zone of that name.
    #[error("calendar {name:?}: zone is {found:?}; give a name like \"Asia/Shanghai\" or an offset like \"+08:00\"")]
    Zone {
        /// Which window.
        name: String,
        /// What was given.
        found: String,
    },
}

impl TryFrom<Written> for Window {
    type Error = InvalidWindow;

    fn try_from(written: Written) -> Result<Self, InvalidWindow> {
        let zone = zone(&written)?;
        let when = when(&written, &zone)?;
        if written.pace.or(written.express_share).is_none() {
            return Err(InvalidWindow::Nothing { name: written.name });
        }
        Ok(Self { written, zone, when })
    }
}

impl From<Window> for Written {
    fn from(window: Window) -> Self {
        window.written
    }
}

fn zone(written: &Written) -> Result<TimeZone, InvalidWindow> {
    let Some(text) = &written.zone else { return Ok(TimeZone::UTC) };
    let offset = |text: &str| {
        let (sign, rest) = text.split_at_checked(1).filter(|(sign, _)| ["+", "-"].contains(sign))?;
        let (hours, minutes) = rest.split_once(':').unwrap_or((rest, "00"));
        let (hours, minutes): (i32, i32) = (hours.parse().ok()?, minutes.parse().ok()?);
        let seconds = (hours * 60 + minutes) * 60 * if sign == "-" { -1 } else { 1 };
        let is_one = (0..24).contains(&hours) && (0..60).contains(&minutes);
        jiff::tz::Offset::from_seconds(seconds).ok().filter(|_| is_one).map(TimeZone::fixed)
    };
    let zone = offset(text).or_else(|| TimeZone::get(text).ok());
    zone.ok_or_else(|| InvalidWindow::Zone { name: written.name.clone(), found: text.clone() })
}

/// What one end of a window is.
enum End {
    Time(civil::Time),
    Instant(jiff::Timestamp),
}

fn end(text: &str, zone: &TimeZone) -> Option<End> {
    if !text.contains(['T', '-', ' ']) {
        return text.parse().ok().map(End::Time);
    }
    let local = || zone.to_timestamp(text.parse::<civil::DateTime>().ok()?).ok();
    text.parse().ok().or_else(local).map(End::Instant)
}

fn when(written: &Written, zone: &TimeZone) -> Result<When, InvalidWindow> {
    let Written { name, from, to, days, .. } = written;
    let wrong = |key, found: &String| InvalidWindow::Time { name: name.clone(), key, found: found.clone() };
    let begins = end(from, zone).ok_or_else(|| wrong("from", from))?;
    let ends = end(to, zone).ok_or_else(|| wrong("to", to))?;
    let (when, is_empty) = match (begins, ends) {
        (End::Time(from), End::Time(to)) => (When::Daily { days: days.clone(), from, to }, from == to),
        (End::Instant(_), End::Instant(_)) if !days.is_empty() => {
            return Err(InvalidWindow::Days { name: name.clone() });
        }
        (End::Instant(from), End::Instant(to)) => (When::Between(from, to), from >= to),
        (End::Time(_), End::Instant(_)) | (End::Instant(_), End::Time(_)) => return Err(wrong("to", to)),
    };
    let empty = || InvalidWindow::Empty { name: name.clone(), from: from.clone(), to: to.clone() };
    (!is_empty).then_some(when).ok_or_else(empty)
}

impl Window {
    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.written.name
    }

    /// The sources that it names; none = all.
    #[must_use]
    pub const fn sources(&self) -> &BTreeSet<SourceName> {
        &self.written.sources
    }

    /// The share of the pace in it; the whole if it is about the express lane only.
    #[must_use]
    pub fn pace(&self) -> Share {
        self.written.pace.unwrap_or(Share::WHOLE)
    }

    /// The share of the calls that the express lane may have in it, if it says anything of that.
    #[must_use]
    pub const fn express_share(&self) -> Option<Share> {
        self.written.express_share
    }

    /// When it begins and ends: the one that is running at `at`, else the next one, if there will be any.
    #[must_use]
    pub fn occurrence(&self, at: Timestamp) -> Option<(Timestamp, Timestamp)> {
        let at = jiff::Timestamp::from_millisecond(at.as_millis()).ok()?;
        let (begin, end) = match &self.when {
            When::Between(begin, end) => (*begin, *end),
            When::Daily { days, from, to } => self.next_day(at, days, *from, *to)?,
        };
        let stamp = |at: jiff::Timestamp| Timestamp::from_millis(at.as_millisecond());
        (end > at).then(|| (stamp(begin), stamp(end)))
    }

    /// Of the days around `at`, the first whose window has not ended. A time that a change of the clocks leaves out is
    /// moved behind it, as jiff does; a window that is left out altogether does not come that day.
    fn next_day(
        &self,
        at: jiff::Timestamp,
        days: &BTreeSet<Day>,
        from: civil::Time,
        to: civil::Time,
    ) -> Option<(jiff::Timestamp, jiff::Timestamp)> {
        let yesterday = at.to_zoned(self.zone.clone()).date().yesterday().ok()?;
        let mut candidates = yesterday.series(jiff::Span::new().days(1)).take(9);
        candidates.find_map(|date| {
            let last = if to <= from { date.tomorrow().ok()? } else { date };
            let begin = self.zone.to_timestamp(date.to_datetime(from)).ok()?;
            let end = self.zone.to_timestamp(last.to_datetime(to)).ok()?;
            let is_day = days.is_empty() || days.contains(&Day::of(date));
            (is_day && begin < end && end > at).then_some((begin, end))
        })
    }

    fn concerns(&self, source: &SourceName) -> bool {
        self.sources().is_empty() || self.sources().contains(source)
    }

    /// A time as its zone's people read it.
    #[must_use]
    pub fn local(&self, at: Timestamp) -> String {
        let at = jiff::Timestamp::from_millisecond(at.as_millis()).unwrap_or_default();
        at.to_zoned(self.zone.clone()).strftime("%Y-%m-%d %H:%M%:z").to_string()
    }
}

/// `0.5 of the pace, 0.8 for express`
impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pace = self.written.pace.map(|share| format!("{} of the pace", share.get()));
        let express = self.written.express_share.map(|share| format!("{} for express", share.get()));
        f.write_str(&pace.into_iter().chain(express).collect::<Vec<_>>().join(", "))
    }
}

/// What is planned for a source at one time.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// The smallest share of all windows that are open; the whole if none is.
    pub share: Share,
    /// The largest share that an open window gives the express lane, so that what is important comes first; `None` = what
    /// the source itself says.
    pub express_share: Option<Share>,
    /// The windows that are open.
    pub windows: Vec<String>,
    /// When a window opens or closes next, if ever.
    pub changes_at: Option<Timestamp>,
}

/// What is planned for a source at `at`.
#[must_use]
pub fn planned(calendar: &[Window], source: &SourceName, at: Timestamp) -> Planned {
    let mut planned = Planned { share: Share::WHOLE, express_share: None, windows: Vec::new(), changes_at: None };
    for window in calendar.iter().filter(|window| window.concerns(source)) {
        let Some((begin, end)) = window.occurrence(at) else { continue };
        let is_open = begin <= at;
        if is_open {
            planned.share = planned.share.min(window.pace());
            let shares = planned.express_share.into_iter().chain(window.express_share());
            planned.express_share = shares.max_by(|one, other| one.get().total_cmp(&other.get()));
            planned.windows.push(window.name().to_owned());
        }
        let next = if is_open { end } else { begin };
        planned.changes_at = Some(planned.changes_at.map_or(next, |known| known.min(next)));
    }
    planned
}

/// Keeps a source's quota at what is planned, and tells `express` which share its express lane has if a window says so,
/// for as long as it is polled.
///
/// # Cancellation
/// Dropping it leaves the share as it was set last.
pub async fn follow(
    calendar: &[Window],
    source: &SourceName,
    quota: &dyn Quota,
    express: impl Fn(Option<Share>),
    clock: &Clock,
) -> Infallible {
    const AGAIN: Duration = Duration::from_secs(60);
    let mut told = Share::WHOLE;
    loop {
        let now = clock.now();
        let planned = planned(calendar, source, now);
        if planned.share != told {
            let (share, windows) = (planned.share.get(), &planned.windows);
            info!(%source, share, ?windows, until = ?planned.changes_at, "calendar window changed the pace");
            told = planned.share;
        }
        quota.set_pace(Scope::Source, PaceBy::Calendar, planned.share).await;
        express(planned.express_share);
        tokio::time::sleep(planned.changes_at.map_or(AGAIN, |at| at.since(now).min(AGAIN))).await;
    }
}

#[cfg(test)]
mod tests;
