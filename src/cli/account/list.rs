//! `weir account list`: the accounts and the state of their tokens.

use std::collections::HashMap;

use super::{Exit, effective, opened};
use crate::{
    cli::terminal::{say, table},
    config::Config,
    platform::Account,
    runtime::clock::{Clock, Timestamp},
    tokens::{
        Mark, Origin, Record,
        life::{self, Choice},
    },
};

pub(super) const EXAMPLES: &str = "\
Examples:
  weir account list               # the accounts of all sources
  weir account list ali1688       # those of one

The state of a token: `none` (its API needs none, or it is still to be authorised), `as configured` (its expiry is \
unknown), `valid until`, `expired at` (it is renewed at the account's next call), `refused at` (run weir account \
authorise).";

/// `weir account list`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only the accounts of this source.
    source: Option<String>,
}

pub(super) async fn run(args: &Args, config: &Config) -> anyhow::Result<Exit> {
    let names = match &args.source {
        Some(name) => vec![super::source_named(config, name)?.common.name.clone()],
        None => config.source_names(),
    };
    let store = config.token_store()?;
    let now = Clock::System.now();
    let mut rows = Vec::new();
    for name in names {
        let source = opened(config, name.as_str())?;
        let records = store.changes(&source.name, Mark::default()).await?.records;
        let records: HashMap<_, _> = records.into_iter().collect();
        for account in source.accounts.iter() {
            rows.push(row(name.as_str(), account, records.get(&account.alias), now));
        }
    }
    say(&table(&["source", "account", "app key", "token", "renewal", "obtained"], &rows))?;
    Ok(Exit::Done)
}

fn row(source: &str, account: &Account, record: Option<&Record>, now: Timestamp) -> Vec<String> {
    let record = record.filter(|record| life::choose(account, Some(record)) == Choice::Stored);
    let effective = effective(account, record);
    let renewal = match record.and_then(|record| record.refresh_expires_at) {
        _ if effective.refresh_token.is_none() => "none".to_owned(),
        Some(at) if at <= now => format!("expired at {}", second(at)),
        Some(at) => format!("until {}", second(at)),
        None => "yes".to_owned(),
    };
    let obtained = record.map_or_else(String::new, |record| {
        let how = match record.origin {
            Origin::Configured => "configured",
            Origin::Renewed => "renewed",
            Origin::Authorised => "authorised",
        };
        format!("{how} at {}", second(record.obtained_at))
    });
    let texts =
        [source, account.alias.as_str(), &account.app_key, &state(&effective, record, now), &renewal, &obtained];
    texts.map(str::to_owned).to_vec()
}

fn state(effective: &Account, record: Option<&Record>, now: Timestamp) -> String {
    let expires_at = record.and_then(|record| record.expires_at);
    match (record.and_then(|record| record.refused.as_ref()), expires_at) {
        (Some(refused), _) => format!("refused at {} ({})", second(refused.at), refused.code),
        _ if effective.access_token.is_none() => "none".to_owned(),
        (None, Some(at)) if at <= now => format!("expired at {}", second(at)),
        (None, Some(at)) => format!("valid until {}", second(at)),
        (None, None) => "as configured".to_owned(),
    }
}

/// A time without its milliseconds.
fn second(at: Timestamp) -> String {
    let text = at.to_string();
    text.split_once('.').map_or_else(|| text.clone(), |(second, _)| format!("{second}Z"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{message::AccountAlias, tokens::Refused};

    fn account(access: Option<&str>, refresh: Option<&str>) -> Account {
        Account {
            app_key: "1000000".to_owned(),
            access_token: access.map(Into::into),
            refresh_token: refresh.map(Into::into),
            ..Account::named(AccountAlias::new("shop").unwrap())
        }
    }

    fn record(account: &Account, expires_at_s: i64) -> Record {
        Record {
            revision: 1,
            access_token: Some("at-2".into()),
            refresh_token: Some("rt-2".into()),
            obtained_at: Timestamp::from_millis(0),
            expires_at: Some(Timestamp::from_millis(expires_at_s * 1_000)),
            refresh_expires_at: None,
            origin: Origin::Renewed,
            refused: None,
            replaces: life::replaced(&[], account),
        }
    }

    #[test]
    fn each_state_is_said_and_no_secret_is_shown() {
        let now = Timestamp::from_millis(100_000);
        let configured = account(Some("at-1"), Some("rt-1"));
        let refused = Refused { at: now, code: "401".to_owned(), message: "no".to_owned() };
        let dead = Record { refused: Some(refused), ..record(&configured, 1_000) };
        let table = [
            (account(None, None), None, "none"),
            (configured.clone(), None, "as configured"),
            (configured.clone(), Some(record(&configured, 1_000)), "valid until 1970-01-01T00:16:40Z"),
            (configured.clone(), Some(record(&configured, 10)), "expired at 1970-01-01T00:00:10Z"),
            (configured.clone(), Some(dead), "refused at 1970-01-01T00:01:40Z (401)"),
            // Its record is of another configuration.
            (account(Some("at-9"), None), Some(record(&configured, 1_000)), "as configured"),
        ];
        for (account, record, expected) in table {
            let row = row("ali1688", &account, record.as_ref(), now);
            assert_eq!(row[3], expected);
            assert!(row.iter().all(|cell| !cell.contains("at-") && !cell.contains("rt-")), "{row:?}");
        }
    }
}
