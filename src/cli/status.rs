//! `weir status`: consumer lag from Kafka, batches and recent outcomes from ClickHouse, roles that are not ready.

use std::{collections::BTreeMap, time::Duration};

use anyhow::Context;
use serde::Serialize;
use serde_json::Value;
use tokio::time::timeout;

use super::{
    exit::{Ended, Exit},
    groups::{self, Group},
    outlast,
    terminal::{grouped, say, table},
    waiting::Seen,
};
use crate::{
    config::Config,
    kafka::admin::{self, Lag},
    platform::SourceConfig,
    runtime::health::{self, Condition},
    store::query::{Format, query},
    topics::Topics,
};

pub(super) const LONG_ABOUT: &str = "\
Show consumer lag, batches and recent calls.

From Kafka: the lag of each stage and topic; a small lag is counted record by record, a large one includes transaction \
markers. From ClickHouse: unfinished and recent batches, and the outcomes of the calls of the last ten minutes. If one \
of the two does not answer, the other is shown. From the process on this machine, if it listens on [http] listen: \
roles that are not ready, and why.";

pub(super) const EXAMPLES: &str = "\
Examples:
  weir status
  watch -n 2 weir status
  weir status --json | jq .batches";

/// How long a server may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The same for all questions to Kafka: longer than one takes to say that no broker answers.
const KAFKA_PATIENCE: Duration = Duration::from_secs(15);

const BATCH_COLUMNS: &[&str] =
    &["batch", "requested", "found", "absent", "off_shelf", "dead", "under_way", "retried", "last_at"];

const OUTCOME_COLUMNS: &[&str] = &[
    "source",
    "calls",
    "found",
    "absent",
    "off_shelf",
    "throttled",
    "outage",
    "denied",
    "malformed",
    "bug",
    "cached",
    "stale",
];

const BATCHES: &str = "SELECT batch, requested, found, absent, off_shelf, dead, under_way, retried, \
    toString(last_at) AS last_at FROM batches ORDER BY under_way > 0 DESC, batches.last_at DESC LIMIT 10";

const OUTCOMES: &str = "SELECT source, sum(calls) AS calls, sum(found) AS found, sum(absent) AS absent, \
    sum(off_shelf) AS off_shelf, sum(throttled) AS throttled, sum(outage) AS outage, sum(denied) AS denied, \
    sum(malformed) AS malformed, sum(bug) AS bug, sum(cached) AS cached, sum(stale) AS stale FROM source_health WHERE minute >= now() - INTERVAL 10 MINUTE \
    GROUP BY source ORDER BY source";

/// `weir status`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// One JSON document.
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    /// Each stage on each topic.
    lag: Vec<Line>,
    /// Rows of the view `batches`.
    batches: Vec<Value>,
    /// Sums of the view `source_health`.
    last_ten_minutes: Vec<Value>,
    /// The roles of the process that listens on `[http] listen`, if there is one, and what each waits for.
    #[serde(skip_serializing_if = "Option::is_none")]
    roles: Option<BTreeMap<String, Condition>>,
    /// What could not be found out.
    problems: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Line {
    stage: &'static str,
    group: String,
    topic: String,
    partitions: usize,
    /// Records; where [`Line::counted`] is false transaction markers may be among them.
    waiting: i64,
    /// Whether what waits was counted one by one. Where much waits it is not.
    counted: bool,
    written: i64,
    /// Whether the group has ever committed there.
    seen: bool,
    /// Whether these wait for their time, and so should.
    delayed: bool,
}

pub(super) async fn run(args: &Args, config: &Config) -> anyhow::Result<Exit> {
    let (lag, tables, roles) = tokio::join!(lag(config), tables(config), roles(config));
    let mut exit = Exit::Done;
    let mut problems = Vec::new();
    for error in [lag.as_ref().err(), tables.as_ref().err()].into_iter().flatten() {
        exit = super::exit::exit_of(error);
        problems.push(format!("{error:#}"));
    }
    let (batches, last_ten_minutes) = tables.unwrap_or_default();
    let lag = lag.unwrap_or_default();
    problems.extend(outlasting(&lag, config));
    let report = Report { lag, batches, last_ten_minutes, roles, problems };
    if args.json {
        say(&serde_json::to_string_pretty(&report)?)?;
    } else {
        print(&report)?;
    }
    Ok(exit)
}

/// What is said of backlogs that retention will delete before they are worked off.
fn outlasting(lines: &[Line], config: &Config) -> Vec<String> {
    let topics = Topics::new(config.topics.clone());
    let of_source = |source: &SourceConfig| {
        let own = topics.every_request(&source.common.name);
        let lines = lines.iter().filter(|line| line.stage == "fetch" && own.contains(&line.topic));
        let waiting = lines.map(|line| u64::try_from(line.waiting).unwrap_or(0)).sum();
        outlast::warning_of(source, waiting, config)
    };
    config.sources.iter().filter_map(of_source).collect()
}

/// No process may be found: roles may run on other machines.
async fn roles(config: &Config) -> Option<BTreeMap<String, Condition>> {
    let answer = timeout(PATIENCE, health::ask(config.http.listen?)).await;
    Some(answer.ok()?.ok()?.roles)
}

/// Both tables come from one server: if it does not answer to the first question, the second is not asked.
async fn tables(config: &Config) -> anyhow::Result<(Vec<Value>, Vec<Value>)> {
    Ok((rows(config, BATCHES).await?, rows(config, OUTCOMES).await?))
}

async fn lag(config: &Config) -> anyhow::Result<Vec<Line>> {
    let ask = async {
        let mut all = Vec::new();
        for group in groups::all(config) {
            let lags = admin::lag(&config.kafka, &group.name, &group.topics).await?;
            all.push((group, lags));
        }
        let seen = Seen::of(&config.kafka, all.iter().flat_map(|(_, lags)| lags)).await;
        let lines = all.iter().flat_map(|(group, lags)| sums(group, lags, &seen)).collect();
        anyhow::Ok(with_delays_as_one(lines, &Topics::new(config.topics.clone())))
    };
    timeout(KAFKA_PATIENCE, ask).await.map_err(|_| silent("Kafka", KAFKA_PATIENCE))?
}

fn silent(server: &str, patience: Duration) -> Ended {
    let message = format!("{server} did not answer within {} s", patience.as_secs());
    Ended { exit: Exit::Unavailable, message }
}

/// The partitions of each topic, added up; topics that do not exist are left out.
fn sums(group: &Group, lags: &[Lag], seen: &Seen) -> Vec<Line> {
    let of = |topic: &String| {
        let lags: Vec<_> = lags.iter().filter(|lag| lag.topic == *topic).collect();
        let waiting: Vec<_> = lags.iter().map(|lag| seen.waiting(lag)).collect();
        (!lags.is_empty()).then(|| Line {
            stage: group.stage,
            group: group.name.clone(),
            topic: topic.clone(),
            partitions: lags.len(),
            waiting: waiting.iter().map(|waiting| waiting.records).sum(),
            counted: waiting.iter().all(|waiting| waiting.is_sure),
            written: lags.iter().map(|lag| lag.end).sum(),
            seen: lags.iter().any(|lag| lag.committed.is_some()),
            delayed: false,
        })
    };
    group.topics.iter().filter_map(of).collect()
}

/// The delay topics as one line: on which of them a request waits says little.
fn with_delays_as_one(lines: Vec<Line>, topics: &Topics) -> Vec<Line> {
    let delays: Vec<_> = topics.delays().into_iter().map(|topic| topic.name).collect();
    let (delayed, mut lines): (Vec<_>, Vec<_>) = lines.into_iter().partition(|line| delays.contains(&line.topic));
    let Some(first) = delayed.first() else { return lines };
    let one = Line {
        stage: first.stage,
        group: first.group.clone(),
        topic: topics.every_delay(),
        partitions: delayed.iter().map(|line| line.partitions).sum(),
        waiting: delayed.iter().map(|line| line.waiting).sum(),
        counted: delayed.iter().all(|line| line.counted),
        written: delayed.iter().map(|line| line.written).sum(),
        seen: delayed.iter().any(|line| line.seen),
        delayed: true,
    };
    let after = lines.iter().rposition(|line| line.group == one.group).map_or(lines.len(), |last| last + 1);
    lines.insert(after, one);
    lines
}

/// Asks ClickHouse for rows as JSON objects.
pub(super) async fn rows(config: &Config, sql: &str) -> anyhow::Result<Vec<Value>> {
    let sql = format!("{sql} SETTINGS output_format_json_quote_64bit_integers = 0");
    let mut out = Vec::new();
    timeout(PATIENCE, query(&config.clickhouse, &sql, &Format::Named("JSONEachRow".to_owned()), &mut out))
        .await
        .map_err(|_| silent("ClickHouse", PATIENCE))??;
    let lines = out.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    lines.map(|line| serde_json::from_slice(line).context("reading ClickHouse's answer")).collect()
}

fn print(report: &Report) -> std::io::Result<()> {
    if !report.lag.is_empty() {
        let rows: Vec<_> = report.lag.iter().map(lag_row).collect();
        say(&format!(
            "Waiting on Kafka\n{}\n",
            indent(&table(&["stage", "topic", "waiting", "end offset", ""], &rows))
        ))?;
    }
    section("Batches", BATCH_COLUMNS, &report.batches, "none yet; start one with: weir enqueue FILE --source NAME")?;
    section("Calls of the last ten minutes", OUTCOME_COLUMNS, &report.last_ten_minutes, "none")?;
    for (role, condition) in report.roles.iter().flatten() {
        if let Some(reason) = &condition.reason {
            say(&format!("! {role}: {reason}"))?;
        }
    }
    for problem in &report.problems {
        say(&format!("! {problem}"))?;
    }
    Ok(())
}

fn lag_row(line: &Line) -> Vec<String> {
    let number = |number: i64| grouped(u64::try_from(number).unwrap_or(0));
    // One mark can stand at the end of each partition for good.
    let mark = !line.counted && usize::try_from(line.waiting).is_ok_and(|waiting| waiting <= line.partitions);
    let note = match (line.waiting, line.seen) {
        (0, _) => "",
        (_, false) => "never read; is the role running?",
        (_, true) if mark => "perhaps none: transaction markers are counted too",
        (_, true) if line.delayed => "failed, waiting for their retry",
        (_, true) => "",
    };
    vec![line.stage.to_owned(), line.topic.clone(), number(line.waiting), number(line.written), note.to_owned()]
}

pub(super) fn section(title: &str, head: &[&str], rows: &[Value], empty: &str) -> std::io::Result<()> {
    if rows.is_empty() {
        return say(&format!("{title}\n  {empty}\n"));
    }
    let cell = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.as_u64().map_or_else(|| number.to_string(), grouped),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => value.to_string(),
    };
    let row = |row: &Value| head.iter().map(|name| cell(&row[*name])).collect::<Vec<_>>();
    let rows: Vec<_> = rows.iter().map(row).collect();
    say(&format!("{title}\n{}\n", indent(&table(head, &rows))))
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topics;

    #[test]
    fn what_waits_on_the_delay_topics_is_one_line_behind_the_failures() {
        let topics = Topics::new(topics::Config::default());
        let lag = |topic: String| Lag { topic, partition: 0, committed: Some(3), low: 0, end: 10 };
        let group = |stage, topics| Group { stage, name: format!("weir.{stage}"), topics };
        let (retry, sink) = (group("retry", topics.retried()), group("sink", vec![topics.failures()]));
        let lines = [
            sums(&retry, &topics.retried().into_iter().map(lag).collect::<Vec<_>>(), &Seen::default()),
            sums(&sink, &[lag(topics.failures())], &Seen::default()),
        ];
        let lines = with_delays_as_one(lines.concat(), &topics);
        let found: Vec<_> = lines.iter().map(|line| (line.stage, line.topic.as_str(), line.waiting)).collect();
        let expected = [("retry", "weir.failures", 7), ("retry", "weir.retry.*", 63), ("sink", "weir.failures", 7)];
        assert_eq!(found, expected);
    }

    #[test]
    fn partitions_are_added_up_by_topic_and_missing_topics_left_out() {
        let lag = |topic: &str, committed, end| Lag { topic: topic.to_owned(), partition: 0, committed, low: 0, end };
        let group = Group {
            stage: "sink",
            name: "weir.sink".to_owned(),
            topics: vec!["a".to_owned(), "b".to_owned(), "c".to_owned()],
        };
        let lines = sums(&group, &[lag("a", Some(3), 10), lag("a", None, 5), lag("b", None, 0)], &Seen::default());
        let found: Vec<_> =
            lines.iter().map(|line| (line.topic.as_str(), line.waiting, line.written, line.seen)).collect();
        assert_eq!(found, [("a", 12, 15, true), ("b", 0, 0, false)]);
    }
}
