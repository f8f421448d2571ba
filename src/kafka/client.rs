//! `[kafka]`: the brokers, and the settings of every client that we make.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// `[kafka]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// `host:port`, several separated by commas.
    pub brokers: String,
    /// What every consumer group's name begins with.
    pub group_prefix: String,
    /// Any librdkafka property (`security.protocol`, `sasl.username`, …), passed to every client as it is.
    pub properties: BTreeMap<String, String>,
}

impl Default for Config {
    fn default() -> Self {
        Self { brokers: "127.0.0.1:9092".to_owned(), group_prefix: "weir".to_owned(), properties: BTreeMap::new() }
    }
}
