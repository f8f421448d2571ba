//! (kafka/reader)
