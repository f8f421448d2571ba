//! (kafka/outbox)
