//! The vendor's side of a limit, for tests: judges arrivals exactly, in whole numbers.

use std::time::Duration;

use super::Limit;

/// A full token bucket that meets calls at their arrival.
pub struct Bucket {
    calls: u128,
    /// The price of a call, in nanoseconds × calls: what is gained in `per`, divided by `calls`.
    price: u128,
    full: u128,
    level: u128,
    last: Duration,
}

impl Bucket {
    pub fn new(limit: &Limit) -> Self {
        let price = limit.per.as_nanos();
        let full = price * u128::from(limit.burst);
        Self { calls: u128::from(limit.calls), price, full, level: full, last: Duration::ZERO }
    }

    /// Whether the call that arrives `at` is served; `at` never goes back.
    pub fn admits(&mut self, at: Duration) -> bool {
        let passed = at.checked_sub(self.last).expect("arrivals come in order");
        self.level = self.full.min(self.level + passed.as_nanos() * self.calls);
        self.last = at;
        match self.level.checked_sub(self.price) {
            Some(left) => {
                self.level = left;
                true
            }
            None => false,
        }
    }

    /// How many of these arrivals, in order, are refused.
    pub fn refused(&mut self, arrivals: impl IntoIterator<Item = Duration>) -> usize {
        arrivals.into_iter().filter(|at| !self.admits(*at)).count()
    }
}
