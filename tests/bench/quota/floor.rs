//! What a lease cannot be quicker than on this machine: a bare PING from among the workers, and the script in Redis
//! alone.

use std::time::Duration;

use redis::aio::MultiplexedConnection;
use tokio::time::{Instant, MissedTickBehavior, interval};

/// How often Redis is asked for nothing: about as often as four workers lease.
const EVERY: Duration = Duration::from_millis(20);

/// What was seen beside a row's leases.
#[derive(Clone, Copy, Debug, Default)]
pub struct Floor {
    /// A bare PING, of 100 the slowest but one: what the machine, its threads and the way to Redis cost.
    pub ping_p99: Duration,
    /// The scripts, as Redis has measured them.
    pub script_p50: Duration,
    pub script_p99: Duration,
}

/// Its own connection in the workers' runtime.
pub struct Pings(MultiplexedConnection);

impl Pings {
    pub async fn connect(url: &str) -> Self {
        let client = redis::Client::open(url).unwrap();
        Self(client.get_multiplexed_async_connection().await.unwrap())
    }

    /// Asks for `span`; what the scripts have taken meanwhile is from the server's own statistics.
    pub async fn measure(mut self, span: Duration) -> Floor {
        redis::cmd("CONFIG").arg("RESETSTAT").exec_async(&mut self.0).await.unwrap();
        let (until, mut times, mut ticks) = (Instant::now() + span, Vec::new(), interval(EVERY));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while Instant::now() < until {
            ticks.tick().await;
            let asked = Instant::now();
            redis::cmd("PING").exec_async(&mut self.0).await.unwrap();
            times.push(asked.elapsed());
        }
        times.sort_unstable();
        let info: String = redis::cmd("INFO").arg("latencystats").query_async(&mut self.0).await.unwrap();
        let [script_p50, script_p99] = ["p50=", "p99="].map(|name| percentile(&info, name).unwrap_or_default());
        Floor { ping_p99: times[times.len() * 99 / 100], script_p50, script_p99 }
    }
}

/// Of a line such as `latency_percentiles_usec_evalsha:p50=942.079,p99=1035.687,p99.9=1756.647`.
fn percentile(info: &str, name: &str) -> Option<Duration> {
    let line = info.lines().find_map(|line| line.strip_prefix("latency_percentiles_usec_evalsha:"))?;
    let micros: f64 = line.trim().split(',').find_map(|part| part.strip_prefix(name))?.parse().ok()?;
    Some(Duration::from_secs_f64(micros / 1e6))
}
