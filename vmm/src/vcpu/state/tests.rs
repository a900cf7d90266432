//! What a vCPU's state promises, first as a document, then on a real vCPU.

use super::*;
use crate::state::contract::{contract_tests, refusal};
use crate::state::node::read_node;

mod real;

impl VcpuStateV1 {
    /// A state of the vCPU `id` with nothing zero. No vCPU would take it.
    pub(crate) fn sample(id: u32) -> Self {
        let seed = 10 * (id as u8 + 1);
        let leaf = |function, seed| kvm_cpuid_entry2 { function, ..Raw::pattern(seed).0 };
        Self {
            id,
            cpuid: vec![leaf(0, seed), leaf(1, seed + 1)],
            tsc_khz: 2_500_000,
            tsc_offset: (-123_456_789i64 - i64::from(id)) as u64,
            tsc_deadline: 0x0123_4567_89ab_cdef,
            msrs: vec![
                Msr { index: 0x174, data: 0x10 },
                Msr { index: 0xc000_0082, data: 0xffff_ffff_8100_0000 },
            ],
            xsave: (0..size_of::<kvm_xsave>()).map(|at| at as u8 | 1).collect(),
            regs: Raw::pattern(seed + 2),
            sregs: Raw::pattern(seed + 3),
            xcrs: Raw::pattern(seed + 4),
            debugregs: Raw::pattern(seed + 5),
            lapic: Raw::pattern(seed + 6),
            mp_state: Raw::pattern(seed + 7),
            events: Raw::pattern(seed + 8),
        }
    }
}

/// Not 0, which would be nowhere to be seen in the document.
fn sample() -> VcpuStateV1 {
    VcpuStateV1::sample(1)
}

contract_tests! {
    VcpuStateV1,
    sample: sample,
    changes: [
        |s| s.id += 1,
        |s| s.cpuid[1].edx += 1,
        |s| s.cpuid.clear(),
        |s| s.tsc_khz += 1,
        |s| s.tsc_offset += 1,
        |s| s.tsc_deadline = 0,
        |s| s.msrs[0].index += 1,
        |s| s.msrs[1].data += 1,
        |s| s.msrs.clear(),
        |s| s.xsave[4095] = 0,
        |s| s.xsave.resize(11_008, 1),
        |s| s.regs.0.rip += 1,
        |s| s.sregs.0.cr3 += 1,
        |s| s.xcrs.0.xcrs[0].value += 1,
        |s| s.debugregs.0.dr7 += 1,
        |s| s.lapic.0.regs[LVT_TIMER] += 1,
        |s| s.mp_state.0.mp_state += 1,
        |s| s.events.0.nmi.pending += 1,
    ],
    golden: "vcpu-x86-v1",
}

fn refused(change: fn(&mut VcpuStateV1)) -> String {
    refusal(sample(), change)
}

#[test]
fn a_vcpu_that_cannot_be_is_refused_by_name() {
    assert!(refused(|s| s.tsc_khz = 0).contains("`tsc-khz`: a TSC of 0 kHz does not count"));
    assert!(refused(|s| s.id = 64).contains("`id`: 64, the most is 63"));
    let more = refused(|s| s.cpuid = vec![s.cpuid[0]; 257]);
    assert!(more.contains("`cpuid`: 10280 bytes are not 0 to 256 entries of 40"), "{more}");
    assert!(refused(|s| s.msrs.swap(0, 1)).contains("`msrs`: they are not in ascending order"));
    assert!(refused(|s| s.msrs[1].index = 0x174).contains("`msrs`: they are not in ascending"));
    assert!(refused(|s| s.msrs[0].index = IA32_TSC_DEADLINE).contains("`msrs`: MSR 0x6e0: "));
    assert!(refused(|s| s.xsave.truncate(4095)).contains("`xsave`: 4095 bytes"));
    assert!(refused(|s| s.xsave.resize((64 << 10) + 1, 0)).contains("`xsave`: 65537 bytes"));
}

#[test]
fn an_msr_number_of_more_than_32_bits_is_refused() {
    let mut node = sample().to_node("cpu@1");
    let pair = [1u64 << 32 | 0x174, 1].map(u64::to_be_bytes).concat();
    node.properties.insert("msrs".to_owned(), pair);
    let error = read_node::<VcpuStateV1>(&node, "/").unwrap_err().to_string();
    assert_eq!(error, "/cpu@1: property `msrs`: there is no MSR 0x100000174");
}

#[test]
fn only_a_timer_in_deadline_mode_has_a_deadline_and_one_that_passed_is_armed_as_past() {
    let armed = |mode: u32, saved| {
        let mut state = sample();
        for (byte, value) in state.lapic.0.regs[LVT_TIMER..].iter_mut().zip(mode.to_le_bytes()) {
            *byte = value as _;
        }
        state.deadline(saved).first().map(|msr| msr.data)
    };
    assert_eq!(armed(LVT_TIMER_DEADLINE | 0xec, 77), Some(77));
    assert_eq!(armed(LVT_TIMER_DEADLINE | 0xec, 0), Some(1), "it may be lost, so it fires again");
    // One-shot, periodic, reserved.
    for mode in [0, 0b01 << 17, 0b11 << 17] {
        assert_eq!(armed(mode | 0xec, 77), None);
    }
}

#[test]
fn kernels_that_calibrate_one_crystal_differently_mean_the_same_rate() {
    assert!(is_same_crystal(2_500_000, 2_500_010));
    assert!(is_same_crystal(2_596_092, 2_593_403), "as seen");
    assert!(!is_same_crystal(2_500_000, 2_500_000 / 2));
    assert!(!is_same_crystal(2_500_000, 2_600_000));
}
