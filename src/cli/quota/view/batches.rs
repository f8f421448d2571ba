//! What batches have spent of their budgets, summed over all workers' reports. Pure.

use std::collections::HashMap;

use serde::Serialize;

use super::View;
use crate::{
    cli::terminal::{grouped, table},
    message::{BatchId, QuotaReport},
    quota::purse::ledger::{BATCHES, Ledger},
};

/// How many batches of a source are shown in a table; `--json` has all that are reported.
const SHOWN: usize = 10;

/// One batch; all numbers are calls.
#[derive(Debug, Serialize)]
pub struct Batch {
    #[serde(rename = "batch")]
    pub name: BatchId,
    /// What its budget pays for.
    pub allowed: u64,
    /// What has been spent.
    pub calls: u64,
    /// What processes hold and have not spent; of one that was killed it stays so.
    pub held: u64,
    /// The part of the budget that no worker holds.
    pub left: u64,
}

/// Those of all reports, the one that was called for last at the end.
pub fn batches<'a>(reports: impl Iterator<Item = &'a QuotaReport>) -> Vec<Batch> {
    let mut wholes: Vec<_> = reports.filter_map(|report| Some((report.reported_at, report.whole.as_ref()?))).collect();
    wholes.sort_by_key(|(reported_at, _)| *reported_at);
    let (mut ledger, mut allowed) = (Ledger::default(), HashMap::new());
    for (_, whole) in wholes {
        ledger.read(&whole.batches);
        allowed.extend(whole.batches.iter().map(|batch| (&batch.batch, batch.allowed)));
    }
    let batch = |report: crate::message::BatchReport| {
        let allowed = allowed.get(&report.batch).copied().unwrap_or_default();
        let sum = |of: fn(&crate::message::BatchPart) -> u64| report.parts.iter().map(of).sum::<u64>();
        let (granted, calls) = (sum(|part| part.granted), sum(|part| part.calls));
        let (held, left) = (granted.saturating_sub(calls), allowed.saturating_sub(granted));
        Batch { name: report.batch, allowed, calls, held, left }
    };
    ledger.reports(BATCHES, 0).into_iter().map(batch).collect()
}

const HEAD: [&str; 6] = ["source", "batch", "calls allowed", "spent", "held", "left"];

/// A table for a terminal, if there are any.
pub fn text(views: &[View]) -> Option<String> {
    let mut rows = Vec::new();
    for view in views {
        for batch in view.batches.iter().rev().take(SHOWN) {
            let Batch { name, allowed, calls, held, left } = batch;
            let numbers = [*allowed, *calls, *held, *left].map(grouped);
            rows.push([vec![view.source.to_string(), name.to_string()], numbers.to_vec()].concat());
        }
    }
    (!rows.is_empty()).then(|| table(&HEAD, &rows))
}
