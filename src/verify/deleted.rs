//! Outcomes whose records Kafka has deleted (by retention, or `weir dead purge`), read from their rows.

use super::balance::{Balance, End};
use crate::{
    kafka::Partition,
    message::{Status, envelope::Kind},
    runtime::clock::Timestamp,
    store::{Store, Trouble},
};

/// Enters the ends of a partition before `low` into the balance: those recorded since a time, since all else is of requests
/// that are no longer on Kafka either.
pub(super) async fn ends(
    store: &Store,
    kind: Kind,
    (partition, low): (&Partition, i64),
    since: Timestamp,
    balance: &mut Balance,
) -> Result<(), Trouble> {
    let (true, true) = (matches!(kind, Kind::Result | Kind::DeadLetter), low > 0) else { return Ok(()) };
    store
        .ends_before(kind, (partition, low), since, |id, status, at| {
            if let Some(end) = end(status) {
                balance.end(id, end, at);
            }
        })
        .await
}

/// Enters the ends that stand in former logs of a topic's name.
pub(super) async fn ends_of_former_logs(
    store: &Store,
    kind: Kind,
    logs: (&str, &str),
    since: Timestamp,
    balance: &mut Balance,
) -> Result<(), Trouble> {
    if !matches!(kind, Kind::Result | Kind::DeadLetter) || logs.0 == logs.1 {
        return Ok(());
    }
    let take = |id: &str, status: &str, at| {
        if let Some(end) = end(status) {
            balance.end(id, end, at);
        }
    };
    store.ends_of_former_logs(kind, logs, since, take).await
}

/// A word of a row; nothing for one that no weir has written.
fn end(status: &str) -> Option<End> {
    match status {
        "found" => Some(End::Answered(Status::Found)),
        "absent" => Some(End::Answered(Status::Absent)),
        "off_shelf" => Some(End::Answered(Status::OffShelf)),
        "dead" => Some(End::Dead),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_are_those_of_the_rows() {
        for status in [Status::Found, Status::Absent, Status::OffShelf] {
            assert_eq!(end(status.as_str()), Some(End::Answered(status)));
        }
        assert_eq!((end("dead"), end("")), (Some(End::Dead), None));
    }
}
