//! Support for fuzz targets, and a way to run them without a fuzzer.
//!
//! A target is a function of bytes that panics if it finds an error. It is in the crate under test
//! (`luo::fuzz`, `vmm::fuzz`, `kexec::fuzz`, compiled for tests and fuzzers only), and runs in two ways:
//! under libFuzzer (`make fuzz`, from the package in the crate's `fuzz/`), and by [`replay()`] as an
//! ordinary test, which needs only a stable compiler. Inputs for which a fuzzer found errors are added to
//! the target's seeds, so that every test run repeats them.
//!
//! This crate knows nothing about the code under test.

mod mutate;
mod replay;
mod script;

pub use mutate::Mutator;
pub use replay::replay;
pub use script::Script;
