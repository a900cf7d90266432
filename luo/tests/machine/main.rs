//! Tests of the built-in LUO's state machine, and a comparison with a simple model.
//!
//! Behaviour that only depends on requests, and that a kernel shows too, is tested by the table of
//! the conformance tests. Here are the tests that the table cannot express.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod order;
mod properties;
mod reference;
mod start;
mod status;
mod support;
