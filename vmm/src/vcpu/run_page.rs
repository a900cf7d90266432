//! The two bytes of a vCPU's shared page that other threads, or a held exit, need.

#![expect(unsafe_code, reason = "fields of the page that KVM shares are accessed in place")]

use std::sync::atomic::{AtomicU8, Ordering};

use kvm_ioctls::VcpuFd;

/// Fields of a vCPU's `struct kvm_run`. Valid as long as the vCPU's fd is open, which the owner of
/// both sees to.
pub(super) struct RunPage {
    immediate_exit: *mut u8,
    io_size: *mut u8,
}

// SAFETY: the page is shared memory that does not belong to a thread; all accesses are atomic.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// The page of `vcpu`.
    pub(super) fn new(vcpu: &mut VcpuFd) -> Self {
        let page = vcpu.get_kvm_run();
        let immediate_exit = &raw mut page.immediate_exit;
        // SAFETY: a place in the mapped page; no value is read, whatever the union holds.
        let io_size = unsafe { &raw mut page.__bindgen_anon_1.io.size };
        Self { immediate_exit, io_size }
    }

    /// Makes the next `KVM_RUN` complete what is pending and return EINTR, or lets it run.
    pub(super) fn set_immediate_exit(&self, value: bool) {
        // SAFETY: a byte of the page, which is mapped as long as the vCPU is open.
        let byte = unsafe { AtomicU8::from_ptr(self.immediate_exit) };
        byte.store(value.into(), Ordering::SeqCst);
    }

    /// After a port I/O exit: the size of each access, 1, 2 or 4 bytes.
    pub(super) fn io_size(&self) -> usize {
        // SAFETY: a byte of the page, which is mapped as long as the vCPU is open.
        let byte = unsafe { AtomicU8::from_ptr(self.io_size) };
        usize::from(byte.load(Ordering::Relaxed)).clamp(1, 4)
    }
}
