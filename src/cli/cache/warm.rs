//! `weir cache warm`: answers that are stored, from a file or from ClickHouse, without a call.

use std::{
    io::{BufRead, BufReader},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::Context;

use super::{Exit, cache_of, known_source, written};
use crate::{
    cache::{Answer, Cache, SourceCache},
    cli::{
        exit::Ended,
        terminal::{grouped, note, say},
    },
    config::Config,
    message::{Observation, Request, SourceName},
    platform::Vendor,
    runtime::clock::Clock,
    sink::{Store, hottest::Hot},
};

/// Written in one go: what waits for Redis is bounded.
const CHUNK: usize = 2_000;

/// How far back items are counted.
const SINCE: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// `weir cache warm`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The source.
    source: SourceName,
    /// Results as JSON, one on each line; without it ClickHouse is asked.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// How many items of ClickHouse, the most asked for first.
    #[arg(long, value_name = "COUNT", default_value_t = 10_000, conflicts_with = "file")]
    items: u64,
}

/// Fills the cache, and counts.
struct Warmer {
    whole: Cache,
    cache: SourceCache,
    vendor: Arc<dyn Vendor>,
    filled: u64,
    too_old: u64,
    left_out: u64,
}

impl Warmer {
    async fn add(&mut self, hot: Hot) -> anyhow::Result<()> {
        // As they are read today, not as they were when the row was written.
        let columns = hot.raw.as_ref().and_then(|raw| self.vendor.columns(raw)).unwrap_or(hot.columns);
        let Some(key) = self.cache.key(&Request::new(hot.item)) else {
            self.left_out += 1;
            return Ok(());
        };
        let fingerprint = columns.fingerprint(hot.status);
        let answer = Answer { status: hot.status, columns, fingerprint, raw: hot.raw };
        if self.cache.warm(&key, answer, hot.fetched_at) {
            self.filled += 1;
        } else {
            self.too_old += 1;
        }
        if self.filled.is_multiple_of(CHUNK as u64) { written(&self.whole).await } else { Ok(()) }
    }
}

pub(super) async fn run(args: &Args, config: &Config) -> anyhow::Result<Exit> {
    let (whole, cache) = cache_of(config, &args.source).await?;
    let vendor = known_source(config, &args.source)?.vendor()?;
    let mut warmer = Warmer { whole, cache, vendor, filled: 0, too_old: 0, left_out: 0 };
    match &args.file {
        Some(path) => from_file(&mut warmer, path, &args.source).await?,
        None => from_clickhouse(&mut warmer, args, config).await?,
    }
    written(&warmer.whole).await?;
    let Warmer { filled, too_old, left_out, .. } = warmer;
    say(&format!("Filled the cache with {} answers of {}, without a call", grouped(filled), args.source))?;
    if too_old > 0 {
        note(&format!("{} were too old to count: [source.cache] kept", grouped(too_old)));
    }
    if left_out > 0 {
        note(&format!("{} were left out: of another source, or not found anywhere", grouped(left_out)));
    }
    Ok(Exit::Done)
}

async fn from_file(warmer: &mut Warmer, path: &PathBuf, source: &SourceName) -> anyhow::Result<()> {
    let file = std::fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    for (number, line) in BufReader::new(file).lines().enumerate() {
        let line = line.with_context(|| format!("cannot read {}", path.display()))?;
        if line.trim().is_empty() {
            continue;
        }
        let seen: Observation = serde_json::from_str(&line)
            .map_err(|error| Ended::failed(format!("{} line {} is no result: {error}", path.display(), number + 1)))?;
        if seen.source != *source {
            warmer.left_out += 1;
            continue;
        }
        let Observation { item, fetched_at, status, columns, raw, .. } = seen;
        warmer.add(Hot { item, fetched_at, status, columns, raw }).await?;
    }
    Ok(())
}

async fn from_clickhouse(warmer: &mut Warmer, args: &Args, config: &Config) -> anyhow::Result<()> {
    let store = Store::connect(&config.clickhouse)?;
    let now = Clock::System.now();
    let rules = warmer.cache.rules();
    let oldest = rules.kept + rules.jitter;
    let mut rows = store.hottest(&args.source, (now, SINCE, oldest), args.items)?;
    while let Some(hot) = rows.next().await? {
        warmer.add(hot).await?;
    }
    Ok(())
}
