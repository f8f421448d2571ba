//! (quota/memory)
