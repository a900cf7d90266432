//! The two unsafe calls of kvm-ioctls: one takes a raw fd, the other host addresses of guest RAM.

#![expect(unsafe_code, reason = "kvm-ioctls takes a raw fd and host addresses")]

use std::os::fd::{FromRawFd, RawFd};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Error, Kvm, VmFd};

/// Takes over `fd`, which must be an fd of `/dev/kvm` that this process owns.
pub(super) fn kvm_from_fd(fd: RawFd) -> Kvm {
    // SAFETY: the caller has just taken the fd out of an OwnedFd, so nothing else closes it. The first call
    // on it asks for KVM's version, which fails if the fd is another file's.
    unsafe { Kvm::from_raw_fd(fd) }
}

/// Makes a slot of the process's memory RAM of the guest.
pub(super) fn set_region(vm: &VmFd, region: &kvm_userspace_memory_region) -> Result<(), Error> {
    // SAFETY: the region is a slot of a `GuestRam`. Only a running vCPU makes KVM access the region, and
    // `Parts` and `Vm` drop the `GuestRam` after their vCPUs, which stop first.
    unsafe { vm.set_user_memory_region(*region) }
}
