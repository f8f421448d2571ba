//! fetch while Kafka limps: how much is paid for and not safe, and what a role that begins anew asks for again.

use std::time::Duration;

use bytes::Bytes;

use crate::{
    fetch::{
        departure::limiter_tests::{Empty, Server, until},
        tests::caller_for,
        *,
    },
    kafka::{
        Assignment, Committed, Epoch, Event, Record, TransactError,
        kept::Answer,
        scripted::{Log, assigned, partition, records},
    },
    quota::{Limit, memory::Memory, pace::Pacing},
};

/// Two accounts of 100 calls a second each, at a server that answers at once.
struct Scene {
    server: Server,
    log: Log,
    carry: Carry,
    _tasks: JoinSet<()>,
}

type Running = tokio::task::JoinHandle<Result<(), FetchError>>;
type Events = tokio::sync::mpsc::UnboundedSender<Event>;

impl Scene {
    async fn new() -> Self {
        let mut tasks = JoinSet::new();
        let server = Server::start(&mut tasks).await;
        server.gate.add_permits(1_000_000);
        Self { server, log: Log::default(), carry: Carry::new(bytesize::ByteSize::mib(64)), _tasks: tasks }
    }

    /// A life of the role, with so many requests to read.
    fn live(&self, config: Config, begin: Event, requests: Event, stop: &CancellationToken) -> (Events, Running) {
        let (events, reader) = self.log.reader();
        let caller = caller_for("s", Arc::new(Empty(format!("{}/s", self.server.url))));
        let limit = Limit::new(100, Duration::from_secs(1), 10).unwrap();
        let quota = Arc::new(Memory::new(vec![Some(limit); 2], Pacing::default()));
        let fetch = Fetch::new(reader, self.log.clone(), caller, quota, config).carrying(&self.carry);
        events.send(begin).unwrap();
        events.send(requests).unwrap();
        #[allow(clippy::disallowed_methods, reason = "the handle is kept")]
        let running = tokio::spawn(fetch.run(stop.clone()));
        (events, running)
    }

    fn called(&self) -> usize {
        self.server.order.lock().unwrap().len()
    }

    fn visible(&self) -> usize {
        self.log.world().records.len()
    }
}

fn requests(count: usize) -> Event {
    records(0, (0..count).map(|item| Bytes::from(item.to_string())))
}

/// The partition is assigned again, from what is committed.
fn again(log: &Log) -> Event {
    let committed = log.world().committed.get(&partition()).cloned();
    let committed = committed.unwrap_or(Committed { offset: 0, metadata: String::new() });
    Event::Assigned(vec![Assignment { partition: partition(), epoch: Epoch(1), committed: Some(committed), log: None }])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_nothing_is_committed_no_more_calls_leave_than_what_two_seconds_are() {
    let (scene, stop) = (Scene::new().await, CancellationToken::new());
    scene.log.world().is_away = true;
    let (_events, running) = scene.live(Config::default(), assigned(), requests(2_000), &stop);
    tokio::time::sleep(Duration::from_secs(4)).await;
    let called = scene.called();
    assert!((100..=460).contains(&called), "{called} calls in 4 s of 200/s without a commit");
    scene.log.world().is_away = false;
    until("calls go on", || scene.called() > called + 100).await;
    stop.cancel();
    running.await.unwrap().unwrap();
    assert_eq!(scene.visible(), scene.called(), "every call has its outcome");
    assert_eq!(scene.carry.kept.lost(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_nothing_is_committed_so_many_calls_leave_as_are_allowed() {
    let (scene, stop) = (Scene::new().await, CancellationToken::new());
    scene.log.world().is_away = true;
    let config = Config { at_risk: AtRisk::Calls(30), ..Config::default() };
    let (_events, running) = scene.live(config, assigned(), requests(500), &stop);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let called = scene.called();
    assert!((30..=60).contains(&called), "{called}");
    scene.log.world().is_away = false;
    until("all are called for", || scene.called() == 500).await;
    stop.cancel();
    running.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_that_begins_anew_asks_for_nothing_that_it_has_the_answer_to() {
    let (scene, stop) = (Scene::new().await, CancellationToken::new());
    scene.log.world().is_away = true;
    let (_events, running) = scene.live(Config::default(), assigned(), requests(400), &stop);
    until("some are called for", || scene.called() >= 100).await;
    scene.log.world().failing.push_back(TransactError::Rebuild("its fate is unknown".to_owned()));
    scene.log.world().is_away = false;
    running.await.unwrap().unwrap_err();
    let called = scene.called();
    assert_eq!(scene.visible(), 0, "nothing is committed");

    let (_events, running) = scene.live(Config::default(), again(&scene.log), requests(400), &stop);
    until("all have their outcome", || scene.visible() == 400).await;
    stop.cancel();
    running.await.unwrap().unwrap();
    assert_eq!((scene.called(), scene.carry.kept.lost(), scene.carry.kept.len()), (400, 0, 0), "{called} before");
    let tally = scene.carry.tally(&Arc::new(Tally::new(2, crate::runtime::clock::Clock::System)));
    assert_eq!(tally.of(0).calls + tally.of(1).calls, 400, "the books go on, too");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_was_committed_though_the_role_never_heard_of_it_is_not_written_twice() {
    let (scene, stop) = (Scene::new().await, CancellationToken::new());
    let (_events, running) = scene.live(Config::default(), assigned(), requests(50), &stop);
    until("all have their outcome", || scene.visible() == 50).await;
    // As if the answer to that last transaction had been lost: the outcomes are kept, and the group is further.
    let print = |offset| crate::kafka::kept::Print::of(&record_at(offset));
    for offset in 0..50 {
        let answer = Answer { records: scene.log.world().records[..1].to_vec(), calls: 1, since: Instant::now() };
        scene.carry.kept.put(&partition(), offset, print(offset), answer);
    }
    stop.cancel();
    running.await.unwrap().unwrap();
    let stop = CancellationToken::new();
    let (_events, running) = scene.live(Config::default(), again(&scene.log), requests(60), &stop);
    until("the others have theirs", || scene.visible() >= 60).await;
    stop.cancel();
    running.await.unwrap().unwrap();
    assert_eq!((scene.visible(), scene.called(), scene.carry.kept.len()), (60, 60, 0));
}

fn record_at(offset: i64) -> Record {
    let Event::Records { mut records, .. } = requests(60) else { unreachable!() };
    records.swap_remove(usize::try_from(offset).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_producer_that_is_fenced_ends_the_stage_however_many_calls_end_meanwhile() {
    let (scene, stop) = (Scene::new().await, CancellationToken::new());
    let fenced = TransactError::Fenced { name: "w".to_owned(), reason: "open for too long".to_owned() };
    scene.log.world().failing.push_back(fenced);
    let (_events, running) = scene.live(Config::default(), assigned(), requests(20_000), &stop);
    let ended = tokio::time::timeout(Duration::from_secs(15), running).await;
    let error = ended.expect("it goes on without ever committing").unwrap().unwrap_err();
    assert!(error.to_string().contains("open for too long"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_under_way_when_the_role_fails_are_waited_for_and_their_answers_kept() {
    let (scene, stop) = (Scene::new().await, CancellationToken::new());
    let server = &scene.server;
    server.gate.forget_permits(1_000_000);
    let (_events, running) = scene.live(Config::default(), assigned(), requests(8), &stop);
    until("all are under way", || scene.called() == 8).await;
    let fails = TransactError::Rebuild("broken".to_owned());
    scene.log.world().failing.push_back(fails);
    // The first answer brings the transaction that fails; the others come after that.
    server.gate.add_permits(1);
    until("it has failed", || scene.log.world().failing.is_empty()).await;
    server.gate.add_permits(1_000);
    running.await.unwrap().unwrap_err();
    assert_eq!((scene.carry.kept.len(), scene.carry.kept.lost()), (8, 0));

    let (_events, running) = scene.live(Config::default(), again(&scene.log), requests(8), &stop);
    until("all have their outcome", || scene.visible() == 8).await;
    stop.cancel();
    running.await.unwrap().unwrap();
    assert_eq!(scene.called(), 8);
}
