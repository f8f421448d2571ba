//! What the topic says: the newest record of each key. Pure.

use std::collections::HashMap;

use tracing::warn;

use crate::{
    kafka::{Partition, Record},
    message::{AccountAlias, QuotaReport, QuotaSetting, SourceName, codec},
    quota::past::Settings,
};

/// All reports and settings, or those of one source.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// Only this source is of interest.
    only: Option<SourceName>,
    /// By key.
    reports: HashMap<String, QuotaReport>,
    settings: HashMap<SourceName, Settings>,
}

/// The key of a report.
#[must_use]
pub fn report_key(source: &SourceName, instance: &str, chunk: u32) -> String {
    format!("report/{source}/{instance}/{chunk}")
}

/// The key of a setting. Workers of a version that knows no addresses pass over what begins otherwise than `set`.
#[must_use]
pub fn setting_key(QuotaSetting { source, account, address, .. }: &QuotaSetting) -> String {
    match (account, address) {
        (_, Some(address)) => format!("address/{source}/{address}"),
        (Some(account), None) => format!("set/{source}/{account}"),
        (None, None) => format!("set/{source}"),
    }
}

/// A setting, and what was set before.
#[derive(Clone, Debug, PartialEq)]
pub struct Changed {
    /// What was set.
    pub before: Option<QuotaSetting>,
    /// What is set.
    pub now: QuotaSetting,
}

impl Known {
    /// Nothing yet; other sources than `only` will be passed over.
    #[must_use]
    pub fn of(only: Option<SourceName>) -> Self {
        Self { only, ..Self::default() }
    }

    /// Takes a record; the setting that it changed, if any. What cannot be read is passed over with a warning.
    pub fn take(&mut self, topic: &str, record: &Record) -> Option<Changed> {
        let key = String::from_utf8_lossy(record.key.as_deref().unwrap_or_default()).into_owned();
        let (kind, rest) = key.split_once('/')?;
        let is_other = |only: &SourceName| rest.split('/').next() != Some(only.as_str());
        if self.only.as_ref().is_some_and(is_other) {
            return None;
        }
        let is_gone = record.value.as_ref().is_none_or(bytes::Bytes::is_empty);
        let partition = Partition { topic: topic.into(), number: 0 };
        let raw = record.raw(&partition);
        match kind {
            "report" if is_gone => {
                self.reports.remove(&key);
                None
            }
            "report" => {
                match codec::read_quota_report(&raw) {
                    Ok(report) => {
                        self.reports.insert(key, report);
                    }
                    Err(error) => warn!(topic, key, %error, "skipped an unreadable quota report"),
                }
                None
            }
            // Settings are changed, never taken away.
            "set" | "address" if !is_gone => match codec::read_quota_setting(&raw) {
                Ok(now) => {
                    let settings = self.settings.entry(now.source.clone()).or_default();
                    let before = match &now.address {
                        Some(address) => settings.addresses.insert(address.clone(), now.clone()),
                        None => settings.accounts.insert(now.account.clone(), now.clone()),
                    };
                    Some(Changed { before, now })
                }
                Err(error) => {
                    warn!(topic, key, %error, "skipped an unreadable quota setting");
                    None
                }
            },
            _ => None,
        }
    }

    /// All reports, with their keys.
    pub fn reports(&self) -> impl Iterator<Item = (&String, &QuotaReport)> {
        self.reports.iter()
    }

    /// The reports of one source.
    pub fn reports_of(&self, source: &SourceName) -> impl Iterator<Item = &QuotaReport> {
        self.reports.values().filter(move |report| report.source == *source)
    }

    /// What is set for a source, its accounts and addresses.
    #[must_use]
    pub fn settings_of(&self, source: &SourceName) -> Settings {
        self.settings.get(source).cloned().unwrap_or_default()
    }

    /// What is set for a source or an account.
    #[must_use]
    pub fn setting(&self, source: &SourceName, account: Option<&AccountAlias>) -> Option<&QuotaSetting> {
        self.settings.get(source)?.accounts.get(&account.cloned())
    }

    /// Forgets the reports: whoever follows settings does not need them.
    pub fn forget_reports(&mut self) {
        self.reports.clear();
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::runtime::clock::Timestamp;

    fn record(key: &str, value: Option<String>) -> Record {
        let (key, value) = (Some(Bytes::from(key.to_owned())), value.map(Bytes::from));
        Record { offset: 0, time: Timestamp::from_millis(0), key, value, headers: Vec::new(), log: None }
    }

    fn source(name: &str) -> SourceName {
        SourceName::new(name).unwrap()
    }

    #[test]
    fn the_newest_record_of_a_key_counts_and_other_sources_and_rubbish_are_passed_over() {
        let mut known = Known::of(Some(source("a")));
        let setting = |of: &str, pace| {
            let setting = QuotaSetting { pace, ..QuotaSetting::none(source(of), None, Timestamp::from_millis(1)) };
            record(&setting_key(&setting), Some(serde_json::to_string(&setting).unwrap()))
        };
        let first = known.take("t", &setting("a", Some(0.5))).unwrap();
        assert_eq!((first.before, first.now.pace), (None, Some(0.5)));
        let second = known.take("t", &setting("a", None)).unwrap();
        assert_eq!(second.before.unwrap().pace, Some(0.5));
        assert_eq!(known.take("t", &setting("b", Some(0.5))), None);
        for (key, value) in [("set/a", Some("{")), ("set/a", None), ("other", Some("{}")), ("report/a/x/0", Some("1"))]
        {
            assert_eq!(known.take("t", &record(key, value.map(str::to_owned))), None, "{key}");
        }
        assert_eq!(known.setting(&source("a"), None).unwrap().pace, None);
        assert_eq!(known.reports().count(), 0);
        let address = QuotaSetting::of_address(source("a"), "proxy-1".to_owned(), Timestamp::from_millis(1));
        let text = serde_json::to_string(&address).unwrap();
        let changed = known.take("t", &record(&setting_key(&address), Some(text))).unwrap();
        assert_eq!((changed.before, changed.now.address.as_deref()), (None, Some("proxy-1")));
        assert_eq!(known.setting(&source("a"), None).unwrap().address, None, "the source's stays");
        assert!(known.settings_of(&source("a")).addresses.contains_key("proxy-1"));
    }

    #[test]
    fn a_report_is_replaced_and_taken_away_by_its_key() {
        let mut known = Known::default();
        let report = |calls: u64| {
            let text = format!(
                r#"{{"source":"a","instance":"w","chunk":0,"chunks":1,"reported_at":{calls},"counted_at":0,"day_at":0,"accounts":[]}}"#
            );
            record(&report_key(&source("a"), "w", 0), Some(text))
        };
        known.take("t", &report(1));
        known.take("t", &report(2));
        let seen: Vec<_> = known.reports_of(&source("a")).map(|report| report.reported_at.as_millis()).collect();
        assert_eq!(seen, [2]);
        known.take("t", &record("report/a/w/0", None));
        assert_eq!(known.reports().count(), 0);
    }
}
