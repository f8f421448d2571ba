//! How many calls arrive per second.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Calls per second by arrival, refused ones included.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Over the last second.
    pub last_1s: f64,
    /// Over the last ten seconds, or since the start if that is less.
    pub last_10s: f64,
}

/// Arrivals of the last ten seconds, in slots of a tenth.
#[derive(Debug)]
pub(super) struct Meter {
    started_at: Duration,
    slots: [(u64, u64); 101],
}

impl Meter {
    pub(super) fn new(started_at: Duration) -> Self {
        Self { started_at, slots: [(0, 0); 101] }
    }

    pub(super) fn arrive(&mut self, at: Duration) {
        let slot = slot(at);
        let at = usize::try_from(slot % self.slots.len() as u64).unwrap_or(0);
        if let Some(entry) = self.slots.get_mut(at) {
            if entry.0 != slot {
                *entry = (slot, 0);
            }
            entry.1 += 1;
        }
    }

    pub(super) fn rates(&self, now: Duration) -> Rates {
        Rates { last_1s: self.rate(now, 10), last_10s: self.rate(now, 100) }
    }

    /// Calls per second over the last `slots` full slots. The present slot is not full: it does not count.
    fn rate(&self, now: Duration, slots: u64) -> f64 {
        let end = slot(now);
        let start = end.saturating_sub(slots).max(slot(self.started_at));
        let calls: u64 =
            self.slots.iter().filter(|(slot, _)| (start..end).contains(slot)).map(|(_, calls)| calls).sum();
        #[allow(clippy::cast_precision_loss, reason = "calls of ten seconds")]
        let (calls, tenths) = (calls as f64, end.saturating_sub(start).max(1) as f64);
        calls * 10.0 / tenths
    }
}

fn slot(at: Duration) -> u64 {
    u64::try_from(at.as_millis() / 100).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_those_of_the_last_second_and_the_last_ten() {
        let mut meter = Meter::new(Duration::ZERO);
        let at = Duration::from_millis;
        // 10 a second for 20 s, then 100 in the last second.
        for millis in (0..20_000).step_by(100).chain((20_000..21_000).step_by(10)) {
            meter.arrive(at(millis));
        }
        assert_eq!(meter.rates(at(21_000)), Rates { last_1s: 100.0, last_10s: 19.0 });
        assert_eq!(meter.rates(at(40_000)), Rates { last_1s: 0.0, last_10s: 0.0 });
    }

    #[test]
    fn a_young_meter_divides_by_its_age() {
        let mut meter = Meter::new(Duration::from_secs(100));
        for millis in (100_000..102_000).step_by(20) {
            meter.arrive(Duration::from_millis(millis));
        }
        assert_eq!(meter.rates(Duration::from_secs(102)), Rates { last_1s: 50.0, last_10s: 50.0 });
    }
}
