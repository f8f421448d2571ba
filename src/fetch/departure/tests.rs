//! Slots in which no call leaves.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    fetch::{
        Config, Fetch,
        call::{Advice, Contact, Ended},
        tests::{caller, ended},
    },
    kafka::scripted::{Log, assigned, records},
    quota::{
        Counting, Lease, Limit, Quota, Scope, Slot,
        guard::Guard,
        memory::Memory,
        pace::Pacing,
        plan::{AccountLimits, Limits},
    },
    runtime::clock::{Clock, Timestamp},
};

#[tokio::test(start_paused = true)]
async fn calls_that_the_guard_holds_keep_no_process_from_stopping_and_spend_no_attempt() {
    let log = Log::default();
    let (events, reader) = log.reader();
    let day = Limit::window(1, Duration::from_secs(86_400), Counting::Sliding).unwrap();
    let account = AccountLimits { limits: vec![day], ..AccountLimits::default() };
    let clock = Clock::simulated(Timestamp::from_millis(1_700_000_000_000));
    let guard = Guard::of(&Limits { accounts: vec![account; 2], ..Limits::default() }, &clock);
    for account in [0, 1] {
        let now = Instant::now();
        assert!(guard.pass(&Slot { account, address: 0, at: now, latest: now }).await.is_some());
    }
    // At the pace of another limit, so that there are slots all the time.
    let limit = Limit::new(10, Duration::from_secs(1), 5).unwrap();
    let quota = Arc::new(Memory::new(vec![Some(limit); 2], Pacing::default()));
    let stop = CancellationToken::new();
    let fetch = Fetch::new(reader, log.clone(), caller().guarded_by(guard), quota, Config::default());
    let fetch = Box::pin(fetch.run(stop.clone()));
    events.send(assigned()).unwrap();
    events.send(records(0, (0..5).map(|_| Bytes::from_static(b"1")))).unwrap();
    let stopped = async {
        tokio::time::sleep(Duration::from_secs(5)).await;
        stop.cancel();
        Instant::now()
    };
    let (ended, stopped_at) = tokio::join!(fetch, stopped);
    ended.unwrap();
    assert!(stopped_at.elapsed() <= Duration::from_millis(300), "{:?}", stopped_at.elapsed());
    assert!(log.world().records.is_empty(), "no request has ended");
    assert!(log.world().committed.is_empty(), "nor is one done: {:?}", log.world().committed);
}

#[tokio::test(start_paused = true)]
async fn a_slot_in_which_no_call_left_gives_back_its_budget_and_one_in_which_one_did_does_not() {
    let day = Limit::window(100, Duration::from_secs(86_400), Counting::Sliding).unwrap();
    let limits = vec![Limit::new(10, Duration::from_secs(1), 5).unwrap(), day.clone()];
    let account = AccountLimits { limits, in_flight: Some(2), ..AccountLimits::default() };
    let limits = Limits { accounts: vec![account; 2], source: vec![day], ..Limits::default() };
    let clock = Clock::simulated(Timestamp::from_millis(1_700_000_000_000));
    let quota = Arc::new(Memory::with_limits(&limits, &Pacing::default(), &clock));
    let log = Log::default();
    let (_, reader) = log.reader();
    let mut fetch = Fetch::new(reader, log, caller(), Arc::clone(&quota) as Arc<dyn Quota>, Config::default());
    let spent = |quota: &Memory| {
        let of = |spent: Vec<crate::message::Spent>| spent.iter().flat_map(|spent| &spent.calls).sum::<u64>();
        let snapshot = quota.snapshot(0..2, clock.now());
        let accounts: u64 = snapshot.accounts.into_iter().map(|account| of(account.spent)).sum();
        (accounts, of(snapshot.whole.spent))
    };
    let no_way = Contact::NoWay("the proxy is away".to_owned());
    // As often as a leak of calls under way would be seen.
    for round in 0..8 {
        // An address that is taken out is not what this is about.
        quota.release(Scope::Address(0), clock.now()).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        let Lease::Slots(slots) = quota.lease(4).await else { panic!("round {round}: all that was leased came back") };
        let contacts = [Contact::None, no_way.clone()].into_iter().cycle();
        for (slot, contact) in slots.into_iter().zip(contacts) {
            tokio::time::sleep_until(slot.at + Duration::from_secs(1)).await;
            let end = ended(slot.at, Advice::default(), None);
            fetch.end_calls(Ended { account: slot.account, unused: Some(slot), contact, ..end }).await.unwrap();
        }
    }
    quota.release(Scope::Address(0), clock.now()).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let Lease::Slots(slots) = quota.lease(1).await else { panic!("somebody may call") };
    assert_eq!(spent(&quota), (1, 1), "only the slot that is out");
    let end = ended(slots[0].at, Advice::default(), None);
    fetch.end_calls(Ended { account: slots[0].account, ..end }).await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let Lease::Slots(_) = quota.lease(1).await else { panic!("somebody may call") };
    assert_eq!(spent(&quota), (2, 2), "the call has left");
}
