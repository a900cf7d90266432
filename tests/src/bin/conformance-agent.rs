//! PID 1 of the conformance suite's machines. With `--agent SOCKET`, an agent: a process on such a
//! machine, or under `perennial luo emulate`.

use std::process::ExitCode;

fn main() -> ExitCode {
    perennial_tests::conformance::inside()
}
