//! fetch with more answers than there is room for: how many bytes stand, and that nothing of it is lost.

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc::UnboundedSender;

use crate::{
    cache,
    fetch::{
        call::Advice,
        call_facts::CallFacts,
        tests::{caller, ended, job},
        *,
    },
    kafka::{
        Assignment, Committed, Epoch, Event, Handover, Record, TransactError,
        outbox::Risk,
        scripted::{Log, Scripted, assigned, partition, records},
    },
    message::{AccountAlias, Columns, Status, Via},
    platform::SourceConfig,
    quota::{memory::Memory, pace::Pacing},
    runtime::clock::{Clock, Dice, Timestamp},
};

const MIB: usize = 1024 * 1024;

/// A stage whose outcomes may have 8 MiB; 64 MiB of answers outlive it.
struct Scene {
    fetch: Fetch<Scripted, Log>,
    log: Log,
    events: UnboundedSender<Event>,
    carry: Carry,
}

/// An answer of 300 kB.
fn long_answer() -> cache::Answer {
    let raw = serde_json::value::RawValue::from_string(format!("\"{}\"", "x".repeat(300_000))).unwrap();
    crate::platform::Answer { status: Status::Found, columns: Columns::default(), raw: Some(raw) }.into()
}

fn many(requests: usize) -> Event {
    records(0, (0..requests).map(|_| Bytes::from_static(b"1")))
}

impl Scene {
    fn new() -> Self {
        let log = Log::default();
        let (events, reader) = log.reader();
        let config = Config { outcomes_limit: bytesize::ByteSize::mib(8), backlog: 1_000_000, ..Config::default() };
        let quota = Arc::new(Memory::new(vec![], Pacing::default()));
        let carry = Carry::new(bytesize::ByteSize::mib(64));
        let fetch = Fetch::new(reader, log.clone(), caller(), quota, config).carrying(&carry);
        events.send(assigned()).unwrap();
        Self { fetch, log, events, carry }
    }

    /// With a cache in memory that has an answer of 300 kB for the item `1`.
    fn knowing(self) -> Self {
        let source = serde_json::json!({"name": "ali1688", "kind": "ali1688", "url": "http://127.0.0.1:9/", "cache": {"preset": "1688"}});
        let source: SourceConfig = serde_json::from_value(source).unwrap();
        let clock = Clock::simulated(Timestamp::from_millis(0));
        let cache = cache::Cache::open(&cache::Config::default(), None).unwrap();
        let cache = cache.source(&source, &clock, &Dice::seeded(1)).expect("a cache");
        let key = cache.key(&job(0).request).unwrap();
        let _kept = cache.keep(&key, long_answer(), clock.now(), Duration::ZERO, false);
        Self { fetch: self.fetch.with_cache(Some(cache)), ..self }
    }

    /// What the stage reads of this; it is under way from now on.
    async fn read(&mut self, event: Event) -> Vec<(Position, Record)> {
        self.events.send(event).unwrap();
        let Input::Records(read) = self.fetch.admission.intake.next().await.unwrap() else {
            unreachable!("records were sent")
        };
        read
    }

    /// One call brings the same answer for all of these.
    async fn answer(&mut self, read: Vec<(Position, Record)>, answer: &Arc<cache::Answer>) {
        let facts = CallFacts {
            account: AccountAlias::new("a").unwrap(),
            ended_at: Timestamp::from_millis(0),
            latency: Duration::ZERO,
            http_status: Some(200),
        };
        let end = |(position, _): (Position, Record)| {
            let job = Job { position: position.clone(), ..job(0) };
            (position, End::Result(Box::new(job), Arc::clone(answer), facts.clone(), Via::Cache))
        };
        let outcomes = read.into_iter().map(end).collect();
        let ended = Ended { outcomes, ..ended(Instant::now(), Advice::default(), None) };
        self.fetch.end_calls(ended).await.unwrap();
    }

    /// One call has brought the same answer for so many requests.
    async fn full(requests: usize) -> (Self, Arc<cache::Answer>) {
        let (mut scene, answer) = (Self::new(), Arc::new(long_answer()));
        let read = scene.read(many(requests)).await;
        scene.answer(read, &answer).await;
        (scene, answer)
    }

    fn is_bounded(&self) {
        assert!(
            self.fetch.admission.intake.bytes() < 9 * MIB,
            "{} bytes of records",
            self.fetch.admission.intake.bytes()
        );
    }

    fn visible(&self) -> usize {
        self.log.world().records.len()
    }
}

#[tokio::test(start_paused = true)]
async fn many_requests_that_share_a_long_reply_become_records_as_there_is_room_and_are_at_risk_till_then() {
    let (mut scene, answer) = Scene::full(200).await;
    scene.is_bounded();
    assert!(Arc::strong_count(&answer) > 160, "the others wait with their share of it");
    assert_eq!(scene.fetch.admission.risk().calls, 1, "the call is paid for, and not committed");
    assert!(scene.fetch.admission.risk().since.is_some() && !scene.fetch.admission.has_room_for_outcomes());
    while scene.visible() < 200 {
        scene.fetch.settle();
        scene.is_bounded();
        let Input::Settled = scene.fetch.admission.intake.next().await.unwrap() else {
            unreachable!("nothing else happens")
        };
    }
    assert_eq!((scene.fetch.admission.risk(), Arc::strong_count(&answer)), (Risk::default(), 1));
}

#[tokio::test(start_paused = true)]
async fn a_partition_that_leaves_takes_along_what_was_paid_for_it_however_little_room_there_is() {
    let (mut scene, _) = Scene::full(200).await;
    scene.events.send(Event::Revoked(vec![partition()], Handover(None))).unwrap();
    loop {
        let input = scene.fetch.admission.intake.next().await.unwrap();
        let is_over = matches!(input, Input::Left(_));
        scene.fetch.take(Signal::Input(input));
        scene.fetch.settle();
        scene.is_bounded();
        if is_over {
            break;
        }
    }
    assert_eq!((scene.visible(), scene.carry.kept.len(), scene.carry.kept.lost()), (200, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn what_was_paid_for_a_partition_that_is_lost_is_kept_for_its_return() {
    let (mut scene, _) = Scene::full(100).await;
    scene.log.world().is_away = true;
    scene.events.send(Event::Lost(vec![partition()])).unwrap();
    let left = scene.fetch.admission.intake.next().await.unwrap();
    scene.fetch.take(Signal::Input(left));
    // Those of the transaction under way have its fate.
    let kept = scene.carry.kept.len();
    assert!((60..100).contains(&kept) && scene.fetch.admission.called.is_empty(), "{kept} are kept");

    let committed = Some(Committed { offset: 0, metadata: String::new() });
    let epoch = Epoch(2);
    let back = Assignment { partition: partition(), epoch, committed, log: None };
    scene.events.send(Event::Assigned(vec![back])).unwrap();
    let Event::Records { partition, records, .. } = many(100) else { unreachable!() };
    let read = scene.read(Event::Records { partition, epoch, records }).await;
    scene.fetch.take(Signal::Input(Input::Records(read)));
    assert_eq!(
        (scene.carry.kept.len(), scene.fetch.departure.is_empty()),
        (0, false),
        "the others are called for again"
    );
    assert_eq!(scene.carry.kept.lost(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_ends_after_its_partition_came_back_stands_in_nobodys_place() {
    let (mut scene, answer) = (Scene::new(), Arc::new(long_answer()));
    let older = scene.read(many(60)).await;
    scene.events.send(Event::Lost(vec![partition()])).unwrap();
    let left = scene.fetch.admission.intake.next().await.unwrap();
    scene.fetch.take(Signal::Input(left));
    let committed = Some(Committed { offset: 0, metadata: String::new() });
    let epoch = Epoch(2);
    let back = Assignment { partition: partition(), epoch, committed, log: None };
    scene.events.send(Event::Assigned(vec![back])).unwrap();
    let Event::Records { partition, records, .. } = many(60) else { unreachable!() };
    let newer = scene.read(Event::Records { partition, epoch, records }).await;
    scene.answer(newer, &answer).await;
    assert!(!scene.fetch.admission.called.is_empty());
    scene.answer(older, &answer).await;
    for _ in 0..20 {
        scene.fetch.settle();
        let _ = tokio::time::timeout(Duration::from_secs(1), scene.fetch.admission.intake.next()).await;
    }
    assert_eq!(
        (scene.visible(), scene.fetch.admission.called.is_empty()),
        (60, true),
        "each of the newer ones has its end"
    );
}

#[tokio::test(start_paused = true)]
async fn a_stop_commits_all_that_was_paid_for_however_little_room_there_is() {
    let (scene, _) = Scene::full(200).await;
    let stop = CancellationToken::new();
    stop.cancel();
    scene.fetch.run(stop).await.unwrap();
    assert_eq!(scene.log.world().records.len(), 200);
    assert_eq!((scene.carry.kept.len(), scene.carry.kept.lost()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_role_that_fails_or_stops_without_kafka_keeps_all_that_was_paid_for() {
    for fails in [true, false] {
        let (scene, _) = Scene::full(200).await;
        let stop = CancellationToken::new();
        if fails {
            scene.log.world().failing.push_back(TransactError::Rebuild("broken".to_owned()));
        } else {
            scene.log.world().is_away = true;
            stop.cancel();
        }
        assert_eq!(scene.fetch.run(stop).await.is_err(), fails);
        assert_eq!((scene.carry.kept.len(), scene.carry.kept.lost()), (200, 0), "{fails}");
    }
}

#[tokio::test(start_paused = true)]
async fn answers_from_the_cache_that_wait_for_room_are_bounded_by_their_bytes() {
    let mut scene = Scene::new().knowing();
    let read = scene.read(many(5_000)).await;
    scene.fetch.take(Signal::Input(Input::Records(read)));
    for _ in 0..3 {
        scene.fetch.settle();
    }
    scene.is_bounded();
    let (outcomes, answers) = (scene.fetch.admission.intake.bytes(), scene.fetch.admission.uncalled.bytes());
    assert!(outcomes + answers >= 8 * MIB, "it does what there is room for");
    assert!(answers < 9 * MIB, "{answers} bytes of answers");
    assert!(scene.fetch.admission.arrivals.waiting_in(&partition()) > 4_900);
}
