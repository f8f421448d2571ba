//! Rows without a record: beyond the end of their partition, or of an unknown topic.
//!
//! The comparison page by page ends where the records end. But a row that was written by hand with a place that a record
//! will have one day would be taken for that record's.

use super::scope::VerifyError;
use crate::{
    kafka::{
        client,
        log_names::Names,
        scan::{self, Span},
    },
    message::envelope::Kind,
    store::{Store, Trouble, present::Place},
    topics::Topic,
};

use super::rows::{At, TopicReport};

/// How many rows beyond the end are looked at, the farthest first.
const FARTHEST: u32 = 100_000;

/// Rows of a topic that this configuration does not have, or of a log that a topic's name has had before. They may be of
/// a source that is gone: nothing is proved of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Foreign {
    /// The table that they are in.
    pub table: String,
    /// The topic that they name.
    pub topic: String,
    /// How many.
    pub rows: u64,
}

/// Adds the rows of a topic that stand beyond its partitions' ends to the report. The topic moves: the ends are asked for
/// once more after the rows, and a row that is beyond these has no record.
pub(super) async fn beyond(
    (kafka, store): (&client::Config, &Store),
    (topic, log): (&Topic, &str),
    spans: &[Span],
    report: &mut TopicReport,
) -> Result<(), VerifyError> {
    let ends: Vec<At> = spans.iter().map(|span| (span.partition.number, span.range.end)).collect();
    let rows = store.beyond(&Place::of(topic.kind), log, &ends, FARTHEST).await?;
    if rows.is_empty() {
        return Ok(());
    }
    let bounds = scan::bounds(kafka, std::slice::from_ref(&topic.name)).await?;
    let ends: Vec<At> = bounds.iter().map(|bounds| (bounds.partition.number, bounds.end)).collect();
    for at in without_record(&rows, &ends) {
        report.rows += 1;
        report.stray.add(|| at);
    }
    Ok(())
}

/// Those that are beyond the end of their partition, or of a partition that is not there; in order.
fn without_record(rows: &[At], ends: &[At]) -> Vec<At> {
    let end = |number: i32| ends.iter().find(|(of, _)| *of == number).map_or(0, |(_, end)| *end);
    let mut strays: Vec<At> = rows.iter().filter(|(number, offset)| *offset >= end(*number)).copied().collect();
    strays.sort_unstable();
    strays
}

/// The rows of logs that are not among these, table by table.
pub(super) async fn foreign(store: &Store, topics: &[Topic], names: &Names) -> Result<Vec<Foreign>, Trouble> {
    let mut found = Vec::new();
    for kind in Kind::ALL.into_iter().filter(|kind| topics.iter().any(|topic| topic.kind == *kind)) {
        let known: Vec<&str> =
            topics.iter().filter(|topic| topic.kind == kind).map(|topic| names.name(&topic.name)).collect();
        let place = Place::of(kind);
        let others = store.topics_but(&place, &known).await?;
        found.extend(others.into_iter().map(|(topic, rows)| Foreign { table: place.table.clone(), topic, rows }));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_beyond_the_end_of_its_partition_has_no_record() {
        let ends = [(0, 100), (1, 0)];
        let rows = [(7, 3), (0, 1_000), (0, 100), (0, 99), (1, 0)];
        assert_eq!(without_record(&rows, &ends), [(0, 100), (0, 1_000), (1, 0), (7, 3)]);
    }
}
