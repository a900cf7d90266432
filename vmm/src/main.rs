//! `perennial`: the one binary.
fn main() {}
