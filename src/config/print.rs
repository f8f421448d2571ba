//! The effective configuration as TOML, with every secret hidden.

use std::{collections::BTreeSet, path::Path, time::Duration};

use serde::Serialize;
use toml::{Table, Value};

use super::{Config, problem::is_secret};
use crate::{
    cache, changes, fetch, kafka,
    platform::SourceConfig,
    quota, retry,
    runtime::{self, duration_text::duration_text},
    serve, sink, tokens, topics,
};

/// What stands in place of a secret.
const HIDDEN: &str = "***";

/// The sections in the order of the example file, without the types that cannot be printed.
#[derive(Serialize)]
struct Printed<'a> {
    instance: Instance<'a>,
    kafka: &'a kafka::client::Config,
    topics: &'a topics::Config,
    clickhouse: ClickHouse<'a>,
    redis: Redis,
    cache: &'a cache::Config,
    fetch: &'a fetch::Config,
    quota: &'a quota::Config,
    tokens: Tokens<'a>,
    retry: &'a retry::Config,
    changes: &'a changes::Config,
    sink: &'a sink::Config,
    serve: &'a serve::Config,
    batches: Batches,
    http: &'a runtime::health::Config,
    log: &'a runtime::logging::Config,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    calendar: &'a [quota::calendar::Window],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    source: &'a [SourceConfig],
}

#[derive(Serialize)]
struct Instance<'a> {
    name: &'a str,
}

#[derive(Serialize)]
struct ClickHouse<'a> {
    url: &'a str,
    database: &'a str,
    user: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    password: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    password_file: Option<&'a Path>,
    #[serde(with = "humantime_serde")]
    timeout: Duration,
}

#[derive(Serialize)]
struct Redis {
    #[serde(skip_serializing_if = "Option::is_none")]
    url: Option<String>,
}

#[derive(Serialize)]
struct Tokens<'a> {
    store: tokens::Store,
    file: &'a Path,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'static str>,
}

#[derive(Serialize)]
struct Batches {
    #[serde(skip_serializing_if = "Option::is_none")]
    webhook: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    authorization: Option<&'static str>,
    topic: bool,
    #[serde(with = "humantime_serde")]
    settle: Duration,
}

/// The configuration as TOML that [`super::load`] reads again, apart from the secrets.
pub(super) fn redacted(config: &Config) -> String {
    let mut table = table(config);
    hide(&mut table, "");
    toml::to_string(&table).unwrap_or_else(|error| format!("# cannot be printed: {error}\n"))
}

fn table(config: &Config) -> Table {
    use secrecy::ExposeSecret;
    let clickhouse = &config.clickhouse;
    let printed = Printed {
        instance: Instance { name: &config.instance.name },
        kafka: &config.kafka,
        topics: &config.topics,
        clickhouse: ClickHouse {
            url: &clickhouse.url,
            database: &clickhouse.database,
            user: &clickhouse.user,
            password: clickhouse.password.as_ref().map(|_| HIDDEN),
            password_file: clickhouse.password_file.as_deref(),
            timeout: clickhouse.timeout,
        },
        redis: Redis { url: config.redis.url.as_ref().map(|url| without_password(url.expose_secret())) },
        cache: &config.cache,
        fetch: &config.fetch,
        quota: &config.quota,
        tokens: Tokens {
            store: config.tokens.store,
            file: &config.tokens.file,
            key: config.tokens.key.as_ref().map(|_| HIDDEN),
        },
        retry: &config.retry,
        changes: &config.changes,
        sink: &config.sink,
        serve: &config.serve,
        batches: Batches {
            webhook: config.batches.webhook.as_ref().map(|_| HIDDEN),
            authorization: config.batches.authorization.as_ref().map(|_| HIDDEN),
            topic: config.batches.topic,
            settle: config.batches.settle,
        },
        http: &config.http,
        log: &config.log,
        calendar: &config.calendar,
        source: &config.sources,
    };
    Table::try_from(&printed).unwrap_or_default()
}

/// Hides by name and by form, wherever it stands: a section that is added later is covered too.
fn hide(table: &mut Table, prefix: &str) {
    for (key, value) in table.iter_mut() {
        hide_value(value, &format!("{prefix}{key}"));
    }
}

fn hide_value(value: &mut Value, key: &str) {
    match value {
        Value::Table(inner) => hide(inner, &format!("{key}.")),
        Value::Array(elements) => elements.iter_mut().for_each(|element| hide_value(element, key)),
        Value::String(text) if is_secret(last(key)) => HIDDEN.clone_into(text),
        Value::String(text) => *text = in_days(text).unwrap_or_else(|| without_password(text)),
        Value::Integer(_) | Value::Float(_) | Value::Boolean(_) | Value::Datetime(_) => {}
    }
}

/// A text that serde has made of a duration, as [`duration_text`]; any other text is left alone.
fn in_days(text: &str) -> Option<String> {
    let parsed = humantime::parse_duration(text).ok().filter(|_| text.contains(' '))?;
    Some(duration_text(parsed))
}

/// The key without its section; properties of Kafka have dots of their own.
fn last(key: &str) -> &str {
    key.strip_prefix("kafka.properties.").unwrap_or_else(|| key.rsplit('.').next().unwrap_or(key))
}

/// A URL with the password between `:` and `@` hidden; any other text as it is.
pub(super) fn without_password(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else { return text.to_owned() };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    // A password may hold a `/` that should have been encoded: then the last `@` is still its end.
    let Some(at) = rest[..end].rfind('@').or_else(|| rest.rfind('@')) else { return text.to_owned() };
    match rest[..at].split_once(':') {
        Some((user, _)) => format!("{scheme}://{user}:{HIDDEN}@{}", &rest[at + 1..]),
        None => text.to_owned(),
    }
}

/// Every key outside `[[source]]`, as `section.key`, optional ones too.
pub(super) fn keys() -> BTreeSet<String> {
    let mut config = Config::default();
    config.clickhouse.password = Some(HIDDEN.into());
    config.clickhouse.password_file = Some(HIDDEN.into());
    config.redis.url = Some(HIDDEN.into());
    config.tokens.key = Some(HIDDEN.into());
    config.batches.webhook = Some(HIDDEN.into());
    config.batches.authorization = Some(HIDDEN.into());
    let table = table(&config);
    let sections = table.iter().filter_map(|(section, value)| Some((section, value.as_table()?)));
    sections.flat_map(|(section, keys)| keys.keys().map(move |key| format!("{section}.{key}"))).collect()
}
