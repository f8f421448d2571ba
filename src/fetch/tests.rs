//! fetch against a scripted log and no vendor at all.

use std::{collections::BTreeSet, time::Duration};

use bytes::Bytes;

use super::*;
use crate::{
    kafka::{
        Epoch,
        ledger::{Admit, Ledger, WINDOW},
        scripted::{Log, assigned, partition, records},
    },
    message::{DeadLetter, SourceName},
    platform::{SourceConfig, http},
    quota::{guard::Guard, memory::Memory, pace::Pacing},
    runtime::clock::{Clock, Dice},
    topics::{self, Topics},
};

/// A caller without accounts: nobody may call.
fn caller() -> Caller {
    let source = serde_json::json!({"name": "ali1688", "kind": "ali1688", "url": "http://127.0.0.1:9"});
    let timeouts = http::Timeouts { total: Duration::from_secs(5), connect: Duration::from_secs(2) };
    Caller::new(CallerParts {
        source: SourceName::new("ali1688").unwrap(),
        vendor: serde_json::from_value::<SourceConfig>(source).unwrap().vendor().unwrap(),
        client: http::Client::new(timeouts).unwrap(),
        accounts: Arc::new([]),
        guard: Guard::new(&[], None),
        topics: Topics::new(topics::Config::default()),
        clock: Clock::simulated(crate::runtime::clock::Timestamp::from_millis(0)),
        dice: Dice::seeded(1),
    })
}

#[tokio::test(start_paused = true)]
async fn bad_input_beyond_the_window_of_a_slow_request_is_neither_lost_nor_doubled() {
    let log = Log::default();
    let (events, reader) = log.reader();
    let quota = Arc::new(Memory::new(vec![], Pacing::default()));
    let stop = CancellationToken::new();
    let fetch = Fetch::new(reader, log.clone(), caller(), quota, Config::default()).run(stop.clone());
    let count = WINDOW + 5_000;
    events.send(assigned()).unwrap();
    events.send(records(0, [Bytes::from_static(b"1")])).unwrap();
    for offset in 1..count {
        events.send(records(offset, [Bytes::from_static(b"")])).unwrap();
    }
    let (ended, ()) = tokio::join!(fetch, async {
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(log.world().paused, [partition()], "what waits is bounded");
        stop.cancel();
    });
    ended.unwrap();

    let world = log.world();
    let offset =
        |record: &crate::kafka::Outgoing| serde_json::from_slice::<DeadLetter>(&record.value).unwrap().origin.offset;
    let visible: BTreeSet<i64> = world.records.iter().map(offset).collect();
    assert_eq!(visible.len(), world.records.len());
    let mut ledger = Ledger::new(Epoch(2), world.committed.get(&partition())).unwrap();
    let again: BTreeSet<i64> = (0..count).filter(|offset| ledger.admit(*offset) == Admit::New).collect();
    let expected: BTreeSet<i64> = (0..count).filter(|offset| !visible.contains(offset)).collect();
    assert!(again == expected, "{} visible, {} of {count} to be done again", visible.len(), again.len());
}

#[tokio::test(start_paused = true)]
async fn a_stop_ends_though_kafka_is_away() {
    let log = Log::default();
    log.world().is_away = true;
    let (events, reader) = log.reader();
    let quota = Arc::new(Memory::new(vec![], Pacing::default()));
    let stop = CancellationToken::new();
    let fetch = Fetch::new(reader, log.clone(), caller(), quota, Config::default()).run(stop.clone());
    events.send(assigned()).unwrap();
    events.send(records(0, [Bytes::from_static(b"")])).unwrap();
    let stopped = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        stop.cancel();
    };
    let end = tokio::time::timeout(Duration::from_secs(30), async { tokio::join!(fetch, stopped) });
    end.await.expect("it waits for the transaction for ever").0.unwrap();
}
