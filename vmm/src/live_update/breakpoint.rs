//! A breakpoint at a step of a live update, for tests: this process stops itself (SIGSTOP), and the test that waits
//! for that does the damage from outside, to this process, to a VM's process or to the machine.
//!
//! Only debug builds have it. A release build compiles it to nothing.

use crate::machine::VmName;

/// The environment variable with the path of the file that names the step.
///
/// The process stops once: it replaces the step in the file by the VM whose turn it was.
#[cfg(debug_assertions)]
const VARIABLE: &str = "PERENNIAL_BREAKPOINT";

/// Stops this process if the file names this step, until something continues it. `vm`: the VM whose step it is.
#[cfg(debug_assertions)]
pub fn reach(step: &str, vm: Option<&VmName>) {
    use rustix::process::{Signal, getpid, kill_process};

    let Some(file) = std::env::var_os(VARIABLE) else { return };
    if std::fs::read_to_string(&file).is_ok_and(|named| named == step) {
        let stopped = std::fs::write(&file, vm.map_or("", VmName::as_str));
        if stopped.is_ok() {
            let _ = kill_process(getpid(), Signal::STOP);
        }
    }
}

/// Does nothing.
#[cfg(not(debug_assertions))]
pub fn reach(_step: &str, _vm: Option<&VmName>) {}
