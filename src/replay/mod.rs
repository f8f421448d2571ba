//! replay: a bounded piece of a topic once more into tables or requests; a job that ends.

pub mod when;
