//! SIGINT and SIGTERM → one token that every role watches; a second signal ends the process at once.

use std::io;

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

/// The exit code of a process that was told twice to stop: 128 + SIGINT.
pub const INTERRUPTED: u8 = 130;

/// Watches for signals as long as it lives.
#[derive(Debug)]
pub struct Signals {
    stop: CancellationToken,
    // Dropping the set ends the watch.
    _watch: JoinSet<()>,
}

impl Signals {
    /// Begins to watch; from now on neither signal ends the process by itself.
    ///
    /// # Errors
    /// If the operating system allows no signal handler.
    pub fn watch() -> io::Result<Self> {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let stop = CancellationToken::new();
        let token = stop.clone();
        let mut watch = JoinSet::new();
        watch.spawn(async move {
            either(&mut interrupt, &mut terminate).await;
            tracing::info!("stopping; a second signal ends the process at once");
            token.cancel();
            either(&mut interrupt, &mut terminate).await;
            // What is under way is lost to this process but not to Kafka: the next one begins at the last commit.
            std::process::exit(i32::from(INTERRUPTED));
        });
        Ok(Self { stop, _watch: watch })
    }

    /// The token that the first signal cancels.
    #[must_use]
    pub fn stop(&self) -> CancellationToken {
        self.stop.clone()
    }
}

async fn either(interrupt: &mut Signal, terminate: &mut Signal) {
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}
