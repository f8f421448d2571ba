//! A handle on our place in a consumer group, for transactions that carry its offsets.

/// Our place in a group. Opaque to stages.
#[derive(Clone, Debug)]
pub struct Membership;
