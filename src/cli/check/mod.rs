//! `weir check`: prints the effective configuration and tests each connection that it names.

mod tokens;

use std::{fmt::Write as _, path::Path, time::Duration};

use secrecy::ExposeSecret;
use tokio::time::timeout;

use super::{
    exit::Exit,
    outlast,
    terminal::{agree, counted, say},
    topics::verdict,
};
use crate::{
    config::{self, Config},
    kafka::admin::{self, AdminError},
    message::SourceName,
    platform::{
        Account, Source, SourceConfig,
        route::{Address, Route},
    },
    quota::{
        Limit,
        calendar::Window,
        money::OnBudget,
        plan::{AccountLimits, Limits},
    },
    run::descriptors_wanted,
    runtime::{
        clock::{Clock, Timestamp},
        descriptors,
        duration_text::duration_text,
    },
    store::{
        Store,
        schema::{self, Difference, MIGRATIONS, Standing},
    },
    topics::{self, Topic, Topics},
};

pub(super) const LONG_ABOUT: &str = "\
Check the configuration and each connection; print the effective configuration.

First the effective configuration as TOML, secrets as ***; then one line for each check. Nothing is changed, except \
that a test entry is written to the token store and deleted. Where the end of a batch is published is in [batches]: \
webhook, topic, or neither.";

pub(super) const EXAMPLES: &str = "\
Examples:
  weir check                  # everything
  weir check --offline        # configuration, accounts, and tokens in a file
  weir check --quiet          # without printing the configuration

Exit codes: 0 all checks passed, 1 topics or tables are missing, or too few files may be open, 64 the configuration is \
invalid, 69 a server cannot be reached";

/// How many addresses of a source are named.
const ADDRESSES_SHOWN: usize = 10;

/// How long a server may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// `weir check`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Make no connections.
    #[arg(long)]
    offline: bool,
    /// Do not print the configuration.
    #[arg(long, short)]
    quiet: bool,
}

/// What one check came to.
struct Finding {
    what: String,
    verdict: Verdict,
}

enum Verdict {
    Fine(String),
    Skipped(String),
    /// It works, and will not for ever.
    Beware(String),
    Wrong(Exit, String),
}

pub(super) async fn run(args: &Args, config: &Config) -> anyhow::Result<Exit> {
    let file = config.file.as_ref().map_or_else(|| "no file".to_owned(), |path| path.display().to_string());
    if !args.quiet {
        say(&format!(
            "# What is in effect: {file}, and the environment. Secrets are hidden.\n\n{}",
            config.redacted()
        ))?;
    }
    let mut findings = vec![Finding { what: "configuration".to_owned(), verdict: Verdict::Fine(file) }];
    show(&findings)?;
    let mut add = |finding: Finding| {
        show(std::slice::from_ref(&finding))?;
        findings.push(finding);
        Ok::<_, std::io::Error>(())
    };
    for finding in
        sources(config).into_iter().chain([descriptors_finding(config)]).chain(calendar(config, Clock::System.now()))
    {
        add(finding)?;
    }
    if !args.offline || config.tokens.store == crate::tokens::Store::File {
        add(tokens::finding(config).await)?;
    }
    if !args.offline {
        add(Finding { what: "Kafka".to_owned(), verdict: kafka(config).await })?;
        for finding in kept(config).await {
            add(finding)?;
        }
        add(Finding { what: "ClickHouse".to_owned(), verdict: clickhouse(config).await })?;
        add(Finding { what: "Redis".to_owned(), verdict: redis(config).await })?;
    }
    Ok(exit(&findings))
}

fn show(findings: &[Finding]) -> std::io::Result<()> {
    for Finding { what, verdict } in findings {
        let (word, text) = match verdict {
            Verdict::Fine(text) => ("ok", text),
            Verdict::Skipped(text) => ("-", text),
            Verdict::Beware(text) => ("MIND", text),
            Verdict::Wrong(_, text) => ("WRONG", text),
        };
        say(&format!("{what:<18} {word:<6} {text}"))?;
    }
    Ok(())
}

/// The gravest finding: an invalid configuration before a lost server before something missing.
fn exit(findings: &[Finding]) -> Exit {
    let is = |wanted| findings.iter().any(|f| matches!(&f.verdict, Verdict::Wrong(exit, _) if *exit == wanted));
    [Exit::Usage, Exit::Unavailable, Exit::Failed].into_iter().find(|exit| is(*exit)).unwrap_or(Exit::Done)
}

fn sources(config: &Config) -> Vec<Finding> {
    if config.sources.is_empty() {
        let what = "no [[source]] is configured, so there is nothing to fetch. See deploy/config/weir.example.toml";
        return vec![Finding { what: "sources".to_owned(), verdict: Verdict::Skipped(what.to_owned()) }];
    }
    let folder = config.folder();
    let finding = |source: &SourceConfig| Finding {
        what: format!("source {}", source.common.name),
        verdict: match open(source, folder, config) {
            Ok(text) => Verdict::Fine(text),
            Err(text) => Verdict::Wrong(Exit::Usage, text),
        },
    };
    let in_all = config.fetch.calls_in_flight_in_all;
    let together = Finding {
        what: "all sources".to_owned(),
        verdict: Verdict::Fine(format!(
            "up to {} at once in each process (fetch.calls_in_flight_in_all)",
            counted(in_all as u64, "call")
        )),
    };
    config.sources.iter().map(finding).chain([together]).collect()
}

fn descriptors_finding(config: &Config) -> Finding {
    let (allowed, wanted) = (descriptors::raised(), descriptors_wanted(config));
    let verdict = if let Some(problem) = descriptors::problem(allowed, wanted) {
        Verdict::Wrong(Exit::Failed, problem)
    } else {
        let allowed = allowed.map_or_else(|| "any number".to_owned(), |allowed| allowed.to_string());
        Verdict::Fine(format!("{allowed} may be open at once (ulimit -n), up to {wanted} are needed"))
    };
    Finding { what: "descriptors".to_owned(), verdict }
}

/// What is planned: each window, and when it is open.
fn calendar(config: &Config, now: Timestamp) -> Vec<Finding> {
    let finding = |window: &Window| {
        let whom: Vec<_> = window.sources().iter().map(SourceName::as_str).collect();
        let whom = if whom.is_empty() { "all sources".to_owned() } else { whom.join(", ") };
        let when = match window.occurrence(now) {
            Some((begin, end)) if begin <= now => format!("open now, until {}", window.local(end)),
            Some((begin, end)) => format!("next {} to {}", window.local(begin), window.local(end)),
            None => "over".to_owned(),
        };
        let text = format!("{whom} at {window}; {when}");
        Finding { what: format!("calendar {}", window.name()), verdict: Verdict::Fine(text) }
    };
    config.calendar.iter().map(finding).collect()
}

fn open(source: &SourceConfig, folder: &Path, config: &Config) -> Result<String, String> {
    let quota = &config.quota;
    let opened = Source::open(source, folder, &config::variable).map_err(|error| error.problem.to_string())?;
    let accounts = opened.accounts.len();
    let addresses = addresses(&opened);
    let limits = opened.quota().or_unknown(&quota.unknown);
    let limit = limits_in_words(&limits, &opened.accounts);
    let preset = source.common.preset.map_or_else(String::new, |preset| format!(" (preset {})", preset.name()));
    let money = money(source);
    let ids = match opened.vendor.batch_max() {
        1 => String::new(),
        ids => format!(", up to {ids} IDs a call"),
    };
    let fetch = &config.fetch;
    let in_flight = opened.calls_in_flight.map_or(fetch.calls_in_flight, |own| own.min(fetch.calls_in_flight));
    let at_once = in_flight.min(fetch.calls_in_flight_in_all);
    let at_once = format!(", {} at once", counted(at_once as u64, "call"));
    Ok(format!(
        "{} with {}{preset}{ids}{at_once}; {limit}{addresses}{money}",
        source.protocol.protocol().url(),
        counted(accounts as u64, "account")
    ))
}

/// Every limit of the accounts, those that have the same ones together, and of the source.
fn limits_in_words(limits: &Limits, accounts: &[Account]) -> String {
    /// So many groups of accounts are told, and so many names of a group.
    const SHOWN: usize = 5;
    let sentences = |limits: &[Limit]| limits.iter().map(Limit::sentence).collect::<Vec<_>>().join(" and ");
    let mut groups: Vec<(&AccountLimits, Vec<&str>)> = Vec::new();
    for (of, account) in limits.accounts.iter().zip(accounts) {
        let same = |group: &&mut (&AccountLimits, _)| {
            group.0.limits == of.limits && group.0.in_flight == of.in_flight && group.0.is_guess == of.is_guess
        };
        match groups.iter_mut().find(same) {
            Some((_, names)) => names.push(account.alias.as_str()),
            None => groups.push((of, vec![account.alias.as_str()])),
        }
    }
    let words = |of: &AccountLimits| {
        let mut words = match (of.limits.is_empty(), of.is_guess) {
            (true, _) => "no limit of its own".to_owned(),
            (false, true) => match of.limits.split_last() {
                // What was said holds on top of what is sought.
                Some((guess, said)) if !said.is_empty() => {
                    format!(
                        "{}, and no configured pace: it is searched for, starting at {}",
                        sentences(said),
                        guess.sentence()
                    )
                }
                Some(_) | None => {
                    format!("no limit is configured: it is searched for, starting at {}", sentences(&of.limits))
                }
            },
            (false, false) => sentences(&of.limits),
        };
        if let Some(most) = of.in_flight {
            let _ = write!(words, ", {} in flight", counted(most.into(), "call"));
        }
        words
    };
    let is_one = groups.len() == 1;
    let group = |(of, names): &(&AccountLimits, Vec<&str>)| {
        let more = if names.len() > SHOWN { format!(" and {} more", names.len() - SHOWN) } else { String::new() };
        let names = names.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", ");
        let whom = if is_one { "each account".to_owned() } else { format!("{names}{more}") };
        format!("{whom}: {}", words(of))
    };
    let mut all: Vec<String> = groups.iter().take(SHOWN).map(group).collect();
    if groups.len() > SHOWN {
        all.push(format!("{} more groups of accounts with other limits", groups.len() - SHOWN));
    }
    if !limits.source.is_empty() {
        all.push(format!("all accounts together: {}", sentences(&limits.source)));
    }
    all.join("; ")
}

/// What a call costs and how many calls its budgets pay for.
fn money(source: &SourceConfig) -> String {
    let Some(budgets) = source.common.budgets() else { return String::new() };
    let currency = source.common.currency.as_ref().map_or_else(String::new, |currency| format!(" {currency}"));
    let of = |calls: Option<u64>, what: &str| {
        calls.map(|calls| format!(", {} {what}", counted(calls, "call"))).unwrap_or_default()
    };
    let (day, batch) = (of(budgets.per_day, "a day"), of(budgets.per_batch, "a batch"));
    let then = match budgets.on_budget {
        _ if budgets.per_day.or(budgets.per_batch).is_none() => "",
        OnBudget::Stop => ", then it stops",
        OnBudget::Warn => ", then it warns",
    };
    format!("; {}{currency} a call{day}{batch}{then}", budgets.cost)
}

/// Which address has how many accounts, and what the vendor allows it; nothing if there is only the machine's own
/// without a limit.
fn addresses(source: &Source) -> String {
    let quota = source.quota();
    let limit = |index| match quota.of_address(index) {
        [] => "no limit".to_owned(),
        limits => limits.iter().map(Limit::sentence).collect::<Vec<_>>().join(" and "),
    };
    let counts = source.accounts_by_address();
    let one = |(index, address): (usize, &Address)| {
        let (name, count) = (&address.name, counts.get(index).copied().unwrap_or_default());
        format!("{name} ({}, {})", counted(count as u64, "account"), limit(index))
    };
    if let [only] = &*source.addresses
        && quota.of_address(0).is_empty()
        && matches!(only.route, Route::Direct)
    {
        return String::new();
    }
    let shown: Vec<_> = source.addresses.iter().enumerate().take(ADDRESSES_SHOWN).map(one).collect();
    let more = source.addresses.len().saturating_sub(ADDRESSES_SHOWN);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("; from {}{more}", shown.join(", "))
}

async fn kafka(config: &Config) -> Verdict {
    let present = match timeout(PATIENCE, admin::describe(&config.kafka)).await {
        Ok(Ok(present)) => present,
        Ok(Err(error @ AdminError::Unreachable { .. })) => return Verdict::Wrong(Exit::Unavailable, error.to_string()),
        Ok(Err(error)) => return Verdict::Wrong(Exit::Failed, error.to_string()),
        Err(_) => {
            let brokers = &config.kafka.brokers;
            let text = format!("no answer from {brokers} within 5 s. Is it running? Is kafka.brokers right?");
            return Verdict::Wrong(Exit::Unavailable, text);
        }
    };
    let topics = Topics::new(config.topics.clone());
    let wanted = [topics.all(&config.source_names()), topics.delays()].concat();
    let wrong: Vec<_> = wanted
        .iter()
        .filter_map(|topic| verdict(topic, &present).map(|verdict| format!("{}: {verdict}", topic.name)))
        .collect();
    if wrong.is_empty() {
        match too_small(config, &wanted).await {
            Ok(None) => {}
            Ok(Some(what)) => return Verdict::Wrong(Exit::Failed, what),
            Err(error) => return Verdict::Wrong(Exit::Failed, error.to_string()),
        }
        return match admin::unfit_delays(&config.kafka, &topics.delays()).await {
            Ok(None) => Verdict::Fine(format!("{} with all {} topics", config.kafka.brokers, wanted.len())),
            Ok(Some(what)) => Verdict::Wrong(Exit::Failed, what),
            Err(error) => Verdict::Wrong(Exit::Failed, error.to_string()),
        };
    }
    Verdict::Wrong(Exit::Failed, format!("{}. Run `weir topics apply`", wrong.join("; ")))
}

/// The topics that take only smaller records than are written; `None` if there are none.
async fn too_small(config: &Config, topics: &[Topic]) -> Result<Option<String>, AdminError> {
    let names: Vec<_> = topics.iter().map(|topic| topic.name.clone()).collect();
    let (limits, own) = (admin::record_limits(&config.kafka, &names).await?, config.kafka.record_limit());
    let small: Vec<_> = names.iter().filter_map(|name| Some((name, *limits.get(name)?))).collect();
    let small: Vec<_> = small.into_iter().filter(|(_, limit)| *limit < own).collect();
    let Some(least) = small.iter().map(|(_, limit)| *limit).min() else { return Ok(None) };
    let each: Vec<_> = small.iter().map(|(name, limit)| format!("{name} takes {limit}")).collect();
    Ok(Some(format!(
        "records may have {own} bytes (kafka.record_limit), but of topics' max.message.bytes {}: larger records end as \
         dead letters. Run `weir topics apply`, or where the cluster does not allow it set kafka.record_limit = \
         \"{least} B\"",
        each.join(", ")
    )))
}

/// For how long the brokers remember how far weir has come, and what waits for longer than it is kept.
async fn kept(config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Ok(Ok(Some(kept))) = timeout(PATIENCE, admin::offsets_kept(&config.kafka)).await {
        findings.push(Finding { what: "offsets".to_owned(), verdict: offsets(kept, &config.topics) });
    }
    for source in &config.sources {
        if let Ok(Some(warning)) = timeout(PATIENCE, outlast::warning(source, config)).await {
            findings.push(Finding { what: "backlog".to_owned(), verdict: Verdict::Beware(warning) });
        }
    }
    findings
}

fn offsets(kept: Duration, topics: &topics::Config) -> Verdict {
    let (longest, key) = [
        (topics.keep_requests, "topics.keep_requests"),
        (topics.keep_failures, "topics.keep_failures"),
        (topics.keep_results, "topics.keep_results"),
    ]
    .into_iter()
    .max()
    .unwrap_or_default();
    let (days, longest_days) = (duration_text(kept), duration_text(longest));
    if kept >= longest {
        return Verdict::Fine(format!("kept for {days} while weir is stopped"));
    }
    Verdict::Beware(format!(
        "Kafka deletes the committed offsets when weir is stopped for {days} (offsets.retention.minutes of the \
         brokers), but {key} is {longest_days}: a later start stops and asks what to do. Set offsets.retention.minutes \
         to at least {}",
        longest.as_secs() / 60
    ))
}

async fn clickhouse(config: &Config) -> Verdict {
    let url = &config.clickhouse.url;
    match timeout(PATIENCE, standing(config)).await {
        Ok(Ok((version, standing))) => {
            let Standing { applied, differences } = standing;
            if applied < MIGRATIONS.len() {
                let (all, is) = (MIGRATIONS.len(), agree(applied as u64, "is", "are"));
                let text = format!("{applied} of {all} migrations {is} applied. Run `weir schema apply`");
                return Verdict::Wrong(Exit::Failed, text);
            }
            let (gone, other): (Vec<_>, Vec<_>) = differences.iter().partition(|d| d.is_mended_by_apply());
            let list = |all: &[&Difference]| all.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
            if !gone.is_empty() {
                let text = format!("{}. Run `weir schema apply`, which creates it again", list(&gone));
                return Verdict::Wrong(Exit::Failed, text);
            }
            let other = if other.is_empty() { String::new() } else { format!("; note: {}", list(&other)) };
            Verdict::Fine(format!(
                "{url}, version {version}, database {} is up to date{other}",
                config.clickhouse.database
            ))
        }
        Ok(Err(error)) => Verdict::Wrong(super::exit::exit_of(&error), error.to_string()),
        Err(_) => {
            let text = format!("no answer from {url} within 5 s. Is it running? Is clickhouse.url right?");
            Verdict::Wrong(Exit::Unavailable, text)
        }
    }
}

/// The server's version, and what the database has of the schema.
async fn standing(config: &Config) -> anyhow::Result<(String, Standing)> {
    let version = Store::connect(&config.clickhouse)?.ping().await?;
    match schema::standing(&config.clickhouse).await {
        Ok(standing) => Ok((version, standing)),
        Err(error) if error.is_absent() => Ok((version, Standing::default())),
        Err(error) => Err(error.into()),
    }
}

async fn redis(config: &Config) -> Verdict {
    let Some(url) = &config.redis.url else { return Verdict::Skipped("not configured; not required".to_owned()) };
    match timeout(PATIENCE, ping(url.expose_secret())).await {
        Ok(Ok(())) => Verdict::Fine("answers".to_owned()),
        Ok(Err(error)) => {
            let text = format!("{error}. Is it running? Is redis.url right?");
            Verdict::Wrong(Exit::Unavailable, text)
        }
        Err(_) => Verdict::Wrong(Exit::Unavailable, "no answer within 5 s".to_owned()),
    }
}

async fn ping(url: &str) -> redis::RedisResult<()> {
    let mut connection = redis::Client::open(url)?.get_multiplexed_async_connection().await?;
    redis::cmd("PING").query_async(&mut connection).await
}

#[cfg(test)]
mod tests {
    use figment::providers::{Format, Toml};

    use super::*;

    fn opened(more: &str, second: &str) -> Result<String, String> {
        let text = format!(
            r#"name = "a"
               kind = "ali1688"
               {more}
               account = [
                   {{ alias = "one", app_key = "1", app_secret = {{ env = "S" }} }},
                   {{ alias = "two", app_key = "2", app_secret = {{ env = "S" }} {second} }},
               ]"#
        );
        let source = <Toml as Format>::from_str::<SourceConfig>(&text).map_err(|error| error.to_string())?;
        let secret = |_: &str| Some("secret".to_owned());
        let opened = Source::open(&source, Path::new("/nowhere"), &secret).map_err(|error| error.to_string())?;
        let limits = opened.quota().or_unknown(&crate::quota::Config::default().unknown);
        Ok(limits_in_words(&limits, &opened.accounts) + &addresses(&opened))
    }

    #[test]
    fn every_limit_is_shown_whatever_its_kind_and_whomever_it_binds() {
        let more = r#"limits = [
                   { calls = 300, per = "1m", kind = "sliding" },
                   { calls = 9000, per = "1month", kind = "fixed", starts_at = "2026-01-01T00:00:00-08:00[America/Los_Angeles]" },
               ]
               limit = { calls = 10, per = "1s", burst = 5 }
               shared_limits = [{ calls = 50, per = "1s", burst = 2 }]
               address_limit = { calls = 40, per = "1s" }"#;
        let text = opened(more, "").unwrap();
        for shown in [
            "each account: 10 calls per 1s, 5 at once and 300 calls per 1m, in any stretch of that time and 9000 calls per 1month",
            "in windows of which one begins at 2026-01-01T00:00:00-08:00[America/Los_Angeles]",
            "all accounts together: 50 calls per 1s, 2 at once",
            "40 calls per 1s, one at a time",
        ] {
            assert!(text.contains(shown), "{shown:?} is not in {text:?}");
        }
        let text = opened(more, r#", limit = { calls = 1, per = "1s" }, calls_in_flight = 3"#).unwrap();
        for shown in ["one: 10 calls per 1s, 5 at once", "two: 1 call per 1s, one at a time, 3 calls in flight"] {
            assert!(text.contains(shown), "{shown:?} is not in {text:?}");
        }
    }

    #[test]
    fn what_is_sought_is_said_only_of_a_pace_that_nobody_has_given() {
        let day = r#"limits = [{ calls = 5000, per = "1day", kind = "fixed" }]"#;
        let text = opened(day, "").unwrap();
        let expected = "each account: 5000 calls per 1day, in windows that begin at any time, and no configured pace: it is searched \
                        for, starting at 1 call per 1s, one at a time";
        assert!(text.contains(expected), "{text}");
        assert!(
            opened("", "").unwrap().contains("no limit is configured: it is searched for, starting at 1 call per 1s")
        );
        assert!(opened("unlimited = true", "").unwrap().contains("each account: no limit of its own"));
    }

    #[test]
    fn a_month_without_a_calendar_is_refused_with_what_is_allowed() {
        let error = opened(r#"limits = [{ calls = 9, per = "1month", kind = "sliding" }]"#, "").unwrap_err();
        assert!(error.contains("limits is 9 calls per 1month") && error.contains("\"30days\""), "{error}");
    }

    #[test]
    fn offsets_that_are_forgotten_before_the_records_are_warned_of() {
        let topics = topics::Config::default();
        let days = |days: u64| Duration::from_secs(days * 24 * 60 * 60);
        let Verdict::Beware(text) = offsets(days(7), &topics) else { panic!("nothing is said") };
        for part in ["7days", "offsets.retention.minutes", "topics.keep_results is 30days", "at least 43200"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(matches!(offsets(days(30), &topics), Verdict::Fine(_)));
    }
}
