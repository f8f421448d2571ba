//! weir collects data from rate-limited vendor APIs: IDs on Kafka in, one row per ID in ClickHouse out.
//!
//! ```text
//!  enqueue: files, stdin     serve: GET /items/…, `weir get`     any Kafka producer
//!         │                          │  express, and hears of its outcome    │
//!         ▼                          ▼                                       │
//!  weir.requests.<source>        bare ID text, or JSON; key = item id;  ◄────┘
//!         │                      ….express overtakes the backlog
//!         │
//!       fetch        cache: answered already? │ quota: a slot, the time of a call │ breaker: does the vendor answer?
//!         │          tokens: with what │ platform: what to send, what the reply means ──► the vendor, or simulate
//!         │          one Kafka transaction: outcomes + how far it has read
//!         ├──────────────► weir.results ───┼──► changes ──► weir.changes ──► sink, repricers, alerts
//!         └──────────────► weir.failures ──┤
//!                              │           │
//!                            retry         │    classify; wait (timer, on weir.retry.…); again, or give up
//!                              ├──► weir.requests.<source>      attempt + 1, on the lane that it came by
//!                              └──► weir.dead ──┤               the reason and the whole history
//!                                               ▼
//!                                             sink ──► store: ClickHouse      every topic, one row per record
//!                                                        │
//!                 batches ◄──────────────────────────────┤   a batch has come to its end: webhook, weir.batches
//!                 replay  ◄──────────────────────────────┤   a piece of a topic or of the rows: to tables, to requests
//!                 verify  ◄──────────────────────────────┘   nothing lost, nothing doubled, or which
//!
//!  weir.control   what operators decide of batches, and what logs are called: `cancelled` follows it in fetch and retry
//!  weir.quota     what is spent and held, and what operators set: quota's journal
//! ```
//!
//! Stages never call each other: they meet on a topic. Each stage sees Kafka only through
//! [`kafka::Reader`] and [`kafka::Writer`], ClickHouse only through [`store::Store`], a vendor only through
//! [`platform::Vendor`], and asks [`quota`] for the *time* at which it may call. [`run`] makes roles of them and starts
//! each again from its last commit; [`cli`] is the commands. The modules stand in the order of the flow; which may know
//! which is another order, from `runtime` up, which `tests/tidy.rs` holds.

// What travels.
pub mod message;
pub mod topics;

// The stages, and what stands at both ends.
pub mod enqueue;
pub mod serve;

pub mod fetch;
pub mod retry;

pub mod changes;
pub mod sink;

pub mod batches;
pub mod replay;
pub mod verify;

// What fetch asks before, during and after a call.
pub mod breaker;
pub mod cache;
pub mod platform;
pub mod quota;
pub mod tokens;

// What stages stand on.
pub mod cancelled;
pub mod kafka;
pub mod store;
pub mod timer;

pub mod runtime;

// What puts it together.
pub mod config;

pub mod run;

pub mod cli;

// The vendors' servers, to try it with.
pub mod simulate;
