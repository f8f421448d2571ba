//! ClickHouse: the connection, the schema, the rows of records, and every query of the rows.
//!
//! [`Store`] ([`connection`]) is the database; each file adds what it is asked about one matter. [`row`] reads a record
//! into its row, [`columns`] is what ClickHouse is sent of rows, [`mod@write`] sends them. [`migrations`] and [`schema`] make
//! the tables. [`trouble`] says what a refusal means, whoever has asked.
//!
//! Nothing here knows a stage: blocks, intents and what becomes of a doubtful insert are `sink`'s.

pub mod columns;
pub mod connection;
mod ends;
pub mod hottest;
pub mod migrations;
mod missing;
pub mod present;
pub mod query;
pub mod quoting;
pub mod row;
pub mod schema;
pub mod stored;
pub mod trouble;
pub mod unended;
pub mod views;
mod watched;
pub mod write;

pub use connection::{ClickHouseConfig, ConnectionError, Store};
pub use missing::Rows;
pub use row::Route;
pub use trouble::{Trouble, TroubleKind};
