//! Whether a backlog will be processed before Kafka's retention deletes it.

use std::time::Duration;

use super::terminal::counted;
use crate::{
    config::{self, Config},
    kafka::admin,
    platform::{Source, SourceConfig},
    quota::{Limit, plan::Limits},
    runtime::duration_text::duration_text,
    topics::{Groups, Topics},
};

/// What is wrong with the backlog of a source, if anything; nothing also if that cannot be told here.
pub(super) async fn warning(source: &SourceConfig, config: &Config) -> Option<String> {
    let groups = Groups::new(&config.kafka.group_prefix);
    let topics = Topics::new(config.topics.clone()).every_request(&source.common.name);
    let lags = admin::lag(&config.kafka, &groups.fetch(&source.common.name), &topics).await.ok()?;
    let waiting = lags.iter().map(|lag| u64::try_from(lag.behind()).unwrap_or(0)).sum();
    warning_of(source, waiting, config)
}

/// The same where it is known how many requests wait.
pub(super) fn warning_of(source: &SourceConfig, waiting: u64, config: &Config) -> Option<String> {
    // Who only enqueues may have no accounts: then the pace is not known.
    let opened = Source::open(source, config.folder(), &config::variable).ok()?;
    let limits = opened.quota().or_unknown(&config.quota.unknown);
    let calls = calls_per_second(&limits)?;
    let money = source.common.budgets().and_then(|budgets| budgets.per_day).map(per_day);
    #[allow(clippy::cast_precision_loss, reason = "an estimate for people")]
    let ids = money.map_or(calls, |money| money.min(calls)) * opened.vendor.batch_max() as f64;
    outlasts(waiting, ids, config.topics.keep_requests).map(|text| format!("source {}: {text}", source.common.name))
}

#[allow(clippy::cast_precision_loss, reason = "an estimate for people")]
fn per_day(calls: u64) -> f64 {
    calls as f64 / 86_400.0
}

/// How many calls a second are allowed over a long time; `None`: no limit.
fn calls_per_second(limits: &Limits) -> Option<f64> {
    let least = |limits: &[Limit]| {
        let each = limits.iter().map(|limit| f64::from(limit.calls) / limit.per.as_secs_f64().max(0.001));
        each.min_by(f64::total_cmp)
    };
    let accounts: Option<f64> = limits.accounts.iter().map(|account| least(&account.limits)).sum();
    let all = accounts.into_iter().chain(least(&limits.source));
    all.min_by(f64::total_cmp)
}

/// What to say if so many requests take longer than they are kept.
fn outlasts(waiting: u64, per_second: f64, keep: Duration) -> Option<String> {
    #[allow(clippy::cast_precision_loss, reason = "an estimate for people")]
    let seconds = waiting as f64 / per_second;
    if seconds <= keep.as_secs_f64() {
        return None;
    }
    let days = seconds / 86_400.0;
    Some(format!(
        "{} are waiting, which takes {days:.1} days at {:.0} a minute, but topics.keep_requests is {}: Kafka deletes \
         the last of them before they are called for. Raise it and run `weir topics apply`, or enqueue fewer at a \
         time",
        counted(waiting, "request"),
        per_second * 60.0,
        duration_text(keep),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::plan::AccountLimits;

    const WEEK: Duration = Duration::from_secs(7 * 86_400);

    #[test]
    fn a_million_requests_at_sixty_a_minute_outlast_a_week() {
        let text = outlasts(1_000_000, 1.0, WEEK).unwrap();
        for part in ["1,000,000 requests", "60 a minute", "11.6 days", "topics.keep_requests is 7days"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!((outlasts(604_800, 1.0, WEEK), outlasts(0, 1.0, WEEK)), (None, None));
    }

    #[test]
    fn the_pace_is_what_all_limits_together_allow_over_time() {
        let limit = |calls, seconds| Limit::new(calls, Duration::from_secs(seconds), 1).unwrap();
        let account = |limits| AccountLimits { limits, ..AccountLimits::default() };
        let of = |accounts, source| calls_per_second(&Limits { accounts, source, ..Limits::default() });
        let two = || vec![account(vec![limit(10, 1), limit(60, 60)]), account(vec![limit(2, 1)])];
        assert_eq!(of(two(), vec![]), Some(3.0));
        assert_eq!(of(two(), vec![limit(5, 10)]), Some(0.5));
        assert_eq!(of(vec![account(vec![])], vec![]), None);
    }
}
