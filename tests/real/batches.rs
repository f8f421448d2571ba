//! The ends of batches, posted to a webhook as a user's server gets them, and on their topic.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, StatusCode},
    routing::post,
};
use serde_json::Value;
use weir::{
    kafka::{
        Scan, client,
        scan::{self, Piece, Span},
    },
    message::{BatchEnd, codec},
    simulate::{self, Shares},
};

use crate::{
    replay::Scene,
    stack::{self, eventually},
};

/// Somebody's server: it takes posts or refuses them, and keeps what it was sent.
#[derive(Clone, Default)]
struct Hook {
    takes: Arc<AtomicBool>,
    /// Names of batches that it never takes begin so.
    never: &'static str,
    taken: Arc<Mutex<Vec<Value>>>,
    refused: Arc<Mutex<Vec<Value>>>,
}

impl Hook {
    /// Its address.
    async fn start(&self) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/s3cret-path", listener.local_addr().unwrap());
        let app = Router::new().route("/s3cret-path", post(receive)).with_state(self.clone());
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        url
    }

    fn taken(&self) -> Vec<Value> {
        self.taken.lock().unwrap().clone()
    }
}

async fn receive(State(hook): State<Hook>, headers: HeaderMap, Json(body): Json<Value>) -> StatusCode {
    let is_ours = headers.get("authorization").is_some_and(|value| value == "Bearer s3cret-key");
    let never = !hook.never.is_empty() && body["batch"].as_str().is_some_and(|batch| batch.starts_with(hook.never));
    if hook.takes.load(Ordering::SeqCst) && is_ours && !never {
        hook.taken.lock().unwrap().push(body);
        StatusCode::NO_CONTENT
    } else {
        hook.refused.lock().unwrap().push(body);
        StatusCode::SERVICE_UNAVAILABLE
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_a_batch_is_posted_until_it_is_taken_and_then_not_again() {
    let shares = Shares { absent: 0.2, ..Shares::NONE };
    let mut scene = Scene::new("batches", shares, Duration::ZERO, "[batches]\nsettle = \"1s\"\n").await;
    let process = scene.run();
    scene.collect("before", simulate::sample(20).take(10)).await;
    assert!(process.stop().await.success());

    let hook = Hook::default();
    let url = hook.start().await;
    scene.installation = scene.installation.with("", ("WEIR_BATCHES__WEBHOOK", &url));
    scene.installation = scene.installation.with("", ("WEIR_BATCHES__AUTHORIZATION", "Bearer s3cret-key"));
    // Two processes with a sink: one of them tells.
    let (process, second) = (scene.run(), scene.installation.start("second", &["sink"]));
    eventually("somebody tells from now on", async || {
        (scene.number("SELECT count() FROM batch_ends WHERE batch = ''").await > 0).then_some(())
    })
    .await;
    scene.collect("monday", simulate::sample(21).take(40)).await;
    eventually("a refused post is repeated", async || (hook.refused.lock().unwrap().len() >= 2).then_some(())).await;
    assert!(hook.refused.lock().unwrap().iter().all(|body| body["batch"] == "monday"), "not those of before");
    hook.takes.store(true, Ordering::SeqCst);
    let bodies = eventually("it is taken", async || Some(hook.taken()).filter(|taken| !taken.is_empty())).await;
    let body = &bodies[0];
    let counts = scene.installation.query("SELECT found, absent FROM batches WHERE batch = 'monday'").await.unwrap();
    assert_eq!(format!("{}\t{}\n", body["found"], body["absent"]), counts, "{body}");
    assert_eq!((&body["batch"], &body["requested"], &body["dead"]), (&"monday".into(), &40.into(), &0.into()));
    assert!(body["finished_at"].as_str().is_some_and(|at| at.ends_with('Z')), "{body}");
    let logs = process.log() + &second.log();
    assert!(logs.contains("503") && !logs.contains("s3cret"), "{logs}");

    // Whoever told has gone; another batch, and the same once more: each is told, and none of those before.
    assert!(process.stop().await.success() && second.stop().await.success());
    let process = scene.run();
    scene.collect("tuesday", simulate::sample(22).take(5)).await;
    scene.collect("monday", simulate::sample(23).take(7)).await;
    let told = eventually("both are told", async || Some(hook.taken()).filter(|taken| taken.len() >= 3)).await;
    let mut told: Vec<_> = told.iter().map(|body| (body["batch"].as_str().unwrap(), &body["requested"])).collect();
    told.sort_unstable_by_key(|(batch, requested)| (*batch, requested.as_u64()));
    assert_eq!(told, [("monday", &40.into()), ("monday", &47.into()), ("tuesday", &5.into())]);
    assert!(process.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_that_are_never_taken_do_not_keep_others_waiting() {
    let mut scene = Scene::new("refused", Shares::NONE, Duration::ZERO, "[batches]\nsettle = \"1s\"\n").await;
    let hook = Hook { never: "test", ..Hook::default() };
    hook.takes.store(true, Ordering::SeqCst);
    let url = hook.start().await;
    scene.installation = scene.installation.with("", ("WEIR_BATCHES__WEBHOOK", &url));
    scene.installation = scene.installation.with("", ("WEIR_BATCHES__AUTHORIZATION", "Bearer s3cret-key"));
    let process = scene.run();
    eventually("somebody tells from now on", async || {
        (scene.number("SELECT count() FROM batch_ends WHERE batch = ''").await > 0).then_some(())
    })
    .await;
    for number in 0..4 {
        scene.collect(&format!("test-{number}"), simulate::sample(40 + number).take(2)).await;
    }
    eventually("they are refused", async || (hook.refused.lock().unwrap().len() >= 4).then_some(())).await;
    scene.collect("monday", simulate::sample(50).take(3)).await;
    let told = eventually("it is told", async || hook.taken().first().cloned()).await;
    assert_eq!(told["batch"], "monday");
    assert!(process.stop().await.success());
}

/// All ends on the topic so far: key and value.
async fn ends(kafka: &client::Config, topic: &str) -> Vec<(String, BatchEnd)> {
    let spans = scan::bounds(kafka, &[topic.to_owned()]).await.unwrap();
    let spans: Vec<Span> = spans
        .into_iter()
        .filter(|bounds| bounds.end > bounds.low)
        .map(|bounds| Span { range: bounds.low..bounds.end, partition: bounds.partition })
        .collect();
    let mut ends = Vec::new();
    if spans.is_empty() {
        return ends;
    }
    let mut scan = Scan::open(kafka, spans).unwrap();
    while let Some(piece) = scan.next().await.unwrap() {
        let Piece::Records { partition, records } = piece else { continue };
        for record in records {
            let end = codec::read_batch_end(&record.raw(&partition)).unwrap();
            ends.push((String::from_utf8(record.key.unwrap().to_vec()).unwrap(), end));
        }
    }
    ends
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_a_batch_is_on_the_topic_once_also_while_the_webhook_takes_nothing() {
    let settings = "[batches]\nsettle = \"1s\"\ntopic = true\n";
    let mut scene = Scene::new("ends", Shares { absent: 0.2, ..Shares::NONE }, Duration::ZERO, settings).await;
    let hook = Hook::default();
    let url = hook.start().await;
    scene.installation = scene.installation.with("", ("WEIR_BATCHES__WEBHOOK", &url));
    let process = scene.run();
    eventually("somebody tells from now on", async || {
        (scene.number("SELECT count() FROM batch_ends WHERE batch = ''").await > 0).then_some(())
    })
    .await;
    scene.collect("monday", simulate::sample(24).take(12)).await;
    eventually("the webhook refuses again", async || (hook.refused.lock().unwrap().len() >= 2).then_some(())).await;

    let (kafka, topic) = (stack::kafka(), scene.topics.batches());
    let told = ends(&kafka, &topic).await;
    let [(key, end)] = &told[..] else { panic!("once, although the webhook was tried again: {told:?}") };
    assert_eq!((key.as_str(), end.batch.as_str(), end.requested), ("monday", "monday", 12));
    assert_eq!(end.found + end.absent + end.off_shelf + end.dead, 12);
    let refused = hook.refused.lock().unwrap()[0].clone();
    assert_eq!(serde_json::to_value(end).unwrap(), refused, "both are told the same");

    // The same name once more: its new end comes after the first.
    scene.collect("monday", simulate::sample(25).take(3)).await;
    let last = eventually("the new end is told", async || {
        ends(&kafka, &topic).await.pop().filter(|(_, end)| end.requested == 15)
    })
    .await;
    assert_eq!(last.0, "monday");
    assert!(process.stop().await.success());
}
