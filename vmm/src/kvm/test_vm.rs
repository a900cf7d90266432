//! Real VMs for tests: prepared as a machine's, with one vCPU that has its CPUID and, if wanted,
//! a little RAM.

#![expect(unsafe_code, reason = "kvm-ioctls takes the addresses of guest RAM on trust")]

use std::sync::Arc;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

use super::{Capabilities, prepare};
use crate::arch::x86_64::cpuid;

/// Fields are dropped in this order: nothing runs when the RAM goes.
pub(crate) struct TestVm {
    pub(crate) vcpu: VcpuFd,
    pub(crate) vm: VmFd,
    pub(crate) capabilities: Arc<Capabilities>,
    pub(crate) ram: GuestMemoryMmap,
}

impl TestVm {
    /// A VM without RAM, or `None`, with a word about it, where there is no KVM.
    pub(crate) fn new() -> Option<Self> {
        Self::with_ram(&GuestMemoryMmap::new())
    }

    /// The same, over RAM that other VMs may have had before.
    pub(crate) fn with_ram(ram: &GuestMemoryMmap) -> Option<Self> {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => {
                eprintln!("skipped: no /dev/kvm: {error}");
                return None;
            }
        };
        let vm = kvm.create_vm().unwrap();
        prepare(&vm).unwrap();
        for (slot, region) in (0..).zip(ram.iter()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.get_host_address(MemoryRegionAddress(0)).unwrap() as u64,
            };
            // SAFETY: the region is mapped as long as `ram`, which goes after the VM's fds.
            unsafe { vm.set_user_memory_region(region) }.unwrap();
        }
        let vcpu = super::create_vcpu(&vm, 0).unwrap();
        let mut capabilities = Capabilities::probe(&kvm, &vm).unwrap();
        // A KVM that cannot intercept CPUID gives its guests more than it says it supports; then
        // that is what this host offers.
        let entries = cpuid::for_vcpu(&capabilities.cpuid, 0, 1);
        vcpu.set_cpuid2(&cpuid::to_kvm(&entries).unwrap()).unwrap();
        capabilities.cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap().as_slice().to_vec();
        capabilities.supported = capabilities.cpuid.clone();
        let capabilities = Arc::new(capabilities);
        Some(Self { vcpu, vm, capabilities, ram: ram.clone() })
    }
}
