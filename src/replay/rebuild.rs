//! Copies rows into another table with their columns parsed again from the stored JSON.
//!
//! Needs nothing but ClickHouse: which rows are missing in the target is its own record of how far an interrupted run
//! has come.

use std::{collections::HashMap, ops::Range, sync::Arc};

use super::{
    ReplayError,
    tables::{Tally, Target, pour},
};
use crate::{
    kafka::Partition,
    message::{Observation, SourceName},
    platform::Vendor,
    store::{
        Rows, Store,
        row::Parsed,
        stored::{Reach, Wanted},
    },
};

/// Offsets that are looked at together, a part of a page: their rows are sorted, and in memory at once.
const WINDOW: i64 = 8_192;

/// Rows of one insert and their bytes.
const ROWS: usize = 10_000;
const BYTES: usize = 10 * 1024 * 1024;

/// A run from table to table.
pub struct Rebuild<'a> {
    /// The database that the rows are in.
    pub from: &'a Store,
    /// Which of its rows.
    pub wanted: &'a Wanted,
    /// Where to.
    pub target: Target,
    /// Who can read the stored JSON, by source.
    pub vendors: &'a HashMap<SourceName, Arc<dyn Vendor>>,
    /// Names the inserts; the same for the same arguments. `None` counts only.
    pub run: Option<String>,
}

impl Rebuild<'_> {
    /// Goes through the partitions and inserts what is missing.
    ///
    /// # Errors
    /// [`ReplayError`]; the same run inserts the rest.
    pub async fn run(&self, reach: &[Reach], mut progress: impl FnMut(&Tally)) -> Result<Tally, ReplayError> {
        let mut tally = Tally::default();
        for reach in reach {
            let mut first = reach.range.start;
            while first < reach.range.end {
                // Aligned, so that no window lies on two pages.
                let end = (first.div_euclid(WINDOW) + 1).saturating_mul(WINDOW).min(reach.range.end);
                self.window(&reach.partition, first..end, &mut tally).await?;
                first = end;
                progress(&tally);
            }
        }
        Ok(tally)
    }

    async fn window(&self, partition: &Partition, range: Range<i64>, tally: &mut Tally) -> Result<(), ReplayError> {
        let Target { store, place, .. } = &self.target;
        let there = store.present(place, partition, &range).await?;
        let mut rows = self.from.observations(partition, &range, self.wanted)?;
        let (mut missing, mut bytes) = (Rows::expecting(ROWS), 0);
        while let Some((record, seen)) = rows.next().await? {
            tally.meant += 1;
            if there.has(record.offset) {
                tally.there += 1;
                continue;
            }
            tally.inserted += 1;
            bytes += seen.raw.as_ref().map_or(0, |raw| raw.get().len()) + 1_024;
            if self.run.is_some() {
                missing.add(&record.raw(partition), &Parsed::Result(Box::new(self.read_anew(seen))));
            }
            if missing.len() >= ROWS || bytes >= BYTES {
                self.insert(partition, std::mem::replace(&mut missing, Rows::expecting(ROWS))).await?;
                bytes = 0;
            }
        }
        self.insert(partition, missing).await
    }

    /// A killed run may have left an insert on its way: so these are always counted after it.
    async fn insert(&self, partition: &Partition, rows: Rows) -> Result<(), ReplayError> {
        match &self.run {
            Some(run) => pour(&self.target, partition, rows, run, false).await,
            None => Ok(()),
        }
    }

    /// The observation with the columns as the vendor's code reads them today. Without JSON, or without a product in
    /// it, they stay; so does the status, which the whole reply decided.
    fn read_anew(&self, mut seen: Observation) -> Observation {
        let vendor = self.vendors.get(&seen.source);
        if let Some(columns) = vendor.zip(seen.raw.as_deref()).and_then(|(vendor, raw)| vendor.columns(raw)) {
            seen.fingerprint = columns.fingerprint(seen.status);
            seen.columns = columns;
        }
        seen
    }
}
