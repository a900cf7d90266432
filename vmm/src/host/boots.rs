//! The VMs of a host that came up without a last host: they boot, a few at a time.

use std::time::{Duration, Instant};

use luo::Orchestrator;

use super::{Host, ram_source};
use crate::causes::chain;
use crate::guests::answers::readable;
use crate::guests::{Guest, Life, turns};
use crate::live_update::manifest::vm_session;
use crate::machine::VmName;
use crate::machine::claims::{Claims, FilesSeen};

/// How long a host that starts waits for VMs that boot, before it serves its clients. One that takes longer may hang.
const BOOTS_WITHIN: Duration = Duration::from_secs(10);

impl Host {
    /// Boots the VMs of the configuration. A VM that may be preserved where this host cannot reach it is
    /// withheld instead.
    pub(super) fn boot_vms(&mut self) {
        let unreachable = self.luo.as_ref().err().filter(|none| none.may_hold_vms);
        let unseen = self.last_host.unseen.as_ref().map(|why| why.join(": "));
        let why = unseen.clone().or(unreachable.map(|none| none.why.clone()));
        let remedy = match self.kernel_entry.ticket() {
            _ if unseen.is_some() || self.kernel_entry.is_unread() => {
                "remove the cause and `restore` the VM"
            }
            Some(_) if self.kernel_entry.is_noted() => "repair the cause and `restore` the VM",
            Some(_) => {
                "repair the cause and `restore` the VM, or `update` to a kernel whose host can reach it"
            }
            None => "repair the cause and start the host again",
        };
        let (files, mut claims) = (FilesSeen::of(&self.config.machines), Claims::default());
        // The VMs whose boot has begun, and when.
        let mut began: Vec<(usize, Instant)> = Vec::new();
        for machine in self.config.machines.clone() {
            let claimed = claims.add_files(&machine, &files);
            let mut vm = Guest::new(machine, &self.confinement);
            vm.follow(&self.config);
            let kept = match &why {
                Some(why) if !self.kernel_entry.is_given_up(&vm.machine.name) => {
                    Some(Life::withheld(&vm.machine.name, why, remedy))
                }
                _ => self.left_in_luo(&vm.machine),
            };
            match kept {
                Some(life) => vm.life = life,
                None => {
                    self.wait_for_turn(&began);
                    if let Ok(luo) = &self.luo {
                        forget_leftovers(luo.as_ref(), &vm.machine.name);
                    }
                    let (index, wanted) = (self.vms.len(), vm.machine.ram_bytes);
                    began.push((index, Instant::now()));
                    let ram = ram_source(&self.luo, &self.vms, index, wanted);
                    let claimed = claimed.map_err(|source| vm.claimed(source));
                    if let Err(error) = claimed.and_then(|()| vm.begin_to_boot(ram)) {
                        let why = chain(&error);
                        tracing::error!("{}", why.join(": "));
                        vm.did_not_boot(why);
                    }
                }
            }
            self.vms.push(vm);
        }
        // One that takes longer, because its disk hangs, goes on beside the main loop.
        let deadline = Instant::now() + BOOTS_WITHIN;
        while Instant::now() < deadline && self.is_booting() {
            self.boots_go_on(deadline);
        }
    }

    /// Takes the VMs that boot on until it is the turn of the next one. `began`: those whose boot has begun, and when.
    fn wait_for_turn(&mut self, began: &[(usize, Instant)]) {
        let at_once = turns::at_once();
        loop {
            let booting = began.iter().filter(|(index, _)| self.vms[*index].booting().is_some());
            let now = Instant::now();
            let turn = turns::next(booting.map(|(_, began)| *began), at_once, now);
            if turn <= now {
                return;
            }
            self.boots_go_on(turn);
        }
    }

    fn is_booting(&self) -> bool {
        self.vms.iter().any(|vm| vm.booting().is_some())
    }

    /// Takes each VM that boots one step on, all at the same time. Waits for one that can go on, until `deadline` at most.
    fn boots_go_on(&mut self, deadline: Instant) {
        let booting = self.vms.iter().filter(|vm| vm.booting().is_some());
        let fds: Vec<_> = booting.clone().filter_map(Guest::booting).collect();
        let due = booting.filter_map(Guest::boot_due).min();
        readable(&fds, due.unwrap_or(deadline).min(deadline));
        for index in 0..self.vms.len() {
            // One that has failed waits until all have had their turn.
            if self.vms[index].booting().is_some() {
                self.boot_if_due(index);
            }
        }
    }
}

/// Frees what a host that was killed before it left has put into the store of a VM that boots now: without a manifest
/// it cannot be restored, and it is outdated from now on.
pub(super) fn forget_leftovers(luo: &dyn Orchestrator, vm: &VmName) {
    if luo.backend().outlives_process()
        && let Ok(session) = luo.retrieve_session(&vm_session(vm))
    {
        tracing::warn!("`{}` has no manifest and is outdated: its memory is freed", session.name());
    }
}
