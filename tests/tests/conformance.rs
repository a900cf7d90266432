//! Runs the conformance suite: a table of cases, on every implementation of LUO.

use std::process::ExitCode;

fn main() -> ExitCode {
    perennial_tests::conformance::suite()
}
