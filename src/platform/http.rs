//! The vendors' HTTP client: pooled connections, one call per exchange, nothing without a limit.

use std::{
    cell::Cell,
    error::Error,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use reqwest::{
    Certificate, Proxy, RequestBuilder, Response, Url,
    dns::{Addrs, Name, Resolve, Resolving},
    header::{ACCEPT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue},
};
use secrecy::ExposeSecret;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use tower::Service;

use super::{
    Body, Common, Exchange, Headers, HttpReply, Method, Refusal, RefusalKind,
    content::{self, Unpackable},
    names::{self, Names},
    route::{Address, Credentials, Route},
    shortage::{self, Shortage},
};
use crate::{
    message::codec::{quotable, shorten},
    runtime::{clock::Clock, error_chain::chain, http_client},
};

/// The longest body that is read, in bytes: far more than any product has, and little enough that its record
/// fits into a topic.
pub const BODY_LIMIT: usize = 4 * 1024 * 1024;

/// How replies may be packed, of what can be unpacked: what every server can do, and most do well.
const PACKINGS: &str = "gzip, br";

/// A packed reply longer than this is unpacked where it keeps no other call waiting, in bytes.
const ASIDE: usize = 16 * 1024;

/// A proxy's "who are you?".
const PROXY_AUTHENTICATION: u16 = 407;

/// How much of an error's text is kept, in bytes.
const MESSAGE_LIMIT: usize = 300;

/// What is first in the way of a vendor, or a proxy, with a certificate that nobody vouches for.
const UNTRUSTED: &str = "its certificate is not trusted (a company's own CA is named by ca_file of the source)";

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// From the start of a call to the last byte of its reply.
    pub total: Duration,
    /// Connecting, with TLS.
    pub connect: Duration,
}

/// Certificates that are trusted besides the system's: of a proxy or a gateway of one's own.
#[derive(Clone, Debug, Default)]
pub struct Authorities(Vec<Certificate>);

impl Authorities {
    /// Those in a PEM text, at least one.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_pem(text: &[u8]) -> Result<Self, String> {
        let found = Certificate::from_pem_bundle(text).map_err(|error| chain(&error))?;
        if found.is_empty() { Err("there is no -----BEGIN CERTIFICATE----- in it".to_owned()) } else { Ok(Self(found)) }
    }
}

/// What holds for all connections of a source.
#[derive(Clone, Debug)]
pub struct Manners {
    /// How long the addresses of a name count.
    pub dns_cache: Duration,
    /// The most calls that may be under way at once from each address to the vendor's host.
    pub calls_per_host: usize,
    /// Who vouches for the vendor besides those whom the system trusts.
    pub authorities: Authorities,
}

impl Default for Manners {
    fn default() -> Self {
        let authorities = Authorities::default();
        Self { dns_cache: Duration::from_secs(300), calls_per_host: Semaphore::MAX_PERMITS, authorities }
    }
}

/// A pool of connections for each address that calls leave from. Clones share them.
#[derive(Clone, Debug)]
pub struct Client {
    ways: Arc<[Way]>,
    names: Arc<Names>,
    timeout: Duration,
}

/// One address and its connections.
#[derive(Clone, Debug)]
struct Way {
    name: String,
    route: Route,
    http: reqwest::Client,
    /// One permit for each call that may be under way.
    room: Arc<Semaphore>,
}

/// One of the calls that may be under way from an address; given back when it is dropped.
#[derive(Debug)]
pub struct CallPermit(#[allow(dead_code, reason = "held")] OwnedSemaphorePermit);

/// Why there is no reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoReply {
    /// The vendor was not reached, and the address that the call should have left from is to blame: the proxy
    /// does not answer, wants other credentials or cannot connect, or the machine does not have that address.
    Address(String),
    /// This machine has run out of something that a call needs: file descriptors, ports or memory. Nothing has left.
    Machine(String),
    /// The peer has not acted on the call, which may be made again.
    Unprocessed(Unprocessed),
    /// Anything else, as the vendor's.
    Refused(Refusal),
}

/// A call that the peer has not acted on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unprocessed {
    /// What it is if it happens again and again.
    pub refusal: Refusal,
    /// Whether the peer says so itself (`GOAWAY`, `REFUSED_STREAM`) or the call was never written; else a connection that
    /// had been idle was closed before a byte of the reply, which all but proves it.
    pub is_certain: bool,
}

/// The client cannot be made: TLS does not start.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ClientError(String);

enum Broken {
    /// This header is none that HTTP could carry. Nothing has left.
    Header(String),
    /// Before the reply began.
    Unanswered {
        error: reqwest::Error,
        on_idle_connection: bool,
        after: Duration,
    },
    /// Within the reply.
    Transport(reqwest::Error),
    TooLong,
    /// It is packed in this way, and cannot be unpacked.
    Packed(&'static str),
}

impl Broken {
    const fn error(&self) -> Option<&reqwest::Error> {
        match self {
            Self::Unanswered { error, .. } | Self::Transport(error) => Some(error),
            Self::Header(_) | Self::TooLong | Self::Packed(_) => None,
        }
    }
}

impl Client {
    /// Prepares a client. Connects to nothing.
    ///
    /// # Errors
    /// [`ClientError`] if the TLS library does not start.
    pub fn new(timeouts: Timeouts) -> Result<Self, ClientError> {
        let direct = Address { name: "direct".to_owned(), route: Route::Direct, limit: None };
        Self::from_addresses(timeouts, &Manners::default(), &[direct])
    }

    /// The same with these addresses, at least one; [`Self::exchange_from`] names them by their index.
    ///
    /// # Errors
    /// As [`Self::new`]; or a proxy's URL is none.
    pub fn from_addresses(timeouts: Timeouts, manners: &Manners, addresses: &[Address]) -> Result<Self, ClientError> {
        let names = Arc::new(Names::new(manners.dns_cache));
        let way = |Address { name, route, .. }: &Address| {
            let http = connections(timeouts, &manners.authorities, route, Resolver(Arc::clone(&names)));
            let http = http.map_err(|error| ClientError(chain(&error.without_url())))?;
            let room = Arc::new(Semaphore::new(manners.calls_per_host.clamp(1, Semaphore::MAX_PERMITS)));
            Ok(Way { name: name.clone(), route: route.clone(), http, room })
        };
        let ways = addresses.iter().map(way).collect::<Result<_, ClientError>>()?;
        Ok(Self { ways, names, timeout: timeouts.total })
    }

    /// How long one call takes at most.
    #[must_use]
    pub const fn timeout(&self) -> Duration {
        self.timeout
    }

    /// How many addresses there are.
    #[must_use]
    pub fn addresses(&self) -> usize {
        self.ways.len()
    }

    /// What an address is called.
    #[must_use]
    pub fn address_name(&self, index: usize) -> &str {
        self.ways.get(index).map_or("unknown", |way| way.name.as_str())
    }

    /// Lets the names be looked up anew that stand between us and a vendor who cannot be reached.
    fn doubt(&self, broken: &Broken, way: &Way, exchange: &Exchange) {
        if !broken.error().is_some_and(reqwest::Error::is_connect) {
            return;
        }
        let proxy = match &way.route {
            Route::Proxy { url, .. } => Some(url),
            Route::Direct | Route::Local(_) => None,
        };
        for url in proxy.into_iter().chain([&exchange.url]) {
            if let Some(host) = url.parse::<Url>().ok().as_ref().and_then(Url::host_str) {
                self.names.doubt(host);
            }
        }
    }

    /// Makes one call from the first address: sends the exchange and reads the whole reply, whatever its status.
    ///
    /// # Errors
    /// A [`Refusal`] of kind [`RefusalKind::Outage`] if there is no whole reply, with one of the codes
    /// `address`, `machine`, `timeout`, `connect`, `dns`, `tls`, `closed` and `body`; of kind
    /// [`RefusalKind::Misconfigured`] with `url` or `header` if the exchange is none that HTTP could carry.
    ///
    /// # Cancellation
    /// As [`Self::exchange_from`].
    pub async fn exchange(&self, exchange: &Exchange) -> Result<HttpReply, Refusal> {
        let outage = |code: &str, message| Refusal { kind: RefusalKind::Outage, code: code.to_owned(), message };
        self.exchange_from(0, exchange).await.map_err(|no_reply| match no_reply {
            NoReply::Address(message) => outage("address", message),
            NoReply::Machine(message) => outage("machine", message),
            NoReply::Unprocessed(Unprocessed { refusal, .. }) | NoReply::Refused(refusal) => refusal,
        })
    }

    /// Makes one call from the address of this index (beyond the last: from the first).
    ///
    /// # Errors
    /// [`NoReply`]: who is to blame that there is no whole reply.
    ///
    /// # Cancellation
    /// Dropping the future closes the connection (HTTP/1.1) or resets the stream (HTTP/2); the vendor may
    /// have counted the call.
    pub async fn exchange_from(&self, address: usize, exchange: &Exchange) -> Result<HttpReply, NoReply> {
        let Some(way) = self.way(address) else {
            return Err(NoReply::Address("the source has no address to call from".to_owned()));
        };
        let Ok(Ok(permit)) = tokio::time::timeout(self.timeout, Arc::clone(&way.room).acquire_owned()).await else {
            let message = "the calls that are under way to the vendor do not end".to_owned();
            return Err(NoReply::Refused(Refusal { kind: RefusalKind::Outage, code: "timeout".to_owned(), message }));
        };
        self.exchange_within(&CallPermit(permit), address, exchange).await
    }

    fn way(&self, address: usize) -> Option<&Way> {
        self.ways.get(address).or_else(|| self.ways.first())
    }

    /// Permission for one more call from this address, if there is room for it.
    #[must_use]
    pub fn permit(&self, address: usize) -> Option<CallPermit> {
        Arc::clone(&self.way(address)?.room).try_acquire_owned().ok().map(CallPermit)
    }

    /// As [`Self::exchange_from`], with a permit of the same address: it waits for nobody.
    ///
    /// # Errors
    /// As [`Self::exchange_from`].
    ///
    /// # Cancellation
    /// As [`Self::exchange_from`].
    pub async fn exchange_within(
        &self,
        _permit: &CallPermit,
        address: usize,
        exchange: &Exchange,
    ) -> Result<HttpReply, NoReply> {
        let Some(way) = self.way(address) else {
            return Err(NoReply::Address("the source has no address to call from".to_owned()));
        };
        let reply = way.attempt(exchange).await.map_err(|broken| {
            self.doubt(&broken, way, exchange);
            way.blame(broken, exchange)
        })?;
        if reply.status == PROXY_AUTHENTICATION && matches!(way.route, Route::Proxy { .. }) {
            return Err(NoReply::Address("the proxy wants (other) credentials: HTTP 407".to_owned()));
        }
        Ok(reply)
    }
}

/// Looks names up for the pools of a source.
struct Resolver(Arc<Names>);

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let names = Arc::clone(&self.0);
        Box::pin(async move {
            let look_up = async {
                let found = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
                Ok(names::usable(found, names::has_way))
            };
            let addresses = names.resolve(name.as_str(), look_up).await?;
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

/// The connections of one address.
fn connections(
    timeouts: Timeouts,
    Authorities(authorities): &Authorities,
    route: &Route,
    resolver: Resolver,
) -> Result<reqwest::Client, reqwest::Error> {
    let builder = http_client::builder()
        .tls_certs_merge(authorities.iter().cloned())
        .timeout(timeouts.total)
        .connect_timeout(timeouts.connect)
        .tcp_nodelay(true)
        .tcp_keepalive(Duration::from_secs(30))
        .http2_adaptive_window(true)
        .dns_resolver(Arc::new(resolver))
        .default_headers(HeaderMap::from_iter([(ACCEPT_ENCODING, HeaderValue::from_static(PACKINGS))]))
        .connector_layer(tower::layer::layer_fn(NotesConnections))
        .no_proxy();
    match route {
        Route::Direct => builder,
        Route::Local(address) => builder.local_address(*address),
        Route::Proxy { url, credentials } => {
            let proxy = Proxy::all(url)?;
            builder.proxy(match credentials {
                Some(Credentials { user, password }) => {
                    proxy.basic_auth(user.expose_secret(), password.expose_secret())
                }
                None => proxy,
            })
        }
    }
    .build()
}

impl Way {
    /// Whether the address or the vendor is to blame.
    ///
    /// What goes wrong before a connection to the vendor is there is the proxy's, also if the proxy says that it
    /// cannot reach it: the vendor has seen nothing of the call. TLS is between us and the vendor.
    fn blame(&self, broken: Broken, exchange: &Exchange) -> NoReply {
        let error = broken.error();
        let is_address = error.is_some_and(|error| match &self.route {
            Route::Proxy { .. } => error.is_connect() && code_of(error, &chain(error)) != "tls",
            Route::Local(_) => shortage::of_error(error) == Some(Shortage::Address),
            Route::Direct => false,
        });
        let machine = error
            .filter(|error| error.is_connect())
            .and_then(|error| shortage::of_connect(error))
            .filter(|_| !(is_address && matches!(self.route, Route::Local(_))));
        let is_certain = broken.was_not_processed();
        let refusal = broken.refusal(exchange);
        match (machine, is_certain) {
            (Some(shortage), _) => NoReply::Machine(format!("{shortage}; {}", refusal.message)),
            (None, _) if is_address => NoReply::Address(refusal.message),
            (None, Some(is_certain)) => NoReply::Unprocessed(Unprocessed { refusal, is_certain }),
            (None, None) => NoReply::Refused(refusal),
        }
    }

    async fn attempt(&self, exchange: &Exchange) -> Result<HttpReply, Broken> {
        let request = self.request(exchange)?;
        let began_at = Instant::now();
        let (response, has_connected) = noting_connections(request.send()).await;
        let response = response.map_err(|error| Broken::Unanswered {
            error,
            on_idle_connection: !has_connected,
            after: began_at.elapsed(),
        })?;
        let status = response.status().as_u16();
        let received_at = Clock::System.now();
        let headers = Headers::new(response.headers());
        let header = |name| headers.get(name).unwrap_or_default();
        let body = content(header("content-encoding").into_owned(), body(response).await?).await?;
        let body = content::text(&header("content-type"), &body);
        Ok(HttpReply { status, headers, received_at, body })
    }

    fn request(&self, Exchange { method, url, query, headers, body }: &Exchange) -> Result<RequestBuilder, Broken> {
        let method = match method {
            Method::Get => reqwest::Method::GET,
            Method::Post => reqwest::Method::POST,
            Method::Put => reqwest::Method::PUT,
        };
        let whole = if query.is_empty() { None } else { with_query(url, query) };
        // What is no URL stays as it is: the client says so.
        let request = self.http.request(method, whole.as_ref().unwrap_or(url));
        let request = match body {
            Body::None => request,
            Body::Form(form) => request.form(form),
            Body::Json(json) => request.header(CONTENT_TYPE, "application/json").body(json.clone()),
            Body::Bytes { content_type, bytes } => {
                let (_, content_type) = header("content-type", content_type)?;
                request.header(CONTENT_TYPE, content_type).body(bytes.clone())
            }
        };
        if headers.is_empty() {
            return Ok(request);
        }
        let own = headers.iter().map(|(name, value)| header(name, value));
        Ok(request.headers(own.collect::<Result<HeaderMap, Broken>>()?))
    }
}

/// A header as HTTP carries it: a line break in a value would make two of it. It may be a secret, so no error shows it.
fn header(name: &str, value: &str) -> Result<(HeaderName, HeaderValue), Broken> {
    let none = || Broken::Header(name.to_owned());
    let named = HeaderName::from_bytes(name.as_bytes()).map_err(|_| none())?;
    let mut value = HeaderValue::from_str(value).map_err(|_| none())?;
    value.set_sensitive(true);
    Ok((named, value))
}

/// What is in a body that may be packed.
async fn content(encodings: String, body: Bytes) -> Result<Bytes, Broken> {
    if !content::is_packed(&encodings, &body) {
        return Ok(body);
    }
    let is_small = body.len() <= ASIDE;
    let unpack = move || content::unpacked(&encodings, body, BODY_LIMIT);
    let unpacked = if is_small {
        unpack()
    } else {
        tokio::task::spawn_blocking(unpack)
            .await
            .unwrap_or(Err(Unpackable::Broken("that the unpacker did not survive")))
    };
    unpacked.map_err(|error| match error {
        Unpackable::TooLong => Broken::TooLong,
        Unpackable::Broken(packing) => Broken::Packed(packing),
    })
}

async fn body(mut response: Response) -> Result<Bytes, Broken> {
    let announced = response.content_length().unwrap_or(0);
    if announced > BODY_LIMIT as u64 {
        return Err(Broken::TooLong);
    }
    let Some(first) = response.chunk().await.map_err(Broken::Transport)? else {
        return Ok(Bytes::new());
    };
    let Some(second) = response.chunk().await.map_err(Broken::Transport)? else {
        return if first.len() > BODY_LIMIT { Err(Broken::TooLong) } else { Ok(first) };
    };
    let mut body =
        BytesMut::with_capacity(usize::try_from(announced).unwrap_or(0).max(2 * (first.len() + second.len())));
    body.extend_from_slice(&first);
    let mut next = Some(second);
    while let Some(chunk) = next {
        if body.len() + chunk.len() > BODY_LIMIT {
            return Err(Broken::TooLong);
        }
        body.extend_from_slice(&chunk);
        next = response.chunk().await.map_err(Broken::Transport)?;
    }
    Ok(body.freeze())
}

impl Broken {
    /// A connection that was closed while it was idle says so about a round trip after the call was written. Later the
    /// peer may have been at work.
    const IDLE_CLOSE: Duration = Duration::from_secs(1);

    /// Whether the peer has not acted on the call, and whether that is certain.
    fn was_not_processed(&self) -> Option<bool> {
        let Self::Unanswered { error, on_idle_connection, after } = self else { return None };
        let says_so = |error: &(dyn Error + 'static)| {
            let of_stream = error.downcast_ref::<h2::Error>().is_some_and(|error| {
                // A GOAWAY is the error of those streams alone that come after the last one that was processed.
                let is_refused = error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
                error.is_remote() && (error.is_go_away() || is_refused)
            });
            of_stream || error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_canceled)
        };
        if causes(error).any(says_so) {
            return Some(true);
        }
        let is_closed = |error: &(dyn Error + 'static)| {
            use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
            let io = error.downcast_ref::<std::io::Error>();
            io.is_some_and(|io| matches!(io.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof))
                || error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_incomplete_message)
        };
        let is_idle_close = *on_idle_connection && *after <= Self::IDLE_CLOSE && causes(error).any(is_closed);
        is_idle_close.then_some(false)
    }

    fn refusal(self, Exchange { method, url, .. }: &Exchange) -> Refusal {
        let to = url.split(['?', '#']).next().unwrap_or_default();
        let (kind, code, why) = match self {
            Self::Header(name) => {
                let why = format!(
                    "the header {name:?}, or its value, is none that HTTP can carry: is there a line break in it?"
                );
                (RefusalKind::Misconfigured(Common::Form), "header", why)
            }
            Self::TooLong => (RefusalKind::Outage, "body", format!("the reply has more than {BODY_LIMIT} bytes")),
            Self::Packed(packing) => {
                (RefusalKind::Outage, "body", format!("the reply is {packing} and breaks off or is damaged"))
            }
            Self::Unanswered { error, .. } | Self::Transport(error) if error.is_builder() => {
                (RefusalKind::Misconfigured(Common::Form), "url", chain(&error.without_url()))
            }
            Self::Unanswered { error, .. } | Self::Transport(error) => {
                let error = error.without_url();
                let why = chain(&error);
                match code_of(&error, &why) {
                    "tls" if why.contains("certificate verify failed") => {
                        (RefusalKind::Outage, "tls", format!("{UNTRUSTED}: {why}"))
                    }
                    code => (RefusalKind::Outage, code, why),
                }
            }
        };
        let message = format!("{} {to}: {why}", method.name());
        let message = shorten(&quotable(&message), MESSAGE_LIMIT).into_owned();
        Refusal { kind, code: code.to_owned(), message }
    }
}

/// An error and what caused it, the outermost first.
fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error: &&'a (dyn Error + 'static)| -> Option<&'a (dyn Error + 'static)> {
        (*error).source()
    })
}

tokio::task_local! {
    /// Whether the call that this task makes has begun to connect.
    static CONNECTS: Cell<bool>;
}

/// Makes a call; whether a connection was opened for it.
async fn noting_connections<T>(call: impl Future<Output = T>) -> (T, bool) {
    let call = async {
        let outcome = call.await;
        (outcome, CONNECTS.with(Cell::get))
    };
    CONNECTS.scope(Cell::new(false), call).await
}

/// Notes that a connection is opened. Whoever calls is given an idle one if there is any, else opens one in its own task.
#[derive(Clone, Debug)]
struct NotesConnections<S>(S);

impl<S: Service<R>, R> Service<R> for NotesConnections<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: R) -> S::Future {
        let _ = CONNECTS.try_with(|connects| connects.set(true));
        self.0.call(request)
    }
}

fn code_of(error: &reqwest::Error, why: &str) -> &'static str {
    let says = |words: &[&str]| words.iter().any(|word| why.contains(word));
    if error.is_connect() && says(&["dns error"]) {
        "dns"
    } else if error.is_connect() && says(&["SSL", "ssl", "TLS", "tls", "certificate"]) {
        "tls"
    } else if error.is_connect() {
        "connect"
    } else if error.is_timeout() {
        "timeout"
    } else if error.is_body() || error.is_decode() {
        "body"
    } else {
        "closed"
    }
}

/// A URL with these parameters as its query; nothing if it is no URL.
pub(super) fn with_query<K: AsRef<str>, V: AsRef<str>>(url: &str, params: &[(K, V)]) -> Option<String> {
    Url::parse_with_params(url, params).ok().map(String::from)
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tls_tests;
