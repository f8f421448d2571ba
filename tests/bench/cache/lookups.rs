//! How long a look takes, in memory and in Redis.

use std::{
    fmt::Write as _,
    time::{Duration, Instant},
};

use anyhow::Result;
use tokio::task::JoinSet;
use weir::{
    cache::{self, Answer, Cache, Key, Looked, Seen, SourceCache},
    message::{Columns, ItemId, Request, Status},
    platform::SourceConfig,
    runtime::clock::{Clock, Dice},
};

use crate::{
    Options,
    table::{Figure, Goal, Table},
};

/// Items of a reply as long as a usual one of 1688's.
const ITEMS: usize = 2_000;
const RAW_BYTES: usize = 12_000;

/// How many look into Redis at once.
const AT_ONCE: usize = 16;

fn open(redis: &str, prefix: &str) -> Result<SourceCache> {
    let config = cache::Config { prefix: prefix.to_owned(), ..Default::default() };
    let source = serde_json::json!({"name": "ali1688", "kind": "ali1688", "cache": {"preset": "1688"}});
    let source: SourceConfig = serde_json::from_value(source)?;
    let cache = Cache::open(&config, Some(redis))?.source(&source, &Clock::System, &Dice::random());
    cache.ok_or_else(|| anyhow::anyhow!("the source has a cache"))
}

fn requests() -> Result<Vec<Request>> {
    (0..ITEMS).map(|number| Ok(Request::new(ItemId::new((610_000_000_000 + number as u64).to_string())?))).collect()
}

/// Some JSON that does not repeat itself more than a product does.
fn answer(seed: usize) -> Result<Answer> {
    let dice = Dice::seeded(seed as u64);
    let mut raw = String::from("{\"productInfo\":{\"attributes\":[");
    while raw.len() < RAW_BYTES {
        let separator = if raw.ends_with('[') { "" } else { "," };
        let (id, value) = (dice.bits() % 100_000, dice.bits() % 10_000);
        write!(raw, "{separator}{{\"attributeID\":{id},\"attributeName\":\"材质\",\"value\":\"{value}\"}}")?;
    }
    raw += "]}}";
    let columns = Columns { title: Some("cup".to_owned()), price: Some("9.90".to_owned()), ..Columns::default() };
    let raw = Some(serde_json::value::RawValue::from_string(raw)?);
    Ok(Answer { status: Status::Found, fingerprint: columns.fingerprint(Status::Found), columns, raw })
}

pub async fn measure(options: &Options, table: &mut Table) -> Result<()> {
    println!("Looks: {ITEMS} items of {RAW_BYTES} bytes");
    let prefix = format!("bench-{}", std::process::id());
    let (filled, requests) = (open(&options.redis, &prefix)?, requests()?);
    filled.connected(Duration::from_secs(10)).await;
    for (number, request) in requests.iter().enumerate() {
        let key = filled.key(request).ok_or_else(|| anyhow::anyhow!("a key"))?;
        let _ = filled.keep(&key, answer(number)?, Clock::System.now(), Duration::from_millis(200), false);
    }
    near(&filled, &requests, options.scaled(2_000_000), table);
    // Another process, whose memory is empty: each of its looks goes to Redis.
    let empty = open(&options.redis, &prefix)?;
    empty.connected(Duration::from_secs(10)).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    far(&empty, &requests, options.scaled(100_000), table).await
}

fn near(cache: &SourceCache, requests: &[Request], count: usize, table: &mut Table) {
    let (since, mut hits) = (Instant::now(), 0_usize);
    for number in 0..count {
        let request = &requests[number.wrapping_mul(7_919) % requests.len()];
        let key = cache.key(request);
        hits += usize::from(key.is_some_and(|key| matches!(cache.near(&key, None), Seen::Hit(_))));
    }
    let each = since.elapsed().as_secs_f64() * 1e6 / count as f64;
    let (what, goal) = ("a hit in memory, key and all", Goal::AtMost(2.0));
    table.add(Figure { what, unit: "µs", goal, value: Some(each), floor: None });
    let share = hits as f64 * 100.0 / count as f64;
    let (what, goal) = ("  hits among these looks", Goal::AtLeast(100.0));
    table.add(Figure { what, unit: "%", goal, value: Some(share), floor: None });
}

/// Looks in Redis, `AT_ONCE` at a time; memory is not looked into.
async fn far(cache: &SourceCache, requests: &[Request], count: usize, table: &mut Table) -> Result<()> {
    let keys: Vec<Key> = requests.iter().filter_map(|request| cache.key(request)).collect();
    let mut looking = JoinSet::new();
    for lane in 0..AT_ONCE {
        let (cache, keys) = (cache.clone(), keys.clone());
        looking.spawn(async move {
            let (mut took, mut misses) = (Vec::with_capacity(count / AT_ONCE), 0_usize);
            for number in 0..count / AT_ONCE {
                let key = &keys[(lane * 104_729 + number * 7_919) % keys.len()];
                let since = Instant::now();
                misses += usize::from(!matches!(
                    cache.far(key, None, (None, false), Duration::ZERO, &mut None).await,
                    Looked::Hit(_)
                ));
                took.push(since.elapsed());
            }
            (took, misses)
        });
    }
    let (mut took, mut misses) = (Vec::new(), 0);
    while let Some(lane) = looking.join_next().await {
        let (times, without) = lane?;
        took.extend(times);
        misses += without;
    }
    took.sort_unstable();
    let at = |share: f64| {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
        let index = ((took.len() - 1) as f64 * share) as usize;
        took[index].as_secs_f64() * 1e3
    };
    table.add(Figure { what: "a hit in Redis, p50", unit: "ms", goal: Goal::None, value: Some(at(0.5)), floor: None });
    let (what, goal) = ("a hit in Redis, p99, 16 at once", Goal::AtMost(2.0));
    table.add(Figure { what, unit: "ms", goal, value: Some(at(0.99)), floor: None });
    let (what, goal) = ("  misses among them", Goal::AtMost(0.0));
    table.add(Figure { what, unit: "", goal, value: Some(misses as f64), floor: None });
    Ok(())
}
