//! Refusals beyond the promise, counted and told of once per episode. Pure.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use crate::quota::Scope;

/// The refusals of a source's accounts, and of the source as a whole.
#[derive(Debug, Default)]
pub(super) struct Episodes(HashMap<Scope, Episode>);

#[derive(Debug)]
struct Episode {
    refusals: u64,
    last_at: Instant,
}

impl Episodes {
    /// An episode has ended when there was no refusal for so long.
    const QUIET: Duration = Duration::from_secs(300);

    /// One more refusal. How many there have been in this episode, if it is time to say so: at the first, and ever more
    /// rarely while it lasts.
    pub(super) fn refused(&mut self, scope: Scope, now: Instant) -> Option<u64> {
        let episode = self.0.entry(scope).or_insert(Episode { refusals: 0, last_at: now });
        if now - episode.last_at > Self::QUIET {
            episode.refusals = 0;
        }
        *episode = Episode { refusals: episode.refusals + 1, last_at: now };
        // The calls that were under way at the first one come back refused too.
        let is_told = episode.refusals == 1 || (episode.refusals >= 16 && episode.refusals.is_power_of_two());
        is_told.then_some(episode.refusals)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_episode_is_told_at_its_start_and_then_ever_more_rarely() {
        let (mut episodes, start) = (Episodes::default(), Instant::now());
        let told = |episodes: &mut Episodes, count: u64, from: Instant| -> Vec<u64> {
            (0..count).filter_map(|n| episodes.refused(Scope::Account(1), from + Duration::from_secs(n))).collect()
        };
        assert_eq!(told(&mut episodes, 100, start), [1, 16, 32, 64]);
        assert_eq!(episodes.refused(Scope::Source, start), Some(1), "another scope is another episode");
        assert_eq!(told(&mut episodes, 3, start + Duration::from_secs(100 + 301)), [1]);
        assert!(told(&mut episodes, 3, start + Duration::from_secs(600)).is_empty(), "it goes on");
    }
}
