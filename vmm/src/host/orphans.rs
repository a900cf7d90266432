//! VMs whose sessions are in a LUO that has no manifest of them any more.
//!
//! The kernel ends with a process what the process has retrieved. So a host that is killed after it has retrieved the
//! manifest, and before it has retrieved the session of a VM, leaves that VM where the next host finds it by its name alone.
//! All but the VM's description is in the session; the configuration has the description. The VM's process compares it with
//! the state document, and refuses another machine.

use std::fs::File;

use luo::{Incoming, Orchestrator};

use crate::arch::x86_64::tsc;
use crate::causes::chain;
use crate::guests::Life;
use crate::guests::entry::{SegmentEntry, VmEntry};
use crate::guests::held::Held;
use crate::guests::ledger::Ledger;
use crate::guests::memfd::document_digest;
use crate::live_update::incoming::IncomingError;
use crate::live_update::index::session_of;
use crate::live_update::manifest::{STATE_TOKEN, segment_token, vm_session};
use crate::machine::Machine;
use crate::vm::ram_layout;

/// Returns what is left of a VM of the configuration: it is preserved. `None` if nothing is. Errors if LUO cannot be asked.
pub(super) fn left_of(
    luo: &dyn Orchestrator,
    machine: &Machine,
) -> Result<Option<Life>, luo::Error> {
    let session = match luo.retrieve_session(&vm_session(&machine.name)) {
        Err(error) if error.is_not_found() => return Ok(None),
        session => session?,
    };
    let without_manifest =
        "a host that was killed had the manifest with the VM's description".to_owned();
    let (files, entry, why) = match entry_of(&session, machine) {
        Ok(entry) => (session_of(&entry).files, Some(Box::new(entry)), vec![without_manifest]),
        Err(error) => {
            (Vec::new(), None, [without_manifest].into_iter().chain(chain(&error)).collect())
        }
    };
    tracing::error!("VM `{}` is preserved: {}", machine.name, why.join(": "));
    Ok(Some(Life::Preserved { held: Held::new(session, files), entry, why }))
}

/// Makes the entry that the manifest had, as far as the session tells. The guest ran, as far as anybody knows.
fn entry_of(session: &Incoming, machine: &Machine) -> Result<VmEntry, IncomingError> {
    let state = File::from(session.retrieve(STATE_TOKEN)?);
    let state_bytes = state.metadata().map_err(IncomingError::ReadState)?.len();
    let state_digest = document_digest(&state, state_bytes).map_err(IncomingError::ReadState)?;
    let layout = ram_layout(machine.ram_bytes)?;
    let segment = |(index, bytes)| match session.retrieve(segment_token(index)) {
        Ok(_) => Ok(SegmentEntry { bytes, preserved: true, frames: None }),
        Err(error) if error.is_not_found() => {
            Ok(SegmentEntry { bytes, preserved: false, frames: None })
        }
        Err(error) => Err(error),
    };
    let segments = layout.segments().iter().map(|plan| plan.len).enumerate().map(segment);
    Ok(VmEntry {
        machine: machine.clone(),
        running: true,
        state_bytes,
        state_digest,
        last_exit_ticks: tsc::now(),
        ledger: Ledger::default(),
        segments: segments.collect::<Result<_, _>>()?,
    })
}
