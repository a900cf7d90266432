//! A host in the foreground with one VM and no LUO: `perennial run`. It ends with its VM.
//!
//! It uses nothing that only root may use, and nothing that only one host of a machine can have.

use std::os::unix::net::UnixStream;

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

use super::arrival::LastHost;
use super::backend::NoLuo;
use super::kept_disks::KeptDisks;
use super::kernel_entry::KernelEntry;
use super::restores::Restores;
use super::serve::Server;
use super::{Host, HostError, ram_source};
use crate::config::Config;
use crate::guests::confinement::Confinement;
use crate::guests::{Guest, Life};
use crate::live_update::carry::Carried;
use crate::open_files;

/// How the VM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The guest powered its machine off, or the user ended it.
    Stopped,
    /// The VM failed; the log says why.
    Failed,
}

impl Host {
    /// A host whose VMs are not booted yet.
    pub(super) fn alone(config: Config, config_text: String) -> Self {
        let why = "`perennial run` keeps its VM only while it runs itself; VMs of `perennial host` live on";
        let confinement = Confinement::among_others(&config.host);
        let machines = config.machines.iter().cloned();
        Self {
            vms: machines.map(|machine| Guest::new(machine, &confinement)).collect(),
            confinement,
            config,
            config_text,
            config_path: None,
            config_error: None,
            unmounted: Vec::new(),
            luo: Err(NoLuo { why: why.to_owned(), may_hold_vms: false }),
            pool: None,
            kernel_entry: KernelEntry::unknown(None),
            replaced: None,
            number: 0,
            report: None,
            unfinished: Vec::new(),
            last_host: LastHost::default(),
            late: Vec::new(),
            restores: Restores::default(),
            kept_disks: KeptDisks::default(),
            carried: Carried::default(),
            next: None,
            left_out: Vec::new(),
            rehearsal: None,
            rehearsed: None,
            watchdog: None,
            started_ticks: 0,
            is_alone: true,
            instance: None,
        }
    }

    /// Whether this is a host of `perennial run` none of whose VMs is left.
    pub(super) fn has_nothing_left(&self) -> bool {
        self.is_alone && self.vms.iter().all(Guest::is_at_rest)
    }
}

/// Boots the VMs of `config`, whose text is `text`, and runs until none is left, `power-off`, a signal, or the
/// end of the socket `left`.
pub fn run(config: Config, text: String, left: UnixStream) -> Result<Ended, HostError> {
    open_files::raise();
    let mut server = Server::new(&[SIGTERM, SIGINT, SIGHUP, SIGQUIT])?;
    server.end_with(left);
    let mut host = Host::alone(config, text);
    server.listen(&host.config.host)?;
    for index in 0..host.vms.len() {
        let wanted = host.vms[index].machine.ram_bytes;
        let ram = ram_source(&host.luo, &host.vms, index, wanted);
        host.vms[index].boot(ram)?;
    }
    server.run(&mut host)?;
    Ok(match host.vms.iter().any(|vm| matches!(vm.life, Life::Failed(_))) {
        true => Ended::Failed,
        false => Ended::Stopped,
    })
}
