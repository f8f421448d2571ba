//! Shares of the planned rate: who asked for less, and how much is left of it. Pure.

use serde::{Deserialize, Serialize};

/// A share of the planned rate: above zero, at most the whole.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct Share(f64);

/// A number that is no share.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("{found} is no share: give a number from {} to 1 (0.5 is half of it)", Share::LEAST)]
pub struct InvalidShare {
    /// What was given.
    pub found: f64,
}

impl Share {
    /// Everything.
    pub const WHOLE: Self = Self(1.0);
    /// The least. Who wants nothing at all holds the account or the source.
    pub const LEAST: f64 = 0.001;

    /// A checked share.
    ///
    /// # Errors
    /// [`InvalidShare`] below [`Self::LEAST`], above 1 or no number.
    pub fn new(share: f64) -> Result<Self, InvalidShare> {
        if (Self::LEAST..=1.0).contains(&share) { Ok(Self(share)) } else { Err(InvalidShare { found: share }) }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> f64 {
        self.0
    }

    /// The smaller of two.
    #[must_use]
    pub const fn min(self, other: Self) -> Self {
        Self(self.0.min(other.0))
    }
}

impl TryFrom<f64> for Share {
    type Error = InvalidShare;

    fn try_from(share: f64) -> Result<Self, InvalidShare> {
        Self::new(share)
    }
}

impl From<Share> for f64 {
    fn from(share: Share) -> Self {
        share.0
    }
}

/// Who asks for a share. Each has one of its own, so that none undoes what another asked for; they multiply, with each
/// other and with what refusals leave ([`super::adapt`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PaceBy {
    /// A person, by a command.
    Operator,
    /// A planned window: [`super::calendar`].
    Calendar,
    /// A worker whose calls leave late. To be said again every few seconds: in Redis it ends by itself.
    Delays,
}

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shares {
    operator: Share,
    calendar: Share,
    delays: Share,
}

impl Default for Shares {
    fn default() -> Self {
        Self { operator: Share::WHOLE, calendar: Share::WHOLE, delays: Share::WHOLE }
    }
}

impl Shares {
    /// Replaces one.
    pub const fn set(&mut self, by: PaceBy, share: Share) {
        match by {
            PaceBy::Operator => self.operator = share,
            PaceBy::Calendar => self.calendar = share,
            PaceBy::Delays => self.delays = share,
        }
    }

    /// What is left after all of them.
    #[must_use]
    pub const fn product(&self) -> f64 {
        self.operator.0 * self.calendar.0 * self.delays.0
    }
}

/// How fast an account or a source is called, as far as this process knows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PaceState {
    /// The share of the planned rate after all that multiplies; above 1 only where the plan is a guess.
    pub share: f64,
    /// How many of its calls the vendor refused as too fast, in the whole fleet, since the state was made.
    pub refused: u64,
}

impl Default for PaceState {
    fn default() -> Self {
        Self { share: 1.0, refused: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_above_zero_and_at_most_the_whole() {
        for share in [0.001, 0.5, 1.0] {
            assert_eq!(Share::new(share).map(Share::get), Ok(share));
        }
        for share in [0.0, -0.5, 1.000_1, 0.000_9, f64::NAN, f64::INFINITY] {
            assert!(Share::new(share).is_err(), "{share}");
        }
        let message = serde_json::from_str::<Share>("2.0").unwrap_err().to_string();
        assert!(message.contains("2 is no share"), "{message}");
    }

    #[test]
    fn shares_of_different_people_multiply_and_none_undoes_another() {
        let (half, tenth) = (Share::new(0.5).unwrap(), Share::new(0.1).unwrap());
        let mut shares = Shares::default();
        shares.set(PaceBy::Calendar, half);
        shares.set(PaceBy::Operator, tenth);
        assert!((shares.product() - 0.05).abs() < 1e-12);
        shares.set(PaceBy::Calendar, Share::WHOLE);
        assert!((shares.product() - 0.1).abs() < 1e-12);
    }
}
