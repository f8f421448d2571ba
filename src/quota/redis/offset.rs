//! Where Redis' clock stands against ours: bounds, not a guess. Pure.
//!
//! A script ran between the moment its call was sent and the moment its reply came, and says what Redis' clock
//! showed. So each call gives hard bounds for the difference, and together those of all calls since the
//! connection was made, widened by how far clocks drift apart meanwhile. A Redis that stood still for seconds
//! therefore shifts nothing: its late reply has wide bounds and teaches nothing.

use std::time::Duration;

use tokio::time::Instant;

use crate::quota::limit::Micros;

/// Bounds of Redis' clock at one instant of ours.
#[derive(Clone, Copy, Debug)]
pub struct Offset {
    at: Instant,
    /// What Redis' clock showed `at`, at the least and at the most.
    least: Micros,
    most: Micros,
}

/// Clocks that NTP slews drift apart by this share: 0.0005 each.
const DRIFT_PER_SECOND: Micros = 1_000;

fn micros(time: Duration) -> Micros {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl Offset {
    /// From one call.
    #[must_use]
    pub fn new(sent: Instant, received: Instant, shown: Micros) -> Self {
        let most = shown + micros(received.saturating_duration_since(sent)) + 1;
        Self { at: received, least: shown, most }
    }

    /// With another call's bounds. If they contradict what is known, a clock was set: only the new ones count.
    pub fn learn(&mut self, sent: Instant, received: Instant, shown: Micros) {
        let new = Self::new(sent, received, shown);
        let (least, most) = self.bounds(received);
        *self = if new.least > most || new.most < least {
            new
        } else {
            Self { at: received, least: least.max(new.least), most: most.min(new.most) }
        };
    }

    /// What Redis' clock shows at `at`, at the least and at the most.
    fn bounds(&self, at: Instant) -> (Micros, Micros) {
        let (since, before) = (at.saturating_duration_since(self.at), self.at.saturating_duration_since(at));
        let drift = micros(since + before) / (1_000_000 / DRIFT_PER_SECOND);
        let shown = |then: Micros| (then + micros(since)).saturating_sub(micros(before));
        (shown(self.least).saturating_sub(drift), shown(self.most) + drift)
    }

    /// The span of our time in which Redis' clock comes to show `at`, seen from `now`.
    #[must_use]
    pub fn instants(&self, at: Micros, now: Instant) -> (Instant, Instant) {
        let (least, most) = self.bounds(now);
        let when = |shown: Micros| {
            let ahead = Duration::from_micros(at.saturating_sub(shown)).min(crate::quota::Limit::PER_MAX);
            let behind = Duration::from_micros(shown.saturating_sub(at));
            (now + ahead).checked_sub(behind).unwrap_or(now)
        };
        (when(most), when(least))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOWN: Micros = 1_700_000_000_000_000;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn a_time_of_redis_is_known_to_within_the_round_trip() {
        let sent = Instant::now();
        let received = sent + ms(1);
        let offset = Offset::new(sent, received, SHOWN);
        let (first, last) = offset.instants(SHOWN + 10_000, received);
        assert!(first <= sent + ms(10) && first + Duration::from_micros(10) > sent + ms(10), "{:?}", first - sent);
        assert_eq!(last, received + ms(10));
    }

    #[test]
    fn a_quick_reply_narrows_it_and_a_stalled_one_teaches_nothing() {
        let start = Instant::now();
        let width = |offset: &Offset, at| {
            let (first, last) = offset.instants(SHOWN + 5_000_000, at);
            last - first
        };
        let mut offset = Offset::new(start, start + ms(20), SHOWN);
        offset.learn(start + ms(100), start + ms(101), SHOWN + 90_000);
        assert!(width(&offset, start + ms(101)) < ms(2), "{:?}", width(&offset, start + ms(101)));
        // Redis stopped for two seconds, then ran the script just before it replied.
        offset.learn(start + ms(200), start + ms(2_200), SHOWN + 2_189_500);
        assert!(width(&offset, start + ms(2_200)) < ms(6), "{:?}", width(&offset, start + ms(2_200)));
    }

    #[test]
    fn after_a_clock_was_set_only_new_bounds_count() {
        let start = Instant::now();
        let mut offset = Offset::new(start, start + ms(1), SHOWN);
        let (sent, received) = (start + ms(100), start + ms(101));
        offset.learn(sent, received, SHOWN + 60_000_000);
        let (_, last) = offset.instants(SHOWN + 60_000_000, received);
        assert_eq!(last, received);
    }
}
