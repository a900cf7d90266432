//! `perennial`: the one binary. As PID 1 it is the host; otherwise its first argument says what.

use std::process::ExitCode;

fn main() -> ExitCode {
    // The first instruction that is ours: the new kernel's part of a blackout ends here.
    let started = vmm::arch::x86_64::tsc::now();
    vmm::cli::main(started)
}
