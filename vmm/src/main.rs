//! `perennial`, the only binary. As PID 1 it is the host; otherwise its first argument names the
//! command.

use std::process::ExitCode;

fn main() -> ExitCode {
    // Read first of all: in the new kernel, the kernel's part of a blackout ends here.
    let started = vmm::arch::x86_64::tsc::now();
    vmm::cli::main(started)
}
