//! Makes the report of a live update or a handover, from the ledgers of both hosts, and keeps it in a file.
//!
//! The file is beside the host's lock, so by default it is gone after a cold boot of the machine, and not after
//! another start of the host.

use std::io;
use std::path::{Path, PathBuf};

use luo::Backend;

use super::Host;
use super::instance::DEFAULT_LOCK;
use crate::api::report::{
    FramesReport, HostReport, Replaced, Report, SegmentsReport, VmReport, phases,
};
use crate::causes::chain;
use crate::config::HostSection;
use crate::guests::ledger::TscRate;
use crate::guests::{Guest, Life};
use crate::live_update::incoming::RestoredVm;
use crate::live_update::index::FileKind;
use crate::live_update::manifest::Manifest;
use crate::live_update::{Outcome, kernel_name};
use crate::machine::VmName;

impl Host {
    /// Makes the report for the VMs `arrived`. `opened` is the TSC when their restore began, `resumed`
    /// the TSC when all of them were resumed. Without a manifest it has no times.
    pub(super) fn make_report(
        &self,
        manifest: Option<&Manifest>,
        backend: Backend,
        arrived: &[RestoredVm],
        (opened, resumed): (u64, u64),
    ) -> Report {
        let replaced = self.replaced.unwrap_or(Replaced::Kernel);
        let mut host = unknown_host(replaced, backend.to_string());
        let rate = TscRate::from_khz(host.counter_khz);
        let (mut origin, mut jumped) = (self.started_ticks, self.started_ticks);
        if let Some(manifest) = manifest {
            origin = manifest.ticks;
            jumped = manifest.ledger.phases.last().map_or(origin, |phase| phase.end);
            let mut ledger = manifest.ledger.clone();
            ledger.enter(self.jump_name(), jumped, self.started_ticks);
            ledger.enter("start", self.started_ticks, opened);
            ledger.enter("resume-vms", opened, resumed);
            host.kernel_before.clone_from(&manifest.kernel);
            host.number = manifest.number;
            host.reboot_to_init_ns = rate.nanoseconds(jumped, self.started_ticks);
            host.phases = phases(&ledger, origin, rate);
        }
        let vm_report = |vm: &RestoredVm| self.vm_report(vm, origin, rate, (jumped, opened));
        let vms: Vec<VmReport> = arrived.iter().map(vm_report).collect();
        let moved = vms.iter().flat_map(|vm| &vm.frames).map(|f| f.moved_bytes).sum();
        Report { host, guest_ram_bytes_copied: moved, vms }
    }

    /// Adds these VMs to the report, about which this program could read nothing but what the index says.
    pub(super) fn report_opaque(&mut self, names: &[VmName]) {
        let Some(report) = &mut self.report else { return };
        for vm in self.vms.iter().filter(|vm| names.contains(&vm.machine.name)) {
            let mut opaque = vm_without_times(vm, outcome(&vm.life));
            if let Life::Preserved { held, .. } = &vm.life {
                let files = |kind| held.files().iter().filter(move |file| file.kind == kind);
                opaque.state_bytes = files(FileKind::State).map(|file| file.bytes).sum();
                opaque.segments.preserved = files(FileKind::Ram).count() as u64;
            }
            report.vms.push(opaque);
        }
    }

    /// Adds these VMs to the report, which had ended by themselves when the last host left.
    pub(super) fn report_boots(&mut self, names: &[VmName]) {
        let Some(report) = &mut self.report else { return };
        for vm in self.vms.iter().filter(|vm| names.contains(&vm.machine.name)) {
            let why = "its guest had ended by itself when the last host left: it boots again by its policy";
            let boots = vm_without_times(vm, Outcome::Running);
            report.vms.push(VmReport { error: Some(vec![why.to_owned()]), ..boots });
        }
    }

    /// Makes the report where nothing that the last host left can be read: its VMs, as far as the configuration has
    /// them, are lost or withheld.
    pub(super) fn report_unread(&mut self) {
        let lost = self.last_host.lost.clone();
        let of = |vm: &Guest| match (&lost, &vm.life) {
            (_, Life::Preserved { .. }) => Some(vm_without_times(vm, Outcome::Preserved)),
            (Some((_, why)), _) => {
                Some(VmReport { error: Some(why.clone()), ..vm_without_times(vm, Outcome::Lost) })
            }
            (None, Life::Withheld(_)) => Some(vm_without_times(vm, Outcome::Preserved)),
            _ => None,
        };
        let vms: Vec<VmReport> = self.vms.iter().filter_map(of).collect();
        if lost.is_none() && vms.is_empty() {
            return;
        }
        let replaced = lost.map(|(replaced, _)| replaced).or(self.replaced);
        let host = unknown_host(replaced.unwrap_or(Replaced::Kernel), self.luo_name());
        self.report = Some(Report { host, vms, guest_ram_bytes_copied: 0 });
        // Until the command line is read, the report that is kept may be that of this kernel.
        if !self.kernel_entry.is_unread() {
            self.keep_report();
        }
    }

    fn vm_report(
        &self,
        vm: &RestoredVm,
        origin: u64,
        rate: TscRate,
        (jumped, opened): (u64, u64),
    ) -> VmReport {
        let entry = &vm.entry;
        let mut ledger = entry.ledger.clone();
        ledger.enter(self.jump_name(), jumped, self.started_ticks);
        ledger.enter("start", self.started_ticks, opened);
        ledger.phases.sort_by_key(|phase| phase.start);
        let frames = (!vm.frames.is_empty()).then(|| FramesReport::new(&vm.frames));
        let preserved = entry.segments.iter().filter(|s| s.preserved).count() as u64;
        VmReport {
            name: entry.machine.name.clone(),
            ram_bytes: entry.machine.ram_bytes,
            state_bytes: entry.state_bytes,
            blackout_ns: vm
                .first_entry_ticks
                .map(|entered| rate.nanoseconds(entry.last_exit_ticks, entered)),
            outcome: outcome(&vm.vm.life),
            error: vm.vm.life.why().map(<[_]>::to_vec),
            remedy: remedy(&entry.machine.name, outcome(&vm.vm.life)),
            phases: phases(&ledger, origin, rate),
            frames,
            segments: SegmentsReport {
                preserved,
                recreated: entry.segments.len() as u64 - preserved,
            },
        }
    }

    /// Writes into the report what has become of a VM since, and that at once to the report's file.
    pub(super) fn update_report(&mut self, name: &VmName) {
        let Some(vm) = self.vms.iter().find(|vm| vm.machine.name == *name) else { return };
        let in_report = self.report.as_mut();
        let Some(report) = in_report.and_then(|r| r.vms.iter_mut().find(|vm| vm.name == *name))
        else {
            return;
        };
        report.outcome = outcome(&vm.life);
        report.error = vm.life.why().map(<[_]>::to_vec);
        report.remedy = remedy(name, report.outcome);
        self.keep_report();
    }

    /// Writes the report to its file, for the hosts that come after this one and have none of their own. A
    /// failure is only logged.
    pub(super) fn keep_report(&self) {
        let Some(report) = &self.report else { return };
        let path = path(&self.config.host);
        if let Err(error) = report.write(&path) {
            tracing::warn!("the report is not kept: cannot write {}: {error}", path.display());
        }
    }

    /// Name of the phase between the last instruction of the old host and the first of this host.
    fn jump_name(&self) -> &'static str {
        match self.replaced {
            Some(Replaced::Program) => "exec",
            _ => "kernel",
        }
    }
}

/// What a report says of a host whose predecessor said nothing.
fn unknown_host(replaced: Replaced, luo: String) -> HostReport {
    let kernel = kernel_name();
    let counter_khz = crate::kvm::tsc_khz().unwrap_or_else(|error| {
        tracing::warn!(
            "the rate of the TSC is unknown, so the report's times are wrong: {}",
            chain(&error).join(": ")
        );
        1_000_000
    });
    HostReport {
        replaced,
        kernel_before: match replaced {
            Replaced::Program => kernel.clone(),
            Replaced::Kernel => "unknown".to_owned(),
        },
        kernel_after: kernel,
        luo,
        number: 0,
        reboot_to_init_ns: 0,
        counter_khz,
        phases: Vec::new(),
    }
}

/// What a report says of a VM whose entry in the manifest was not read.
fn vm_without_times(vm: &Guest, outcome: Outcome) -> VmReport {
    VmReport {
        name: vm.machine.name.clone(),
        ram_bytes: vm.machine.ram_bytes,
        state_bytes: 0,
        blackout_ns: None,
        outcome,
        error: vm.life.why().map(<[_]>::to_vec),
        remedy: remedy(&vm.machine.name, outcome),
        phases: Vec::new(),
        frames: None,
        segments: SegmentsReport::default(),
    }
}

fn outcome(life: &Life) -> Outcome {
    match life {
        Life::Live(_) => Outcome::Running,
        Life::Preserved { .. } | Life::Restoring(_) | Life::Withheld(_) => Outcome::Preserved,
        _ => Outcome::Lost,
    }
}

/// Returns what an operator can do about a VM that does not run.
fn remedy(name: &VmName, outcome: Outcome) -> Option<String> {
    match outcome {
        Outcome::Running => None,
        Outcome::Preserved => Some(format!(
            "remove the cause and run `perennial ctl restore {name}`; `perennial ctl stop {name}` gives its memory up"
        )),
        Outcome::Lost => Some(format!(
            "its memory cannot be continued: `perennial ctl boot {name}` starts it anew from its disks"
        )),
    }
}

/// Returns where the report is kept: beside the lock, and named after any other lock than the default one, because several
/// hosts may have their locks in one directory.
fn path(section: &HostSection) -> PathBuf {
    let lock = section.lock.as_deref().filter(|lock| *lock != Path::new(DEFAULT_LOCK));
    let Some(lock) = lock else { return Path::new(DEFAULT_LOCK).with_file_name("report.json") };
    let mut name = lock.file_name().unwrap_or_default().to_owned();
    name.push(".report.json");
    lock.with_file_name(name)
}

/// Returns the report that an earlier host kept. `None` if there is none that this host can read.
pub(super) fn kept(section: &HostSection) -> Option<Report> {
    let path = path(section);
    match Report::read(&path) {
        Ok(report) => Some(report),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            tracing::warn!("cannot read the report in {}: {error}", path.display());
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_with_locks_in_one_directory_keep_a_report_each() {
        let path = |lock: Option<&str>| {
            path(&HostSection { lock: lock.map(PathBuf::from), ..HostSection::default() })
        };
        let default = Path::new("/run/perennial/report.json");
        assert_eq!((path(None).as_path(), path(Some(DEFAULT_LOCK)).as_path()), (default, default));
        let second = path(Some("/run/perennial/second.lock"));
        assert_eq!(second, Path::new("/run/perennial/second.lock.report.json"));
    }
}
