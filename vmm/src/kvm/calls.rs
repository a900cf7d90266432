//! The ioctls of KVM that the threads of a VM's process make, for their seccomp filters. kvm-ioctls keeps the
//! numbers to itself, so they are here once more, from Linux include/uapi/linux/kvm.h.

use kvm_bindings::{
    KVMIO, kvm_clock_data, kvm_cpuid2, kvm_debugregs, kvm_device_attr, kvm_enable_cap, kvm_fpu,
    kvm_ioeventfd, kvm_irq_level, kvm_irq_routing, kvm_irqchip, kvm_irqfd, kvm_lapic_state,
    kvm_mp_state, kvm_msi, kvm_msr_list, kvm_msrs, kvm_pit_config, kvm_pit_state2, kvm_regs,
    kvm_sregs, kvm_userspace_memory_region, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};

use crate::confine::Call;

/// `_IO`: no argument, or a number.
const fn io(number: u32) -> u32 {
    KVMIO << 8 | number
}

/// `_IOW`: the kernel reads a `T`.
const fn iow<T>(number: u32) -> u32 {
    1 << 30 | (size_of::<T>() as u32) << 16 | io(number)
}

/// `_IOR`: the kernel writes a `T`.
const fn ior<T>(number: u32) -> u32 {
    2 << 30 | (size_of::<T>() as u32) << 16 | io(number)
}

/// `_IOWR`: both.
const fn iowr<T>(number: u32) -> u32 {
    iow::<T>(number) | ior::<T>(number)
}

/// `KVM_RUN`.
const RUN: u32 = io(0x80);
/// `KVM_GET_CLOCK`.
const GET_CLOCK: u32 = ior::<kvm_clock_data>(0x7c);
/// `KVM_IRQ_LINE`.
const IRQ_LINE: u32 = iow::<kvm_irq_level>(0x61);

const _: () = assert!(RUN == 0xae80 && iow::<kvm_userspace_memory_region>(0x46) == 0x4020_ae46);

/// What the guest's accesses to registers can change in KVM, on a vCPU's thread; and a resume, on the main
/// thread.
pub const WIRING: &[Call] = &[Call::ioctl(&[
    iow::<kvm_irq_routing>(0x6a), // KVM_SET_GSI_ROUTING: a message of an MSI-X table
    iow::<kvm_irqfd>(0x76),       // KVM_IRQFD: the line of a message
    iow::<kvm_ioeventfd>(0x79),   // KVM_IOEVENTFD: a doorbell, whose address the guest can move
    IRQ_LINE,
    iow::<kvm_msi>(0xa5), // KVM_SIGNAL_MSI
])];

/// Reads the guest's clock.
pub const CLOCK: Call = Call::ioctl(&[GET_CLOCK]);

/// Sets the level of an interrupt line.
pub const LINE: Call = Call::ioctl(&[IRQ_LINE]);

/// The thread of a vCPU: runs the vCPU, reads its state after a pause, and tells the guest of the pause.
pub const VCPU: &[Call] = &[Call::ioctl(&[
    RUN,                          // first, because it is the most frequent
    ior::<kvm_mp_state>(0x98),    // KVM_GET_MP_STATE
    ior::<kvm_regs>(0x81),        // KVM_GET_REGS; also after a triple fault
    ior::<kvm_sregs>(0x83),       // KVM_GET_SREGS; also after a triple fault
    ior::<kvm_xsave>(0xa4),       // KVM_GET_XSAVE
    ior::<kvm_xsave>(0xcf),       // KVM_GET_XSAVE2
    ior::<kvm_xcrs>(0xa6),        // KVM_GET_XCRS
    ior::<kvm_debugregs>(0xa1),   // KVM_GET_DEBUGREGS
    ior::<kvm_lapic_state>(0x8e), // KVM_GET_LAPIC
    iowr::<kvm_msrs>(0x88),       // KVM_GET_MSRS
    iowr::<kvm_cpuid2>(0x91),     // KVM_GET_CPUID2
    io(0xa3),                     // KVM_GET_TSC_KHZ
    iow::<kvm_device_attr>(0xe2), // KVM_GET_DEVICE_ATTR: the offset of the TSC
    ior::<kvm_vcpu_events>(0x9f), // KVM_GET_VCPU_EVENTS
    io(0xad),                     // KVM_KVMCLOCK_CTRL
])];

/// Saves the devices that KVM has.
pub const SAVE: &[Call] = &[Call::ioctl(&[
    ior::<kvm_pit_state2>(0x9f), // KVM_GET_PIT2
    iowr::<kvm_irqchip>(0x62),   // KVM_GET_IRQCHIP
    GET_CLOCK,
    io(0x03), // KVM_CHECK_EXTENSION
])];

/// Creates a VM and its vCPUs, and sets their state. On the main thread, before the guest runs.
pub const BUILD: &[Call] = &[
    Call::ioctl(&[
        io(0x00),                                 // KVM_GET_API_VERSION
        io(0x01),                                 // KVM_CREATE_VM
        iowr::<kvm_msr_list>(0x02),               // KVM_GET_MSR_INDEX_LIST
        io(0x04),                                 // KVM_GET_VCPU_MMAP_SIZE
        iowr::<kvm_cpuid2>(0x05),                 // KVM_GET_SUPPORTED_CPUID
        io(0x41),                                 // KVM_CREATE_VCPU
        iow::<kvm_userspace_memory_region>(0x46), // KVM_SET_USER_MEMORY_REGION
        io(0x47),                                 // KVM_SET_TSS_ADDR
        iow::<u64>(0x48),                         // KVM_SET_IDENTITY_MAP_ADDR
        io(0x60),                                 // KVM_CREATE_IRQCHIP
        iow::<kvm_pit_config>(0x77),              // KVM_CREATE_PIT2
        iow::<kvm_enable_cap>(0xa3),              // KVM_ENABLE_CAP
        ior::<kvm_irqchip>(0x63),                 // KVM_SET_IRQCHIP
        iow::<kvm_pit_state2>(0xa0),              // KVM_SET_PIT2
        iow::<kvm_clock_data>(0x7b),              // KVM_SET_CLOCK
        iow::<kvm_cpuid2>(0x90),                  // KVM_SET_CPUID2
        iow::<kvm_sregs>(0x84),                   // KVM_SET_SREGS
        iow::<kvm_regs>(0x82),                    // KVM_SET_REGS
        iow::<kvm_fpu>(0x8d),                     // KVM_SET_FPU
        iow::<kvm_xcrs>(0xa7),                    // KVM_SET_XCRS
        iow::<kvm_xsave>(0xa5),                   // KVM_SET_XSAVE
        iow::<kvm_debugregs>(0xa2),               // KVM_SET_DEBUGREGS
        iow::<kvm_lapic_state>(0x8f),             // KVM_SET_LAPIC
        iow::<kvm_msrs>(0x89),                    // KVM_SET_MSRS
        iow::<kvm_mp_state>(0x99),                // KVM_SET_MP_STATE
        iow::<kvm_vcpu_events>(0xa0),             // KVM_SET_VCPU_EVENTS
        io(0xa2),                                 // KVM_SET_TSC_KHZ
        iow::<kvm_device_attr>(0xe1),             // KVM_SET_DEVICE_ATTR: the offset of the TSC
    ]),
    // AMX for the guest: ARCH_REQ_XCOMP_GUEST_PERM (Linux arch/x86/include/uapi/asm/prctl.h).
    Call::one_of(libc::SYS_arch_prctl, 0, &[0x1025]),
];
