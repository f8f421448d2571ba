//! `weir check` of tokens: whether the token store is readable and writable, and whether each account's token is
//! usable.

use std::collections::HashMap;

use super::{
    super::terminal::{agree, counted},
    Finding, Verdict,
};
use crate::{
    cli::exit::Exit,
    config::{self, Config},
    message::AccountAlias,
    platform::{Account, Source},
    runtime::clock::{Clock, Timestamp},
    tokens::{
        Mark, Record, StoreError,
        life::{self, Choice},
    },
};

/// How many accounts are named.
const SHOWN: usize = 5;

/// What the tokens of the accounts of all sources come to.
#[derive(Debug, Default)]
struct Tally {
    /// Accounts that call with a token …
    with: usize,
    /// … and those that call without: their API needs none, or they are still to be authorised.
    without: usize,
    renewable: bool,
    /// Accounts that cannot call, and why.
    lost: Vec<String>,
}

pub(super) async fn finding(config: &Config) -> Finding {
    Finding { what: "tokens".to_owned(), verdict: verdict(config).await }
}

async fn verdict(config: &Config) -> Verdict {
    let store = match config.token_store() {
        Ok(store) => store,
        Err(error) => return Verdict::Wrong(Exit::Usage, error.to_string()),
    };
    let (place, now) = (store.place(), Clock::System.now());
    let mut tally = Tally::default();
    for source in &config.sources {
        // What is wrong with it has been said.
        let Ok(opened) = Source::open(source, config.folder(), &config::variable) else { continue };
        let records = match store.changes(&opened.name, Mark::default()).await {
            Ok(changes) => changes.records.into_iter().collect::<HashMap<AccountAlias, Record>>(),
            Err(error) => return trouble(&error),
        };
        for account in opened.accounts.iter() {
            tally.take(opened.name.as_str(), account, records.get(&account.alias), now);
        }
    }
    if !tally.lost.is_empty() {
        let named = tally.lost.iter().take(SHOWN).cloned().collect::<Vec<_>>().join("; ");
        let more = tally.lost.len().saturating_sub(SHOWN);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        return Verdict::Wrong(Exit::Failed, format!("{named}{more}. `weir account authorise` gives a new one"));
    }
    match store.try_writing().await {
        Ok(()) => Verdict::Fine(format!("{place}: readable and writable; {}", tally.words())),
        Err(error) if tally.renewable => trouble(&error),
        Err(error) => Verdict::Skipped(format!("{error}; no account has a token to be renewed")),
    }
}

fn trouble(error: &StoreError) -> Verdict {
    match error {
        StoreError::Redis(_) => Verdict::Wrong(Exit::Unavailable, error.to_string()),
        StoreError::File { .. }
        | StoreError::Exposed { .. }
        | StoreError::Damaged { .. }
        | StoreError::OtherKey { .. }
        | StoreError::Ended(_) => Verdict::Wrong(Exit::Failed, error.to_string()),
    }
}

impl Tally {
    fn take(&mut self, source: &str, account: &Account, record: Option<&Record>, now: Timestamp) {
        let record = record.filter(|record| life::choose(account, Some(record)) == Choice::Stored);
        let (access, refresh) = match record {
            Some(record) => (record.access_token.is_some(), record.refresh_token.is_some()),
            None => (account.access_token.is_some(), account.refresh_token.is_some()),
        };
        self.renewable |= refresh;
        if access || refresh {
            self.with += 1;
        } else {
            self.without += 1;
        }
        let Some(record) = record else { return };
        let whom = format!("the token of {} of {source}", account.alias);
        let is_over = |at: Option<Timestamp>| at.is_some_and(|at| at <= now);
        if let Some(refused) = &record.refused {
            self.lost.push(format!("{whom} was refused at {} ({})", refused.at, refused.code));
        } else if is_over(record.expires_at) && (!refresh || is_over(record.refresh_expires_at)) {
            self.lost.push(format!("{whom} has expired, and cannot be renewed without a refresh token"));
        }
    }

    fn words(&self) -> String {
        match (self.with, self.without) {
            (0, 0) => "there are no accounts".to_owned(),
            (1, 0) => "the account has a token".to_owned(),
            (with, 0) => format!("all of {with} accounts have a token"),
            (0, 1) => "the account has no token: its API needs none, or authorise it".to_owned(),
            (0, without) => format!("none of {without} accounts has a token: their API needs none, or authorise them"),
            (with, without) => format!(
                "{} {} a token, {without} {} none: their API needs none, or authorise them; see `weir account list`",
                counted(with as u64, "account"),
                agree(with as u64, "has", "have"),
                agree(without as u64, "has", "have"),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokens::{Origin, Refused};

    fn account(alias: &str, token: Option<&str>) -> Account {
        Account { access_token: token.map(Into::into), ..Account::named(AccountAlias::new(alias).unwrap()) }
    }

    fn record(account: &Account, expires_at: i64, refresh: Option<&str>) -> Record {
        Record {
            revision: 1,
            access_token: Some("at-2".into()),
            refresh_token: refresh.map(Into::into),
            obtained_at: Timestamp::from_millis(0),
            expires_at: Some(Timestamp::from_millis(expires_at)),
            refresh_expires_at: None,
            origin: Origin::Renewed,
            refused: None,
            replaces: life::replaced(&[], account),
        }
    }

    #[test]
    fn an_account_whose_token_is_of_no_use_any_more_is_named_and_others_are_counted() {
        let now = Timestamp::from_millis(1_000);
        let one = account("one", Some("at-1"));
        let refused = Refused { at: now, code: "401".to_owned(), message: "no".to_owned() };
        let table = [
            (None, None),
            (Some(record(&one, 2_000, None)), None),
            (Some(record(&one, 500, Some("rt"))), None),
            (Some(record(&one, 500, None)), Some("has expired")),
            (Some(Record { refused: Some(refused), ..record(&one, 2_000, Some("rt")) }), Some("was refused at")),
            // The configuration has been changed since.
            (Some(Record { replaces: Vec::new(), ..record(&one, 500, None) }), None),
        ];
        for (record, expected) in table {
            let mut tally = Tally::default();
            tally.take("ali1688", &one, record.as_ref(), now);
            tally.take("ali1688", &account("two", None), None, now);
            assert_eq!((tally.with, tally.without), (1, 1));
            let lost = tally.lost.join(";");
            assert_eq!(lost.is_empty(), expected.is_none(), "{lost}");
            assert!(lost.contains(expected.unwrap_or_default()) && !lost.contains("at-"), "{lost}");
        }
    }
}
