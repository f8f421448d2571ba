//! The gateway over HTTP/1.1: arrival times, latency, cut connections, and `/stats`.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Json, RequestExt, Router,
    body::{Body, Bytes},
    extract::{ConnectInfo, DefaultBodyLimit, Form, Path, Query, Request, State},
    http::{HeaderValue, Method, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{any, get, post},
    serve::ListenerExt,
};
use tokio::{net::TcpListener, task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    Latency, Options, SimulateError, accounts,
    addresses::Addresses,
    aop::{Call, Gateway, Reply},
    catalogue::Catalogue,
    dice::{Question, roll},
    stats::{Report, Stats},
};
use crate::{platform::Account, runtime::clock::Clock};

/// The longest form that is read, in bytes.
const FORM_LIMIT: usize = 64 * 1024;

/// How long a stop waits for calls in flight.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// A running simulator; it stops when this is dropped.
#[derive(Debug)]
pub struct Simulator {
    address: SocketAddr,
    world: Arc<World>,
    stop: CancellationToken,
    server: JoinSet<io::Result<()>>,
}

#[derive(Debug)]
struct World {
    gateway: Gateway,
    addresses: Addresses,
    stats: Stats,
    latency: Latency,
    seed: u64,
    started: Instant,
}

/// Starts a simulator on [`Options::listen`].
///
/// # Errors
/// [`SimulateError`] if an option is out of range, the accounts' file cannot be written or the address is taken.
pub async fn start(options: Options, clock: Clock) -> Result<Simulator, SimulateError> {
    options.check()?;
    let accounts = accounts::generate(options.seed, options.accounts)?;
    // Before listening: whoever sees the port open finds the file.
    if let Some(path) = &options.accounts_file {
        accounts::write(path, &accounts)
            .map_err(|source| SimulateError::AccountsFile { path: path.clone(), source })?;
    }
    let refused = |source| SimulateError::Listen { address: options.listen, source };
    let listener = TcpListener::bind(options.listen).await.map_err(refused)?;
    let address = listener.local_addr().map_err(refused)?;

    let catalogue = Catalogue { seed: options.seed, shares: options.shares };
    let world = Arc::new(World {
        stats: Stats::new(accounts.len()),
        gateway: Gateway::new(accounts, options.quota, options.tokens, catalogue, options.drift, clock),
        addresses: Addresses::new(options.address_quota),
        latency: options.latency,
        seed: options.seed,
        started: Instant::now(),
    });
    let stop = CancellationToken::new();
    let mut server = JoinSet::new();
    server.spawn(serve(listener, router(Arc::clone(&world)), stop.clone()));
    Ok(Simulator { address, world, stop, server })
}

impl Simulator {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The base URL, like the real gateway's `https://gw.open.1688.com`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The accounts that it knows.
    pub fn accounts(&self) -> &[Account] {
        self.world.gateway.accounts()
    }

    /// What it has counted.
    pub fn stats(&self) -> Report {
        self.world.report()
    }

    /// The user of this account withdraws the authorisation; false if there is no such account.
    pub fn revoke(&self, alias: &str) -> bool {
        self.world.gateway.revoke(alias)
    }

    /// Every secret that there is or was: none of them may turn up in a log.
    pub fn secrets(&self) -> Vec<String> {
        self.world.gateway.secrets()
    }

    /// Sets the counts to zero. What the world remembers of troubled items and quotas stays.
    pub fn reset(&self) {
        self.world.stats.reset(self.world.started.elapsed());
        self.world.addresses.reset();
    }

    /// Waits until the server ends by itself, which only an error makes it do.
    ///
    /// # Errors
    /// [`SimulateError::Serve`] with that error.
    ///
    /// # Cancellation
    /// Safe: the server goes on.
    pub async fn ended(&mut self) -> Result<(), SimulateError> {
        match self.server.join_next().await {
            None | Some(Ok(Ok(()))) => Ok(()),
            Some(Ok(Err(source))) => Err(SimulateError::Serve { address: self.address, source }),
            Some(Err(error)) => Err(SimulateError::Serve { address: self.address, source: io::Error::other(error) }),
        }
    }

    /// Stops after the calls in flight, or after five seconds.
    ///
    /// # Errors
    /// [`SimulateError::Serve`] if the server had ended with an error.
    pub async fn stop(mut self) -> Result<(), SimulateError> {
        self.stop.cancel();
        tokio::time::timeout(STOP_LIMIT, self.ended()).await.unwrap_or(Ok(()))
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        // Ends the connections too, which are tasks of their own.
        self.stop.cancel();
    }
}

impl World {
    fn report(&self) -> Report {
        let accounts = self.gateway.accounts();
        let report = self.stats.report(self.started.elapsed(), |index| accounts[index].alias.to_string());
        Report { addresses: self.addresses.report(|index| accounts[index].alias.to_string()), ..report }
    }
}

async fn serve(listener: TcpListener, router: Router, stop: CancellationToken) -> io::Result<()> {
    let listener = listener.tap_io(|socket| {
        // Without it a reply may wait 40 ms for the client's acknowledgement. A socket that refuses is closing.
        let _ = socket.set_nodelay(true);
    });
    let service = router.into_make_service_with_connect_info::<SocketAddr>();
    axum::serve(listener, service).with_graceful_shutdown(stop.cancelled_owned()).await
}

fn router(world: Arc<World>) -> Router {
    Router::new()
        .route("/openapi/{*path}", any(call))
        .route("/stats", get(|State(world): State<Arc<World>>| async move { Json(world.report()) }))
        .route("/reset", post(reset))
        .route("/revoke/{alias}", post(revoke))
        .route("/oauth/authorize", get(authorise))
        .route("/healthz", get(|| async { "ok\n" }))
        .layer(DefaultBodyLimit::max(FORM_LIMIT))
        .with_state(world)
}

async fn reset(State(world): State<Arc<World>>) -> StatusCode {
    world.stats.reset(world.started.elapsed());
    world.addresses.reset();
    StatusCode::NO_CONTENT
}

async fn revoke(State(world): State<Arc<World>>, Path(alias): Path<String>) -> StatusCode {
    if world.gateway.revoke(&alias) { StatusCode::NO_CONTENT } else { StatusCode::NOT_FOUND }
}

/// The page where a user authorises the app, and does so at once.
async fn authorise(State(world): State<Arc<World>>, Query(params): Query<Vec<(String, String)>>) -> Response {
    let back = world.gateway.authorise_page(&params, world.started.elapsed());
    match back.and_then(|back| HeaderValue::from_str(&back).ok()) {
        Some(back) => (StatusCode::FOUND, [(header::LOCATION, back)]).into_response(),
        None => (StatusCode::BAD_REQUEST, "the link is not one of an app that is known here\n").into_response(),
    }
}

/// One call to the gateway.
async fn call(
    State(world): State<Arc<World>>,
    ConnectInfo(from): ConnectInfo<SocketAddr>,
    request: Request,
) -> Response {
    // The head has just been read: this is the arrival that the quota is judged by, whatever follows.
    let arrived = world.started.elapsed();
    if request.method() != Method::GET && request.method() != Method::POST {
        return StatusCode::METHOD_NOT_ALLOWED.into_response();
    }
    let in_flight = world.stats.arrive(arrived);
    let path = request.uri().path().strip_prefix("/openapi/").unwrap_or_default().to_owned();
    let params = params(request).await;
    let is_address_within = world.addresses.admit(from.ip(), arrived);
    let verdict = world.gateway.judge(&Call { path: &path, params: &params, arrived, is_address_within });
    world.addresses.count(from.ip(), verdict.account);
    if let Some(item) = verdict.item {
        world.stats.asked_for(item);
    }
    if verdict.takes_time() {
        let latency = world.latency.pick(roll(world.seed, Question::Latency, verdict.serial));
        if !latency.is_zero() {
            tokio::time::sleep(latency).await;
        }
    }
    in_flight.answer(verdict.outcome, verdict.account);
    response(verdict.reply)
}

/// Query and form together, as the gateway takes them. What is no form has no parameters, and so no signature.
async fn params(request: Request) -> Vec<(String, String)> {
    let query = Query::<Vec<(String, String)>>::try_from_uri(request.uri());
    let mut params = query.map_or_else(|_| Vec::new(), |Query(params)| params);
    if request.method() == Method::POST
        && let Ok(Form(form)) = request.extract::<Form<Vec<(String, String)>>, _>().await
    {
        params.extend(form);
    }
    params
}

fn response(reply: Reply) -> Response {
    match reply {
        Reply::Http { status, content_type, body } => {
            let mut response = Response::new(Body::from(body));
            *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
            response
        }
        // A body that fails before its first byte: the server drops the connection with the head unsent.
        Reply::Cut => Response::new(Body::from_stream(futures::stream::once(async {
            Err::<Bytes, io::Error>(io::ErrorKind::ConnectionAborted.into())
        }))),
    }
}
