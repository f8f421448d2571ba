//! A failover of Redis in which connections stay open: cache and tokens go to the server that took over; and what is said
//! while there is none.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use secrecy::ExposeSecret as _;
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use weir::{
    cache::{self, Answer, Cache, SourceCache},
    message::{AccountAlias, Columns, ItemId, Request, SourceName, Status},
    platform::{Account, SourceConfig, Tokens},
    quota::{Limit, Pacing, memory::Memory},
    runtime::clock::{Clock, Dice},
    simulate::{self, Latency, Options, Quota, Shares},
    tokens::{Sealer, TokenStore, keeper::Keeper, redis::RedisStore},
};

use crate::{
    process::Installation,
    stack::{eventually, topics, unique},
    workers::Server,
};

/// An address that stays the same: connections that are made from now on lead elsewhere, those that are there stay.
struct Address {
    url: String,
    target: Arc<Mutex<u16>>,
    _forward: JoinSet<()>,
}

impl Address {
    async fn of(server: &Server) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("redis://{}/", listener.local_addr().unwrap());
        let target = Arc::new(Mutex::new(server.port()));
        let (now, mut forward) = (Arc::clone(&target), JoinSet::new());
        forward.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                let port = *now.lock().unwrap();
                connections.spawn(async move {
                    let mut server = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                });
            }
        });
        Self { url, target, _forward: forward }
    }

    fn lead_to(&self, server: &Server) {
        *self.target.lock().unwrap() = server.port();
    }
}

async fn tell(server: &Server, command: &[&str]) {
    let client = redis::Client::open(server.url()).unwrap();
    eventually("the server answers", async || {
        let mut connection = client.get_multiplexed_async_connection().await.ok()?;
        let mut told = redis::cmd(command[0]);
        told.arg(&command[1..]).exec_async(&mut connection).await.ok()
    })
    .await;
}

/// A primary, and another server that copies it.
async fn pair() -> (Server, Server) {
    let (one, two) = (Server::start(), Server::start());
    tell(&one, &["PING"]).await;
    tell(&two, &["REPLICAOF", "127.0.0.1", &one.port().to_string()]).await;
    (one, two)
}

/// The second takes over. The first is told so, and does not find it; whoever is connected to it stays so.
async fn fail_over(one: &Server, two: &Server, address: &Address) {
    tell(two, &["REPLICAOF", "NO", "ONE"]).await;
    address.lead_to(two);
    tell(one, &["REPLICAOF", "127.0.0.1", "1"]).await;
}

fn cache(prefix: &str, redis: &str) -> (Cache, SourceCache) {
    let config = cache::Config { prefix: prefix.to_owned(), ..Default::default() };
    let cache = Cache::open(&config, Some(redis)).unwrap();
    let source = serde_json::json!({"name": "ali1688", "kind": "ali1688", "cache": {"preset": "1688"}});
    let source: SourceConfig = serde_json::from_value(source).unwrap();
    let of_source = cache.source(&source, &Clock::System, &Dice::random()).unwrap();
    (cache, of_source)
}

fn answer(price: &str) -> Answer {
    let columns = Columns { price: Some(price.to_owned()), ..Columns::default() };
    Answer { status: Status::Found, fingerprint: columns.fingerprint(Status::Found), columns, raw: None }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_failover_with_open_connections_the_cache_answers_and_keeps_where_the_others_do() {
    let (first, second) = pair().await;
    let (address, prefix) = (Address::of(&first).await, unique("failover"));
    let (_whole, cached) = cache(&prefix, &address.url);
    cached.connected(Duration::from_secs(30)).await;
    let key = |item: &str| cached.key(&Request::new(ItemId::new(item).unwrap())).unwrap();
    for item in ["7", "8"] {
        let _ = cached.keep(&key(item), answer("1.00"), Clock::System.now(), Duration::ZERO, false);
    }
    let client = redis::Client::open(second.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    eventually("the copy has it all", async || {
        let keys: usize = redis::cmd("DBSIZE").query_async(&mut connection).await.unwrap();
        (keys >= 2).then_some(())
    })
    .await;
    fail_over(&first, &second, &address).await;

    // As `weir cache drop` does it: a process that begins now.
    let (whole, command) = cache(&prefix, &address.url);
    command.connected(Duration::from_secs(30)).await;
    command.drop_all(&key("7"));
    assert!(whole.far().unwrap().flushed(Duration::from_secs(30)).await);
    eventually("the dropped answer is given no more", async || {
        let in_redis = cached.show(&key("7")).await.is_ok_and(|kept| kept.is_none());
        (in_redis && matches!(cached.near(&key("7"), None), cache::Seen::Miss)).then_some(())
    })
    .await;
    // What was written meanwhile is not lost, and what is written now goes where the others read it.
    let _ = cached.keep(&key("8"), answer("2.00"), Clock::System.now(), Duration::ZERO, true);
    eventually("the new price is there for all", async || {
        let kept = command.show(&key("8")).await.unwrap();
        (kept?.answer.columns.price.as_deref() == Some("2.00")).then_some(())
    })
    .await;
}

const KEY: &str = "1f2e3d4c5b6a79880716253443526170f0e1d2c3b4a5968778695a4b3c2d1e0f";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_failover_the_tokens_that_a_process_holds_are_where_the_others_look() {
    let (first, second) = pair().await;
    let (address, prefix) = (Address::of(&first).await, unique("failover"));
    let (source, alias) = (SourceName::new("ali1688").unwrap(), AccountAlias::new("one").unwrap());
    let store = |url: &str| Arc::new(RedisStore::new(url, &prefix, Sealer::new(KEY).unwrap()).unwrap());
    let account = Account {
        app_key: "1".to_owned(),
        app_secret: "s3cr3t".into(),
        access_token: None,
        refresh_token: Some("rt-1".into()),
        ..Account::named(alias.clone())
    };
    let (clock, dice) = (Clock::System, Dice::random());
    let of_process: Arc<dyn TokenStore> = store(&address.url);
    let keeper = Keeper::new(source.clone(), &[account], of_process, Duration::from_secs(10), clock, dice);
    let keeper = Arc::new(keeper);
    let quota = Arc::new(Memory::new(vec![Limit::new(10, Duration::from_secs(1), 1).ok()], Pacing::default()));
    keeper.load(&*quota).await.unwrap();
    let mut watch = JoinSet::new();
    watch.spawn(Arc::clone(&keeper).watch(quota));
    let _ = keeper.purpose(0);
    let permit = keeper.begin(0).await.unwrap();
    let lives = Some(Duration::from_secs(3_600));
    let renewed =
        Tokens { access_token: "at-2".into(), lives, refresh_token: Some("rt-2".into()), refresh_until: None };
    keeper.finish(permit, Ok(renewed)).await;

    // Asynchronous replication may lose all of it.
    tell(&second, &["REPLICAOF", "NO", "ONE"]).await;
    second.flush().await;
    fail_over(&first, &second, &address).await;
    let others = store(&second.url());
    let kept = async || others.get(&source, &alias).await.unwrap();
    let found = eventually("the renewed token is stored again", async || kept().await).await;
    assert_eq!(found.refresh_token.unwrap().expose_secret(), "rt-2");

    // Emptied without a new start, while others write: the changes there count as many as before.
    second.flush().await;
    let other = AccountAlias::new("two").unwrap();
    let record = weir::tokens::Record { revision: 1, refresh_token: Some("rt-9".into()), ..kept_record() };
    others.put(&source, &other, &record).await.unwrap();
    eventually("it is stored again", async || kept().await).await;
}

fn kept_record() -> weir::tokens::Record {
    weir::tokens::Record {
        revision: 1,
        access_token: None,
        refresh_token: None,
        obtained_at: Clock::System.now(),
        expires_at: None,
        refresh_expires_at: None,
        origin: weir::tokens::Origin::Renewed,
        refused: None,
        replaces: Vec::new(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_redis_is_away_and_calls_stop_ready_and_status_and_quota_say_so() {
    let mut server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let accounts = folder.path().join("accounts.toml");
    let options = Options {
        accounts: 1,
        accounts_file: Some(accounts.clone()),
        quota: Quota::None,
        latency: Latency { from: Duration::from_millis(1), to: Duration::from_millis(1) },
        shares: Shares::NONE,
        ..Options::default()
    };
    let simulator = simulate::start(options, Clock::System).await.unwrap();
    let topics = topics("away", &SourceName::new("ali1688").unwrap(), 1).await;
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let sections = format!(
        "[redis]\nurl = \"{}\"\n[quota]\nstore = \"redis\"\nprefix = \"{}\"\n[cache]\nshared = false\n",
        server.url(),
        unique("away")
    );
    let results = topics.results();
    let prefix = results.trim_end_matches(".results");
    let listen = format!("127.0.0.1:{port}");
    let installation = Installation::new(&simulator, &accounts, prefix, &unique("group"), &sections)
        .with("", ("WEIR_HTTP__LISTEN", &listen));
    let process = installation.start("only", &["fetch"]);
    process.says("connected to Redis").await;
    let ready = async || {
        let reply = reqwest::get(format!("http://{listen}/ready")).await.ok()?;
        Some((reply.status().as_u16(), reply.text().await.ok()?))
    };
    eventually("it is ready", async || ready().await.filter(|(status, _)| *status == 200)).await;

    server.kill();
    let (_, why) = eventually("it is not ready", async || ready().await.filter(|(status, _)| *status == 503)).await;
    assert!(why.contains("calls stopped") && why.contains("Redis"), "{why}");
    let (_, status) = installation.outcome(&["status"]).await;
    assert!(status.contains("! fetch/ali1688: calls stopped"), "{status}");
    let quota = eventually("the report says so", async || {
        let text = installation.run(&["quota"]).await;
        text.contains("calls stopped").then_some(text)
    })
    .await;
    assert!(quota.contains("stopped since"), "{quota}");

    server.restart().await;
    eventually("it is ready again", async || ready().await.filter(|(status, _)| *status == 200)).await;
    assert!(process.stop().await.success());
}
