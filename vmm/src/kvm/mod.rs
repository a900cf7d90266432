//! State types of KVM's in-kernel devices, and the capabilities of a host's KVM.
//!
//! Order of a restore (each part explains its own step): memory slots, then GSI routes; every vCPU
//! ([`crate::vcpu::VcpuStateV1::restore`]); [`irqchip`], whose I/O APIC may deliver into LAPICs;
//! [`pit`], which may raise an interrupt line; [`clock`], when every vCPU's TSC offset is set.
//!
//! Order of a save: the reverse, [`pit`], [`irqchip`], the vCPUs. So an interrupt that moves from
//! one part to the next during the save is saved twice rather than lost. [`clock`] can be saved at
//! any point.

pub mod calls;
pub mod clock;
pub mod interrupts;
pub mod irqchip;
pub mod pit;
pub mod platform;
#[cfg(test)]
pub(crate) mod test_vm;
pub mod uapi;

use kvm_bindings::{
    KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_VM_TSC_CONTROL, KVM_CAP_X86_TRIPLE_FAULT_EVENT,
    KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_enable_cap, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use crate::arch::x86_64::{cpuid, layout, msr};

/// A KVM call failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {attempt}")]
pub struct KvmError {
    /// The failed operation, such as `read the vCPU's registers`.
    pub attempt: &'static str,
    /// KVM's error.
    #[source]
    pub source: kvm_ioctls::Error,
}

/// Adds the name of the failed operation to a KVM error.
pub(crate) trait Attempt<T> {
    fn attempt(self, attempt: &'static str) -> Result<T, KvmError>;
}

impl<T> Attempt<T> for Result<T, kvm_ioctls::Error> {
    fn attempt(self, attempt: &'static str) -> Result<T, KvmError> {
        self.map_err(|source| KvmError { attempt, source })
    }
}

/// A TSC rate that stands for the rate of the host's TSC, as the kernel knows it now.
const AS_THE_HOST: u32 = 0;

/// Creates the in-kernel devices of a new VM and sets its options. Call once, before the first vCPU
/// is created and, on Intel, before the first memory slot.
pub fn prepare(vm: &VmFd) -> Result<(), KvmError> {
    // Both are for Intel without unrestricted guest; the identity map must come before any vCPU
    // (Documentation/virt/kvm/api.rst 4.47), and neither may lie in a memory slot (4.32).
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).attempt("set the identity map's page")?;
    vm.set_tss_address(layout::KVM_TSS as usize).attempt("set the TSS pages")?;
    // PIC, IOAPIC and one LAPIC per vCPU; must precede the vCPUs (api.rst 4.24).
    vm.create_irq_chip().attempt("create the interrupt controllers")?;
    pit::create(vm)?;
    if vm.check_extension_raw(KVM_CAP_VM_TSC_CONTROL.into()) > 0 {
        uapi::set_vm_tsc_khz(vm, AS_THE_HOST).attempt("set the rate of the vCPUs' TSCs")?;
    }
    // With these, pending events are saved exactly: the payload of a #DB or #PF that was not
    // delivered yet is saved separately from DR6 and CR2 (api.rst 7.18, `KVM_CAP_EXCEPTION_PAYLOAD`, and 4.31, `KVM_GET_VCPU_EVENTS`).
    for cap in [KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_X86_TRIPLE_FAULT_EVENT] {
        if vm.check_extension_raw(cap.into()) > 0 {
            let enable = kvm_enable_cap { cap, args: [1, 0, 0, 0], ..Default::default() };
            vm.enable_cap(&enable).attempt("enable exact exception state")?;
        }
    }
    Ok(())
}

/// Creates vCPU `id`, whose TSC has the rate of the host's.
///
/// Without [`prepare`], KVM would give the vCPU the rate that the kernel knew when KVM started. A
/// kernel measures its TSC once more, a second later. On a CPU that cannot scale the TSC, a vCPU
/// whose rate is more than 250 ppm below the new rate then silently gets no rate at all: its timers
/// fire at twice the uptime, then at twice that, and so on (Linux 7.3 arch/x86/kvm/x86.c,
/// `set_tsc_khz`). A vCPU whose TSC
/// rate is above the host's stays in catch-up mode permanently.
pub fn create_vcpu(vm: &VmFd, id: u32) -> Result<VcpuFd, KvmError> {
    let vcpu = vm.create_vcpu(id.into()).attempt("create a vCPU")?;
    // The same rate as in `prepare`; here KVM returns an error if it cannot be set.
    vcpu.set_tsc_khz(AS_THE_HOST).attempt("set the rate of the TSC")?;
    Ok(vcpu)
}

/// Returns the rate of this host's TSC, in kHz, as KVM knows it. Creates a temporary VM to ask KVM.
pub fn tsc_khz() -> Result<u32, KvmError> {
    let vm = Kvm::new().attempt("open /dev/kvm")?.create_vm().attempt("create a VM")?;
    let vcpu = create_vcpu(&vm, 0)?;
    vcpu.get_tsc_khz().attempt("read the rate of the TSC")
}

/// Returns what this host's KVM offers. Creates a temporary VM to ask KVM.
pub fn offered() -> Result<Capabilities, KvmError> {
    let kvm = Kvm::new().attempt("open /dev/kvm")?;
    uapi::permit_amx();
    let vm = kvm.create_vm().attempt("create a VM")?;
    Capabilities::probe(&kvm, &vm)
}

/// The capabilities of this host's KVM, read once for all vCPUs of a VM.
#[derive(Debug, Clone)]
pub struct Capabilities {
    /// CPUID entries that KVM supports ([`cpuid::supported`]).
    pub supported: Vec<kvm_cpuid_entry2>,
    /// CPUID entries that a new guest is offered ([`cpuid::template`]).
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// MSRs that make up a vCPU's state ([`msr::indices_to_save`]).
    pub msrs: Vec<u32>,
    /// Bytes of a vCPU's XSAVE area, at least 4096 (`KVM_CAP_XSAVE2`).
    pub xsave_size: usize,
    /// Whether the guest's TSC can be scaled to another rate (`KVM_CAP_TSC_CONTROL`).
    pub tsc_scaling: bool,
}

impl Capabilities {
    /// Adds to `supported` what a vCPU shows its guest beyond that. A KVM that cannot intercept CPUID shows the
    /// processor's own, so a guest that booted on such a host has it. `vcpu` is new, and gets its CPUID later.
    pub fn add_uninterceptable(&mut self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        let offered =
            cpuid::to_kvm(&cpuid::for_vcpu(&self.cpuid, 0, 1)).attempt("set the CPUID")?;
        vcpu.set_cpuid2(&offered).attempt("set the CPUID")?;
        let shown = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).attempt("read the CPUID")?;
        cpuid::add(&mut self.supported, shown.as_slice());
        Ok(())
    }

    /// Reads the capabilities. To give guests AMX, call [`uapi::permit_amx`] before: it changes the
    /// result.
    pub fn probe(kvm: &Kvm, vm: &VmFd) -> Result<Self, KvmError> {
        // Asked of the VM, not of /dev/kvm: the answer depends on the features that this process
        // may use (api.rst 4.140). 0 means a kernel before 5.17, where the area has a fixed size.
        let xsave2 = vm.check_extension_int(Cap::Xsave2);
        let xsave_size = usize::try_from(xsave2).unwrap_or(0).max(size_of::<kvm_xsave>());
        let supported = cpuid::supported(kvm).attempt("read the CPUID that KVM supports")?;
        Ok(Self {
            cpuid: cpuid::template(&supported, xsave_size),
            supported,
            msrs: msr::indices_to_save(kvm).attempt("read the list of MSRs")?,
            xsave_size,
            tsc_scaling: vm.check_extension(Cap::TscControl),
        })
    }
}
