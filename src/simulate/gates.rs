//! What each gateway counts: calls, ids per call, and what callers did wrong.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use super::{
    gate::{Front, Verdict},
    stats::{GatewayReport, Outcome, Refused},
};

/// The counts of all gateways that were called.
#[derive(Debug, Default)]
pub(super) struct Gates {
    counts: Mutex<BTreeMap<Front, GatewayReport>>,
}

impl Gates {
    pub(super) fn count(&self, front: Front, verdict: &Verdict) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let counts = counts.entry(front).or_default();
        counts.calls += 1;
        match verdict.outcome {
            Outcome::Found | Outcome::Absent | Outcome::OffShelf => {}
            Outcome::InjectedThrottle | Outcome::InjectedFailure => counts.injected += 1,
            Outcome::Renewed { .. } => counts.renewals += 1,
            Outcome::Refused(why) => {
                counts.refused += 1;
                counts.violations += u64::from(why == Refused::Violation);
                counts.during_bans += u64::from(why == Refused::Banned);
                counts.too_many_ids += u64::from(why == Refused::TooMany);
                return;
            }
        }
        let items = verdict.items.len() as u64;
        counts.item_calls += u64::from(items > 0);
        counts.items += items;
        counts.items_per_call_max = counts.items_per_call_max.max(items);
    }

    /// A snapshot, by the gateways' names.
    pub(super) fn report(&self) -> BTreeMap<String, GatewayReport> {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let report = |(front, counts): (&Front, &GatewayReport)| {
            #[allow(clippy::cast_precision_loss, reason = "a mean for people")]
            let items_per_call = counts.items as f64 / counts.item_calls.max(1) as f64;
            (front.name().to_owned(), GatewayReport { items_per_call, ..counts.clone() })
        };
        counts.iter().map(report).collect()
    }

    pub(super) fn reset(&self) {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}
