//! `weir batches` and `weir batch`: progress of batches, their items, and cancelling one.

use std::time::Duration;

use bytes::Bytes;
use clap::Subcommand;
use serde_json::Value;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::{
    exit::{Ended, Exit},
    status::{rows, section},
    terminal::{note, say},
    watch,
};
use crate::{
    config::Config,
    kafka::{Outgoing, Producer, admin},
    message::{
        BatchId, Cancellation,
        codec::{self, Encoded},
        envelope::{Envelope, Kind},
    },
    runtime::clock::{Clock, Timestamp},
    store::{
        query::{Format, query},
        quoting::quoted,
    },
    topics::Topics,
};

pub(super) const LIST_ABOUT: &str = "\
List batches and their progress. Queries ClickHouse only, so it works from any machine.

To be notified of a batch's end instead of polling: a webhook (WEIR_BATCHES__WEBHOOK) or the topic weir.batches \
([batches] topic = true), written by a process with the sink role.";

pub(super) const LIST_EXAMPLES: &str = "\
Examples:
  weir batches                        # unfinished ones first, then the latest
  weir batches --json --limit 1000 | jq 'select(.dead > 0)'";

pub(super) const ONE_ABOUT: &str = "\
Show one batch: its progress or its items; or cancel it.

Each request is counted once: requested = found + absent + off_shelf + dead + under_way. One that was enqueued again \
or redriven is under way until its new outcome.";

pub(super) const ONE_EXAMPLES: &str = "\
Examples:
  weir batch monday
  weir batch monday --follow                  # until each request has its outcome
  weir batch monday items --status dead       # also waiting, under_way, found, absent, off_shelf
  weir batch monday items --format CSVWithNames > monday.csv
  weir batch monday cancel                    # end what has not been called for yet";

/// For how long `--follow` waits for a batch that ClickHouse does not know, and how often it asks.
const APPEARS: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(300);

const COLUMNS: &[&str] = &[
    "batch",
    "requested",
    "found",
    "absent",
    "off_shelf",
    "dead",
    "under_way",
    "retried",
    "first_at",
    "last_at",
    "per_second",
];

const SELECT: &str = "SELECT batch, requested, found, absent, off_shelf, dead, under_way, retried, \
    toString(toDateTime(first_at)) AS first_at, toString(toDateTime(last_at)) AS last_at, \
    round((requested - under_way) / greatest(dateDiff('millisecond', batches.first_at, batches.last_at) / 1000, 0.001), 1) \
    AS per_second FROM batches";

/// `weir batches`
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    /// The most to show.
    #[arg(long, value_name = "COUNT", default_value_t = 20)]
    limit: u32,
    /// One JSON object per line.
    #[arg(long)]
    json: bool,
}

/// `weir batch`
#[derive(Debug, clap::Args)]
pub struct OneArgs {
    /// Its name.
    batch: BatchId,
    /// Show the progress until each request has its outcome.
    #[arg(long)]
    follow: bool,
    #[command(subcommand)]
    action: Option<Action>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// The status of each request.
    Items {
        /// Only these: waiting, `under_way`, found, absent, `off_shelf` or dead.
        #[arg(long, value_name = "STATUS", value_parser = ["waiting", "under_way", "found", "absent", "off_shelf", "dead"])]
        status: Option<String>,
        /// A ClickHouse output format.
        #[arg(long, value_name = "FORMAT", default_value = "TSV")]
        format: String,
    },
    /// Cancel requests that have not been called for yet: they end as dead letters of reason cancelled.
    ///
    /// Calls in flight finish. Requests that wait for a retry end when it is due. Requests enqueued later under the
    /// same name are called for.
    Cancel,
}

pub(super) async fn list(args: &ListArgs, config: &Config) -> anyhow::Result<Exit> {
    let sql = format!("{SELECT} ORDER BY under_way > 0 DESC, batches.last_at DESC LIMIT {}", args.limit);
    let found = rows(config, &sql).await?;
    if args.json {
        found.iter().try_for_each(|row| say(&row.to_string()))?;
    } else {
        section("Batches", COLUMNS, &found, "none yet; start one with: weir enqueue FILE --source NAME")?;
    }
    Ok(Exit::Done)
}

pub(super) async fn one(args: OneArgs, config: &Config, stop: &CancellationToken) -> anyhow::Result<Exit> {
    match args.action {
        Some(Action::Items { status, format }) => items(&args.batch, status, format, config).await,
        Some(Action::Cancel) => cancel(&args.batch, config, Clock::System.now()).await,
        None if args.follow => {
            tokio::select! {
                known = appears(&args.batch, config) => known?,
                () = stop.cancelled() => return Ok(Exit::Interrupted),
            }
            watch::run(config, &args.batch, None, stop).await
        }
        None => {
            let found = progress(&args.batch, config).await?.ok_or_else(|| unknown(&args.batch))?;
            section(&format!("Batch {}", args.batch), &COLUMNS[1..], &[found], "")?;
            Ok(Exit::Done)
        }
    }
}

/// The row of the batch; `None` if there is none.
async fn progress(batch: &BatchId, config: &Config) -> anyhow::Result<Option<Value>> {
    Ok(rows(config, &format!("{SELECT} WHERE batch = {}", quoted(batch.as_str()))).await?.into_iter().next())
}

fn unknown(batch: &BatchId) -> Ended {
    Ended::failed(format!("ClickHouse has no batch {batch} (yet): `weir batches` lists the known ones"))
}

/// Waits a little for a batch that has just been enqueued: the sink stores its requests within seconds.
async fn appears(batch: &BatchId, config: &Config) -> anyhow::Result<()> {
    let since = Instant::now();
    while progress(batch, config).await?.is_none() {
        if since.elapsed() > APPEARS {
            return Err(unknown(batch).into());
        }
        sleep(POLL).await;
    }
    Ok(())
}

async fn items(batch: &BatchId, status: Option<String>, format: String, config: &Config) -> anyhow::Result<Exit> {
    let only = status.map(|status| format!(" AND status = '{status}'")).unwrap_or_default();
    let sql = format!(
        "SELECT source, item, status, changed_at, request_id FROM item_status WHERE batch = {}{only} ORDER BY source, item",
        quoted(batch.as_str())
    );
    query(&config.clickhouse, &sql, &Format::Named(format), &mut tokio::io::stdout()).await?;
    Ok(Exit::Done)
}

async fn cancel(batch: &BatchId, config: &Config, now: Timestamp) -> anyhow::Result<Exit> {
    let topic = Topics::new(config.topics.clone()).control();
    if !admin::describe(&config.kafka).await?.contains_key(&topic) {
        return Err(Ended::failed(format!("there is no topic {topic}. Run `weir topics apply`")).into());
    }
    let cancellation = Cancellation { batch: batch.clone(), cancelled_at: now };
    let key = cancellation.key();
    let envelope = Envelope { kind: Kind::Cancellation, id: &key, writer: "weir/batch", time: now, traceparent: None };
    let Encoded { headers, value } = codec::encode(&envelope, &cancellation);
    let key = Some(Bytes::copy_from_slice(key.as_bytes()));
    Producer::new(&config.kafka)?.send(vec![Outgoing { topic: topic.into(), key, value, headers }]).await?;
    say(&format!(
        "Cancelled {batch}: requests enqueued up to {now} and not called for yet end as dead letters (reason \
         cancelled). Watch it with: weir batch {batch} --follow"
    ))?;
    // It holds also while ClickHouse is away, or the sink behind: so this can only be a warning.
    if let Ok(None) = progress(batch, config).await {
        note(&format!("Is the name right? {}", unknown(batch)));
    }
    Ok(Exit::Done)
}
