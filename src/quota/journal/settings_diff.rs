//! What an operator's setting changes for a running worker. Pure.

use std::fmt;

use super::known::Changed;
use crate::{
    quota::{Cause, Share},
    runtime::clock::Timestamp,
};

/// What to do, for the account or the source as a whole.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// What held it before that time is over.
    Release(Timestamp),
    /// It does not call; `None` = until it is resumed.
    Pause(Option<Timestamp>, Cause),
    /// Set the pace as a share of the limit.
    Pace(Share),
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Release(_) => f.write_str("resumed by an operator"),
            Self::Pause(Some(until), cause) => write!(f, "{}, until {until}", cause.reason),
            Self::Pause(None, cause) => write!(f, "{}, until resumed", cause.reason),
            Self::Pace(share) => write!(f, "pace set to {}% by an operator", (share.get() * 1_000.0).round() / 10.0),
        }
    }
}

/// What has changed, in the order in which it is to be done.
#[must_use]
pub fn effects(changed: &Changed, now: Timestamp) -> Vec<Effect> {
    let Changed { before, now: setting } = changed;
    let before = before.as_ref();
    let mut effects = Vec::new();
    if let Some(resumed_at) = setting.resumed_at.filter(|at| before.and_then(|b| b.resumed_at) != Some(*at)) {
        effects.push(Effect::Release(resumed_at));
    }
    let pause = setting.paused_at(now);
    if let Some(pause) = pause.filter(|pause| before.and_then(|before| before.paused.as_ref()) != Some(*pause)) {
        let words = match pause.reason.as_str() {
            "" => "paused by an operator".to_owned(),
            words => format!("paused by an operator: {words}"),
        };
        effects.push(Effect::Pause(pause.until_at, Cause::new(&words, pause.since_at)));
    }
    // At a start also that all of it is wanted: Redis may remember a share of long ago.
    if before.is_none_or(|before| before.pace != setting.pace) {
        effects.push(Effect::Pace(share(setting.pace)));
    }
    effects
}

/// A share that a pace can have, whatever a record says.
fn share(pace: Option<f64>) -> Share {
    let pace = pace.filter(|pace| pace.is_finite()).unwrap_or(1.0);
    Share::new(pace.clamp(Share::LEAST, 1.0)).unwrap_or(Share::WHOLE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Pause, QuotaSetting, SourceName};

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_millis(seconds * 1_000)
    }

    fn setting() -> QuotaSetting {
        QuotaSetting::none(SourceName::new("a").unwrap(), None, at(1))
    }

    fn pause(until: Option<i64>) -> QuotaSetting {
        let pause = Pause { since_at: at(1), until_at: until.map(at), reason: "sale".to_owned() };
        QuotaSetting { paused: Some(pause), ..setting() }
    }

    fn of(before: Option<QuotaSetting>, now: QuotaSetting) -> Vec<Effect> {
        effects(&Changed { before, now }, at(10))
    }

    #[test]
    fn only_what_has_changed_has_an_effect() {
        let all = Effect::Pace(Share::WHOLE);
        let cause = Cause::new("paused by an operator: sale", at(1));
        assert_eq!(of(None, pause(Some(60))), [Effect::Pause(Some(at(60)), cause.clone()), all.clone()]);
        assert_eq!(of(None, pause(None)), [Effect::Pause(None, cause), all.clone()]);
        assert_eq!(of(None, pause(Some(9))), [all], "over before it was read");
        let slow = |setting| QuotaSetting { pace: Some(0.5), ..setting };
        assert_eq!(of(Some(pause(None)), slow(pause(None))), [Effect::Pace(share(Some(0.5)))]);
        let resumed = QuotaSetting { resumed_at: Some(at(5)), ..slow(setting()) };
        assert_eq!(of(Some(slow(pause(None))), resumed.clone()), [Effect::Release(at(5))]);
        assert_eq!(
            of(Some(resumed.clone()), QuotaSetting { pace: None, ..resumed.clone() }),
            [Effect::Pace(Share::WHOLE)]
        );
        assert_eq!(of(Some(resumed.clone()), resumed), []);
    }

    #[test]
    fn an_effect_is_told_in_words() {
        let words = |before: Option<QuotaSetting>, now: QuotaSetting| of(before, now).remove(0).to_string();
        assert_eq!(words(None, pause(None)), "paused by an operator: sale, until resumed");
        let until = words(None, pause(Some(60)));
        assert_eq!(until, format!("paused by an operator: sale, until {}", at(60)));
        let (slow, resumed) = (Some(0.125), Some(at(5)));
        assert_eq!(
            words(Some(setting()), QuotaSetting { pace: slow, ..setting() }),
            "pace set to 12.5% by an operator"
        );
        let resumed = QuotaSetting { resumed_at: resumed, ..setting() };
        assert_eq!(words(Some(setting()), resumed), "resumed by an operator");
    }

    #[test]
    fn a_share_is_never_nothing_nor_more_than_all_whatever_a_record_says() {
        for (pace, expected) in [(0.0, Share::LEAST), (7.0, 1.0), (-1.0, Share::LEAST), (f64::NAN, 1.0)] {
            let effects = of(None, QuotaSetting { pace: Some(pace), ..setting() });
            assert_eq!(effects, [Effect::Pace(Share::new(expected).unwrap())]);
        }
    }
}
