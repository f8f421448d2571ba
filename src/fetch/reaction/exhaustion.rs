//! How long calls pause when this machine has run out of what they need. Pure.

use std::time::Duration;

use tokio::time::Instant;

use crate::runtime::backoff::doubled;

/// The pauses of one source in this process.
#[derive(Debug, Default)]
pub(super) struct Exhaustion {
    /// In a row.
    pauses: u32,
    until: Option<Instant>,
}

impl Exhaustion {
    const FIRST: Duration = Duration::from_millis(250);
    const LONGEST: Duration = Duration::from_secs(10);

    /// Until when no call leaves, if so.
    pub(super) fn pauses_until(&self, now: Instant) -> Option<Instant> {
        self.until.filter(|until| *until > now)
    }

    /// A call could not leave: how long the pause is that begins with it. Nothing if one is under way: that call had begun
    /// before.
    pub(super) fn noted(&mut self, now: Instant) -> Option<Duration> {
        if self.pauses_until(now).is_some() {
            return None;
        }
        let pause = doubled(Self::FIRST, self.pauses, Self::LONGEST);
        (self.pauses, self.until) = (self.pauses + 1, Some(now + pause));
        Some(pause)
    }

    /// A call has left: whether that is over.
    pub(super) fn over(&mut self, now: Instant) -> bool {
        if self.pauses == 0 || self.pauses_until(now).is_some() {
            return false;
        }
        *self = Self::default();
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_ten_seconds_until_a_call_leaves_after_one() {
        let (mut exhaustion, mut now) = (Exhaustion::default(), Instant::now());
        let mut pauses = Vec::new();
        for _ in 0..8 {
            let pause = exhaustion.noted(now).unwrap();
            assert_eq!(exhaustion.noted(now), None, "it had begun before");
            assert!(!exhaustion.over(now), "so had this one");
            pauses.push(u64::try_from(pause.as_millis()).unwrap());
            now += pause;
        }
        assert_eq!(pauses, [250, 500, 1_000, 2_000, 4_000, 8_000, 10_000, 10_000]);
        assert!(exhaustion.over(now) && !exhaustion.over(now));
        assert_eq!(exhaustion.noted(now), Some(Exhaustion::FIRST));
    }
}
