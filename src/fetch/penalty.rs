//! How long an account rests after a throttle for which the vendor named no time. Pure.

use std::{collections::HashMap, time::Duration};

/// Throttles in a row, per account.
#[derive(Debug, Default)]
pub(super) struct Penalties(HashMap<usize, u32>);

impl Penalties {
    /// 1688 names no time; a client in the wild needs 10, 20, 40, 80, then 120 s (`vendors.md`, section A).
    const FIRST: Duration = Duration::from_secs(10);
    const LONGEST: Duration = Duration::from_secs(120);

    /// The rest after one more throttle in a row.
    pub(super) fn punish(&mut self, account: usize) -> Duration {
        let row = self.0.entry(account).or_default();
        let rest = Self::FIRST.saturating_mul(1 << (*row).min(10)).min(Self::LONGEST);
        *row += 1;
        rest
    }

    /// A call was answered: the row has ended.
    pub(super) fn forgive(&mut self, account: usize) {
        self.0.remove(&account);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rests_double_up_to_two_minutes_until_a_call_is_answered() {
        let mut penalties = Penalties::default();
        let rests: Vec<_> = (0..6).map(|_| penalties.punish(1).as_secs()).collect();
        assert_eq!(rests, [10, 20, 40, 80, 120, 120]);
        assert_eq!(penalties.punish(2).as_secs(), 10);
        penalties.forgive(1);
        assert_eq!(penalties.punish(1).as_secs(), 10);
    }
}
