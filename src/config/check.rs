//! Semantic checks of the configuration: limits, duplicates, names that Kafka accepts.

use std::{collections::BTreeSet, fmt, ops::RangeInclusive, time::Duration};

use bytesize::ByteSize;
use secrecy::ExposeSecret;

use super::{Config, Problem};
use crate::{
    batches::Webhook,
    cache,
    fetch::AtRisk,
    kafka::client::{LEAST_LIMIT, MESSAGE_LIMIT, TRANSACTION_TIMEOUT},
    message::Class,
    quota::{self, Pacing},
    retry::Policy,
    runtime::{duration_text::duration_text, logging},
    store::Store,
    tokens,
    topics::{self, Topics},
};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Kafka takes no longer name of a topic.
const TOPIC_LIMIT: usize = 249;

/// Properties of librdkafka that a promise rests on: weir sets them itself.
const OURS: &[&str] = &[
    "acks",
    "auto.offset.reset",
    "bootstrap.servers",
    "enable.auto.commit",
    "enable.auto.offset.store",
    "enable.idempotence",
    "group.id",
    "group.instance.id",
    "isolation.level",
    "metadata.broker.list",
    "partition.assignment.strategy",
    "partitioner",
    "transactional.id",
];

/// Collects problems under their keys.
#[derive(Default)]
struct Check(Vec<Problem>);

impl Check {
    fn add(&mut self, key: &str, what: impl Into<String>) {
        self.0.push(Problem::new(key, what));
    }

    fn range<T: PartialOrd + fmt::Display + Copy>(&mut self, key: &str, found: T, [least, most]: [T; 2]) {
        if !(least..=most).contains(&found) {
            self.add(key, format!("found {found}, allowed: {least} to {most}"));
        }
    }

    fn duration(&mut self, key: &str, found: Duration, allowed: RangeInclusive<Duration>) {
        if !allowed.contains(&found) {
            let (from, to) = (duration_text(*allowed.start()), duration_text(*allowed.end()));
            self.add(key, format!("found {}, allowed: {from} to {to}", duration_text(found)));
        }
    }

    /// Letters, digits, dot, underscore and hyphen: what Kafka allows in names.
    fn name(&mut self, key: &str, found: &str, limit: usize) {
        let is_legal = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if found.is_empty() || found.len() > limit || !found.chars().all(is_legal) || found.chars().all(|c| c == '.') {
            self.add(key, format!("found {found:?}, allowed: 1 to {limit} of the characters a-z A-Z 0-9 . _ -"));
        }
    }

    fn url(&mut self, key: &str, found: &str, schemes: &[&str]) {
        let shown = super::print::without_password(found);
        let is_right = found.split_once("://").is_some_and(|(scheme, rest)| {
            let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
            schemes.contains(&scheme) && !host.is_empty() && !rest.contains(char::is_whitespace)
        });
        if !is_right {
            let allowed: Vec<_> = schemes.iter().map(|scheme| format!("{scheme}://host:port")).collect();
            self.add(key, format!("found {shown:?}, allowed: {}", allowed.join(" or ")));
        }
    }
}

/// Everything that is wrong with `config`.
pub(super) fn problems(config: &Config) -> Vec<Problem> {
    let mut check = Check::default();
    check.name("instance.name", &config.instance.name, 100);
    kafka(&mut check, config);
    topics(&mut check, config);
    servers(&mut check, config);
    cache(&mut check, config);
    fetch(&mut check, config);
    quota(&mut check, config);
    tokens(&mut check, config);
    retry(&mut check, config);
    changes(&mut check, config);
    sink(&mut check, config);
    serve(&mut check, config);
    batches(&mut check, config);
    if let Err(reason) = logging::check_filter(&config.log.filter) {
        let allowed = r#"a level (error, warn, info, debug, trace), or levels by target: "info,weir::fetch=debug""#;
        check.add("log.filter", format!("found {:?}, allowed: {allowed} ({reason})", config.log.filter));
    }
    sources(&mut check, config);
    calendar(&mut check, config);
    check.0
}

fn kafka(check: &mut Check, config: &Config) {
    let kafka = &config.kafka;
    let is_address = |address: &str| {
        let address = address.trim();
        let address = address.split_once("://").map_or(address, |(_, rest)| rest);
        address.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
    };
    if !kafka.brokers.split(',').all(is_address) {
        check.add(
            "kafka.brokers",
            format!("found {:?}, allowed: host:port, several separated by commas", kafka.brokers),
        );
    }
    check.name("kafka.group_prefix", &kafka.group_prefix, 100);
    let limits = [LEAST_LIMIT, MESSAGE_LIMIT].map(|limit| ByteSize::b(limit as u64));
    check.range("kafka.record_limit", kafka.record_limit, limits);
    for property in kafka.properties.keys().filter(|property| OURS.contains(&property.as_str())) {
        let what = match property.as_str() {
            "bootstrap.servers" | "metadata.broker.list" => "set brokers instead",
            "group.id" => "set group_prefix instead",
            "group.instance.id" | "transactional.id" => "weir derives it from instance.name",
            _ => "weir sets it itself: its guarantees depend on it",
        };
        check.add(&format!("kafka.properties.{property}"), what);
    }
}

fn topics(check: &mut Check, config: &Config) {
    let topics = &config.topics;
    check.name("topics.prefix", &topics.prefix, 100);
    check.range("topics.request_partitions", topics.request_partitions, [1, 1_000]);
    check.range("topics.outcome_partitions", topics.outcome_partitions, [1, 100]);
    check.range("topics.delay_partitions", topics.delay_partitions, [1, 100]);
    check.range("topics.replication", topics.replication, [1, 15]);
    let keeps = [
        ("topics.keep_requests", topics.keep_requests),
        ("topics.keep_results", topics.keep_results),
        ("topics.keep_failures", topics.keep_failures),
        ("topics.keep_dead", topics.keep_dead),
    ];
    for (key, keep) in keeps {
        check.duration(key, keep, MINUTE..=3_650 * DAY);
    }
}

fn servers(check: &mut Check, config: &Config) {
    let clickhouse = &config.clickhouse;
    check.url("clickhouse.url", &clickhouse.url, &["http", "https"]);
    // The sink's own rules: the database's name, two passwords, a file that cannot be read.
    if let Err(error) = Store::connect(clickhouse) {
        let text = error.to_string();
        let key = text.split([' ', ':']).next().filter(|word| word.starts_with("clickhouse.")).unwrap_or("clickhouse");
        // A URL that is none has been named above.
        if !check.0.iter().any(|problem| problem.key == key) {
            check.add(key, text.strip_prefix(key).unwrap_or(&text).trim_start());
        }
    }
    check.duration("clickhouse.timeout", clickhouse.timeout, SECOND..=60 * MINUTE);
    if let Some(url) = &config.redis.url {
        check.url("redis.url", url.expose_secret(), &["redis", "rediss"]);
    }
}

fn cache(check: &mut Check, config: &Config) {
    for (key, what) in config.cache.problems() {
        check.add(&format!("cache.{key}"), what);
    }
    check.name("cache.prefix", &config.cache.prefix, 100);
    for source in &config.sources {
        if let Some(Err((key, what))) = source.common.cache.as_ref().map(cache::SourceConfig::rules) {
            check.add(&format!("source.{}.cache.{key}", source.common.name), what);
        }
    }
}

fn serve(check: &mut Check, config: &Config) {
    check.duration("serve.wait", config.serve.wait, Duration::from_millis(100)..=10 * MINUTE);
    check.range("serve.waiting", config.serve.waiting, [1, 100_000]);
    if let Some(listen) = config.serve.listen.filter(|listen| Some(*listen) == config.http.listen && listen.port() != 0)
    {
        let allowed = "another address than http.listen; leave it out to serve items there";
        check.add("serve.listen", format!("found {listen}, allowed: {allowed}"));
    }
}

fn fetch(check: &mut Check, config: &Config) {
    let fetch = &config.fetch;
    // The records of one transaction must be written before the broker rolls it back.
    check.duration("fetch.commit_every", fetch.commit_every, Duration::from_millis(1)..=TRANSACTION_TIMEOUT / 10);
    check.range("fetch.backlog", fetch.backlog, [1, 1_000_000]);
    check.range("fetch.calls_in_flight", fetch.calls_in_flight, [1, 65_536]);
    check.range("fetch.calls_in_flight_in_all", fetch.calls_in_flight_in_all, [1, 1_000_000]);
    // One reply may be this long.
    check.range("fetch.outcomes_limit", fetch.outcomes_limit, [ByteSize::mib(8), ByteSize::gib(4)]);
    match fetch.at_risk {
        AtRisk::Calls(calls) => check.range("fetch.at_risk", calls, [1, 10_000_000]),
        AtRisk::Within(time) => check.duration("fetch.at_risk", time, Duration::from_millis(100)..=60 * MINUTE),
    }
    check.duration("fetch.drain", fetch.drain, Duration::ZERO..=MINUTE);
}

fn quota(check: &mut Check, config: &Config) {
    if config.quota.store == quota::Store::Redis && config.redis.url.is_none() {
        check.add(
            "quota.store",
            "found \"redis\" without redis.url: set WEIR_REDIS__URL, or use \"memory\" for one process",
        );
    }
    check.name("quota.prefix", &config.quota.prefix, 100);
    check.range("quota.margin", config.quota.margin, [0.0, Pacing::MARGIN_MAX]);
    check.duration("quota.jitter", config.quota.jitter, Duration::ZERO..=Pacing::JITTER_MAX);
    let unknown = &config.quota.unknown;
    if let Err(invalid) = unknown.validate() {
        check.add("quota.unknown", invalid.to_string());
    } else if !unknown.is_paced() {
        check.add("quota.unknown", "found a budget, allowed: a limit of at most 10s, or one with spread = true");
    }
}

fn tokens(check: &mut Check, config: &Config) {
    let redis = config.redis.url.as_ref().map(ExposeSecret::expose_secret);
    if let Err(error) = tokens::open(&config.tokens, config.folder(), redis, &config.quota.prefix) {
        check.add("tokens.store", error.to_string());
    }
    if config.tokens.file.file_name().is_none() {
        check.add("tokens.file", format!("found {}, allowed: a file's path", config.tokens.file.display()));
    }
}

fn retry(check: &mut Check, config: &Config) {
    policy(check, "retry", &config.retry.policy);
    for (index, (rule, effect)) in config.retry.rules().enumerate() {
        let key = format!("retry.rule.#{}", index + 1);
        policy(check, &key, &effect);
        if let Some(source) = rule.source.as_ref().filter(|name| config.source(name.as_str()).is_none()) {
            check.add(&format!("{key}.source"), format!("found {source:?}, which is not a configured source"));
        }
        if rule.classes.contains(&Class::Bug) {
            check.add(&format!("{key}.class"), "found bug: requests of this class are never retried");
        }
    }
    check.range("retry.memory", config.retry.memory, [ByteSize::mib(1), ByteSize::gib(4)]);
}

fn policy(check: &mut Check, key: &str, policy: &Policy) {
    check.range(&format!("{key}.attempts"), policy.attempts, [1, 1_000]);
    check.duration(&format!("{key}.base"), policy.base, Duration::from_millis(1)..=DAY);
    check.range(&format!("{key}.factor"), policy.factor, [1.0, 100.0]);
    check.duration(&format!("{key}.cap"), policy.cap, Duration::from_millis(1)..=7 * DAY);
    if policy.cap < policy.base {
        let (base, cap) = (duration_text(policy.base), duration_text(policy.cap));
        check.add(&format!("{key}.cap"), format!("found {cap}, allowed: at least {key}.base, which is {base}"));
    }
    check.duration(&format!("{key}.age_limit"), policy.age_limit, SECOND..=365 * DAY);
}

fn changes(check: &mut Check, config: &Config) {
    check.range("changes.rows", config.changes.rows, [1, 100_000]);
    check.duration("changes.age", config.changes.age, Duration::from_millis(10)..=MINUTE);
}

fn sink(check: &mut Check, config: &Config) {
    check.range("sink.rows", config.sink.rows, [1, 1_000_000]);
    check.range("sink.bytes", config.sink.bytes, [ByteSize::kib(64), ByteSize::mib(256)]);
    // A block that is full and one that fills must both find room.
    check.range("sink.memory", config.sink.memory, [config.sink.bytes * 2u64, ByteSize::gib(64)]);
    check.duration("sink.age", config.sink.age, Duration::from_millis(10)..=5 * MINUTE);
}

fn batches(check: &mut Check, config: &Config) {
    if Webhook::open(&config.batches).is_err() {
        check.add("batches.webhook", "found another text, allowed: an http:// or https:// address");
    }
    if config.batches.authorization.is_some() && config.batches.webhook.is_none() {
        check.add("batches.authorization", "is for a webhook, and batches.webhook is not set");
    }
    check.duration("batches.settle", config.batches.settle, SECOND..=60 * MINUTE);
}

fn sources(check: &mut Check, config: &Config) {
    let topics = Topics::new(config.topics.clone());
    let mut seen = BTreeSet::new();
    for source in &config.sources {
        let key = |name: &str| format!("source.{}.{name}", source.common.name);
        if !seen.insert(&source.common.name) {
            check.add(&key("name"), "there are two sources of this name");
        }
        if source.common.name.as_str().ends_with(topics::EXPRESS) {
            check.add(
                &key("name"),
                format!("a name that ends in {} is another source's express topic", topics::EXPRESS),
            );
        }
        if let Some(fallback) = &source.common.fallback {
            let is_other = *fallback != source.common.name && config.source(fallback.as_str()).is_some();
            if !is_other {
                check.add(
                    &key("fallback"),
                    format!("found {:?}, allowed: the name of another [[source]]", fallback.as_str()),
                );
            }
        }
        // It becomes part of a topic's name.
        check.name(&key("name"), source.common.name.as_str(), 64);
        if topics.express(&source.common.name).len() > TOPIC_LIMIT {
            check.add(&key("name"), format!("its topic name would be longer than {TOPIC_LIMIT} characters"));
        }
    }
}

fn calendar(check: &mut Check, config: &Config) {
    let mut seen = BTreeSet::new();
    for window in &config.calendar {
        let key = |name: &str| format!("calendar.{}.{name}", window.name());
        if window.name().trim().is_empty() || !seen.insert(window.name()) {
            check.add(&key("name"), "each window needs a name of its own, for logs and for `weir check`");
        }
        for source in window.sources().iter().filter(|source| config.source(source.as_str()).is_none()) {
            check.add(&key("sources"), format!("found {:?}, allowed: names of [[source]]", source.as_str()));
        }
    }
}
