//! A block is offered until ClickHouse takes it; people hear of it once, not at every attempt.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::{
    block::Block,
    connection::Trouble,
    insert::{Insert, Tally},
    row::Route,
};
use crate::message::envelope::Kind;

const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Offers the block, the same one under the same token, until it is taken; `None` if `patience` ended first. An
/// attempt that has begun is awaited even then.
pub(super) async fn insert<I: Insert>(
    store: &I,
    block: &Block,
    route: &Route,
    troubles: &Troubles,
    patience: &CancellationToken,
) -> Option<Tally> {
    let mut pause = FIRST_PAUSE;
    loop {
        match store.insert(block, route).await {
            Ok(tally) => {
                troubles.over(route.kind);
                return Some(tally);
            }
            Err(trouble) => {
                troubles.meet(route.kind, trouble, block);
            }
        }
        tokio::select! {
            biased;
            () = patience.cancelled() => return None,
            () = sleep(pause) => {}
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// What ClickHouse refuses now, by kind of record: one table may be wrong while the others are not.
#[derive(Debug, Default)]
pub(super) struct Troubles(Mutex<HashMap<Kind, (Trouble, Instant)>>);

impl Troubles {
    /// Says what is wrong, unless it has been said. True if it was.
    fn meet(&self, kind: Kind, trouble: Trouble, block: &Block) -> bool {
        let mut now = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |(known, _): &(Trouble, Instant)| known.kind == trouble.kind && known.code == trouble.code;
        let new = !now.values().any(same);
        if new {
            tracing::error!(
                block = %block.token(),
                "rows wait: {trouble}. Nothing is lost: reading pauses, and the same block is offered again until it is taken"
            );
        }
        let since = now.get(&kind).map_or_else(Instant::now, |(_, since)| *since);
        now.insert(kind, (trouble, since));
        new
    }

    /// Says so when the last trouble is over.
    fn over(&self, kind: Kind) -> bool {
        let mut now = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((_, since)) = now.remove(&kind) else { return false };
        let last = now.is_empty();
        if last {
            tracing::info!(seconds = since.elapsed().as_secs(), "ClickHouse takes rows again");
        }
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        kafka::{Partition, Record},
        runtime::clock::Timestamp,
        sink::{
            block::{Blocks, Limits},
            connection::TroubleKind,
        },
    };

    fn block() -> Block {
        let partition = Partition { topic: "weir.results".into(), number: 0 };
        let mut blocks = Blocks::new(partition, Limits { rows: 1, bytes: 1, age: Duration::ZERO });
        let time = Timestamp::default();
        blocks.push(Record { offset: 5, time, key: None, value: None, headers: Vec::new() }, Instant::now());
        blocks.take(Instant::now()).unwrap()
    }

    fn trouble(kind: TroubleKind) -> Trouble {
        Trouble { kind, code: None, message: "m".to_owned() }
    }

    /// Refuses so many times; remembers when it was asked, and for what.
    struct Reluctant(Mutex<(usize, Vec<(String, Instant)>)>);

    impl Insert for Reluctant {
        async fn insert(&self, block: &Block, _: &Route) -> Result<Tally, Trouble> {
            let mut inner = self.0.lock().unwrap();
            inner.1.push((block.token(), Instant::now()));
            if inner.1.len() <= inner.0 { Err(trouble(TroubleKind::Unable)) } else { Ok(Tally::default()) }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_same_token_is_offered_at_growing_intervals_until_it_is_taken() {
        let store = Reluctant(Mutex::new((7, Vec::new())));
        let (route, never) = (Route { kind: Kind::Result, source: None }, CancellationToken::new());
        assert!(insert(&store, &block(), &route, &Troubles::default(), &never).await.is_some());
        let asked = store.0.into_inner().unwrap().1;
        assert!(asked.iter().all(|(token, _)| token == "weir.results:0:5-5"));
        let pauses: Vec<_> = asked.windows(2).map(|pair| (pair[1].1 - pair[0].1).as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30]);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_loses_patience_stops_between_attempts() {
        let store = Reluctant(Mutex::new((usize::MAX, Vec::new())));
        let (route, patience) = (Route { kind: Kind::Result, source: None }, CancellationToken::new());
        patience.cancel();
        assert!(insert(&store, &block(), &route, &Troubles::default(), &patience).await.is_none());
        assert_eq!(store.0.into_inner().unwrap().1.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_trouble_is_told_once_until_it_changes() {
        let troubles = Troubles::default();
        assert!(troubles.meet(Kind::Result, trouble(TroubleKind::Away), &block()));
        assert!(!troubles.meet(Kind::Result, trouble(TroubleKind::Away), &block()));
        assert!(!troubles.meet(Kind::Failure, trouble(TroubleKind::Away), &block()));
        assert!(troubles.meet(Kind::Result, trouble(TroubleKind::Schema), &block()));
        assert!(!troubles.over(Kind::Result));
        assert!(troubles.over(Kind::Failure));
        assert!(!troubles.over(Kind::Failure));
    }
}
