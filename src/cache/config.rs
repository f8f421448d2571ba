//! `[cache]` and `[source.cache]`: whether and how long answers are cached, and where.

use std::time::Duration;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

use super::policy::Rules;
use crate::runtime::duration_text::duration_text;

const SECOND: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// `[cache]`: where answers are kept, for all sources of this process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// How much memory of this process holds answers, about.
    pub memory: ByteSize,
    /// Whether answers are shared through Redis, where `redis.url` is set.
    pub shared: bool,
    /// What Redis' keys begin with.
    pub prefix: String,
    /// How long Redis may take before a request goes on without it.
    #[serde(with = "humantime_serde")]
    pub redis_timeout: Duration,
    /// How long a process that has died may hold up the others' requests for the item that it was calling for.
    #[serde(with = "humantime_serde")]
    pub claim: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            memory: ByteSize::mib(64),
            shared: true,
            prefix: "weir".to_owned(),
            redis_timeout: Duration::from_millis(200),
            claim: 10 * SECOND,
        }
    }
}

impl Config {
    /// What is wrong with it: key and what.
    #[must_use]
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        let sizes = ByteSize::mib(1)..=ByteSize::gib(64);
        if !sizes.contains(&self.memory) {
            problems.push(("memory", format!("found {}, allowed: {} to {}", self.memory, sizes.start(), sizes.end())));
        }
        let mut time = |key, found: Duration, [least, most]: [Duration; 2]| {
            if !(least..=most).contains(&found) {
                let [found, least, most] = [found, least, most].map(duration_text);
                problems.push((key, format!("found {found}, allowed: {least} to {most}")));
            }
        };
        time("redis_timeout", self.redis_timeout, [Duration::from_millis(5), 5 * SECOND]);
        time("claim", self.claim, [SECOND, 300 * SECOND]);
        problems
    }
}

/// How long answers count, as published clients of a vendor have it. Explicit keys go before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Preset {
    /// Five minutes without a thought, an hour at most.
    ///
    /// Source: the article "处理限流、缓存与数据一致性" (`local_ttl=300, redis_ttl=3600`).
    #[serde(rename = "1688-5m-to-1h", alias = "1688")]
    Ali5mTo1h,
    /// One minute without a thought, five to six minutes at most.
    ///
    /// Source: the article on a high-concurrency Taobao API (`local_ttl=60`, `redis_ttl=300`, jitter 0–60 s).
    #[serde(rename = "taobao-1m-to-5m", alias = "taobao")]
    Taobao1mTo5m,
}

/// `[source.cache]`: the answers of this source are given again.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SourceCache {
    /// Times by name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preset: Option<Preset>,
    /// As [`Rules::fresh`].
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub fresh: Option<Duration>,
    /// As [`Rules::kept`].
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub kept: Option<Duration>,
    /// As [`Rules::jitter`].
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub jitter: Option<Duration>,
    /// As [`Rules::absent`].
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub absent: Option<Duration>,
    /// As [`Rules::off_shelf`].
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub off_shelf: Option<Duration>,
    /// As [`Rules::stretch`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stretch: Option<f64>,
    /// As [`Rules::early`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub early: Option<f64>,
    /// As [`Rules::stale_if_error`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stale_if_error: Option<bool>,
}

impl SourceCache {
    /// The rules that follow.
    ///
    /// # Errors
    /// The key, and what is wrong with it: found and allowed.
    pub fn rules(&self) -> Result<Rules, (&'static str, String)> {
        let (fresh, kept, jitter) = self.times()?;
        let rules = Rules {
            fresh,
            kept,
            jitter,
            absent: self.absent.unwrap_or_else(|| fresh.min(60 * SECOND)),
            off_shelf: self.off_shelf.unwrap_or(fresh),
            stretch: self.stretch.unwrap_or(2.0),
            early: self.early.unwrap_or(1.0),
            stale_if_error: self.stale_if_error.unwrap_or(true),
        };
        let time = |key, found: Duration, [least, most]: [Duration; 2]| {
            let [least_text, most_text, found_text] = [least, most, found].map(duration_text);
            let wrong = || (key, format!("found {found_text}, allowed: {least_text} to {most_text}"));
            if (least..=most).contains(&found) { Ok(()) } else { Err(wrong()) }
        };
        time("fresh", rules.fresh, [SECOND, 30 * DAY])?;
        time("kept", rules.kept, [rules.fresh, 30 * DAY])?;
        time("jitter", rules.jitter, [Duration::ZERO, DAY])?;
        time("absent", rules.absent, [SECOND, DAY])?;
        time("off_shelf", rules.off_shelf, [SECOND, 30 * DAY])?;
        let number = |key, found: f64, [least, most]: [f64; 2]| {
            let wrong = || (key, format!("found {found}, allowed: {least} to {most}"));
            if (least..=most).contains(&found) { Ok(()) } else { Err(wrong()) }
        };
        number("stretch", rules.stretch, [1.0, 10.0])?;
        number("early", rules.early, [0.0, 10.0])?;
        Ok(rules)
    }

    fn times(&self) -> Result<(Duration, Duration, Duration), (&'static str, String)> {
        let preset = self.preset.map(|preset| match preset {
            Preset::Ali5mTo1h => [300, 3_600, 0].map(Duration::from_secs),
            Preset::Taobao1mTo5m => [60, 300, 60].map(Duration::from_secs),
        });
        let missing = |key| {
            let what =
                "not set; allowed: a duration such as \"5m\", or preset = \"1688-5m-to-1h\" or \"taobao-1m-to-5m\"";
            (key, what.to_owned())
        };
        let fresh = self.fresh.or(preset.map(|[fresh, ..]| fresh)).ok_or_else(|| missing("fresh"))?;
        // Who says how long an answer is fresh and nothing else gets nothing older.
        let kept = self.kept.or(preset.map(|[_, kept, _]| kept.max(fresh))).unwrap_or(fresh);
        let jitter = self.jitter.or(preset.map(|[.., jitter]| jitter)).unwrap_or_default();
        Ok((fresh, kept, jitter))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(text: &str) -> Result<Rules, String> {
        let config: SourceCache = toml::from_str(text).map_err(|error| error.to_string())?;
        config.rules().map_err(|(key, what)| format!("{key}: {what}"))
    }

    #[test]
    fn presets_have_the_published_times_and_explicit_keys_go_before_them() {
        let secs = |rules: &Rules| [rules.fresh, rules.kept, rules.jitter].map(|time| time.as_secs());
        assert_eq!(secs(&rules("preset = \"1688\"").unwrap()), [300, 3_600, 0]);
        assert_eq!(secs(&rules("preset = \"taobao\"").unwrap()), [60, 300, 60]);
        assert_eq!(secs(&rules("preset = \"1688-5m-to-1h\"").unwrap()), [300, 3_600, 0]);
        let shown = |name: &str| serde_json::to_value(serde_json::from_value::<Preset>(name.into()).unwrap()).unwrap();
        assert_eq!([shown("1688"), shown("taobao")], ["1688-5m-to-1h", "taobao-1m-to-5m"], "by their former names too");
        assert_eq!(secs(&rules("preset = \"taobao\"\nfresh = \"10m\"").unwrap()), [600, 600, 60]);
        let own = rules("fresh = \"10m\"").unwrap();
        assert_eq!(secs(&own), [600, 600, 0]);
        assert_eq!((own.absent, own.off_shelf), (60 * SECOND, 600 * SECOND));
    }

    #[test]
    fn a_wrong_value_is_refused_with_key_found_and_allowed() {
        for (text, expected) in [
            ("", "fresh: not set; allowed: a duration"),
            ("fresh = \"0s\"", "fresh: found 0s, allowed: 1s to"),
            ("fresh = \"10m\"\nkept = \"5m\"", "kept: found 5m, allowed: 10m to"),
            ("fresh = \"1m\"\nstretch = 0.5", "stretch: found 0.5, allowed: 1 to 10"),
            ("fresh = \"1m\"\nearly = -1.0", "early: found -1, allowed: 0 to 10"),
            ("fresh = \"1m\"\nabsent = \"2days\"", "absent: found 2days, allowed: 1s to"),
            ("preset = \"ebay\"", "unknown variant `ebay`"),
            ("ttl = 5", "unknown field `ttl`"),
        ] {
            let message = rules(text).unwrap_err();
            assert!(message.contains(expected), "{message:?} should say {expected:?}");
        }
        let config = Config { memory: ByteSize::kib(1), claim: Duration::ZERO, ..Config::default() };
        let keys: Vec<_> = config.problems().into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys, ["memory", "claim"]);
        assert_eq!(Config::default().problems(), []);
    }
}
