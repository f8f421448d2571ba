//! The simulated vendor's accounts, and the secrets file that lets a client use them.

use std::{fmt::Write as _, io, path::Path};

use secrecy::{ExposeSecret, SecretString};

use super::dice::{Question, next, roll};
use crate::{
    message::{AccountAlias, InvalidId},
    platform::{Account, private},
};

/// Accounts `sim-0001`, `sim-0002`, …, the same for the same seed.
///
/// # Errors
/// None in practice: the aliases are valid by construction.
pub(super) fn generate(seed: u64, count: usize) -> Result<Vec<Account>, InvalidId> {
    generate_as("sim", seed, count)
}

/// The same under another name.
///
/// # Errors
/// If the name is none for accounts.
pub(super) fn generate_as(name: &str, seed: u64, count: usize) -> Result<Vec<Account>, InvalidId> {
    (0_u64..).take(count).map(|index| account(name, seed, index)).collect()
}

fn account(name: &str, seed: u64, index: u64) -> Result<Account, InvalidId> {
    let mut bits = roll(seed, Question::Credentials, index);
    // Seven digits or more; strictly increasing, hence distinct.
    let app_key = 1_000_000 + index * 977 + next(&mut bits) % 977;
    Ok(Account {
        app_key: app_key.to_string(),
        access_token: Some(token(&mut bits)),
        app_secret: SecretString::from(letters(&mut bits, 12)),
        refresh_token: Some(token(&mut bits)),
        ..Account::named(AccountAlias::new(format!("{name}-{:04}", index + 1))?)
    })
}

/// A token in the gateway's form.
pub(super) fn token(bits: &mut u64) -> SecretString {
    let token = u128::from(next(bits)) << 64 | u128::from(next(bits));
    uuid::Uuid::from_u128(token).to_string().into()
}

fn letters(bits: &mut u64, count: usize) -> String {
    const LETTERS: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    (0..count).map(|_| char::from(LETTERS[usize::try_from(next(bits) % 62).unwrap_or(0)])).collect()
}

/// Writes the accounts as TOML for weir's configuration, readable by the owner only.
///
/// Atomic: a reader sees the old file or the whole new one.
///
/// # Errors
/// Whatever the file system says.
pub(super) fn write(path: &Path, accounts: &[Account]) -> io::Result<()> {
    private::replace(path, toml(accounts).as_bytes())
}

/// Keys, secrets and tokens are letters, digits and hyphens: nothing to escape.
fn toml(accounts: &[Account]) -> String {
    let mut text = String::from("# Accounts of a simulated vendor. Written by `weir simulate`.\n");
    for account in accounts {
        let [access, refresh] = [&account.access_token, &account.refresh_token]
            .map(|token| token.as_ref().map_or("", ExposeSecret::expose_secret));
        let secret = account.app_secret.expose_secret();
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "\n[[account]]\nalias = \"{}\"\napp_key = \"{}\"\napp_secret = \"{secret}\"\naccess_token = \"{access}\"\nrefresh_token = \"{refresh}\"\n",
            account.alias, account.app_key,
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, fs, os::unix::fs::PermissionsExt};

    use figment::providers::{Format, Toml};
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct File {
        account: Vec<Entry>,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Entry {
        alias: String,
        app_key: String,
        app_secret: String,
        access_token: String,
        refresh_token: String,
    }

    fn read(path: &Path) -> Vec<Entry> {
        figment::Figment::from(Toml::file_exact(path)).extract::<File>().unwrap().account
    }

    #[test]
    fn accounts_are_distinct_and_the_same_for_the_same_seed() {
        let keys = |seed| generate(seed, 500).unwrap().into_iter().map(|a| a.app_key).collect::<Vec<_>>();
        assert_eq!(keys(7), keys(7));
        assert_ne!(keys(7), keys(8));
        assert_eq!(keys(7).into_iter().collect::<HashSet<_>>().len(), 500);
    }

    #[test]
    fn the_file_says_what_the_accounts_are_and_only_its_owner_can_read_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("accounts.toml");
        let accounts = generate(7, 3).unwrap();
        write(&path, &accounts).unwrap();

        let entries = read(&path);
        assert_eq!(entries.len(), 3);
        for (entry, account) in entries.iter().zip(&accounts) {
            assert_eq!(entry.alias, account.alias.as_str());
            assert_eq!(entry.app_key, account.app_key);
            assert_eq!(entry.app_secret, account.app_secret.expose_secret());
            assert_eq!(entry.access_token, account.access_token.as_ref().unwrap().expose_secret());
            assert_eq!(entry.refresh_token, account.refresh_token.as_ref().unwrap().expose_secret());
        }
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn writing_replaces_an_older_file_and_leaves_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("accounts.toml");
        fs::write(&path, "old, and readable by all").unwrap();
        write(&path, &generate(7, 2).unwrap()).unwrap();
        assert_eq!(read(&path).len(), 2);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
