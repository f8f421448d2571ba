//! `weir account add`: one more `[[account]]` in a source's `accounts_file`.

use std::{
    fs,
    io::{self, BufRead as _, IsTerminal as _},
    path::Path,
};

use anyhow::Context;
use secrecy::{ExposeSecret as _, SecretString};

use super::{Ended, Exit, source_named};
use crate::{
    cli::terminal::{note, say},
    config::Config,
    message::AccountAlias,
    platform::{SourceConfig, accounts, private},
};

pub(super) const LONG_ABOUT: &str = "\
Add an account to a source's accounts_file.

The secrets are prompted for on the terminal without echo, or read from standard input, one per line: app secret, \
access token, refresh token; the last two may be empty or missing. They are never taken from the command line, where \
others could see them. The rest of the file stays as it is, with its comments. Running roles use the account after a \
restart.";

pub(super) const EXAMPLES: &str = "\
Examples:
  weir account add ali1688 --alias shop-3 --app-key 1234567
  weir account add ali1688 --alias shop-3 --app-key 1234567 < secrets-of-shop-3.txt
  weir account authorise ali1688 shop-3 --redirect-uri https://shop.example/back # for a token

Exit codes: 0 done, 1 the file cannot be written, 64 there is such an account already, or it is not valid";

/// `weir account add`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The source.
    source: String,
    /// Its name in logs and rows.
    #[arg(long)]
    alias: AccountAlias,
    /// The vendor's app key; a reseller's pool keys have none.
    #[arg(long, value_name = "KEY", default_value = "", hide_default_value = true)]
    app_key: String,
}

/// What is asked for.
struct Secrets {
    app_secret: SecretString,
    access_token: Option<SecretString>,
    refresh_token: Option<SecretString>,
}

pub(super) async fn run(args: &Args, config: &Config) -> anyhow::Result<Exit> {
    let source = source_named(config, &args.source)?;
    let Some(path) = source.common.accounts_file.as_ref().map(|path| config.folder().join(path)) else {
        let text = format!(
            "source {} has no accounts_file: set one, such as accounts_file = \"accounts.toml\"",
            source.common.name
        );
        return Err(Ended::usage(text).into());
    };
    // Through a link the file that it names is replaced, not the link.
    let path = fs::canonicalize(&path).unwrap_or(path);
    let text = present(&path)?;
    check(source, &path, &text, args)?;
    let secrets = tokio::task::spawn_blocking(ask).await??;
    let extended = format!("{text}{}", entry(args, &secrets, &text));
    let of_file = accounts::parse(&path, &extended).map_err(|error| Ended::usage(error.to_string()))?;
    if of_file.last().is_none_or(|account| account.alias != args.alias) {
        return Err(Ended::usage(format!(
            "{} cannot be extended: its last table takes up what follows",
            path.display()
        ))
        .into());
    }
    private::replace(&path, extended.as_bytes()).with_context(|| format!("cannot write {}", path.display()))?;
    say(&format!(
        "{} is added to {}. Try it: weir account test {} {}",
        args.alias,
        path.display(),
        args.source,
        args.alias
    ))?;
    Ok(Exit::Done)
}

/// The file's text; nothing if there is none. One that others can read is refused like anywhere else.
fn present(path: &Path) -> anyhow::Result<String> {
    match fs::exists(path) {
        Ok(false) => Ok(String::new()),
        _ => Ok(accounts::text(path).map_err(|error| Ended::usage(error.to_string()))?.expose_secret().to_owned()),
    }
}

/// Refuses an account that is there already, in the file or in the configuration, before any secret is asked for.
fn check(source: &SourceConfig, path: &Path, text: &str, args: &Args) -> anyhow::Result<()> {
    if args.app_key.is_empty() && source.protocol.protocol().needs_app_key() {
        return Err(Ended::usage(format!("accounts of source {} need an --app-key", source.common.name)).into());
    }
    let of_file = accounts::parse(path, text).map_err(|error| Ended::usage(error.to_string()))?;
    let known = of_file.iter().map(|account| (&account.alias, &account.app_key));
    let known: Vec<_> =
        known.chain(source.common.account.iter().map(|account| (&account.alias, &account.app_key))).collect();
    if known.iter().any(|(alias, _)| **alias == args.alias) {
        let text =
            format!("source {} has an account {} already: choose another --alias", source.common.name, args.alias);
        return Err(Ended::usage(text).into());
    }
    if let Some((alias, key)) = known.iter().find(|(_, key)| !key.is_empty() && **key == args.app_key) {
        // One app may act for several users, each with a token of its own.
        note(&format!("note: {alias} has the app key {key} too: if the vendor counts per app, they share one quota"));
    }
    Ok(())
}

fn ask() -> anyhow::Result<Secrets> {
    let stdin = io::stdin();
    let mut lines = Vec::new();
    if stdin.is_terminal() {
        for what in ["app secret", "access token (empty if there is none)", "refresh token (empty if there is none)"] {
            note(&format!("{what}, not shown:"));
            lines.push(console::Term::stderr().read_secure_line().with_context(|| format!("cannot read the {what}"))?);
        }
    } else {
        for line in stdin.lock().lines().take(3) {
            lines.push(line.context("cannot read the secrets from standard input")?);
        }
    }
    let mut lines = lines.into_iter().map(|line| line.trim().to_owned());
    let app_secret = lines.next().filter(|line| !line.is_empty());
    let app_secret = app_secret.ok_or_else(|| Ended::usage("there is no app secret"))?.into();
    let mut token = || lines.next().filter(|line| !line.is_empty()).map(SecretString::from);
    Ok(Secrets { app_secret, access_token: token(), refresh_token: token() })
}

/// The lines to append.
fn entry(args: &Args, secrets: &Secrets, before: &str) -> String {
    let quoted = |text: &str| toml::Value::String(text.to_owned()).to_string();
    let mut keys = vec![("alias", quoted(args.alias.as_str()))];
    keys.extend((!args.app_key.is_empty()).then(|| ("app_key", quoted(&args.app_key))));
    keys.push(("app_secret", quoted(secrets.app_secret.expose_secret())));
    let tokens = [("access_token", &secrets.access_token), ("refresh_token", &secrets.refresh_token)];
    keys.extend(tokens.into_iter().filter_map(|(key, token)| Some((key, quoted(token.as_ref()?.expose_secret())))));
    let lines: Vec<_> = keys.into_iter().map(|(key, value)| format!("{key} = {value}")).collect();
    let gap = match before {
        "" => "",
        text if text.ends_with('\n') => "\n",
        _ => "\n\n",
    };
    format!("{gap}[[account]]\n{}\n", lines.join("\n"))
}
