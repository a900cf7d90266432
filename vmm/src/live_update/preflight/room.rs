//! What the running kernel can do for the next one: hand over, reserve the same memory, and make room for it.

use kexec::Running;
use kexec::preflight::{self, Refusal};

use super::{Check, Finding};
use crate::live_update::next_kernel::Candidate;

/// Checks what `kexec` knows to be certain. A part that cannot be opened has a finding of its own.
pub(super) fn check(candidate: &Candidate, running: &Running) -> Vec<Finding> {
    let Ok(line) = &candidate.command_line else { return Vec::new() };
    let mut refusals = preflight::check_survival(running, line, candidate.survival);
    if let (Ok(kernel), Ok(initramfs)) = (&candidate.kernel, &candidate.initramfs) {
        refusals.extend(preflight::check_room(running, kernel, initramfs.as_ref(), line));
    }
    refusals.iter().map(finding).collect()
}

fn finding(refusal: &Refusal) -> Finding {
    let check = match refusal {
        Refusal::KhoOffHere { .. } => Check::RunningKho,
        Refusal::LuoOffHere { .. } => Check::RunningLuo,
        Refusal::OtherMemory { .. } => Check::CommandLineMemmap,
        Refusal::CommandLineTooLong { .. } => Check::CommandLineLength,
        Refusal::NoRoom { .. } => Check::Scratch,
        _ => Check::CommandLineSwitch,
    };
    Finding::of_error(check, refusal)
}
