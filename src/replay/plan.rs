//! The plan of a run: the offsets to read, and the metadata by which a later run continues it. Pure.

use std::collections::HashMap;

use crate::kafka::{
    Committed, Partition,
    scan::{Bounds, Span},
};

/// Where a piece begins or ends, by partition. Partitions that are not in it are left out.
pub type Offsets = HashMap<Partition, i64>;

/// The spans of a piece, and how many offsets of it retention has deleted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// What there is to read, in order; empty ones are left out.
    pub spans: Vec<Span>,
    /// Offsets that were asked for and are no longer there.
    pub gone: u64,
    /// Offsets that were asked for and that the sink has not stored yet: they are its own to store.
    pub ahead: u64,
}

impl Plan {
    /// From `from` (else the first record) up to `to` (else the end), not beyond `ceiling`.
    #[must_use]
    pub fn new(bounds: &[Bounds], from: Option<&Offsets>, to: Option<&Offsets>, ceiling: Option<&Offsets>) -> Self {
        let mut plan = Self::default();
        for Bounds { partition, low, end } in bounds {
            let edge = |edge: Option<&Offsets>, open: i64| edge.map_or(Some(open), |edge| edge.get(partition).copied());
            let (Some(from), Some(to)) = (edge(from, *low), edge(to, *end)) else { continue };
            let to = to.min(*end);
            let ceiling = ceiling.map_or(to, |ceiling| ceiling.get(partition).copied().unwrap_or(0).min(to));
            plan.gone += length(from, to.min(*low));
            plan.ahead += length(ceiling.max(from).max(*low), to);
            let range = from.max(*low)..ceiling;
            if !range.is_empty() {
                plan.spans.push(Span { partition: partition.clone(), range });
            }
        }
        plan
    }

    /// How many offsets there are to read.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.spans.iter().map(Span::length).sum()
    }
}

fn length(from: i64, to: i64) -> u64 {
    u64::try_from(to.saturating_sub(from)).unwrap_or(0)
}

/// What a run keeps beside the offset that it has come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Names the run, also in the tokens of its inserts.
    pub run: String,
    /// The end of its span.
    pub to: i64,
}

impl Mark {
    /// Kind and version.
    const KIND: &str = "R1:";

    /// With an offset, as it is committed.
    #[must_use]
    pub fn at(&self, offset: i64) -> Committed {
        Committed { offset, metadata: format!("{}{}:{}", Self::KIND, self.run, self.to) }
    }

    /// Reads what an earlier run has committed; `None` if it is no run's.
    #[must_use]
    pub fn read(committed: &Committed) -> Option<Self> {
        let (run, to) = committed.metadata.strip_prefix(Self::KIND)?.rsplit_once(':')?;
        Some(Self { run: run.to_owned(), to: to.parse().ok()? })
    }
}

/// What is left of an unfinished run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfinished {
    /// Its name.
    pub run: String,
    /// What it has not done.
    pub spans: Vec<Span>,
}

impl Unfinished {
    /// From what has been committed; `None` if that is nothing, or done.
    #[must_use]
    pub fn of(progress: &[(Partition, Committed)]) -> Option<Self> {
        let mut run = None;
        let mut spans = Vec::new();
        for (partition, committed) in progress {
            let Some(mark) = Mark::read(committed) else { continue };
            run = Some(mark.run);
            let range = committed.offset..mark.to;
            if !range.is_empty() {
                spans.push(Span { partition: partition.clone(), range });
            }
        }
        run.map(|run| Self { run, spans })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn partition(number: i32) -> Partition {
        Partition { topic: "t".into(), number }
    }

    fn bounds(number: i32, low: i64, end: i64) -> Bounds {
        Bounds { partition: partition(number), low, end }
    }

    fn offsets(entries: &[(i32, i64)]) -> Offsets {
        entries.iter().map(|(number, offset)| (partition(*number), *offset)).collect()
    }

    fn ranges(plan: &Plan) -> Vec<(i32, i64, i64)> {
        plan.spans.iter().map(|span| (span.partition.number, span.range.start, span.range.end)).collect()
    }

    #[test]
    fn without_edges_it_is_everything_that_is_there() {
        let plan = Plan::new(&[bounds(0, 5, 10), bounds(1, 0, 0), bounds(2, 7, 7)], None, None, None);
        assert_eq!((ranges(&plan), plan.length(), plan.gone), (vec![(0, 5, 10)], 5, 0));
    }

    #[test]
    fn edges_cut_leave_partitions_out_and_say_what_is_gone() {
        let all = [bounds(0, 100, 200), bounds(1, 0, 50), bounds(2, 0, 50)];
        let plan =
            Plan::new(&all, Some(&offsets(&[(0, 60), (1, 20)])), Some(&offsets(&[(0, 150), (1, 900), (2, 9)])), None);
        assert_eq!((ranges(&plan), plan.gone), (vec![(0, 100, 150), (1, 20, 50)], 40));
        let wholly_gone = Plan::new(&all, Some(&offsets(&[(0, 10)])), Some(&offsets(&[(0, 50)])), None);
        assert_eq!((ranges(&wholly_gone), wholly_gone.gone), (vec![], 40));
    }

    #[test]
    fn what_the_sink_has_not_stored_is_left_to_it() {
        let all = [bounds(0, 0, 100), bounds(1, 0, 30), bounds(2, 0, 10)];
        let plan = Plan::new(&all, None, None, Some(&offsets(&[(0, 40), (2, 15)])));
        assert_eq!((ranges(&plan), plan.ahead), (vec![(0, 0, 40), (2, 0, 10)], 60 + 30));
        let late = Plan::new(&all, Some(&offsets(&[(0, 70)])), None, Some(&offsets(&[(0, 40)])));
        assert_eq!((ranges(&late), late.ahead), (vec![], 30));
    }

    #[test]
    fn an_unfinished_run_is_found_again_where_it_stopped() {
        let mark = |to| Mark { run: "0199-a:b".to_owned(), to };
        let progress = [(partition(0), mark(100).at(40)), (partition(1), mark(50).at(50))];
        let found = Unfinished::of(&progress).unwrap();
        assert_eq!(found.run, "0199-a:b");
        assert_eq!(found.spans, [Span { partition: partition(0), range: 40..100 }]);
        let foreign = Committed { offset: 7, metadata: "L1:AAAA".to_owned() };
        assert_eq!(Unfinished::of(&[(partition(0), foreign)]), None);
    }
}
