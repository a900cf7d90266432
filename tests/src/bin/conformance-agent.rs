//! PID 1 of the machines of the conformance suite; or, with `--agent SOCKET`, a process on them, or
//! below `perennial luo emulate`.

use std::process::ExitCode;

fn main() -> ExitCode {
    perennial_tests::conformance::inside()
}
