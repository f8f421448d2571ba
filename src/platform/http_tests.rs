//! The client against a server on the loopback that misbehaves in every way.

use std::{
    convert::Infallible,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use axum::{
    Router,
    body::Body,
    extract::Request,
    http::{HeaderMap, HeaderValue, StatusCode},
    routing::{any, get, post},
};
use futures::{StreamExt as _, stream};
use tokio::{io::AsyncWriteExt as _, net::TcpListener, task::JoinSet};

use super::*;
use crate::platform::{Body as Sent, proxies::Proxy};

/// `{"ok":true}` as gzip, in hex.
const GZIPPED: &str = "1f8b0800000000000203ab56cacf56b22a292a4dad0500905fd4a70b000000";

/// A server, stopped when it is dropped.
struct Server {
    url: String,
    _tasks: JoinSet<()>,
}

impl Server {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { axum::serve(listener, router()).await.unwrap() });
        Self { url, _tasks: tasks }
    }

    async fn call(&self, path: &str) -> Result<HttpReply, Refusal> {
        call(&format!("{}{path}", self.url)).await
    }
}

fn router() -> Router {
    let mut busy = HeaderMap::new();
    busy.insert("retry-after", HeaderValue::from_static("7"));
    let mut spent = HeaderMap::new();
    spent.append("ratelimit", HeaderValue::from_static(r#""second";r=5;t=1"#));
    spent.append("ratelimit", HeaderValue::from_static(r#""day";r=0;t=40"#));
    let mut dated = HeaderMap::new();
    dated.insert("date", HeaderValue::from_static("Tue, 14 Nov 2023 22:13:20 GMT"));
    dated.insert("retry-after", HeaderValue::from_static("Tue, 14 Nov 2023 22:14:20 GMT"));
    let mut gzip = HeaderMap::new();
    gzip.insert("content-encoding", HeaderValue::from_static("gzip"));
    let mut moved = HeaderMap::new();
    moved.insert("location", HeaderValue::from_static("/echo"));
    let megabytes = |count| move || async move { Body::from_stream(stream::iter(chunks(count))) };
    Router::new()
        .route("/echo", post(async |request: Request| request.into_body()))
        .route("/query", get(async |request: Request| request.uri().query().unwrap_or_default().to_owned()))
        .route("/type", post(async |headers: HeaderMap| headers["content-type"].to_str().unwrap().to_owned()))
        .route("/told", any(told))
        .route("/spent", post((spent, "{}")))
        .route("/busy", post((StatusCode::TOO_MANY_REQUESTS, busy, "slow down")))
        .route("/dated", post((StatusCode::SERVICE_UNAVAILABLE, dated, "")))
        .route("/gzip", post((gzip, hex::decode(GZIPPED).unwrap())))
        .route("/packed", post(async |request: Request| packed(&request.uri().query().unwrap().replace('+', " "))))
        .route(
            "/bomb",
            post(async |request: Request| {
                let mut headers = HeaderMap::new();
                if request.uri().query().is_some() {
                    headers.insert("content-encoding", HeaderValue::from_static("gzip"));
                }
                let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                std::io::Write::write_all(&mut packer, &vec![b' '; BODY_LIMIT + 1]).unwrap();
                (headers, packer.finish().unwrap())
            }),
        )
        .route("/moved", post((StatusCode::TEMPORARY_REDIRECT, moved, "elsewhere")))
        .route("/limit", post(megabytes(BODY_LIMIT >> 20)))
        .route("/beyond", post(megabytes((BODY_LIMIT >> 20) + 1)))
        .route("/announced", post(async || vec![b' '; BODY_LIMIT + 1]))
        .route("/slow", post(async || Body::from_stream(stream::iter(chunks(1)).chain(stream::pending()))))
        .route("/never", post(async || std::future::pending::<()>().await))
}

/// What was sent: method, query, type, body (in hex if it is no text), a key and who it says it is.
async fn told(request: Request) -> (HeaderMap, String) {
    let (head, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 1_000).await.unwrap();
    let body = std::str::from_utf8(&body).map_or_else(|_| hex::encode(&body), str::to_owned);
    let header =
        |name: &str, none: &str| head.headers.get(name).map_or(none, |value| value.to_str().unwrap()).to_owned();
    let (method, query) = (head.method.as_str(), head.uri.query().unwrap_or_default());
    let (content_type, key, agent) = (header("content-type", "-"), header("x-key", "-"), header("user-agent", "-"));
    let mut two = HeaderMap::new();
    two.append("x-two", HeaderValue::from_static("1"));
    two.append("x-two", HeaderValue::from_static("2"));
    (two, format!("{method} {query} {content_type} {body} {key} {agent}"))
}

fn chunks(count: usize) -> impl Iterator<Item = Result<Bytes, Infallible>> {
    std::iter::repeat_with(|| Ok(Bytes::from(vec![b'x'; 1024 * 1024]))).take(count)
}

fn client() -> Client {
    Client::new(Timeouts { total: Duration::from_millis(400), connect: Duration::from_millis(300) }).unwrap()
}

async fn call(url: &str) -> Result<HttpReply, Refusal> {
    let form = vec![("keyword".to_owned(), "玻璃杯 a+b&c".to_owned()), ("b".to_owned(), String::new())];
    client().exchange(&Exchange::post(url.to_owned(), form)).await
}

/// A server that says something to each connection and closes it.
async fn rude(words: &'static str) -> (String, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let mut buffer = [0; 4096];
            let _ = tokio::io::AsyncReadExt::read(&mut socket, &mut buffer).await;
            let _ = socket.write_all(words.as_bytes()).await;
        }
    });
    (url, tasks)
}

#[track_caller]
fn assert_outage(outcome: Result<HttpReply, Refusal>, code: &str) {
    let refusal = outcome.unwrap_err();
    assert_eq!((refusal.kind, refusal.code.as_str()), (RefusalKind::Outage, code), "{}", refusal.message);
}

#[tokio::test]
async fn a_form_is_posted_as_utf_8() {
    let server = Server::start().await;
    let echoed = server.call("/echo").await.unwrap();
    assert_eq!(echoed.status, 200);
    assert_eq!(echoed.body, "keyword=%E7%8E%BB%E7%92%83%E6%9D%AF+a%2Bb%26c&b=");
    assert_eq!(server.call("/type").await.unwrap().body, "application/x-www-form-urlencoded");
}

#[tokio::test]
async fn a_form_can_be_a_query_which_no_error_shows() {
    let server = Server::start().await;
    let form = vec![("key".to_owned(), "hunter22".to_owned()), ("num_iids".to_owned(), "1,2".to_owned())];
    let asked = Exchange::get(format!("{}/query", server.url), form.clone());
    assert_eq!(client().exchange(&asked).await.unwrap().body, "key=hunter22&num_iids=1%2C2");

    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    for url in [format!("http://{free}/item_get/"), "http://[".to_owned()] {
        let message = client().exchange(&Exchange::get(url, form.clone())).await.unwrap_err().message;
        assert!(message.starts_with("GET http://") && !message.contains("hunter22"), "{message}");
    }
}

#[tokio::test]
async fn whatever_an_exchange_says_is_sent_and_all_headers_of_the_reply_are_kept() {
    let server = Server::start().await;
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let asked = |method, query: &[(&str, &str)], headers: &[(&str, &str)], body| Exchange {
        query: query.iter().map(|(name, value)| pair(name, value)).collect(),
        headers: headers.iter().map(|(name, value)| pair(name, value)).collect(),
        body,
        ..Exchange::new(method, format!("{}/told", server.url))
    };
    let bytes =
        Sent::Bytes { content_type: "text/csv; charset=gbk".to_owned(), bytes: Bytes::from_static(b"\xb2\xa3") };
    let table = [
        (asked(Method::Get, &[], &[], Sent::None), "GET  -  - weir/"),
        (asked(Method::Get, &[("a", "1 2")], &[("X-Key", "k"), ("User-Agent", "me")], Sent::None), "GET a=1+2 -  k me"),
        (
            asked(Method::Post, &[("a", "1")], &[], Sent::Form(vec![pair("b", "玻")])),
            "POST a=1 application/x-www-form-urlencoded b=%E7%8E%BB - weir/",
        ),
        (
            asked(Method::Put, &[], &[], Sent::Json("{\"n\":1.0}".to_owned())),
            "PUT  application/json {\"n\":1.0} - weir/",
        ),
        (
            asked(Method::Post, &[], &[("content-type", "application/graphql+json")], Sent::Json("{}".to_owned())),
            "POST  application/graphql+json {} - weir/",
        ),
        (asked(Method::Post, &[], &[], bytes), "POST  text/csv; charset=gbk b2a3 - weir/"),
    ];
    for (exchange, expected) in table {
        let reply = client().exchange(&exchange).await.unwrap();
        let told = String::from_utf8_lossy(&reply.body).into_owned();
        assert!(told.starts_with(expected), "{told:?} should begin with {expected:?}");
        assert_eq!(reply.headers.get("x-two").as_deref(), Some("1, 2"));
        assert!(reply.headers.get("date").is_some() && reply.headers.get("content-length").is_some());
    }
}

#[tokio::test]
async fn a_header_with_a_line_break_leaves_nothing_and_shows_nothing() {
    let server = Server::start().await;
    for (name, value) in [("x-key", "hunter22\r\nx-admin: 1"), ("x key", "hunter22")] {
        let headers = vec![(name.to_owned(), value.to_owned())];
        let exchange = Exchange { headers, ..Exchange::new(Method::Get, format!("{}/told", server.url)) };
        let refusal = client().exchange(&exchange).await.unwrap_err();
        assert_eq!((refusal.kind, &*refusal.code), (RefusalKind::Misconfigured(Common::Form), "header"));
        assert!(refusal.message.contains(name) && !refusal.message.contains("hunter22"), "{}", refusal.message);
    }
}

#[tokio::test]
async fn a_host_is_called_by_name_and_its_address_is_kept() {
    let server = Server::start().await;
    let client = client();
    let url = server.url.replace("127.0.0.1", "localhost");
    for _ in 0..3 {
        let reply = client.exchange(&Exchange::post(format!("{url}/type"), Vec::new())).await.unwrap();
        assert_eq!(reply.status, 200);
    }
    // Whoever looked it up again would wait for ever.
    let known = tokio::time::timeout(Duration::ZERO, client.names.resolve("localhost", std::future::pending())).await;
    assert!(known.unwrap().unwrap().iter().any(|address| address.ip().is_loopback()));
}

#[tokio::test]
async fn no_more_calls_than_allowed_are_under_way_to_a_host() {
    let (waiting, peak) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let gate = Arc::new(Semaphore::new(0));
    let (count, most, open) = (Arc::clone(&waiting), Arc::clone(&peak), Arc::clone(&gate));
    let handler = post(async move || {
        most.fetch_max(count.fetch_add(1, Relaxed) + 1, Relaxed);
        open.acquire().await.unwrap().forget();
        count.fetch_sub(1, Relaxed);
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { axum::serve(listener, Router::new().route("/", handler)).await.unwrap() });
    let timeouts = Timeouts { total: Duration::from_secs(20), connect: Duration::from_secs(5) };
    let manners = Manners { calls_per_host: 3, ..Manners::default() };
    let address = Address { name: "a".to_owned(), route: Route::Direct, limit: None };
    let client = Client::from_addresses(timeouts, &manners, &[address]).unwrap();
    let mut calls = JoinSet::new();
    for _ in 0..10 {
        let (client, url) = (client.clone(), url.clone());
        calls.spawn(async move { client.exchange(&Exchange::post(url, Vec::new())).await.unwrap().status });
    }
    for _ in 0..10 {
        // One goes, one comes.
        while waiting.load(Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        gate.add_permits(1);
        assert_eq!(calls.join_next().await.unwrap().unwrap(), 200);
    }
    assert_eq!(peak.load(Relaxed), 3);
}

#[tokio::test]
async fn a_status_is_no_error_and_retry_after_is_read_in_both_forms() {
    let server = Server::start().await;
    let busy = server.call("/busy").await.unwrap();
    assert_eq!((busy.status, busy.retry_after()), (429, Some(Duration::from_secs(7))));
    assert_eq!(busy.body, "slow down");
    let dated = server.call("/dated").await.unwrap();
    assert_eq!((dated.status, dated.retry_after()), (503, Some(Duration::from_secs(60))));
}

#[tokio::test]
async fn a_good_reply_says_that_a_quota_is_used_up() {
    let spent = Server::start().await.call("/spent").await.unwrap();
    assert_eq!((spent.status, spent.used_up()), (200, Some(Duration::from_secs(40))));
}

#[tokio::test]
async fn a_compressed_reply_is_unpacked() {
    assert_eq!(Server::start().await.call("/gzip").await.unwrap().body, r#"{"ok":true}"#);
}

/// `{"ok":"玻璃杯"}` as bytes that a reply can be, with what its headers say of them.
fn packed(how: &str) -> (HeaderMap, Vec<u8>) {
    const TEXT: &str = r#"{"ok":"玻璃杯"}"#;
    let gbk = b"{\"ok\":\"\xb2\xa3\xc1\xa7\xb1\xad\"}".to_vec();
    let gzip = "1f8b0800000000000203ab56cacf56b2527adeb7fbf9a4e66773d72bd50200da57758112000000";
    let zlib = "789cab56cacf56b2527adeb7fbf9a4e66773d72bd502004ca908f3";
    let zstd = "28b52ffd2012910000";
    let (of_type, encoding, body) = match how {
        "a mark" => ("application/json", "", [b"\xef\xbb\xbf", TEXT.as_bytes()].concat()),
        "UTF-16 with a mark" => (
            "application/json",
            "",
            std::iter::once(0xfeff).chain(TEXT.encode_utf16()).flat_map(u16::to_be_bytes).collect(),
        ),
        "UTF-16 without" => ("", "", TEXT.encode_utf16().flat_map(u16::to_le_bytes).collect()),
        "GBK" => ("text/html; Charset=\"GBK\"", "", gbk),
        "GBK in gzip" => {
            let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            std::io::Write::write_all(&mut packer, &gbk).unwrap();
            ("application/json;charset=gb2312", "gzip", packer.finish().unwrap())
        }
        "Latin-1 that is none" => ("application/json;charset=ISO-8859-1", "", TEXT.into()),
        "gzip unsaid" => ("", "", hex::decode(gzip).unwrap()),
        "gzip said twice" => ("", "gzip, x-gzip", hex::decode(gzip).unwrap()),
        "gzip that is none" => ("", "gzip", TEXT.into()),
        "zlib unsaid" => ("", "", hex::decode(zlib).unwrap()),
        "deflate" => ("", "deflate", hex::decode(zlib).unwrap()),
        "raw deflate" => ("", "deflate", hex::decode(&zlib[4..zlib.len() - 8]).unwrap()),
        "zstd unsaid" => ("", "", [hex::decode(zstd).unwrap(), TEXT.into()].concat()),
        "brotli" => ("", "br", [b"\x8b\x08\x80", TEXT.as_bytes(), b"\x03"].concat()),
        other => panic!("{other}"),
    };
    let mut headers = HeaderMap::new();
    headers.extend(
        [("content-type", of_type), ("content-encoding", encoding)]
            .into_iter()
            .filter(|(_, value)| !value.is_empty())
            .map(|(name, value)| {
                (name.parse::<axum::http::HeaderName>().unwrap(), HeaderValue::from_str(value).unwrap())
            }),
    );
    (headers, body)
}

#[tokio::test]
async fn whatever_bytes_a_reply_is_sent_as_it_arrives_as_its_text() {
    let server = Server::start().await;
    let all = [
        "a mark",
        "UTF-16 with a mark",
        "UTF-16 without",
        "GBK",
        "GBK in gzip",
        "Latin-1 that is none",
        "gzip unsaid",
        "gzip said twice",
        "gzip that is none",
        "zlib unsaid",
        "deflate",
        "raw deflate",
        "zstd unsaid",
        "brotli",
    ];
    for how in all {
        let reply = server.call(&format!("/packed?{}", how.replace(' ', "+"))).await;
        let body = reply.map(|reply| String::from_utf8_lossy(&reply.body).into_owned());
        assert_eq!(body.as_deref(), Ok(r#"{"ok":"玻璃杯"}"#), "{how}");
    }
}

#[tokio::test]
async fn what_unpacks_to_more_than_the_limit_is_an_outage_whether_its_packing_is_said_or_not() {
    let server = Server::start().await;
    assert_outage(server.call("/bomb").await, "body");
    assert_outage(server.call("/bomb?said").await, "body");
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    assert_eq!(Server::start().await.call("/moved").await.unwrap().status, 307);
}

#[tokio::test]
async fn a_body_is_read_up_to_the_limit_and_no_further() {
    let server = Server::start().await;
    assert_eq!(server.call("/limit").await.unwrap().body.len(), BODY_LIMIT);
    assert_outage(server.call("/beyond").await, "body");
    assert_outage(server.call("/announced").await, "body");
}

#[tokio::test]
async fn a_reply_that_never_ends_and_one_that_never_begins_time_out() {
    let server = Server::start().await;
    assert_outage(server.call("/slow").await, "timeout");
    assert_outage(server.call("/never").await, "timeout");
}

#[tokio::test]
async fn a_connection_that_closes_too_early_is_an_outage() {
    let (url, _tasks) = rude("").await;
    assert_outage(call(&url).await, "closed");
    let (url, _tasks) = rude("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf").await;
    assert_outage(call(&url).await, "body");
    let (url, _tasks) = rude("+PONG\r\n").await;
    assert_outage(call(&url).await, "closed");
}

#[tokio::test]
async fn a_refused_port_and_a_server_without_tls_are_told_apart() {
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    assert_outage(call(&format!("http://{free}/")).await, "connect");
    let server = Server::start().await;
    assert_outage(call(&server.url.replace("http:", "https:")).await, "tls");
}

/// The outcome of a call to `url` from an address.
async fn call_from(route: Route, url: &str) -> Result<HttpReply, NoReply> {
    let timeouts = Timeouts { total: Duration::from_millis(800), connect: Duration::from_millis(400) };
    let address = Address { name: "a".to_owned(), route, limit: None };
    let client = Client::from_addresses(timeouts, &Manners::default(), &[address]).unwrap();
    client.exchange_from(0, &Exchange::post(url.to_owned(), vec![])).await
}

/// A server that answers the first `answers` calls of each connection, and closes it so long after the next one has come.
async fn closing(answers: usize, after: Duration) -> (String, JoinSet<()>) {
    use tokio::io::AsyncReadExt as _;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let mut buffer = [0; 4096];
            for _ in 0..answers {
                let _ = socket.read(&mut buffer).await;
                let _ = socket.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await;
            }
            let _ = socket.read(&mut buffer).await;
            tokio::time::sleep(after).await;
        }
    });
    (url, tasks)
}

#[tokio::test]
async fn a_connection_that_is_closed_while_idle_is_no_outage_and_one_that_is_closed_in_a_call_is() {
    let timeouts = Timeouts { total: Duration::from_secs(5), connect: Duration::from_secs(2) };
    let outcome = async |answers: usize, after: Duration| {
        let (url, _tasks) = closing(answers, after).await;
        let client = Client::new(timeouts).unwrap();
        let exchange = Exchange::post(url, vec![]);
        for _ in 0..answers {
            assert_eq!(client.exchange_from(0, &exchange).await.unwrap().status, 200);
        }
        client.exchange_from(0, &exchange).await.unwrap_err()
    };
    let idle = outcome(1, Duration::ZERO).await;
    assert!(matches!(&idle, NoReply::Unprocessed(Unprocessed { is_certain: false, .. })), "{idle:?}");
    let fresh = outcome(0, Duration::ZERO).await;
    assert!(matches!(&fresh, NoReply::Refused(refusal) if refusal.code == "closed"), "{fresh:?}");
    let at_work = outcome(1, Duration::from_millis(1_200)).await;
    assert!(matches!(&at_work, NoReply::Refused(refusal) if refusal.code == "closed"), "{at_work:?}");
}

/// Runs a test in a process of its own that may have only so few files open.
fn with_few_descriptors(test: &str) {
    let itself = std::env::current_exe().unwrap();
    let script = format!("ulimit -n 64 && exec {} --exact {test} --nocapture", itself.display());
    let output = std::process::Command::new("sh").args(["-c", &script]).env("WEIR_TEST_FEW", "yes").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
fn a_machine_without_a_descriptor_left_is_told_from_a_vendor_that_is_away() {
    if std::env::var_os("WEIR_TEST_FEW").is_none() {
        let this = "a_machine_without_a_descriptor_left_is_told_from_a_vendor_that_is_away";
        return with_few_descriptors(&format!("platform::http::tests::{this}"));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let server = Server::start().await;
        let addresses = [
            Route::Direct,
            Route::Local([127, 0, 0, 1].into()),
            through(&server.url, None),
            through("http://localhost:9", None),
        ];
        let client = |route| {
            let address = Address { name: "a".to_owned(), route, limit: None };
            let timeouts = Timeouts { total: Duration::from_secs(5), connect: Duration::from_secs(2) };
            Client::from_addresses(timeouts, &Manners::default(), &[address]).unwrap()
        };
        let clients = addresses.map(client);
        let urls = [format!("{}/echo", server.url), "http://no.such.name.invalid/".to_owned()];
        let mut open = Vec::new();
        while let Ok(file) = std::fs::File::open("/dev/null") {
            open.push(file);
        }
        for client in &clients {
            for url in &urls {
                let outcome = client.exchange_from(0, &Exchange::post(url.clone(), vec![])).await;
                let Err(NoReply::Machine(why)) = outcome else { panic!("{url}: {outcome:?}") };
                assert!(why.contains("ulimit -n") && why.contains("POST http"), "{why}");
            }
        }
        drop(open);
        let outcome = clients[0].exchange_from(0, &Exchange::post(urls[0].clone(), vec![])).await;
        assert_eq!(outcome.unwrap().status, 200);
    });
}

fn through(proxy: &str, password: Option<&str>) -> Route {
    let credentials =
        password.map(|password| Credentials { user: "user".into(), password: password.to_owned().into() });
    Route::Proxy { url: proxy.to_owned(), credentials }
}

#[tokio::test]
async fn what_fails_on_the_way_to_the_vendor_is_the_proxys() {
    let server = Server::start().await;
    let echo = format!("{}/echo", server.url);
    let secured = echo.replace("http:", "https:");
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let http = Proxy::http([127, 0, 0, 1], Some("user:hunter22")).await;
    let socks = Proxy::socks([127, 0, 0, 1], Some("user:hunter22")).await;
    let table = [
        ("no proxy there", through(&format!("http://{nobody}"), None), echo.clone()),
        ("no SOCKS there", through(&format!("socks5://{nobody}"), None), echo.clone()),
        ("407 to a call", through(&http.url, Some("wrong-one")), echo.clone()),
        ("407 to CONNECT", through(&http.url, Some("wrong-one")), secured.clone()),
        ("SOCKS's 407", through(&socks.url, Some("wrong-one")), echo.clone()),
        ("SOCKS cannot connect", through(&socks.url, Some("hunter22")), format!("http://{nobody}/")),
        ("CONNECT cannot connect", through(&http.url, Some("hunter22")), format!("https://{nobody}/")),
        ("not our address", Route::Local([192, 0, 2, 1].into()), echo.clone()),
    ];
    for (what, route, url) in table {
        let outcome = call_from(route, &url).await;
        let Err(NoReply::Address(why)) = outcome else { panic!("{what}: {outcome:?}") };
        assert!(!why.contains("hunter22") && !why.contains("wrong-one"), "{what}: {why}");
    }
}

#[tokio::test]
async fn through_a_proxy_that_works_everything_is_the_vendors() {
    let server = Server::start().await;
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    for proxy in [Proxy::http([127, 0, 0, 61], None).await, Proxy::socks([127, 0, 0, 62], None).await] {
        let call = async |url: String| call_from(through(&proxy.url, None), &url).await;
        assert_eq!(call(format!("{}/busy", server.url)).await.unwrap().status, 429);
        let slow = call(format!("{}/never", server.url)).await;
        assert!(matches!(&slow, Err(NoReply::Refused(refusal)) if refusal.code == "timeout"), "{slow:?}");
        let tls = call(format!("{}/echo", server.url.replace("http:", "https:"))).await;
        assert!(matches!(&tls, Err(NoReply::Refused(refusal)) if refusal.code == "tls"), "{tls:?}");
    }
    let bad_gateway = Proxy::http([127, 0, 0, 61], None).await;
    let reply = call_from(through(&bad_gateway.url, None), &format!("http://{nobody}/")).await.unwrap();
    assert_eq!(reply.status, 502);
    let refused = call_from(Route::Local([127, 0, 0, 1].into()), &format!("http://{nobody}/")).await;
    assert!(matches!(&refused, Err(NoReply::Refused(refusal)) if refusal.code == "connect"), "{refused:?}");
}

#[tokio::test]
async fn an_error_names_the_address_but_not_the_query() {
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let message = call(&format!("http://{free}/api?token=hunter22#x")).await.unwrap_err().message;
    assert!(message.starts_with(&format!("POST http://{free}/api: ")), "{message}");
    assert!(message.contains("refused") && !message.contains("hunter22"), "{message}");
}

#[tokio::test]
async fn an_impossible_url_is_our_fault() {
    let is_form = |refusal: &Refusal| refusal.kind == RefusalKind::Misconfigured(Common::Form);
    assert!(is_form(&call("http://[").await.unwrap_err()));
}
