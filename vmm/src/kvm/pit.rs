//! State of the 8254 timer (PIT), which KVM emulates. Guests with a paravirtual clock do not use
//! the timer, but the VMM cannot know in advance which guests do, so every machine has one.

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_pit_state2};
use kvm_ioctls::VmFd;

use super::{Attempt, KvmError};
use crate::state::{Node, Raw, Reader, Schema, StateError};

/// Creates the timer, with an emulated port 0x61, which kernels that calibrate by channel 2 read.
pub fn create(vm: &VmFd) -> Result<(), KvmError> {
    let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(config).attempt("create the timer")
}

/// The timer as a `struct kvm_pit_state2`. Binding `perennial,pit-v1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PitStateV1 {
    state: Raw<kvm_pit_state2>,
}

impl PitStateV1 {
    /// Reads the timer. Call while no vCPU runs.
    pub fn save(vm: &VmFd) -> Result<Self, KvmError> {
        Ok(Self { state: Raw(vm.get_pit2().attempt("read the timer")?) })
    }

    /// Sets the timer, which then counts from the start of its period: KVM restores everything but
    /// the load time. So one tick may come up to one period late.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::test_vm::TestVm;
    use crate::state::contract::contract_tests;
    use kvm_bindings::KVM_PIT_FLAGS_SPEAKER_DATA_ON;

    impl PitStateV1 {
        pub(crate) fn sample() -> Self {
            Self { state: Raw::pattern(1) }
        }

        pub(crate) fn other_sample() -> Self {
            Self { state: Raw::pattern(2) }
        }
    }

    contract_tests! {
        PitStateV1,
        sample: PitStateV1::sample,
        changes: [
            |s| s.state.0.channels[0].count += 1,
            |s| s.state.0.channels[2].count_load_time += 1,
            |s| s.state.0.flags += 1,
            |s| s.state.0.reserved[8] += 1,
        ],
        golden: "pit-v1",
    }

    /// The state without the times at which the counters were loaded, which are the host's.
    fn without_load_times(mut state: PitStateV1) -> Node {
        for channel in &mut state.state.0.channels {
            channel.count_load_time = 0;
        }
        state.to_node("")
    }

    #[test]
    fn the_timer_is_the_same_in_another_vm_but_for_its_load_times() {
        let (Some(before), Some(after)) = (TestVm::new(), TestVm::new()) else { return };
        let mut pit = before.vm.get_pit2().unwrap();
        // Mode 2, 16 bits, as Linux programs its tick; mode 3 and a gate, as the speaker's.
        for (channel, mode, count) in [(0, 2, 11_932), (2, 3, 1193)] {
            pit.channels[channel].mode = mode;
            pit.channels[channel].count = count;
            pit.channels[channel].rw_mode = 3;
            pit.channels[channel].gate = 1;
        }
        pit.channels[1].latched_count = 7;
        pit.flags |= KVM_PIT_FLAGS_SPEAKER_DATA_ON;
        before.vm.set_pit2(&pit).unwrap();
        let saved = PitStateV1::save(&before.vm).unwrap();
        assert_eq!(saved, PitStateV1::save(&before.vm).unwrap(), "a save changes nothing");
        assert_eq!(saved.state.0.channels[2].count, 1193);
        saved.restore(&after.vm).unwrap();
        let restored = PitStateV1::save(&after.vm).unwrap();
        assert_eq!(without_load_times(restored), without_load_times(saved));
    }
}
