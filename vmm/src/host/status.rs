//! The answer to `status`: the host, its kernel, and its VMs.

use std::path::Path;
use std::time::Instant;

use luo::Backend;

use super::kvm_pages::KvmPages;
use super::{Host, limits, network};
use crate::api::report::Replaced;
use crate::api::{ProgramStatus, Status, VmStatus};
use crate::guests::{Guest, Life};
use crate::live_update::index::IndexedFile;
use crate::live_update::programs::{Program, own_digest};

impl Host {
    /// Backend name for `status`. Without LUO it is `keeper`, which still allows handovers.
    pub(super) fn luo_name(&self) -> String {
        match &self.luo {
            Ok(luo) => luo.backend().to_string(),
            Err(none) if none.may_hold_vms => "none".to_owned(),
            Err(_) => Backend::Keeper.to_string(),
        }
    }

    /// The answer to `status`, from what is known: asks no VM.
    pub fn status(&self) -> Status {
        let uname = rustix::system::uname();
        let pages = KvmPages::list(Path::new("/"));
        let preserved = self.vms.iter().filter_map(|vm| match &vm.life {
            Life::Preserved { held, .. } => Some(held.name().to_string()),
            _ => None,
        });
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            digest: own_digest().map(|digest| format!("{digest:08x}")),
            kernel: uname.release().to_string_lossy().into_owned(),
            kernel_version: uname.version().to_string_lossy().into_owned(),
            luo: self.luo_name(),
            luo_error: self.luo.as_ref().err().map(|none| none.why.clone()),
            boot: match self.replaced {
                Some(Replaced::Kernel) => "live-update",
                Some(Replaced::Program) => "handover",
                None if self.kernel_entry.is_handed_over() => "handover",
                // A ticket shows that there was a live update, although its VMs cannot be reached.
                None if self.kernel_entry.ticket().is_some() => "live-update",
                None if self.last_host.lost.is_some() => "lost",
                None => "cold",
            }
            .to_owned(),
            last_host_error: self.last_host.why(),
            live_updates: self.number,
            unfinished: preserved
                .chain(self.unfinished.iter().map(|session| session.name().to_string()))
                .collect(),
            config_error: self.config_errors(),
            address: self.config.host.network.as_ref().and_then(network::own_address),
            resources: limits::resources(),
            programs: self.carried.programs.iter().map(program_status).collect(),
            vms: self.vms.iter().map(|vm| vm_status(vm, &pages)).collect(),
        }
    }

    /// What is wrong with the configuration, or could not be done of it until now.
    fn config_errors(&self) -> Option<Vec<String>> {
        let unmounted = self.unmounted.iter().map(|mount| mount.why().to_owned());
        let all: Vec<String> =
            self.config_error.iter().flatten().cloned().chain(unmounted).collect();
        (!all.is_empty()).then_some(all)
    }
}

fn program_status(program: &Program) -> ProgramStatus {
    let IndexedFile { bytes, digest, .. } = program.file();
    let version = program.version().map(str::to_owned);
    ProgramStatus { version, bytes, digest: format!("{digest:08x}") }
}

fn vm_status(vm: &Guest, pages: &KvmPages) -> VmStatus {
    let live = match &vm.life {
        Life::Live(live) => Some(live),
        _ => None,
    };
    let pid = live.map(|live| live.process.pid());
    VmStatus {
        name: vm.machine.name.clone(),
        state: vm.state().to_owned(),
        ram_bytes: vm.machine.ram_bytes,
        vcpus: vm.machine.cpus,
        cpu: vm.machine.cpu,
        priority: vm.priority,
        restart: vm.restart(),
        restarts: vm.restart_count(),
        next_boot_ms: vm.next_boot().map(|at| {
            u64::try_from(at.saturating_duration_since(Instant::now()).as_millis())
                .unwrap_or(u64::MAX)
        }),
        missing_hints: vm.missing_hints().to_vec(),
        pid: pid.map(|pid| pid.as_raw_nonzero().get()),
        program: live.and_then(|live| live.program.clone()),
        console: live.and_then(|live| live.console.clone()),
        mapped: pid.and_then(|pid| pages.of_process(pid)),
        links: vm.links(),
        unconfined: live.map_or_else(Vec::new, |live| live.process.missing().to_vec()),
        booted: live.and_then(|live| live.process.told().booted().cloned()),
        disks: vm.disk_reports().map(|disks| disks.into_iter().map(Into::into).collect()),
        error: vm.life.why().map(<[_]>::to_vec),
    }
}
