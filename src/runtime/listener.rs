//! Answers HTTP on a port until it is told to stop, and then ends, whatever clients do.
//!
//! axum's own server waits for every connection at its end, and for ever for the rest of a request's head: one client
//! that stops in the middle of a line would keep a process from ending.

use std::{io, pin::pin, time::Duration};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// How long clients may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// From the first byte of a request's head, or the end of the answer before, to the head's end.
    pub head: Duration,
    /// For requests under way, after the order to stop.
    pub drain: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { head: Duration::from_secs(30), drain: Duration::from_secs(5) }
    }
}

/// Answers by `router` until `stop`; then takes no more connections, ends those that are idle, and cuts those off that
/// take longer than [`Patience::drain`].
pub async fn serve(listener: TcpListener, router: Router, stop: CancellationToken, patience: Patience) {
    let mut connections = JoinSet::new();
    loop {
        let stream = tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            stream = accept(&listener) => stream,
        };
        connections.spawn(answer(stream, router.clone(), stop.clone(), patience.head));
    }
    drop(listener);
    let drained = timeout(patience.drain, async { while connections.join_next().await.is_some() {} }).await;
    if drained.is_err() {
        debug!(connections = connections.len(), "closed connections whose requests had not finished");
    }
}

async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            // The client has gone again.
            Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) => {
            }
            Err(error) => {
                warn!(%error, "cannot accept connections; trying again");
                sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn answer(stream: TcpStream, router: Router, stop: CancellationToken, head: Duration) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(head);
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        debug!(%error, "connection ended with an error");
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use axum::routing::get;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        time::Instant,
    };

    use super::*;

    /// A listener, where to reach it, and how to stop it.
    async fn started(patience: Patience) -> (SocketAddr, CancellationToken, JoinSet<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
        let slow = get(|| async {
            sleep(Duration::from_millis(300)).await;
            "answered"
        });
        let mut serving = JoinSet::new();
        serving.spawn(serve(listener, Router::new().route("/slow", slow), stop.clone(), patience));
        (address, stop, serving)
    }

    #[tokio::test]
    async fn half_a_request_does_not_keep_it_from_ending_and_a_whole_one_is_still_answered() {
        let (address, stop, mut serving) =
            started(Patience { drain: Duration::from_secs(2), ..Patience::default() }).await;
        let mut half = TcpStream::connect(address).await.unwrap();
        half.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        let mut whole = TcpStream::connect(address).await.unwrap();
        whole.write_all(b"GET /slow HTTP/1.1\r\nHost: weir\r\n\r\n").await.unwrap();
        sleep(Duration::from_millis(100)).await;
        let since = Instant::now();
        stop.cancel();
        let mut answer = String::new();
        whole.read_to_string(&mut answer).await.unwrap();
        assert!(answer.ends_with("answered"), "{answer}");
        serving.join_next().await.unwrap().unwrap();
        assert!(since.elapsed() < Duration::from_secs(20), "{:?}", since.elapsed());
        assert!(TcpStream::connect(address).await.is_err(), "nobody is there any more");
    }

    #[tokio::test]
    async fn a_head_that_never_ends_is_not_waited_for() {
        let head = Duration::from_millis(200);
        let (address, _stop, _serving) = started(Patience { head, ..Patience::default() }).await;
        let mut half = TcpStream::connect(address).await.unwrap();
        half.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        let ended = timeout(Duration::from_secs(20), half.read_to_end(&mut Vec::new())).await;
        assert!(ended.is_ok(), "the connection stays open");
    }
}
