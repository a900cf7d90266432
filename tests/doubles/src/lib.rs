//! What stands in for other software in the tests of several crates: systemd's store of file descriptors, and the kernel
//! of a guest.
//!
//! This crate knows nothing about the code under test.

pub mod fd_store;
pub mod pvh;
