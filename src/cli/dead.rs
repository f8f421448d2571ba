//! `weir dead`: lists, shows and deletes dead letters.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, IsTerminal},
    process::ExitCode,
    time::Duration,
};

use clap::Subcommand;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{
    exit::{Ended, Exit},
    reading::read_each,
    replay,
    terminal::{agree, counted, grouped, note, say, table},
    until,
};
use crate::{
    config::Config,
    kafka::{
        Partition, Record, admin,
        scan::{self, Span},
    },
    message::{Attempt, BatchId, Class, DeadLetter, Reason, SourceName, codec},
    replay::when::time,
    runtime::clock::{Clock, Timestamp},
    topics::{Groups, Topics},
};

pub(super) const LIST_EXAMPLES: &str = "\
Examples:
  weir dead list                                       # the newest, and how many of each reason
  weir dead list --since 2d --reason exhausted --class outage
  weir dead list --batch monday --limit 100000 --json | jq -r .request.item

Dead letters are read from Kafka, which keeps them for [topics] keep_dead.";

pub(super) const SHOW_EXAMPLES: &str = "\
Examples:
  weir dead show 584051070147                          # by item
  weir dead show weir.requests.ali1688/3/42            # by the request's id
  weir dead show 584051070147 --json";

pub(super) const PURGE_EXAMPLES: &str = "\
Examples:
  weir dead purge --until 30d                          # older than thirty days
  weir dead purge --until 2026-11-01T00:00:00Z --yes   # without confirmation

Deleted dead letters are gone from Kafka: they can no longer be listed, shown or redriven. Kafka only deletes from the \
oldest on, so all of that time go, whatever their source or batch. The rows in ClickHouse stay: batches and counts do \
not change. Records of an open transaction and those that the sink has not stored yet are not deleted; their number is \
printed.";

/// `weir dead …`
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List dead letters, the newest first.
    #[command(after_long_help = LIST_EXAMPLES)]
    List {
        #[command(flatten)]
        filter: Filter,
        /// How many to show, the newest first; all are counted.
        #[arg(long, default_value_t = 20)]
        limit: usize,
        /// One JSON object a line.
        #[arg(long)]
        json: bool,
    },
    /// Show a dead letter with its history: each attempt, and why it was given up.
    #[command(after_long_help = SHOW_EXAMPLES)]
    Show {
        /// The item's id, or the request's.
        id: String,
        #[command(flatten)]
        filter: Filter,
        /// One JSON object a line.
        #[arg(long)]
        json: bool,
    },
    /// Send dead letters back to requests: the same as `weir redrive`.
    #[command(long_about = replay::REDRIVE_ABOUT, after_long_help = replay::REDRIVE_EXAMPLES)]
    Redrive(replay::RedriveArgs),
    /// Delete dead letters up to a time, permanently.
    #[command(after_long_help = PURGE_EXAMPLES)]
    Purge {
        /// Delete those written before this time: RFC 3339, a day, or how long ago (30d, 12h).
        #[arg(long, value_name = "TIME")]
        until: String,
        /// Do not ask for confirmation.
        #[arg(long)]
        yes: bool,
    },
}

/// Which dead letters.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Filter {
    /// Only of this source.
    #[arg(long)]
    source: Option<SourceName>,
    /// Only those whose last attempt failed with this class: throttled, outage, denied, malformed or bug.
    #[arg(long, value_parser = class)]
    class: Option<Class>,
    /// Only of this reason: exhausted, permanent, expired, invalid, …
    #[arg(long, value_parser = reason)]
    reason: Option<Reason>,
    /// Only of this batch.
    #[arg(long)]
    batch: Option<BatchId>,
    /// Only of this item.
    #[arg(long)]
    item: Option<String>,
    /// Only those written at or after this time: RFC 3339, a day, or how long ago (2d, 90m).
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Only those written before this time.
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
}

/// The words of records are those of the command line.
fn word<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(text.into()).map_err(|error| error.to_string())
}

fn class(text: &str) -> Result<Class, String> {
    word(text)
}

fn reason(text: &str) -> Result<Reason, String> {
    word(text)
}

impl Filter {
    fn takes(&self, letter: &DeadLetter) -> bool {
        let request = letter.request.as_ref();
        let last = request.and_then(|request| request.history.last()).map(|last| last.class);
        let batch = request.and_then(|request| request.batch.as_ref());
        self.source.as_ref().is_none_or(|source| letter.source == *source)
            && self.class.is_none_or(|class| last == Some(class))
            && self.reason.is_none_or(|reason| letter.reason == reason)
            && self.batch.as_ref().is_none_or(|own| batch == Some(own))
            && self.item.as_ref().is_none_or(|item| request.is_some_and(|request| request.item.as_str() == item))
    }
}

pub(super) async fn run(command: Command, config: &Config, stop: CancellationToken) -> anyhow::Result<ExitCode> {
    match command {
        Command::List { filter, limit, json } => until(stop, list(&filter, limit, json, config)).await,
        Command::Show { id, filter, json } => until(stop, show(&id, &filter, json, config)).await,
        Command::Redrive(args) => replay::redrive(args, config, &stop).await.map(Into::into),
        Command::Purge { until: edge, yes } => until(stop, purge(&edge, yes, config)).await,
    }
}

/// Hands each dead letter that the filter takes to `found`; how many could not be read.
async fn each(config: &Config, filter: &Filter, mut found: impl FnMut(DeadLetter)) -> anyhow::Result<u64> {
    let (spans, mut unreadable) = (spans(config, filter).await?, 0);
    let take = |partition: &Partition, record: &Record| match codec::read_dead_letter(&record.raw(partition)) {
        Ok(letter) if filter.takes(&letter) => found(letter),
        Ok(_) => {}
        Err(_) => unreadable += 1,
    };
    read_each(&config.kafka, spans, "dead letters", take).await?;
    if unreadable > 0 {
        let (records, are) =
            (counted(unreadable, "record"), agree(unreadable, "is no dead letter", "are no dead letters"));
        note(&format!("{records} on the topic {are} that this version of weir can read"));
    }
    Ok(unreadable)
}

/// Which offsets the filter's times leave.
async fn spans(config: &Config, filter: &Filter) -> anyhow::Result<Vec<Span>> {
    let (topics, now) = ([Topics::new(config.topics.clone()).dead()], Clock::System.now());
    let edge = async |text: &Option<String>| -> anyhow::Result<Option<BTreeMap<Partition, i64>>> {
        let Some(text) = text else { return Ok(None) };
        let offsets = scan::at_time(&config.kafka, &topics, time(text, now)?).await?;
        Ok(Some(offsets.into_iter().collect()))
    };
    let (since, until) = (edge(&filter.since).await?, edge(&filter.until).await?);
    let bounds = scan::bounds(&config.kafka, &topics).await?;
    let span = |bounds: scan::Bounds| {
        let at = |edge: &Option<BTreeMap<_, _>>| edge.as_ref().and_then(|edge| edge.get(&bounds.partition).copied());
        let start = at(&since).unwrap_or(bounds.low).clamp(bounds.low, bounds.end);
        let end = at(&until).unwrap_or(bounds.end).clamp(start, bounds.end);
        Span { partition: bounds.partition, range: start..end }
    };
    Ok(bounds.into_iter().map(span).collect())
}

async fn list(filter: &Filter, limit: usize, json: bool, config: &Config) -> anyhow::Result<Exit> {
    // The newest, in bounded memory: the oldest of them goes when a newer one comes.
    let mut newest: BTreeMap<(Timestamp, u64), DeadLetter> = BTreeMap::new();
    let mut counts: BTreeMap<(String, &'static str), u64> = BTreeMap::new();
    let mut total = 0;
    each(config, filter, |letter| {
        total += 1;
        *counts.entry((letter.source.to_string(), letter.reason.as_str())).or_default() += 1;
        newest.insert((letter.died_at, total), letter);
        if newest.len() > limit {
            newest.pop_first();
        }
    })
    .await?;
    if json {
        for letter in newest.values().rev() {
            say(&serde_json::to_string(letter)?)?;
        }
        return Ok(Exit::Done);
    }
    if total == 0 {
        say("no dead letters match")?;
        return Ok(Exit::Done);
    }
    let rows: Vec<_> = newest.values().rev().map(row).collect();
    say(&table(&["given up at", "source", "item", "reason", "calls", "batch", "message"], &rows))?;
    let shown = newest.len();
    say(&format!("\n{}, {} shown", counted(total, "dead letter"), grouped(shown as u64)))?;
    let rows: Vec<_> =
        counts.iter().map(|((source, reason), n)| vec![source.clone(), (*reason).to_owned(), grouped(*n)]).collect();
    say(&table(&["source", "reason", "count"], &rows))?;
    say("\nDetails of one: weir dead show ITEM")?;
    Ok(Exit::Done)
}

fn row(letter: &DeadLetter) -> Vec<String> {
    let request = letter.request.as_ref();
    vec![
        letter.died_at.to_string(),
        letter.source.to_string(),
        request.map_or_else(|| letter.request_id.to_string(), |request| request.item.to_string()),
        letter.reason.as_str().to_owned(),
        request.map_or_else(String::new, |request| request.calls.to_string()),
        request.and_then(|request| request.batch.as_ref()).map_or_else(String::new, ToString::to_string),
        codec::shorten(&one_line(&letter.message), 80).into_owned(),
    ]
}

/// A vendor's words must not break a table.
pub(super) fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

async fn show(id: &str, filter: &Filter, json: bool, config: &Config) -> anyhow::Result<Exit> {
    const MOST: usize = 1_000;
    let mut letters = Vec::new();
    each(config, filter, |letter| {
        let is_item = letter.request.as_ref().is_some_and(|request| request.item.as_str() == id);
        if (is_item || letter.request_id.as_str() == id) && letters.len() < MOST {
            letters.push(letter);
        }
    })
    .await?;
    if letters.is_empty() {
        let text = format!("no dead letter of an item or request {id:?}; its history: weir trace SOURCE {id}");
        return Err(Ended::failed(text).into());
    }
    letters.sort_by_key(|letter| letter.died_at);
    for letter in &letters {
        say(&if json { serde_json::to_string(letter)? } else { told(letter) })?;
    }
    Ok(Exit::Done)
}

/// One letter, for people.
fn told(letter: &DeadLetter) -> String {
    let mut lines = vec![format!("request   {} of source {}", letter.request_id, letter.source)];
    let mut add = |name: &str, text: String| lines.push(format!("{name:<9} {text}"));
    if let Some(request) = &letter.request {
        add("item", request.item.to_string());
        if let Some(batch) = &request.batch {
            add("batch", batch.to_string());
        }
        if !request.params.is_empty() {
            add("params", json!(request.params).to_string());
        }
        if let Some(at) = request.requested_at {
            add("asked at", at.to_string());
        }
        let left_out = usize::try_from(request.calls).unwrap_or(0).saturating_sub(request.history.len());
        for attempt in &request.history {
            add("tried", tried(attempt));
        }
        if left_out > 0 {
            add("", format!("… and {left_out} more calls, whose details were dropped to keep the record small"));
        }
    }
    add("died at", format!("{} ({}): {}", letter.died_at, letter.reason.as_str(), one_line(&letter.message)));
    let origin = &letter.origin;
    add("record", format!("{}/{}/{}", origin.topic, origin.partition, origin.offset));
    if let Some(original) = &letter.original_base64 {
        add("bytes", format!("{} (base64)", codec::shorten(original, 200)));
    }
    lines.join("\n") + "\n"
}

/// One attempt on a line.
pub(super) fn tried(attempt: &Attempt) -> String {
    let account = attempt.account.as_ref().map_or_else(String::new, |account| format!(" by {account}"));
    let status = attempt.http_status.map_or_else(String::new, |status| format!(" HTTP {status}"));
    let spent = if attempt.is_spent() { "" } else { ", no attempt spent" };
    let words = one_line(&attempt.message);
    let (class, code, ms) = (attempt.class.as_str(), one_line(&attempt.code), attempt.latency_ms);
    format!("{}{account}: {class} {code}{status} after {ms} ms{spent}: {words}", attempt.at)
}

async fn purge(until: &str, yes: bool, config: &Config) -> anyhow::Result<Exit> {
    let topics = Topics::new(config.topics.clone());
    let filter = Filter { until: Some(until.to_owned()), ..Filter::default() };
    let spans = spans(config, &filter).await?;
    // What the sink has not stored has no row yet: it would be lost for good.
    let sink = Groups::new(&config.kafka.group_prefix).sink();
    let committed = scan::committed(&config.kafka, &sink, &[topics.dead()]).await?;
    let stored: BTreeMap<_, _> = committed
        .into_iter()
        .map(|(partition, commit)| (partition, commit.map_or(0, |commit| commit.offset)))
        .collect();
    let is_stored = |partition: &Partition, offset| stored.get(partition).is_some_and(|committed| offset < *committed);
    let (mut held, mut counts) = (0, BTreeMap::<&str, u64>::new());
    let take = |partition: &Partition, record: &Record| {
        if is_stored(partition, record.offset) {
            let letter = codec::read_dead_letter(&record.raw(partition));
            *counts.entry(letter.map_or("unreadable", |letter| letter.reason.as_str())).or_default() += 1;
        } else {
            held += 1;
        }
    };
    read_each(&config.kafka, spans.clone(), "dead letters", take).await?;
    if held > 0 {
        let stay = agree(held, "stays", "stay");
        note(&format!("{} {stay}: not stored by the sink yet", counted(held, "dead letter")));
    }
    let total: u64 = counts.values().sum();
    if total == 0 {
        say("nothing to delete")?;
        return Ok(Exit::Done);
    }
    for (reason, count) in &counts {
        say(&format!("{:>12}  {reason}", grouped(*count)))?;
    }
    note(&format!(
        "{} will be deleted from Kafka permanently; rows in ClickHouse stay.",
        counted(total, "dead letter")
    ));
    if !yes && !is_meant().await? {
        note("nothing has been deleted");
        return Ok(Exit::Failed);
    }
    let until = |span: Span| {
        let stored = stored.get(&span.partition).copied().unwrap_or(0);
        (span.range.end.min(stored).max(span.range.start), span.partition)
    };
    let offsets: Vec<_> = spans.into_iter().map(until).map(|(offset, partition)| (partition, offset)).collect();
    tokio::time::timeout(Duration::from_secs(60), admin::delete_before(&config.kafka, &offsets)).await??;
    say(&format!("{} deleted", counted(total, "dead letter")))?;
    Ok(Exit::Done)
}

/// Asks on the terminal.
async fn is_meant() -> anyhow::Result<bool> {
    if !std::io::stdin().is_terminal() {
        return Err(Ended::usage("cannot ask for confirmation without a terminal: add --yes").into());
    }
    note("Continue? [y/N]");
    let mut line = String::new();
    let line =
        tokio::task::spawn_blocking(move || std::io::stdin().lock().read_line(&mut line).map(|_| line)).await??;
    Ok(BTreeSet::from(["y", "yes"]).contains(line.trim().to_ascii_lowercase().as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{ItemId, Origin, Request, RequestId};

    fn letter() -> DeadLetter {
        let mut request = Request::new(ItemId::new("7").unwrap());
        request.batch = Some(BatchId::new("monday").unwrap());
        request.calls = 3;
        let attempt = |class, message: &str| Attempt {
            at: Timestamp::from_millis(1_700_000_000_000),
            account: None,
            class,
            code: "busy".to_owned(),
            message: message.to_owned(),
            http_status: Some(503),
            latency_ms: 12,
            not_before: None,
        };
        request.history = vec![attempt(Class::Throttled, "slow\ndown"), attempt(Class::Outage, "gone")];
        DeadLetter {
            request_id: RequestId::new("r").unwrap(),
            source: SourceName::new("s").unwrap(),
            reason: Reason::Exhausted,
            message: "all 1 attempts are spent".to_owned(),
            died_at: Timestamp::from_millis(1_700_000_000_500),
            origin: Origin { topic: "f".to_owned(), partition: 1, offset: 2 },
            request: Some(request),
            original_base64: None,
        }
    }

    #[test]
    fn a_filter_takes_what_has_all_that_it_names() {
        let all = Filter {
            source: Some(SourceName::new("s").unwrap()),
            class: Some(Class::Outage),
            reason: Some(Reason::Exhausted),
            batch: Some(BatchId::new("monday").unwrap()),
            item: Some("7".to_owned()),
            ..Filter::default()
        };
        assert!(Filter::default().takes(&letter()) && all.takes(&letter()));
        let others = [
            Filter { source: Some(SourceName::new("x").unwrap()), ..all.clone() },
            Filter { class: Some(Class::Throttled), ..all.clone() },
            Filter { reason: Some(Reason::Expired), ..all.clone() },
            Filter { batch: Some(BatchId::new("x").unwrap()), ..all.clone() },
            Filter { item: Some("8".to_owned()), ..all },
        ];
        assert!(others.iter().all(|other| !other.takes(&letter())));
    }

    #[test]
    fn a_letter_is_told_with_each_attempt_on_a_line() {
        let text = told(&letter());
        for part in
            ["of source s", "monday", "throttled busy HTTP 503 after 12 ms, no attempt spent: slow down", "gone"]
        {
            assert!(text.contains(part), "{text} should say {part:?}");
        }
        assert!(text.contains("1 more calls") && text.contains("f/1/2"), "{text}");
    }
}
