//! How many files and connections this process may have open at once (`ulimit -n`), beside what it is configured for.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The limit, after the soft one has been raised to the hard one; `None`: there is none.
///
/// The soft limit that most systems begin with is for programs that cannot stand a large one; it is theirs to raise.
#[must_use]
pub fn raised() -> Option<u64> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // Where that is forbidden the soft limit stays.
    let raised = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).is_ok();
    if raised { maximum } else { current }
}

/// How many `calls` at once may want, each a connection of its own, with the `clients` of Kafka, ClickHouse and Redis of a
/// process.
#[must_use]
pub const fn wanted(calls: u64, clients: u64) -> u64 {
    /// Logs, listeners, pipes, libraries.
    const BESIDES: u64 = 32;
    /// Connections of one client: brokers, and those to be.
    const OF_CLIENT: u64 = 8;
    calls + clients * OF_CLIENT + BESIDES
}

/// What is wrong with a limit for so many, and what to do, if anything is.
#[must_use]
pub fn problem(allowed: Option<u64>, wanted: u64) -> Option<String> {
    let allowed = allowed.filter(|allowed| *allowed < wanted)?;
    Some(format!(
        "this process may have {allowed} files and connections open (ulimit -n), and is configured for up to {wanted}: \
         raise the limit (LimitNOFILE of a systemd unit) or lower fetch.calls_in_flight_in_all; calls that find none left \
         wait"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_below_what_is_configured_is_told_with_both_figures() {
        assert_eq!(wanted(1_000, 4), 1_064);
        assert_eq!((problem(None, 1_064), problem(Some(1_064), 1_064)), (None, None));
        let problem = problem(Some(75), 1_064).unwrap();
        assert!(problem.contains("75 files") && problem.contains("up to 1064"), "{problem}");
    }
}
