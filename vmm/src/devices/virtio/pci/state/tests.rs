//! Contract tests of the state of a virtio function, and tests of invalid documents.

use super::*;
use crate::state::contract::{contract_tests, refusal};

impl VirtioQueueStateV1 {
    pub(crate) fn sample() -> Self {
        let ring = QueueState {
            max_size: 256,
            next_avail: 0x1234,
            next_used: 0x1230,
            event_idx_enabled: true,
            size: 128,
            ready: true,
            desc_table: 0x0123_4000,
            avail_ring: 0x0123_5000,
            used_ring: 0x0123_6000,
        };
        Self { ring, vector: 1 }
    }
}

impl VirtioPciStateV2 {
    pub(crate) fn sample() -> Self {
        Self {
            device_status: status::ACKNOWLEDGE
                | status::DRIVER
                | status::FEATURES_OK
                | status::DRIVER_OK,
            driver_features: features::VERSION_1 | features::RING_EVENT_IDX,
            config_generation: 3,
            selects: [1, 2, 4],
            config_vector: 1,
            isr: 2,
            queues: vec![VirtioQueueStateV1::sample()],
            config: PciConfigStateV1::sample(),
            msix: MsixStateV1::sample(),
            access: ConfigAccessStateV1::default(),
        }
    }
}

mod v1 {
    use super::*;

    contract_tests! {
        VirtioPciStateV2,
        sample: VirtioPciStateV2::sample,
        changes: [
            |s| s.device_status |= status::NEEDS_RESET,
            |s| s.driver_features += 1,
            |s| s.config_generation += 1,
            |s| s.selects[0] = 0,
            |s| s.selects[1] = 0,
            |s| s.selects[2] = 0xffff,
            |s| s.config_vector = NO_VECTOR,
            |s| s.isr += 1,
            |s| s.queues[0].vector = NO_VECTOR,
            |s| s.queues.clear(),
            |s| s.queues.push(VirtioQueueStateV1::sample()),
            |s| s.config.interrupt_line += 1,
            |s| s.msix.pending[0] = 1,
            |s| s.access.bar = 1,
        ],
        golden: "virtio-pci-v1",
    }
}

contract_tests! {
    VirtioPciStateV2,
    sample: || VirtioPciStateV2 {
        access: ConfigAccessStateV1::sample(),
        ..VirtioPciStateV2::sample()
    },
    changes: [
        |s| s.access.data = [0; 4],
        |s| s.access = ConfigAccessStateV1::default(),
        |s| s.isr += 1,
    ],
    golden: "virtio-pci-v2",
}

mod queue {
    use super::*;

    contract_tests! {
        VirtioQueueStateV1,
        sample: VirtioQueueStateV1::sample,
        changes: [
            |s| s.ring.max_size += 1,
            |s| s.ring.next_avail += 1,
            |s| s.ring.next_used += 1,
            |s| s.ring.event_idx_enabled = false,
            |s| s.ring.size += 1,
            |s| s.ring.ready = false,
            |s| s.ring.desc_table += 1,
            |s| s.ring.avail_ring += 1,
            |s| s.ring.used_ring += 1,
            |s| s.vector = NO_VECTOR,
        ],
        golden: "virtio-queue-v1",
    }
}

#[test]
fn an_inconsistent_function_is_refused_with_the_property_name() {
    let cases: [(fn(&mut VirtioPciStateV2), _, _); 5] = [
        (|s| s.device_status |= 0x10, "/: property `device-status`", "bits that are not defined"),
        (|s| s.selects[2] = 0x1_0000, "/: property `queue-select`", "out of range"),
        (|s| s.config_vector = 2, "/: property `config-vector`", "vector 2, the function has 2"),
        (|s| s.queues[0].vector = 2, "/queue@0: property `vector`", "vector 2, the function has 2"),
        (|s| s.isr = 4, "/: property `isr`", "bits that are not defined"),
    ];
    for (change, place, problem) in cases {
        let error = refusal(VirtioPciStateV2::sample(), change);
        assert!(error.starts_with(place) && error.contains(problem), "{error}");
    }
}
