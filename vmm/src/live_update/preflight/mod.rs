//! The preflight: everything that can be known of an update before anything is loaded, preserved or paused.
//!
//! Returns all findings at once, in a fixed order. A fact that cannot be found out is a note, and never counts as
//! good or bad. A live update begins with the preflight and is refused with all refusals at once; `perennial ctl
//! preflight` asks a running host for it, `perennial preflight` looks at files only.
//! `docs/preflight.md` lists the findings.

mod bridges;
mod command_line;
mod configuration;
mod cpu;
mod disks;
mod documents;
mod drivers;
mod finding;
mod initramfs;
mod kernel;
mod memory;
mod mounts;
mod others;
mod pool;
mod preserved;
mod program;
mod room;

use std::path::Path;

pub use disks::KeptDisk;
pub(super) use documents::{manifest, with_config};
pub use finding::{Check, Finding, Severity, UnknownCheck, sort};
pub use preserved::bytes_of_documents;

use luo::{Orchestrator, Room};

use super::next_kernel::Candidate;
use crate::devices::needs::HostNeed;
use crate::guests::{Guest, Life};
use crate::machine::VmName;
use initramfs::Examined;

/// What the preflight knows of the host and its VMs.
#[derive(Debug, Clone, Copy)]
pub struct Surroundings<'a> {
    /// The VMs; none if they are not known.
    pub vms: &'a [Guest],
    /// VMs that are left out of the update.
    pub without: &'a [VmName],
    /// The disks of preserved VMs that the host keeps open.
    pub kept: &'a [KeptDisk],
    /// Text of the host's configuration, which the next host uses if it cannot use its own.
    pub config: &'a str,
    /// Whether memory is allocated for every page of a segment that is preserved.
    pub fills_holes: bool,
    /// What the host's LUO can still preserve.
    pub room: Room,
    /// Whether systemd empties the fd store when it stops the host.
    pub empties_store: bool,
    /// The host's process. `None` if no host asks.
    pub host: Option<u32>,
    /// Whether the next host is the first process of the next kernel, and so brings its program, its
    /// configuration and its modules along in the initramfs.
    pub is_first_process: bool,
    /// Root directory of the machine; another one only in tests.
    pub root: &'a Path,
}

impl<'a> Surroundings<'a> {
    /// Those of this process, whose host has these VMs in this LUO.
    pub fn of_host(vms: &'a [Guest], luo: &dyn Orchestrator) -> Self {
        let fills_holes = luo.backend().fills_holes();
        let host = Some(std::process::id());
        Self { vms, fills_holes, room: luo.room(), host, ..Self::without_vms() }
    }

    /// The same, for an update that leaves VMs out.
    pub fn leaving_out(self, without: &'a [VmName]) -> Self {
        Self { without, ..self }
    }

    /// The same, of a host that keeps these disks open.
    pub fn keeping(self, kept: &'a [KeptDisk]) -> Self {
        Self { kept, ..self }
    }

    /// The same, of a host with this configuration.
    pub fn configured(self, config: &'a str) -> Self {
        Self { config, ..self }
    }

    /// Those of this process without VMs.
    pub fn without_vms() -> Self {
        let is_first_process = rustix::process::getpid().is_init();
        Self {
            vms: &[],
            without: &[],
            kept: &[],
            config: "",
            fills_holes: false,
            room: Room::default(),
            empties_store: false,
            host: None,
            is_first_process,
            root: Path::new("/"),
        }
    }

    /// The VMs that the update does not leave out.
    pub(super) fn travelling(&self) -> impl Iterator<Item = &'a Guest> + Clone + use<'a> {
        let without = self.without;
        self.vms.iter().filter(move |vm| !without.contains(&vm.machine.name))
    }

    /// What the next host must have before it can open the devices of those of them that have a process.
    fn device_needs(&self) -> impl Iterator<Item = (&'a VmName, HostNeed)> + use<'a> {
        let live = self.travelling().filter(|vm| matches!(vm.life, Life::Live(_)));
        live.flat_map(|vm| {
            let needs = vm.machine.devices.iter().flat_map(|device| device.options.needs());
            needs.map(|need| (&vm.machine.name, need))
        })
    }
}

/// Checks a next kernel. Returns all findings in a fixed order.
pub fn run(candidate: &Candidate, surroundings: &Surroundings<'_>) -> Vec<Finding> {
    let mut findings = command_line::check(candidate);
    let mut examined = Examined::default();
    let release = candidate.kernel.as_ref().ok().and_then(|kernel| kernel.release.as_deref());
    let release = drivers::release(release);
    match &candidate.initramfs {
        Ok(Some(initramfs)) => {
            let line = &candidate.next.cmdline;
            let (found, next) = initramfs::check(initramfs, line, release, surroundings);
            findings.extend(found);
            examined = next;
            if let Some(bytes) = examined.program.take() {
                let path = initramfs.path.display().to_string();
                let config = examined.config_text.as_deref();
                let (documents, unknown) = documents::documents(surroundings, config);
                findings.extend(unknown);
                findings.extend(program::ask(&path, &bytes, &documents));
            }
        }
        Ok(None) => {}
        Err(error) => findings.push(Finding::of_error(Check::InitramfsFile, error)),
    }
    match &candidate.kernel {
        Ok(image) => {
            let modules = match surroundings.is_first_process {
                true => examined.modules.clone(),
                false => drivers::installed(surroundings.root, release),
            };
            // Without an initramfs nothing says which drivers the kernel must have by itself.
            let is_unusable = |finding: &Finding| {
                matches!(finding.name, Check::InitramfsFile | Check::InitramfsDamaged)
            };
            let needs = match surroundings.is_first_process && findings.iter().any(is_unusable) {
                true => Vec::new(),
                false => drivers::needed(surroundings, examined.config.as_ref(), &modules),
            };
            let (missing, unknown) = drivers::missing(needs, &modules, release);
            findings.extend(missing);
            findings.extend(kernel::check(image, candidate, surroundings, &unknown));
        }
        Err(error) => findings.push(Finding::of_error(Check::KernelFile, error)),
    }
    findings.extend(memory::check(candidate, surroundings));
    findings.extend(preserved::check(surroundings));
    findings.extend(pool::check(candidate, surroundings, examined.config.as_ref()));
    findings.extend(bridges::check(surroundings, examined.config.as_ref()));
    findings.extend(cpu::check(candidate, surroundings));
    findings.extend(others::check(surroundings));
    findings.extend(disks::check(surroundings, examined.config.as_ref()));
    match &candidate.running {
        Ok(running) => findings.extend(room::check(candidate, running)),
        Err(error) => findings.push(Finding::of_error(Check::RunningKernel, error)),
    }
    sort(&mut findings);
    findings
}

/// Looks at the disks of the VMs, for a handover. Returns what refuses it, which nobody can override: the next program opens
/// the disks by their paths, too.
pub fn refused_disks(surroundings: &Surroundings<'_>) -> Vec<Finding> {
    let refusals = refusals(&disks::check(surroundings, None), &[]);
    refusals.into_iter().map(|finding| Finding { can_be_forced: false, ..finding }).collect()
}

/// The findings as one clause.
pub fn joined(findings: &[Finding]) -> String {
    findings.iter().map(Finding::to_string).collect::<Vec<_>>().join("; ")
}

/// Returns the findings that refuse the update: refusals except those that the operator overrides.
pub fn refusals(findings: &[Finding], forced: &[Check]) -> Vec<Finding> {
    let refuses = |finding: &&Finding| {
        let is_forced = finding.can_be_forced && forced.contains(&finding.name);
        finding.severity == Severity::Refusal && !is_forced
    };
    findings.iter().filter(refuses).cloned().collect()
}
