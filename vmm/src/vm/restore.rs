//! A machine that goes on: the same parts as at its boot, each with the state that it had.

use super::board::Board;
use super::parts::Parts;
use super::state::VmStateV1;
use super::{Vm, VmError};
use crate::kvm::clock::Moment;
use crate::link::{Event, Fds, Ram};
use crate::machine::Machine;

impl Vm {
    /// Builds the machine from its state. No instruction of the guest has run when this returns.
    /// `host` is what the host knows of the machine: the document must be of the same.
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
        // The devices first: the interrupt routes must stand before a controller with something
        // pending is set.
        let board = Board::restore(&machine, devices, &parts.wires(), fds)?;
        // One passage of time for all vCPUs, so that their TSCs stay in step.
        let passage = platform.clock.passage(Moment::now());
        for (vcpu, state) in parts.vcpus.iter().zip(&vcpus) {
            state
                .restore(vcpu, &parts.capabilities, passage)
                .map_err(|source| VmError::RestoreVcpu { id: state.id, source })?;
        }
        platform.restore(&parts.fd)?;
        for vcpu in &parts.vcpus {
            // Tells the guest's soft-lockup watchdog that it was stopped. A guest without kvmclock
            // has no way to be told, and KVM says EINVAL.
            let _ = vcpu.kvmclock_ctrl();
        }
        parts.assemble(machine, board)
    }
}
