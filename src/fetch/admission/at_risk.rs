//! How much is paid for and not yet safe: calls wait while their outcomes cannot be committed. Pure.
//!
//! What has been called for and is not committed is called for again if the process is killed. While commits go
//! through, twenty times a second, that is little; while Kafka does not take them it would be everything that the pace
//! allows.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use tokio::time::Instant;

use crate::kafka::outbox::Risk;

/// `fetch.at_risk`: a number of calls, or what leaves in a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtRisk {
    /// So many calls.
    Calls(u32),
    /// As many as leave in so long, at whatever pace the source has.
    Within(Duration),
}

impl Default for AtRisk {
    fn default() -> Self {
        Self::Within(Duration::from_secs(2))
    }
}

impl FromStr for AtRisk {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        if let Ok(calls) = text.parse() {
            return Ok(Self::Calls(calls));
        }
        let wrong =
            || format!("found {text:?}, allowed: a number of calls, or a time such as \"2s\" for what leaves in it");
        humantime::parse_duration(text).map(Self::Within).map_err(|_| wrong())
    }
}

impl fmt::Display for AtRisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Calls(calls) => write!(f, "{calls}"),
            Self::Within(time) => write!(f, "{}", humantime::format_duration(*time)),
        }
    }
}

impl Serialize for AtRisk {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Calls(calls) => serializer.serialize_u32(*calls),
            Self::Within(_) => serializer.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for AtRisk {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        /// As the file has it, or a variable of the environment, where everything is text.
        struct Either;
        impl de::Visitor<'_> for Either {
            type Value = AtRisk;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of calls, or a time such as \"2s\"")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<AtRisk, E> {
                text.parse().map_err(E::custom)
            }
            fn visit_u64<E: de::Error>(self, calls: u64) -> Result<AtRisk, E> {
                u32::try_from(calls).map(AtRisk::Calls).map_err(E::custom)
            }
            fn visit_i64<E: de::Error>(self, calls: i64) -> Result<AtRisk, E> {
                u32::try_from(calls).map(AtRisk::Calls).map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// Counts what is at risk, and says when it is enough.
#[derive(Debug, Default)]
pub(super) struct Gate {
    /// Calls that left since the last commit, and those whose outcomes that one did not carry.
    left: usize,
    commits: u64,
    is_shut: bool,
}

/// What has become of the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// From now on calls wait.
    Shut,
    /// They leave again.
    Opened,
}

impl Gate {
    /// A call has left.
    pub(super) fn call(&mut self) {
        self.left += 1;
    }

    /// Looks at what is at risk, after so many commits; says if that changes anything.
    pub(super) fn look(&mut self, most: AtRisk, risk: Risk, commits: u64, now: Instant) -> Option<Turn> {
        if std::mem::replace(&mut self.commits, commits) != commits {
            self.left = risk.calls;
        }
        let Some(since) = risk.since else {
            // Nothing is owed: calls under way are as old as the vendor is slow.
            self.left = 0;
            return self.turn(false);
        };
        let is_enough = match most {
            AtRisk::Calls(most) => self.left >= usize::try_from(most).unwrap_or(usize::MAX),
            AtRisk::Within(time) => now.saturating_duration_since(since) >= time,
        };
        self.turn(is_enough)
    }

    fn turn(&mut self, shut: bool) -> Option<Turn> {
        let was_shut = std::mem::replace(&mut self.is_shut, shut);
        (was_shut != shut).then_some(if shut { Turn::Shut } else { Turn::Opened })
    }

    /// Whether calls have to wait for a commit.
    pub(super) fn is_shut(&self) -> bool {
        self.is_shut
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn risk(calls: usize, since: Instant) -> Risk {
        Risk { calls, since: Some(since) }
    }

    #[test]
    fn calls_wait_when_as_many_are_at_risk_as_leave_in_the_time_until_a_commit_is_through() {
        let (mut gate, start, most) = (Gate::default(), Instant::now(), AtRisk::default());
        assert_eq!(gate.look(most, risk(1, start), 0, start + 1_999 * MS), None);
        assert_eq!(gate.look(most, risk(600, start), 0, start + 2_000 * MS), Some(Turn::Shut));
        assert_eq!(gate.look(most, risk(600, start), 0, start + 9_000 * MS), None);
        assert!(gate.is_shut());
        // A commit has carried the first of them.
        assert_eq!(gate.look(most, risk(10, start + 8_900 * MS), 1, start + 9_000 * MS), Some(Turn::Opened));
        assert!(!gate.is_shut());
    }

    #[test]
    fn so_many_calls_leave_without_a_commit_and_not_one_more() {
        let (mut gate, start, most) = (Gate::default(), Instant::now(), AtRisk::Calls(100));
        // A vendor that takes seconds: much is under way, and nothing is owed.
        (0..5_000).for_each(|_| gate.call());
        assert_eq!(gate.look(most, Risk::default(), 0, start), None);
        let mut left = 0;
        while gate.look(most, risk(left + 1, start), 0, start + 100 * MS).is_none() {
            gate.call();
            left += 1;
        }
        assert_eq!(left, 100);
        // 30 ended while the transaction was under way: they are still at risk.
        assert_eq!(gate.look(most, risk(30, start), 1, start), Some(Turn::Opened));
        while gate.look(most, risk(30, start), 1, start).is_none() {
            gate.call();
            left += 1;
        }
        assert_eq!(left, 170);
        assert_eq!(gate.look(most, Risk::default(), 2, start), Some(Turn::Opened));
    }

    #[test]
    fn commits_that_go_through_hold_no_call_back() {
        let (mut gate, start) = (Gate::default(), Instant::now());
        for commit in 0..1_000_u32 {
            let now = start + 50 * MS * commit;
            (0..100).for_each(|_| gate.call());
            assert_eq!(gate.look(AtRisk::default(), risk(120, now), commit.into(), now + 49 * MS), None);
        }
    }

    #[test]
    fn a_number_of_calls_or_a_time_and_nothing_else() {
        let read = |toml: &str| toml::from_str::<crate::fetch::Config>(toml).map(|config| config.at_risk);
        assert_eq!(read("at_risk = 500").unwrap(), AtRisk::Calls(500));
        assert_eq!(read("at_risk = \"500\"").unwrap(), AtRisk::Calls(500));
        assert_eq!(read("at_risk = \"5s\"").unwrap(), AtRisk::Within(Duration::from_secs(5)));
        assert_eq!(read("").unwrap(), AtRisk::Within(Duration::from_secs(2)));
        let error = read("at_risk = \"some\"").unwrap_err().to_string();
        assert!(error.contains("a number of calls, or a time"), "{error}");
        assert!(read("at_risk = -1").is_err());
    }
}
