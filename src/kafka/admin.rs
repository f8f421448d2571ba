//! (kafka/admin)
