//! Applies `pause`, `resume` or `set` to an operator's former setting. Pure.

use std::time::Duration;

use crate::{
    message::{Pause, QuotaSetting},
    quota::{Cause, Limit, Share},
    runtime::clock::Timestamp,
};

/// What an operator wants.
#[derive(Clone, Debug, PartialEq)]
pub enum Wish {
    /// No calls.
    Pause {
        /// For so long; `None` = until it is resumed.
        time: Option<Duration>,
        /// Why.
        reason: String,
    },
    /// Calls again.
    Resume,
    /// A share of the pace.
    Pace(f64),
}

/// Reads `--for`.
pub fn read_time(text: &str) -> Result<Duration, String> {
    let time = crate::cli::arguments::duration(text)?;
    if (Duration::from_secs(1)..=Limit::PER_MAX).contains(&time) {
        return Ok(time);
    }
    Err("give a time from 1s to a year; without --for it is paused until it is resumed".to_owned())
}

/// Reads `--reason`.
pub fn read_reason(text: &str) -> Result<String, String> {
    let limit = Cause::REASON_LIMIT;
    if text.len() > limit { Err(format!("at most {limit} bytes")) } else { Ok(text.to_owned()) }
}

/// Reads `--pace`.
pub fn read_share(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).trim().parse::<f64>().unwrap_or(f64::NAN);
    let share = if text.ends_with('%') { number / 100.0 } else { number };
    if Share::new(share).is_ok() {
        return Ok(share);
    }
    Err("give a share from 0.001 to 1, or from 0.1% to 100%; to stop it, pause it".to_owned())
}

/// The setting after the wish; else why it cannot be meant.
pub fn changed(before: QuotaSetting, wish: &Wish, now: Timestamp) -> Result<QuotaSetting, String> {
    // Later than what it replaces, whatever this machine's clock says.
    let now = now.max(before.set_at.after(Duration::from_millis(1)));
    let mut setting = QuotaSetting { set_at: now, ..before };
    match wish {
        Wish::Pause { time, reason } => {
            let until_at = time.map(|time| now.after(time));
            if let Some(pause) = setting.paused_at(now)
                && pause.until_at.is_none_or(|old| until_at.is_some_and(|new| new < old))
            {
                let until = pause.until_at.map_or_else(|| "until it is resumed".to_owned(), |at| format!("until {at}"));
                return Err(format!("it is already paused {until}: resume it first to pause it for a shorter time"));
            }
            setting.paused = Some(Pause { since_at: now, until_at, reason: reason.clone() });
        }
        Wish::Resume => {
            setting.paused = None;
            setting.resumed_at = Some(now);
        }
        Wish::Pace(share) => setting.pace = (*share < 1.0).then_some(*share),
    }
    Ok(setting)
}

/// What has been set, for people.
pub fn words(setting: &QuotaSetting, wish: &Wish) -> String {
    let percent = |share: f64| format!("{}%", (share * 1_000.0).round() / 10.0);
    match wish {
        Wish::Pause { .. } => match setting.paused.as_ref().and_then(|pause| pause.until_at) {
            Some(until) => format!("paused until {until}"),
            None => "paused until `weir quota resume`".to_owned(),
        },
        Wish::Resume => match setting.pace {
            Some(share) => format!("resumed, at {} of its pace", percent(share)),
            None => "resumed".to_owned(),
        },
        Wish::Pace(share) => format!("at {} of its pace", percent(*share)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::SourceName;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_millis(seconds * 1_000)
    }

    fn none() -> QuotaSetting {
        QuotaSetting::none(SourceName::new("a").unwrap(), None, at(1))
    }

    fn pause(seconds: Option<u64>) -> Wish {
        Wish::Pause { time: seconds.map(Duration::from_secs), reason: String::new() }
    }

    #[test]
    fn a_pause_can_be_longer_than_the_one_before_but_not_shorter() {
        let short = changed(none(), &pause(Some(60)), at(10)).unwrap();
        assert_eq!(short.paused.clone().unwrap().until_at, Some(at(70)));
        assert!(changed(short.clone(), &pause(Some(30)), at(20)).unwrap_err().contains("resume it first"));
        assert!(changed(short.clone(), &pause(Some(30)), at(71)).is_ok(), "the first one is over");
        let forever = changed(short, &pause(None), at(20)).unwrap();
        assert!(changed(forever, &pause(Some(9_999)), at(30)).unwrap_err().contains("until it is resumed"));
    }

    #[test]
    fn each_wish_leaves_the_rest_as_it_was_and_is_later_than_what_it_replaces() {
        let slow = changed(none(), &Wish::Pace(0.5), at(10)).unwrap();
        let paused = changed(slow, &pause(None), at(20)).unwrap();
        assert_eq!((paused.pace, paused.paused.is_some()), (Some(0.5), true));
        // An operator whose clock is slow.
        let resumed = changed(paused.clone(), &Wish::Resume, at(5)).unwrap();
        assert_eq!((resumed.pace, resumed.paused), (Some(0.5), None));
        assert!(resumed.resumed_at.unwrap() > paused.paused.unwrap().since_at);
        assert_eq!(changed(none(), &Wish::Pace(1.0), at(1)).unwrap().pace, None);
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_what_is_allowed() {
        assert_eq!(read_share("50%"), Ok(0.5));
        assert_eq!(read_share("0.25"), Ok(0.25));
        for text in ["0", "-1", "1.5", "101%", "half", "NaN", "%"] {
            assert!(read_share(text).unwrap_err().contains("0.1% to 100%"), "{text}");
        }
        assert_eq!(read_time("10m"), Ok(Duration::from_secs(600)));
        for text in ["0s", "ten", "500days", "-5s"] {
            assert!(read_time(text).unwrap_err().contains("give a time"), "{text}");
        }
        assert!(read_reason(&"x".repeat(201)).is_err());
    }
}
