//! The vendors' HTTP client.

/// The longest body that is read, in bytes.
pub const BODY_LIMIT: usize = 8 * 1024 * 1024;
