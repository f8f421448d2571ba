//! Merges defaults, file and environment; each value keeps its origin for error messages.

use std::path::Path;

use figment::{
    Figment, Metadata, Profile, Provider,
    error::Kind,
    providers::{Format, Toml},
    value::{Dict, Map, Num, Value},
};
use serde::de::DeserializeOwned;

use super::{
    Config,
    problem::{ConfigError, Problem, is_secret, words},
};
use crate::platform::SourceConfig;

/// What the variables that override a key begin with.
const PREFIX: &str = "WEIR_";

/// What the name of a place begins with if it is one.
const VARIABLE: &str = "variable ";

/// Values from one place.
#[derive(Clone)]
struct Layer {
    place: String,
    values: Dict,
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.place.clone())
    }
    fn data(&self) -> figment::Result<Map<Profile, Dict>> {
        Ok(Profile::Default.collect(self.values.clone()))
    }
}

/// Puts the layers on each other. What cannot be used is left out and named, so that one run finds all of it.
pub(super) fn assemble(
    file: Option<(&Path, &str)>,
    variables: impl IntoIterator<Item = (String, String)>,
) -> Result<(Config, Vec<Problem>), ConfigError> {
    let mut problems = Vec::new();
    let mut figment = Figment::new();
    if let Some((path, text)) = file {
        let layer = file_layer(path, text)?;
        problems.extend(secrets_in_file(&layer));
        figment = figment.merge(layer);
    }
    let mut variables: Vec<_> = variables.into_iter().filter(|(_, value)| !value.is_empty()).collect();
    variables.sort();
    for (name, value) in &variables {
        match variable_layer(name, value) {
            Ok(Some(layer)) => figment = figment.merge(layer),
            Ok(None) => {}
            Err(problem) => problems.push(problem),
        }
    }
    let mut values = figment.data().unwrap_or_default().remove(&Profile::Default).unwrap_or_default();
    problems.extend(without_removed(&mut values, &figment));
    let sources = values.remove("source");
    let mut config: Config = decode(Value::from(values), &figment, "", &mut problems).unwrap_or_default();
    config.sources = sources.map(|list| decode_sources(list, &figment, &mut problems)).unwrap_or_default();
    Ok((config, problems))
}

fn file_layer(path: &Path, text: &str) -> Result<Layer, ConfigError> {
    let text = text.trim_start_matches('\u{feff}');
    let mut values: Dict = Toml::from_str(text)
        .map_err(|error| ConfigError::Syntax { path: path.to_owned(), reason: error.to_string().trim().to_owned() })?;
    if let Some(Value::Dict(_, kafka)) = values.get_mut("kafka")
        && let Some(Value::Dict(_, properties)) = kafka.get_mut("properties")
    {
        *properties = flat(properties);
    }
    Ok(Layer { place: path.display().to_string(), values })
}

/// What 0.1.0 had settings for, and its example file set: how a worker went on without Redis. They are passed over, but
/// whoever asked for what there is no more has to know.
fn without_removed(values: &mut Dict, places: &Figment) -> Option<Problem> {
    let Some(Value::Dict(_, quota)) = values.get_mut("quota") else { return None };
    for key in ["reserve", "workers_max", "share_for"] {
        quota.remove(key);
    }
    let value = quota.remove("on_redis_loss")?;
    if value.as_str() == Some("stop") {
        return None;
    }
    let what = "there is only \"stop\" now: without Redis a worker uses up the slots that it has (4 s at most), then calls \
                stop until Redis is back. Remove this line, and reserve, workers_max and share_for";
    let place = places.get_metadata(value.tag()).map(|metadata| metadata.name.to_string());
    Some(Problem { key: "quota.on_redis_loss".to_owned(), place, what: what.to_owned() })
}

/// librdkafka's property names have dots, which TOML reads as tables, and its numbers are texts: take both forms.
fn flat(properties: &Dict) -> Dict {
    let mut out = Dict::new();
    for (key, value) in properties {
        match value {
            Value::Dict(_, inner) => {
                out.extend(flat(inner).into_iter().map(|(rest, value)| (format!("{key}.{rest}"), value)));
            }
            Value::Num(tag, number) => drop(out.insert(key.clone(), Value::String(*tag, number_text(*number)))),
            Value::Bool(tag, is) => drop(out.insert(key.clone(), Value::String(*tag, is.to_string()))),
            Value::String(..) | Value::Char(..) | Value::Empty(..) | Value::Array(..) => {
                out.insert(key.clone(), value.clone());
            }
        }
    }
    out
}

fn number_text(number: Num) -> String {
    match (number.to_i128(), number.to_u128(), number.to_f64()) {
        (Some(number), _, _) => number.to_string(),
        (_, Some(number), _) => number.to_string(),
        (_, _, number) => number.unwrap_or_default().to_string(),
    }
}

/// A configuration file is committed and shared: it may name a secret's file, but not hold the secret.
fn secrets_in_file(layer: &Layer) -> Vec<Problem> {
    let text = |section: &str, key: &str| Some(layer.values.get(section)?.as_dict()?.get(key)?.as_str()?.to_owned());
    let mut found = Vec::new();
    if text("clickhouse", "password").is_some() {
        found.push(("clickhouse.password".to_owned(), "WEIR_CLICKHOUSE__PASSWORD, or password_file"));
    }
    if text("redis", "url").is_some_and(|url| super::print::without_password(&url) != url) {
        found.push(("redis.url".to_owned(), "WEIR_REDIS__URL"));
    }
    if layer.values.get("tokens").and_then(|tokens| tokens.as_dict()?.get("key")).is_some() {
        found.push(("tokens.key".to_owned(), "WEIR_TOKENS__KEY"));
    }
    for (key, instead) in [("webhook", "WEIR_BATCHES__WEBHOOK"), ("authorization", "WEIR_BATCHES__AUTHORIZATION")] {
        if layer.values.get("batches").and_then(|batches| batches.as_dict()?.get(key)).is_some() {
            found.push((format!("batches.{key}"), instead));
        }
    }
    let properties = layer.values.get("kafka").and_then(|kafka| kafka.as_dict()?.get("properties")?.as_dict());
    for key in properties.into_iter().flat_map(Dict::keys).filter(|key| is_secret(key)) {
        found.push((format!("kafka.properties.{key}"), "a variable such as WEIR_KAFKA__PROPERTIES__SASL_PASSWORD"));
    }
    let problem = |(key, instead): (String, &str)| Problem {
        key,
        place: Some(layer.place.clone()),
        what: format!("a secret must not stand in the configuration file; use {instead}"),
    };
    found.into_iter().map(problem).collect()
}

/// `WEIR_<SECTION>__<KEY>`; other variables are not ours, unless they miss just one underscore.
fn variable_layer(name: &str, value: &str) -> Result<Option<Layer>, Problem> {
    let Some(rest) = name.strip_prefix(PREFIX) else { return Ok(None) };
    let place = format!("{VARIABLE}{name}");
    let Some((section, key)) = rest.split_once("__") else { return one_underscore(rest, place) };
    let (section, key) = (section.to_ascii_lowercase(), key.to_ascii_lowercase());
    if section == "source" {
        let what = "sources are declared in the file only; a source's secrets stand in its accounts_file";
        return Err(Problem { key: section, place: Some(place), what: what.to_owned() });
    }
    let mut path = vec![section];
    match key.strip_prefix("properties__") {
        // sasl.password, as a name that a shell can set.
        Some(property) if path[0] == "kafka" => {
            path.push("properties".to_owned());
            path.push(property.replace("__", ".").replace('_', "."));
        }
        _ => path.extend(key.split("__").map(str::to_owned)),
    }
    let nest = |inner: Value, key: &String| Value::from(Dict::from([(key.clone(), inner)]));
    let values = path.iter().rev().fold(Value::from(value), nest).into_dict().unwrap_or_default();
    Ok(Some(Layer { place, values }))
}

/// `WEIR_KAFKA_BROKERS` would be ignored silently. Only for keys that exist: Kubernetes makes variables like
/// `WEIR_FETCH_PORT` out of a service's name.
fn one_underscore(rest: &str, place: String) -> Result<Option<Layer>, Problem> {
    let Some((section, key)) = rest.split_once('_') else { return Ok(None) };
    let name = format!("{}.{}", section.to_ascii_lowercase(), key.to_ascii_lowercase());
    if !super::print::keys().contains(&name) {
        return Ok(None);
    }
    let what = format!("section and key are separated by two underscores: {PREFIX}{section}__{key}");
    Err(Problem { key: name, place: Some(place), what })
}

fn decode_sources(list: Value, places: &Figment, problems: &mut Vec<Problem>) -> Vec<SourceConfig> {
    let Value::Array(_, elements) = list else {
        problems.push(Problem::new("source", "found a single table, allowed: [[source]], once for each source"));
        return Vec::new();
    };
    let named = |(index, element): (usize, Value)| {
        let name = element.as_dict().and_then(|source| source.get("name")?.as_str().map(str::to_owned));
        (format!("source.{}", name.unwrap_or_else(|| format!("#{}", index + 1))), element)
    };
    let each = elements.into_iter().enumerate().map(named);
    each.filter_map(|(key, element)| decode_by(SourceConfig::read, element, places, &key, problems)).collect()
}

/// Reads a `T` as serde does.
fn decode<T: DeserializeOwned>(tree: Value, places: &Figment, prefix: &str, problems: &mut Vec<Problem>) -> Option<T> {
    decode_by(as_serde_does, tree, places, prefix, problems)
}

#[allow(clippy::result_large_err, reason = "figment's, and read once at a start")]
fn as_serde_does<T: DeserializeOwned>(tree: &Value) -> Result<T, figment::Error> {
    tree.deserialize()
}

/// Reads a `T`; a value that does not fit is reported, taken out, and the rest is read again.
fn decode_by<T>(
    read: impl Fn(&Value) -> Result<T, figment::Error>,
    mut tree: Value,
    places: &Figment,
    prefix: &str,
    problems: &mut Vec<Problem>,
) -> Option<T> {
    loop {
        let error = match read(&tree) {
            Ok(value) => return Some(value),
            Err(error) => error,
        };
        let place = place_of(&tree, &error.path, places);
        // Quotes in the file mean a text; a variable has nothing but texts.
        let is_variable = place.as_ref().is_some_and(|place| place.starts_with(VARIABLE));
        if let Some(better) = as_scalar(&tree, &error.path, &error.kind).filter(|_| is_variable) {
            replace(&mut tree, &error.path, Some(better));
            continue;
        }
        let mut path: Vec<&str> = [prefix].into_iter().filter(|part| !part.is_empty()).collect();
        path.extend(error.path.iter().map(String::as_str));
        if let Kind::MissingField(name) = &error.kind {
            path.push(name);
        }
        let key = path.join(".");
        problems.push(Problem { what: words(&key, &error.kind), place, key });
        if !replace(&mut tree, &error.path, None) {
            return None;
        }
    }
}

/// A text where the key wants something else, read as a number or a boolean.
fn as_scalar(tree: &Value, path: &[String], kind: &Kind) -> Option<Value> {
    let Kind::InvalidType(_, _) = kind else { return None };
    let Value::String(tag, text) = descend(tree, path)? else { return None };
    let number = |number: Num| Value::Num(*tag, number);
    let whole = text.parse::<i64>().ok().map(|n| number(Num::I64(n)));
    let unsigned = || text.parse::<u64>().ok().map(|n| number(Num::U64(n)));
    let float = || text.parse::<f64>().ok().map(|n| number(Num::F64(n)));
    whole.or_else(unsigned).or_else(float).or_else(|| text.parse().ok().map(|is| Value::Bool(*tag, is)))
}

fn descend<'a>(tree: &'a Value, path: &[String]) -> Option<&'a Value> {
    path.iter().try_fold(tree, |value, key| match value {
        Value::Dict(_, inner) => inner.get(key),
        Value::Array(_, list) => list.get(key.parse::<usize>().ok()?),
        Value::String(..) | Value::Char(..) | Value::Bool(..) | Value::Num(..) | Value::Empty(..) => None,
    })
}

/// Puts another value in a value's place, or takes it out. False if there is none, or if it stands in a list,
/// whose other elements would move.
fn replace(tree: &mut Value, path: &[String], with: Option<Value>) -> bool {
    let Value::Dict(_, dict) = tree else { return false };
    match (path, with) {
        ([], _) => false,
        ([key], None) => dict.remove(key).is_some(),
        ([key], Some(value)) => dict.insert(key.clone(), value).is_some(),
        ([key, rest @ ..], with) => dict.get_mut(key).is_some_and(|inner| replace(inner, rest, with)),
    }
}

/// The file or the variable that a value comes from; of a table, that of its first value.
fn place_of(tree: &Value, path: &[String], places: &Figment) -> Option<String> {
    let place = |value: &Value| places.get_metadata(value.tag()).map(|metadata| metadata.name.to_string());
    let value = (0..=path.len()).rev().find_map(|end| descend(tree, &path[..end]))?;
    place(value).or_else(|| place(value.as_dict()?.values().next()?))
}
