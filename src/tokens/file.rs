//! Tokens in a file that only its owner can read, shared by the processes of one machine.
//!
//! A reader sees the old file or the new one. Writers take turns by a lock on a file beside it; so do renewals, by one
//! of a few lock files that each serve many accounts: the system frees them when a process is killed.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

use super::{Changes, Claim, Held, Mark, Record, StoreError, TokenStore};
use crate::{
    message::{AccountAlias, SourceName},
    platform::private,
};

/// So many accounts can be renewed at once.
const CLAIMS: u64 = 64;
/// The longest file that is read, in bytes.
const FILE_LIMIT: u64 = 256 * 1024 * 1024;

/// The file's content.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    /// By source, then by alias.
    tokens: BTreeMap<SourceName, BTreeMap<AccountAlias, Record>>,
}

/// Tokens in one file.
#[derive(Clone, Debug)]
pub struct FileStore {
    path: PathBuf,
}

impl FileStore {
    /// A store in this file, which need not exist. Touches nothing.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    fn failed(&self, what: &'static str) -> impl Fn(io::Error) -> StoreError + '_ {
        move |error| StoreError::File { place: self.path.display().to_string(), what, error }
    }

    fn folder(&self) -> &Path {
        self.path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
    }

    /// Makes the folder if it is missing, and refuses one that others can look into.
    fn prepare(&self) -> Result<(), StoreError> {
        let folder = self.folder();
        if !folder.exists() {
            let mut builder = DirBuilder::new();
            builder.recursive(true).mode(0o700).create(folder).map_err(self.failed("make its folder"))?;
        }
        check_mode(folder, &fs::metadata(folder).map_err(self.failed("look at its folder"))?, 0o700)
    }

    /// A file beside the tokens whose lock means something.
    fn lock_file(&self, name: &str) -> Result<File, StoreError> {
        self.prepare()?;
        let mut path = self.path.clone().into_os_string();
        path.push(format!(".{name}.lock"));
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).write(true).mode(0o600);
        options.open(path).map_err(self.failed("open its lock"))
    }

    fn read(&self) -> Result<(Mark, Content), StoreError> {
        let file = match File::open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((Mark::default(), Content::default())),
            opened => opened.map_err(self.failed("open it"))?,
        };
        let metadata = file.metadata().map_err(self.failed("look at it"))?;
        check_mode(&self.path, &metadata, 0o600)?;
        check_mode(self.folder(), &fs::metadata(self.folder()).map_err(self.failed("look at its folder"))?, 0o700)?;
        let text = io::read_to_string(io::Read::take(file, FILE_LIMIT)).map_err(self.failed("read it"))?;
        let content = serde_json::from_str(&text).map_err(|error| StoreError::Damaged {
            place: self.path.display().to_string(),
            // serde's own words could quote a token.
            why: format!("not the JSON that weir writes, at line {} column {}", error.line(), error.column()),
        })?;
        Ok((mark(&metadata), content))
    }

    /// Whether the file is still the one of this mark.
    fn is_at(&self, mark_known: Mark) -> bool {
        fs::metadata(&self.path).map_or(Mark::default(), |metadata| mark(&metadata)) == mark_known
    }

    fn write(&self, source: &SourceName, alias: &AccountAlias, record: &Record) -> Result<bool, StoreError> {
        let lock = self.lock_file("write")?;
        lock.lock().map_err(self.failed("lock it"))?;
        let (_, mut content) = self.read()?;
        let records = content.tokens.entry(source.clone()).or_default();
        if records.get(alias).is_some_and(|known| known.revision >= record.revision) {
            return Ok(false);
        }
        records.insert(alias.clone(), record.clone());
        let bytes = serde_json::to_vec_pretty(&content).map_err(|error| self.failed("write it")(error.into()))?;
        private::replace(&self.path, &bytes).map_err(self.failed("write it"))?;
        Ok(true)
    }

    /// Makes a file where the tokens would be, and takes it away again; if the folder is still to be made, where that would
    /// be.
    fn try_in_folder(&self) -> Result<(), StoreError> {
        let folder = self.folder();
        if folder.exists() {
            check_mode(folder, &fs::metadata(folder).map_err(self.failed("look at its folder"))?, 0o700)?;
        }
        let mut there = folder.ancestors().map(|path| if path.as_os_str().is_empty() { Path::new(".") } else { path });
        let there = there.find(|path| path.exists()).unwrap_or(Path::new("."));
        let probe = there.join(format!(".weir-check-{}", uuid::Uuid::now_v7().simple()));
        let mut options = OpenOptions::new();
        options.create_new(true).write(true).mode(0o600);
        options.open(&probe).map_err(self.failed("make files in its folder"))?;
        fs::remove_file(&probe).map_err(self.failed("take files out of its folder"))
    }

    fn try_claim(&self, place: u64, lasts: Duration) -> Result<Option<Claim>, StoreError> {
        let file = self.lock_file(&format!("renew-{place:02}"))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Claim { held: Held::Lock { _file: file }, lasts })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(self.failed("lock it")(error)),
        }
    }
}

/// Every replacement has another inode or another time.
fn mark(metadata: &fs::Metadata) -> Mark {
    let seconds = u64::try_from(metadata.mtime()).unwrap_or_default();
    let nanos = u64::try_from(metadata.mtime_nsec()).unwrap_or_default();
    Mark(metadata.ino(), seconds.wrapping_mul(1_000_000_000).wrapping_add(nanos))
}

fn check_mode(path: &Path, metadata: &fs::Metadata, allowed: u32) -> Result<(), StoreError> {
    let mode = metadata.permissions().mode() & 0o777;
    let others = 0o077 & !allowed;
    if mode & others == 0 {
        return Ok(());
    }
    Err(StoreError::Exposed { place: path.display().to_string(), mode, allowed })
}

#[async_trait]
impl TokenStore for FileStore {
    fn place(&self) -> String {
        self.path.display().to_string()
    }

    async fn changes(&self, source: &SourceName, mark: Mark) -> Result<Changes, StoreError> {
        let (store, source) = (self.clone(), source.clone());
        spawn_blocking(move || {
            if mark != Mark::default() && store.is_at(mark) {
                return Ok(Changes { mark, ..Changes::default() });
            }
            let (mark, mut content) = store.read()?;
            let records = content.tokens.remove(&source).into_iter().flatten().collect();
            Ok(Changes { mark, is_whole: true, records })
        })
        .await?
    }

    async fn get(&self, source: &SourceName, alias: &AccountAlias) -> Result<Option<Record>, StoreError> {
        let (store, source, alias) = (self.clone(), source.clone(), alias.clone());
        spawn_blocking(move || Ok(store.read()?.1.tokens.get_mut(&source).and_then(|records| records.remove(&alias))))
            .await?
    }

    async fn put(&self, source: &SourceName, alias: &AccountAlias, record: &Record) -> Result<bool, StoreError> {
        let (store, source, alias, record) = (self.clone(), source.clone(), alias.clone(), record.clone());
        spawn_blocking(move || store.write(&source, &alias, &record)).await?
    }

    async fn claim(
        &self,
        source: &SourceName,
        alias: &AccountAlias,
        lasts: Duration,
    ) -> Result<Option<Claim>, StoreError> {
        let mut hasher = DefaultHasher::new();
        (source.as_str(), alias.as_str()).hash(&mut hasher);
        let (store, place) = (self.clone(), hasher.finish() % CLAIMS);
        spawn_blocking(move || store.try_claim(place, lasts)).await?
    }

    async fn try_writing(&self) -> Result<(), StoreError> {
        let store = self.clone();
        spawn_blocking(move || store.try_in_folder()).await?
    }

    async fn release(&self, claim: Claim) {
        drop(claim);
    }
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
