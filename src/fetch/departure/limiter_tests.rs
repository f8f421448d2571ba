//! Several sources under one limiter, against a server that answers one call at a time.

use std::{
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::Duration,
};

use axum::{Router, extract::Path, routing::post};
use bytes::Bytes;
use tokio::{net::TcpListener, sync::Semaphore};

use crate::{
    fetch::{tests::caller_for, *},
    kafka::{
        Event,
        scripted::{Log, assigned, records},
    },
    message::{Columns, Request, Status},
    platform::{Account, Answer, Exchange, HttpReply, Reply, Vendor},
    quota::{memory::Memory, pace::Pacing},
    runtime::clock::Timestamp,
};

const PATIENCE: Duration = Duration::from_secs(30);

/// A vendor that has none of its items.
pub(in crate::fetch) struct Empty(pub(in crate::fetch) String);

impl Vendor for Empty {
    fn batch_max(&self) -> usize {
        1
    }
    fn prepare(&self, _: &Account, _: &[&Request], _: Timestamp) -> Exchange {
        Exchange::post(self.0.clone(), vec![])
    }
    fn interpret(&self, _: &[&Request], _: &HttpReply) -> Reply {
        Reply::Each(vec![Ok(Answer { status: Status::Absent, columns: Columns::default(), raw: None })])
    }
}

/// Answers when it is let, and keeps count of who waits.
#[derive(Clone)]
pub(in crate::fetch) struct Server {
    pub(in crate::fetch) url: String,
    pub(in crate::fetch) gate: Arc<Semaphore>,
    waiting: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
    /// Whose calls came, in their order.
    pub(in crate::fetch) order: Arc<std::sync::Mutex<Vec<String>>>,
}

impl Server {
    pub(in crate::fetch) async fn start(tasks: &mut JoinSet<()>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Self {
            url: format!("http://{}", listener.local_addr().unwrap()),
            gate: Arc::new(Semaphore::new(0)),
            waiting: Arc::default(),
            most: Arc::default(),
            order: Arc::default(),
        };
        let seen = server.clone();
        let handler = post(async move |Path(source): Path<String>| {
            seen.order.lock().unwrap().push(source);
            seen.most.fetch_max(seen.waiting.fetch_add(1, Relaxed) + 1, Relaxed);
            seen.gate.acquire().await.unwrap().forget();
            seen.waiting.fetch_sub(1, Relaxed);
        });
        let router = Router::new().route("/{source}", handler);
        tasks.spawn(async move { axum::serve(listener, router).await.unwrap() });
        server
    }

    /// Lets one call after the other end, until so many have.
    async fn let_through(&self, calls: usize) {
        for _ in 0..calls {
            until("a call comes", || self.waiting.load(Relaxed) > 0).await;
            self.gate.add_permits(1);
            until("it goes", || self.gate.available_permits() == 0).await;
        }
    }
}

pub(in crate::fetch) async fn until(what: &str, condition: impl Fn() -> bool) {
    let since = Instant::now();
    while !condition() {
        assert!(since.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// A source with so many requests.
fn stage(server: &Server, name: &str, limiter: &CallLimiter, requests: usize, stop: &CancellationToken) -> Stage {
    let log = Log::default();
    let (events, reader) = log.reader();
    let caller = caller_for(name, Arc::new(Empty(format!("{}/{name}", server.url))));
    let quota = Arc::new(Memory::new(vec![None, None], Pacing::default()));
    let fetch = Fetch::new(reader, log.clone(), caller, quota, Config::default()).with_limiter(limiter.clone());
    events.send(assigned()).unwrap();
    events.send(records(0, (0..requests).map(|item| Bytes::from(item.to_string())))).unwrap();
    #[allow(clippy::disallowed_methods, reason = "the handle is kept")]
    let running = tokio::spawn(fetch.run(stop.clone()));
    Stage { log, running, _events: events }
}

struct Stage {
    log: Log,
    running: tokio::task::JoinHandle<Result<(), FetchError>>,
    _events: tokio::sync::mpsc::UnboundedSender<Event>,
}

impl Stage {
    async fn ends(self, count: usize, stop: &CancellationToken) {
        until("all its requests have ended", || self.log.world().records.len() == count).await;
        stop.cancel();
        self.running.await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_sources_together_have_no_more_calls_under_way_than_the_limiter_permits() {
    let (mut tasks, limiter) = (JoinSet::new(), CallLimiter::new(3));
    let server = Server::start(&mut tasks).await;
    let stops = [CancellationToken::new(), CancellationToken::new()];
    let long = stage(&server, "ali1688", &limiter, 60, &stops[0]);
    until("there is no permit left", || server.waiting.load(Relaxed) == 3).await;
    let short = stage(&server, "taobao", &limiter, 10, &stops[1]);
    server.let_through(70).await;
    long.ends(60, &stops[0]).await;
    short.ends(10, &stops[1]).await;
    assert_eq!(server.most.load(Relaxed), 3, "it was full, and not more than that");
    let order = server.order.lock().unwrap().clone();
    let last = order.iter().rposition(|source| source == "taobao").unwrap();
    // In turn: ten of the one between ten of the other, and what was there before.
    assert!(last < 40, "a long backlog keeps a short one out: {order:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_without_anything_to_call_for_keeps_no_permit() {
    let (mut tasks, limiter) = (JoinSet::new(), CallLimiter::new(1));
    let server = Server::start(&mut tasks).await;
    let stops = [CancellationToken::new(), CancellationToken::new()];
    let done = stage(&server, "ali1688", &limiter, 2, &stops[0]);
    server.let_through(2).await;
    until("it has nothing more to do", || done.log.world().records.len() == 2).await;
    let other = stage(&server, "taobao", &limiter, 3, &stops[1]);
    server.let_through(3).await;
    other.ends(3, &stops[1]).await;
    done.ends(2, &stops[0]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_fill_their_address_keep_no_other_address_waiting_and_none_waits_beyond_its_slot() {
    use std::net::SocketAddr;

    use axum::extract::ConnectInfo;

    use crate::{
        platform::{http::Manners, route::Route},
        quota::{Counting, Limit, plan::Limits},
        runtime::clock::Clock,
    };

    // Calls from the second address are answered once they are let.
    let (gate, arrived) = (Arc::new(Semaphore::new(0)), [Arc::<AtomicUsize>::default(), Arc::default()]);
    let handler = {
        let (gate, arrived) = (Arc::clone(&gate), arrived.clone());
        move |ConnectInfo(peer): ConnectInfo<SocketAddr>| {
            let (gate, arrived) = (Arc::clone(&gate), arrived.clone());
            async move {
                let is_slow = peer.ip() != SocketAddr::from(([127, 0, 0, 1], 0)).ip();
                arrived[usize::from(is_slow)].fetch_add(1, Relaxed);
                if is_slow {
                    gate.acquire().await.unwrap().forget();
                }
            }
        }
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let router = Router::new().route("/", post(handler)).into_make_service_with_connect_info::<SocketAddr>();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { axum::serve(listener, router).await.unwrap() });

    let ways_out = [1, 2].map(|last| Route::Local([127, 0, 0, last].into()));
    let manners = Manners { calls_per_host: 2, ..Manners::default() };
    let caller = crate::fetch::tests::caller_by(&ways_out, &manners, "ali1688", Arc::new(Empty(url)));
    let mut limits = Limits::of_accounts(vec![Some(Limit::new(100, Duration::from_secs(1), 5).unwrap()); 2]);
    limits.accounts[1].address = 1;
    // Slots that were passed over cost nothing: with them it would be spent before half of the requests have ended.
    limits.source = vec![Limit::window(320, Duration::from_secs(86_400), Counting::Sliding).unwrap()];
    let quota = Arc::new(Memory::with_limits(&limits, &Pacing::default(), &Clock::System));
    let (log, stop) = (Log::default(), CancellationToken::new());
    let (events, reader) = log.reader();
    let config = Config { calls_in_flight: 8, ..Config::default() };
    let stage = Fetch::new(reader, log.clone(), caller, quota, config);
    let mut stages = JoinSet::new();
    stages.spawn(stage.run(stop.clone()));
    events.send(assigned()).unwrap();
    events.send(records(0, (0..300).map(|item| Bytes::from(format!("{item}"))))).unwrap();
    let since = Instant::now();
    while arrived[0].load(Relaxed) < 150 {
        assert!(since.elapsed() < PATIENCE, "{arrived:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(arrived[1].load(Relaxed), 2, "no more fit into it");
    gate.add_permits(Semaphore::MAX_PERMITS / 2);
    while log.world().records.len() < 300 {
        assert!(since.elapsed() < PATIENCE, "{} ended", log.world().records.len());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    stop.cancel();
    stages.join_next().await.unwrap().unwrap().unwrap();
}
