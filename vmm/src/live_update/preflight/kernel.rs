//! The next kernel's file: its release, its handover formats, and the drivers that no module of the next initramfs
//! provides.

use std::sync::Mutex;

use kexec::{Contents, ContentsError, Identity, Kernel, Part, Presence, Survival, abi};

use super::drivers::Need;
use super::{Check, Finding, Surroundings};
use crate::causes::chain;
use crate::live_update::next_kernel::Candidate;
use crate::mutex;

/// The parts of Linux that carry VMs over a kexec, with the string that tells each of them.
const LUO_MISSING: &str = "build it with CONFIG_KEXEC_HANDOVER, CONFIG_LIVEUPDATE and \
                           CONFIG_LIVEUPDATE_MEMFD, or update to another kernel";

/// Checks a kernel. `needs` are the drivers that must be built in. The kernel is unpacked only if a question is left
/// that needs it: that takes seconds on a slow machine.
pub(super) fn check(
    kernel: &Kernel,
    candidate: &Candidate,
    surroundings: &Surroundings<'_>,
    needs: &[Need],
) -> Vec<Finding> {
    let path = kernel.path.display();
    let mut findings = Vec::new();
    if let (Some(release), Ok(running)) = (&kernel.release, &candidate.running) {
        let sentence =
            format!("{path} is Linux {release}; the running kernel is Linux {}", running.release);
        findings.push(Finding::new(Check::KernelRelease, &path, sentence, ""));
    }
    let is_handed_over = candidate.survival == Survival::HandedOver;
    if !is_handed_over && needs.is_empty() {
        return findings;
    }
    let parts: Vec<_> = needs.iter().map(|need| need.part).collect();
    match contents(kernel, parts, is_handed_over) {
        Ok(contents) => {
            if is_handed_over {
                findings.extend(handover(kernel, &contents, surroundings));
            }
            let missing =
                needs.iter().filter_map(|need| need.finding(contents.presence(need.part)));
            findings.extend(missing);
        }
        Err(error @ ContentsError::Compression) => {
            let sentence = format!("{path} cannot be looked into: {error}");
            let remedy = "try it on another machine before, or build it with CONFIG_KERNEL_ZSTD";
            findings.push(Finding::new(Check::KernelUnknown, &path, sentence, remedy));
            findings.extend(needs.iter().filter_map(|need| need.finding(Presence::Unknown)));
        }
        Err(error) => {
            let sentence = format!("{path} is damaged: {}", chain(&error).join(": "));
            findings.push(Finding::new(Check::KernelDamaged, &path, sentence, "copy it again"));
        }
    }
    findings
}

/// What was found in the last kernel that was unpacked: an update that follows a preflight does not unpack it again.
static LAST: Mutex<Option<Known>> = Mutex::new(None);

struct Known {
    kernel: Identity,
    parts: Vec<Part>,
    is_complete: bool,
    contents: Contents,
}

/// Returns what a kernel has built in: everything, or only as far as needed to know about `parts`.
fn contents(
    kernel: &Kernel,
    parts: Vec<Part>,
    is_complete: bool,
) -> Result<Contents, ContentsError> {
    // Before the file is read, so that a change meanwhile is a change.
    let identity = kernel.identity()?;
    let is_same = |known: &&Known| {
        known.kernel == identity && known.parts == parts && known.is_complete == is_complete
    };
    if let Some(known) = mutex::lock(&LAST).as_ref().filter(is_same) {
        return Ok(known.contents.clone());
    }
    let contents = match is_complete {
        true => Contents::of(kernel, &parts)?,
        false => Contents::of_parts(kernel, &parts)?,
    };
    let known = Known { kernel: identity, parts, is_complete, contents: contents.clone() };
    *mutex::lock(&LAST) = Some(known);
    Ok(contents)
}

/// Checks whether the kernel can take over what the running kernel hands over.
fn handover(kernel: &Kernel, contents: &Contents, surroundings: &Surroundings<'_>) -> Vec<Finding> {
    let path = kernel.path.display();
    let there = &contents.abi;
    // A kernel compares the names of its formats with those that it finds: it has the names, or not the code.
    let parts = [("KHO", &there.kho), ("LUO", &there.luo), ("LUO's memfds", &there.memfd)];
    let missing: Vec<_> =
        parts.iter().filter(|(_, versions)| versions.is_empty()).map(|(what, _)| *what).collect();
    if !missing.is_empty() {
        let sentence = format!("{path} cannot take over: it lacks {}", missing.join(" and "));
        return vec![Finding::new(Check::KernelLuo, &path, sentence, LUO_MISSING)];
    }
    let here = abi::of_running(surroundings.root);
    let mut findings = Vec::new();
    for difference in abi::differences(&here, there) {
        let sentence = format!("{path} cannot take over: {difference}");
        let remedy = "update to a kernel that reads what this one writes";
        findings.push(Finding::new(Check::KernelFormats, &path, sentence, remedy));
    }
    if here.kho.is_empty() || here.luo.is_empty() {
        let sentence = "the running kernel does not show in which formats it hands over, so they are not \
                        compared with those of the next kernel";
        let remedy = "mount debugfs on /sys/kernel/debug";
        findings.push(Finding::new(Check::KernelFormatsUnknown, "", sentence, remedy));
    }
    findings
}
