//! Delayed records: long delays on delay topics, the last second in memory.
//!
//! ```text
//!  due in 100 s ──► delay topic 64 s ──► 16 s ──► 16 s ──► 4 s ──► Wheel (in memory, < 1 s) ──► taken when it is due
//! ```
//!
//! The delay topics are the long part: each is a queue whose records all wait equally long, so that nobody waits behind
//! somebody who has to wait longer, and what waits takes no memory. [`wheel`] keeps what is read of them until its time,
//! bounded, and says where a record waits next. [`waiting`] is a request as it stands on a delay topic.
//!
//! A stage that lets something wait owns its transactions: a record that is held here stays open in its ledger.

pub mod waiting;
pub mod wheel;

pub use waiting::{Entry, Waiting, due_at};
pub use wheel::{Item, Weight, Wheel};
