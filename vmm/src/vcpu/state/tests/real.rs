//! Save and restore between two real vCPUs.

use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_PAYLOAD, KVM_VCPUEVENT_VALID_SHADOW,
    kvm_segment,
};
use kvm_ioctls::VcpuExit;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::arch::x86_64::tsc;
use crate::kvm::test_vm::TestVm;

/// The clocks ran on, and nothing else has to change.
const NO_TIME: Passage = Passage { elapsed_ns: 0, offset_change: 0 };
/// A TSC offset other than a fresh vCPU's.
const OFFSET: u64 = 0x1234_5678;
/// Vector of the timer's interrupt.
const VECTOR: u32 = 0xec;
/// Spurious interrupt vector register, with bit 8 to enable the LAPIC, and the first of the
/// interrupt request registers.
const SVR: usize = 0xf0;
const IRR: usize = 0x200;
const TPR: usize = 0x80;
/// IA32_APIC_BASE: x2APIC mode.
const X2APIC: u64 = 1 << 10;

/// MSRs with values that they do not have after a reset. KVM's own hold addresses in the RAM of
/// [`ram`]; bit 0 enables what they are for.
const MSRS: [Msr; 13] = [
    Msr { index: 0x174, data: 0x10 },                      // SYSENTER_CS
    Msr { index: 0x175, data: 0xc900_1000 },               // SYSENTER_ESP
    Msr { index: 0x277, data: 0x0007_0406_0007_0106 },     // PAT
    Msr { index: msr::MTRR_DEF_TYPE, data: 0xc06 },        // default memory type
    Msr { index: 0x4b56_4d01, data: 0x4001 },              // kvmclock
    Msr { index: 0x4b56_4d02, data: 0x3000 | 1 << 3 | 1 }, // asynchronous page faults
    Msr { index: 0x4b56_4d03, data: 0x5001 },              // steal time
    Msr { index: 0x4b56_4d04, data: 0x6001 },              // EOI
    Msr { index: 0x4b56_4d05, data: 0 },                   // no polling by the host
    Msr { index: 0x4b56_4d06, data: 0xf3 },                // asynchronous page faults' vector
    Msr { index: 0xc000_0081, data: 0x0023_0010 << 32 },   // STAR
    Msr { index: 0xc000_0082, data: 0xffff_ffff_8100_0000 }, // LSTAR
    Msr { index: 0xc000_0102, data: 0xffff_8880_0000_0000 }, // KERNEL_GS_BASE
];

fn ram() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
}

fn put(lapic: &mut kvm_lapic_state, register: usize, value: u32) {
    for (byte, value) in lapic.regs[register..].iter_mut().zip(value.to_le_bytes()) {
        *byte = value as _;
    }
}

/// Whether the LAPIC has the timer's interrupt in its request register.
fn timer_interrupt_is_requested(vcpu: &VcpuFd) -> bool {
    let register = IRR + 0x10 * (VECTOR as usize / 32);
    let lapic = vcpu.get_lapic().unwrap();
    lapic.regs[register + VECTOR as usize % 32 / 8] as u8 >> (VECTOR % 8) & 1 != 0
}

fn save(vm: &TestVm) -> VcpuStateV1 {
    VcpuStateV1::save(0, &vm.vcpu, &vm.capabilities).unwrap()
}

fn long_mode(sregs: kvm_sregs) -> kvm_sregs {
    let code = kvm_segment {
        limit: 0xffff_ffff,
        selector: 0x10,
        type_: 11,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..sregs.cs
    };
    // OSXSAVE, OSFXSR and OSXMMEXCPT, PGE, PAE; NXE, LMA, LME, SCE.
    let mut sregs = kvm_sregs { cs: code, cr2: 0x7fff_1234_5000, cr3: 0x2000, ..sregs };
    sregs.cr4 = 1 << 18 | 0b11 << 9 | 1 << 7 | 1 << 5;
    sregs.efer = 1 << 11 | 1 << 10 | 1 << 8 | 1;
    sregs.cr0 = 0x8005_0033;
    sregs.fs.base = 0x7f12_3456_7000;
    sregs.gs.base = 0xffff_8881_0000_0000;
    sregs.gdt.base = 0xffff_fe00_0000_1000;
    sregs.gdt.limit = 0x7f;
    sregs.idt.base = 0xffff_fe00_0000_0000;
    sregs.idt.limit = 0xfff;
    sregs
}

/// x87, SSE and, where there is AVX, AVX registers with something in them.
fn fill_xsave(vm: &TestVm) {
    let size = vm.capabilities.xsave_size;
    let mut area = uapi::xsave(&vm.vcpu, size).unwrap();
    let enabled = vm.vcpu.get_xcrs().unwrap().xcrs[0].value;
    area[0..2].copy_from_slice(&0x037fu16.to_le_bytes());
    area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    area[160..416].iter_mut().zip((1..=255).cycle()).for_each(|(byte, value)| *byte = value);
    if enabled & 4 != 0 {
        area[576..832].iter_mut().zip((7..=255).cycle()).for_each(|(byte, value)| *byte = value);
    }
    area[512..520].copy_from_slice(&(enabled & 7).to_le_bytes());
    uapi::set_xsave(&vm.vcpu, &area, size).unwrap();
}

/// Gives the vCPU a state of a guest in the middle of its life.
fn live_a_little(vm: &TestVm, apic_base: u64) {
    let vcpu = &vm.vcpu;
    uapi::set_tsc_offset(vcpu, OFFSET).unwrap();
    let mut sregs = long_mode(vcpu.get_sregs().unwrap());
    sregs.apic_base |= apic_base;
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = Raw::<kvm_regs>::pattern(1).0;
    regs.rflags = 0x246;
    regs.rip = 0xffff_ffff_8123_4567;
    vcpu.set_regs(&regs).unwrap();
    let mut xcrs = vcpu.get_xcrs().unwrap();
    let offered = cpuid_of(&vm.capabilities.cpuid, 0xd).map_or(1, |leaf| leaf.eax);
    xcrs.nr_xcrs = 1;
    xcrs.xcrs[0].value = u64::from(offered & 7);
    vcpu.set_xcrs(&xcrs).unwrap();
    fill_xsave(vm);
    let mut debugregs = vcpu.get_debug_regs().unwrap();
    debugregs.db = [0x1000, 0x2000, 0x3000, 0x4000];
    debugregs.dr7 |= 0b01_0101;
    vcpu.set_debug_regs(&debugregs).unwrap();
    let mut lapic = vcpu.get_lapic().unwrap();
    put(&mut lapic, SVR, 0x1ff);
    put(&mut lapic, TPR, 0x20);
    put(&mut lapic, LVT_TIMER, LVT_TIMER_DEADLINE | VECTOR);
    vcpu.set_lapic(&lapic).unwrap();
    msr::write(vcpu, &MSRS).unwrap();
    arm(vm, far_deadline(vm));
    let mut events = vcpu.get_vcpu_events().unwrap();
    events.flags =
        KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_PAYLOAD;
    events.nmi.pending = 1;
    events.interrupt.shadow = 1;
    // A page fault that was raised and has not reached the guest: CR2 is not written yet.
    events.exception.pending = 1;
    events.exception.nr = 14;
    events.exception.has_error_code = 1;
    events.exception.error_code = 2;
    events.exception_has_payload = 1;
    events.exception_payload = 0x7fff_dead_b000;
    vcpu.set_vcpu_events(&events).unwrap();
}

fn cpuid_of(entries: &[kvm_cpuid_entry2], leaf: u32) -> Option<&kvm_cpuid_entry2> {
    entries.iter().find(|entry| entry.function == leaf && entry.index == 0)
}

/// A KVM that cannot intercept RDTSC has offset 0 whatever it is told.
fn takes_a_tsc_offset(vm: &TestVm) -> bool {
    let before = uapi::tsc_offset(&vm.vcpu).unwrap();
    uapi::set_tsc_offset(&vm.vcpu, OFFSET).unwrap();
    let takes = uapi::tsc_offset(&vm.vcpu).unwrap() == OFFSET;
    uapi::set_tsc_offset(&vm.vcpu, before).unwrap();
    if !takes {
        eprintln!("skipped: this KVM takes no TSC offset");
    }
    takes
}

/// A TSC of the guest that it reaches in ten minutes: far beyond any run of these tests.
fn far_deadline(vm: &TestVm) -> u64 {
    let ten_minutes = tsc::ticks(600_000_000_000, vm.vcpu.get_tsc_khz().unwrap());
    tsc::now().wrapping_add(uapi::tsc_offset(&vm.vcpu).unwrap()) + ten_minutes
}

#[test]
fn a_vcpu_goes_on_in_another_vm_as_it_was() {
    for apic_base in [0, X2APIC] {
        let ram = ram();
        let (Some(before), Some(after)) = (TestVm::with_ram(&ram), TestVm::with_ram(&ram)) else {
            return;
        };
        live_a_little(&before, apic_base);
        let saved = save(&before);
        assert_eq!(save(&before), saved, "a save changes nothing");

        // What was given is there; otherwise the rest would compare nothing with nothing.
        assert!(saved.tsc_deadline > tsc::now(), "{:#x}", saved.tsc_deadline);
        if takes_a_tsc_offset(&before) {
            assert_eq!(saved.tsc_offset, OFFSET);
        }
        for given in MSRS {
            assert!(saved.msrs.contains(&given), "{given:x?} is not among the saved");
        }
        assert_eq!(saved.regs.0.rip, 0xffff_ffff_8123_4567);
        assert_eq!(saved.sregs.0.apic_base & X2APIC, apic_base);
        assert_eq!(saved.xsave[160..176], (1..17).collect::<Vec<u8>>());
        assert_eq!(saved.debugregs.0.db[3], 0x4000);
        let events = saved.events.0;
        assert_eq!(events.nmi.pending, 1);
        // AMD's processors do not tell STI from MOV SS.
        assert_ne!(events.interrupt.shadow, 0);
        assert_eq!((events.exception.pending, events.exception.nr), (1, 14));
        assert_eq!(events.exception_payload, 0x7fff_dead_b000);
        assert_eq!(saved.sregs.0.cr2, 0x7fff_1234_5000, "the fault is not delivered yet");

        saved.restore(&after.vcpu, &after.capabilities, NO_TIME).unwrap();
        same(&save(&after), &saved);
    }
}

/// Names the first part that differs, rather than printing 4096 bytes of XSAVE.
fn same(left: &VcpuStateV1, right: &VcpuStateV1) {
    assert_eq!(left.msrs, right.msrs);
    let (left, right) = (left.to_node(""), right.to_node(""));
    for (name, value) in &left.properties {
        let at = value.iter().zip(&right.properties[name]).position(|(a, b)| a != b);
        assert_eq!(at, None, "{name} differs at byte {at:?}");
    }
    assert!(left == right);
}

#[test]
fn the_change_of_the_tsc_is_added_to_its_offset() {
    let (Some(before), Some(after)) = (TestVm::new(), TestVm::new()) else { return };
    if !takes_a_tsc_offset(&before) {
        return;
    }
    uapi::set_tsc_offset(&before.vcpu, u64::MAX - 5).unwrap();
    let saved = save(&before);
    let passage = Passage { elapsed_ns: 1, offset_change: 10 };
    saved.restore(&after.vcpu, &after.capabilities, passage).unwrap();
    assert_eq!(uapi::tsc_offset(&after.vcpu).unwrap(), 4);
    // TSC_ADJUST is among the MSRs, and putting it back does not move the TSC once more.
    assert!(saved.msrs.iter().any(|msr| msr.index == 0x3b), "no TSC_ADJUST");
}

/// Runs a vCPU, whose interrupts are off, up to a first exit: KVM then moves an expired timer's
/// interrupt into the LAPIC.
fn run_up_to_an_exit(vm: &mut TestVm) {
    // out 0x80, al, again and again
    vm.ram.write_slice(&[0xe6, 0x80, 0xeb, 0xfc], GuestAddress(0x1000)).unwrap();
    match vm.vcpu.run() {
        Ok(VcpuExit::IoOut(0x80, _)) => {}
        other => panic!("{other:?}"),
    }
}

/// A vCPU in real mode at 0x1000, its LAPIC's timer in deadline mode.
fn with_timer(ram: &GuestMemoryMmap) -> Option<TestVm> {
    let vm = TestVm::with_ram(ram)?;
    let mut sregs = vm.vcpu.get_sregs().unwrap();
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vm.vcpu.set_sregs(&sregs).unwrap();
    vm.vcpu.set_regs(&kvm_regs { rip: 0x1000, rflags: 2, ..Default::default() }).unwrap();
    let mut lapic = vm.vcpu.get_lapic().unwrap();
    put(&mut lapic, SVR, 0x1ff);
    put(&mut lapic, LVT_TIMER, LVT_TIMER_DEADLINE | VECTOR);
    vm.vcpu.set_lapic(&lapic).unwrap();
    Some(vm)
}

fn arm(vm: &TestVm, deadline: u64) {
    msr::write(&vm.vcpu, &[Msr { index: IA32_TSC_DEADLINE, data: deadline }]).unwrap();
}

#[test]
fn a_deadline_that_passed_while_nobody_ran_fires_after_the_restore() {
    let ram = ram();
    let (Some(before), Some(mut after)) = (with_timer(&ram), TestVm::with_ram(&ram)) else {
        return;
    };
    arm(&before, 1);
    save(&before).restore(&after.vcpu, &after.capabilities, NO_TIME).unwrap();
    run_up_to_an_exit(&mut after);
    assert!(timer_interrupt_is_requested(&after.vcpu));
}

/// The tick may have been on its way when the deadline was read as 0: it comes once more.
#[test]
fn a_deadline_that_has_fired_fires_again_rather_than_never() {
    let ram = ram();
    let (Some(mut before), Some(mut after)) = (with_timer(&ram), TestVm::with_ram(&ram)) else {
        return;
    };
    arm(&before, 1);
    run_up_to_an_exit(&mut before);
    let mut saved = save(&before);
    assert_eq!(saved.tsc_deadline, 0);
    // As it would be had the guest handled the interrupt.
    put(&mut saved.lapic.0, IRR + 0x10 * (VECTOR as usize / 32), 0);
    saved.restore(&after.vcpu, &after.capabilities, NO_TIME).unwrap();
    assert!(!timer_interrupt_is_requested(&after.vcpu));
    run_up_to_an_exit(&mut after);
    assert!(timer_interrupt_is_requested(&after.vcpu));
}

#[test]
fn a_deadline_in_the_future_does_not_fire_yet() {
    let ram = ram();
    let (Some(before), Some(mut after)) = (with_timer(&ram), TestVm::with_ram(&ram)) else {
        return;
    };
    let deadline = far_deadline(&before);
    arm(&before, deadline);
    save(&before).restore(&after.vcpu, &after.capabilities, NO_TIME).unwrap();
    run_up_to_an_exit(&mut after);
    assert!(!timer_interrupt_is_requested(&after.vcpu));
    assert_eq!(save(&after).tsc_deadline, deadline);
}

#[test]
fn a_processor_that_this_host_cannot_give_is_refused_by_feature_and_nothing_is_set() {
    let (Some(before), Some(after)) = (TestVm::new(), TestVm::new()) else { return };
    before.vcpu.set_regs(&Raw::pattern(1).0).unwrap();
    let (mut saved, reset) = (save(&before), save(&after).regs);
    let leaf = saved.cpuid.iter_mut().find(|entry| entry.function == 7 && entry.index == 0);
    // Bit 12 is on no guest's list.
    leaf.expect("leaf 7").ebx |= 1 << 12;
    let error = saved.restore(&after.vcpu, &after.capabilities, NO_TIME).unwrap_err();
    assert!(matches!(&error, RestoreError::Features(missing) if missing.len() == 1), "{error:?}");
    let text = error.to_string();
    let wanted = "uses: bit 12 (CPUID leaf 0x7 subleaf 0 Ebx: the document has 0x";
    assert!(text.contains(wanted), "{text}");
    // SGX and hints: state that is not saved is a refusal, a missing hint is not.
    let leaf =
        saved.cpuid.iter_mut().find(|entry| entry.function == 7 && entry.index == 0).unwrap();
    leaf.ebx = leaf.ebx & !(1 << 12) | 1 << 2;
    let error = saved.restore(&after.vcpu, &after.capabilities, NO_TIME).unwrap_err().to_string();
    assert!(
        error.starts_with("the guest uses CPU features whose state is not saved: sgx ("),
        "{error}"
    );
    assert_eq!(save(&after).regs, reset);
    let leaf =
        saved.cpuid.iter_mut().find(|entry| entry.function == 7 && entry.index == 0).unwrap();
    (leaf.ebx, leaf.edx) = (leaf.ebx & !(1 << 2), leaf.edx | 1 << 10);
    let host = {
        let mut host = Capabilities::clone(&after.capabilities);
        let leaf = host.supported.iter_mut().find(|entry| entry.function == 7 && entry.index == 0);
        leaf.unwrap().edx &= !(1 << 10);
        host
    };
    let hints = saved.missing_hints(&host).unwrap();
    assert_eq!(hints.iter().flat_map(|hint| hint.names.clone()).collect::<Vec<_>>(), ["md_clear"]);
    saved.restore(&after.vcpu, &host, NO_TIME).unwrap();
    assert_eq!(save(&after).regs, saved.regs);
}

#[test]
fn an_msr_that_this_host_does_not_know_is_refused_by_number_unless_it_is_zero() {
    let (Some(before), Some(after)) = (TestVm::new(), TestVm::new()) else { return };
    let mut saved = save(&before);
    saved.msrs.retain(|msr| msr.index < 0x2000);
    saved.msrs.push(Msr { index: 0x2fff_0000, data: 0 });
    saved.restore(&after.vcpu, &after.capabilities, NO_TIME).unwrap();
    saved.msrs.last_mut().unwrap().data = 5;
    let error = saved.restore(&after.vcpu, &after.capabilities, NO_TIME).unwrap_err().to_string();
    assert!(error.starts_with("the document has MSR 0x2fff0000 = 0x5"), "{error}");
}

#[test]
fn an_xsave_area_larger_than_this_hosts_is_refused_with_both_sizes() {
    let (Some(before), Some(after)) = (TestVm::new(), TestVm::new()) else { return };
    let mut saved = save(&before);
    let host = after.capabilities.xsave_size;
    assert_eq!(saved.xsave.len(), host);
    saved.xsave.push(0);
    let error = saved.restore(&after.vcpu, &after.capabilities, NO_TIME).unwrap_err().to_string();
    assert_eq!(error, format!("the XSAVE area has {} bytes, this host's has {host}", host + 1));
}
