//! Every CPU feature that a guest may have, bit by bit, and how its loss after a live update is judged.
//!
//! A feature is offered only if it is in this table and not [`Kind::Withheld`]: a bit that a later KVM
//! supports may belong to state that this program does not save. Names are those of /proc/cpuinfo; a bit that
//! /proc/cpuinfo does not show has the name of Linux' `X86_FEATURE_` in lower case. Sources: Linux
//! arch/x86/include/asm/cpufeatures.h and arch/x86/kvm/cpuid.c, Intel SDM 2A `CPUID`, AMD APM 3 appendix E.

use super::Register::{self, Eax, Ebx, Ecx, Edx};

/// What a feature is to a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Every 64-bit processor has the feature, or KVM itself provides it. Part of every baseline.
    Base,
    /// Instructions that use only registers that are always saved.
    Instruction,
    /// The feature has registers, modes or contents of memory that the guest sees and that are saved.
    State,
    /// Registers by which a guest protects itself from other guests. Part of every baseline.
    Mitigation,
    /// A word about speed, or that the processor does not have a weakness. A guest runs without it.
    Hint,
    /// The bit follows the guest's own registers, or the topology of its machine. It is not compared.
    Live,
    /// The feature has state that is not saved. It is not offered, and a guest that has it is refused.
    Withheld,
}

/// Features of one register of one leaf that are of one kind for one reason.
pub struct Group {
    /// CPUID leaf.
    pub leaf: u32,
    /// Its subleaf.
    pub subleaf: u32,
    /// The register.
    pub register: Register,
    /// What the features are to a guest.
    pub kind: Kind,
    /// Why they are of that kind: where their state is saved, or why there is none.
    pub why: &'static str,
    /// Bit and name of each.
    pub bits: &'static [(u8, &'static str)],
}

impl Group {
    /// Returns the bits of the group.
    pub fn mask(&self) -> u32 {
        self.bits.iter().fold(0, |mask, (bit, _)| mask | 1 << bit)
    }
}

/// One bit of CPUID: leaf, subleaf, register, number of the bit.
pub type Bit = (u32, u32, Register, u8);

/// A function and not a literal, so that one group is one line of the table and its names.
const fn group(
    (leaf, subleaf, register): (u32, u32, Register),
    kind: Kind,
    why: &'static str,
    bits: &'static [(u8, &'static str)],
) -> Group {
    Group { leaf, subleaf, register, kind, why, bits }
}

const L1C: (u32, u32, Register) = (1, 0, Ecx);
const L1D: (u32, u32, Register) = (1, 0, Edx);
const L7B: (u32, u32, Register) = (7, 0, Ebx);
const L7C: (u32, u32, Register) = (7, 0, Ecx);
const L7D: (u32, u32, Register) = (7, 0, Edx);
const L71A: (u32, u32, Register) = (7, 1, Eax);
const L71D: (u32, u32, Register) = (7, 1, Edx);
const LDA: (u32, u32, Register) = (0xd, 1, Eax);
const KVM: (u32, u32, Register) = (0x4000_0001, 0, Eax);
const X1C: (u32, u32, Register) = (0x8000_0001, 0, Ecx);
const X1D: (u32, u32, Register) = (0x8000_0001, 0, Edx);
const X8B: (u32, u32, Register) = (0x8000_0008, 0, Ebx);
const X21A: (u32, u32, Register) = (0x8000_0021, 0, Eax);

const PLAIN: &str = "general registers, XMM, YMM and ZMM are in regs and xsave";
const CONTROL: &str = "a bit of CR3, CR4 or EFER, which are in sregs";
const MSRS: &str = "its MSRs are on KVM's list of those to save";
const XSAVE: &str = "a component of the XSAVE area, whose size is checked when it is offered";
const SPEED: &str = "says what is fast; the instructions work on every processor";
const SAFE: &str =
    "says that a weakness does not exist, or what a known instruction does against it";

/// The table.
#[rustfmt::skip]
pub const GROUPS: &[Group] = &[
    group(L1C, Kind::Instruction, PLAIN, &[
        (0, "pni"), (1, "pclmulqdq"), (9, "ssse3"), (12, "fma"), (13, "cx16"), (19, "sse4_1"),
        (20, "sse4_2"), (22, "movbe"), (23, "popcnt"), (25, "aes"), (29, "f16c"), (30, "rdrand"),
    ]),
    group(L1C, Kind::State, CONTROL, &[(17, "pcid")]),
    group(L1C, Kind::State, MSRS, &[(2, "dtes64"), (15, "pdcm")]),
    group(L1C, Kind::State, XSAVE, &[(26, "xsave"), (28, "avx")]),
    group(L1C, Kind::Base, "KVM's LAPIC has both, whatever the processor has", &[
        (21, "x2apic"), (24, "tsc_deadline_timer"),
    ]),
    group(L1C, Kind::Base, "set for every guest", &[(31, "hypervisor")]),
    group(L1C, Kind::Live, "follows CR4", &[(27, "osxsave")]),
    group(L1C, Kind::Withheld, "the state of nested virtualization is not saved", &[(5, "vmx")]),
    group(L1D, Kind::Base, "every 64-bit processor has these; registers in sregs, MSRs and xsave", &[
        (0, "fpu"), (1, "vme"), (2, "de"), (3, "pse"), (4, "tsc"), (5, "msr"), (6, "pae"), (7, "mce"),
        (8, "cx8"), (11, "sep"), (12, "mtrr"), (13, "pge"), (14, "mca"), (15, "cmov"), (16, "pat"),
        (17, "pse36"), (19, "clflush"), (23, "mmx"), (24, "fxsr"), (25, "sse"), (26, "sse2"),
    ]),
    group(L1D, Kind::State, MSRS, &[(21, "dts")]),
    group(L1D, Kind::Hint, SPEED, &[(27, "ss")]),
    group(L1D, Kind::Live, "APIC follows IA32_APIC_BASE, HT is topology", &[(9, "apic"), (28, "ht")]),
    group((6, 0, Eax), Kind::Hint, "KVM's LAPIC timer never stops, whatever the bit says", &[(2, "arat")]),
    group(L7B, Kind::Instruction, PLAIN, &[
        (3, "bmi1"), (4, "hle"), (5, "avx2"), (8, "bmi2"), (10, "invpcid"), (11, "rtm"), (18, "rdseed"),
        (19, "adx"), (23, "clflushopt"), (24, "clwb"), (29, "sha_ni"),
    ]),
    group(L7B, Kind::State, XSAVE, &[
        (14, "mpx"), (16, "avx512f"), (17, "avx512dq"), (21, "avx512ifma"), (26, "avx512pf"),
        (27, "avx512er"), (28, "avx512cd"), (30, "avx512bw"), (31, "avx512vl"),
    ]),
    group(L7B, Kind::State, CONTROL, &[(0, "fsgsbase"), (7, "smep"), (20, "smap")]),
    group(L7B, Kind::Base, "KVM emulates it; an MSR on KVM's list", &[(1, "tsc_adjust")]),
    group(L7B, Kind::Hint, SPEED, &[(9, "erms")]),
    group(L7B, Kind::Hint, "what a few instructions leave in registers of the x87 FPU", &[
        (6, "fdp_excptn_only"), (13, "zero_fcs_fds"),
    ]),
    group(L7B, Kind::Withheld, "no VMM can read the key that encrypts enclaves", &[(2, "sgx")]),
    group(L7B, Kind::Withheld, "KVM switches its registers only in a mode that loses the host's own trace", &[
        (25, "intel_pt"),
    ]),
    group(L7C, Kind::Instruction, PLAIN, &[
        (8, "gfni"), (9, "vaes"), (10, "vpclmulqdq"), (22, "rdpid"), (25, "cldemote"), (27, "movdiri"),
        (28, "movdir64b"),
    ]),
    group(L7C, Kind::State, XSAVE, &[
        (1, "avx512vbmi"), (3, "pku"), (6, "avx512_vbmi2"), (11, "avx512_vnni"), (12, "avx512_bitalg"),
        (14, "avx512_vpopcntdq"),
    ]),
    group(L7C, Kind::State, CONTROL, &[(2, "umip"), (16, "la57")]),
    group(L7C, Kind::State, MSRS, &[(5, "waitpkg"), (24, "bus_lock_detect")]),
    group(L7C, Kind::Live, "follows CR4", &[(4, "ospke")]),
    group(L7C, Kind::Withheld, "the shadow stack pointer is no MSR, and neither it nor U_CET and S_CET are saved", &[
        (7, "user_shstk"),
    ]),
    group(L7C, Kind::Withheld, "part of SGX", &[(30, "sgx_lc")]),
    group(L7C, Kind::Withheld, "PASID and PKRS are not on KVM's list", &[(29, "enqcmd"), (31, "pks")]),
    group(L7D, Kind::Instruction, PLAIN, &[(14, "serialize"), (16, "tsxldtrk")]),
    group(L7D, Kind::State, XSAVE, &[
        (2, "avx512_4vnniw"), (3, "avx512_4fmaps"), (8, "avx512_vp2intersect"), (22, "amx_bf16"),
        (23, "avx512_fp16"), (24, "amx_tile"), (25, "amx_int8"),
    ]),
    group(L7D, Kind::Mitigation, MSRS, &[
        (26, "spec_ctrl"), (27, "intel_stibp"), (28, "flush_l1d"), (29, "arch_capabilities"),
        (31, "spec_ctrl_ssbd"),
    ]),
    group(L7D, Kind::Hint, SPEED, &[(4, "fsrm")]),
    group(L7D, Kind::Hint, SAFE, &[(10, "md_clear"), (11, "rtm_always_abort")]),
    group(L7D, Kind::Withheld, "branch records are not on KVM's list", &[(19, "arch_lbr")]),
    group(L7D, Kind::Withheld, "U_CET and S_CET are not on every KVM's list", &[(20, "ibt")]),
    group(L71A, Kind::Instruction, PLAIN, &[
        (0, "sha512"), (1, "sm3"), (2, "sm4"), (4, "avx_vnni"), (7, "cmpccxadd"), (19, "wrmsrns"),
        (23, "avx_ifma"), (31, "movrs"),
    ]),
    group(L71A, Kind::State, XSAVE, &[(5, "avx512_bf16"), (21, "amx_fp16")]),
    group(L71A, Kind::State, CONTROL, &[(26, "lam")]),
    group(L71A, Kind::Hint, SPEED, &[(10, "fzrm"), (11, "fsrs"), (12, "fsrc")]),
    group(L71A, Kind::Withheld, "the stack pointers of FRED are not on every KVM's list", &[
        (17, "fred"), (18, "lkgs"),
    ]),
    group((7, 1, Ecx), Kind::Instruction, PLAIN, &[(5, "msr_imm")]),
    group(L71D, Kind::Instruction, PLAIN, &[
        (4, "avx_vnni_int8"), (5, "avx_ne_convert"), (10, "avx_vnni_int16"),
    ]),
    group(L71D, Kind::State, XSAVE, &[(8, "amx_complex"), (19, "avx10")]),
    group(L71D, Kind::Hint, SPEED, &[(14, "prefetchiti")]),
    group(L71D, Kind::Withheld, "part of the shadow stack", &[(18, "cet_sss")]),
    group(L71D, Kind::Withheld, "which KVM saves the upper 16 general registers is not known yet", &[(21, "apx")]),
    group((7, 2, Edx), Kind::Mitigation, "bits of SPEC_CTRL, which is on KVM's list", &[
        (0, "intel_psfd"), (1, "ipred_ctrl"), (2, "rrsba_ctrl"), (3, "ddpd_u"), (4, "bhi_ctrl"),
    ]),
    group((7, 2, Edx), Kind::Hint, SAFE, &[(5, "mcdt_no")]),
    group(LDA, Kind::Instruction, "other forms of XSAVE for the same components", &[
        (0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"),
    ]),
    group(LDA, Kind::State, MSRS, &[(3, "xsaves"), (4, "xfd")]),
    group(KVM, Kind::Base, "MSRs on KVM's list, hypercalls, and words in the guest's RAM", &[
        (0, "kvm_clocksource"), (3, "kvm_clocksource2"), (4, "kvm_async_pf"), (5, "kvm_steal_time"),
        (6, "kvm_pv_eoi"), (7, "kvm_pv_unhalt"), (9, "kvm_pv_tlb_flush"), (10, "kvm_async_pf_vmexit"),
        (11, "kvm_pv_send_ipi"), (12, "kvm_poll_control"), (14, "kvm_async_pf_int"),
    ]),
    group(KVM, Kind::Hint, "says what the guest may leave out", &[
        (1, "kvm_nop_io_delay"), (13, "kvm_pv_sched_yield"), (24, "kvm_clocksource_stable"),
    ]),
    group(X1C, Kind::Instruction, PLAIN, &[
        (0, "lahf_lm"), (4, "cr8_legacy"), (5, "abm"), (6, "sse4a"), (8, "3dnowprefetch"), (11, "xop"),
        (16, "fma4"), (21, "tbm"),
    ]),
    group(X1C, Kind::State, "a bit of MXCSR, which is in xsave", &[(7, "misalignsse")]),
    group(X1C, Kind::State, CONTROL, &[(17, "tce")]),
    group(X1C, Kind::State, MSRS, &[(23, "perfctr_core")]),
    group(X1C, Kind::Hint, "a list of errata that the guest reads once", &[(9, "osvw")]),
    group(X1C, Kind::Live, "topology of the machine", &[(1, "cmp_legacy"), (22, "topoext")]),
    group(X1C, Kind::Withheld, "the state of nested virtualization is not saved", &[(2, "svm")]),
    group(X1D, Kind::Base, "as in leaf 1, on AMD", &[
        (0, "fpu"), (1, "vme"), (2, "de"), (3, "pse"), (4, "tsc"), (5, "msr"), (6, "pae"), (7, "mce"),
        (8, "cx8"), (12, "mtrr"), (13, "pge"), (14, "mca"), (15, "cmov"), (16, "pat"), (17, "pse36"),
        (23, "mmx"), (24, "fxsr"),
    ]),
    group(X1D, Kind::Base, "every 64-bit processor has these; EFER and MSRs", &[
        (11, "syscall"), (20, "nx"), (27, "rdtscp"), (29, "lm"),
    ]),
    group(X1D, Kind::Instruction, PLAIN, &[(22, "mmxext"), (30, "3dnowext"), (31, "3dnow")]),
    group(X1D, Kind::State, "a bit of EFER; page tables in the guest's RAM", &[
        (25, "fxsr_opt"), (26, "pdpe1gb"),
    ]),
    group(X1D, Kind::Live, "follows IA32_APIC_BASE", &[(9, "apic")]),
    group((0x8000_0007, 0, Ebx), Kind::Hint, "how errors of the memory are reported", &[
        (0, "overflow_recov"), (1, "succor"),
    ]),
    group((0x8000_0007, 0, Ebx), Kind::Withheld, "its MSRs are not on KVM's list", &[(3, "smca")]),
    group((0x8000_0007, 0, Edx), Kind::Base, "the guest may measure time by its TSC alone", &[
        (8, "constant_tsc"),
    ]),
    group(X8B, Kind::Instruction, PLAIN, &[(0, "clzero")]),
    group(X8B, Kind::Mitigation, "MSRs on KVM's list, and commands without state", &[
        (12, "amd_ibpb"), (14, "amd_ibrs"), (15, "amd_stibp"), (24, "amd_ssbd"), (25, "virt_ssbd"),
        (28, "amd_psfd"),
    ]),
    group(X8B, Kind::Hint, "works like WBINVD where the processor does not know it", &[(9, "wbnoinvd")]),
    group(X8B, Kind::Hint, "what XSAVE leaves of the last x87 error", &[(2, "xsaveerptr")]),
    group(X8B, Kind::Hint, SAFE, &[
        (16, "ibrs_always_on"), (17, "amd_stibp_always_on"), (18, "ibrs_preferred"),
        (19, "amd_ibrs_same_mode"), (20, "efer_lmsle_mba"), (26, "amd_ssb_no"), (29, "btc_no"),
        (30, "amd_ibpb_ret"),
    ]),
    group(X21A, Kind::Hint, SAFE, &[
        (0, "no_nested_data_bp"), (1, "wrmsr_xx_base_ns"), (2, "lfence_rdtsc"), (5, "verw_clear"),
        (6, "null_sel_clr_base"), (9, "no_smm_ctl_msr"), (28, "ibpb_brtype"), (29, "srso_no"),
        (30, "srso_user_kernel_no"),
    ]),
    group(X21A, Kind::Hint, SPEED, &[(10, "amd_fsrs"), (11, "amd_fsrc"), (20, "prefetchi")]),
    group(X21A, Kind::Mitigation, "a bit of EFER; a command without state", &[
        (8, "autoibrs"), (27, "sbpb"),
    ]),
    group(X21A, Kind::State, "a bit of HWCR, which is on KVM's list", &[(17, "gp_on_user_cpuid")]),
    group((0x8000_0021, 0, Ecx), Kind::Hint, SAFE, &[(1, "tsa_sq_no"), (2, "tsa_l1_no")]),
    group((0x8000_0022, 0, Eax), Kind::State, MSRS, &[(0, "perfmon_v2")]),
];

/// Registers of feature bits none of which is known. They are not offered.
#[rustfmt::skip]
pub const UNKNOWN: &[(u32, u32, Register)] = &[
    (6, 0, Ebx), (6, 0, Ecx), (7, 1, Ebx), (7, 2, Eax), (7, 2, Ebx), (7, 2, Ecx),
    (0x4000_0001, 0, Edx), (0x8000_0021, 0, Ebx), (0x8000_0021, 0, Edx),
];

/// Leaves that guests get. Other leaves, known or not, are those of features that are not offered (SGX,
/// processor trace, resource control, SVM, encrypted memory), or say what another leaf says (topology: 0xb
/// has all of it).
#[rustfmt::skip]
pub const LEAVES: &[u32] = &[
    0, 1, 2, 4, 5, 6, 7, 0xa, 0xb, 0xd, 0x15, 0x16, 0x1d, 0x1e, 0x24, 0x4000_0000, 0x4000_0001,
    0x4000_0010, 0x8000_0000, 0x8000_0001, 0x8000_0002, 0x8000_0003, 0x8000_0004, 0x8000_0005,
    0x8000_0006, 0x8000_0007, 0x8000_0008, 0x8000_001a, 0x8000_001d, 0x8000_001e, 0x8000_0021,
    0x8000_0022,
];

/// The components of the XSAVE area that guests may have: bit of XCR0, the feature that it belongs to, and its
/// name. x87 and SSE come with XSAVE itself.
#[rustfmt::skip]
pub const COMPONENTS: &[(u8, Bit, &str)] = &[
    (2, (1, 0, Ecx, 28), "avx"),
    (3, (7, 0, Ebx, 14), "mpx (bndregs)"),
    (4, (7, 0, Ebx, 14), "mpx (bndcsr)"),
    (5, (7, 0, Ebx, 16), "avx512f (opmask)"),
    (6, (7, 0, Ebx, 16), "avx512f (zmm_hi256)"),
    (7, (7, 0, Ebx, 16), "avx512f (hi16_zmm)"),
    (9, (7, 0, Ecx, 3), "pku"),
    (17, (7, 0, Edx, 24), "amx_tile (tilecfg)"),
    (18, (7, 0, Edx, 24), "amx_tile (tiledata)"),
];
