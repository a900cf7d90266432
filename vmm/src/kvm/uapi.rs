//! The few KVM calls that kvm-ioctls lacks or has only as unsafe functions on x86.
//!
//! Each function makes one ioctl or syscall and does not interpret the data.

#![expect(unsafe_code, reason = "ioctls that kvm-ioctls does not wrap safely")]

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, Xsave, kvm_device_attr, kvm_xsave, kvm_xsave2,
};
use kvm_ioctls::{Error, VcpuFd, VmFd};
use vmm_sys_util::fam::FamStruct;
use vmm_sys_util::ioctl::{ioctl_with_ref, ioctl_with_val};

use zerocopy::{FromBytes, IntoBytes};

// Linux include/uapi/linux/kvm.h.
mod number {
    use super::{KVMIO, kvm_device_attr};
    use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr};

    ioctl_io_nr!(KVM_SET_TSC_KHZ, KVMIO, 0xa2);
    ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
    ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
}
use number::{KVM_GET_DEVICE_ATTR, KVM_SET_DEVICE_ATTR, KVM_SET_TSC_KHZ};

/// `arch_prctl`: ask for an XSAVE feature on behalf of guests (Linux `asm/prctl.h`).
const ARCH_REQ_XCOMP_GUEST_PERM: libc::c_long = 0x1025;
/// The tile data of AMX, the one feature that must be asked for (Intel SDM 1, 13.1).
const XFEATURE_XTILE_DATA: libc::c_long = 18;

/// Requests AMX for the guests of this process: Linux allows its 8 KiB of tile data only on request
/// (Linux Documentation/arch/x86/xstate.rst). Call before the first vCPU is created and before
/// [`Capabilities::probe`](super::Capabilities::probe). Returns whether Linux granted the request;
/// on a processor without AMX it does not.
pub fn permit_amx() -> bool {
    // SAFETY: this arch_prctl takes two integers and touches no memory.
    let result = unsafe {
        libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_GUEST_PERM, XFEATURE_XTILE_DATA)
    };
    result == 0
}

fn tsc_offset_attribute(value: &u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: std::ptr::from_ref(value) as u64,
    }
}

/// Sets the rate in kHz that the TSCs of the VM's vCPUs will have when they are created; 0 is the
/// rate of the host's TSC as the kernel knows it now (Documentation/virt/kvm/api.rst 4.55). Needs
/// `KVM_CAP_VM_TSC_CONTROL`.
pub fn set_vm_tsc_khz(vm: &VmFd, khz: u32) -> Result<(), Error> {
    // SAFETY: a VM's fd; this ioctl takes a number and touches no memory.
    let result = unsafe { ioctl_with_val(vm, KVM_SET_TSC_KHZ(), khz.into()) };
    if result == 0 { Ok(()) } else { Err(Error::last()) }
}

/// Returns the vCPU's TSC minus the host's (scaled) TSC, modulo 2^64
/// (Documentation/virt/kvm/devices/vcpu.rst 4.1). `ENXIO` before Linux 5.16.
pub fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, Error> {
    let mut offset = 0u64;
    let attribute =
        kvm_device_attr { addr: (&raw mut offset) as u64, ..tsc_offset_attribute(&offset) };
    // SAFETY: a vCPU's fd; the kernel writes 8 bytes at `addr`, which is `offset`, alive here.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) };
    if result == 0 { Ok(offset) } else { Err(Error::last()) }
}

/// Sets the offset that [`tsc_offset`] returns.
pub fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), Error> {
    let attribute = tsc_offset_attribute(&offset);
    // SAFETY: a vCPU's fd; the kernel reads 8 bytes at `addr`, which is `offset`, alive here.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) };
    if result == 0 { Ok(()) } else { Err(Error::last()) }
}

/// Allocates an XSAVE area of at least `size` zero bytes.
fn area(size: usize) -> Result<Xsave, Error> {
    let extra = size.saturating_sub(size_of::<kvm_xsave>());
    let entries = extra.div_ceil(size_of::<<kvm_xsave2 as FamStruct>::Entry>());
    Xsave::new(entries).map_err(|_| Error::new(libc::ENOMEM))
}

/// Returns the vCPU's XSAVE area, of `size` bytes: [`Capabilities::xsave_size`](super::Capabilities).
pub fn xsave(vcpu: &VcpuFd, size: usize) -> Result<Vec<u8>, Error> {
    if size <= size_of::<kvm_xsave>() {
        // Before KVM_GET_XSAVE2 (Linux 5.17), and on every processor without a larger state.
        return Ok(vcpu.get_xsave()?.as_bytes().to_vec());
    }
    let mut xsave = area(size)?;
    // SAFETY: the area has the size that KVM_CAP_XSAVE2 returned. That size depends on CPU features that
    // this process may use, which do not change after the call.
    unsafe { vcpu.get_xsave2(&mut xsave) }?;
    let mut bytes = xsave.as_fam_struct_ref().xsave.as_bytes().to_vec();
    bytes.extend(xsave.as_slice().as_bytes());
    bytes.truncate(size);
    Ok(bytes)
}

/// Sets the XSAVE area from `bytes`, filled up with zeroes (features in their initial state) to
/// `size`, which is this host's [`Capabilities::xsave_size`](super::Capabilities). `EINVAL` if
/// `bytes` is longer than that, or shorter than the 4096 bytes that every kernel has.
pub fn set_xsave(vcpu: &VcpuFd, bytes: &[u8], size: usize) -> Result<(), Error> {
    let Some((legacy, extended)) = bytes.split_at_checked(size_of::<kvm_xsave>()) else {
        return Err(Error::new(libc::EINVAL));
    };
    let mut xsave = area(size)?;
    let room = xsave.as_mut_slice().as_mut_bytes();
    if extended.len() > room.len() {
        return Err(Error::new(libc::EINVAL));
    }
    room[..extended.len()].copy_from_slice(extended);
    let legacy = kvm_xsave::read_from_bytes(legacy).map_err(|_| Error::new(libc::EINVAL))?;
    // SAFETY: this writes only the fixed part of the area, not the length field of the rest.
    unsafe { xsave.as_mut_fam_struct() }.xsave = legacy;
    // SAFETY: the area has the size that KVM_CAP_XSAVE2 names on this host: KVM reads no more bytes.
    unsafe { vcpu.set_xsave2(&xsave) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_xsave_area_is_never_smaller_than_asked() {
        for size in [0, 4096, 4097, 8192, 11008] {
            let area = area(size).unwrap();
            assert!(size_of::<kvm_xsave>() + size_of_val(area.as_slice()) >= size, "{size}");
        }
    }
}
