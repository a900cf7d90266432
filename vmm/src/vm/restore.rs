//! Restores a machine: creates the same parts as a boot, and sets the saved state of each.

use super::board::Board;
use super::parts::Parts;
use super::state::VmStateV1;
use super::{Vm, VmError};
use crate::kvm::clock::Moment;
use crate::link::{Event, Fds, Ram};
use crate::machine::Machine;

impl Vm {
    /// Builds the machine from its state. The guest executes no instruction. `host` is the machine's
    /// description in the manifest. Errors if the document describes another machine.
    pub fn restore(
        host: &Machine,
        state: VmStateV1,
        ram: Ram,
        fds: &mut Fds,
        events: impl Fn(Event) + Send + Sync + 'static,
    ) -> Result<Self, VmError> {
        let VmStateV1 { machine, platform, vcpus, devices } = state;
        if machine != *host {
            return Err(VmError::Mismatch {
                document: format!("{machine:?}"),
                host: format!("{host:?}"),
            });
        }
        let parts = Parts::new(&machine, ram, fds, events)?;
        // The devices first: they set the interrupt routes, which a controller with a pending interrupt
        // needs.
        let board = Board::restore(&machine, devices, &parts.wires(), fds)?;
        // The same passage of time for all vCPUs, so that their TSCs stay equal.
        let passage = platform.clock.passage(Moment::now());
        for (vcpu, state) in parts.vcpus.iter().zip(&vcpus) {
            state
                .restore(vcpu, &parts.capabilities, passage)
                .map_err(|source| VmError::RestoreVcpu { id: state.id, source })?;
        }
        platform.restore(&parts.fd)?;
        parts.assemble(machine, board)
    }
}
