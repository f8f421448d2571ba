//! What a vendor allows, divided between Redis and workers that have lost it, so that all may call at once. Pure.
//!
//! A worker that is cut off from Redis does not know what the others take from it, and Redis does not know that
//! somebody is cut off. So what such a worker may use is kept back from what Redis grants *at all times*: Redis grants
//! at 1 − ρ of the pace, and each of at most n workers alone goes at ρ/n of it. The vendor then sees n + 1 streams of
//! calls, each of them even, whose phases nobody can know. That is harder on it than one even stream of the same rate,
//! since all of them may happen to call at once; what they may do together is bounded all the same.
//!
//! A stream of spacing Tᵢ whose calls are delayed by anything up to D (the way's jitter, and our lateness) brings at most
//! ⌊(t + D)/Tᵢ⌋ + 1 calls into any time t. With T the spacing of them all together, 1/T = Σ 1/Tᵢ:
//!
//! - a *bucket* of rate r and burst B must hold that for every t: Σ ⌊(t + D)/Tᵢ⌋ + n + 1 ≤ B + r·t. So B ≥ n + 1, since
//!   each stream may begin at once; let k = B − n − 1. With T ≥ 1/r it is enough to look at the first t at which any
//!   stream brings its second call: that is T₀ − D for Redis' own, the quickest (T₀ = T/(1 − ρ)), if T₀ ≥ D. There it
//!   says T₀ ≥ D + (1/(1 − ρ) − k)/r. Where T₀ < D it is enough that D ≤ k·T.
//! - a *window* of W that grants N calls sees at most Σ ⌈(W + D)/Tᵢ⌉ < (W + D)/T + n + 1 calls, so that
//!   T ≥ (W + D)/(N − n) is enough.
//! - *budgets* of minutes and days are divided call by call: what no window of the vendor's sees too much of in each part,
//!   it does not see too much of in all.
//!
//! Calls under way are not divided, nor are limits that nobody knows: these combinations are refused.

use std::time::Duration;

use super::{
    Limit, Pacing,
    budget::Rule,
    limit::{Counting, micros},
    pace::{Pace, covered, stretch},
    plan::{Limits, Plan, Rules},
};

/// How much is kept back, for how many.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Division {
    /// The share of everything that Redis does not grant; above 0, at most [`Self::RESERVE_MAX`].
    pub reserve: f64,
    /// Among how many workers it is divided; at least 1.
    pub workers: u32,
}

/// What is left for Redis, and what one worker alone may use.
#[derive(Clone, Debug, PartialEq)]
pub struct Divided {
    /// What Redis grants.
    pub granted: Plan,
    /// What each worker may use without it.
    pub alone: Plan,
}

/// Why limits cannot be divided.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Indivisible {
    /// All streams may call at once, and the vendor does not take so many.
    #[error(
        "on_redis_loss = \"share\" is not safe with a limit of {limit}: {workers} workers without Redis may happen to call \
         in the same instant as one that has it, and it takes a burst of {wanted} for that. Use on_redis_loss = \"stop\", \
         or fewer workers_max"
    )]
    Burst {
        /// The limit in words.
        limit: String,
        /// How many workers.
        workers: u32,
        /// Which burst it takes.
        wanted: u32,
    },
    /// A window takes fewer calls than there are workers.
    #[error(
        "on_redis_loss = \"share\" is not safe with a limit of {limit}: {workers} workers without Redis and one that has it \
         may call in the same window, which must allow more than {workers}. Use on_redis_loss = \"stop\", or fewer workers_max"
    )]
    Window {
        /// The limit in words.
        limit: String,
        /// How many workers.
        workers: u32,
    },
    /// A part would be no call at all.
    #[error(
        "on_redis_loss = \"share\": {reserve} of {limit} is less than one call for each of {workers} workers. Use \
         on_redis_loss = \"stop\", a larger reserve, or fewer workers_max"
    )]
    Budget {
        /// The limit in words.
        limit: String,
        /// What is kept back.
        reserve: String,
        /// How many workers.
        workers: u32,
    },
    /// Only Redis can count calls under way.
    #[error(
        "on_redis_loss = \"share\" cannot keep in_flight = {most}: calls under way are counted in Redis. Use \
         on_redis_loss = \"stop\", or leave in_flight out"
    )]
    InFlight {
        /// The cap.
        most: u32,
    },
    /// What is sought cannot be divided.
    #[error(
        "on_redis_loss = \"share\" needs to know every limit, and some account has none: what is sought cannot be divided. \
         Give it a limit, or use on_redis_loss = \"stop\""
    )]
    Unknown,
}

impl Division {
    /// Of the larger half of everything Redis remains the keeper.
    pub const RESERVE_MAX: f64 = 0.5;
    /// The most workers that make sense: each would go at a two-hundredth of the pace.
    pub const WORKERS_MAX: u32 = 100;

    /// The two plans.
    ///
    /// # Errors
    /// [`Indivisible`]: the limits do not allow it.
    pub fn divide(&self, limits: &Limits, pacing: &Pacing) -> Result<Divided, Indivisible> {
        for account in &limits.accounts {
            if let Some(most) = account.in_flight {
                return Err(Indivisible::InFlight { most });
            }
            if account.is_guess {
                return Err(Indivisible::Unknown);
            }
        }
        let part = |stretch: f64, calls: &dyn Fn(u64, u64) -> u64| {
            let terms = |limits: &[Limit]| {
                let Pace { spacing, lateness } = self.pace(limits, pacing)?;
                let budgets = limits.iter().filter_map(|limit| Some((limit, Rule::of(limit, pacing)?)));
                let divided = |(limit, rule): (&Limit, Rule)| {
                    let one = self.calls_alone(limit)?;
                    Ok(Rule { calls: calls(rule.calls, one), ..rule })
                };
                let budgets = budgets.map(divided).collect::<Result<_, _>>()?;
                Ok((Rules { spacing: micros(longer(spacing, stretch)), budgets }, lateness))
            };
            Plan::on(limits, &terms)
        };
        let workers = f64::from(self.workers);
        let all = u64::from(self.workers);
        Ok(Divided {
            granted: part(1.0 / (1.0 - self.reserve), &|calls, alone| calls - all * alone)?,
            alone: part(workers / self.reserve, &|_, alone| alone)?.learning(),
        })
    }

    /// How many calls of a budget are for each worker alone.
    fn calls_alone(&self, limit: &Limit) -> Result<u64, Indivisible> {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to 2^31")]
        let calls = (f64::from(limit.calls) * self.reserve / f64::from(self.workers)) as u64;
        let nothing =
            || Indivisible::Budget { limit: limit.words(), reserve: self.reserve.to_string(), workers: self.workers };
        (calls > 0).then_some(calls).ok_or_else(nothing)
    }

    /// The pace of all streams together.
    fn pace(&self, limits: &[Limit], pacing: &Pacing) -> Result<Pace, Indivisible> {
        let mut tightest = Duration::ZERO;
        for limit in limits.iter().filter(|limit| limit.is_paced()) {
            tightest = tightest.max(self.tightest(limit, pacing.jitter + pacing.guard(limit))?);
        }
        let lateness = limits.iter().filter(|limit| limit.is_paced()).map(|limit| {
            let spare = self.delay_max(limit, tightest).saturating_sub(pacing.jitter);
            (spare / 4).max(pacing.guard(limit).min(spare))
        });
        let lateness = lateness.min().unwrap_or(Pacing::LATENESS_MAX).min(Pacing::LATENESS_MAX);
        Ok(Pace { spacing: stretch(tightest, pacing.margin), lateness })
    }

    /// The shortest spacing of all together with delays of up to `delay`.
    fn tightest(&self, limit: &Limit, delay: Duration) -> Result<Duration, Indivisible> {
        let (calls, base) = covered(limit);
        let kept = 1.0 - self.reserve;
        if limit.kind != Counting::Bucket {
            let Some(left) = calls.checked_sub(self.workers).filter(|left| *left > 0) else {
                return Err(Indivisible::Window { limit: limit.words(), workers: self.workers });
            };
            return Ok(longer(base + delay, 1.0 / f64::from(left)));
        }
        let Some(spare) = self.spare(calls) else {
            return Err(Indivisible::Burst { limit: limit.words(), workers: self.workers, wanted: self.workers + 1 });
        };
        // Redis' own stream brings its second call, and before that nobody does …
        let first = longer(base, (1.0 - f64::from(spare) * kept).max(0.0)) + longer(delay, kept);
        // … or the burst covers every delay.
        let any = if spare > 0 { longer(delay, 1.0 / f64::from(spare)) } else { Duration::MAX };
        Ok(base.max(first.min(any)))
    }

    /// The longest delay for which a spacing is long enough.
    fn delay_max(&self, limit: &Limit, spacing: Duration) -> Duration {
        let (calls, base) = covered(limit);
        if limit.kind != Counting::Bucket {
            return spacing.saturating_mul(calls.saturating_sub(self.workers)).saturating_sub(base);
        }
        let spare = self.spare(calls).unwrap_or_default();
        let (redis, calls) = (1.0 / (1.0 - self.reserve), f64::from(spare));
        let first = spacing.mul_f64(redis).saturating_sub(longer(base, (redis - calls).max(0.0)));
        first.max(spacing.saturating_mul(spare))
    }

    /// What is left of a burst if all streams call at once.
    fn spare(&self, burst: u32) -> Option<u32> {
        burst.checked_sub(self.workers.checked_add(1)?)
    }
}

impl Plan {
    /// The same for somebody who takes every budget for spent until he has seen a whole window of it.
    fn learning(mut self) -> Self {
        let accounts = self.accounts.iter_mut().map(|account| &mut account.rules);
        for rules in accounts.chain(&mut self.addresses).chain([&mut self.source]) {
            rules.budgets.iter_mut().for_each(|budget| budget.learns = true);
        }
        self
    }
}

/// `time * by`, rounded up.
fn longer(time: Duration, by: f64) -> Duration {
    if time.is_zero() || by <= 0.0 { Duration::ZERO } else { time.mul_f64(by) + Duration::from_micros(1) }
}

#[cfg(test)]
mod tests;
