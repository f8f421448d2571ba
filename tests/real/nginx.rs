//! A real nginx between weir and the vendor: it closes connections after a few requests, says GOAWAY, limits and packs.

#![allow(clippy::print_stdout, reason = "the numbers are part of what the test is for")]

use std::{
    fmt::Write as _,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use openssl::{
    asn1::Asn1Time,
    bn::BigNum,
    ec::{EcGroup, EcKey},
    hash::MessageDigest,
    nid::Nid,
    pkey::PKey,
    x509::{
        X509, X509Name,
        extension::{BasicConstraints, SubjectAlternativeName},
    },
};
use tempfile::TempDir;
use weir::{
    message::SourceName,
    runtime::clock::Clock,
    simulate::{self, Latency, Options, Quota, Shares, Simulator},
};

use crate::{
    process::{Installation, Process},
    stack::{Follower, address, eventually, produce, topics, unique},
};

/// How nginx behaves, as directives of a server.
struct Manner {
    name: &'static str,
    /// With TLS and HTTP/2.
    is_http2: bool,
    directives: &'static str,
    /// How fast weir calls.
    limit: &'static str,
}

/// nginx and the vendor behind it.
struct Gateway {
    folder: TempDir,
    port: u16,
    is_http2: bool,
    nginx: Child,
    simulator: Simulator,
}

fn program() -> PathBuf {
    let cache = std::env::var("WEIR_CACHE").map_or_else(
        |_| {
            let home = std::env::var("XDG_CACHE_HOME").unwrap_or_else(|_| std::env::var("HOME").unwrap() + "/.cache");
            Path::new(&home).join("weir")
        },
        PathBuf::from,
    );
    let own = cache.join("nginx/usr/sbin/nginx");
    if own.exists() { own } else { PathBuf::from("nginx") }
}

/// A key and a certificate for 127.0.0.1, which vouches for itself.
fn certificate(folder: &Path) {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
    let key = PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap();
    let mut subject = X509Name::builder().unwrap();
    subject.append_entry_by_nid(Nid::COMMONNAME, "weir test gateway").unwrap();
    let subject = subject.build();
    let mut builder = X509::builder().unwrap();
    builder.set_version(2).unwrap();
    builder.set_serial_number(&BigNum::from_u32(1).unwrap().to_asn1_integer().unwrap()).unwrap();
    builder.set_subject_name(&subject).unwrap();
    builder.set_issuer_name(&subject).unwrap();
    builder.set_pubkey(&key).unwrap();
    builder.set_not_before(&Asn1Time::days_from_now(0).unwrap()).unwrap();
    builder.set_not_after(&Asn1Time::days_from_now(1).unwrap()).unwrap();
    builder.append_extension(BasicConstraints::new().critical().ca().build().unwrap()).unwrap();
    let names = SubjectAlternativeName::new().ip("127.0.0.1").build(&builder.x509v3_context(None, None)).unwrap();
    builder.append_extension(names).unwrap();
    builder.sign(&key, MessageDigest::sha256()).unwrap();
    std::fs::write(folder.join("cert.pem"), builder.build().to_pem().unwrap()).unwrap();
    std::fs::write(folder.join("key.pem"), key.private_key_to_pem_pkcs8().unwrap()).unwrap();
}

impl Gateway {
    async fn start(manner: &Manner, latency: Latency) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().display();
        let options = Options {
            accounts: 1,
            accounts_file: Some(folder.path().join("accounts.toml")),
            quota: Quota::Bucket { rate: 1_000.0, burst: 1_000 },
            latency,
            shares: Shares::NONE,
            ..Options::default()
        };
        let simulator = simulate::start(options, Clock::System).await.unwrap();
        certificate(folder.path());
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let vendor = simulator.url();
        let vendor = vendor.trim_start_matches("http://");
        let mut temporary = String::new();
        for what in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"] {
            write!(temporary, "{what}_temp_path {at}/{what}; ").unwrap();
        }
        let tls = format!("ssl_certificate {at}/cert.pem; ssl_certificate_key {at}/key.pem;");
        let (ssl, tls) = if manner.is_http2 { (" ssl http2", tls.as_str()) } else { ("", "") };
        let config = format!(
            r#"daemon off; worker_processes 1; pid {at}/pid; error_log {at}/error.log warn;
events {{ worker_connections 256; }}
http {{
    {temporary}
    log_format calls '$status $upstream_status $server_protocol connection=$connection request=$connection_requests bytes=$body_bytes_sent';
    access_log {at}/access.log calls;
    limit_req_zone $server_port zone=rate:1m rate=20r/s;
    gzip on; gzip_types *; gzip_min_length 1; gzip_proxied any;
    upstream vendor {{ server {vendor}; keepalive 32; }}
    server {{
        listen 127.0.0.1:{port}{ssl};
        {tls}
        {directives}
        location / {{
            proxy_pass http://vendor; proxy_http_version 1.1; proxy_set_header Connection "";
            # What it sends again by itself would not be weir's doing.
            proxy_next_upstream off;
        }}
    }}
}}
"#,
            directives = manner.directives,
        );
        let file = folder.path().join("nginx.conf");
        std::fs::write(&file, config).unwrap();
        let log = std::fs::File::create(folder.path().join("nginx.log")).unwrap();
        let nginx = Command::new(program())
            .args(["-p".as_ref(), folder.path().as_os_str(), "-c".as_ref(), file.as_os_str()])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("nginx is there: run deploy/local/install --tests");
        eventually("nginx listens", async || tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()).await;
        Self { folder, port, is_http2: manner.is_http2, nginx, simulator }
    }

    fn calls(&self) -> Vec<String> {
        let log = std::fs::read_to_string(self.folder.path().join("access.log")).unwrap_or_default();
        log.lines().map(str::to_owned).collect()
    }

    /// How many connections brought calls.
    fn connections(&self) -> usize {
        let of = |line: &String| line.split(' ').find(|word| word.starts_with("connection=")).map(str::to_owned);
        self.calls().iter().filter_map(of).collect::<std::collections::HashSet<_>>().len()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // As the master does on SIGTERM: its workers go with it.
        let _ = Command::new("kill").arg(self.nginx.id().to_string()).status();
        let _ = self.nginx.wait();
    }
}

struct Scene {
    gateway: Gateway,
    process: Process,
    requests: String,
    ends: Follower,
    failures: Follower,
    ids: Box<dyn Iterator<Item = u64> + Send>,
    asked: usize,
    _installation: Installation,
}

impl Scene {
    async fn new(manner: &Manner, latency: Latency) -> Self {
        let gateway = Gateway::start(manner, latency).await;
        let source = SourceName::new("ali1688").unwrap();
        let topics = topics("nginx", &source, 4).await;
        let results = topics.results();
        let scheme = if gateway.is_http2 { "https" } else { "http" };
        let ca = if gateway.is_http2 {
            format!("ca_file = \"{}/cert.pem\"\n", gateway.folder.path().display())
        } else {
            String::new()
        };
        let installation = Installation::of(&format!(
            r#"
[kafka]
brokers = "{brokers}"
group_prefix = "{group}"

[topics]
prefix = "{prefix}"

[http]
listen = "off"

[retry]
base = "200ms"

[quota]
jitter = "10ms"

[log]
filter = "info,weir=debug"

[[source]]
name = "ali1688"
kind = "ali1688"
url = "{scheme}://127.0.0.1:{port}"
{ca}accounts_file = "{accounts}"
limit = {limit}
"#,
            brokers = address("WEIR_TEST_KAFKA"),
            group = unique("group"),
            prefix = results.trim_end_matches(".results"),
            port = gateway.port,
            accounts = gateway.folder.path().join("accounts.toml").display(),
            limit = manner.limit,
        ));
        let process = installation.start("one", &["run", "--role", "fetch,retry"]);
        process.says("fetching").await;
        Self {
            process,
            requests: topics.requests(&source),
            ends: Follower::of(&[topics.results(), topics.dead()]).await,
            failures: Follower::of(&[topics.failures()]).await,
            ids: Box::new(simulate::sample(29)),
            asked: 0,
            gateway,
            _installation: installation,
        }
    }

    async fn ask_and_wait(&mut self, count: usize) {
        let ids: Vec<String> = self.ids.by_ref().take(count).map(|id| id.to_string()).collect();
        self.asked += ids.len();
        produce(&self.requests, ids).await;
        self.ends.read_until(self.asked).await;
    }

    /// Each request has one result, the vendor has seen each once, and no breaker was opened. How many failures there
    /// were on the way.
    async fn each_was_called_once(mut self, name: &str) -> usize {
        let ends: Vec<_> = self.ends.seen.iter().map(crate::stack::Seen::json).collect();
        let items: std::collections::HashSet<_> = ends.iter().map(|end| end["item"].to_string()).collect();
        assert_eq!((ends.len(), items.len()), (self.asked, self.asked), "{name}");
        assert!(ends.iter().all(|end| end["status"] == "found"), "{name}");
        let stats = self.gateway.simulator.stats();
        let asked = self.asked as u64;
        assert_eq!((stats.served, stats.distinct_items, stats.calls_per_item_max), (asked, asked, 1), "{name}");
        let log = self.process.log();
        assert!(!log.contains("breaker opens"), "{name}");
        let missed = log.matches("did not process the call").count();
        let failures = self.failures.read().len();
        let (calls, connections) = (self.gateway.calls().len(), self.gateway.connections());
        println!(
            "{name}: {asked} requests, {calls} calls at nginx on {connections} connections, {missed} not acted on, {failures} failures"
        );
        assert!(self.process.stop().await.success());
        failures
    }
}

const QUICK: Latency = Latency { from: Duration::from_millis(5), to: Duration::from_millis(30) };
const SLOW: Latency = Latency { from: Duration::from_millis(50), to: Duration::from_millis(200) };

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_nginx_closes_after_a_few_calls_or_while_idle_cost_no_attempt_and_no_second_call() {
    let closes = Manner {
        name: "http/1.1",
        is_http2: false,
        directives: "keepalive_requests 5; keepalive_timeout 1s;",
        limit: r#"{ calls = 100, per = "1s", burst = 20 }"#,
    };
    let mut scene = Scene::new(&closes, QUICK).await;
    for round in 0..12_u64 {
        scene.ask_and_wait(50).await;
        // About when it closes what is idle.
        tokio::time::sleep(Duration::from_millis(940 + 10 * round)).await;
    }
    assert!(scene.gateway.connections() >= scene.asked / 5, "{:?}", scene.gateway.calls());
    assert_eq!(scene.each_was_called_once(closes.name).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_goaway_of_nginx_amid_calls_costs_no_attempt_and_no_second_call() {
    let goes = Manner {
        name: "http/2",
        is_http2: true,
        directives: "keepalive_requests 20; keepalive_timeout 1s;",
        limit: r#"{ calls = 150, per = "1s", burst = 30 }"#,
    };
    let mut scene = Scene::new(&goes, SLOW).await;
    for _ in 0..3 {
        scene.ask_and_wait(300).await;
        tokio::time::sleep(Duration::from_millis(1_010)).await;
    }
    assert!(scene.gateway.calls().iter().all(|call| call.contains("HTTP/2.0")), "{:?}", scene.gateway.calls());
    assert!(scene.gateway.connections() >= scene.asked / 20, "{:?}", scene.gateway.calls());
    assert_eq!(scene.each_was_called_once(goes.name).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_of_nginx_alone_never_reach_the_vendor_and_open_no_breaker() {
    for (name, directives) in [
        ("limit_req 429", "limit_req zone=rate burst=5 nodelay; limit_req_status 429;"),
        ("limit_req 503", "limit_req zone=rate burst=5 nodelay; limit_req_status 503;"),
    ] {
        let limit = r#"{ calls = 24, per = "1s", burst = 5 }"#;
        let limits = Manner { name, is_http2: false, directives, limit };
        let mut scene = Scene::new(&limits, QUICK).await;
        scene.ask_and_wait(120).await;
        let refused = scene.gateway.calls().iter().filter(|call| call.contains(" - HTTP")).count();
        assert!(refused > 0, "the pace is above nginx's");
        let gateway_calls = scene.gateway.calls().len();
        assert_eq!(gateway_calls, scene.asked + refused);
        assert_eq!(scene.each_was_called_once(name).await, refused, "each refusal is one failure");
    }
}
