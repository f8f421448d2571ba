//! Files with what others send, and what weir has to make of it.

mod ali1688;
