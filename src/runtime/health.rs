//! `/health`, `/ready` and `/metrics`: whether the process lives, what each of its roles waits for, and what it counts.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::{
    http_client,
    listener::{self, Patience},
    metrics::{self, METRICS},
};

/// `[http]`: where health and metrics are asked for. Nothing for the world: it says what the process works on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address and port, or `"off"`.
    #[serde(serialize_with = "write_listen", deserialize_with = "read_listen")]
    pub listen: Option<SocketAddr>,
}

impl Default for Config {
    fn default() -> Self {
        Self { listen: Some(SocketAddr::from(([127, 0, 0, 1], 8080))) }
    }
}

#[allow(clippy::ref_option, reason = "serde's signature")]
fn write_listen<S: Serializer>(listen: &Option<SocketAddr>, serializer: S) -> Result<S::Ok, S::Error> {
    match listen {
        Some(address) => serializer.collect_str(address),
        None => serializer.serialize_str("off"),
    }
}

fn read_listen<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text == "off" {
        return Ok(None);
    }
    let allowed = r#"an address and a port such as "127.0.0.1:8080" or "[::]:8080", or "off""#;
    text.parse().map(Some).map_err(|_| de::Error::invalid_value(de::Unexpected::Str(&text), &allowed))
}

/// Reads an address that there may be none of, but that cannot be `"off"`.
///
/// # Errors
/// The deserializer's, with what was found and what is allowed.
pub fn read_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let allowed = r#"an address and a port such as "0.0.0.0:8081" or "[::]:8081""#;
    text.parse().map(Some).map_err(|_| de::Error::invalid_value(de::Unexpected::Str(&text), &allowed))
}

/// What the roles of this process are doing. Clones share one state.
#[derive(Clone, Debug, Default)]
pub struct Health(Arc<Mutex<BTreeMap<String, Condition>>>);

/// The condition of one role.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// Whether it is at work.
    pub ready: bool,
    /// What it waits for, if it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What `/ready` answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Whether every role is; false as long as there is none.
    pub ready: bool,
    /// Each role, by name.
    pub roles: BTreeMap<String, Condition>,
}

/// With this a role says how it is.
#[derive(Clone, Debug)]
pub struct RoleHealth {
    health: Health,
    name: String,
}

impl Health {
    /// Adds a role, not ready until it says so. The name is the role and what it works on: `fetch/ali1688`.
    #[must_use]
    pub fn role(&self, name: impl Into<String>) -> RoleHealth {
        let role = RoleHealth { health: self.clone(), name: name.into() };
        role.not_ready("starting");
        role
    }

    /// The condition of all roles.
    #[must_use]
    pub fn report(&self) -> Report {
        let roles = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Report { ready: !roles.is_empty() && roles.values().all(|role| role.ready), roles }
    }
}

impl RoleHealth {
    /// What the role is called, with what it works on.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The role is at work.
    pub fn ready(&self) {
        self.set(Condition { ready: true, reason: None });
    }

    /// The role cannot work; `reason` says what it waits for.
    pub fn not_ready(&self, reason: impl Into<String>) {
        self.set(Condition { ready: false, reason: Some(reason.into()) });
    }

    fn set(&self, condition: Condition) {
        let mut roles = self.health.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Roles repeat themselves; only a change is worth a line in the log.
        if roles.get(&self.name) != Some(&condition) {
            match &condition.reason {
                None => tracing::info!(role = self.name, "ready"),
                Some(reason) => tracing::info!(role = self.name, reason, "not ready"),
            }
            METRICS.role(&self.name, condition.ready);
            roles.insert(self.name.clone(), condition);
        }
    }
}

/// The three paths.
pub fn router(health: Health) -> Router {
    Router::new()
        .route("/health", get(alive))
        .route("/ready", get(ready))
        .route("/metrics", get(counts))
        .with_state(health)
}

/// Whether the process lives, and nothing else: for whoever spreads the world's requests over processes.
pub fn liveness() -> Router {
    Router::new().route("/health", get(alive))
}

async fn alive() -> &'static str {
    "ok\n"
}

async fn counts() -> impl IntoResponse {
    ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], METRICS.text())
}

async fn ready(State(health): State<Health>) -> (StatusCode, Json<Report>) {
    let report = health.report();
    let status = if report.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(report))
}

/// Takes the address of `what`, such as `/health`, which `key` of the configuration names. Apart from [`serve`], so that an
/// address in use stops the process before its roles begin.
///
/// # Errors
/// The operating system's, with the address and what to do.
pub async fn bind(listen: SocketAddr, what: &str, key: &str) -> io::Result<TcpListener> {
    TcpListener::bind(listen).await.map_err(|error| {
        let message = format!("cannot listen on {listen} for {what}: {error}; set {key} to a free address");
        io::Error::new(error.kind(), message)
    })
}

/// Answers at these paths until `stop`: see [`listener::serve`].
pub async fn serve(listener: TcpListener, router: Router, stop: CancellationToken) {
    listener::serve(listener, router, stop, Patience::default()).await;
}

/// The longest answer that [`ask`] reads, in bytes.
const ANSWER_LIMIT: usize = 1024 * 1024;

/// What the process that listens there says of its roles. Waits as long as that process does: give it a time-out.
///
/// # Errors
/// Nobody listens, or it is not weir.
pub async fn ask(listen: SocketAddr) -> io::Result<Report> {
    let client = http_client::builder().no_proxy().build().map_err(io::Error::other)?;
    let mut answer = client.get(format!("http://{listen}/ready")).send().await.map_err(io::Error::other)?;
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await.map_err(io::Error::other)? {
        body.extend_from_slice(&chunk);
        if body.len() > ANSWER_LIMIT {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
    }
    serde_json::from_slice(&body).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_a_process_says_of_its_roles_can_be_asked_for() {
        let health = Health::default();
        health.role("sink").not_ready("rows wait");
        let listener = bind(SocketAddr::from(([127, 0, 0, 1], 0)), "/ready", "[http] listen").await.unwrap();
        let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
        let answering = serve(listener, router(health.clone()), stop.clone());
        let asked = async {
            let report = ask(address).await.unwrap();
            stop.cancel();
            report
        };
        let ((), report) = tokio::join!(answering, asked);
        assert_eq!(report, health.report());
        assert!(ask(address).await.is_err(), "nobody is there any more");
    }

    #[test]
    fn a_process_without_roles_is_not_ready() {
        assert!(!Health::default().report().ready);
    }

    #[test]
    fn one_role_that_waits_makes_the_process_not_ready_and_says_why() {
        let health = Health::default();
        let (fetch, sink) = (health.role("fetch/ali1688"), health.role("sink"));
        fetch.ready();
        assert_eq!(health.report().roles["sink"].reason.as_deref(), Some("starting"));
        sink.not_ready("waiting for ClickHouse at http://127.0.0.1:8123");
        let report = serde_json::to_string(&health.report()).unwrap();
        assert_eq!(
            report,
            r#"{"ready":false,"roles":{"fetch/ali1688":{"ready":true},"sink":{"ready":false,"reason":"waiting for ClickHouse at http://127.0.0.1:8123"}}}"#
        );
        sink.ready();
        assert!(health.report().ready);
    }

    #[tokio::test]
    async fn the_status_follows_the_report() {
        let health = Health::default();
        let role = health.role("sink");
        assert_eq!(ready(State(health.clone())).await.0, StatusCode::SERVICE_UNAVAILABLE);
        role.ready();
        assert_eq!(ready(State(health)).await.0, StatusCode::OK);
    }
}
