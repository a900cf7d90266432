//! Restores a machine: creates the same parts as a boot, and sets the saved state of each.

use std::collections::BTreeSet;

use super::board::Board;
use super::parts::Parts;
use super::state::VmStateV1;
use super::{Vm, VmError};
use crate::kvm::Capabilities;
use crate::kvm::clock::Moment;
use crate::link::{Event, Fds, MissingHints, Ram};
use crate::machine::Machine;
use crate::vcpu::{RestoreError, VcpuStateV1};

impl Vm {
    /// Builds the machine from its state. The guest executes no instruction. `host` is the machine's
    /// description in the manifest. `hints` says what to do if the host lacks hints of the guest's CPUID;
    /// returns the names of those that it lacks. Errors if the document describes another machine.
    pub fn restore(
        host: &Machine,
        hints: MissingHints,
        state: VmStateV1,
        ram: Ram,
        fds: &mut Fds,
        events: impl Fn(Event) + Send + Sync + 'static,
    ) -> Result<(Self, Vec<String>), VmError> {
        let VmStateV1 { machine, platform, vcpus, devices } = state;
        if machine != *host {
            return Err(VmError::Mismatch {
                document: format!("{machine:?}"),
                host: format!("{host:?}"),
            });
        }
        let parts = Parts::new(&machine, ram, fds, events)?;
        let missing = missing_hints(&vcpus, &parts.capabilities, hints)?;
        // The devices first: they set the interrupt routes, which a controller with a pending interrupt
        // needs.
        let board = parts.wire(|wires| Board::restore(&machine, devices, wires, fds))?;
        // The same passage of time for all vCPUs, so that their TSCs stay equal.
        let passage = platform.clock.passage(Moment::now());
        for (vcpu, state) in parts.vcpus.iter().zip(&vcpus) {
            state
                .restore(vcpu, &parts.capabilities, passage)
                .map_err(|source| VmError::RestoreVcpu { id: state.id, source })?;
        }
        platform.restore(&parts.fd)?;
        Ok((parts.assemble(machine, board)?, missing))
    }
}

/// Returns the names of the CPU hints that the guest has and this host lacks.
fn missing_hints(
    vcpus: &[VcpuStateV1],
    host: &Capabilities,
    hints: MissingHints,
) -> Result<Vec<String>, VmError> {
    let mut names = BTreeSet::new();
    for vcpu in vcpus {
        let missing = vcpu.missing_hints(host).and_then(|missing| match hints {
            MissingHints::Refuse if !missing.is_empty() => Err(RestoreError::Hints(missing)),
            _ => Ok(missing),
        });
        let missing = missing.map_err(|source| VmError::RestoreVcpu { id: vcpu.id, source })?;
        names.extend(missing.into_iter().flat_map(|missing| missing.names));
    }
    Ok(names.into_iter().collect())
}
