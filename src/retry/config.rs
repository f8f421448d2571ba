//! `[retry]`: the number of attempts, their delays, and the age limit.

use std::time::Duration;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

use crate::message::{Attempt, Class, SourceName};

/// `[retry]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(from = "Written")]
pub struct Config {
    /// Where the keys that are not written come from.
    pub preset: Preset,
    /// How failures are dealt with that no rule is about.
    #[serde(flatten)]
    pub policy: Policy,
    /// How much of what waits may be in memory; the rest waits on Kafka.
    pub memory: ByteSize,
    /// `[[retry.rule]]`: other policies for some sources and classes of failures; the first that fits counts.
    #[serde(rename = "rule", skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<Rule>,
}

/// What is done about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Policy {
    /// How many attempts a request has in all. Throttles and refused accounts spend none.
    pub attempts: u32,
    /// The delay before the second attempt.
    #[serde(with = "humantime_serde")]
    pub base: Duration,
    /// What each further delay is multiplied by.
    pub factor: f64,
    /// The longest delay.
    #[serde(with = "humantime_serde")]
    pub cap: Duration,
    /// How much of it is left to chance.
    pub jitter: Jitter,
    /// A request whose first call was longer ago than this ends when it fails once more. Throttles and refused accounts
    /// end nothing by age, unless a rule that names their class says so.
    #[serde(with = "humantime_serde")]
    pub age_limit: Duration,
}

/// How much of a delay is left to chance, so that requests that failed together spread out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Jitter {
    /// Anything from nothing to all of it.
    Full,
    /// At least half of it.
    Half,
    /// Nothing: exactly the delay.
    None,
}

/// A policy by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// 5 attempts, 5 s doubling to 10 min, all of it left to chance, a day.
    #[default]
    Standard,
    /// 3 attempts, after 2 s and 4 s to the point: as a published client of 1688 tries again (`retry_count = 3`,
    /// `retry_delay = 2`, times 2ⁿ).
    #[serde(rename = "1688-3-attempts-from-2s", alias = "000")]
    Ali3AttemptsFrom2s,
    /// 3 attempts, 5 s each time, to the point: as a published client on Celery tries again (`countdown=5`).
    #[serde(rename = "celery-3-attempts-every-5s", alias = "001")]
    Celery3AttemptsEvery5s,
}

impl Preset {
    /// What it stands for.
    #[must_use]
    pub const fn policy(self) -> Policy {
        let standard = Policy {
            attempts: 5,
            base: Duration::from_secs(5),
            factor: 2.0,
            cap: Duration::from_secs(600),
            jitter: Jitter::Full,
            age_limit: Duration::from_secs(24 * 60 * 60),
        };
        match self {
            Self::Standard => standard,
            Self::Ali3AttemptsFrom2s => {
                Policy { attempts: 3, base: Duration::from_secs(2), jitter: Jitter::None, ..standard }
            }
            Self::Celery3AttemptsEvery5s => Policy { attempts: 3, factor: 1.0, jitter: Jitter::None, ..standard },
        }
    }
}

/// A throttle or a refused account that comes without a time. The quota holds the account itself for as long as it
/// must; this only keeps the request from running in circles.
const HELD_BACK: Policy = Policy {
    attempts: u32::MAX,
    base: Duration::from_secs(1),
    factor: 2.0,
    cap: Duration::from_secs(60),
    // Here waiting is the point, not spreading.
    jitter: Jitter::Half,
    age_limit: Duration::MAX,
};

/// `[[retry.rule]]`: what is written here counts for the failures that it is about.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rule {
    /// The source; without it all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<SourceName>,
    /// The classes of failures; without them those that spend an attempt.
    #[serde(rename = "class", skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<Class>,
    /// Where the keys that are not written come from; without it from `[retry]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preset: Option<Preset>,
    /// As [`Policy::attempts`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempts: Option<u32>,
    /// As [`Policy::base`].
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub base: Option<Duration>,
    /// As [`Policy::factor`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub factor: Option<f64>,
    /// As [`Policy::cap`].
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub cap: Option<Duration>,
    /// As [`Policy::jitter`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jitter: Option<Jitter>,
    /// As [`Policy::age_limit`].
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub age_limit: Option<Duration>,
}

impl Rule {
    fn is_about(&self, source: &SourceName, class: Class) -> bool {
        let classes = &self.classes;
        let of_class = if classes.is_empty() { class.spends_an_attempt() } else { classes.contains(&class) };
        of_class && self.source.as_ref().is_none_or(|own| own == source)
    }

    /// `policy` with what is written here in its place.
    fn over(&self, policy: Policy) -> Policy {
        let policy = self.preset.map_or(policy, Preset::policy);
        Policy {
            attempts: self.attempts.unwrap_or(policy.attempts),
            base: self.base.unwrap_or(policy.base),
            factor: self.factor.unwrap_or(policy.factor),
            cap: self.cap.unwrap_or(policy.cap),
            jitter: self.jitter.unwrap_or(policy.jitter),
            age_limit: self.age_limit.unwrap_or(policy.age_limit),
        }
    }
}

impl Config {
    /// What is done about a request of this source that has failed like this.
    #[must_use]
    pub fn policy(&self, source: &SourceName, attempt: &Attempt) -> Policy {
        // Where no call was made the class says why, but there is no failure to have a policy for.
        if attempt.is_held_back() {
            return HELD_BACK;
        }
        let spends = attempt.class.spends_an_attempt();
        let general = if spends { self.policy } else { HELD_BACK };
        let Some(rule) = self.rules.iter().find(|rule| rule.is_about(source, attempt.class)) else { return general };
        let policy = rule.over(general);
        // A preset's age limit is not meant for those who only wait for their turn.
        if spends { policy } else { Policy { age_limit: rule.age_limit.unwrap_or(Duration::MAX), ..policy } }
    }

    /// Each rule's policy, as far as its numbers can be judged without a failure.
    pub fn rules(&self) -> impl Iterator<Item = (&Rule, Policy)> {
        self.rules.iter().map(|rule| {
            let held_back = !rule.classes.is_empty() && rule.classes.iter().all(|class| !class.spends_an_attempt());
            let general = if held_back {
                // How many attempts there are does not matter: none is spent. Nor does the age, where the rule has none.
                Policy { age_limit: self.policy.age_limit, attempts: self.policy.attempts, ..HELD_BACK }
            } else {
                self.policy
            };
            (rule, rule.over(general))
        })
    }
}

impl Default for Config {
    fn default() -> Self {
        Written::default().into()
    }
}

/// `[retry]` as it stands in a file: what is not written comes from the preset.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Written {
    preset: Preset,
    attempts: Option<u32>,
    #[serde(with = "humantime_serde")]
    base: Option<Duration>,
    factor: Option<f64>,
    #[serde(with = "humantime_serde")]
    cap: Option<Duration>,
    jitter: Option<Jitter>,
    #[serde(with = "humantime_serde")]
    age_limit: Option<Duration>,
    memory: Option<ByteSize>,
    #[serde(rename = "rule")]
    rules: Vec<Rule>,
}

impl From<Written> for Config {
    fn from(written: Written) -> Self {
        let Written { preset, attempts, base, factor, cap, jitter, age_limit, memory, rules } = written;
        let own = Rule { attempts, base, factor, cap, jitter, age_limit, ..Rule::default() };
        Self { preset, policy: own.over(preset.policy()), memory: memory.unwrap_or(ByteSize::mib(16)), rules }
    }
}
