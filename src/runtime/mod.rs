//! What every role needs from the process: time, randomness, logs, health, metrics and an orderly stop.

pub mod backoff;
pub mod clock;
pub mod descriptors;
pub mod duration_text;
pub mod error_chain;
pub mod health;
pub mod http_client;
pub mod listener;
pub mod logging;
pub mod metrics;
pub mod redis_server;
pub mod shutdown;
