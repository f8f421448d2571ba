//! (kafka/ledger)
