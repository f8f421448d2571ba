//! (kafka/writer)
