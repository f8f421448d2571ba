//! Two sources in one process: one of them goes away, and comes back.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rdkafka::Message as _;
use weir::{
    message::{Observation, SourceName, Via},
    simulate,
};

use crate::{
    Options,
    log::{self, Follower},
    process::{Bench, Process, Simulator},
    table::{Figure, Goal, Table},
};

/// 40 accounts of 10/s.
const PACE: u64 = 400;
const SIMULATOR: &str = "--accounts 40 --latency 50ms --absent 0 --off-shelf 0 --throttled 0 --failing 0 --broken 0 \
    --hopeless 0";

/// How long calls are counted.
const WINDOW: Duration = Duration::from_secs(20);

/// How long the breaker stays open, and how long an outage needs to be felt.
const OPEN: Duration = Duration::from_secs(2);

/// Recovered is who makes nine tenths of the calls that the pace allows, for so long.
const STEADY: Duration = Duration::from_millis(500);

fn source(name: &str, simulator: &Simulator) -> String {
    format!(
        "[[source]]\nname = {name:?}\nkind = \"ali1688\"\nurl = {:?}\naccounts_file = \"{name}.toml\"\n\
         limit = {{ calls = 10, per = \"1s\", burst = 1 }}\nbreaker = {{ open = \"{}ms\" }}\n",
        simulator.url,
        OPEN.as_millis()
    )
}

async fn order(bench: &Bench, simulator: &Simulator, mode: &str) -> Result<()> {
    let reply = bench.http.post(format!("{}/chaos", simulator.url)).body(format!("{{\"mode\":\"{mode}\"}}"));
    let status = reply.send().await?.status();
    ensure!(status.is_success(), "the simulator's /chaos: {status}");
    Ok(())
}

/// Calls a second that a vendor has answered from now on.
async fn rate(bench: &Bench, simulator: &Simulator, window: Duration) -> Result<f64> {
    let (since, before) = (Instant::now(), simulator.stats(&bench.http).await?.served);
    tokio::time::sleep(window).await;
    let after = simulator.stats(&bench.http).await?.served;
    Ok((after - before) as f64 / since.elapsed().as_secs_f64())
}

/// From the first answer of a source after `since` (milliseconds of the day's clock) until it is called at full pace.
fn recovery(outcomes: &Follower, source: &str, since: i64, fetch: &mut Process) -> Result<f64> {
    let (mut answered, mut begun, asked) = (Vec::new(), None::<Instant>, Instant::now());
    // Until there is more than the two windows that it takes to tell.
    while begun.is_none_or(|begun| begun.elapsed() < 4 * STEADY) {
        fetch.check()?;
        ensure!(begun.is_some() || asked.elapsed() < log::PATIENCE, "{source} is not called any more");
        outcomes.read_for(STEADY, |message| {
            let Ok(seen) = serde_json::from_slice::<Observation>(message.payload().unwrap_or_default()) else { return };
            let at = seen.fetched_at.as_millis();
            if at > since && seen.source.as_str() == source && seen.via == Via::Call {
                begun.get_or_insert_with(Instant::now);
                answered.push(at);
            }
        })?;
    }
    answered.sort_unstable();
    let enough = 0.9 * PACE as f64 * STEADY.as_secs_f64();
    let full = |at: &i64| {
        let end = at + i64::try_from(STEADY.as_millis()).unwrap_or(i64::MAX);
        answered.iter().filter(|other| (*at..end).contains(other)).count() as f64 >= enough
    };
    let first = answered.first().copied().unwrap_or_default();
    let recovered = answered.iter().copied().find(full);
    Ok(recovered.map_or(f64::INFINITY, |at| (at - first) as f64 / 1_000.0))
}

pub async fn measure(bench: &Bench, options: &Options, table: &mut Table) -> Result<()> {
    let window = options.lasting(WINDOW);
    println!("Outage: two sources of {PACE} calls/s in one process, windows of {window:?}");
    let names = ["steady", "troubled"].map(SourceName::new);
    let names: Vec<SourceName> = names.into_iter().collect::<Result<_, _>>()?;
    let own = bench.topics_of("outage", &names, 8).await?;
    let [steady, troubled] = [bench.simulator_of("steady", SIMULATOR)?, bench.simulator_of("troubled", SIMULATOR)?];
    // More than are called for meanwhile.
    let count = usize::try_from((10 + 6 * window.as_secs()) * PACE)?;
    for (seed, name) in (7..).zip(&names) {
        log::produce_ids(&bench.kafka.brokers, &own.topics.requests(name), simulate::sample(seed).take(count))?;
    }
    let mut fetch = bench.fetch_from(&own, &(source("steady", &steady) + &source("troubled", &troubled)))?;
    fetch.says("fetching").await?;
    tokio::time::sleep(Duration::from_secs(3)).await;

    let quiet = [rate(bench, &steady, window).await?, rate(bench, &steady, window).await?];
    order(bench, &troubled, "outage").await?;
    let away = rate(bench, &steady, window).await?;
    fetch.says("breaker opened").await?;
    let outcomes = Follower::of(&bench.kafka, &[own.topics.results()]).await?;
    let healed_at = weir::runtime::clock::Clock::System.now().as_millis();
    order(bench, &troubled, "off").await?;
    let recovered = recovery(&outcomes, "troubled", healed_at, &mut fetch)?;
    // Nobody answers for half a minute: calls time out.
    order(bench, &troubled, "slow").await?;
    let hangs = rate(bench, &steady, window).await?;
    order(bench, &troubled, "off").await?;
    fetch.check()?;

    let change = |rate: f64| 100.0 * (rate / quiet[1] - 1.0).abs();
    let noise = 100.0 * (quiet[1] / quiet[0] - 1.0).abs();
    let (unit, goal) = ("%", Goal::AtMost(2.0));
    let what = "a steady source, another one away";
    table.add(Figure { what, unit, goal, value: Some(change(away)), floor: Some(noise) });
    let what = "  the same, another one hangs";
    table.add(Figure { what, unit, goal, value: Some(change(hangs)), floor: Some(noise) });
    let what = "  its calls a second; the floor: its pace";
    table.add(Figure { what, unit: "/s", goal: Goal::None, value: Some(away), floor: Some(PACE as f64) });
    let what = "full pace after the first good probe";
    table.add(Figure { what, unit: "s", goal: Goal::AtMost(1.0), value: Some(recovered), floor: None });
    own.delete().await
}
