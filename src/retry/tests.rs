//! retry against a scripted log.

use std::collections::BTreeSet;

use super::*;
use crate::{
    kafka::{
        Epoch,
        ledger::{Admit, Ledger, WINDOW},
        scripted::{Log, assigned, partition, records},
    },
    message::{Attempt, Class, ItemId, RequestId},
    topics,
};

const NOW: Timestamp = Timestamp::from_millis(1_700_000_000_000);

fn failure() -> Bytes {
    let mut request = Request::new(ItemId::new("1").unwrap());
    request.requested_at = Some(NOW);
    let attempt = Attempt {
        at: NOW,
        account: None,
        class: Class::Outage,
        code: "timeout".to_owned(),
        message: String::new(),
        http_status: None,
        latency_ms: 5,
        not_before: Some(NOW.after(Duration::from_secs(3_600))),
    };
    let source = SourceName::new("s").unwrap();
    let failure = Failure { request_id: RequestId::new("r").unwrap(), source, request, attempt };
    serde_json::to_vec(&failure).unwrap().into()
}

#[tokio::test(start_paused = true)]
async fn dead_letters_beyond_the_window_of_one_that_waits_are_neither_lost_nor_doubled() {
    let log = Log::default();
    let (events, reader) = log.reader();
    let stop = CancellationToken::new();
    let topics = Topics::new(topics::Config::default());
    let source = [SourceName::new("s").unwrap()];
    let (clock, dice) = (Clock::simulated(NOW), Dice::seeded(1));
    let retry = Retry::new(reader, log.clone(), source, topics, Config::default(), clock, dice).run(stop.clone());
    let count = WINDOW + 21_000;
    events.send(assigned()).unwrap();
    events.send(records(0, [failure()])).unwrap();
    for offset in (1..count).step_by(100) {
        events.send(records(offset, (offset..count.min(offset + 100)).map(|_| Bytes::from_static(b"?")))).unwrap();
    }
    let (ended, ()) = tokio::join!(retry, async {
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(log.world().paused, [partition()], "what waits is bounded");
        stop.cancel();
    });
    ended.unwrap();

    let world = log.world();
    let offset = |record: &Outgoing| serde_json::from_slice::<DeadLetter>(&record.value).unwrap().origin.offset;
    let visible: BTreeSet<i64> = world.records.iter().map(offset).collect();
    assert_eq!(visible.len(), world.records.len());
    let mut ledger = Ledger::new(Epoch(2), world.committed.get(&partition())).unwrap();
    let again: BTreeSet<i64> = (0..count).filter(|offset| ledger.admit(*offset) == Admit::New).collect();
    let expected: BTreeSet<i64> = (0..count).filter(|offset| !visible.contains(offset)).collect();
    assert!(again == expected, "{} visible, {} of {count} to be done again", visible.len(), again.len());
}
