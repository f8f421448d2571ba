//! `weir trace`: everything that happened to an item, from ClickHouse and from records on Kafka that are not stored
//! yet.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use serde_json::Value;

use super::{
    dead::{one_line, tried},
    exit::{Ended, Exit},
    reading::read_each,
    status::rows,
    terminal::{counted, note, say, spoken, table},
};
use crate::{
    config::Config,
    kafka::{
        Epoch, Partition, Record,
        ledger::{Admit, Ledger},
        scan::{self, Span},
    },
    message::{
        Request, SourceName,
        codec::{self, Raw},
        envelope::{Kind, header},
    },
    runtime::clock::Timestamp,
    store::quoting::quoted,
    timer,
    topics::{Groups, Topics},
};

pub(super) const LONG_ABOUT: &str = "\
Show everything that happened to an item, in order: requests, failed calls, when the next retry is due, the result or the dead letter.

Stored records come from ClickHouse. Those that the sink has not stored yet, and those that wait for a retry, are read from Kafka, from the offsets of sink and retry on, which takes a while if they lag far behind.";

pub(super) const EXAMPLES: &str = "\
Examples:
  weir trace ali1688 584051070147
  weir trace ali1688 weir.requests.ali1688/3/42        # by the request's id: only this request
  weir trace ali1688 584051070147 --json";

/// The most rows that are shown of each table.
const ROWS: usize = 1_000;

/// How many bytes of the vendor's words are shown on a line; `--json` has all.
const DETAILS: usize = 100;

/// `weir trace`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The source.
    source: SourceName,
    /// The item's id, or a request's.
    id: String,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
}

/// One thing that happened.
#[derive(Debug, serde::Serialize)]
struct Event {
    at: String,
    request: String,
    what: String,
    details: String,
    /// The record: topic/partition/offset.
    record: String,
    /// Whether ClickHouse has its row.
    stored: bool,
}

/// By time; the record tells those of one moment apart.
type Events = BTreeMap<(String, String), Event>;

pub(super) async fn run(args: &Args, config: &Config) -> anyhow::Result<Exit> {
    if config.source(args.source.as_str()).is_none() {
        let names: Vec<_> = config.sources.iter().map(|source| source.common.name.to_string()).collect();
        return Err(
            Ended::usage(format!("there is no source {}; configured: {}", args.source, names.join(", "))).into()
        );
    }
    let mut events = Events::new();
    let mut problems = Vec::new();
    if let Err(error) = from_tables(args, config, &mut events).await {
        problems.push(format!("rows of ClickHouse are missing below: {error:#}"));
    }
    if let Err(error) = from_topics(args, config, &mut events).await {
        problems.push(format!("records on Kafka are missing below: {error:#}"));
    }
    if args.json {
        for event in events.values() {
            say(&serde_json::to_string(event)?)?;
        }
    } else if !events.is_empty() {
        say(&table(&["at", "", "what", "", "record"], &lines(&events)))?;
    }
    for problem in &problems {
        note(&format!("! {problem}"));
    }
    if events.is_empty() && problems.is_empty() {
        return Err(Ended::failed(format!("no record of {:?} at {}", args.id, args.source)).into());
    }
    Ok(if problems.is_empty() { Exit::Done } else { Exit::Failed })
}

/// The events with the time that passed between them.
fn lines(events: &Events) -> Vec<Vec<String>> {
    let mut before: Option<Timestamp> = None;
    let line = |event: &Event| {
        let at = parsed(&event.at);
        let passed = before.zip(at).map_or_else(String::new, |(before, at)| passed(at.since(before)));
        before = at;
        let stored = if event.stored { "" } else { " (not stored)" };
        let details = codec::shorten(&event.details, DETAILS).into_owned();
        vec![event.at.clone(), passed, event.what.clone(), details, format!("{}{stored}", event.record)]
    };
    events.values().map(line).collect()
}

/// How long between two events, to the tenth of a second as long as that says anything.
fn passed(time: Duration) -> String {
    if time < Duration::from_secs(60) { format!("+{:.1} s", time.as_secs_f64()) } else { format!("+{}", spoken(time)) }
}

fn parsed(text: &str) -> Option<Timestamp> {
    serde_json::from_value(text.into()).ok()
}

/// Each table, its time, and the columns that its line is made of.
const TABLES: [(&str, &str, &str); 4] = [
    ("requests", "recorded_at", "calls, batch"),
    ("failures", "failed_at", "class, code, message, account, http_status, latency_ms, toString(not_before) AS until"),
    (
        "observations",
        "fetched_at",
        "status, via, instead_of, account, latency_ms, calls, title, toString(price) AS price",
    ),
    ("dead_letters", "died_at", "reason, message, calls"),
];

async fn from_tables(args: &Args, config: &Config, events: &mut Events) -> anyhow::Result<()> {
    let (source, id) = (quoted(args.source.as_str()), quoted(&args.id));
    for (name, time, columns) in TABLES {
        let sql = format!(
            "SELECT formatDateTime({time}, '%Y-%m-%dT%H:%i:%S', 'UTC') AS second, toUnixTimestamp64Milli({time}) % 1000 \
             AS ms, request_id, concat(topic, '/', toString(partition), '/', toString(offset)) AS place, {columns} \
             FROM {name} WHERE source = {source} AND (item = {id} OR request_id = {id}) ORDER BY {time} DESC LIMIT {ROWS}"
        );
        for row in rows(config, &sql).await? {
            let text = |column: &str| row[column].as_str().unwrap_or_default().to_owned();
            let (what, details) = told_of_row(name, &row);
            let at = format!("{}.{:03}Z", text("second"), row["ms"].as_u64().unwrap_or(0));
            let record = text("place");
            let event = Event { at, request: text("request_id"), what, details, record, stored: true };
            events.insert((event.at.clone(), event.record.clone()), event);
        }
    }
    Ok(())
}

fn told_of_row(table: &str, row: &Value) -> (String, String) {
    let text = |column: &str| match &row[column] {
        Value::String(text) => one_line(text),
        Value::Null => String::new(),
        other @ (Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_)) => other.to_string(),
    };
    let calls = row["calls"].as_u64().unwrap_or(0);
    let after = |word: &str, value: String| if value.is_empty() { String::new() } else { format!(" {word} {value}") };
    match table {
        "requests" => (asked(calls), after("batch", text("batch")).trim().to_owned()),
        "failures" => {
            let how = format!("{} {}{}", text("class"), text("code"), after("HTTP", text("http_status")));
            let details = format!(
                "after {} ms{}{}: {}",
                text("latency_ms"),
                after("by", text("account")),
                after("not before", text("until")),
                text("message")
            );
            (format!("failed: {how}"), details)
        }
        "observations" => {
            let details = format!(
                "by {}{}{} in {} ms{}: {}",
                text("via"),
                after("instead of", text("instead_of")),
                after("of", text("account")),
                text("latency_ms"),
                after("at price", text("price")),
                text("title")
            );
            (format!("result: {}", text("status")), details)
        }
        _ => (format!("dead letter: {}", text("reason")), text("message")),
    }
}

/// What a request asks for, by how many calls there were.
fn asked(calls: u64) -> String {
    match calls {
        0 => "asked for".to_owned(),
        _ => format!("requested again, after {}", counted(calls, "call")),
    }
}

/// What the sink and retry have not come to yet.
async fn from_topics(args: &Args, config: &Config, events: &mut Events) -> anyhow::Result<()> {
    let (topics, groups) = (Topics::new(config.topics.clone()), Groups::new(&config.kafka.group_prefix));
    let of_source = topics.all(std::slice::from_ref(&args.source));
    let stored: Vec<String> = of_source.iter().map(|topic| topic.name.clone()).collect();
    let waiting: Vec<String> = topics.delays().into_iter().map(|topic| topic.name).collect();
    let kinds: HashMap<String, Kind> = of_source.into_iter().map(|topic| (topic.name, topic.kind)).collect();
    let (mut spans, mut ledgers) = (Vec::new(), HashMap::new());
    for (group, topics) in [(groups.sink(), &stored), (groups.retry(), &waiting)] {
        let committed: HashMap<_, _> = scan::committed(&config.kafka, &group, topics).await?.into_iter().collect();
        for bounds in scan::bounds(&config.kafka, topics).await? {
            let commit = committed.get(&bounds.partition).cloned().flatten();
            let start = commit.as_ref().map_or(bounds.low, |commit| commit.offset).clamp(bounds.low, bounds.end);
            // The sink's commits have metadata of another kind, and none of them matters: its rows are known.
            if group == groups.retry()
                && let Ok(ledger) = Ledger::new(Epoch(0), commit.as_ref())
            {
                ledgers.insert(bounds.partition.clone(), ledger);
            }
            spans.push(Span { partition: bounds.partition, range: start..bounds.end });
        }
    }
    let take = |partition: &Partition, record: &Record| {
        let is_done = ledgers.get_mut(partition).is_some_and(|ledger| ledger.admit(record.offset) == Admit::Known);
        let kind = kinds.get(&*partition.topic).copied();
        if let Some(event) = told_of_record(args, partition, record, kind).filter(|_| !is_done) {
            // A row that is there already has the same record.
            if !events.values().any(|known| known.record == event.record) {
                events.insert((event.at.clone(), event.record.clone()), event);
            }
        }
    };
    read_each(&config.kafka, spans, "records on Kafka", take).await
}

/// What a record says, if it is about what was asked for. A kind is that of a topic that is stored; without one the
/// record waits to be tried again.
fn told_of_record(args: &Args, partition: &Partition, record: &Record, kind: Option<Kind>) -> Option<Event> {
    // Most records are about something else: that is seen without reading them.
    let is_in = |bytes: &[u8]| bytes.windows(args.id.len().max(1)).any(|window| window == args.id.as_bytes());
    let raw = record.raw(partition);
    let named = header(raw.headers, "ce_id").is_some_and(|id| is_in(id.as_bytes()));
    if !named && !raw.value.is_some_and(is_in) && raw.position_id().as_str() != args.id {
        return None;
    }
    let told = match kind {
        None => waits(args, record, &raw)?,
        Some(Kind::Request) => {
            let received = codec::read_request(&raw, &args.source).ok()?;
            is_about(args, received.id.as_str(), Some(&received.request))?;
            (record.time, received.id.to_string(), asked(received.request.calls.into()), String::new())
        }
        Some(Kind::Failure) => {
            let failure = codec::read_failure(&raw).ok().filter(|failure| failure.source == args.source)?;
            is_about(args, failure.request_id.as_str(), Some(&failure.request))?;
            (failure.attempt.at, failure.request_id.to_string(), "failed".to_owned(), tried(&failure.attempt))
        }
        Some(Kind::DeadLetter) => {
            let letter = codec::read_dead_letter(&raw).ok().filter(|letter| letter.source == args.source)?;
            is_about(args, letter.request_id.as_str(), letter.request.as_ref())?;
            let what = format!("dead letter: {}", letter.reason.as_str());
            (letter.died_at, letter.request_id.to_string(), what, one_line(&letter.message))
        }
        Some(_) => {
            let result = codec::read_observation(&raw).ok().filter(|result| result.source == args.source)?;
            let (id, item) = (result.request_id.as_str(), result.item.as_str());
            if id != args.id && item != args.id {
                return None;
            }
            (result.fetched_at, id.to_owned(), format!("result: {}", result.status.as_str()), String::new())
        }
    };
    let (at, request, what, details) = told;
    let record = raw.position_id().to_string();
    Some(Event { at: at.to_string(), request, what, details, record, stored: false })
}

fn waits(args: &Args, record: &Record, raw: &Raw<'_>) -> Option<(Timestamp, String, String, String)> {
    let received = codec::read_request(raw, &args.source).ok()?;
    is_about(args, received.id.as_str(), Some(&received.request))?;
    let due_at = timer::due_at(raw)?;
    let details =
        received.request.history.last().map_or_else(String::new, |last| format!("after {}", last.class.as_str()));
    Some((record.time, received.id.to_string(), format!("retry due at {due_at}"), details))
}

fn is_about(args: &Args, id: &str, request: Option<&Request>) -> Option<()> {
    (id == args.id || request.is_some_and(|request| request.item.as_str() == args.id)).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_records_about_the_item_are_told() {
        let args = Args { source: SourceName::new("s").unwrap(), id: "77".to_owned(), json: false };
        let partition = Partition { topic: "r".into(), number: 3 };
        let record = |value: &'static str| Record {
            offset: 5,
            time: Timestamp::from_millis(1_700_000_000_000),
            key: None,
            value: Some(value.into()),
            headers: vec![],
            log: None,
        };
        let told = |value| told_of_record(&args, &partition, &record(value), Some(Kind::Request));
        assert!(told("177").is_none() && told(r#"{"item":"8","params":{"a":"77"}}"#).is_none());
        assert_eq!(told("77").unwrap().what, "asked for");
        let mut waiting = record(r#"{"item":"77","calls":2}"#);
        waiting.headers.push(("x-due-at".into(), "1700000009000".into()));
        let event = told_of_record(&args, &partition, &waiting, None).unwrap();
        assert_eq!(event.what, "retry due at 2023-11-14T22:13:29.000Z");
        assert_eq!((event.record.as_str(), event.stored), ("r/3/5", false));
    }
}
