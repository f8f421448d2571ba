//! `weir topics`: creates and lists the Kafka topics.

use std::collections::HashMap;

use clap::Subcommand;

use super::{
    exit::Exit,
    terminal::{counted, note, say, table},
};
use crate::{
    config::Config,
    kafka::{
        admin::{self, Change},
        logs,
    },
    runtime::duration_text::duration_text,
    topics::{Topic, Topics},
};

/// `weir topics …`
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create what is missing, add partitions, set retention. Safe to repeat.
    #[command(after_long_help = "\
Example:
  weir --config weir.toml topics apply

Partitions are only added: Kafka cannot remove them. Records stay where they are; weir does not depend on which \
partition a key is in. Number of partitions, replication and retention are set in [topics].")]
    Apply,
    /// List each topic: its content, partitions and retention.
    List,
}

pub(super) async fn run(command: &Command, config: &Config) -> anyhow::Result<Exit> {
    let topics = Topics::new(config.topics.clone());
    let wanted = [topics.all(&config.source_names()), topics.delays()].concat();
    if config.sources.is_empty() {
        note("no [[source]] is configured, so no request topics");
    }
    match command {
        Command::Apply => {
            for change in admin::apply(&config.kafka, &wanted, topics.replication()).await? {
                say(&words(&change))?;
            }
            let names: Vec<String> = wanted.into_iter().map(|topic| topic.name).collect();
            logs::note(&config.kafka, &names).await?;
        }
        Command::List => {
            let present = admin::describe(&config.kafka).await?;
            let rows: Vec<_> = wanted.iter().map(|topic| row(topic, &present)).collect();
            say(&table(&["topic", "holds", "partitions", "kept for", ""], &rows))?;
        }
    }
    Ok(Exit::Done)
}

fn words(change: &Change) -> String {
    match change {
        Change::Created { topic, partitions } => {
            format!("created  {topic}, {}", counted(number(*partitions), "partition"))
        }
        Change::Grown { topic, from, to } => format!("extended {topic}, from {from} to {to} partitions"),
        Change::Kept { topic, partitions } => {
            format!("kept     {topic}, {}", counted(number(*partitions), "partition"))
        }
    }
}

fn row(topic: &Topic, present: &HashMap<String, i32>) -> Vec<String> {
    let found = present.get(&topic.name);
    let verdict = verdict(topic, present).unwrap_or_default();
    let partitions = found.map_or_else(|| "-".to_owned(), ToString::to_string);
    let keep = if topic.is_compacted() { "forever (compacted)".to_owned() } else { duration_text(topic.keep) };
    vec![topic.name.clone(), topic.kind.ce_type().to_owned(), partitions, keep, verdict]
}

fn number(partitions: i32) -> u64 {
    u64::try_from(partitions).unwrap_or(0)
}

/// What is wrong with a topic, if anything.
pub(super) fn verdict(topic: &Topic, present: &HashMap<String, i32>) -> Option<String> {
    match present.get(&topic.name) {
        None => Some("missing".to_owned()),
        Some(&found) if found < topic.partitions => {
            Some(format!("{} instead of {}", counted(number(found), "partition"), topic.partitions))
        }
        Some(_) => None,
    }
}
