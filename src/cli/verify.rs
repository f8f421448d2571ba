//! `weir verify`: checks that nothing is lost or duplicated, and lists what is.

use std::collections::HashMap;

use anyhow::Context;
use bytes::Bytes;
use clap::ValueEnum as _;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    exit::Exit,
    piece::Which,
    terminal::{Progress, Rate, agree, counted, grouped, say, table},
};
use crate::{
    config::Config,
    enqueue::feed::{Few, NAMED},
    kafka::{
        Outgoing, Producer,
        admin::{self, Lag},
        log_names::topic_of,
        logs,
    },
    message::{
        BatchId, DeadLetter, ItemId, Origin, Reason, Request, RequestId, SourceName,
        codec::{self, Encoded},
        envelope::{Envelope, Kind},
    },
    replay::when::time,
    runtime::clock::{Clock, Timestamp},
    store::{Store, present::Place, unended::Unended},
    topics::{Groups, Topics},
    verify::{
        self, Places, Report, Scope, Unaccounted,
        balance::{Fault, Sum},
        rows::{At, TopicReport},
        strays::Foreign,
    },
};

pub(super) const LONG_ABOUT: &str = "\
Check that nothing is lost and nothing is duplicated, by comparing the topics with ClickHouse.

Two things are checked. Up to the sink's offsets, the rows of each table are exactly the records of its topic, by \
topic, partition and offset. And each request has an outcome, or waits for a stage that will process it: requested = \
found + absent + off-shelf + dead + under way. Deviations are listed, and the exit code is then 1.

A request that Kafka's retention deleted before it was called for, and that ClickHouse knows, is lost: it is listed, \
and --end-lost ends it as a dead letter, which `weir replay --topic dead --into requests` sends again. Requests that a \
running fetch may have read before are left to it.

Read-only without --end-lost; safe to run beside the roles. What Kafka's retention has deleted cannot be compared. It \
takes about 50 bytes of memory per request id.";

pub(super) const EXAMPLES: &str = "\
Examples:
  weir verify                            # everything on Kafka
  weir verify --batch monday             # the requests of one batch
  weir verify --since \"2 days ago\"       # requests since then; also 2h, 2026-11-20, …
  weir verify --all | grep lost          # list all deviations, not only 20 of a kind";

/// `weir verify`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only the requests of this batch; rows are compared for all.
    #[arg(long, value_name = "NAME")]
    batch: Option<BatchId>,
    /// Only requests since this time.
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// List all deviations.
    #[arg(long)]
    all: bool,
    /// End each request that retention deleted unread as a dead letter.
    #[arg(long)]
    end_lost: bool,
}

pub(super) async fn run(args: &Args, config: &Config, stop: &CancellationToken) -> anyhow::Result<Exit> {
    let since = args.since.as_deref().map(|text| time(text, Clock::System.now())).transpose()?;
    let scope =
        Scope { batch: args.batch.clone(), since, named: if args.all || args.end_lost { usize::MAX } else { NAMED } };
    let (topics, groups) = (Topics::new(config.topics.clone()), Groups::new(&config.kafka.group_prefix));
    let (store, sources) = (Store::connect(&config.clickhouse)?, config.source_names());
    let places = Places { kafka: &config.kafka, topics: &topics, groups: &groups, sources: &sources, store: &store };
    // Before the topics are read: what fetch ends and commits after this is not taken for lost.
    let held = if args.end_lost { Some(Held::ask(config, &topics, &groups).await?) } else { None };
    let (mut progress, mut rate, mut before) = (Progress::new(), Rate::default(), 0);
    #[allow(clippy::cast_precision_loss, reason = "a share for people")]
    let verified = verify::run(places, &scope, |read, of| {
        // What looks wrong is looked at again, from the beginning.
        if read < std::mem::replace(&mut before, read) {
            rate = Rate::default();
        }
        let rate = rate.add(Instant::now(), read);
        let left = Rate::words(rate, Some(of.saturating_sub(read)));
        progress.show(Some(read as f64 / of.max(1) as f64), || format!("{} read{left}", counted(read, "offset")));
    });
    let verified = tokio::select! {
        verified = verified => verified.context("verify failed"),
        () = stop.cancelled() => return Ok(Exit::Interrupted),
    };
    progress.clear();
    let report = verified?;
    // What was paid for twice is no fault of the records: without the quota's topic the proof is the same.
    let again = super::quota::made_again(config).await.unwrap_or_default();
    print(&report, args.batch.as_ref(), &again)?;
    if let Some(held) = held {
        let (kept, lost) =
            report.deleted.iter().partition::<Vec<_>, _>(|lost| held.has(&lost.topic, lost.partition, lost.offset));
        end_lost(&lost, &topics.dead(), config).await?;
        if !kept.is_empty() {
            let requests = counted(kept.len() as u64, "request");
            say(&format!(
                "Open: {requests} that the running fetch may have read before retention deleted the records. Run this \
                 again later, or while no fetch of the source is running"
            ))?;
        }
    } else if !report.deleted.is_empty() {
        say(
            "Lost: requests that Kafka's retention deleted before they were called for. --end-lost ends them as dead \
             letters, from which they can be sent again",
        )?;
    }
    let is_proved = report.is_clean() && (args.batch.is_none() || report.sum.requested > 0);
    Ok(if is_proved { Exit::Done } else { Exit::Failed })
}

fn print(report: &Report, batch: Option<&BatchId>, again: &[String]) -> std::io::Result<()> {
    let head = ["", "topic", "records", "rows", "missing", "stray", "duplicate", "not stored yet"];
    let rows: Vec<_> = report.topics.iter().map(row).collect();
    say("Rows in ClickHouse compared with records on Kafka, up to the sink's offsets")?;
    say(&indent(&table(&head, &rows)))?;
    for topic in &report.topics {
        faults(topic)?;
    }
    foreign(report)?;
    let of = batch.map(|batch| format!(" of batch {batch}")).unwrap_or_default();
    say(&format!("\nRequests{of}"))?;
    say(&format!("  {} {}", mark(report.sum.lost == 0 && report.sum.doubled == 0), equation(&report.sum)))?;
    unaccounted(&report.unaccounted)?;
    again.iter().try_for_each(|line| say(&format!("  · {line}")))?;
    if let Some(batch) = batch.filter(|_| report.sum.requested == 0) {
        return say(&format!(
            "\n✗ verify failed: no request of batch {batch} is on Kafka. Is the name right? Has retention deleted it?"
        ));
    }
    let verdict = if report.is_clean() { "✓ all accounted for" } else { "✗ not everything is accounted for" };
    say(&format!("\n{verdict}"))
}

/// What fetch may hold of requests whose records retention has deleted: where it runs, all that it has not committed.
#[derive(Debug, Default)]
struct Held {
    /// How far it has come in the partitions that it reads, by the names of their logs. Of a former log it drops what it has.
    commits: HashMap<(String, i32), i64>,
}

impl Held {
    async fn ask(config: &Config, topics: &Topics, groups: &Groups) -> anyhow::Result<Self> {
        let (kafka, mut held) = (&config.kafka, Self::default());
        for source in config.source_names() {
            let (group, of_source) = (groups.fetch(&source), topics.every_request(&source));
            if !admin::has_members(kafka, &group).await? {
                continue;
            }
            let names = logs::names(kafka, &of_source).await?;
            for Lag { topic, partition, committed, .. } in admin::lag(kafka, &group, &of_source).await? {
                held.commits.insert((names.name(&topic).to_owned(), partition), committed.unwrap_or(0));
            }
        }
        Ok(held)
    }

    fn has(&self, log: &str, partition: i32, offset: i64) -> bool {
        self.commits.get(&(log.to_owned(), partition)).is_some_and(|committed| offset >= *committed)
    }
}

/// A dead letter for each of these requests.
async fn end_lost(lost: &[&Unended], dead: &str, config: &Config) -> anyhow::Result<()> {
    let (producer, now) = (Producer::new(&config.kafka)?, Clock::System.now());
    for some in lost.chunks(1_000) {
        let letters: anyhow::Result<Vec<_>> = some.iter().map(|lost| letter(lost, dead, now)).collect();
        producer.send(letters?).await?;
    }
    say(&format!(
        "\nEnded {} as dead letters (expired). To send them again: weir replay --topic dead --into requests",
        counted(lost.len() as u64, "lost request")
    ))?;
    Ok(())
}

fn letter(lost: &Unended, dead: &str, now: Timestamp) -> anyhow::Result<Outgoing> {
    let Unended { request_id, source, item, batch, params, topic, partition, offset, requested_at } = lost;
    let source = SourceName::new(source)?;
    let mut request = Request::new(ItemId::new(item)?);
    request.source = Some(source.clone());
    request.batch = Some(batch).filter(|batch| !batch.is_empty()).map(BatchId::new).transpose()?;
    request.requested_at = Some(Timestamp::from_millis(*requested_at));
    if !params.is_empty() {
        request.params = serde_json::from_str(params)?;
    }
    let letter = DeadLetter {
        request_id: RequestId::new(request_id)?,
        source,
        reason: Reason::Expired,
        message: "Kafka's retention deleted the request before it was processed: it waited longer than the topic keeps records"
            .to_owned(),
        died_at: now,
        origin: Origin { topic: topic.clone(), partition: *partition, offset: *offset },
        request: Some(request),
        original_base64: None,
    };
    let envelope =
        Envelope { kind: Kind::DeadLetter, id: request_id, writer: "weir/verify", time: now, traceparent: None };
    let Encoded { headers, value } = codec::encode(&envelope, &letter);
    Ok(Outgoing { topic: dead.into(), key: Some(Bytes::copy_from_slice(item.as_bytes())), value, headers })
}

fn mark(good: bool) -> &'static str {
    if good { "✓" } else { "✗" }
}

fn row(report: &TopicReport) -> Vec<String> {
    let TopicReport { topic, records, rows, missing, stray, doubled, waiting, .. } = report;
    let numbers = [*records, *rows, missing.count, stray.count, doubled.count, *waiting].map(grouped);
    [mark(report.is_exact()).to_owned(), topic.clone()].into_iter().chain(numbers).collect()
}

/// Which records and rows do not match, and what to do.
fn faults(report: &TopicReport) -> std::io::Result<()> {
    let TopicReport { log, kind, missing, stray, doubled, differing, nobodys, .. } = report;
    let name = |(partition, offset): &At| format!("{log}/{partition}/{offset}");
    let replay = format!("`weir replay --topic {}`", word(*kind));
    few(missing, ["record has", "records have"], &format!("no row; {replay} inserts them"), name)?;
    // Rows of a log that is gone are all that is left of it: nothing deletes those that are of a request.
    let by_hand = "no record: written by hand, or from a deleted topic of this name, and then the only copy";
    few(stray, ["row has", "rows have"], by_hand, name)?;
    advise(nobodys.is_empty(), &deletion(log, *kind, nobodys.iter().copied()))?;
    let several = format!(
        "duplicate rows; run the command below each, if there is one, to delete them, then {replay} inserts them once"
    );
    few(doubled, ["record has", "records have"], &several, |(at, times)| format!("{} ({times} rows)", name(at)))?;
    let same: Vec<At> = doubled.first.iter().map(|(at, _)| *at).filter(|at| !differing.contains(at)).collect();
    if !differing.is_empty() {
        let of = agree(differing.len() as u64, "has rows", "have rows");
        say(&format!(
            "{} of these {of} of different requests or times, so they are not duplicates and must not be deleted: was \
             the topic re-created?",
            grouped(differing.len() as u64)
        ))?;
    }
    advise(same.is_empty(), &deletion(log, *kind, same.into_iter()))
}

fn advise(is_needless: bool, command: &str) -> std::io::Result<()> {
    if is_needless { Ok(()) } else { say(&format!("      {command}")) }
}

/// The command that deletes the rows of these places. A plain DELETE is refused where a table has a projection.
fn deletion(topic: &str, kind: Kind, places: impl Iterator<Item = At>) -> String {
    let places: Vec<_> = places.map(|(partition, offset)| format!("({partition}, {offset})")).collect();
    format!(
        "weir query \"ALTER TABLE {} DELETE WHERE topic = '{topic}' AND (partition, offset) IN ({}) SETTINGS mutations_sync = 1\"",
        Place::of(kind).table,
        places.join(", ")
    )
}

/// What `weir replay --topic` calls it.
fn word(kind: Kind) -> String {
    Which::of(kind)
        .and_then(|which| which.to_possible_value())
        .map_or_else(String::new, |value| value.get_name().to_owned())
}

/// Whether rows are of a former log of a topic that is there.
fn is_former(report: &Report, log: &str) -> bool {
    report.topics.iter().any(|topic| topic.topic == topic_of(log))
}

fn foreign(report: &Report) -> std::io::Result<()> {
    report.foreign.iter().try_for_each(|Foreign { table, topic, rows }| {
        let (name, rows) = (agree(*rows, "names", "name"), counted(*rows, "row"));
        let why = if is_former(report, topic) { "since deleted and re-created" } else { "not configured" };
        say(&format!("  · {rows} of {table} {name} the topic {topic}, which is {why}: not verified"))
    })
}

/// `have` is what one of them has, and what several have.
fn few<T>(few: &Few<T>, have: [&str; 2], what: &str, name: impl Fn(&T) -> String) -> std::io::Result<()> {
    if few.count == 0 {
        return Ok(());
    }
    say(&format!("  ✗ {} {} {what}:", grouped(few.count), agree(few.count, have[0], have[1])))?;
    few.first.iter().try_for_each(|one| say(&format!("      {}", name(one))))?;
    more(few.count, few.first.len())
}

fn more(count: u64, named: usize) -> std::io::Result<()> {
    match count - named as u64 {
        0 => Ok(()),
        more => say(&format!("      and {} more: --all lists them", grouped(more))),
    }
}

fn equation(sum: &Sum) -> String {
    let Sum { requested, found, absent, off_shelf, dead, under_way, lost, doubled } = *sum;
    let [requested, found, absent, off_shelf, dead, under_way] =
        [requested, found, absent, off_shelf, dead, under_way].map(grouped);
    let places = format!(
        "{requested} requested = {found} found + {absent} absent + {off_shelf} off-shelf + {dead} dead + {under_way} under way"
    );
    let lost = if lost == 0 { String::new() } else { format!(" + {} LOST", grouped(lost)) };
    let doubled =
        if doubled == 0 { String::new() } else { format!("; {} have more outcomes than requests", grouped(doubled)) };
    format!("{places}{lost}{doubled}")
}

fn unaccounted(few: &Few<Unaccounted>) -> std::io::Result<()> {
    for Unaccounted { fault, id, item, at } in &few.first {
        let what = match fault {
            Fault::Lost => "lost",
            Fault::Doubled => "ended twice",
        };
        say(&format!("      {what}: item {item}, request {id}, asked for at {at}"))?;
    }
    more(few.count, few.first.len())
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_running_fetch_has_not_committed_may_be_held_by_it() {
        let held = Held { commits: [(("r".to_owned(), 0), 7)].into() };
        assert!(!held.has("r", 0, 6), "it is done with that");
        assert!(held.has("r", 0, 7) && held.has("r", 0, 9));
        assert!(!held.has("r", 1, 9), "no fetch reads it");
        assert!(!held.has("r@1a2b3c4d", 0, 9), "another log");
        assert!(!Held::default().has("r", 0, 9));
    }

    #[test]
    fn the_advice_can_be_pasted() {
        let topics = [Kind::Request, Kind::Result, Kind::Failure, Kind::Change, Kind::DeadLetter].map(word);
        assert_eq!(topics, ["requests", "results", "failures", "changes", "dead"]);
        let command = deletion("weir.results", Kind::Result, [(2, 7), (0, 80)].into_iter());
        let place = "topic = 'weir.results' AND (partition, offset) IN ((2, 7), (0, 80))";
        let expected =
            format!("weir query \"ALTER TABLE observations DELETE WHERE {place} SETTINGS mutations_sync = 1\"");
        assert_eq!(command, expected);
    }

    #[test]
    fn the_sum_line_names_what_is_wrong_only_if_something_is() {
        let sum = Sum { requested: 1_005, found: 1_000, absent: 2, dead: 1, under_way: 2, ..Sum::default() };
        let clean = "1,005 requested = 1,000 found + 2 absent + 0 off-shelf + 1 dead + 2 under way";
        assert_eq!(equation(&sum), clean);
        let text = equation(&Sum { under_way: 1, lost: 1, doubled: 3, ..sum });
        assert!(text.ends_with("1 under way + 1 LOST; 3 have more outcomes than requests"), "{text}");
    }
}
