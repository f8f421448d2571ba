//! (quota/guard)
