//! The two-kernel harness.
pub mod workload;
