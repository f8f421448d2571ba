//! Accounts: one set of credentials each, with secrets that cannot be printed.
//!
//! Secrets come from the environment or from files, never from the configuration itself: that one gets
//! copied, shown and committed.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use figment::providers::{Format, Toml};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};

use super::preset::Preset;
use super::secrets::{Inline, Readers, SecretError, SecretRef, Surroundings, read};
use crate::{message::AccountAlias, quota::Limit};

/// The longest file of accounts, in bytes: room for some 100,000.
const ACCOUNTS_LIMIT: u64 = 64 * 1024 * 1024;

/// One set of credentials with its own quota.
#[derive(Clone, Debug)]
pub struct Account {
    /// What logs and records call it.
    pub alias: AccountAlias,
    /// The vendor's public name for it (1688: app key).
    pub app_key: String,
    /// Signs requests.
    pub app_secret: SecretString,
    /// Proves the user's authorisation, where the API needs one.
    pub access_token: Option<SecretString>,
    /// Renews that one.
    pub refresh_token: Option<SecretString>,
    /// What the vendor allows it; without one, the source's limit for each account counts.
    pub limit: Option<Limit>,
    /// Further limits, which hold together with that one.
    pub limits: Vec<Limit>,
    /// How many of its calls may be under way at once; `None` = any number.
    pub calls_in_flight: Option<u32>,
    /// The address that its calls leave from; `None` = one is chosen for it.
    pub address: Option<String>,
}

/// `[[source.account]]`: an account whose secrets are elsewhere.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccountConfig {
    /// What logs and records call it.
    pub alias: AccountAlias,
    /// The vendor's public name for it (1688: app key); keys of a reseller's pool have none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub app_key: String,
    /// Where its secret is.
    pub app_secret: SecretRef,
    /// Where its token is, if the API needs one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_token: Option<SecretRef>,
    /// Where the token is that renews it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refresh_token: Option<SecretRef>,
    /// What the vendor allows it, if it differs from the source's limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<Limit>,
    /// Further limits, which hold together with that one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub limits: Vec<Limit>,
    /// How many of its calls may be under way at once; without one, any number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calls_in_flight: Option<u32>,
    /// A published limit by name, in place of `limit`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preset: Option<Preset>,
    /// The address that its calls leave from; without one, one of the source's is chosen for good.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
}

/// Why accounts cannot be used. No message has a secret in it.
#[derive(Debug, thiserror::Error)]
pub enum AccountsError {
    /// A secret cannot be had.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// A secret of no characters.
    #[error("account {alias}: {key} is empty")]
    Empty {
        /// Which account.
        alias: AccountAlias,
        /// Which key of it.
        key: &'static str,
    },
    /// The file of accounts is no TOML, or not of the expected form.
    #[error("accounts_file {} line {line}: {message}", path.display())]
    Toml {
        /// The file.
        path: PathBuf,
        /// Where.
        line: usize,
        /// What is wrong, without the line itself.
        message: String,
    },
    /// An app key that cannot stand in a URL's path.
    #[error("account {alias}: app_key {found:?} must be 1 to 64 ASCII letters, digits, `-`, `_` or `.`")]
    AppKey {
        /// Which account.
        alias: AccountAlias,
        /// What it is.
        found: String,
    },
    /// A preset that says nothing about accounts.
    #[error("account {alias}: preset {preset:?} says nothing about accounts; set it for the source, or give a limit")]
    Preset {
        /// Which account.
        alias: AccountAlias,
        /// Which preset.
        preset: &'static str,
    },
    /// Two accounts of one name.
    #[error("account {alias} is declared twice: each alias names one account of a source")]
    Duplicate {
        /// The name.
        alias: AccountAlias,
    },
}

/// The accounts of the configuration, then those of the file, with their secrets.
///
/// # Errors
/// [`AccountsError`] for the first account that cannot be used.
pub fn load(
    accounts: &[AccountConfig],
    accounts_file: Option<&Path>,
    at: Surroundings<'_>,
) -> Result<Vec<Account>, AccountsError> {
    let mut loaded: Vec<Account> =
        accounts.iter().map(|account| account.resolve(at)).collect::<Result<_, AccountsError>>()?;
    if let Some(path) = accounts_file {
        let path = at.folder.join(path);
        loaded.extend(parse(&path, text(&path)?.expose_secret())?);
    }
    let mut aliases = HashSet::with_capacity(loaded.len());
    for account in &loaded {
        account.check()?;
        if !aliases.insert(&account.alias) {
            return Err(AccountsError::Duplicate { alias: account.alias.clone() });
        }
    }
    Ok(loaded)
}

impl AccountConfig {
    fn resolve(&self, at: Surroundings<'_>) -> Result<Account, AccountsError> {
        let secret = |key: &'static str, at_ref: &SecretRef| {
            let what = format!("account {}: {key}", self.alias);
            at_ref.resolve(&what, at)
        };
        Ok(Account {
            alias: self.alias.clone(),
            app_key: self.app_key.clone(),
            app_secret: secret("app_secret", &self.app_secret)?,
            access_token: self.access_token.as_ref().map(|token| secret("access_token", token)).transpose()?,
            refresh_token: self.refresh_token.as_ref().map(|token| secret("refresh_token", token)).transpose()?,
            limit: limit_of(&self.alias, self.limit.clone(), self.preset)?,
            limits: self.limits.clone(),
            calls_in_flight: self.calls_in_flight,
            address: self.address.clone(),
        })
    }
}

impl Account {
    /// An account of this name that has nothing else yet.
    #[must_use]
    pub fn named(alias: AccountAlias) -> Self {
        Self {
            alias,
            app_key: String::new(),
            app_secret: SecretString::default(),
            access_token: None,
            refresh_token: None,
            limit: None,
            limits: Vec::new(),
            calls_in_flight: None,
            address: None,
        }
    }

    /// Whether this is the same name, key, secret and tokens; limits and addresses may differ.
    #[must_use]
    pub fn has_credentials_of(&self, other: &Self) -> bool {
        let token = |token: &Option<SecretString>| token.as_ref().map(|token| token.expose_secret().to_owned());
        let all = |account: &Self| {
            let secret = account.app_secret.expose_secret().to_owned();
            (account.app_key.clone(), secret, token(&account.access_token), token(&account.refresh_token))
        };
        self.alias == other.alias && all(self) == all(other)
    }

    /// The same account with the credentials of another one.
    #[must_use]
    pub fn with_credentials_of(&self, other: &Self) -> Self {
        Self {
            app_key: other.app_key.clone(),
            app_secret: other.app_secret.clone(),
            access_token: other.access_token.clone(),
            refresh_token: other.refresh_token.clone(),
            ..self.clone()
        }
    }

    /// Whether its app key can stand in a URL's path, and is there if it is needed.
    pub(super) fn check_key(&self, is_needed: bool) -> Result<(), AccountsError> {
        let key = self.app_key.as_bytes();
        let is_right = key.len() <= 64 && key.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(byte));
        if is_right && !(is_needed && key.is_empty()) {
            return Ok(());
        }
        Err(AccountsError::AppKey { alias: self.alias.clone(), found: self.app_key.clone() })
    }

    fn check(&self) -> Result<(), AccountsError> {
        self.check_key(false)?;
        let empty = |secret: &SecretString| secret.expose_secret().trim().is_empty();
        let secrets = [
            ("app_secret", Some(&self.app_secret)),
            ("access_token", self.access_token.as_ref()),
            ("refresh_token", self.refresh_token.as_ref()),
        ];
        match secrets.into_iter().find(|(_, secret)| secret.is_some_and(empty)) {
            Some((key, _)) => Err(AccountsError::Empty { alias: self.alias.clone(), key }),
            None => Ok(()),
        }
    }
}

/// `accounts_file`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AccountsFile {
    #[serde(default)]
    account: Vec<InlineAccount>,
}

/// `[[account]]`: its secrets stand right there.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct InlineAccount {
    alias: AccountAlias,
    #[serde(default)]
    app_key: String,
    app_secret: Inline,
    access_token: Option<Inline>,
    refresh_token: Option<Inline>,
    limit: Option<Limit>,
    #[serde(default)]
    limits: Vec<Limit>,
    calls_in_flight: Option<u32>,
    preset: Option<Preset>,
    address: Option<String>,
}

/// An account's own limit: the one that is given, else the preset's.
fn limit_of(
    alias: &AccountAlias,
    limit: Option<Limit>,
    preset: Option<Preset>,
) -> Result<Option<Limit>, AccountsError> {
    match (limit, preset) {
        (None, Some(preset)) => {
            let missing = || AccountsError::Preset { alias: alias.clone(), preset: preset.name() };
            preset.account().map(Some).ok_or_else(missing)
        }
        (limit, _) => Ok(limit),
    }
}

impl TryFrom<InlineAccount> for Account {
    type Error = AccountsError;

    fn try_from(inline: InlineAccount) -> Result<Self, AccountsError> {
        Ok(Self {
            limit: limit_of(&inline.alias, inline.limit, inline.preset)?,
            alias: inline.alias,
            app_key: inline.app_key,
            app_secret: inline.app_secret.0,
            access_token: inline.access_token.map(|token| token.0),
            refresh_token: inline.refresh_token.map(|token| token.0),
            limits: inline.limits,
            calls_in_flight: inline.calls_in_flight,
            address: inline.address,
        })
    }
}

/// The text of a file of accounts that only its owner can read.
///
/// # Errors
/// [`AccountsError::Secret`]
pub fn text(path: &Path) -> Result<SecretString, AccountsError> {
    Ok(read("accounts_file", path, ACCOUNTS_LIMIT, Readers::OwnerOnly)?)
}

/// The accounts that such a text declares, each checked by itself.
///
/// # Errors
/// [`AccountsError`] with the line, and without it if it could hold a secret.
pub fn parse(path: &Path, text: &str) -> Result<Vec<Account>, AccountsError> {
    let file = <Toml as Format>::from_str::<AccountsFile>(text);
    // Only the message: what the parser displays quotes the line, and the line has secrets in it.
    let file = file.map_err(|error| AccountsError::Toml {
        path: path.to_owned(),
        line: line_of(text, error.span().map_or(0, |span| span.start)),
        message: error.message().to_owned(),
    })?;
    let accounts = file.account.into_iter().map(Account::try_from).collect::<Result<Vec<_>, _>>()?;
    accounts.iter().try_for_each(Account::check)?;
    Ok(accounts)
}

fn line_of(text: &str, at: usize) -> usize {
    1 + text.bytes().take(at).filter(|byte| *byte == b'\n').count()
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn with(name: &str, text: &str, mode: u32) -> Self {
            use std::os::unix::fs::PermissionsExt;
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            Self(folder)
        }

        fn load(&self, accounts: &[AccountConfig]) -> Result<Vec<Account>, AccountsError> {
            let env = |name: &str| (name == "APP_SECRET").then(|| "from-env".to_owned());
            let at = Surroundings { folder: self.0.path(), env: &env };
            load(accounts, Some(Path::new("accounts.toml")), at)
        }

        fn refusal(&self) -> String {
            self.load(&[]).unwrap_err().to_string()
        }
    }

    fn file(text: &str) -> Folder {
        Folder::with("accounts.toml", text, 0o600)
    }

    fn configured(alias: &str) -> AccountConfig {
        AccountConfig {
            alias: AccountAlias::new(alias).unwrap(),
            app_key: "1000000".to_owned(),
            app_secret: SecretRef::Env("APP_SECRET".to_owned()),
            access_token: None,
            refresh_token: None,
            limit: None,
            limits: Vec::new(),
            calls_in_flight: None,
            preset: None,
            address: None,
        }
    }

    const ONE: &str = "[[account]]\nalias = \"one\"\napp_key = \"1\"\napp_secret = \"hunter22\"\naccess_token = \"at-1\"\n\
                       limit = { calls = 10, per = \"1s\" }\n";

    #[test]
    fn accounts_come_from_the_configuration_and_from_the_file() {
        let accounts = file(ONE).load(&[configured("zero")]).unwrap();
        let aliases: Vec<_> = accounts.iter().map(|account| account.alias.as_str()).collect();
        assert_eq!(aliases, ["zero", "one"]);
        assert_eq!(accounts[0].app_secret.expose_secret(), "from-env");
        assert_eq!(accounts[1].app_secret.expose_secret(), "hunter22");
        assert_eq!(accounts[1].limit.as_ref().map(|limit| (limit.calls, limit.burst)), Some((10, 1)));
    }

    #[test]
    fn printing_accounts_shows_no_secret() {
        let accounts = file(ONE).load(&[configured("zero")]).unwrap();
        let shown = format!("{accounts:?}");
        assert!(!shown.contains("hunter22") && !shown.contains("from-env") && !shown.contains("at-1"), "{shown}");
    }

    #[test]
    fn what_is_wrong_with_the_file_is_said_with_its_line_and_without_its_secrets() {
        let secret = "app_secret = \"hunter22\"";
        let table = [
            (ONE.replace(secret, "app_secret = hunter22"), "line 4"),
            (ONE.replace(secret, "app_secret = 220022"), "must be a text in quotes"),
            (ONE.replace(secret, "app_secret = \"hunter22"), "line 4"),
            (ONE.replace(secret, "secret = \"hunter22\""), "unknown field `secret`"),
            (ONE.replace(secret, ""), "missing field `app_secret`"),
            (ONE.replace(secret, "app_secret = \" \""), "app_secret is empty"),
            (ONE.replace("\"at-1\"", "\"\""), "access_token is empty"),
            (ONE.replace("\"one\"", "\"o ne\""), "line 2"),
            (ONE.replace("app_key = \"1\"", "app_key = \"a/b\""), "app_key \"a/b\" must be"),
            (format!("{ONE}{ONE}"), "account one is declared twice"),
            (ONE.replace("calls = 10", "calls = -1"), "line 6"),
        ];
        for (text, expected) in table {
            let message = file(&text).refusal();
            assert!(message.contains(expected), "{message:?} should say {expected:?}");
            // Not "22", which stands in the name of a folder for tests now and then.
            assert!(["hunter", "2200", "at-1"].iter().all(|secret| !message.contains(secret)), "{message}");
        }
    }

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        for mode in [0o640, 0o604, 0o644, 0o660] {
            let message = Folder::with("accounts.toml", ONE, mode).refusal();
            assert!(message.contains(&format!("mode {mode:03o}")) && message.contains("chmod 600"), "{message}");
        }
        let message = Folder::with("other.toml", ONE, 0o600).refusal();
        assert!(message.contains("accounts_file: cannot read"), "{message}");
    }

    #[test]
    fn ten_thousand_accounts_load() {
        let mut text = String::new();
        for n in 0..10_000 {
            write!(
                text,
                "[[account]]\nalias = \"a{n}\"\napp_key = \"{n}\"\napp_secret = \"s{n}\"\naccess_token = \"t{n}\"\n"
            )
            .unwrap();
        }
        let accounts = file(&text).load(&[]).unwrap();
        assert_eq!(accounts.len(), 10_000);
        assert_eq!(accounts[9_999].access_token.as_ref().unwrap().expose_secret(), "t9999");
    }
}
