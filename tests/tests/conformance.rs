//! The conformance table: how a LUO behaves, one case a row, run against every one that there is.

use std::process::ExitCode;

fn main() -> ExitCode {
    perennial_tests::conformance::suite()
}
