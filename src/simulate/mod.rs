//! simulate: the vendors' servers, faithful to their limits and their lies.
