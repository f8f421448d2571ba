//! The records on the topics: what they say, not how they travel.
//!
//! Each record is JSON in the value of a Kafka message with CloudEvents attributes in its headers
//! ([`envelope`]); [`codec`] turns one into the other and judges what cannot be read. The JSON Schemas under
//! `schemas/` are generated from these types. A reader ignores fields that it does not know, so a newer
//! writer may add some; what changes a meaning takes a new version in `ce_type`.

mod batch_end;
mod cancellation;
mod change;
pub mod codec;
mod dead_letter;
pub mod envelope;
mod failure;
mod id;
pub mod json;
mod lane;
pub mod price;
mod quota;
mod request;
mod result;
pub mod trace;

pub use batch_end::BatchEnd;
pub use cancellation::Cancellation;
pub use change::{Change, Field, Watched};
pub use dead_letter::{DeadLetter, Origin, Reason};
pub use failure::{Attempt, Class, Failure};
pub use id::{AccountAlias, BatchId, InvalidId, ItemId, RequestId, SourceName};
pub use lane::Lane;
pub use quota::{
    AccountReport, AddressReport, BatchPart, BatchReport, CutOffReport, DelayReport, HoldReport, Pause, QuotaReport,
    QuotaSetting, Spent, UsedUpReport, WholeReport,
};
pub use request::{MaxAge, Request};
pub use result::{Columns, Observation, Status, Via};
