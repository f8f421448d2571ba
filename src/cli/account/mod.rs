//! `weir account`: the credentials that sources are called with, and their tokens.

mod add;
mod authorise;
mod list;
mod slot;
mod test;

use std::sync::Arc;

use clap::Subcommand;

use super::exit::{Ended, Exit};
use crate::{
    config::{self, Config},
    message::AccountAlias,
    platform::{Account, Source, SourceConfig},
    tokens::{
        Record, TokenStore,
        life::{self, Choice},
    },
};

/// `weir account …`
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the accounts and the state of their tokens. Shows no secrets.
    #[command(after_long_help = list::EXAMPLES)]
    List(list::Args),
    /// Make one harmless call with an account and explain the answer.
    #[command(after_long_help = test::EXAMPLES)]
    Test(test::Args),
    /// Have a user authorise the app: print the link, then exchange the returned code for tokens.
    #[command(long_about = authorise::LONG_ABOUT, after_long_help = authorise::EXAMPLES)]
    Authorise(authorise::Args),
    /// Add an account to a source's `accounts_file`.
    #[command(long_about = add::LONG_ABOUT, after_long_help = add::EXAMPLES)]
    Add(add::Args),
}

pub(super) async fn run(command: Command, config: &Config) -> anyhow::Result<Exit> {
    match command {
        Command::List(args) => list::run(&args, config).await,
        Command::Test(args) => test::run(&args, config).await,
        Command::Authorise(args) => authorise::run(args, config).await,
        Command::Add(args) => add::run(&args, config).await,
    }
}

/// The configuration of the source of this name.
fn source_named<'c>(config: &'c Config, name: &str) -> anyhow::Result<&'c SourceConfig> {
    config.source(name).ok_or_else(|| {
        let names: Vec<_> = config.sources.iter().map(|source| source.common.name.as_str()).collect();
        let there = if names.is_empty() {
            "no [[source]] is configured".to_owned()
        } else {
            format!("configured: {}", names.join(", "))
        };
        Ended::usage(format!("there is no source {name:?}: {there}")).into()
    })
}

fn opened(config: &Config, name: &str) -> anyhow::Result<Source> {
    Ok(Source::open(source_named(config, name)?, config.folder(), &config::variable)?)
}

/// An account of a source, and what is stored of its tokens.
struct Found {
    source: Source,
    index: usize,
    store: Arc<dyn TokenStore>,
    record: Option<Record>,
}

impl Found {
    async fn find(config: &Config, source: &str, alias: &AccountAlias) -> anyhow::Result<Self> {
        let source = opened(config, source)?;
        let index = source.accounts.iter().position(|account| account.alias == *alias).ok_or_else(|| {
            Ended::usage(format!("source {} has no account {alias}: see `weir account list`", source.name))
        })?;
        let store = config.token_store()?;
        let record = store.get(&source.name, alias).await?;
        Ok(Self { source, index, store, record })
    }

    /// As it is configured.
    fn configured(&self) -> &Account {
        &self.source.accounts[self.index]
    }

    /// With the tokens that roles would call with.
    fn effective(&self) -> Account {
        effective(self.configured(), self.record.as_ref())
    }
}

fn effective(account: &Account, record: Option<&Record>) -> Account {
    match (life::choose(account, record), record) {
        (Choice::Stored, Some(record)) => life::with_tokens_of(account, record),
        _ => account.clone(),
    }
}
