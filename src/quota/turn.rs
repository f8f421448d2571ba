//! Whose turn a slot is while express requests and the backlog wait for it. Pure.

use crate::message::Lane;

/// Who is next, if both wait.
///
/// Counts by how much express is ahead of its share: an express slot adds `1 − share`, one of the backlog takes
/// `share` off. Express is next unless it is ahead; so over any row of slots for which both wait it gets its share to
/// within one slot. Time without waiting saves nothing up, but lets what is ahead be forgotten. Slots that others have
/// left for express are its own, on top of its share.
#[derive(Debug)]
pub struct Arbiter {
    share: f64,
    ahead: f64,
    lent: usize,
}

impl Arbiter {
    /// Both lanes begin even; express may have this share while both wait.
    #[must_use]
    pub fn new(share: f64) -> Self {
        Self { share, ahead: 0.0, lent: 0 }
    }

    /// The express lane's share of the slots from now on.
    pub fn set_share(&mut self, share: f64) {
        self.share = share;
    }

    /// Others have left so many of their slots for express. What it turns out not to need is forgotten.
    pub fn lend(&mut self, slots: usize) {
        self.lent += slots;
    }

    /// The lane whose turn it is, if one waits.
    pub fn next(&self, waits: impl Fn(Lane) -> bool) -> Option<Lane> {
        // A sum of many shares is not exact.
        let preferred = if self.lent > 0 || self.ahead < 1e-9 { Lane::Express } else { Lane::Bulk };
        [preferred, preferred.other()].into_iter().find(|lane| waits(*lane))
    }

    /// A slot has gone to this lane, whether or not the other one waited for it.
    pub fn served(&mut self, lane: Lane, other_waits: bool) {
        match (lane, other_waits) {
            (Lane::Express, _) if self.lent > 0 => self.lent -= 1,
            (Lane::Express, true) => self.ahead += 1.0 - self.share,
            (Lane::Express, false) => {}
            (Lane::Bulk, true) => self.ahead -= self.share,
            (Lane::Bulk, false) => {
                self.lent = 0;
                self.ahead = (self.ahead - self.share).max(self.ahead.min(0.0));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Serves slots one after the other; for each, who waits, and who was served.
    fn served(share: f64, waiting: &[(bool, bool)]) -> Vec<Option<Lane>> {
        let mut arbiter = Arbiter::new(share);
        let serve = |(bulk, express): &(bool, bool)| {
            let waits = |lane| if lane == Lane::Express { *express } else { *bulk };
            let lane = arbiter.next(waits)?;
            arbiter.served(lane, waits(lane.other()));
            Some(lane)
        };
        waiting.iter().map(serve).collect()
    }

    #[test]
    fn half_and_half_while_both_wait_and_all_for_who_waits_alone() {
        let order = |share: f64, waiting: &[(bool, bool)]| -> String {
            let letter = |lane: Option<Lane>| lane.map_or('-', |lane| if lane.is_bulk() { 'b' } else { 'E' });
            served(share, waiting).into_iter().map(letter).collect()
        };
        let (bulk, express, both, nobody) = ((true, false), (false, true), (true, true), (false, false));
        assert_eq!(order(0.5, &[both; 6]), "EbEbEb");
        assert_eq!(order(0.25, &[both; 8]), "EbbbEbbb");
        assert_eq!(order(0.5, &[express, express, express, both, nobody, bulk]), "EEEE-b");
        assert_eq!(order(0.5, &[bulk, bulk, bulk, both, both, both]), "bbbEbE", "waiting saves nothing up");
    }

    #[test]
    fn what_others_have_left_for_express_comes_on_top_of_its_share_and_is_forgotten_if_it_does_not_need_it() {
        let mut arbiter = Arbiter::new(0.5);
        let mut next = |lent: usize, express_waits: bool| {
            arbiter.lend(lent);
            let lane = arbiter.next(|lane| lane.is_bulk() || express_waits).unwrap();
            arbiter.served(lane, lane.is_bulk() && express_waits || !lane.is_bulk());
            if lane.is_bulk() { 'b' } else { 'E' }
        };
        let order: String = [0, 2, 0, 0, 0].map(|lent| next(lent, true)).iter().collect();
        assert_eq!(order, "EEEbE", "two of its own, one by its share");
        assert_eq!([next(3, false), next(0, true), next(0, true), next(0, true)], ['b', 'E', 'b', 'E']);
    }

    fn share() -> impl Strategy<Value = f64> {
        0.01f64..0.99
    }

    fn waiting() -> impl Strategy<Value = Vec<(bool, bool)>> {
        prop::collection::vec((any::<bool>(), any::<bool>()), 0..200)
    }

    proptest! {
        #[test]
        fn no_slot_is_lost_and_nobody_is_served_who_does_not_wait(share in share(), waiting in waiting()) {
            for ((bulk, express), lane) in waiting.iter().zip(served(share, &waiting)) {
                prop_assert_eq!(lane.is_some(), *bulk || *express);
                prop_assert!(lane != Some(Lane::Bulk) || *bulk);
                prop_assert!(lane != Some(Lane::Express) || *express);
            }
        }

        #[test]
        #[allow(clippy::cast_precision_loss, reason = "counts of a few hundred")]
        fn in_any_row_of_slots_that_both_want_express_has_its_share_to_within_one(
            share in share(), before in waiting(), row in 1usize..300, from in 0usize..300,
        ) {
            let waiting: Vec<_> = before.iter().copied().chain(vec![(true, true); row]).collect();
            let lanes = served(share, &waiting);
            let piece = &lanes[(before.len() + from % row)..];
            let express = piece.iter().filter(|lane| **lane == Some(Lane::Express)).count() as f64;
            let due = share * piece.len() as f64;
            prop_assert!((express - due).abs() < 1.0 + 1e-6, "{} of {} at {}", express, piece.len(), share);
        }

        #[test]
        fn at_half_of_the_slots_and_more_express_waits_for_one_slot_of_the_backlog_at_most(
            share in 0.5f64..0.99, waiting in waiting(),
        ) {
            let lanes = served(share, &waiting);
            for (slot, pair) in lanes.windows(2).enumerate() {
                let express_waits = waiting[slot].1 && waiting[slot + 1].1;
                prop_assert!(!(express_waits && pair == [Some(Lane::Bulk), Some(Lane::Bulk)]), "at slot {}", slot);
            }
        }
    }
}
