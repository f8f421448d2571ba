//! Durations as text, such as `90s` or `2h`.

use std::time::Duration;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A duration as it is written in a configuration: `30s`, `1h 30m`, `90days`. humantime makes "2months 29days 2h 52m 48s" of
/// 90 days, which nobody wrote and nobody reads.
#[must_use]
pub fn duration_text(duration: Duration) -> String {
    let days = duration.as_secs() / DAY.as_secs();
    match days {
        2.. if duration == DAY * u32::try_from(days).unwrap_or(0) => format!("{days}days"),
        _ => humantime::format_duration(duration).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_days_stay_days_and_can_be_read_back() {
        let table =
            [(DAY, "1day"), (2 * DAY, "2days"), (90 * DAY, "90days"), (DAY / 8, "3h"), (DAY * 3 / 2, "1day 12h")];
        for (duration, text) in table {
            assert_eq!(duration_text(duration), text);
            assert_eq!(humantime::parse_duration(text), Ok(duration));
        }
    }
}
