//! Tests on real servers; `deploy/local/test` starts them.

mod sink;
