//! Access to two bytes of the page that KVM shares for a vCPU (`struct kvm_run`): `immediate_exit`,
//! which other threads write, and `io.size`, which is read while kvm-ioctls' exit borrows the vCPU.

#![expect(unsafe_code, reason = "fields of the page that KVM shares are accessed in place")]

use std::sync::atomic::{AtomicU8, Ordering};

use kvm_ioctls::VcpuFd;

/// Pointers to fields of a vCPU's `struct kvm_run`. They are valid while the vCPU's fd is open; the
/// owner of both ensures that.
pub(super) struct RunPage {
    immediate_exit: *mut u8,
    io_size: *mut u8,
}

// SAFETY: the page is shared memory that does not belong to a thread; all accesses are atomic.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Returns the pointers into the page of `vcpu`.
    pub(super) fn new(vcpu: &mut VcpuFd) -> Self {
        let page = vcpu.get_kvm_run();
        let immediate_exit = &raw mut page.immediate_exit;
        // SAFETY: takes the address of a field in the mapped page. No value is read, so it does not
        // matter which member the union holds.
        let io_size = unsafe { &raw mut page.__bindgen_anon_1.io.size };
        Self { immediate_exit, io_size }
    }

    /// If `value`, the next `KVM_RUN` completes the pending exit and returns EINTR without running
    /// the guest; otherwise it runs the guest.
    pub(super) fn set_immediate_exit(&self, value: bool) {
        // SAFETY: a byte of the page, which is mapped as long as the vCPU is open.
        let byte = unsafe { AtomicU8::from_ptr(self.immediate_exit) };
        byte.store(value.into(), Ordering::SeqCst);
    }

    /// Returns the size of each access of the last port I/O exit: 1, 2 or 4 bytes. Call only after
    /// such an exit.
    pub(super) fn io_size(&self) -> usize {
        // SAFETY: a byte of the page, which is mapped as long as the vCPU is open.
        let byte = unsafe { AtomicU8::from_ptr(self.io_size) };
        usize::from(byte.load(Ordering::Relaxed)).clamp(1, 4)
    }
}
