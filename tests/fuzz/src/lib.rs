//! What fuzz targets are made of, and how they run without a fuzzer.
//!
//! A target is a function of bytes that panics if it finds something wrong. It lies in the crate
//! that it tries (`luo::fuzz`, `vmm::fuzz`, `kexec::fuzz`, there for tests and fuzzers only), and is
//! run in two ways: by libFuzzer (`make fuzz`, from the package in the crate's `fuzz/`), and by
//! [`replay()`] as an ordinary test, which needs nothing but a stable compiler. What a fuzzer found
//! once stands among the target's seeds and is tried by every test run.
//!
//! Nothing here knows what is tried.

mod mutate;
mod replay;
mod script;

pub use mutate::Mutator;
pub use replay::replay;
pub use script::Script;
