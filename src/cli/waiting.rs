//! The lag of a group: from offsets, and where it is small by counting the records themselves.
//!
//! A transaction ends with a mark that takes an offset, in each of its partitions, and nobody commits beyond the last
//! record. So a group that has read everything seems to be a record behind in each of them; and records of a transaction
//! that was rolled back wait for nobody.

use std::{collections::HashMap, ops::Range, time::Duration};

use futures::future::join_all;
use tokio::time::{Instant, timeout_at};

use crate::kafka::{
    Partition, Scan,
    admin::{AdminError, Lag},
    client::Config,
    scan::{self, Piece, Span},
};

/// Up to so many offsets of a partition are looked at; where more are left a few marks are no matter.
const FEW: i64 = 100;

/// How many partitions are read at once, at most. Each takes some 20 ms, and each reader the threads of a client.
const READERS: usize = 4;

/// How long that may take: a transaction that is open holds it up.
const PATIENCE: Duration = Duration::from_secs(3);

/// The offsets of records in the last piece of each partition that was looked at.
#[derive(Debug, Default)]
pub(super) struct Seen(Offsets);

impl Seen {
    /// Looks at what is left where that is little. Nothing is known of partitions that could not be read in time.
    pub(super) async fn of<'a>(kafka: &Config, lags: impl Iterator<Item = &'a Lag>) -> Self {
        let (spans, until) = (spans(lags), Instant::now() + PATIENCE);
        // What has been seen when the time is over, or an error comes, is right; the rest is said with a "perhaps".
        let Ok(Ok(spans)) = timeout_at(until, decided(kafka, spans)).await else { return Self::default() };
        let share = |number| spans.iter().skip(number).step_by(READERS).cloned().collect();
        let readers = (0..READERS.min(spans.len())).map(|number| read(kafka, share(number), until));
        Self(join_all(readers).await.into_iter().flatten().collect())
    }

    /// How many records wait in a partition; the offsets that are left, if it was not looked at.
    pub(super) fn waiting(&self, lag: &Lag) -> Waiting {
        let left = left(lag);
        let found = self.0.get(&(lag.topic.clone(), lag.partition)).filter(|_| is_little(&left));
        match found {
            Some(offsets) => {
                let count = offsets.iter().filter(|offset| left.contains(offset)).count();
                Waiting { records: i64::try_from(count).unwrap_or(i64::MAX), is_sure: true }
            }
            None => Waiting { records: lag.behind(), is_sure: left.is_empty() },
        }
    }
}

type Offsets = HashMap<(String, i32), Vec<i64>>;

/// The spans without those at whose end a transaction is open: they would be waited for.
async fn decided(kafka: &Config, mut spans: Vec<Span>) -> Result<Vec<Span>, AdminError> {
    let mut topics: Vec<String> = spans.iter().map(|span| span.partition.topic.to_string()).collect();
    topics.dedup();
    let ends = scan::bounds(kafka, &topics).await?;
    spans.retain(|span| ends.iter().any(|end| end.partition == span.partition && end.end >= span.range.end));
    Ok(spans)
}

/// The offsets of the records in these spans, as far as they come in time.
async fn read(kafka: &Config, spans: Vec<Span>, until: Instant) -> Offsets {
    let (mut seen, mut found) = (Offsets::new(), Vec::new());
    let Ok(mut scan) = Scan::open(kafka, spans) else { return seen };
    while let Ok(Ok(Some(piece))) = timeout_at(until, scan.next()).await {
        match piece {
            Piece::Records { records, .. } => found.extend(records.iter().map(|record| record.offset)),
            Piece::End(Partition { topic, number }) => {
                seen.insert((topic.to_string(), number), std::mem::take(&mut found));
            }
        }
    }
    seen
}

/// What waits in a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Waiting {
    /// How many records.
    pub(super) records: i64,
    /// Whether they were counted: else transaction markers may be among them.
    pub(super) is_sure: bool,
}

/// The offsets that a group has not done yet.
fn left(lag: &Lag) -> Range<i64> {
    lag.end - lag.behind()..lag.end
}

fn is_little(left: &Range<i64>) -> bool {
    !left.is_empty() && left.end - left.start <= FEW
}

/// What is to be read: a partition once, though several groups may have something left there. In order.
fn spans<'a>(lags: impl Iterator<Item = &'a Lag>) -> Vec<Span> {
    let mut ranges = std::collections::BTreeMap::<(&str, i32), Range<i64>>::new();
    for (lag, left) in lags.map(|lag| (lag, left(lag))).filter(|(_, left)| is_little(left)) {
        let range = ranges.entry((&lag.topic, lag.partition)).or_insert_with(|| left.clone());
        *range = range.start.min(left.start)..range.end.max(left.end);
    }
    let partition = |topic: &str, number| Partition { topic: topic.into(), number };
    ranges.into_iter().map(|((topic, number), range)| Span { partition: partition(topic, number), range }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lag(partition: i32, committed: i64, end: i64) -> Lag {
        Lag { topic: "t".to_owned(), partition, committed: Some(committed), low: 0, end }
    }

    #[test]
    fn a_partition_is_read_once_and_only_where_little_is_left() {
        let lags = [lag(0, 8, 10), lag(0, 5, 11), lag(1, 10, 10), lag(2, 0, FEW + 1)];
        let found: Vec<_> = spans(lags.iter()).into_iter().map(|span| (span.partition.number, span.range)).collect();
        assert_eq!(found, [(0, 5..11)]);
    }

    #[test]
    fn only_records_wait_and_what_was_not_looked_at_is_not_sure() {
        let seen = Seen(HashMap::from([(("t".to_owned(), 0), vec![5, 6, 8]), (("t".to_owned(), 1), vec![])]));
        let waiting = |lag: Lag| (seen.waiting(&lag).records, seen.waiting(&lag).is_sure);
        assert_eq!(waiting(lag(0, 5, 10)), (3, true));
        assert_eq!(waiting(lag(0, 7, 10)), (1, true));
        assert_eq!(waiting(lag(1, 9, 10)), (0, true));
        assert_eq!(waiting(lag(2, 9, 10)), (1, false));
        assert_eq!(waiting(lag(2, 10, 10)), (0, true));
        // A group that is far behind is not told what another one has left.
        assert_eq!(waiting(lag(0, 0, FEW + 1)), (FEW + 1, false));
    }
}
