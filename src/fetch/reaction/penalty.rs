//! How long an account rests after a throttle for which the vendor named no time. Pure.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use crate::runtime::backoff::doubled;

/// Throttles in a row, per account.
///
/// A rest lets the vendor's counter forget; the pace that gives way at each refusal ([`crate::quota::adapt`]) keeps the
/// next one from coming. Both go by bursts: what was under way when the rest began is no further throttle.
#[derive(Debug, Default)]
pub(super) struct Penalties(HashMap<usize, Row>);

#[derive(Debug)]
struct Row {
    throttles: u32,
    rests_until: Instant,
}

impl Penalties {
    /// 1688 names no time; a client in the wild needs 10, 20, 40, 80, then 120 s (`vendors.md`, section A).
    const FIRST: Duration = Duration::from_secs(10);
    const LONGEST: Duration = Duration::from_secs(120);

    /// Until when the account rests, now that a call of it was throttled which had left at `left_at`.
    pub(super) fn punish(&mut self, account: usize, left_at: Instant, now: Instant) -> Instant {
        let row = self.0.entry(account).or_insert(Row { throttles: 0, rests_until: left_at });
        if left_at >= row.rests_until {
            let rest = doubled(Self::FIRST, row.throttles, Self::LONGEST);
            *row = Row { throttles: row.throttles + 1, rests_until: now + rest };
        }
        row.rests_until
    }

    /// A call that had left at `left_at` was answered: if that was after the rest, the row has ended.
    pub(super) fn forgive(&mut self, account: usize, left_at: Instant) {
        if self.0.get(&account).is_some_and(|row| left_at >= row.rests_until) {
            self.0.remove(&account);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rests_double_up_to_two_minutes_until_a_call_is_answered() {
        let (mut penalties, start) = (Penalties::default(), Instant::now());
        let mut now = start;
        let mut rests = |account, count: usize| -> Vec<u64> {
            (0..count)
                .map(|_| {
                    let until = penalties.punish(account, now, now);
                    let rest = until - now;
                    now = until;
                    rest.as_secs()
                })
                .collect()
        };
        assert_eq!(rests(1, 6), [10, 20, 40, 80, 120, 120]);
        assert_eq!(rests(2, 1), [10]);
        penalties.forgive(1, now);
        assert_eq!(penalties.punish(1, now, now) - now, Duration::from_secs(10));
    }

    #[test]
    fn what_was_under_way_when_the_rest_began_neither_doubles_nor_ends_it() {
        let (mut penalties, left) = (Penalties::default(), Instant::now());
        let now = left + Duration::from_millis(300);
        let until = penalties.punish(1, left, now);
        for call in 1..5 {
            let later = Duration::from_millis(10 * call);
            assert_eq!(penalties.punish(1, left + later, now + later), until);
        }
        penalties.forgive(1, left + Duration::from_millis(60));
        assert_eq!(penalties.punish(1, until, until) - until, Duration::from_secs(20));
    }
}
