//! Compares a topic's records with its rows, partition by partition, a page of offsets at a time.

use std::ops::Range;

use crate::{
    enqueue::feed::Few,
    kafka::{Partition, page::Page},
    message::envelope::Kind,
    store::{Store, Trouble, present::Place},
};

/// A record or row, named by partition and offset.
pub type At = (i32, i64);

/// What the comparison of a topic has shown.
#[derive(Clone, Debug)]
pub struct TopicReport {
    /// The topic.
    pub topic: String,
    /// What rows call its log.
    pub log: String,
    /// What is on it.
    pub kind: Kind,
    /// Records that have to have a row.
    pub records: u64,
    /// Rows that are there for them, and others in the same offsets.
    pub rows: u64,
    /// Records beyond what the sink has committed: their rows come later.
    pub waiting: u64,
    /// Records without a row.
    pub missing: Few<At>,
    /// Rows without a record.
    pub stray: Few<At>,
    /// Records with several rows, and how many.
    pub doubled: Few<(At, u32)>,
    /// Of those that are named, the ones whose rows are of different records.
    pub differing: Vec<At>,
    /// Of the strays that are named, those that are of no request: no weir has written them.
    pub nobodys: Vec<At>,
}

impl TopicReport {
    /// Nothing compared yet; `named` faults of each kind will be named.
    #[must_use]
    pub fn new(topic: String, kind: Kind, named: usize) -> Self {
        let (missing, stray, doubled) = (Few::up_to(named), Few::up_to(named), Few::up_to(named));
        Self {
            log: topic.clone(),
            topic,
            kind,
            records: 0,
            rows: 0,
            waiting: 0,
            missing,
            stray,
            doubled,
            differing: Vec::new(),
            nobodys: Vec::new(),
        }
    }

    /// Whether the rows are exactly the records.
    #[must_use]
    pub const fn is_exact(&self) -> bool {
        self.missing.count == 0 && self.stray.count == 0 && self.doubled.count == 0
    }
}

/// The comparison of one partition under way.
pub struct Comparison<'a> {
    store: &'a Store,
    place: Place,
    partition: Partition,
    /// What the sink has committed, and retention has left.
    range: Range<i64>,
    page: Page,
}

impl<'a> Comparison<'a> {
    /// Begins at the start of `range`.
    #[must_use]
    pub fn new(store: &'a Store, kind: Kind, partition: Partition, range: Range<i64>) -> Self {
        let page = Page::of(range.start);
        Self { store, place: Place::of(kind), partition, range, page }
    }

    /// A record that has to have a row, by growing offsets.
    ///
    /// # Errors
    /// [`Trouble`] of ClickHouse.
    pub async fn expect(&mut self, offset: i64, report: &mut TopicReport) -> Result<(), Trouble> {
        if offset >= self.range.end {
            report.waiting += 1;
            return Ok(());
        }
        while offset >= self.page.range().end {
            self.turn(report).await?;
        }
        self.page.add(offset);
        Ok(())
    }

    /// Compares what is left up to the end of the range.
    ///
    /// # Errors
    /// [`Trouble`] of ClickHouse.
    pub async fn finish(mut self, report: &mut TopicReport) -> Result<(), Trouble> {
        while self.page.range().start < self.range.end {
            self.turn(report).await?;
        }
        Ok(())
    }

    /// Compares the page, and goes on to the next one.
    async fn turn(&mut self, report: &mut TopicReport) -> Result<(), Trouble> {
        let page = self.page.range();
        let range = page.start.max(self.range.start)..page.end.min(self.range.end);
        let there = self.store.present(&self.place, &self.partition, &range).await?;
        let number = self.partition.number;
        let found = self.page.difference(&there, &range);
        report.records += self.page.count();
        report.rows += there.count();
        found.missing.iter().for_each(|offset| report.missing.add(|| (number, *offset)));
        found.stray.iter().for_each(|offset| report.stray.add(|| (number, *offset)));
        found.doubled.iter().for_each(|(offset, times)| report.doubled.add(|| ((number, *offset), *times)));
        self.page = Page::of(page.end);
        Ok(())
    }
}
