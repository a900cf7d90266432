//! The state machine of the built-in LUO: its sentences, and its agreement with a simple model.
//!
//! What only depends on requests, and what a kernel does alike, is in the table of the conformance
//! tests; here is what the table has no words for.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod order;
mod properties;
mod reference;
mod start;
mod status;
mod support;
