//! serve: one item now, for `weir get` and over HTTP, from the cache or by a request like any other.
//!
//! A [`Desk`] looks into the cache; what is not there it asks for on the request topic, and hears of the outcome on the
//! topics of outcomes. So whatever is asked here goes at the pace of the quota, and becomes a row like everything else.
//! [`http`] answers `GET /items/{source}/{id}`; [`reply`] says what an outcome is in HTTP. Pure.

mod config;
mod desk;
pub mod http;
pub mod reply;

pub use config::Config;
pub use desk::{Answered, AskError, Desk, Given, Question, SourceParts};
