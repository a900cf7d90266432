//! VMs whose sessions are in a LUO that has no manifest of them any more.
//!
//! The kernel ends with a process what the process has retrieved. So a host that is killed after it has retrieved the
//! manifest, and before it has retrieved the session of a VM, leaves that VM where the next host finds it by its name alone.
//! All that is missing is the VM's description, which the configuration has, too. The VM's process compares that with the
//! state document, and refuses another machine.
//!
//! They are looked for only until a host has taken over what was left with this kernel, or has found that nothing was. After
//! that a VM may have been booted anew, and what is still in the LUO is outdated.

use std::fs::File;

use super::{Host, HostError};
use crate::arch::x86_64::tsc;
use crate::causes::chain;
use crate::guests::entry::{SegmentEntry, VmEntry};
use crate::guests::held::Held;
use crate::guests::ledger::Ledger;
use crate::guests::memfd::document_digest;
use crate::guests::{Guest, Life};
use crate::live_update::incoming::IncomingError;
use crate::live_update::index::session_of;
use crate::live_update::manifest::{STATE_TOKEN, segment_token, vm_session};
use crate::machine::Machine;
use crate::vm::ram_layout;

impl Host {
    /// Returns what becomes of a VM of which a killed host has left a session without a manifest: it is kept, and restored
    /// beside the main loop. `None` if nothing of it can come any more.
    pub(super) fn left_in_luo(&mut self, machine: &Machine) -> Option<Life> {
        let luo = match &self.luo {
            // Elsewhere the manifest comes again as well.
            Ok(luo) if !luo.backend().comes_again() && self.kernel_entry.is_marked() => luo,
            _ => return None,
        };
        let session = match luo.retrieve_session(&vm_session(&machine.name)) {
            // Dropping it frees the VM's memory.
            Ok(session) if self.kernel_entry.is_given_up(&machine.name) => {
                drop(session);
                return None;
            }
            Ok(session) => session,
            Err(error) if error.is_not_found() => return None,
            Err(error) => {
                let why = chain(&error).join(": ");
                let remedy = "remove the cause and `restore` the VM";
                return Some(Life::withheld(&machine.name, &why, remedy));
            }
        };
        let whole = whole_entry(machine);
        let mut held = Held::new(session, session_of(&whole).files);
        let mut why =
            vec!["a host that was killed had the manifest with its description".to_owned()];
        let entry = match entry_of(&held, whole) {
            Ok(entry) => {
                held.list(session_of(&entry).files);
                Some(Box::new(entry))
            }
            Err(error) => {
                why.extend(chain(&error));
                None
            }
        };
        tracing::error!("VM `{}` is preserved: {}", machine.name, why.join(": "));
        self.restore_soon(&machine.name);
        Some(Life::Preserved { held, entry, why })
    }

    /// Decides about the VMs that are still withheld when no manifest of them can come any more: what a killed host has left
    /// of them is preserved, and those of which nothing was left can be booted. They stay withheld if LUO cannot be asked for
    /// them.
    pub(super) fn withhold_none(&mut self) {
        for index in 0..self.vms.len() {
            if self.vms[index].is_withheld() {
                let machine = self.vms[index].machine.clone();
                let life = self.left_in_luo(&machine).unwrap_or(Life::Stopped);
                self.vms[index].life = life;
                self.update_report(&machine.name);
            }
        }
        // A keeper's sessions came from this kernel.
        if self.last_host.keeper.is_none() {
            self.redeem_if_none_is_withheld();
        }
    }

    /// Looks again for what is left of the VMs that are withheld because LUO could not be asked for them. Errors if it still
    /// cannot.
    pub(super) fn find_orphans(&mut self) -> Result<(), HostError> {
        if self.luo.is_err() || !self.vms.iter().any(Guest::is_withheld) {
            return Ok(());
        }
        self.withhold_none();
        let why = |vm: &Guest| match &vm.life {
            Life::Withheld(why) => Some(why.join(": ")),
            _ => None,
        };
        let why = self.vms.iter().find_map(why);
        why.map_or(Ok(()), |why| Err(HostError::NotSeen { why }))
    }

    /// Notes that nothing of the last kernel can come any more, unless VMs are withheld because LUO could not be asked for
    /// them.
    pub(super) fn redeem_if_none_is_withheld(&mut self) {
        if !self.vms.iter().any(Guest::is_withheld) {
            self.kernel_entry.redeem();
        }
    }

    /// Tries again to make the entry of a preserved VM whose session has no manifest.
    pub(super) fn complete_orphan(&mut self, index: usize) {
        let vm = &mut self.vms[index];
        if let Life::Preserved { held, entry: entry @ None, .. } = &mut vm.life
            && self.carried.manifests.is_empty()
        {
            match entry_of(held, whole_entry(&vm.machine)) {
                Ok(found) => *entry = Some(Box::new(found)),
                Err(error) => tracing::error!("{}", chain(&error).join(": ")),
            }
        }
    }
}

/// Returns the entry of a VM of which everything was preserved. Its guest ran, as far as anybody knows.
fn whole_entry(machine: &Machine) -> VmEntry {
    // The configuration was checked for a layout.
    let layout = ram_layout(machine.ram_bytes);
    let plans = layout.iter().flat_map(|layout| layout.segments());
    let segment = |bytes| SegmentEntry { bytes, preserved: true, frames: None };
    VmEntry {
        machine: machine.clone(),
        running: true,
        state_bytes: 0,
        state_digest: 0,
        last_exit_ticks: tsc::now(),
        ledger: Ledger::default(),
        segments: plans.map(|plan| segment(plan.len)).collect(),
    }
}

/// Completes the entry by what is in the session.
fn entry_of(held: &Held, mut entry: VmEntry) -> Result<VmEntry, IncomingError> {
    let state = File::from(held.file(STATE_TOKEN)?);
    entry.state_bytes = state.metadata().map_err(IncomingError::ReadState)?.len();
    let digest = document_digest(&state, entry.state_bytes);
    entry.state_digest = digest.map_err(IncomingError::ReadState)?;
    for (index, segment) in entry.segments.iter_mut().enumerate() {
        segment.preserved = match held.file(segment_token(index)) {
            // The guest has never touched it.
            Err(error) if error.is_not_found() => false,
            file => file.map(|_| true)?,
        };
    }
    Ok(entry)
}
