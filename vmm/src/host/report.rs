//! Makes the report of a live update or a handover, from the ledgers of both hosts.

use luo::Backend;

use super::Host;
use crate::api::report::{
    FramesReport, HostReport, Replaced, Report, SegmentsReport, VmReport, phases,
};
use crate::causes::chain;
use crate::guests::Life;
use crate::guests::ledger::TscRate;
use crate::live_update::incoming::RestoredVm;
use crate::live_update::manifest::Manifest;
use crate::live_update::{Outcome, kernel_name};

impl Host {
    /// Makes the report for the VMs `arrived`. `opened` is the TSC when their restore began, `resumed`
    /// the TSC when all of them were resumed.
    pub(super) fn make_report(
        &self,
        manifest: &Manifest,
        backend: Backend,
        arrived: &[RestoredVm],
        (opened, resumed): (u64, u64),
    ) -> Report {
        let rate = TscRate::from_khz(crate::kvm::tsc_khz().unwrap_or_else(|error| {
            tracing::warn!(
                "the rate of the TSC is unknown, so the report's times are wrong: {}",
                chain(&error).join(": ")
            );
            1_000_000
        }));
        let origin = manifest.ticks;
        let jumped = manifest.ledger.phases.last().map_or(origin, |phase| phase.end);
        let mut ledger = manifest.ledger.clone();
        ledger.enter(self.jump_name(), jumped, self.started_ticks);
        ledger.enter("start", self.started_ticks, opened);
        ledger.enter("resume-vms", opened, resumed);
        let vm_report = |vm: &RestoredVm| self.vm_report(vm, origin, rate, (jumped, opened));
        let vms: Vec<VmReport> = arrived.iter().map(vm_report).collect();
        Report {
            host: HostReport {
                replaced: self.replaced.unwrap_or(Replaced::Kernel),
                kernel_before: manifest.kernel.clone(),
                kernel_after: kernel_name(),
                luo: backend.to_string(),
                number: manifest.number,
                reboot_to_init_ns: rate.nanoseconds(jumped, self.started_ticks),
                counter_khz: rate.khz(),
                phases: phases(&ledger, origin, rate),
            },
            guest_ram_bytes_copied: vms
                .iter()
                .flat_map(|vm| &vm.frames)
                .map(|f| f.moved_bytes)
                .sum(),
            vms,
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
            blackout_ns: vm
                .first_entry_ticks
                .map(|entered| rate.nanoseconds(entry.last_exit_ticks, entered)),
            outcome: match &vm.vm.life {
                Life::Live(_) => Outcome::Running,
                Life::Preserved { .. } => Outcome::Preserved,
                _ => Outcome::Lost,
            },
            phases: phases(&ledger, origin, rate),
            frames,
            segments: SegmentsReport {
                preserved,
                recreated: entry.segments.len() as u64 - preserved,
            },
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
