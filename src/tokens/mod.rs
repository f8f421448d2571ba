//! Access tokens: the store of renewed ones, and their renewal, once for the whole fleet.
//!
//! The configuration says what an account starts with. What a vendor gave for it since is a [`Record`] in a
//! [`TokenStore`]: a [`mod@file`] that only its owner can read, or [`redis`], sealed. [`keeper`] watches over the accounts
//! of a source while it is called: it says when a slot has to be spent on a renewal, takes over what other processes
//! have renewed, and takes an account out of use whose token cannot be renewed. [`life`] has the decisions.

mod config;
pub mod corrected;
pub mod file;
pub mod keeper;
pub mod life;
pub mod redis;
mod seal;

use std::{fs::File, time::Duration};

use async_trait::async_trait;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize, Serializer};

pub use config::{Config, Store, open};
pub use seal::{InvalidKey, Sealer};

use crate::{
    message::{AccountAlias, SourceName},
    runtime::clock::Timestamp,
};

/// What is kept of an account's tokens.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Counts the records of this account: a later one replaces an earlier one, whatever the clocks say.
    pub revision: u64,
    /// The token that calls carry.
    #[serde(default, serialize_with = "exposed", skip_serializing_if = "Option::is_none")]
    pub access_token: Option<SecretString>,
    /// The one that renews it.
    #[serde(default, serialize_with = "exposed", skip_serializing_if = "Option::is_none")]
    pub refresh_token: Option<SecretString>,
    /// When the vendor gave the access token.
    pub obtained_at: Timestamp,
    /// When it expires, if the vendor said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    /// When the refresh token expires, if the vendor said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refresh_expires_at: Option<Timestamp>,
    /// How it came here.
    pub origin: Origin,
    /// The vendor does not renew it any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refused>,
    /// Fingerprints of the configured credentials that this has replaced: see [`life::choose`].
    #[serde(default)]
    pub replaces: Vec<String>,
}

/// How a record came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// From the configuration, whose tokens had been changed.
    Configured,
    /// A renewal.
    Renewed,
    /// A user authorised the app: `weir account authorise`.
    Authorised,
}

/// Why a token is of no use any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// When.
    pub at: Timestamp,
    /// The vendor's code.
    pub code: String,
    /// The vendor's words, without secrets.
    pub message: String,
}

/// Only for the file of mode 600 and for sealing.
#[allow(clippy::ref_option, reason = "serde's signature")]
fn exposed<S: Serializer>(token: &Option<SecretString>, serializer: S) -> Result<S::Ok, S::Error> {
    token.as_ref().map(ExposeSecret::expose_secret).serialize(serializer)
}

/// Why tokens cannot be read or kept. No message has one in it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file or its folder.
    #[error("the tokens in {place}: cannot {what}: {error}")]
    File {
        /// Which file.
        place: String,
        /// What was attempted.
        what: &'static str,
        /// The system's reason.
        error: std::io::Error,
    },
    /// Others than the owner can read it.
    #[error("the tokens in {place}: others than its owner have access (mode {mode:03o}): chmod {allowed:o} {place}")]
    Exposed {
        /// Which file or folder.
        place: String,
        /// Its permissions.
        mode: u32,
        /// What they must be.
        allowed: u32,
    },
    /// Not what weir wrote.
    #[error(
        "the tokens in {place} cannot be read: {why}; move it away, then run `weir account authorise` for each account \
         again"
    )]
    Damaged {
        /// Where.
        place: String,
        /// What is wrong.
        why: String,
    },
    /// Redis is away, or refuses.
    #[error("the tokens in Redis cannot be reached: {0}. Is it running? Is redis.url right?")]
    Redis(#[from] ::redis::RedisError),
    /// Sealed with another key.
    #[error("the token of {place} in Redis was sealed with another key: set WEIR_TOKENS__KEY to the key of the others")]
    OtherKey {
        /// Source and alias.
        place: String,
    },
    /// The work was cut off.
    #[error("the tokens' store ended abnormally: {0}")]
    Ended(#[from] tokio::task::JoinError),
}

/// How far the changes of a store are known. Two numbers that only the store itself understands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark(pub u64, pub u64);

/// What a store tells of a source's records.
#[derive(Debug, Default)]
pub struct Changes {
    /// How far it tells.
    pub mark: Mark,
    /// These are all records that there are: what is missing among them is not kept (any more).
    pub is_whole: bool,
    /// By account.
    pub records: Vec<(AccountAlias, Record)>,
}

/// The right to renew one account's token, which one process has at a time.
#[derive(Debug)]
pub struct Claim {
    held: Held,
    /// How long it holds.
    pub lasts: Duration,
}

#[derive(Debug)]
enum Held {
    /// The system frees it when the file is closed, also for a process that is killed.
    Lock { _file: File },
    /// It ends by itself in Redis.
    Lease { key: String, owner: String },
}

/// Where tokens are kept that vendors have renewed.
#[async_trait]
pub trait TokenStore: Send + Sync {
    /// Where it is, for people.
    fn place(&self) -> String;

    /// The records of a source that have changed since `mark`; all of them since [`Mark::default`], and if the store has
    /// lost what it had, or may have.
    async fn changes(&self, source: &SourceName, mark: Mark) -> Result<Changes, StoreError>;

    /// The record of one account.
    async fn get(&self, source: &SourceName, alias: &AccountAlias) -> Result<Option<Record>, StoreError>;

    /// Keeps a record, durably. False: there is one of the same revision or a later one, which stays.
    async fn put(&self, source: &SourceName, alias: &AccountAlias, record: &Record) -> Result<bool, StoreError>;

    /// Takes the right to renew an account's token, for `lasts` at most; nothing if another process has it.
    async fn claim(
        &self,
        source: &SourceName,
        alias: &AccountAlias,
        lasts: Duration,
    ) -> Result<Option<Claim>, StoreError>;

    /// Whether records could be kept. Leaves everything as it was.
    async fn try_writing(&self) -> Result<(), StoreError>;

    /// Gives that right back.
    async fn release(&self, claim: Claim);
}
