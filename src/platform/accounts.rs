//! Accounts: one set of credentials each, with secrets that cannot be printed.

use secrecy::SecretString;

use crate::message::AccountAlias;

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
}
