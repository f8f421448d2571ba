//! The only reader of the configuration file and the environment.
