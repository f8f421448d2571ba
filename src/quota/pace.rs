//! (quota/pace)
