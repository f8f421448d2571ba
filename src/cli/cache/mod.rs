//! `weir cache`: show, drop, refresh and warm cached answers.

mod warm;

use std::{path::PathBuf, time::Duration};

use anyhow::Context;

use super::{
    arguments::{known_source, parameter},
    exit::{Ended, Exit},
    terminal::{agree, counted, note, say, spoken, table},
};
use crate::{
    cache::{Cache, Kept, Key, SourceCache},
    config::Config,
    message::{ItemId, Request, SourceName, price},
    run::desk,
    runtime::clock::{Clock, Dice, Timestamp},
    serve::Question,
};

/// How long Redis may take to be connected, or to take what is written.
const WITHIN: Duration = Duration::from_secs(5);

const WHICH: &str = "\
Examples:
  weir cache show ali1688 584051070147                # the cached answer and until when it is valid
  weir cache drop ali1688 584051070147 610947572360   # drop it, in Redis and in every process
  weir cache drop ali1688 --file changed.txt          # for each line
  weir cache refresh ali1688 584051070147             # drop it, and request the item again

These commands act on the answers in Redis. The memory caches of the processes follow within moments; one that is \
disconnected from Redis serves its own answers until they are no longer fresh ([source.cache] fresh).";

/// Given to Redis in one go: what waits for it is bounded.
const CHUNK: usize = 2_000;

const WARM: &str = "\
Fill the cache with stored answers, without calls.

Without --file: the items of the source that were requested most often in the last 7 days, with their newest answer in \
ClickHouse; its columns are parsed again from the vendor's JSON. With --file: results as JSON, one per line, as on the \
results topic; they are cached as answers to requests without parameters. Answers older than [source.cache] kept are \
skipped. So are ClickHouse's answers to requests with parameters, since the table does not hold the parameters.

Examples:
  weir cache warm ali1688                              # the 10,000 most requested
  weir cache warm ali1688 --items 500
  weir cache warm ali1688 --file results.jsonl         # from a file

Exit codes:
  0 filled, also if some were skipped
  1 a line of the file is not a result; the ones before it are in the cache
  64 no such source or file, or the source has no cache
  69 Redis or ClickHouse cannot be reached";

/// `weir cache`
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Show an item's cached answer and until when it is valid.
    #[command(after_long_help = WHICH)]
    Show(Which),
    /// Drop the cached answers of items, in every process.
    #[command(after_long_help = WHICH)]
    Drop(Which),
    /// Drop the cached answers of items, and request the items again.
    #[command(after_long_help = WHICH)]
    Refresh(Which),
    /// Fill the cache with stored answers.
    #[command(long_about = WARM)]
    Warm(warm::Args),
}

/// Which items.
#[derive(Debug, clap::Args)]
pub struct Which {
    /// The source.
    source: SourceName,
    /// The items.
    #[arg(required_unless_present = "file", value_parser = |text: &str| ItemId::new(text))]
    ids: Vec<ItemId>,
    /// A file of further items, one per line.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// A parameter of the request: each combination of parameters is cached separately.
    #[arg(long, value_name = "NAME=VALUE", value_parser = parameter)]
    param: Vec<(String, String)>,
}

pub(super) async fn run(command: &Command, config: &Config) -> anyhow::Result<Exit> {
    match command {
        Command::Show(which) => show(which, config).await,
        Command::Drop(which) => drop_all(which, config, false).await,
        Command::Refresh(which) => drop_all(which, config, true).await,
        Command::Warm(args) => warm::run(args, config).await,
    }
}

/// The cache of a source, connected to Redis.
async fn cache_of(config: &Config, name: &SourceName) -> anyhow::Result<(Cache, SourceCache)> {
    let source = known_source(config, name)?;
    if config.redis.url.is_none() || !config.cache.shared {
        let message = "the cache is only in the memory of each process: set redis.url (and cache.shared) to share it";
        return Err(Ended::usage(message).into());
    }
    let cache = config.open_cache()?;
    let of_source = cache.source(source, &Clock::System, &Dice::random()).ok_or_else(|| {
        Ended::usage(format!("source {name} has no cache: give it a [source.cache], as in the example file"))
    })?;
    of_source.connected(WITHIN).await;
    if !of_source.is_shared() {
        let message = "Redis does not answer. Is it running? Is redis.url right?".to_owned();
        return Err(Ended { exit: Exit::Unavailable, message }.into());
    }
    Ok((cache, of_source))
}

impl Which {
    fn items(&self) -> anyhow::Result<Vec<ItemId>> {
        let mut items = self.ids.clone();
        if let Some(file) = &self.file {
            let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
            for (number, line) in text.lines().enumerate() {
                let line = line.trim();
                if line.is_empty() || line.starts_with('#') {
                    continue;
                }
                let wrong = |error| Ended::usage(format!("{} line {}: {error}", file.display(), number + 1));
                items.push(ItemId::new(line).map_err(wrong)?);
            }
        }
        Ok(items)
    }

    fn request(&self, item: &ItemId) -> Request {
        Request { params: self.param.iter().cloned().collect(), ..Request::new(item.clone()) }
    }

    fn key(&self, cache: &SourceCache, item: &ItemId) -> anyhow::Result<Key> {
        let too_long = || Ended::usage(format!("{item}: answers to requests with parameters this long are not cached"));
        Ok(cache.key(&self.request(item)).ok_or_else(too_long)?)
    }
}

async fn show(which: &Which, config: &Config) -> anyhow::Result<Exit> {
    let (_cache, cache) = cache_of(config, &which.source).await?;
    let now = Clock::System.now();
    let (mut rows, mut missing) = (Vec::new(), 0);
    for item in which.items()? {
        let kept = cache.show(&which.key(&cache, &item)?).await?;
        missing += usize::from(kept.is_none());
        rows.push(row(&item, kept.as_ref(), now));
    }
    say(&table(&["item", "status", "price", "age", "fresh for", "valid for", "hits", "unchanged", "bytes"], &rows))?;
    Ok(if missing == 0 { Exit::Done } else { Exit::Failed })
}

fn row(item: &ItemId, kept: Option<&Kept>, now: Timestamp) -> Vec<String> {
    let Some(Kept { answer, ends, habit }) = kept else {
        return vec![item.to_string(), "not cached".to_owned()];
    };
    let left = |until: Timestamp| if until > now { spoken(until.since(now)) } else { "expired".to_owned() };
    vec![
        item.to_string(),
        answer.status.as_str().to_owned(),
        price::shown(answer.columns.price.as_deref(), answer.columns.price_text.as_deref())
            .unwrap_or_default()
            .to_owned(),
        spoken(now.since(ends.fetched_at)),
        left(ends.soft_at),
        left(ends.hard_at),
        habit.hits.to_string(),
        habit.steady.to_string(),
        answer.size().to_string(),
    ]
}

async fn drop_all(which: &Which, config: &Config, refresh: bool) -> anyhow::Result<Exit> {
    let (whole, cache) = cache_of(config, &which.source).await?;
    let items = which.items()?;
    for chunk in items.chunks(CHUNK) {
        for item in chunk {
            cache.drop_all(&which.key(&cache, item)?);
        }
        written(&whole).await?;
    }
    let (count, them) = (items.len() as u64, agree(items.len() as u64, "it", "them"));
    let count = counted(count, "item");
    if !refresh {
        say(&format!("Dropped the cached answers of {count} of {}", which.source))?;
        return Ok(Exit::Done);
    }
    let question = |item: &ItemId| Question {
        source: which.source.clone(),
        item: item.clone(),
        params: which.param.iter().cloned().collect(),
        max_age: Some(Duration::ZERO),
        wait: Duration::ZERO,
    };
    let questions: Vec<_> = items.iter().map(question).collect();
    desk(config, &whole, config.serve.waiting)?.send(&which.source, &questions).await?;
    say(&format!("Dropped the cached answers of {count} of {}, and requested {them} again", which.source))?;
    Ok(Exit::Done)
}

/// Waits until Redis has it all.
async fn written(cache: &Cache) -> anyhow::Result<()> {
    let lost = cache.far().map_or(0, crate::cache::Far::unwritten);
    let done = match cache.far() {
        Some(far) => far.flushed(WITHIN).await,
        None => true,
    };
    if done && lost == 0 {
        return Ok(());
    }
    note("some of it may not be written; it is safe to repeat");
    let message = "Redis did not accept all writes in time. Is it overloaded?".to_owned();
    Err(Ended { exit: Exit::Unavailable, message }.into())
}
