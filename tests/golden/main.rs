//! Golden files: what others send and what weir makes of it, and what must not change by accident.

mod ali1688;
mod schemas;
mod vendors;
