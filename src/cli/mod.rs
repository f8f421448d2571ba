//! One file per command that is not a stage; here the command line as a whole.

mod account;
mod arguments;
mod batches;
mod cache;
mod changes;
mod check;
mod dead;
mod elsewhere;
mod enqueue;
pub mod exit;
mod export;
mod get;
mod groups;
mod outlast;
mod piece;
mod query;
mod quota;
mod reading;
mod rebuild;
mod replay;
mod run;
mod schema;
mod status;
pub mod terminal;
mod topics;
mod trace;
mod verify;
mod waiting;
mod watch;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Parser, Subcommand};
use tokio_util::sync::CancellationToken;

use self::exit::Exit;
use crate::{
    config::Config,
    run::Role,
    runtime::{
        clock::Clock,
        logging::{Audience, Format},
    },
    simulate,
};

const ABOUT: &str = "Collects data from rate-limited vendor APIs: IDs on Kafka in, one row per ID in ClickHouse out";

const LONG_ABOUT: &str = "\
Collects data from rate-limited vendor APIs: IDs on Kafka in, one row per ID in ClickHouse out.

IDs wait on a topic per source; fetch calls the vendor within each account's rate limit; results and failures are \
written to Kafka in transactions; retry repeats failed requests after a delay; changes publishes how items differ from \
their last result; the sink writes every record to ClickHouse.";

const EXAMPLES: &str = "\
A first collection:
  weir check                                       # test configuration and connections
  weir topics apply && weir schema apply           # create topics and tables; safe to repeat
  weir run                                         # all roles in one process, until Ctrl-C
  weir enqueue ids.txt --source ali1688 --wait     # request the IDs of a file, follow them
  weir query \"SELECT * FROM items LIMIT 5\"         # look at the rows

Exit codes:
  0 done, 1 failed, 64 invalid configuration or usage, 69 a server cannot be reached,
  75 another process has this instance's name, 130 stopped by a signal before the end";

/// The command line.
#[derive(Debug, Parser)]
#[command(name = "weir", version, about = ABOUT, long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
#[command(after_help = "`weir help` explains more, `weir help COMMAND` has examples.")]
#[command(max_term_width = 110)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Everywhere")]
struct Global {
    /// The configuration file; without it ./weir.toml, if that exists.
    #[arg(long, global = true, env = "WEIR_CONFIG", value_name = "FILE", hide_env_values = true)]
    config: Option<PathBuf>,
    /// Format of the log; overrides [log] format.
    #[arg(long, global = true, value_enum, value_name = "FORMAT")]
    log_format: Option<Format>,
    /// Log more: -v debug, -vv trace.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the roles: fetch, retry, changes and sink, together or some of them.
    #[command(long_about = run::LONG_ABOUT, after_long_help = run::EXAMPLES)]
    Run(run::Args),
    /// Call the vendors: requests → results and failures.
    ///
    /// The same as `weir run --role fetch`.
    Fetch,
    /// Repeat failed requests after a delay, or give up with a reason.
    ///
    /// The same as `weir run --role retry`.
    Retry,
    /// Publish how each item differs from its last result.
    ///
    /// The same as `weir run --role changes`.
    Changes,
    /// Write every record to ClickHouse.
    ///
    /// The same as `weir run --role sink`.
    Sink,
    /// Answer `GET /items/{source}/{id}` on [serve] listen, or else on [http] listen.
    ///
    /// The same as `weir run --role serve`. An item that is not in the cache is requested, and waited for as long as
    /// `[serve] wait` says; `ETag`, `Age` and `Cache-Control` serve an edge cache in front of it.
    Serve,
    /// Get one item now: from the cache, or by a call.
    #[command(long_about = get::LONG_ABOUT, after_long_help = get::EXAMPLES)]
    Get(get::Args),
    /// Cached answers: show, drop, refresh, warm.
    #[command(subcommand)]
    Cache(cache::Command),
    /// Request the items of a file.
    #[command(long_about = enqueue::LONG_ABOUT, after_long_help = enqueue::EXAMPLES)]
    Enqueue(enqueue::Args),
    /// Show consumer lag, batches and recent calls.
    #[command(long_about = status::LONG_ABOUT, after_long_help = status::EXAMPLES)]
    Status(status::Args),
    /// Dead letters: list, show with their history, redrive, purge.
    #[command(subcommand)]
    Dead(dead::Command),
    /// Show everything that happened to an item, in order.
    #[command(long_about = trace::LONG_ABOUT, after_long_help = trace::EXAMPLES)]
    Trace(trace::Args),
    /// Show limits, use and holds of each account; pause, resume, slow down.
    #[command(long_about = quota::LONG_ABOUT, after_long_help = quota::EXAMPLES)]
    Quota(quota::Args),
    /// Run SQL in ClickHouse.
    #[command(long_about = query::LONG_ABOUT, after_long_help = query::EXAMPLES)]
    Query(query::Args),
    /// Accounts and their tokens: list, test, authorise, add.
    #[command(subcommand)]
    Account(account::Command),
    /// Write the result of a query to a CSV or Parquet file.
    #[command(long_about = export::LONG_ABOUT, after_long_help = export::EXAMPLES)]
    Export(export::Args),
    /// List batches and their progress.
    #[command(long_about = batches::LIST_ABOUT, after_long_help = batches::LIST_EXAMPLES)]
    Batches(batches::ListArgs),
    /// Show one batch: its progress or its items; or cancel it.
    #[command(long_about = batches::ONE_ABOUT, after_long_help = batches::ONE_EXAMPLES)]
    Batch(batches::OneArgs),
    /// Re-insert part of a topic into the tables, or send it back to requests.
    #[command(long_about = replay::LONG_ABOUT, after_long_help = replay::EXAMPLES)]
    Replay(replay::Args),
    /// Send dead letters back to requests.
    #[command(long_about = replay::REDRIVE_ABOUT, after_long_help = replay::REDRIVE_EXAMPLES)]
    Redrive(replay::RedriveArgs),
    /// Check that nothing is lost or duplicated; list what is.
    #[command(long_about = verify::LONG_ABOUT, after_long_help = verify::EXAMPLES)]
    Verify(verify::Args),
    /// Check the configuration and each connection; print the effective configuration.
    #[command(long_about = check::LONG_ABOUT, after_long_help = check::EXAMPLES)]
    Check(check::Args),
    /// Kafka topics: create and list them.
    #[command(subcommand)]
    Topics(topics::Command),
    /// ClickHouse tables and views: create and update them.
    #[command(subcommand)]
    Schema(schema::Command),
    Simulate(simulate::Args),
}

impl Cli {
    /// Whether the command reads the configuration at all.
    #[must_use]
    pub const fn needs_config(&self) -> bool {
        !matches!(self.command, Command::Simulate(_))
    }

    /// The file that was named.
    #[must_use]
    pub fn config_file(&self) -> Option<&Path> {
        self.global.config.as_deref()
    }

    /// The format of the log that was named.
    #[must_use]
    pub const fn log_format(&self) -> Option<Format> {
        self.global.log_format
    }

    /// How many `-v` there were.
    #[must_use]
    pub const fn verbose(&self) -> u8 {
        self.global.verbose
    }

    /// Who reads the log.
    #[must_use]
    pub const fn audience(&self) -> Audience {
        match self.command {
            Command::Run(_)
            | Command::Fetch
            | Command::Retry
            | Command::Changes
            | Command::Sink
            | Command::Serve
            | Command::Simulate(_) => Audience::Role,
            Command::Get(_)
            | Command::Cache(_)
            | Command::Enqueue(_)
            | Command::Status(_)
            | Command::Dead(_)
            | Command::Trace(_)
            | Command::Quota(_)
            | Command::Query(_)
            | Command::Account(_)
            | Command::Export(_)
            | Command::Verify(_)
            | Command::Batches(_)
            | Command::Batch(_)
            | Command::Replay(_)
            | Command::Redrive(_)
            | Command::Check(_)
            | Command::Topics(_)
            | Command::Schema(_) => Audience::Command,
        }
    }
}

/// Runs the command until it ends or `stop` is cancelled.
///
/// # Errors
/// Whatever the command failed with; [`exit::report`] makes a message and a code of it.
pub async fn run(cli: Cli, config: Config, stop: CancellationToken) -> anyhow::Result<ExitCode> {
    let role = |role| run::Args { role: vec![role], from: None };
    match cli.command {
        Command::Run(args) => run::run(args, config, stop).await,
        Command::Fetch => run::run(role(Role::Fetch), config, stop).await,
        Command::Retry => run::run(role(Role::Retry), config, stop).await,
        Command::Changes => run::run(role(Role::Changes), config, stop).await,
        Command::Sink => run::run(role(Role::Sink), config, stop).await,
        Command::Serve => run::run(role(Role::Serve), config, stop).await,
        Command::Get(args) => until(stop, get::run(args, &config)).await,
        Command::Cache(command) => until(stop, cache::run(&command, &config)).await,
        Command::Simulate(args) => simulate::run(args, Clock::System, stop).await.map(|()| Exit::Done.into()),
        Command::Enqueue(args) => enqueue::run(args, &config, &stop).await.map(Into::into),
        Command::Status(args) => until(stop, status::run(&args, &config)).await,
        Command::Dead(command) => dead::run(command, &config, stop).await,
        Command::Trace(args) => until(stop, trace::run(&args, &config)).await,
        Command::Quota(args) => until(stop, quota::run(args, &config)).await,
        Command::Query(args) => until(stop, query::run(args, &config)).await,
        Command::Account(command) => until(stop, account::run(command, &config)).await,
        Command::Export(args) => until(stop, export::run(args, &config)).await,
        Command::Batches(args) => until(stop, batches::list(&args, &config)).await,
        Command::Batch(args) => batches::one(args, &config, &stop).await.map(Into::into),
        Command::Replay(args) => replay::run(args, &config, &stop).await.map(Into::into),
        Command::Redrive(args) => replay::redrive(args, &config, &stop).await.map(Into::into),
        Command::Verify(args) => verify::run(&args, &config, &stop).await.map(Into::into),
        Command::Check(args) => until(stop, check::run(&args, &config)).await,
        Command::Topics(command) => until(stop, topics::run(&command, &config)).await,
        Command::Schema(command) => until(stop, schema::run(&command, &config)).await,
    }
}

/// A command that may be dropped at any point.
async fn until(
    stop: CancellationToken,
    command: impl Future<Output = anyhow::Result<Exit>>,
) -> anyhow::Result<ExitCode> {
    tokio::select! {
        outcome = command => outcome.map(Into::into),
        () = stop.cancelled() => Ok(Exit::Interrupted.into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_says_what_it_does() {
        for command in Cli::command().get_subcommands() {
            assert!(command.get_about().is_some(), "{}", command.get_name());
        }
    }

    fn with_all_below(command: &clap::Command) -> Vec<&clap::Command> {
        let below = command.get_subcommands().flat_map(with_all_below);
        std::iter::once(command).chain(below).collect()
    }

    /// Whether a line of the help is an example: `weir …`, or the same with variables set for it alone.
    fn is_example(line: &str) -> bool {
        let Some(line) = line.strip_prefix("  ").filter(|line| !line.starts_with(' ')) else { return false };
        line.split(' ').find(|word| !is_variable(word)) == Some("weir")
    }

    /// `NAME=value`
    fn is_variable(word: &str) -> bool {
        let name = word.split_once('=').map_or("", |(name, _)| name);
        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_')
    }

    /// As a shell does, as far as the examples need it: up to a comment, a pipe, a redirection or a second command.
    fn words(line: &str) -> Vec<String> {
        let (mut words, mut quote) = (vec![String::new()], None);
        for letter in line.chars() {
            match (quote, letter) {
                (None, '\'' | '"') => quote = Some(letter),
                (Some(open), _) if open == letter => quote = None,
                (None, '#' | '|' | '>' | '<' | '&') => break,
                (None, ' ') => words.push(String::new()),
                _ => words.last_mut().unwrap().push(letter),
            }
        }
        words.retain(|word| !word.is_empty());
        words
    }

    #[test]
    fn paragraphs_of_the_help_are_left_to_clap_to_wrap() {
        let is_text = |line: &str| !line.is_empty() && !line.starts_with(' ') && !line.ends_with(':');
        let whole = Cli::command();
        for command in with_all_below(&whole) {
            for text in [command.get_long_about(), command.get_after_long_help()].into_iter().flatten() {
                let text = text.to_string();
                let lines: Vec<_> = text.lines().collect();
                let broken = lines.windows(2).find(|pair| is_text(pair[0]) && is_text(pair[1]));
                assert_eq!(broken, None, "{}: clap wraps each line by itself", command.get_name());
                let wide = lines.iter().find(|line| line.starts_with("  ") && line.chars().count() > 100);
                assert_eq!(wide, None, "{}: clap breaks it", command.get_name());
            }
        }
    }

    #[test]
    fn each_example_of_the_help_can_be_pasted() {
        let whole = Cli::command();
        let mut examples = 0;
        for command in with_all_below(&whole) {
            let text = command.get_after_long_help().map(ToString::to_string).unwrap_or_default();
            for line in text.replace("\\\n", "").lines().filter(|line| is_example(line)) {
                examples += 1;
                let parsed = Cli::try_parse_from(words(line.trim()).into_iter().skip_while(|word| is_variable(word)));
                assert!(parsed.is_ok(), "{line}\n{}", parsed.unwrap_err());
            }
        }
        assert!(examples > 50, "{examples}");
    }
}
