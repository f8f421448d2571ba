//! What the headers of a vendor's reply say about its limits: `Retry-After`, `RateLimit`, `X-RateLimit-*`. Pure.
//!
//! None of the vendors that weir speaks to is documented to send any of them (`vendors.md`, section D); gateways in
//! front of many an API do. They are help, never a licence: they only ever make weir wait, and what is malformed or
//! says nothing about a wait is ignored.

use std::time::Duration;

use super::{
    headers::Headers,
    structured::{self, Member},
};
use crate::runtime::clock::Timestamp;

/// What a reply's headers ask for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hint {
    /// Stay away for so long: `Retry-After` (RFC 9110, 10.2.3).
    pub retry_after: Option<Duration>,
    /// Nothing is left of a quota, and more comes after so long: `RateLimit` with `r=0` (IETF
    /// draft-ietf-httpapi-ratelimit-headers-11), or the older `-Remaining: 0` with a `-Reset`.
    pub used_up: Option<Duration>,
}

impl Hint {
    /// The longest time that a header is believed: a day's quota is back by then.
    pub const MAX: Duration = Duration::from_secs(24 * 60 * 60);

    /// Reads the headers; `now` is the time on the sender's clock.
    #[must_use]
    pub fn read(headers: &Headers, now: Timestamp) -> Self {
        let header = |name| headers.get(name);
        let retry_after = header("retry-after").and_then(|value| longest(&value, now, false));
        let listed = header("ratelimit").and_then(|value| of_list(&value, header("ratelimit-policy").as_deref()));
        let plain = [
            ("ratelimit-remaining", "ratelimit-reset"),
            ("x-ratelimit-remaining", "x-ratelimit-reset"),
            ("x-rate-limit-remaining", "x-rate-limit-reset"),
        ];
        let plain =
            plain.into_iter().filter_map(|(remaining, reset)| used_up(&header(remaining)?, &header(reset)?, now));
        Self { retry_after, used_up: listed.into_iter().chain(plain).max() }
    }

    /// How long whoever was refused has to wait: `Retry-After` overrides the others.
    #[must_use]
    pub fn wait(&self) -> Option<Duration> {
        self.retry_after.or(self.used_up)
    }
}

/// The longest wait of a field that may have several lines, or a list: all that can be read in it. Dates have a comma of
/// their own.
fn longest(field: &str, now: Timestamp, may_be_epoch: bool) -> Option<Duration> {
    let mut parts = field.split(',').peekable();
    let mut waits = Vec::new();
    while let Some(part) = parts.next() {
        let is_weekday = part.trim().len() >= 3 && part.trim().bytes().all(|byte| byte.is_ascii_alphabetic());
        let dated = if is_weekday { parts.next_if(|next| !next.trim().is_empty()) } else { None };
        let text = dated.map_or_else(|| part.to_owned(), |rest| format!("{part},{rest}"));
        waits.extend(wait(&text, now, may_be_epoch));
    }
    waits.into_iter().max()
}

/// When there is more of quotas of which these are left: lists say in the same order when each begins anew.
fn used_up(remaining: &str, reset: &str, now: Timestamp) -> Option<Duration> {
    let remaining: Vec<_> = remaining.split(',').map(number).collect();
    let resets: Vec<_> = reset.split(',').collect();
    if resets.len() != remaining.len() {
        return remaining.contains(&Some(0)).then(|| longest(reset, now, true)).flatten();
    }
    let both = remaining.iter().zip(resets).filter(|(remaining, _)| **remaining == Some(0));
    both.filter_map(|(_, reset)| wait(reset, now, true)).max()
}

/// The longest wait among the quotas of a `RateLimit` field that are used up. A field that is malformed anywhere is
/// ignored as a whole, as RFC 9651 has it.
fn of_list(field: &str, policies: Option<&str>) -> Option<Duration> {
    let members = structured::members(field)?;
    // How many calls may be under way: nothing is gained by waiting.
    let policies = policies.and_then(structured::members).unwrap_or_default();
    let is_of_time = |name: &str| {
        let policy = policies.iter().find(|policy| policy.name == name);
        policy.is_none_or(|policy| policy.text("qu") != Some("concurrent-requests"))
    };
    let used_up = members
        .iter()
        .filter(|member| member.integer("r") == Some(0) && is_of_time(&member.name))
        .filter_map(|member| believed(u64::try_from(member.integer("t")?).ok()?));
    // Draft 7 had a dictionary: `limit=100, remaining=0, reset=30`.
    let named = |name: &str| members.iter().find(|member| member.name == name).and_then(Member::own_integer);
    let older = (named("remaining") == Some(0)).then(|| named("reset")).flatten();
    let older = older.and_then(|reset| believed(u64::try_from(reset).ok()?));
    used_up.chain(older).max()
}

/// What is below this is a number of seconds from now, what is above a time of day: in seconds, and by factors of
/// a thousand in milliseconds, microseconds and nanoseconds. No standard says which; nobody waits 30 years.
const EPOCH_FROM: u64 = 1_000_000_000;

/// The time from `now` that a value asks for: seconds, or a date; and for a `-Reset` also a number since 1970.
///
/// Nothing if it is garbage, zero or in the past: the caller then waits by its own rule.
fn wait(value: &str, now: Timestamp, may_be_epoch: bool) -> Option<Duration> {
    let value = value.trim();
    let Some(number) = number(value) else {
        let wait = with_units(value).or_else(|| Some(date(value)?.since(now)))?;
        return (!wait.is_zero()).then(|| wait.min(Hint::MAX));
    };
    if !may_be_epoch || number < EPOCH_FROM {
        return believed(number);
    }
    let exponent = (number / EPOCH_FROM).ilog10() / 3;
    let millis = match exponent {
        0 => number.saturating_mul(1_000),
        _ => number / 1_000_u64.pow(exponent - 1),
    };
    let wait = Timestamp::from_millis(i64::try_from(millis).ok()?).since(now);
    (!wait.is_zero()).then(|| wait.min(Hint::MAX))
}

fn believed(seconds: u64) -> Option<Duration> {
    (seconds > 0).then(|| Duration::from_secs(seconds).min(Hint::MAX))
}

/// A whole number; a fraction, which some send, rounds up. One that does not fit is the largest.
fn number(value: &str) -> Option<u64> {
    let value = value.trim();
    let (whole, fraction) = value.split_once('.').unwrap_or((value, "0"));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number(whole) || !is_number(fraction) {
        return None;
    }
    let up = u64::from(fraction.bytes().any(|digit| digit != b'0'));
    Some(whole.parse::<u64>().map_or(u64::MAX, |whole| whole.saturating_add(up)))
}

/// A time with its units, as `20s`, `20000ms`, `1.5 min` or `6m0s`.
fn with_units(value: &str) -> Option<Duration> {
    let mut rest = value.trim();
    let mut millis = 0.0;
    while !rest.is_empty() {
        let (figure, after) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit() && c != '.')?);
        let after = after.trim_start();
        let (unit, after) = after.split_at(after.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(after.len()));
        number(figure)?;
        let unit = match unit.to_ascii_lowercase().as_str() {
            "ms" | "msec" | "msecs" | "millis" | "millisecond" | "milliseconds" => 1.0,
            "s" | "sec" | "secs" | "second" | "seconds" => 1_000.0,
            "m" | "min" | "mins" | "minute" | "minutes" => 60_000.0,
            "h" | "hr" | "hrs" | "hour" | "hours" => 3_600_000.0,
            "d" | "day" | "days" => 86_400_000.0,
            _ => return None,
        };
        millis += figure.parse::<f64>().ok()? * unit;
        rest = after.trim_start();
    }
    // The cast saturates, and rounds up what is less than a millisecond.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "digits alone: never negative")]
    let millis = millis.ceil() as u64;
    (millis > 0).then(|| Duration::from_millis(millis))
}

/// A date in the form of today, in one of the two older ones that RFC 9110 has recipients accept, or in RFC 3339's.
#[must_use]
pub fn date(text: &str) -> Option<Timestamp> {
    let older = || {
        let formats = ["%A, %d-%b-%y %H:%M:%S GMT", "%a %b %e %H:%M:%S %Y"];
        let civil = formats.iter().find_map(|format| jiff::civil::DateTime::strptime(format, text).ok())?;
        Some(civil.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp())
    };
    let at = jiff::fmt::rfc2822::parse(text).ok().map(|at| at.timestamp());
    let at = at.or_else(older).or_else(|| text.parse().ok())?;
    Some(Timestamp::from_millis(at.as_millisecond()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Sun, 06 Nov 1994 08:49:37 GMT
    const NOW: Timestamp = Timestamp::from_millis(784_111_777_000);

    fn read_at(headers: &[(&str, &str)], now: Timestamp) -> Hint {
        Hint::read(&Headers::new(headers.iter().copied()), now)
    }

    fn seconds(wait: Option<Duration>) -> Option<u64> {
        wait.map(|wait| wait.as_secs() + u64::from(wait.subsec_nanos() > 0))
    }

    #[test]
    fn retry_after_is_believed_within_reason() {
        let table = [
            ("120", Some(120)),
            (" 120 ", Some(120)),
            ("0", None),
            ("", None),
            ("-5", None),
            ("1.5", Some(2)),
            ("1.", None),
            ("soon", None),
            ("1e3", None),
            ("86401", Some(86_400)),
            ("1700000000", Some(86_400)),
            ("99999999999999999999999", Some(86_400)),
            ("Sun, 06 Nov 1994 08:50:37 GMT", Some(60)),
            ("Sunday, 06-Nov-94 08:50:37 GMT", Some(60)),
            ("Sun Nov  6 08:50:37 1994", Some(60)),
            ("1994-11-06T08:50:37Z", Some(60)),
            ("Sun, 06 Nov 1994 08:49:37 GMT", None),
            ("20, 23", Some(23)),
            ("23, 20", Some(23)),
            ("20, soon", Some(20)),
            ("20s", Some(20)),
            ("20 seconds", Some(20)),
            ("20000ms", Some(20)),
            ("1.5 min", Some(90)),
            ("1h30m", Some(5_400)),
            ("6m0s, 20", Some(360)),
            ("999999999999h", Some(86_400)),
            ("20 fortnights", None),
            ("0s", None),
            ("s", None),
            ("1..5s", None),
            ("30, Sun, 06 Nov 1994 08:50:37 GMT, 40", Some(60)),
            ("Sun, 06 Nov 1994 08:50:37 GMT, Sun, 06 Nov 1994 08:51:37 GMT", Some(120)),
            ("Sat, 06 Nov 1993 08:49:37 GMT", None),
            ("Mon, 06 Nov 1994 08:50:37 GMT", None),
            ("Thu, 06 Nov 2994 08:49:37 GMT", Some(86_400)),
        ];
        for (value, expected) in table {
            assert_eq!(seconds(read_at(&[("Retry-After", value)], NOW).retry_after), expected, "{value:?}");
        }
    }

    #[test]
    fn a_quota_that_is_used_up_says_when_there_is_more() {
        let table = [
            (r#""default";r=0;t=30"#, Some(30)),
            (r#""default";r=50;t=30"#, None),
            (r#""burst";r=0;t=1, "daily";r=0;t=3600,"hour";r=7;t=9000"#, Some(3_600)),
            (r#""default"; t=30 ;r=0"#, None),
            (r#""default";t=30;r=0;pk=:YWJj:;x="a;r=1";y"#, Some(30)),
            (r#""de\"fault";r=0;t=30"#, Some(30)),
            (r#""default";r=0"#, None),
            (r#""default";r=0;t=0"#, None),
            (r#""default";r=0;t=-30"#, None),
            (r#""default";r=-1;t=30"#, None),
            (r#""default";r=0.0;t=30"#, None),
            (r#""default";r=0;t=999999999999999"#, Some(86_400)),
            (r#""default";r=0;t=9999999999999999"#, None),
            (r#""default";r=0;t=30,"#, None),
            (r#""default;r=0;t=30"#, None),
            ("limit=100, remaining=0, reset=30", Some(30)),
            ("limit=100, remaining=1, reset=30", None),
            ("limit=100, remaining=0", None),
            ("0", None),
            ("", None),
        ];
        for (field, expected) in table {
            assert_eq!(seconds(read_at(&[("RateLimit", field)], NOW).used_up), expected, "{field}");
        }
    }

    #[test]
    fn a_cap_on_calls_under_way_is_no_reason_to_wait() {
        let field = ("RateLimit", r#""lanes";r=0;t=30, "burst";r=0;t=2"#);
        let policy = ("RateLimit-Policy", r#""lanes";q=5;qu="concurrent-requests", "burst";q=10;w=5"#);
        assert_eq!(seconds(read_at(&[field, policy], NOW).used_up), Some(2));
        assert_eq!(seconds(read_at(&[field, ("RateLimit-Policy", "\"")], NOW).used_up), Some(30), "a broken policy");
    }

    #[test]
    fn the_older_headers_may_be_lists_and_have_units() {
        let table = [
            ("0, 5", "30, 3600", Some(30)),
            ("5, 0", "30, 3600", Some(3_600)),
            ("0, 0", "30, 3600", Some(3_600)),
            ("7, 5", "30, 3600", None),
            ("0, 5", "30", Some(30)),
            ("0", "30, 40", Some(40)),
            ("0", "6m0s", Some(360)),
            ("0", "250ms", Some(1)),
            ("0", "Sun, 06 Nov 1994 08:50:37 GMT", Some(60)),
        ];
        for (remaining, reset, expected) in table {
            let headers = [("x-ratelimit-remaining", remaining), ("x-ratelimit-reset", reset)];
            assert_eq!(seconds(read_at(&headers, NOW).used_up), expected, "{remaining:?} {reset:?}");
        }
    }

    #[test]
    fn the_older_headers_are_guessed_by_size() {
        let now = Timestamp::from_millis(1_700_000_000_000);
        let table = [
            ("0", "30", Some(30)),
            ("0", "1700000030", Some(30)),
            ("0", "1700000030000", Some(30)),
            ("0", "1700000030000000", Some(30)),
            ("0", "1700000030000000000", Some(30)),
            ("0", "1700000029.25", Some(30)),
            ("0", "Tue, 14 Nov 2023 22:13:50 GMT", Some(30)),
            ("0", "2023-11-14T22:13:50Z", Some(30)),
            ("0", "1699999999", None),
            ("0", "0", None),
            ("0", "-1", None),
            ("0", "4000000000", Some(86_400)),
            ("0", "999999999", Some(86_400)),
            ("0", "99999999999999999999", Some(86_400)),
            ("1", "30", None),
            ("-1", "30", None),
            ("none", "30", None),
            (" 0 ", " 30 ", Some(30)),
        ];
        for (remaining, reset, expected) in table {
            for name in ["RateLimit", "X-RateLimit", "X-Rate-Limit"] {
                let (first, second) = (format!("{name}-Remaining"), format!("{name}-Reset"));
                let hint = read_at(&[(&first, remaining), (&second, reset)], now);
                assert_eq!(seconds(hint.used_up), expected, "{name}: {remaining} {reset}");
            }
        }
        assert_eq!(read_at(&[("X-RateLimit-Remaining", "0")], now), Hint::default());
        assert_eq!(read_at(&[("X-RateLimit-Reset", "30")], now), Hint::default());
    }

    #[test]
    fn retry_after_overrides_the_others() {
        let both = [("Retry-After", "5"), ("RateLimit", r#""daily";r=0;t=3600"#)];
        assert_eq!(seconds(read_at(&both, NOW).wait()), Some(5));
        assert_eq!(seconds(read_at(&both[1..], NOW).wait()), Some(3_600));
    }

    /// What looks like a header more often than random text does.
    fn field() -> impl Strategy<Value = String> {
        let word = prop_oneof![
            4 => prop::sample::select(vec![
                "\"a\"", "\"", ";", "r", "t", "=", "0", "-", ",", " ", "r=0", ";t=", ":", "?1", "\\", "limit", "remaining=0",
                "reset=", ".", "99999999999999999999", "1e9", "GMT", "Sun, 06 Nov 1994 08:50:37 GMT",
            ]).prop_map(str::to_owned),
            1 => any::<u64>().prop_map(|number| number.to_string()),
            1 => any::<String>(),
        ];
        prop::collection::vec(word, 0..12).prop_map(|words| words.concat())
    }

    proptest! {
        #[test]
        fn whatever_the_headers_say_nobody_waits_for_more_than_a_day(
            values in prop::collection::vec(field(), 9), bytes in prop::collection::vec(any::<u8>(), 0..60),
            now in any::<i64>(),
        ) {
            let names = [
                "retry-after", "ratelimit", "ratelimit-policy", "ratelimit-remaining", "ratelimit-reset",
                "x-ratelimit-remaining", "x-ratelimit-reset", "x-rate-limit-remaining", "x-rate-limit-reset",
            ];
            let text = String::from_utf8_lossy(&bytes);
            let mut headers: Vec<_> = names.into_iter().zip(values.iter().map(String::as_str)).collect();
            headers.push((names[bytes.len() % 9], &text));
            let hint = read_at(&headers, Timestamp::from_millis(now));
            for wait in [hint.retry_after, hint.used_up, hint.wait()].into_iter().flatten() {
                prop_assert!(!wait.is_zero() && wait <= Hint::MAX, "{wait:?}");
            }
        }

        #[test]
        fn a_number_of_seconds_is_the_wait_in_every_form(seconds in 1_u64..86_400) {
            let wait = Some(Duration::from_secs(seconds));
            let text = seconds.to_string();
            prop_assert_eq!(read_at(&[("retry-after", &text)], NOW).retry_after, wait);
            prop_assert_eq!(read_at(&[("ratelimit", &format!("\"a\";r=0;t={text}"))], NOW).used_up, wait);
            let now = Timestamp::from_millis(1_700_000_000_000);
            let epoch = (1_700_000_000 + seconds).to_string();
            for reset in [&text, &epoch, &format!("{epoch}000")] {
                let headers = [("x-ratelimit-remaining", "0"), ("x-ratelimit-reset", reset.as_str())];
                prop_assert_eq!(read_at(&headers, now).used_up, wait);
            }
        }
    }
}
