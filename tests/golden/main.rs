//! Golden files: what must not change by accident.

mod schemas;
