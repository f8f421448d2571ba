//! `weir enqueue`: writes the lines of a file to Kafka as requests, and with --wait follows them to their outcomes.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufReader, Read},
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use futures::{StreamExt, stream::FuturesUnordered};
use tokio::{sync::mpsc, task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    arguments::{age, duration, known_source, parameter},
    exit::{Ended, Exit},
    outlast,
    terminal::{Progress, Rate, agree, counted, grouped, note, say},
    watch::{self, Expected, Sent},
};
use crate::{
    config::Config,
    enqueue::{Chunk, Order, Summary, feed, feed::Few},
    kafka::{Producer, WriteError, admin},
    message::{BatchId, Lane, MaxAge, SourceName},
    runtime::clock::{Clock, Dice, Timestamp},
    topics::Topics,
};

pub(super) const LONG_ABOUT: &str = "\
Request the items of a file.

One id per line, or a request as a JSON object: {\"item\": \"610947572360\", \"params\": {\"webSite\": \"1688\"}}. \
Blank lines \
and lines that begin with # are skipped. An invalid line is reported with its number and does not stop the rest; the \
exit code is then 1. Duplicate ids are requested once.

The ids of one command are a batch. A request's id is BATCH/ITEM, so enqueueing a file again under the same --batch \
requests each item again (a call each, unless the source has a cache: see --max-age), but counts each request once; \
without --batch the name contains the time, and it is a new batch.

With --express they go ahead of the backlog: while both wait, express requests get up to the source's express_share of \
the calls (default: half), and the backlog slows down meanwhile.

The end of the batch can be waited for (--wait), looked up (`weir batches`), or published to a webhook or a topic: see \
[batches] in the configuration.";

pub(super) const EXAMPLES: &str = "\
Examples:
  weir enqueue ids.txt --source ali1688 --wait             # and watch until each id has its outcome
  cut -d, -f1 export.csv | weir enqueue - --source ali1688 --batch monday
  weir enqueue ids.txt --source ali1688 --param webSite=1688 --expires-in 2h
  weir enqueue urgent.txt --source ali1688 --express --wait  # ahead of the backlog";

/// How many chunks may be on their way to the brokers at once.
const IN_FLIGHT: usize = 4;

/// `weir enqueue`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The file; `-` is standard input.
    file: PathBuf,
    /// The name of a [[source]].
    #[arg(long, value_name = "NAME")]
    source: SourceName,
    /// The name of the batch; by default the file's name and the time.
    #[arg(long, value_name = "NAME")]
    batch: Option<BatchId>,
    /// Show the progress until each request has its outcome.
    #[arg(long)]
    wait: bool,
    /// A parameter of the vendor's API for every request.
    #[arg(long, value_name = "NAME=VALUE", value_parser = parameter)]
    param: Vec<(String, String)>,
    /// Express: ahead of the backlog, which slows down meanwhile.
    #[arg(long)]
    express: bool,
    /// Make no calls after this time; the remaining requests end as dead letters.
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    expires_in: Option<Duration>,
    /// The most that a cached answer may be old; 0: always call.
    #[arg(long, value_name = "DURATION", value_parser = age)]
    max_age: Option<Duration>,
}

pub(super) async fn run(args: Args, config: &Config, stop: &CancellationToken) -> anyhow::Result<Exit> {
    let (clock, dice) = (Clock::System, Dice::random());
    let order = order(&args, config, &clock)?;
    let input = Input::open(&args.file)?;
    check_topic(config, &order.topic).await?;
    let producer = Producer::new(&config.kafka)?;
    let (chunks, inbox) = mpsc::channel(2);
    let name = if args.file.as_os_str() == "-" { "standard input".into() } else { args.file.to_string_lossy() };
    let reading = read(input, &name, order.clone(), (clock, dice), chunks, stop.clone());
    let mut sender = Sender::new(producer, args.file.as_path());
    let sent = sender.drain(inbox, stop).await;
    sender.progress.clear();
    let (records, batch) = (sender.sent.count(), &order.batch);
    if let Err(error) = sent {
        let (sent, were) = (counted(records, "request"), agree(records, "was", "were"));
        return Err(error).context(format!("{sent} of batch {batch} {were} sent before that"));
    }
    if stop.is_cancelled() {
        // The reader may wait for a line that never comes: it ends with the process.
        say(&stopped(records, batch))?;
        return Ok(Exit::Interrupted);
    }
    let summary = reading.await??;
    report(&summary, &order, sender.started.elapsed())?;
    if let Some(warning) = outlast::warning(known_source(config, &args.source)?, config).await {
        note(&format!("Mind: {warning}"));
    }
    let exit = if summary.wrong.count == 0 { Exit::Done } else { Exit::Failed };
    if !args.wait || records == 0 {
        return Ok(exit);
    }
    let sent = Expected { topic: order.topic.to_string(), sent: sender.sent };
    let watched = watch::run(config, batch, Some(sent), stop).await?;
    Ok(if watched == Exit::Done { exit } else { watched })
}

fn order(args: &Args, config: &Config, clock: &Clock) -> anyhow::Result<Order> {
    let source = known_source(config, &args.source)?;
    let now = clock.now();
    let lane = if args.express { Lane::Express } else { Lane::Bulk };
    Ok(Order {
        source: source.common.name.clone(),
        topic: Topics::new(config.topics.clone()).requests_by(&source.common.name, lane).into(),
        batch: args.batch.clone().map_or_else(|| default_batch(&args.file, now), Ok)?,
        params: args.param.iter().cloned().collect::<BTreeMap<_, _>>(),
        expires_at: args.expires_in.map(|by| now.after(by)),
        max_age: args.max_age.map(MaxAge),
    })
}

/// The file's name and the time: `ids-20261121-093015`.
fn default_batch(file: &Path, now: Timestamp) -> anyhow::Result<BatchId> {
    let stem = file.file_stem().and_then(|stem| stem.to_str()).filter(|stem| *stem != "-").unwrap_or("stdin");
    let name: String = stem.chars().map(|c| if c.is_whitespace() || c.is_control() { '-' } else { c }).collect();
    let name = name.chars().scan(0, |length, c| {
        *length += c.len_utf8();
        (*length <= 100).then_some(c)
    });
    let at = jiff::Timestamp::from_millisecond(now.as_millis()).unwrap_or_default();
    Ok(BatchId::new(format!("{}-{}", name.collect::<String>(), at.strftime("%Y%m%d-%H%M%S")))?)
}

async fn check_topic(config: &Config, topic: &str) -> anyhow::Result<()> {
    if admin::describe(&config.kafka).await?.contains_key(topic) {
        return Ok(());
    }
    Err(Ended::failed(format!("there is no topic {topic}. Run `weir topics apply`")).into())
}

/// A file or standard input.
struct Input(Box<dyn Read + Send>);

impl Input {
    fn open(path: &Path) -> anyhow::Result<Self> {
        if path.as_os_str() == "-" {
            return Ok(Self(Box::new(std::io::stdin())));
        }
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        if file.metadata().is_ok_and(|data| data.is_dir()) {
            return Err(Ended::usage(format!("{} is a directory, not a file of ids", path.display())).into());
        }
        Ok(Self(Box::new(file)))
    }
}

/// Reads on a thread of its own: files and standard input block.
fn read(
    input: Input,
    from: &str,
    order: Order,
    (clock, dice): (Clock, Dice),
    chunks: mpsc::Sender<Chunk>,
    stop: CancellationToken,
) -> JoinHandle<anyhow::Result<Summary>> {
    let from = from.to_owned();
    tokio::task::spawn_blocking(move || {
        let input = BufReader::with_capacity(1 << 18, input.0);
        let deliver = |chunk| {
            if stop.is_cancelled() || chunks.blocking_send(chunk).is_err() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        };
        feed(input, &order, &clock, &dice, deliver).with_context(|| format!("reading the ids of {from}"))
    })
}

/// Sends chunks as they come, some at once.
struct Sender {
    producer: Producer,
    progress: Progress,
    rate: Rate,
    started: Instant,
    /// Bytes of the input, if it is a file.
    size: Option<u64>,
    read: u64,
    sent: Sent,
}

impl Sender {
    fn new(producer: Producer, file: &Path) -> Self {
        let size = file.metadata().ok().filter(std::fs::Metadata::is_file).map(|data| data.len());
        let (progress, rate, started) = (Progress::new(), Rate::default(), Instant::now());
        Self { producer, progress, rate, started, size, read: 0, sent: Sent::default() }
    }

    /// Until the input has ended, or `stop`: then what is on its way is waited for.
    async fn drain(&mut self, mut inbox: mpsc::Receiver<Chunk>, stop: &CancellationToken) -> Result<(), WriteError> {
        let mut sends = FuturesUnordered::new();
        let mut open = true;
        loop {
            tokio::select! {
                biased;
                Some(done) = sends.next(), if !sends.is_empty() => {
                    let places: Vec<(i32, i64)> = done?;
                    self.sent.add(&places);
                    self.show();
                }
                () = stop.cancelled(), if open => open = false,
                chunk = inbox.recv(), if open && sends.len() < IN_FLIGHT => match chunk {
                    None => open = false,
                    Some(Chunk { records, bytes }) => {
                        self.read = bytes;
                        let producer = self.producer.clone();
                        sends.push(async move { producer.place(records).await });
                    }
                },
                else => return Ok(()),
            }
        }
    }

    #[allow(clippy::cast_precision_loss, reason = "a share for people")]
    fn show(&mut self) {
        let rate = self.rate.add(Instant::now(), self.sent.count());
        let (sent, read) = (self.sent.count(), self.read);
        let share = self.size.filter(|size| *size > 0).map(|size| read as f64 / size as f64);
        self.progress.show(share, || {
            let left = share.filter(|share| *share > 0.0).map(|share| sent as f64 * (1.0 / share - 1.0));
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an estimate for people")]
            let left = left.map(|left| left as u64);
            format!("{} sent{}", grouped(sent), Rate::words(rate, left))
        });
    }
}

fn stopped(records: u64, batch: &BatchId) -> String {
    if records == 0 {
        return "Stopped before anything was sent".to_owned();
    }
    let (sent, were) = (counted(records, "request"), agree(records, "was", "were"));
    format!(
        "Stopped: {sent} of batch {batch} {were} sent and will be processed. To send all lines, run this again with \
         --batch {batch}: requests already sent are called for again, but counted once"
    )
}

fn report(summary: &Summary, order: &Order, took: Duration) -> std::io::Result<()> {
    named("line", "not sent", &summary.wrong, |wrong| format!("line {}: {}", wrong.line, wrong.why));
    named("line", "duplicates, sent once", &summary.duplicates, |(line, item)| {
        format!("line {line}: {item} is on an earlier line")
    });
    let (requests, seconds) = (counted(summary.requests, "request"), took.as_secs_f64());
    say(&format!("Sent {requests} to {} in {seconds:.1} s as batch {}", order.topic, order.batch))
}

/// Says how many there were and names the first of them.
fn named<T>(what: &str, verdict: &str, few: &Few<T>, words: impl Fn(&T) -> String) {
    if few.count == 0 {
        return;
    }
    note(&format!("{} {verdict}:", counted(few.count, what)));
    for one in &few.first {
        note(&format!("  {}", words(one)));
    }
    let more = few.count - few.first.len() as u64;
    if more > 0 {
        note(&format!("  and {} more", grouped(more)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_without_a_name_is_named_after_the_file_and_the_time() {
        let at = Timestamp::from_millis(1_700_000_000_000);
        let name = |path: &str| default_batch(Path::new(path), at).unwrap().as_str().to_owned();
        assert_eq!(name("/data/my ids.txt"), "my-ids-20231114-221320");
        assert_eq!(name("-"), "stdin-20231114-221320");
        assert!(name(&"长".repeat(80)).starts_with("长长"));
    }

    #[test]
    fn a_parameter_has_a_name() {
        assert_eq!(parameter("zip=1=2"), Ok(("zip".to_owned(), "1=2".to_owned())));
        assert!(parameter("=1").is_err() && parameter("zip").is_err());
    }
}
