//! The 8254 timer, which KVM emulates. Guests with a paravirtual clock leave it alone, but nothing
//! tells in advance which guest does.

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_pit_state2};
use kvm_ioctls::VmFd;

use super::{Attempt, KvmError};
use crate::state::{Node, Raw, Reader, Schema, StateError};

/// Creates the timer, with a port 0x61 that answers: kernels that calibrate by channel 2 read it.
pub fn create(vm: &VmFd) -> Result<(), KvmError> {
    let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(config).attempt("create the timer")
}

/// The timer as `struct kvm_pit_state2` has it. `perennial,pit-v1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PitStateV1 {
    state: Raw<kvm_pit_state2>,
}

impl PitStateV1 {
    /// Reads the timer. No vCPU runs.
    pub fn save(vm: &VmFd) -> Result<Self, KvmError> {
        Ok(Self { state: Raw(vm.get_pit2().attempt("read the timer")?) })
    }

    /// Sets the timer: it counts from now, its period begins anew. The load time is the only thing
    /// that KVM does not take over, so a tick may come up to one period late, once.
    pub fn restore(&self, vm: &VmFd) -> Result<(), KvmError> {
        vm.set_pit2(&self.state.0).attempt("set the timer")
    }
}

impl Schema for PitStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,pit-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { state } = self;
        state.put(node, "state");
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        Ok(Self { state: Raw::take(reader, "state")? })
    }
}
