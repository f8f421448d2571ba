//! Reaction to failed inserts: each kind is logged once, and blocks grow while ClickHouse has too many parts.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::block::Limits;
use crate::{message::envelope::Kind, store::Trouble};

/// What ClickHouse refuses now, by kind of record: one table may be wrong while the others are not.
#[derive(Debug, Default)]
pub(super) struct Troubles(Mutex<HashMap<Kind, (Trouble, Instant)>>);

impl Troubles {
    /// Says what is wrong, unless it has been said. True if it was.
    pub fn meet(&self, kind: Kind, trouble: &Trouble, block: &str) -> bool {
        let mut now = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |(known, _): &(Trouble, Instant)| known.kind == trouble.kind && known.code == trouble.code;
        let new = !now.values().any(same);
        if new {
            tracing::error!(
                block,
                "insert failed: {trouble}. Nothing is lost: reading pauses, and the same block is sent again until \
                 ClickHouse accepts it"
            );
        }
        // What goes on is told in its first words: those of memory and parts have numbers that change at each try.
        if !now.get(&kind).is_some_and(same) {
            let since = now.get(&kind).map_or_else(Instant::now, |(_, since)| *since);
            now.insert(kind, (trouble.clone(), since));
        }
        new
    }

    /// Says so when the last trouble is over.
    pub fn over(&self, kind: Kind) -> bool {
        let mut now = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((_, since)) = now.remove(&kind) else { return false };
        let last = now.is_empty();
        if last {
            tracing::info!(seconds = since.elapsed().as_secs(), "ClickHouse accepts inserts again");
        }
        last
    }

    /// What is wrong now, for `/ready`.
    pub fn text(&self) -> Option<String> {
        let now = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        now.values().min_by_key(|(_, since)| *since).map(|(trouble, _)| format!("insert failed: {trouble}"))
    }
}

/// How often blocks may double while ClickHouse has too many parts.
const LEVEL_MAX: u32 = 3;

/// How long it must have been quiet before blocks shrink again.
const QUIET: Duration = Duration::from_secs(60);

/// Larger and fewer blocks while ClickHouse cannot merge as fast as it is given parts. Pure.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pressure {
    level: u32,
    changed_at: Instant,
    refused_at: Instant,
}

impl Pressure {
    pub fn none(now: Instant) -> Self {
        Self { level: 0, changed_at: now, refused_at: now }
    }

    /// ClickHouse has refused a part. True if that changes the limits: not more often than once in the time that a
    /// larger block needs to show its effect.
    pub fn rise(&mut self, now: Instant, age: Duration) -> bool {
        self.refused_at = now;
        let rises = self.level < LEVEL_MAX && (self.level == 0 || now >= self.changed_at + age * (1 << self.level));
        if rises {
            self.level += 1;
            self.changed_at = now;
        }
        rises
    }

    /// Nothing was refused for a while. True if that changes the limits.
    pub fn fall(&mut self, now: Instant) -> bool {
        let falls = self.level > 0 && now >= self.changed_at.max(self.refused_at) + QUIET;
        if falls {
            self.level -= 1;
            self.changed_at = now;
        }
        falls
    }

    /// The limits of blocks now.
    pub fn limits(&self, base: Limits) -> Limits {
        let factor = 1 << self.level;
        Limits { rows: base.rows.saturating_mul(factor), bytes: base.bytes, age: base.age * (1 << self.level) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::TroubleKind;

    fn trouble(kind: TroubleKind) -> Trouble {
        Trouble { kind, code: None, message: "m".to_owned(), view: None }
    }

    #[tokio::test(start_paused = true)]
    async fn a_trouble_is_told_once_until_it_changes() {
        let troubles = Troubles::default();
        assert!(troubles.meet(Kind::Result, &trouble(TroubleKind::Away), "t:0:1-2"));
        assert!(!troubles.meet(Kind::Result, &trouble(TroubleKind::Away), "t:0:1-2"));
        assert!(!troubles.meet(Kind::Failure, &trouble(TroubleKind::Away), "t:0:1-2"));
        assert!(troubles.meet(Kind::Result, &trouble(TroubleKind::Schema), "t:0:1-2"));
        assert!(!troubles.over(Kind::Result) && troubles.text().is_some());
        assert!(troubles.over(Kind::Failure) && troubles.text().is_none());
        assert!(!troubles.over(Kind::Failure));
    }

    #[tokio::test(start_paused = true)]
    async fn a_trouble_that_goes_on_is_told_in_the_same_words_though_its_numbers_change() {
        let troubles = Troubles::default();
        let of = |code, message: &str| Trouble {
            kind: TroubleKind::Unable,
            code: Some(code),
            message: message.to_owned(),
            view: None,
        };
        troubles.meet(Kind::Result, &of(241, "would use 4.16 MiB"), "b");
        let told = troubles.text();
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(!troubles.meet(Kind::Result, &of(241, "would use 4.21 MiB"), "b"));
        assert!(!troubles.meet(Kind::Failure, &of(241, "would use 3.00 MiB"), "b"));
        assert_eq!(troubles.text(), told);
        // Another one is news.
        assert!(troubles.meet(Kind::Result, &of(243, "not enough space"), "b"));
        assert!(troubles.text().is_some_and(|text| text.contains("not enough space")), "{:?}", troubles.text());
    }

    #[test]
    fn blocks_grow_step_by_step_while_parts_are_refused_and_shrink_when_it_is_quiet() {
        let base = Limits { rows: 10, bytes: 1_000, age: Duration::from_secs(1) };
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut pressure = Pressure::none(start);
        let mut grown = Vec::new();
        for second in 0..20 {
            if pressure.rise(at(second), base.age) {
                grown.push((second, pressure.limits(base).rows, pressure.limits(base).age.as_secs()));
            }
        }
        assert_eq!(grown[0], (0, 20, 2));
        assert_eq!(u32::try_from(grown.len()).unwrap(), LEVEL_MAX);
        assert_eq!(pressure.limits(base).rows, 80);
        assert!(!pressure.fall(at(78)) && pressure.fall(at(79)));
        assert_eq!(pressure.limits(base).rows, 40);
        assert!(!pressure.fall(at(80)));
    }
}
