//! weir collects data from rate-limited vendor APIs: IDs on Kafka in, one row per ID in ClickHouse out.
//!
//! ```text
//!  enqueue, or any Kafka producer
//!         │
//!         ▼
//!  weir.requests.<source>        bare ID text, or JSON; key = item id; `….express` overtakes the backlog
//!         │
//!       fetch        a window of requests in flight → a quota slot → one call to the vendor
//!         │          one Kafka transaction: outcomes + how far it has read
//!         ├──────────────► weir.results ───┼──► changes ──► weir.changes ──► sink, repricers, alerts
//!         └──────────────► weir.failures ──┤
//!                              │           │
//!                            retry         │    classify; wait; again, or give up
//!                              ├──► weir.requests.<source>      attempt + 1, on the lane that it came by
//!                              └──► weir.dead ──┤               the reason and the whole history
//!                                               ▼
//!                                             sink ──► ClickHouse      every topic, one row per record
//! ```
//!
//! Stages never call each other: they meet on a topic. Each stage sees Kafka only through
//! [`kafka::Reader`] and [`kafka::Writer`], a vendor only through [`platform::Vendor`], and asks
//! [`quota`] for the *time* at which it may call. The modules stand in the order of the flow.

pub mod message;

pub mod topics;

pub mod cancelled;

pub mod changes;
pub mod enqueue;
pub mod fetch;
pub mod retry;
pub mod serve;
pub mod sink;
pub mod store;
pub mod timer;

pub mod batches;

pub mod replay;
pub mod verify;

pub mod breaker;
pub mod cache;
pub mod platform;
pub mod quota;
pub mod tokens;

pub mod kafka;

pub mod runtime;

pub mod config;

pub mod run;

pub mod simulate;

pub mod cli;
