//! What needs the real servers: Kafka, ClickHouse and Redis as `deploy/local/test` starts them.

mod fetch;
mod kafka;
mod stack;
