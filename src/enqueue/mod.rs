//! enqueue: files and standard input → requests.
//!
//! [`lines`] judges each line, [`duplicates`] remembers what has been asked for already, [`feed`](mod@feed) makes records of
//! the rest, a chunk at a time, so that a file of any length takes the same memory. Sending is the caller's.

pub mod duplicates;
pub mod feed;
pub mod lines;

pub use feed::{Chunk, Order, Summary, feed};
