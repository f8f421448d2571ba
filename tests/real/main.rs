//! What needs the real servers: Kafka, ClickHouse and Redis as `deploy/local/test` starts them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    clippy::print_stderr,
    clippy::wildcard_enum_match_arm,
    reason = "a test that fails says so by panicking"
)]

mod addresses;
mod again;
mod analytics;
mod anew;
mod batches;
mod breaker;
mod cache;
mod doubt;
mod failover;
mod fetch;
mod fleet;
mod kafka;
mod kill;
mod lanes;
mod large;
mod nginx;
mod outage;
mod process;
mod proxy;
mod quota;
mod quota_batches;
mod refusals;
mod replay;
mod retry;
mod scan;
mod set_back;
mod sink;
mod stack;
mod status;
mod taobao;
mod timetable;
mod tokens;
mod torture;
mod wheel;
mod workers;
