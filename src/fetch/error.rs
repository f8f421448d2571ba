//! Why fetch stops.

use tokio::task::JoinError;

use crate::{kafka::intake::IntakeError, tokens::StoreError};

/// Why fetch stopped.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Kafka.
    #[error(transparent)]
    Intake(#[from] IntakeError),
    /// A defect in a vendor's code: the request's place in the log is kept, and the next start tries it again.
    #[error("a call ended abnormally: {0}")]
    Call(#[from] JoinError),
    /// Without the tokens that were renewed since the configuration was written, nobody can call.
    #[error(transparent)]
    Tokens(#[from] StoreError),
}
