//! A breakpoint at a step of a live update, for tests. There are three kinds:
//!
//! - This process stops itself (SIGSTOP), and the test that waits for that does the damage from outside, to this process,
//!   to a VM's process or to the machine.
//! - It panics, if the file says `panic` in front of the step, as a defect of this program would; each time if it says
//!   `panics`.
//! - A host that is PID 1 of a machine cannot be stopped. It does the damage itself, as the module `damage` says.
//!
//! Only debug builds and those with the feature `faults` have them. Every other build compiles them to nothing.

#[cfg(any(debug_assertions, feature = "faults"))]
mod damage;

use crate::machine::VmName;

/// The environment variable with the path of the file that names the step.
///
/// The process stops once: it replaces the step in the file by the VM whose turn it was.
#[cfg(any(debug_assertions, feature = "faults"))]
const VARIABLE: &str = "PERENNIAL_BREAKPOINT";

/// Stops this process if the file names this step, until something continues it. `vm`: the VM whose step it is.
#[cfg(any(debug_assertions, feature = "faults"))]
pub fn reach(step: &str, vm: Option<&VmName>) {
    use rustix::process::{Signal, getpid, kill_process};

    damage::reach(step, vm.map(VmName::as_str));
    let Some(file) = std::env::var_os(VARIABLE) else { return };
    let named = std::fs::read_to_string(&file).unwrap_or_default();
    if let Some((kind @ ("panic" | "panics"), at)) = named.split_once(' ')
        && at == step
    {
        if kind == "panic" {
            let _ = std::fs::remove_file(&file);
        }
        panic!("as the test asked, in the step `{step}`");
    }
    if named == step {
        let stopped = std::fs::write(&file, vm.map_or("", VmName::as_str));
        if stopped.is_ok() {
            let _ = kill_process(getpid(), Signal::STOP);
        }
    }
}

/// Removes the cause of the damage that this host has done itself.
#[cfg(any(debug_assertions, feature = "faults"))]
pub fn repair() {
    damage::repair();
}

/// Does nothing.
#[cfg(not(any(debug_assertions, feature = "faults")))]
pub fn reach(_step: &str, _vm: Option<&VmName>) {}

/// Does nothing.
#[cfg(not(any(debug_assertions, feature = "faults")))]
pub fn repair() {}
