//! Presets: the limits that the articles name, under names. Explicit keys go before them.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::quota::{Counting, Limit, civil::Per};

/// A vendor's limits by name, where somebody has published a figure.
///
/// None of them says how the vendor counts. So each is a *sliding* window, which holds for fixed windows of any
/// phase and for a bucket whose burst is at least a tenth of a second's calls as well; who knows better says so
/// with `limit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Preset {
    /// 60 calls a minute and account, evenly one a second.
    ///
    /// Source: the article "处理限流、缓存与数据一致性" (a window of a minute, 60 calls, beyond it HTTP 429); it
    /// spreads them evenly itself ("即每秒1次"), which makes 1688 neither idle nor crowded.
    #[serde(rename = "1688-60-per-minute")]
    Ali60PerMinute,
    /// 10 calls a second and account.
    ///
    /// Source: the article on a distributed 1688 pipeline ("单应用账号通常为 10QPS").
    #[serde(rename = "1688-10-per-second")]
    Ali10PerSecond,
    /// 10 calls a second and key, and below 100 a second and address.
    ///
    /// Source: the article on a high-concurrency Taobao API ("官方API默认QPS=10", "单IP请求频率 < 100QPS").
    #[serde(rename = "taobao-10-per-second")]
    Taobao10PerSecond,
    /// 8 of those 10 calls a second and key, and below 100 a second and address.
    ///
    /// Source: the same article, which leaves a fifth unused ("留20%安全余量").
    #[serde(rename = "taobao-8-of-10-per-second")]
    Taobao8Of10PerSecond,
    /// Below 100 calls a second and address, and nothing about accounts.
    ///
    /// Source: the same article.
    #[serde(rename = "taobao-below-100-per-address")]
    TaobaoBelow100PerAddress,
}

impl Preset {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Ali60PerMinute,
        Self::Ali10PerSecond,
        Self::Taobao10PerSecond,
        Self::Taobao8Of10PerSecond,
        Self::TaobaoBelow100PerAddress,
    ];

    /// What a configuration calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ali60PerMinute => "1688-60-per-minute",
            Self::Ali10PerSecond => "1688-10-per-second",
            Self::Taobao10PerSecond => "taobao-10-per-second",
            Self::Taobao8Of10PerSecond => "taobao-8-of-10-per-second",
            Self::TaobaoBelow100PerAddress => "taobao-below-100-per-address",
        }
    }

    /// What it allows each account; `None` if it says nothing about accounts.
    #[must_use]
    pub fn account(self) -> Option<Limit> {
        match self {
            Self::Ali60PerMinute => Some(Limit { spread: true, ..sliding(60, Duration::from_secs(60)) }),
            Self::Ali10PerSecond | Self::Taobao10PerSecond => Some(sliding(10, Duration::from_secs(1))),
            Self::Taobao8Of10PerSecond => Some(sliding(8, Duration::from_secs(1))),
            Self::TaobaoBelow100PerAddress => None,
        }
    }

    /// How many calls may be under way: in all, and to one host; `None` if it does not say.
    ///
    /// Source: the Taobao article's client ("limit=100", "`limit_per_host=20`").
    #[must_use]
    pub const fn calls_in_flight(self) -> Option<[usize; 2]> {
        match self {
            Self::Ali60PerMinute | Self::Ali10PerSecond => None,
            Self::Taobao10PerSecond | Self::Taobao8Of10PerSecond | Self::TaobaoBelow100PerAddress => Some([100, 20]),
        }
    }

    /// What it allows each address that calls come from; `None` if it says nothing about addresses.
    #[must_use]
    pub const fn address(self) -> Option<Limit> {
        match self {
            Self::Ali60PerMinute | Self::Ali10PerSecond => None,
            Self::Taobao10PerSecond | Self::Taobao8Of10PerSecond | Self::TaobaoBelow100PerAddress => {
                Some(sliding(99, Duration::from_secs(1)))
            }
        }
    }
}

const fn sliding(calls: u32, per: Duration) -> Limit {
    Limit { calls, per: Per::of(per), burst: 1, kind: Counting::Sliding, starts_at: None, spread: false }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::{Pacing, plan};

    #[test]
    fn each_preset_is_found_by_its_name_and_has_valid_limits() {
        for preset in Preset::ALL {
            let json = serde_json::to_string(&preset).unwrap();
            assert_eq!(json, format!("{:?}", preset.name()));
            assert_eq!(serde_json::from_str::<Preset>(&json).unwrap(), preset);
            let limits = [preset.account(), preset.address()];
            assert!(limits.iter().any(Option::is_some), "{preset:?} says nothing");
            for limit in limits.iter().flatten() {
                assert_eq!(limit.validate(), Ok(()), "{preset:?}");
                assert!(limit.is_paced(), "{preset:?}: nobody has to wait for a minute after a start");
            }
        }
    }

    #[test]
    fn a_preset_stays_below_its_figure_with_all_its_jitter() {
        let per_second = |limit: Limit| {
            let limits = plan::Limits::of_accounts([Some(limit)]);
            let spacing = plan::Plan::new(&limits, &Pacing::default()).accounts[0].rules.spacing;
            1.0 / Duration::from_micros(spacing).as_secs_f64()
        };
        let table = [
            (Preset::Ali60PerMinute.account(), 0.99, 1.0),
            (Preset::Ali10PerSecond.account(), 9.8, 10.0),
            (Preset::Taobao8Of10PerSecond.account(), 7.8, 8.0),
            (Preset::TaobaoBelow100PerAddress.address(), 97.0, 99.0),
        ];
        for (limit, least, most) in table {
            let rate = per_second(limit.clone().unwrap());
            assert!((least..most).contains(&rate), "{limit:?}: {rate}");
        }
    }
}
