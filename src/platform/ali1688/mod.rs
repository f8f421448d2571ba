//! 1688's open platform (AOP gateway).

pub mod sign;
