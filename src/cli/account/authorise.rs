//! `weir account authorise`: the link to the vendor's page, and tokens for the code that it gives.

use std::io::{self, BufRead as _, IsTerminal as _};

use anyhow::Context;
use secrecy::{ExposeSecret as _, SecretString};

use super::{Ended, Exit, Found, slot};
use crate::{
    cli::terminal::{note, say},
    config::Config,
    message::AccountAlias,
    platform::Tokens,
    runtime::clock::Clock,
    tokens::{Origin, Record, life},
};

pub(super) const LONG_ABOUT: &str = "\
Have a user authorise the app: print the link, then exchange the returned code for tokens.

The shop's user opens the link, logs in and agrees. The vendor then sends the browser to the redirect URI with \
`?code=…` at its end: paste that code here. It is valid once, for two minutes. The tokens are stored where [tokens] \
says; running roles find them within a second and enable the account again, without a restart.";

pub(super) const EXAMPLES: &str = "\
Examples:
  weir account authorise ali1688 shop-1 --redirect-uri https://shop.example/back
      prints the link, and on a terminal asks for the code
  weir account authorise ali1688 shop-1 --redirect-uri https://shop.example/back --code 4b7c…
      exchanges the code for tokens

The redirect URI must be of the domain that the app is registered with, and the same in both steps.

Exit codes: 0 done, 1 the vendor refused the code, 64 there is no such account or it cannot be authorised";

/// `weir account authorise`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The source.
    source: String,
    /// The account.
    alias: AccountAlias,
    /// Where the vendor sends the browser with the code.
    #[arg(long, value_name = "URI")]
    redirect_uri: String,
    /// The returned code. It is valid once, so the command line may hold it.
    #[arg(long, value_name = "CODE")]
    code: Option<String>,
}

pub(super) async fn run(args: Args, config: &Config) -> anyhow::Result<Exit> {
    let found = Found::find(config, &args.source, &args.alias).await?;
    let given = if args.code.is_some() { args.code } else { asked(&found, &args.redirect_uri).await? };
    let Some(code) = given else { return Ok(Exit::Done) };
    let code = code.trim();
    if code.is_empty() {
        return Err(Ended::usage("there is no code").into());
    }
    let tokens = exchange(config, &found, code, &args.redirect_uri).await?;
    keep(&found, &args.alias, &tokens).await?;
    Ok(Exit::Done)
}

/// Prints the link, and on a terminal waits for the code.
async fn asked(found: &Found, redirect_uri: &str) -> anyhow::Result<Option<String>> {
    let state = uuid::Uuid::now_v7().simple().to_string();
    let link = found.source.vendor.authorise_link(found.configured(), redirect_uri, &state);
    let link = link.ok_or_else(|| {
        Ended::usage(format!("source {} has no page where users authorise an app", found.source.name))
    })?;
    say(&link)?;
    if !io::stdin().is_terminal() {
        note(
            "open it, agree, and run this again with --code and the value of `code=` in the address that the browser \
             is sent to",
        );
        return Ok(None);
    }
    note("open it and agree; then paste the value of `code=` in the address that the browser is sent to:");
    Ok(Some(tokio::task::spawn_blocking(line).await??))
}

fn line() -> anyhow::Result<String> {
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line).context("cannot read the code")?;
    Ok(line)
}

async fn exchange(config: &Config, found: &Found, code: &str, redirect_uri: &str) -> anyhow::Result<Tokens> {
    let (source, account) = (&found.source, found.configured());
    let exchange = source
        .vendor
        .prepare_authorisation(account, code, redirect_uri)
        .ok_or_else(|| Ended::usage(format!("source {} takes no codes", source.name)))?;
    slot::wait(config, source, found.index).await?;
    let reply = source.client.exchange(&exchange).await;
    let tokens = reply.and_then(|reply| source.vendor.interpret_renewal(&reply));
    tokens.map_err(|refusal| {
        let refusal = refusal.redacted(account);
        let message = refusal.message.replace(code, "[code]");
        let advice = "A code counts once and for two minutes, with the redirect URI of its link: open the link again";
        Ended::failed(format!("the vendor gave no token: {} {message}. {advice}", refusal.code)).into()
    })
}

/// Stores the tokens; whatever is stored meanwhile by a role is older.
async fn keep(found: &Found, alias: &AccountAlias, tokens: &Tokens) -> anyhow::Result<()> {
    let (source, account, now) = (&found.source.name, found.configured(), Clock::System.now());
    loop {
        let known = found.store.get(source, alias).await?;
        let (revision, replaces) = known.map_or((0, Vec::new()), |known| (known.revision, known.replaces));
        let record = Record {
            revision: revision + 1,
            access_token: Some(tokens.access_token.clone()),
            refresh_token: tokens.refresh_token.clone(),
            obtained_at: now,
            expires_at: tokens.lives.map(|lives| now.after(lives)),
            refresh_expires_at: tokens.refresh_until,
            origin: Origin::Authorised,
            refused: None,
            replaces: life::replaced(&replaces, account),
        };
        if found.store.put(source, alias, &record).await? {
            let until = record.expires_at.map_or_else(String::new, |at| format!(", valid until {at}"));
            let renewal = match &tokens.refresh_token {
                Some(token) if !is_empty(token) => "it is renewed automatically",
                _ => "the vendor gave no refresh token: authorise it again when it expires",
            };
            say(&format!("{alias} of {source} is authorised{until}; {renewal}. Stored in {}", found.store.place()))?;
            return Ok(());
        }
    }
}

fn is_empty(token: &SecretString) -> bool {
    token.expose_secret().is_empty()
}
