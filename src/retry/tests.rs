//! retry in virtual time, on brokers in memory.

use std::{
    collections::HashMap,
    sync::{
        Mutex,
        atomic::{AtomicI64, Ordering},
    },
};

use tokio::task::JoinHandle;

use super::*;
use crate::{
    kafka::{
        Membership, Offsets, TransactError,
        simulated::{Brokers, SimulatedWriter},
    },
    message::{Attempt, Class, ItemId, Lane, Request, RequestId, envelope::header},
    topics,
};

const START: Timestamp = Timestamp::from_millis(1_700_000_000_000);

fn source() -> SourceName {
    SourceName::new("s").unwrap()
}

/// A source that some machines do not know.
fn unknown() -> SourceName {
    SourceName::new("gone").unwrap()
}

/// A failure of which the vendor says that it may come again after `delay`.
fn failure(id: &str, now: Timestamp, delay: Duration) -> Failure {
    let mut request = Request::new(ItemId::new(id).unwrap());
    request.source = Some(source());
    request.requested_at = Some(now);
    let attempt = Attempt {
        at: now,
        account: None,
        class: Class::Throttled,
        code: "busy".to_owned(),
        message: String::new(),
        http_status: None,
        latency_ms: 5,
        not_before: Some(now.after(delay)),
    };
    Failure { request_id: RequestId::new(id).unwrap(), source: source(), request, attempt, lane: Lane::Bulk }
}

fn names() -> Topics {
    Topics::new(topics::Config::default())
}

fn record(failure: &Failure) -> Outgoing {
    let envelope = Envelope {
        kind: Kind::Failure,
        id: failure.request_id.as_str(),
        writer: "test",
        time: failure.attempt.at,
        traceparent: None,
    };
    let Encoded { headers, value } = codec::encode(&envelope, failure);
    let key = Some(Bytes::copy_from_slice(failure.request.item.as_str().as_bytes()));
    Outgoing { topic: names().failures().into(), key, value, headers }
}

/// A machine's clock, which somebody sets.
#[derive(Clone)]
struct Wrong {
    /// What it is ahead, in milliseconds.
    ahead: Arc<AtomicI64>,
    /// The most that it was ahead a moment ago: what has been released then may not be on its topic yet.
    lately: Arc<AtomicI64>,
    right: Clock,
}

impl Wrong {
    fn new(right: &Clock) -> Self {
        Self { ahead: Arc::default(), lately: Arc::default(), right: right.clone() }
    }

    fn clock(&self) -> Clock {
        Clock::Set(Box::new(self.right.clone()), Arc::clone(&self.ahead))
    }

    fn set(&self, ahead: i64) {
        let before = self.ahead.swap(ahead, Ordering::Relaxed);
        self.lately.store(before.max(ahead), Ordering::Relaxed);
    }

    fn settle(&self) {
        self.lately.store(self.ahead.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

/// A writer that sees what is sent too early by the clock of its machine.
struct Watched {
    writer: SimulatedWriter,
    clock: Wrong,
    requests: String,
    early: Arc<Mutex<Vec<String>>>,
}

impl Writer for Watched {
    async fn transact(&self, records: Vec<Outgoing>, m: Membership, offsets: Offsets) -> Result<(), TransactError> {
        let now = self.clock.right.now().as_millis() + self.clock.lately.load(Ordering::Relaxed);
        for record in records.iter().filter(|record| *record.topic == *self.requests) {
            let due: jiff::Timestamp = header(&record.headers, "ce_time").unwrap().parse().unwrap();
            if due.as_millisecond() > now {
                let id = header(&record.headers, "ce_id").unwrap();
                self.early.lock().unwrap().push(format!("{id}: {} ms", due.as_millisecond() - now));
            }
        }
        self.writer.transact(records, m, offsets).await
    }
}

/// A machine with a clock of its own, on which retry runs until it is killed.
struct Machine {
    number: u32,
    clock: Wrong,
    role: JoinHandle<Result<(), IntakeError>>,
    stop: CancellationToken,
}

struct Scene {
    brokers: Brokers,
    clock: Clock,
    dice: Dice,
    config: Config,
    machines: Vec<Machine>,
    next: u32,
    due: HashMap<String, Timestamp>,
    early: Arc<Mutex<Vec<String>>>,
    /// What the next machine heeds.
    cancelled: Option<Cancelled>,
    /// The sources that the next machine knows.
    known: Vec<SourceName>,
}

impl Scene {
    /// The brokers' clock is ahead by so many milliseconds.
    fn new(seed: u64, ahead_ms: i64) -> Self {
        let clock = Clock::simulated(START);
        let dice = Dice::seeded(seed);
        let topics = [names().all(&[source(), unknown()]), names().delays()].concat();
        let topics = topics.into_iter().map(|topic| (topic.name, topic.partitions));
        let brokers_clock = Clock::Set(Box::new(clock.clone()), Arc::new(AtomicI64::new(ahead_ms)));
        let brokers = Brokers::new(topics, brokers_clock, dice.clone());
        let config = Config::default();
        let (machines, due, early) = (vec![], HashMap::new(), Arc::default());
        Self { brokers, clock, dice, config, machines, next: 0, due, early, cancelled: None, known: vec![source()] }
    }

    async fn start(&mut self) {
        self.next += 1;
        let (reader, writer) = self.brokers.join(self.next);
        let clock = Wrong::new(&self.clock);
        let (requests, early) = (names().requests(&source()), Arc::clone(&self.early));
        let writer = Watched { writer, clock: clock.clone(), requests, early };
        let stop = CancellationToken::new();
        let (config, dice) = (self.config.clone(), self.dice.clone());
        let cancelled = self.cancelled.take().unwrap_or_else(Cancelled::none);
        let known = self.known.clone();
        let retry =
            Retry::new(reader, writer, known, &names(), config, clock.clock(), dice).with_cancellations(cancelled);
        #[allow(clippy::disallowed_methods, reason = "the handle is kept")]
        let role = tokio::spawn(retry.run(stop.clone()));
        self.machines.push(Machine { number: self.next, clock, role, stop });
        self.brokers.rebalance(&names().retried()).await;
    }

    /// kill -9, in the middle of anything.
    async fn kill(&mut self, index: usize) {
        let machine = self.machines.swap_remove(index);
        machine.role.abort();
        let _ = machine.role.await;
        self.brokers.bury(machine.number);
    }

    async fn stop(&mut self, index: usize) {
        let machine = self.machines.swap_remove(index);
        machine.stop.cancel();
        machine.role.await.unwrap().unwrap();
        self.brokers.bury(machine.number);
    }

    /// So many requests fail now, to be tried again after these delays, in turn.
    fn fail(&mut self, count: usize, delays: &[Duration]) {
        let now = self.clock.now();
        for _ in 0..count {
            let delay = delays[self.due.len() % delays.len()];
            let failure = failure(&self.due.len().to_string(), now, delay);
            self.due.insert(failure.request_id.to_string(), now.after(delay));
            self.brokers.produce([record(&failure)]);
        }
    }

    /// How late each request was sent; panics if one was sent twice, too early or not at all.
    fn lateness(&self) -> HashMap<String, i64> {
        assert_eq!(*self.early.lock().unwrap(), Vec::<String>::new(), "too early by the clock of who sent it");
        let mut late = HashMap::new();
        for record in self.brokers.records(&names().requests(&source())) {
            let id = header(&record.headers, "ce_id").unwrap().to_owned();
            let by = record.time.as_millis() - self.due[&id].as_millis();
            assert!(late.insert(id.clone(), by).is_none(), "{id} was sent twice");
        }
        let missing: Vec<_> = self.due.keys().filter(|id| !late.contains_key(*id)).collect();
        assert!(missing.is_empty(), "{} of {} are lost: {missing:?}", missing.len(), self.due.len());
        late
    }
}

fn seconds(seconds: &[u64]) -> Vec<Duration> {
    seconds.iter().copied().map(Duration::from_secs).collect()
}

/// The share of 99 in 100 is at most this.
fn p99(late: impl Iterator<Item = i64>) -> i64 {
    let mut late: Vec<_> = late.collect();
    late.sort_unstable();
    late[(late.len() - 1) * 99 / 100]
}

#[tokio::test(start_paused = true)]
async fn delays_from_a_second_to_six_hours_are_kept_to_the_moment_and_none_holds_back_another() {
    let mut scene = Scene::new(1, 0);
    let delays = seconds(&[1, 5, 5, 30, 100, 3_600, 3_600, 4 * 3_600, 6 * 3_600]);
    scene.start().await;
    for _ in 0..60 {
        scene.fail(300, &delays);
        tokio::time::sleep(Duration::from_secs(20)).await;
    }
    tokio::time::sleep(Duration::from_secs(6 * 3_600 + 60)).await;

    let late = scene.lateness();
    let delay_of = &|id: &str| delays[id.parse::<usize>().unwrap() % delays.len()];
    let of_delay = |delay| late.iter().filter(move |(id, _)| delay_of(id) == delay).map(|(_, by)| *by);
    assert!(p99(of_delay(Duration::from_secs(5))) <= 250);
    assert!(p99(of_delay(Duration::from_secs(3_600))) <= 1_000);
    let worst = late.values().max().unwrap();
    assert!(*worst <= 1_000, "somebody was held back for {worst} ms");
    let paused = scene.brokers.world().pauses.len();
    assert!(paused > 0, "more waits than is read ahead, or this test shows nothing");
    scene.stop(0).await;
}

/// Whatever can happen to three machines, at random: killed, stopped and started again, clocks set, partitions added.
async fn anything(scene: &mut Scene, dice: &Dice) {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "small")]
    let below = |count: usize| (dice.fraction() * count as f64) as usize;
    let index = below(scene.machines.len());
    match below(6) {
        0 => {
            scene.kill(index).await;
            tokio::time::sleep(Duration::from_secs(6).mul_f64(dice.fraction())).await;
            scene.start().await;
        }
        1 => {
            scene.stop(index).await;
            scene.brokers.rebalance(&names().retried()).await;
            tokio::time::sleep(Duration::from_secs(3).mul_f64(dice.fraction())).await;
            scene.start().await;
        }
        2 => scene.brokers.rebalance(&names().retried()).await,
        3 | 4 => {
            let ahead = [0, 0, -30_000, 30_000, -3_600_000, 3_600_000, 700, -700][below(8)];
            scene.machines[index].clock.set(ahead);
        }
        _ => {
            let topics = names().retried();
            scene.brokers.grow(&topics[below(topics.len())], 12);
            scene.brokers.rebalance(&topics).await;
        }
    }
}

/// Half an hour of everything going wrong; then all clocks are right, and everything has to come to its end.
async fn half_an_hour_of_trouble(seed: u64) {
    let brokers_ahead = [0, 5_000, -5_000, 120_000, -120_000];
    let mut scene = Scene::new(seed, brokers_ahead[usize::try_from(seed).unwrap() % brokers_ahead.len()]);
    scene.brokers.world().rolled_back = 0.05;
    let dice = Dice::seeded(seed + 1_000);
    let delays = seconds(&[1, 2, 3, 5, 8, 20, 60, 90, 300, 600, 1_200]);
    for _ in 0..3 {
        scene.start().await;
    }
    for _ in 0..60 {
        scene.fail(60, &delays);
        anything(&mut scene, &dice).await;
        tokio::time::sleep(Duration::from_secs(30).mul_f64(dice.fraction() + 0.7)).await;
        scene.machines.iter().for_each(|machine| machine.clock.settle());
    }
    for machine in &scene.machines {
        machine.clock.set(0);
    }
    // A clock that was an hour behind has made some wait for longer.
    tokio::time::sleep(Duration::from_secs(3_600 + 1_300)).await;
    scene.lateness();
    while !scene.machines.is_empty() {
        scene.stop(0).await;
    }
}

#[tokio::test(start_paused = true)]
async fn crashes_rebalances_rollbacks_and_set_clocks_lose_nothing_double_nothing_and_send_nothing_early() {
    let seeds = option_env!("WEIR_WHEEL_SEEDS").and_then(|count| count.parse().ok()).unwrap_or(3);
    for seed in 0..seeds {
        half_an_hour_of_trouble(seed).await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_read_ends_as_a_dead_letter_and_what_has_no_home_after_a_day() {
    let mut scene = Scene::new(7, 0);
    scene.start().await;
    let good = failure("good", scene.clock.now(), Duration::from_secs(3));
    scene.due.insert("good".to_owned(), good.attempt.not_before.unwrap());
    let newer = |record: &mut Outgoing| {
        for (name, value) in record.headers.iter_mut().filter(|(name, _)| name == "ce_type") {
            *value = Bytes::from(value.iter().copied().chain(*b"9").collect::<Vec<_>>());
            assert_eq!(name, "ce_type");
        }
    };
    let mut from_the_future = record(&failure("future", scene.clock.now(), Duration::ZERO));
    newer(&mut from_the_future);
    let hop = |name: &str, change: &dyn Fn(&mut Outgoing)| {
        let failure = failure(name, START, Duration::from_secs(9));
        let raw = Raw { topic: "f", partition: 0, offset: 0, time: START, headers: &[], value: None };
        let waiting = waiting(&failure, &failure.request, START.after(Duration::from_secs(9)), &raw, String::new());
        let mut record = waiting.into_hop(names().delay(4).into(), START);
        change(&mut record);
        record
    };
    let without = |header: &'static str| move |record: &mut Outgoing| record.headers.retain(|(name, _)| name != header);
    let moved = |record: &mut Outgoing| {
        for (_, value) in record.headers.iter_mut().filter(|(name, _)| name == "x-source") {
            *value = Bytes::from_static(b"gone");
        }
        let text = String::from_utf8(record.value.to_vec()).unwrap();
        record.value = text.replace("\"source\":\"s\"", "\"source\":\"gone\"").into();
    };
    scene.brokers.produce([
        record(&good),
        from_the_future,
        hop("newer", &newer),
        hop("undated", &without("x-due-at")),
        hop("nameless", &without("ce_id")),
        hop("homeless", &moved),
    ]);
    tokio::time::sleep(Duration::from_secs(20)).await;

    scene.lateness();
    let letters = scene.brokers.records(&names().dead());
    let letters: Vec<DeadLetter> =
        letters.iter().map(|record| serde_json::from_slice(record.value.as_ref().unwrap()).unwrap()).collect();
    for part in ["weir.failure.v19", "weir.request.v19", "x-due-at", "ce_id"] {
        assert!(letters.iter().any(|letter| letter.message.contains(part)), "{part}: {letters:?}");
    }
    assert_eq!(letters.len(), 4, "{letters:?}");

    tokio::time::sleep(Duration::from_secs(25 * 3_600)).await;
    let letters = scene.brokers.records(&names().dead());
    let read = |record: &Record| serde_json::from_slice::<DeadLetter>(record.value.as_ref().unwrap()).unwrap();
    let homeless = letters.iter().map(read).find(|letter| letter.request_id.as_str() == "homeless").unwrap();
    assert_eq!(homeless.source.as_str(), "gone");
    assert!(homeless.request.is_some() && homeless.message.contains("source gone"), "{homeless:?}");
    assert_eq!(letters.len(), 5);
    scene.stop(0).await;
}

#[tokio::test(start_paused = true)]
async fn a_request_of_a_source_that_only_newer_processes_know_waits_for_one_of_them() {
    let mut scene = Scene::new(13, 0);
    scene.start().await;
    let of_unknown = |id: &str, classes: &[Class]| {
        let mut failure = failure(id, START, Duration::from_secs(3));
        failure.source = unknown();
        failure.request.source = Some(unknown());
        failure.attempt.class = classes[0];
        failure.request.history =
            classes[1..].iter().map(|class| Attempt { class: *class, ..failure.attempt.clone() }).collect();
        record(&failure)
    };
    // The second has spent all attempts that this process would allow: the source's own rules may allow more.
    let failures = [("waits", vec![Class::Throttled]), ("spent", vec![Class::Outage; 5]), ("wrong", vec![Class::Bug])];
    scene.brokers.produce(failures.map(|(id, classes)| of_unknown(id, &classes)));
    tokio::time::sleep(Duration::from_secs(600)).await;
    let ids = |scene: &Scene, topic: &str| {
        let records = scene.brokers.records(topic);
        let mut ids: Vec<_> =
            records.iter().map(|record| header(&record.headers, "ce_id").unwrap().to_owned()).collect();
        ids.sort_unstable();
        ids
    };
    assert_eq!(ids(&scene, &names().dead()), ["wrong"], "what no retry can help ends all the same");
    assert_eq!(ids(&scene, &names().requests(&unknown())), Vec::<String>::new());

    scene.known.push(unknown());
    scene.start().await;
    scene.stop(0).await;
    scene.brokers.rebalance(&names().retried()).await;
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(ids(&scene, &names().requests(&unknown())), ["spent", "waits"]);
    assert_eq!(ids(&scene, &names().dead()), ["wrong"]);
    scene.stop(0).await;
}

#[tokio::test(start_paused = true)]
async fn a_burst_that_does_not_fit_into_memory_comes_through_all_the_same() {
    let mut scene = Scene::new(3, 0);
    scene.config.memory = bytesize::ByteSize::mib(1);
    // All of them are due within the same second, which is more than may be in memory.
    scene.fail(20_000, &seconds(&[70]));
    scene.start().await;
    tokio::time::sleep(Duration::from_secs(100)).await;
    let late = scene.lateness();
    assert!(late.values().all(|by| *by < 10_000), "{:?}", late.values().max());
    scene.stop(0).await;
}

/// The scene's first machine, which heeds what is cancelled.
async fn with_cancellations(scene: &mut Scene) -> impl Fn(&str, i64) + use<> {
    let (cancel, cancelled) = Cancelled::scripted();
    scene.cancelled = Some(cancelled);
    scene.start().await;
    cancel
}

fn of_batch(id: &str, batch: &str, now: Timestamp, delay: Duration) -> Failure {
    let mut failure = failure(id, now, delay);
    failure.request.batch = Some(crate::message::BatchId::new(batch).unwrap());
    failure
}

#[tokio::test(start_paused = true)]
async fn what_waits_of_a_cancelled_batch_ends_when_it_is_next_touched_and_no_other_does() {
    let mut scene = Scene::new(11, 0);
    let cancel = with_cancellations(&mut scene).await;
    let failed_at = scene.clock.now();
    // In memory for its last second; on a delay topic; far away; of another batch; of none.
    let far = Duration::from_secs(5_000);
    let delays = [Duration::from_millis(800), Duration::from_secs(40), far];
    let failures = delays.map(|delay| of_batch(&format!("m{}", delay.as_millis()), "monday", failed_at, delay));
    scene.brokers.produce(failures.iter().map(record));
    let others = [of_batch("other", "tuesday", failed_at, delays[1]), failure("none", failed_at, delays[1])];
    for other in &others {
        scene.due.insert(other.request_id.to_string(), other.attempt.not_before.unwrap());
        scene.brokers.produce([record(other)]);
    }
    tokio::time::sleep(Duration::from_millis(400)).await;
    cancel("monday", scene.clock.now().as_millis());
    // It fails after the cancellation, but was asked for before.
    scene.brokers.produce([record(&of_batch("late", "monday", failed_at, far))]);
    // Asked for anew under the same name.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let anew = of_batch("anew", "monday", scene.clock.now(), delays[1]);
    scene.due.insert("anew".to_owned(), anew.attempt.not_before.unwrap());
    scene.brokers.produce([record(&anew)]);

    tokio::time::sleep(Duration::from_secs(60)).await;
    scene.lateness();
    let dead = |scene: &Scene| -> Vec<DeadLetter> {
        let records = scene.brokers.records(&names().dead());
        records.iter().map(|record| serde_json::from_slice(record.value.as_ref().unwrap()).unwrap()).collect()
    };
    let ended = |letters: &[DeadLetter]| {
        let mut ids: Vec<_> = letters.iter().map(|letter| letter.request_id.to_string()).collect();
        ids.sort_unstable();
        ids
    };
    assert_eq!(ended(&dead(&scene)), ["late", "m40000", "m800"], "the far one is not touched yet");
    tokio::time::sleep(far).await;
    let letters = dead(&scene);
    assert_eq!(ended(&letters), ["late", "m40000", "m5000000", "m800"]);
    for letter in &letters {
        assert_eq!(letter.reason, Reason::Cancelled, "{letter:?}");
        let request = letter.request.as_ref().unwrap();
        assert_eq!((request.history.len(), request.calls), (1, 1), "what was tried is kept: {letter:?}");
    }
    scene.lateness();
    scene.stop(0).await;
}
