//! Logs on standard error: text for people, or one JSON object a line for machines.

use std::io;

use serde::{Deserialize, Serialize};
use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt, registry::Registry, util::SubscriberInitExt};

/// `[log]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// How a line looks.
    pub format: Format,
    /// What is logged: a level, or levels by target: `info,weir::fetch=debug`.
    pub filter: String,
}

impl Default for Config {
    fn default() -> Self {
        Self { format: Format::Text, filter: "info".to_owned() }
    }
}

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Libraries that say at `info`, or twice, what weir says itself. The user's filter may turn each on again.
const QUIET: &str = "librdkafka=error,rdkafka=off,hyper=warn,hyper_util=warn,reqwest=warn,h2=warn,clickhouse=warn";

/// A command that ends reports a lost broker in its own words; librdkafka would repeat it every second.
const QUIET_COMMAND: &str = "librdkafka=off";

/// Who is logging: a role that runs for months, or a command with a person in front of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience {
    /// A role: everything that the filter lets through.
    Role,
    /// A command: warnings, unless the user asks for more.
    Command,
}

/// Checks a filter before anything is started with it.
///
/// # Errors
/// What is wrong with it, in tracing's words.
pub fn check_filter(filter: &str) -> Result<(), String> {
    EnvFilter::builder().parse(filter).map(drop).map_err(|error| error.to_string())
}

/// The whole filter: what is quiet by default, then the user's, then `-v` (debug) or `-vv` (trace) for weir.
fn directives(config: &Config, audience: Audience, verbose: u8) -> String {
    let filter = match (audience, verbose) {
        (Audience::Command, 0) if config.filter == Config::default().filter => "warn",
        _ => config.filter.as_str(),
    };
    let mut parts = vec![QUIET];
    if audience == Audience::Command && verbose == 0 {
        parts.push(QUIET_COMMAND);
    }
    parts.push(filter);
    match verbose {
        0 => {}
        1 => parts.push("weir=debug"),
        _ => parts.push("weir=trace,librdkafka=debug"),
    }
    parts.join(",")
}

/// Starts logging. Once per process.
///
/// # Errors
/// A filter that [`check_filter`] refuses, or a second call.
pub fn start(config: &Config, audience: Audience, verbose: u8) -> Result<(), String> {
    let filter =
        EnvFilter::builder().parse(directives(config, audience, verbose)).map_err(|error| error.to_string())?;
    let registry = Registry::default().with(filter);
    let lines = fmt::layer().with_writer(io::stderr).with_target(false);
    match config.format {
        Format::Text => registry.with(lines.with_ansi(console::colors_enabled_stderr())).try_init(),
        Format::Json => registry.with(lines.json().flatten_event(true).with_target(true)).try_init(),
    }
    .map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_the_verbosity_the_filter_can_be_parsed() {
        for audience in [Audience::Role, Audience::Command] {
            for verbose in 0..4 {
                let all = directives(&Config::default(), audience, verbose);
                assert_eq!(check_filter(&all), Ok(()), "{all}");
            }
        }
    }

    #[test]
    fn the_users_filter_comes_after_ours_so_that_it_wins() {
        let config = Config { filter: "info,librdkafka=debug".to_owned(), ..Config::default() };
        let all = directives(&config, Audience::Role, 0);
        assert!(all.rfind("librdkafka=debug") > all.rfind("librdkafka=error"), "{all}");
    }

    #[test]
    fn a_command_is_quiet_unless_the_user_asks_for_more() {
        assert!(directives(&Config::default(), Audience::Command, 0).ends_with(",warn"));
        assert!(directives(&Config::default(), Audience::Command, 1).ends_with("info,weir=debug"));
        assert!(directives(&Config::default(), Audience::Role, 0).ends_with(",info"));
    }

    #[test]
    fn a_broken_filter_is_refused() {
        assert!(check_filter("weir=loud").is_err());
    }
}
