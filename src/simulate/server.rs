//! The gateways over HTTP/1.1: arrival times, latency, cut connections, and `/stats`.

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use axum::{
    Json, RequestExt, Router,
    body::{Body, Bytes},
    extract::{ConnectInfo, DefaultBodyLimit, Form, Path, Query, Request, State},
    http::{HeaderValue, Method, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{any, get, post},
    serve::ListenerExt,
};
use secrecy::ExposeSecret;
use tokio::{net::TcpListener, task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    Latency, Options, SideOptions, SimulateError, accounts,
    addresses::Addresses,
    aop::Gateway,
    articles::Article,
    catalogue::Catalogue,
    chaos::{Chaos, Order, OrderError, Strike},
    dice::{Question, roll},
    gate::{Call, Front, Reply, Verdict},
    gates::Gates,
    limiter::Quota,
    resellers::Reseller,
    side::{Setting, Side},
    stats::{Outcome, Report, Stats},
    top::Top,
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
    router: Article,
    item_get: Article,
    top: Top,
    reseller: Reseller,
    onebound: Reseller,
    /// All of them: 1688's, Taobao's, the resellers'.
    accounts: Vec<Account>,
    chaos: Chaos,
    gates: Gates,
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
    // Whoever has credentials of the one has none of the other.
    let taobao = accounts::generate_as("tb", options.seed ^ 0x7a0b_a000, options.taobao.accounts)?;
    let keys = accounts::generate_as("key", options.seed ^ 0x7e5e_11e5, options.reseller.accounts)?;
    // Before listening: whoever sees the port open finds the files.
    write(options.accounts_file.as_ref(), &accounts)?;
    write(options.taobao.accounts_file.as_ref(), &taobao)?;
    write(options.reseller.accounts_file.as_ref(), &keys)?;
    let refused = |source| SimulateError::Listen { address: options.listen, source };
    let listener = TcpListener::bind(options.listen).await.map_err(refused)?;
    let address = listener.local_addr().map_err(refused)?;

    let world = Arc::new(World::new(&options, [accounts, taobao, keys], &clock));
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

    /// Taobao's accounts.
    pub fn taobao_accounts(&self) -> &[Account] {
        self.world.top.accounts()
    }

    /// The keys of its resellers.
    pub fn reseller_keys(&self) -> &[Account] {
        &self.world.reseller.side.accounts
    }

    /// Makes an outage, or ends one; says of which gateways.
    ///
    /// # Errors
    /// [`OrderError`] if the order makes no sense.
    pub fn order(&self, order: &Order) -> Result<Vec<&'static str>, OrderError> {
        self.world.chaos.order(order, self.world.started.elapsed())
    }

    /// What it has counted.
    pub fn stats(&self) -> Report {
        self.world.report()
    }

    /// The user of this account withdraws the authorisation; false if there is no such account.
    pub fn revoke(&self, alias: &str) -> bool {
        self.world.revoke(alias)
    }

    /// Every secret that there is or was: none of them may turn up in a log.
    pub fn secrets(&self) -> Vec<String> {
        self.world.secrets()
    }

    /// Sets the counts to zero. What the world remembers of troubled items and quotas stays.
    pub fn reset(&self) {
        self.world.reset();
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
    /// `accounts`: 1688's, Taobao's and the resellers'.
    fn new(options: &Options, [ali, taobao, keys]: [Vec<Account>; 3], clock: &Clock) -> Self {
        let Options { quota, tokens, drift, seed, .. } = *options;
        let catalogue = Catalogue { seed, shares: options.shares };
        let setting = Setting { catalogue, drift, clock: clock.clone() };
        let side = |front, accounts, quotas, ban| Side::new(front, accounts, quotas, ban, setting.clone());
        let quotas = |side: &SideOptions| [side.quota, side.api_quota];
        let (taobao_from, keys_from) = (ali.len(), ali.len() + taobao.len());
        let accounts = [&ali[..], &taobao, &keys].concat();
        let reseller =
            |front| Reseller { side: side(front, (keys_from, keys.clone()), quotas(&options.reseller), None) };
        let article = |front, ban| Article { side: side(front, (0, ali.clone()), [quota, Quota::None], ban) };
        let top = side(Front::Taobao, (taobao_from, taobao), quotas(&options.taobao), Some([1, 2]));
        Self {
            stats: Stats::new(accounts.len()),
            router: article(Front::Router, None),
            item_get: article(Front::ItemGet, Some([2, 5])),
            top: Top::new(top, tokens),
            reseller: reseller(Front::Reseller),
            onebound: reseller(Front::OneBound),
            gateway: Gateway::new(ali, quota, tokens, catalogue, drift, clock.clone()),
            accounts,
            chaos: Chaos::default(),
            gates: Gates::default(),
            addresses: Addresses::new(options.address_quota),
            latency: options.latency,
            seed,
            started: Instant::now(),
        }
    }

    fn judge(&self, front: Front, call: &Call<'_>) -> Verdict {
        match front {
            Front::Ali1688 => self.gateway.judge(call),
            Front::Router => self.router.judge(call),
            Front::ItemGet => self.item_get.judge(call),
            Front::Taobao => self.top.judge(call),
            Front::Reseller => self.reseller.judge(call),
            Front::OneBound => self.onebound.judge(call),
        }
    }

    /// The vendor's own words for "my service is away".
    fn unavailable(&self, front: Front, serial: u64) -> Reply {
        match front {
            Front::Ali1688 => self.gateway.unavailable(serial),
            Front::Router | Front::ItemGet => Article::unavailable(),
            Front::Taobao => self.top.unavailable(serial),
            Front::Reseller => self.reseller.unavailable(),
            Front::OneBound => self.onebound.unavailable(),
        }
    }

    /// What an outage on command makes of a verdict, and how much later the reply comes.
    fn struck(&self, front: Front, verdict: Verdict) -> (Verdict, Duration) {
        let strike = self.chaos.strike(front, self.seed, verdict.serial, self.started.elapsed());
        let reply = match strike.filter(|_| verdict.takes_time()) {
            None => return (verdict, Duration::ZERO),
            Some(Strike::Late(delay)) => return (verdict, delay),
            Some(Strike::BadGateway) => Reply::bad_gateway(),
            Some(Strike::Cut) => Reply::Cut,
            Some(Strike::Error) => self.unavailable(front, verdict.serial),
        };
        (Verdict { outcome: Outcome::InjectedFailure, reply, ..verdict }, Duration::ZERO)
    }

    fn revoke(&self, alias: &str) -> bool {
        self.gateway.revoke(alias) || self.top.revoke(alias)
    }

    fn secrets(&self) -> Vec<String> {
        let of = |account: &Account| {
            let tokens = [account.access_token.clone(), account.refresh_token.clone()];
            tokens.into_iter().flatten().chain([account.app_secret.clone()]).collect::<Vec<_>>()
        };
        let others = self.accounts.iter().skip(self.gateway.accounts().len()).flat_map(of);
        let others = others.map(|secret| secret.expose_secret().to_owned());
        self.gateway.secrets().into_iter().chain(others).chain(self.top.sessions()).collect()
    }

    fn reset(&self) {
        self.stats.reset(self.started.elapsed());
        self.addresses.reset();
        self.gates.reset();
    }

    fn report(&self) -> Report {
        let alias = |index: usize| self.accounts[index].alias.to_string();
        let report = self.stats.report(self.started.elapsed(), alias);
        Report { addresses: self.addresses.report(alias), gateways: self.gates.report(), ..report }
    }
}

fn write(path: Option<&PathBuf>, accounts: &[Account]) -> Result<(), SimulateError> {
    let Some(path) = path else { return Ok(()) };
    accounts::write(path, accounts).map_err(|source| SimulateError::AccountsFile { path: path.clone(), source })
}

async fn serve(listener: TcpListener, router: Router, stop: CancellationToken) -> io::Result<()> {
    let listener = listener.tap_io(|socket| {
        // Without it a reply may wait 40 ms for the client's acknowledgement. A socket that refuses is closing.
        let _ = socket.set_nodelay(true);
    });
    let service = router.into_make_service_with_connect_info::<SocketAddr>();
    let served = axum::serve(listener, service).with_graceful_shutdown(stop.clone().cancelled_owned());
    tokio::select! {
        served = served => served,
        // Half a request, or a client that does not go, is not waited for.
        () = async {
            stop.cancelled().await;
            tokio::time::sleep(DRAIN).await;
        } => Ok(()),
    }
}

/// How long calls under way may still take at the stop.
const DRAIN: std::time::Duration = std::time::Duration::from_secs(5);

fn router(world: Arc<World>) -> Router {
    Router::new()
        .route("/openapi/{*path}", any(call))
        .route("/router/json", any(call))
        .route("/router/rest", any(call))
        .route("/ibrad/taobao/item_get/", any(call))
        .route("/taobao/item_get/", any(call))
        .route("/chaos", post(chaos))
        .route("/stats", get(|State(world): State<Arc<World>>| async move { Json(world.report()) }))
        .route("/reset", post(reset))
        .route("/revoke/{alias}", post(revoke))
        .route("/oauth/authorize", get(authorise))
        .route("/healthz", get(|| async { "ok\n" }))
        .layer(DefaultBodyLimit::max(FORM_LIMIT))
        .with_state(world)
}

async fn reset(State(world): State<Arc<World>>) -> StatusCode {
    world.reset();
    StatusCode::NO_CONTENT
}

async fn revoke(State(world): State<Arc<World>>, Path(alias): Path<String>) -> StatusCode {
    if world.revoke(&alias) { StatusCode::NO_CONTENT } else { StatusCode::NOT_FOUND }
}

/// Whatever content type it comes with: curl sends a form's.
async fn chaos(State(world): State<Arc<World>>, order: Bytes) -> Response {
    let told = match serde_json::from_slice::<Order>(&order) {
        Ok(order) => world.chaos.order(&order, world.started.elapsed()).map_err(|error| error.to_string()),
        Err(error) => Err(format!("the order is no JSON of the expected form: {error}")),
    };
    match told {
        Ok(gateways) => Json(serde_json::json!({"gateways": gateways})).into_response(),
        Err(why) => (StatusCode::BAD_REQUEST, format!("{why}\n")).into_response(),
    }
}

/// The page where a user authorises the app, and does so at once.
async fn authorise(State(world): State<Arc<World>>, Query(params): Query<Vec<(String, String)>>) -> Response {
    let back = world.gateway.authorise_page(&params, world.started.elapsed());
    match back.and_then(|back| HeaderValue::from_str(&back).ok()) {
        Some(back) => (StatusCode::FOUND, [(header::LOCATION, back)]).into_response(),
        None => (StatusCode::BAD_REQUEST, "the link is not one of an app that is known here\n").into_response(),
    }
}

/// One call to one of the gateways.
async fn call(
    State(world): State<Arc<World>>,
    ConnectInfo(from): ConnectInfo<SocketAddr>,
    request: Request,
) -> Response {
    // The head has just been read: this is the arrival that the quota is judged by, whatever follows.
    let arrived = world.started.elapsed();
    let path = request.uri().path().to_owned();
    let Some(front) = Front::of_path(&path) else { return StatusCode::NOT_FOUND.into_response() };
    if request.method() != Method::GET && request.method() != Method::POST {
        return StatusCode::METHOD_NOT_ALLOWED.into_response();
    }
    let in_flight = world.stats.arrive(arrived);
    let params = params(request).await;
    let is_address_within = world.addresses.admit(from.ip(), arrived);
    let path = path.strip_prefix("/openapi/").unwrap_or_default();
    let verdict = world.judge(front, &Call { path, params: &params, arrived, is_address_within });
    world.addresses.count(from.ip(), verdict.account);
    verdict.items.iter().for_each(|item| world.stats.asked_for(*item));
    let (verdict, delay) = world.struck(front, verdict);
    if verdict.takes_time() {
        let latency = delay + world.latency.pick(roll(world.seed, Question::Latency, verdict.serial));
        if !latency.is_zero() {
            tokio::time::sleep(latency).await;
        }
    }
    world.gates.count(front, &verdict);
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
