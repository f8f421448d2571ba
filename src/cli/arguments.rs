//! Arguments that several commands share, and their parsing.

use std::time::Duration;

use super::exit::Ended;
use crate::{config::Config, message::SourceName, platform::SourceConfig};

/// The source of this name, or an error that lists those that there are.
pub(super) fn known_source<'a>(config: &'a Config, name: &SourceName) -> anyhow::Result<&'a SourceConfig> {
    config.source(name.as_str()).ok_or_else(|| {
        let names: Vec<_> = config.sources.iter().map(|source| source.common.name.as_str()).collect();
        let file =
            config.file.as_ref().map_or("no configuration file was read".to_owned(), |f| f.display().to_string());
        let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        let message = format!("there is no source {:?}; configured: {known} ({file})", name.as_str());
        Ended::usage(message).into()
    })
}

/// A parameter of a vendor's API.
pub(super) fn parameter(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write it as NAME=VALUE".to_owned()),
    }
}

/// Reads a duration.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|_| "give a time such as 90s, 10m, 2h".to_owned())
}

/// A duration; a bare number counts seconds.
pub(super) fn age(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().map(Duration::from_secs);
    seconds.map_or_else(|| duration(text), Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_that_is_none_is_told_how_to_be_written() {
        assert_eq!(duration("10m"), Ok(Duration::from_secs(600)));
        for text in ["soon", "10", ""] {
            assert_eq!(duration(text), Err("give a time such as 90s, 10m, 2h".to_owned()), "{text:?}");
        }
    }
}
