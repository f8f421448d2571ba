//! `weir cache warm`: fills the cache from a file or from ClickHouse, without calls.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;

use super::{CHUNK, Exit, cache_of, known_source, written};
use crate::{
    cache::{Answer, Cache, SourceCache, Warmed},
    cli::{
        exit::Ended,
        terminal::{counted, note, say},
    },
    config::Config,
    message::{Observation, Request, SourceName},
    platform::Vendor,
    runtime::clock::Clock,
    store::{Store, hottest::Hot},
};

/// How far back items are counted.
const SINCE: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// `weir cache warm`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The source.
    source: SourceName,
    /// Results as JSON, one per line; without it they come from ClickHouse.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// How many items to take from ClickHouse, the most requested first.
    #[arg(long, value_name = "COUNT", default_value_t = 10_000, conflicts_with = "file",
        value_parser = clap::value_parser!(u64).range(1..))]
    items: u64,
}

/// Fills the cache, and counts.
struct Warmer {
    whole: Cache,
    cache: SourceCache,
    vendor: Arc<dyn Vendor>,
    filled: u64,
    again: u64,
    too_old: u64,
    /// Of another source.
    strange: u64,
    /// Their key would be too long.
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
        match self.cache.warm(&key, answer, hot.fetched_at) {
            Warmed::Filled => self.filled += 1,
            Warmed::Again => self.again += 1,
            Warmed::TooOld => {
                self.too_old += 1;
                return Ok(());
            }
        }
        let is_crowded = self.whole.far().is_some_and(crate::cache::Far::is_crowded);
        let is_full = is_crowded || (self.filled + self.again).is_multiple_of(CHUNK as u64);
        if is_full { written(&self.whole).await } else { Ok(()) }
    }

    fn report(&self, source: &SourceName) -> std::io::Result<()> {
        let answers = |count: u64| counted(count, "answer");
        say(&format!("Filled the cache with {} of {source}, without a call", answers(self.filled)))?;
        for (count, why) in [
            (self.again, "of an item that had one already: the newest is cached"),
            (self.too_old, "skipped: too old, see [source.cache] kept, absent and off_shelf"),
            (self.strange, "skipped: of another source"),
            (self.left_out, "skipped: the item's id is too long for the cache"),
        ] {
            if count > 0 {
                note(&format!("{} {why}", answers(count)));
            }
        }
        Ok(())
    }
}

pub(super) async fn run(args: &Args, config: &Config) -> anyhow::Result<Exit> {
    let vendor = known_source(config, &args.source)?.vendor()?;
    let file = args.file.as_deref().map(|path| Ok::<_, anyhow::Error>((path, open(path)?))).transpose()?;
    let (whole, cache) = cache_of(config, &args.source).await?;
    let mut warmer = Warmer { whole, cache, vendor, filled: 0, again: 0, too_old: 0, strange: 0, left_out: 0 };
    let read = match file {
        Some((path, file)) => from_file(&mut warmer, path, file, &args.source).await,
        None => from_clickhouse(&mut warmer, args, config).await,
    };
    written(&warmer.whole).await?;
    // What was read before it went wrong is in the cache.
    warmer.report(&args.source)?;
    read?;
    Ok(Exit::Done)
}

fn open(path: &Path) -> anyhow::Result<File> {
    let opened = File::open(path).and_then(|file| {
        let is_folder = file.metadata()?.is_dir();
        if is_folder { Err(std::io::ErrorKind::IsADirectory.into()) } else { Ok(file) }
    });
    opened.map_err(|error| Ended::usage(format!("cannot read {}: {error}", path.display())).into())
}

async fn from_file(warmer: &mut Warmer, path: &Path, file: File, source: &SourceName) -> anyhow::Result<()> {
    for (number, line) in BufReader::new(file).lines().enumerate() {
        let line = line.with_context(|| format!("cannot read {}", path.display()))?;
        if line.trim().is_empty() {
            continue;
        }
        let seen: Observation = serde_json::from_str(&line).map_err(|error| {
            // It counts the lines of what it was given, which was one.
            let what = error.to_string().replace(" at line 1 column", ", at column");
            Ended::failed(format!("{} line {} is no result: {what}", path.display(), number + 1))
        })?;
        if seen.source != *source {
            warmer.strange += 1;
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
