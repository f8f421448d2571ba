//! `weir quota`: limits, use and holds of each account; and the operator's pause, resume and set.

mod change;
mod view;

use std::{io::IsTerminal as _, time::Duration};

use clap::Subcommand;
use tokio::time::{Instant, sleep_until};

use self::change::Wish;
use super::{
    exit::{Ended, Exit},
    terminal::{note, say},
};
use crate::{
    config::{self, Config},
    kafka::{
        Outgoing, Producer, admin,
        follow::{Follower, Seen},
    },
    message::{
        AccountAlias, QuotaSetting, SourceName, codec,
        envelope::{Envelope, Kind},
    },
    platform::Source,
    quota::journal::{
        self,
        known::{Known, setting_key},
        report::allowed,
    },
    runtime::clock::Clock,
    topics::Topics,
};

pub(super) const LONG_ABOUT: &str = "\
Show each account's limits, what it has used, and why it is not calling.

From the reports that the workers write to Kafka every second: calls of today (UTC) and of the last minute, refusals, \
holds and their reasons; what batches with a budget have spent; workers without a connection to Redis. `pause`, \
`resume` and `set` act on all running workers within about a second, and on those that start later.";

pub(super) const EXAMPLES: &str = "\
Examples:
  weir quota                                       # all sources and accounts
  weir quota --source ali1688 --watch              # one source, again every second until Ctrl-C
  weir quota --json | jq '.[].accounts[] | select(.state != \"ready\")'
  weir quota pause ali1688                         # no calls until it is resumed
  weir quota pause ali1688 shop-1 --for 10m --reason \"sale day\"
  weir quota resume ali1688 shop-1                 # ends a pause, hold or ban; enables it
  weir quota resume taobao --address proxy-3       # use the address again, after one probe
  weir quota set ali1688 --pace 50%                # all at half the pace";

/// How often `--watch` shows it anew.
const EVERY: Duration = Duration::from_secs(1);

/// `weir quota`
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    /// Only this source.
    #[arg(long, value_name = "NAME")]
    source: Option<SourceName>,
    /// One JSON document.
    #[arg(long)]
    json: bool,
    /// Refresh every second, until Ctrl-C.
    #[arg(long, conflicts_with = "json")]
    watch: bool,
    #[command(subcommand)]
    change: Option<Change>,
}

/// What an operator can do.
#[derive(Debug, Subcommand)]
enum Change {
    /// Stop calls, for a time or until resumed.
    #[command(after_long_help = "\
Examples:
  weir quota pause ali1688
  weir quota pause ali1688 shop-1 --for 10m --reason \"sale day\"

Calls in flight finish. Requests wait on Kafka.")]
    Pause {
        #[command(flatten)]
        scope: Scope,
        /// How long, such as 90s, 10m, 2h.
        #[arg(long = "for", value_name = "TIME", value_parser = change::read_time)]
        time: Option<Duration>,
        /// The reason, shown by `weir quota`.
        #[arg(long, default_value = "", hide_default_value = true, value_parser = change::read_reason)]
        reason: String,
    },
    /// End a pause, a hold or a ban, and enable a disabled account.
    #[command(after_long_help = "\
Examples:
  weir quota resume ali1688
  weir quota resume ali1688 shop-1               # it calls again
  weir quota resume taobao --address proxy-3     # after the proxy was repaired

Resuming a source leaves its accounts that are paused or disabled themselves as they are. An address that was taken \
out of rotation is probed by one call first; if that fails, it is taken out again.

An app key, secret or token that was corrected in accounts_file, or in the file of a secret, is read before the account \
calls again; running roles also take it over by themselves within seconds, once the file is whole. Other keys of an \
account, new accounts and secrets in the environment are read when the roles start. `weir account authorise` gives an \
account a new token.")]
    Resume {
        #[command(flatten)]
        scope: Scope,
        /// The name of an address that its calls leave from.
        #[arg(long, value_name = "NAME", conflicts_with = "account")]
        address: Option<String>,
    },
    /// Set the pace as a share of the limit.
    #[command(after_long_help = "\
Examples:
  weir quota set ali1688 --pace 50%
  weir quota set ali1688 shop-1 --pace 1     # the full pace again

Budgets, such as calls per day, are not changed.")]
    Set {
        #[command(flatten)]
        scope: Scope,
        /// A share such as 0.5 or 50%, from 0.1% to 100%.
        #[arg(long, value_name = "SHARE", value_parser = change::read_share)]
        pace: f64,
    },
}

/// Of whom.
#[derive(Debug, clap::Args)]
struct Scope {
    /// The source.
    #[arg(value_name = "SOURCE")]
    source: SourceName,
    /// One of its accounts; by default, the source as a whole.
    #[arg(value_name = "ACCOUNT")]
    account: Option<AccountAlias>,
}

/// A source and its accounts with what they are allowed, as configured here; the accounts may not be known here.
pub(super) type Configured = Vec<(SourceName, Vec<(AccountAlias, String)>)>;

pub(super) async fn run(args: Args, config: &Config) -> anyhow::Result<Exit> {
    let topic = Topics::new(config.topics.clone()).quota();
    if admin::partitions(&config.kafka, &topic).await?.is_none() {
        return Err(Ended::failed(format!("there is no topic {topic}: run `weir topics apply`")).into());
    }
    match args.change {
        Some(Change::Pause { scope, time, reason }) => {
            change(config, &topic, (scope, None), Wish::Pause { time, reason }).await
        }
        Some(Change::Resume { scope, address }) => change(config, &topic, (scope, address), Wish::Resume).await,
        Some(Change::Set { scope, pace }) => change(config, &topic, (scope, None), Wish::Pace(pace)).await,
        None => show(&args, config, &topic).await,
    }
}

/// The accounts as this configuration has them. Secrets may be elsewhere: then only the aliases that stand in it.
fn configured(config: &Config) -> Configured {
    let of = |source: &crate::platform::SourceConfig| {
        let accounts = match Source::open(source, config.folder(), &config::variable) {
            Ok(opened) => {
                let aliases = opened.accounts.iter().map(|account| account.alias.clone());
                aliases.zip(allowed(&opened.quota().or_unknown(&config.quota.unknown))).collect()
            }
            Err(_) => source.common.account.iter().map(|account| (account.alias.clone(), String::new())).collect(),
        };
        (source.common.name.clone(), accounts)
    };
    config.sources.iter().map(of).collect()
}

async fn show(args: &Args, config: &Config, topic: &str) -> anyhow::Result<Exit> {
    let configured = configured(config);
    let (mut known, mut follower) = journal::read(&config.kafka, topic, args.source.clone()).await?;
    loop {
        let now = Clock::System.now();
        let mut views = view::views(&known, &configured, now);
        if let Some(wanted) = &args.source {
            let names: Vec<_> = views.iter().map(|view| view.source.to_string()).collect();
            views.retain(|view| view.source == *wanted);
            if views.is_empty() {
                return Err(unknown_source(wanted, &names).into());
            }
        }
        if args.json {
            say(&serde_json::to_string_pretty(&views)?)?;
            return Ok(Exit::Done);
        }
        if args.watch && std::io::stdout().is_terminal() {
            // Clears the screen: the table has as many lines as there are accounts.
            say("\x1b[H\x1b[2J")?;
        }
        say(&view::text(&views, now))?;
        if !args.watch {
            return Ok(Exit::Done);
        }
        follow(&mut known, &mut follower, topic).await?;
    }
}

/// What was paid for twice today by these sources, as far as anybody knows; for people.
pub(super) async fn made_again(config: &Config) -> anyhow::Result<Vec<String>> {
    let topic = Topics::new(config.topics.clone()).quota();
    let (known, _) = journal::read(&config.kafka, &topic, None).await?;
    let views = view::views(&known, &configured(config), Clock::System.now());
    Ok(views.iter().flat_map(view::made_again).collect())
}

/// Takes in what comes within a second.
async fn follow(known: &mut Known, follower: &mut Follower, topic: &str) -> anyhow::Result<()> {
    let until = Instant::now() + EVERY;
    loop {
        tokio::select! {
            seen = follower.next() => {
                if let Seen::Record(record) = seen? {
                    known.take(topic, &record);
                }
            }
            () = sleep_until(until) => return Ok(()),
        }
    }
}

fn unknown_source(source: &SourceName, names: &[String]) -> Ended {
    let there_are = if names.is_empty() {
        "no [[source]] is configured".to_owned()
    } else {
        format!("configured: {}", names.join(", "))
    };
    Ended::usage(format!("there is no source {source}; {there_are}"))
}

async fn change(
    config: &Config,
    topic: &str,
    (Scope { source, account }, address): (Scope, Option<String>),
    wish: Wish,
) -> anyhow::Result<Exit> {
    let (known, _) = journal::read(&config.kafka, topic, None).await?;
    let now = Clock::System.now();
    let views = view::views(&known, &configured(config), now);
    let names: Vec<_> = views.iter().map(|view| view.source.to_string()).collect();
    let Some(view) = views.into_iter().find(|view| view.source == source) else {
        return Err(unknown_source(&source, &names).into());
    };
    if let Some(alias) = &account
        && let Err(known) = view.has(alias)
    {
        return Err(Ended::usage(format!("source {source} has no account {alias}; {known}")).into());
    }
    if let Some(name) = &address
        && let Err(known) = view.has_address(name)
    {
        return Err(Ended::usage(format!("source {source} has no address {name} to be resumed; {known}")).into());
    }
    let before = match &address {
        Some(name) => known.settings_of(&source).addresses.get(name).cloned(),
        None => known.setting(&source, account.as_ref()).cloned(),
    };
    let before = before.unwrap_or_else(|| QuotaSetting {
        address: address.clone(),
        ..QuotaSetting::none(source.clone(), account.clone(), now)
    });
    let setting = change::changed(before, &wish, view.after_all_holds(now)).map_err(Ended::failed)?;
    let record = record(topic, &setting);
    Producer::new(&config.kafka)?.send(vec![record]).await?;
    let whom = match (&account, &address) {
        (_, Some(name)) => format!("address {name} of {source}"),
        (Some(alias), None) => format!("account {alias} of {source}"),
        (None, None) => format!("source {source}"),
    };
    say(&format!("{whom}: {}", change::words(&setting, &wish)))?;
    note(&view.followers(now));
    if address.is_none() {
        for line in view.still_held(account.as_ref(), &wish, now) {
            note(&line);
        }
    }
    Ok(Exit::Done)
}

fn record(topic: &str, setting: &QuotaSetting) -> Outgoing {
    let id = uuid::Uuid::now_v7().to_string();
    let envelope =
        Envelope { kind: Kind::QuotaSetting, id: &id, writer: "weir/quota", time: setting.set_at, traceparent: None };
    let encoded = codec::encode(&envelope, setting);
    let key = Some(setting_key(setting).into());
    Outgoing { topic: topic.into(), key, value: encoded.value, headers: encoded.headers }
}
