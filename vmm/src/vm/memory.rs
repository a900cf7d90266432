//! The two calls of kvm-ioctls that take raw values on trust: an fd, and the addresses of guest RAM.

#![expect(unsafe_code, reason = "kvm-ioctls takes a raw fd and host addresses")]

use std::os::fd::{FromRawFd, RawFd};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Error, Kvm, VmFd};

/// KVM from an fd that was handed over; `fd` is this process's, and is given away.
pub(super) fn kvm_from_fd(fd: RawFd) -> Kvm {
    // SAFETY: the caller has just taken it out of an OwnedFd. That it is KVM's is checked by the
    // version call, the first thing that is done with it.
    unsafe { Kvm::from_raw_fd(fd) }
}

/// Makes a mapping guest RAM.
pub(super) fn set_region(vm: &VmFd, region: &kvm_userspace_memory_region) -> Result<(), Error> {
    // SAFETY: the region is a slot of a `GuestRam`, which is dropped after the VM's fd.
    unsafe { vm.set_user_memory_region(*region) }
}
