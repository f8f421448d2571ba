//! Where a source's credentials stand, to be read again once somebody has corrected them.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::{
    accounts::{self, Account, AccountConfig, AccountsError},
    secrets::{SecretRef, Surroundings},
};

/// The files of a source's credentials. Holds no secret itself.
#[derive(Clone, Debug)]
pub struct Credentials {
    accounts: Vec<AccountConfig>,
    accounts_file: Option<PathBuf>,
    folder: PathBuf,
    needs_app_key: bool,
}

/// How the files look from outside. Another stamp: one of them was written, replaced, or may be read by others now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stamp(Vec<Result<FileStamp, io::ErrorKind>>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileStamp {
    file: (u64, u64),
    size: u64,
    mode: u32,
    written: (i64, i64),
    changed: (i64, i64),
}

impl Credentials {
    /// Those of these accounts and of the file of accounts, of a protocol that may need app keys. Relative paths begin at
    /// `folder`, the configuration's. Reads nothing.
    #[must_use]
    pub fn new(accounts: &[AccountConfig], accounts_file: Option<&Path>, needs_app_key: bool, folder: &Path) -> Self {
        Self {
            accounts: accounts.to_owned(),
            accounts_file: accounts_file.map(Path::to_owned),
            folder: folder.to_owned(),
            needs_app_key,
        }
    }

    /// How its files look now. Blocks for as long as the file system takes.
    #[must_use]
    pub fn stamp(&self) -> Stamp {
        let secrets = self.accounts.iter().flat_map(|account| {
            [Some(&account.app_secret), account.access_token.as_ref(), account.refresh_token.as_ref()]
        });
        let files = secrets.flatten().filter_map(|secret| match secret {
            SecretRef::File(path) => Some(path),
            SecretRef::Env(_) => None,
        });
        let files = files.chain(&self.accounts_file).map(|path| self.folder.join(path));
        Stamp(files.map(|path| FileStamp::of(&path).map_err(|error| error.kind())).collect())
    }

    /// Reads the accounts with their secrets as they are now. Blocks for as long as the file system takes.
    ///
    /// # Errors
    /// [`AccountsError`], without any secret, also while a file is only half written.
    pub fn read(&self, env: &dyn Fn(&str) -> Option<String>) -> Result<Vec<Account>, AccountsError> {
        let at = Surroundings { folder: &self.folder, env };
        let accounts = accounts::load(&self.accounts, self.accounts_file.as_deref(), at)?;
        accounts.iter().try_for_each(|account| account.check_key(self.needs_app_key))?;
        Ok(accounts)
    }
}

impl FileStamp {
    fn of(path: &Path) -> io::Result<Self> {
        let found = fs::metadata(path)?;
        Ok(Self {
            file: (found.dev(), found.ino()),
            size: found.size(),
            mode: found.mode(),
            written: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use figment::providers::{Format, Toml};
    use secrecy::ExposeSecret as _;

    use super::*;
    use crate::platform::SourceConfig;

    fn write(path: &Path, text: &str, mode: u32) {
        fs::write(path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn of(config: &SourceConfig, folder: &Path) -> Credentials {
        let SourceConfig { common, protocol } = config;
        let needs_app_key = protocol.protocol().needs_app_key();
        Credentials::new(&common.account, common.accounts_file.as_deref(), needs_app_key, folder)
    }

    #[test]
    fn each_of_the_files_that_has_a_secret_changes_the_stamp_and_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let (file, token) = (folder.path().join("accounts.toml"), folder.path().join("token"));
        let one = |secret: &str| format!("[[account]]\nalias = \"one\"\napp_key = \"1\"\napp_secret = \"{secret}\"\n");
        write(&file, &one("hunter-22"), 0o600);
        write(&token, "token-1", 0o644);
        let config = "name = \"ali1688\"\nkind = \"ali1688\"\naccounts_file = \"accounts.toml\"\n[[account]]\nalias = \"two\"\n\
                      app_key = \"2\"\napp_secret = { env = \"SECRET\" }\naccess_token = { file = \"token\" }\n";
        let config = <Toml as Format>::from_str::<SourceConfig>(config).unwrap();
        let credentials = of(&config, folder.path());
        let env = |_: &str| Some("from-env".to_owned());
        let read = || {
            let accounts = credentials.read(&env).map_err(|error| error.to_string())?;
            let token = accounts[0].access_token.as_ref().unwrap().expose_secret().to_owned();
            Ok::<_, String>((token, accounts[1].app_secret.expose_secret().to_owned()))
        };
        assert_eq!(read(), Ok(("token-1".to_owned(), "hunter-22".to_owned())));
        let first = credentials.stamp();
        assert_eq!(credentials.stamp(), first);
        write(&token, "token-22", 0o644);
        let second = credentials.stamp();
        assert_ne!(second, first);
        // Of the same length, in place of the other.
        let beside = folder.path().join("new");
        write(&beside, &one("hunter-33"), 0o600);
        fs::rename(&beside, &file).unwrap();
        let third = credentials.stamp();
        assert_ne!(third, second);
        assert_eq!(read(), Ok(("token-22".to_owned(), "hunter-33".to_owned())));
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        assert_ne!(credentials.stamp(), third);
        assert!(read().unwrap_err().contains("chmod 600"));
        fs::remove_file(&file).unwrap();
        let gone = credentials.stamp();
        assert_eq!(gone, credentials.stamp());
        assert!(read().unwrap_err().contains("cannot read"));
        assert!(!format!("{credentials:?}{gone:?}").contains("hunter"));
    }

    #[test]
    fn an_app_key_that_the_kind_needs_is_asked_for_again() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("accounts.toml");
        write(&file, "[[account]]\nalias = \"one\"\napp_secret = \"hunter-22\"\n", 0o600);
        let config = "name = \"ali1688\"\nkind = \"ali1688\"\naccounts_file = \"accounts.toml\"";
        let config = <Toml as Format>::from_str::<SourceConfig>(config).unwrap();
        let refused = of(&config, folder.path()).read(&|_| None).unwrap_err();
        assert!(refused.to_string().contains("account one: app_key"), "{refused}");
    }
}
