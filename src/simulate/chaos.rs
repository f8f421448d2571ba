//! Outages on command: which calls of which gateway they strike, and how. No I/O.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{
    dice::{Question, fraction, roll},
    gate::Front,
};

/// What an operator asks for: `POST /chaos`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// Which gateway, as `/stats` calls it; without it, all of them.
    #[serde(default, alias = "source")]
    pub gateway: Option<String>,
    /// What happens to calls.
    pub mode: Mode,
    /// To which part of them, from 0 to 1.
    #[serde(default = "all")]
    pub share: f64,
    /// For how long; without it until the next order.
    #[serde(default, rename = "for", with = "humantime_serde::option")]
    pub lasts: Option<Duration>,
    /// How much longer a reply takes ([`Mode::Slow`]).
    #[serde(default = "default_delay", with = "humantime_serde")]
    pub delay: Duration,
}

const fn all() -> f64 {
    1.0
}

/// Longer than anybody waits.
const fn default_delay() -> Duration {
    Duration::from_secs(30)
}

/// What happens to calls that get behind the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// HTTP 502, or no reply at all.
    Outage,
    /// The reply takes longer.
    Slow,
    /// The vendor's own words for "my service is away".
    Errors,
    /// Nothing.
    Off,
}

/// An order that cannot be carried out.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// No gateway has that name.
    #[error("there is no gateway {found:?}; known: {there}")]
    Gateway {
        /// What was asked for.
        found: String,
        /// What there is.
        there: String,
    },
    /// A share below 0 or above 1.
    #[error("share is {found}; it must be from 0 to 1")]
    Share {
        /// What was asked for.
        found: String,
    },
}

/// What is going on.
#[derive(Clone, Copy, Debug)]
struct Storm {
    mode: Mode,
    share: f64,
    /// Since the start; `None`: for good.
    until: Option<Duration>,
    delay: Duration,
}

/// What strikes one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Strike {
    /// HTTP 502.
    BadGateway,
    /// No reply.
    Cut,
    /// The vendor's own error.
    Error,
    /// Only later.
    Late(Duration),
}

/// The storms of all gateways.
#[derive(Debug, Default)]
pub(super) struct Chaos {
    storms: Mutex<BTreeMap<Front, Storm>>,
}

impl Chaos {
    /// Carries an order out; says which gateways it is about.
    ///
    /// # Errors
    /// [`OrderError`]; nothing has changed.
    pub(super) fn order(&self, order: &Order, now: Duration) -> Result<Vec<&'static str>, OrderError> {
        if !(0.0..=1.0).contains(&order.share) {
            return Err(OrderError::Share { found: order.share.to_string() });
        }
        let fronts: Vec<Front> = match &order.gateway {
            None => Front::ALL.to_vec(),
            Some(name) => Front::ALL.into_iter().filter(|front| front.name() == name).collect(),
        };
        if fronts.is_empty() {
            let there = Front::ALL.map(Front::name).join(", ");
            return Err(OrderError::Gateway { found: order.gateway.clone().unwrap_or_default(), there });
        }
        let Order { mode, share, lasts, delay, .. } = *order;
        let storm = Storm { mode, share, until: lasts.map(|lasts| now + lasts), delay };
        self.lock().extend(fronts.iter().map(|front| (*front, storm)));
        Ok(fronts.into_iter().map(Front::name).collect())
    }

    /// What strikes the call of this number, if anything does.
    pub(super) fn strike(&self, front: Front, seed: u64, serial: u64, now: Duration) -> Option<Strike> {
        let storm = *self.lock().get(&front)?;
        let bits = roll(seed ^ front as u64, Question::Chaos, serial);
        if storm.until.is_some_and(|until| now >= until) || fraction(bits) >= storm.share {
            return None;
        }
        match storm.mode {
            Mode::Off => None,
            Mode::Slow => Some(Strike::Late(storm.delay)),
            Mode::Errors => Some(Strike::Error),
            // The lowest bits have no part in the fraction.
            Mode::Outage if bits & 1 == 0 => Some(Strike::BadGateway),
            Mode::Outage => Some(Strike::Cut),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Front, Storm>> {
        self.storms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(json: &str) -> Order {
        serde_json::from_str(json).unwrap()
    }

    fn struck(chaos: &Chaos, front: Front, at: u64) -> usize {
        let now = Duration::from_secs(at);
        (0..1_000).filter(|serial| chaos.strike(front, 7, *serial, now).is_some()).count()
    }

    #[test]
    fn an_outage_strikes_its_share_of_its_gateway_for_its_time() {
        let chaos = Chaos::default();
        let told = order(r#"{"gateway":"taobao","mode":"outage","share":0.3,"for":"10s"}"#);
        assert_eq!(chaos.order(&told, Duration::from_secs(5)), Ok(vec!["taobao"]));
        let count = struck(&chaos, Front::Taobao, 14);
        assert!((230..370).contains(&count), "{count}");
        assert_eq!((struck(&chaos, Front::Taobao, 15), struck(&chaos, Front::Ali1688, 14)), (0, 0));
    }

    #[test]
    fn all_gateways_can_be_slow_and_recover_at_once() {
        let chaos = Chaos::default();
        assert_eq!(chaos.order(&order(r#"{"mode":"slow","delay":"2s"}"#), Duration::ZERO).unwrap().len(), 6);
        let strike = chaos.strike(Front::Router, 7, 0, Duration::from_secs(1_000_000));
        assert_eq!(strike, Some(Strike::Late(Duration::from_secs(2))));
        chaos.order(&order(r#"{"mode":"off"}"#), Duration::ZERO).unwrap();
        assert_eq!(struck(&chaos, Front::Router, 1), 0);
    }

    #[test]
    fn an_order_that_makes_no_sense_is_refused_with_what_there_is() {
        let chaos = Chaos::default();
        let unknown = chaos.order(&order(r#"{"source":"ebay","mode":"errors"}"#), Duration::ZERO).unwrap_err();
        assert!(unknown.to_string().contains("known: 1688, 1688-router"), "{unknown}");
        let share = chaos.order(&order(r#"{"mode":"errors","share":2}"#), Duration::ZERO).unwrap_err();
        assert!(share.to_string().contains("from 0 to 1"), "{share}");
        assert!(serde_json::from_str::<Order>(r#"{"mode":"earthquake"}"#).is_err());
    }
}
