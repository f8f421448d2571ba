//! A vendor that goes away and comes back, on the real broker: calls stop, nothing is lost, no attempt is spent in vain.

use std::time::Duration;

use weir::{
    breaker::BreakerConfig,
    runtime::clock::Clock,
    simulate::{self, Latency, Options, Shares},
};

use crate::{
    fetch::{Rig, quick_retries},
    stack::{Follower, eventually, produce},
};

fn options() -> Options {
    Options {
        accounts: 20,
        latency: Latency { from: Duration::from_millis(5), to: Duration::from_millis(40) },
        shares: Shares::NONE,
        ..Options::default()
    }
}

/// The codes of the failures so far.
fn codes(failures: &mut Follower) -> Vec<String> {
    failures.read().iter().map(|record| record.json()["attempt"]["code"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_stops_the_calls_express_requests_hear_of_it_and_all_end_when_it_heals() {
    let mut rig = Rig::new("breaker", options()).await;
    rig.breaker = BreakerConfig { open: Duration::from_secs(2), ..BreakerConfig::default() };
    let ids: Vec<String> = simulate::sample(31).take(2_000).map(|id| id.to_string()).collect();
    rig.request(ids[..1_900].iter().cloned()).await;
    let (fetch, retry) = (rig.fetch().await, rig.retry(quick_retries()).await);
    let mut results = Follower::of(&[rig.topics.results()]).await;
    results.read_until(200).await;

    let address = rig.simulator.address();
    let away = Options { listen: address, ..options() };
    std::mem::replace(&mut rig.simulator, simulate::start(options(), Clock::System).await.unwrap())
        .stop()
        .await
        .unwrap();
    produce(&rig.topics.express(&rig.source), ids[1_900..].iter().cloned()).await;
    let mut failures = Follower::of(&[rig.topics.failures()]).await;
    // Each of them hears of it while nobody calls, and again after the probes of the next round have failed.
    let held = |codes: &[String]| codes.iter().filter(|code| *code == "weir.held.breaker").count();
    eventually("express requests are put off twice", async || (held(&codes(&mut failures)) >= 150).then_some(())).await;
    let done = results.read().len();
    assert!(done < 1_900, "there is still a backlog");

    rig.simulator = simulate::start(away, Clock::System).await.unwrap();
    let ends = rig.ends(ids.len()).await;
    rig.stop.cancel();
    fetch.await.unwrap().unwrap();
    retry.await.unwrap().unwrap();
    assert!(ends.len() == ids.len() && ends.values().all(|ends| ends == &["found"]), "{ends:?}");

    let codes = codes(&mut failures);
    let called = codes.len() - held(&codes);
    // What was under way when it went, the row that opened the breaker, and a few probes: not the backlog.
    assert!(called < 80, "{called} calls failed");
    let of_backlog = failures.seen.iter().filter(|record| {
        let json = record.json();
        json["attempt"]["code"] == "weir.held.breaker" && json["lane"] != "express"
    });
    assert_eq!(of_backlog.count(), 0, "the backlog waits where it is");
    for record in &results.seen {
        assert!(record.json()["calls"].as_u64().is_some_and(|calls| calls >= 1));
    }
    assert_eq!(rig.simulator.stats().violations, 0);
}
