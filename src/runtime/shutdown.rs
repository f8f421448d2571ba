//! SIGINT, SIGTERM and SIGHUP → one token that every role watches; a second signal ends the process at once.

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
    /// Begins to watch; from now on none of these signals ends the process by itself. SIGHUP counts unless whoever started
    /// the process ignores it (`nohup`).
    ///
    /// # Errors
    /// If the operating system allows no signal handler.
    pub fn watch() -> io::Result<Self> {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = if ignores_hangup() { None } else { Some(signal(SignalKind::hangup())?) };
        let stop = CancellationToken::new();
        let token = stop.clone();
        let mut watch = JoinSet::new();
        watch.spawn(async move {
            tokio::select! {
                () = either(&mut interrupt, &mut terminate) => {
                    tracing::info!("stopping; a second signal ends the process at once");
                }
                () = hung_up(&mut hangup) => tracing::warn!(
                    "stopping on SIGHUP (the terminal was closed, or a reload was asked for). A changed configuration \
                     takes a restart; `nohup` or a supervisor keeps weir running without a terminal"
                ),
            }
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

async fn hung_up(hangup: &mut Option<Signal>) {
    match hangup {
        Some(hangup) => drop(hangup.recv().await),
        None => std::future::pending().await,
    }
}

/// Whether SIGHUP was set to be ignored before this process began. Where `/proc` does not tell, it was not.
fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // Bit 0 is signal 1, SIGHUP.
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 == 1)
}
